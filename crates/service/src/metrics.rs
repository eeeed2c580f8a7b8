//! Prometheus metrics of a daemon, over `/run/casemate/<process>/metrics.sock` (HTTP, any path).
//!
//! Counters and gauges only: never a label that a tenant chooses, never content (SEE-2).

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::path::Path;
use std::sync::Arc;

/// Serves `registry` on the socket at `path` until the task is dropped.
///
/// # Errors
/// The socket's path and the system's error.
pub fn serve(path: &Path, registry: Registry) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    let listener = crate::rpc::bind(path).context("metrics")?;
    let registry = Arc::new(registry);
    Ok(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let registry = Arc::clone(&registry);
            let answer = service_fn(move |_: Request<Incoming>| {
                let registry = Arc::clone(&registry);
                async move {
                    let mut text = String::new();
                    encode(&mut text, &registry)?;
                    let mut response = Response::new(Full::new(Bytes::from(text)));
                    response.headers_mut().insert(
                        "content-type",
                        hyper::header::HeaderValue::from_static(
                            "application/openmetrics-text; version=1.0.0; charset=utf-8",
                        ),
                    );
                    Ok::<_, std::fmt::Error>(response)
                }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer),
            );
        }
    }))
}
