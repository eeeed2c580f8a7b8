//! From bytes to a [`Call`], and from an [`Answer`] to bytes.

use super::assertion::{Assertions, HEADER};
use super::fields::Fields;
use super::operations::{Kind, Matched, Operation, find};
use super::{Answer, Call, openapi};
use crate::app::App;
use crate::audit::CallFacts;
use crate::limits::{BODY_WAIT_MAX, CONNECTIONS_MAX, URI_MAX_BYTES};
use crate::metrics::CallLabels;
use crate::op::{Actor, Op, request_id_new};
use api::limits::CONTROL_BODY_MAX_BYTES;
use api::{Error, ErrorCode};
use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::Response;
use model::RequestId;
use serde_json::{Map, Value, json};
use service::binding::request_hash;
use service::rpc::{Uids, peer_of};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// Who may connect.
const PEERS: &[&str] = &["edge", "root"];

/// What a request meets.
pub struct Server {
    app: Arc<App>,
    assertions: Assertions,
}

impl Server {
    /// A server of `app`.
    #[must_use]
    pub fn new(app: Arc<App>) -> Self {
        let assertions = Assertions::new(app.mint_key, app.now_ms());
        Self { app, assertions }
    }
}

/// Serves until `stop`, then finishes what is in flight.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: UnixListener,
    uids: Arc<Uids>,
    server: Server,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let router = Router::new().fallback(request).with_state(Arc::new(server));
    let listener = Allowed {
        listener,
        uids,
        slots: Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX)),
    };
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            let _ = stop.wait_for(|s| *s).await;
        })
        .await
}

/// Connections of those who may connect.
struct Allowed {
    listener: UnixListener,
    uids: Arc<Uids>,
    slots: Arc<tokio::sync::Semaphore>,
}

/// A connection, counted as long as it lives.
pub(super) struct Counted {
    stream: UnixStream,
    _slot: Option<tokio::sync::OwnedSemaphorePermit>,
}

impl axum::serve::Listener for Allowed {
    type Io = Counted;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Counted, SocketAddr) {
        loop {
            let slot = Arc::clone(&self.slots).acquire_owned().await.ok();
            match self.listener.accept().await {
                Ok((stream, addr)) if peer_of(&stream, &self.uids, PEERS).is_some() => {
                    return (
                        Counted {
                            stream,
                            _slot: slot,
                        },
                        addr,
                    );
                }
                Ok(_) => tracing::warn!("peer not allowed"),
                Err(e) => {
                    tracing::warn!(error = %e, "accept");
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl tokio::io::AsyncRead for Counted {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Counted {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// One request, from its first byte to its record.
async fn request(State(server): State<Arc<Server>>, request: Request) -> Response {
    let started = Instant::now();
    let (parts, body) = request.into_parts();
    let request_id = parts
        .headers
        .get("casemate-request-id")
        .and_then(|v| v.to_str().ok()?.parse::<RequestId>().ok())
        .map_or_else(request_id_new, |id| id.to_string());
    let method = parts.method.as_str();
    let found = find(method, parts.uri.path());
    let operation = found.operation();
    let mut op = Op {
        actor: Actor::Nobody,
        request_id,
    };
    let result = match read(body).await {
        Err(e) => Err(e),
        Ok(body) if operation.is_some_and(|o| o.kind == Kind::Public) => {
            drop(body);
            answer(&server.app, found, &op, Call::default()).await
        }
        Ok(body) => match identify(&server, &parts.headers, method, &parts.uri, &body) {
            Err(e) => Err(e),
            Ok(actor) => {
                op.actor = actor;
                match unwrap(&parts.uri, &body) {
                    Ok(call) => answer(&server.app, found, &op, call).await,
                    Err(e) => Err(e),
                }
            }
        },
    };
    record(&server.app, &op, operation, method, &result, started).await;
    respond(&op, result)
}

async fn read(body: Body) -> api::Result<Bytes> {
    match tokio::time::timeout(BODY_WAIT_MAX, to_bytes(body, CONTROL_BODY_MAX_BYTES)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => Err(Error::new(
            ErrorCode::TooLarge,
            "the body must arrive whole and hold at most 256 KiB",
        )),
        Err(_) => Err(Error::new(
            ErrorCode::BadRequest,
            "the body did not arrive in time",
        )),
    }
}

fn identify(
    server: &Server,
    headers: &HeaderMap,
    method: &str,
    uri: &Uri,
    body: &[u8],
) -> api::Result<Actor> {
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let binding = request_hash(method, path, body);
    let mut all = headers.get_all(HEADER).iter();
    let text = all.next().and_then(|v| v.to_str().ok());
    if all.next().is_some() {
        return server.assertions.actor(None, &binding, server.app.now_ms());
    }
    server.assertions.actor(text, &binding, server.app.now_ms())
}

fn unwrap(uri: &Uri, body: &[u8]) -> api::Result<Call> {
    if uri
        .path_and_query()
        .is_some_and(|p| p.as_str().len() > URI_MAX_BYTES)
    {
        return Err(Error::new(
            ErrorCode::BadRequest,
            "the path with its query is too long",
        ));
    }
    let Query(query) = Query::<HashMap<String, String>>::try_from_uri(uri)
        .map_err(|_| Error::new(ErrorCode::BadRequest, "the query can't be read"))?;
    Ok(Call {
        params: HashMap::new(),
        query,
        body: Fields::parse(body)?,
    })
}

async fn answer(app: &Arc<App>, found: Matched, op: &Op, mut call: Call) -> api::Result<Answer> {
    match found {
        Matched::Nothing => Err(Error::new(ErrorCode::NotFound, "there is no such path")),
        Matched::OtherMethod => Err(Error::new(
            ErrorCode::MethodNotAllowed,
            "this path does not take that method",
        )),
        Matched::Operation(operation, params) => {
            call.params = params;
            let work = (operation.run)(Arc::clone(app), Arc::new(op.clone()), Arc::new(call));
            // A client that goes away does not stop an act half-way.
            tokio::spawn(work).await.map_err(Error::internal)?
        }
    }
}

async fn record(
    app: &App,
    op: &Op,
    operation: Option<&'static Operation>,
    method: &str,
    result: &api::Result<Answer>,
    started: Instant,
) {
    if operation.is_some_and(|o| o.id == "health") {
        return;
    }
    let (status, code) = match result {
        Ok(a) => (a.status, "ok"),
        Err(e) => (e.code.http_status(), e.code.as_str()),
    };
    if let Err(e) = result {
        tracing::info!(
            request_id = op.request_id, actor = ?op.actor, operation = operation.map(|o| o.id),
            code, message = %e.message, detail = e.detail.as_deref().unwrap_or(""), "refused"
        );
    }
    let elapsed = started.elapsed();
    let id = operation.map_or("unknown", |o| o.id);
    let labels = CallLabels {
        operation: id,
        status,
    };
    app.metrics.calls.get_or_create(&labels).inc();
    app.metrics.seconds.observe(elapsed.as_secs_f64());
    let known = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
    let facts = CallFacts {
        method: known.into_iter().find(|m| *m == method).unwrap_or("OTHER"),
        route: operation.map_or("unknown", |o| o.path),
        status,
        code,
        latency_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
    };
    app.audit.call(op, facts).await;
}

fn respond(op: &Op, result: api::Result<Answer>) -> Response {
    let (status, body) = match result {
        Ok(answer) if answer.body.contains_key(openapi::MARK) => {
            (answer.status, Value::Object(answer.body))
        }
        Ok(answer) => {
            let mut body = Map::new();
            body.insert("success".into(), true.into());
            body.extend(answer.body);
            (answer.status, Value::Object(body))
        }
        Err(e) => {
            let code = e.code.as_str();
            let body = json!({
                "success": false,
                "error": code,
                "code": code,
                "message": e.message,
                "requestId": op.request_id,
            });
            (e.code.http_status(), body)
        }
    };
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    let json = HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(id) = HeaderValue::from_str(&op.request_id) {
        headers.insert("casemate-request-id", id);
    }
    response
}
