//! The runtime API (contract §3): two listeners, one service.
//!
//! Every request is judged by [`Auth`] before its path is looked at. Every error body is JSON
//! with `success: false`, since clients take anything else for a result (contract §1.3).
//! Must never answer without a valid token, or log.

mod exec;
mod files;
mod reply;
mod request;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use seal::tls::rustls::ServerConfig;
use seal::tls::tokio_rustls::TlsAcceptor;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::attach::token_state_store;
use crate::auth::{Auth, Door, Refusal, StateError};
use crate::clock;
use crate::exec::Tasks;
use crate::fsroot::FsRoot;
use crate::limits::{CONNECTIONS_MAX, HEAD_MAX_BYTES, HEAD_TIMEOUT};
use reply::{Failure, Payload, Reply};

/// What the runtime API serves.
pub struct Service {
    auth: Auth,
    tasks: Tasks,
    root: Arc<FsRoot>,
    /// Bytes of write bodies in memory at a time.
    write_room: Arc<Semaphore>,
    write_max_bytes: usize,
    /// Where the newest token state is kept for the next start.
    state_path: Option<PathBuf>,
    /// The sequence number of the one that is kept.
    state_kept: Mutex<Option<u64>>,
}

impl Service {
    /// The service of one workspace. `memory_bytes` is the machine's, for bounds; a newer token
    /// state is kept at `state_path`.
    #[must_use]
    pub fn new(
        auth: Auth,
        tasks: Tasks,
        root: Arc<FsRoot>,
        memory_bytes: u64,
        state_path: Option<PathBuf>,
    ) -> Arc<Self> {
        let write_max_bytes = files::write_max_bytes(memory_bytes);
        Arc::new(Self {
            auth,
            tasks,
            root,
            write_room: Arc::new(Semaphore::new(write_max_bytes)),
            write_max_bytes,
            state_path,
            state_kept: Mutex::default(),
        })
    }

    /// Keeps a token state for the next start, unless a newer one is kept. Nobody waits for it:
    /// what it revokes has ended already, and at the next start the host's own newest counts too.
    pub fn state_keep(self: &Arc<Self>, signed: String, seq: u64) {
        let Some(path) = self.state_path.clone() else {
            return;
        };
        let service = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let mut kept = service
                .state_kept
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if kept.is_none_or(|k| seq > k) && token_state_store(&path, &signed).is_ok() {
                *kept = Some(seq);
            }
        });
    }

    /// The exec tasks.
    #[must_use]
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// The verifiers and the token state.
    #[must_use]
    pub fn auth(&self) -> &Auth {
        &self.auth
    }
}

/// Serves the edge: mutual TLS, then a gateway token.
pub async fn serve_edge(
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    service: Arc<Service>,
) {
    accept(listener, move |stream| {
        edge_connection(stream, Arc::clone(&tls.borrow()), Arc::clone(&service))
    })
    .await;
}

/// Serves the edge on one connection.
pub(crate) async fn edge_connection<S>(stream: S, tls: Arc<ServerConfig>, service: Arc<Service>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let handshake = TlsAcceptor::from(tls).accept(stream);
    if let Ok(Ok(stream)) = tokio::time::timeout(HEAD_TIMEOUT, handshake).await {
        connection(stream, Door::Edge, service).await;
    }
}

/// Serves direct callers: plain HTTP and the raw connection token.
pub async fn serve_direct(listener: TcpListener, service: Arc<Service>) {
    accept(listener, move |stream| {
        connection(stream, Door::Direct, Arc::clone(&service))
    })
    .await;
}

async fn accept<F>(listener: TcpListener, serve: impl Fn(tokio::net::TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without it small answers wait; if the kernel refuses, they do.
                let _ = stream.set_nodelay(true);
                let serving = serve(stream);
                tokio::spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            // Out of descriptors, or the client is gone already: take a breath, don't spin.
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    }
}

async fn connection<S>(stream: S, door: Door, service: Arc<Service>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let serve = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(answer(service, door, request).await) }
    });
    // An error here is the client's: it went away, or spoke no HTTP.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX_BYTES)
        .serve_connection(TokioIo::new(stream), serve)
        .await;
}

/// Answers one request; a panic in a handler is this request's 500 and nobody else's.
async fn answer(
    service: Arc<Service>,
    door: Door,
    request: Request<Incoming>,
) -> Response<Payload> {
    let request_id = request::id(&request);
    let handled = AbortOnDrop(tokio::spawn(authorised(service, door, request))).await;
    let reply = handled.unwrap_or_else(|| {
        Err(Failure::new(
            500,
            "internal_error",
            "the agent failed; try again",
        ))
    });
    reply.unwrap_or_else(|failure| failure.response(request_id.as_deref()))
}

/// A spawned handler that ends when its client goes away.
struct AbortOnDrop(tokio::task::JoinHandle<Reply>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Future for AbortOnDrop {
    /// `None` if it panicked.
    type Output = Option<Reply>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.0).poll(cx).map(Result::ok)
    }
}

async fn authorised(service: Arc<Service>, door: Door, request: Request<Incoming>) -> Reply {
    // The one request without a token: its body is signed, and TLS says that it is the edge.
    if door == Door::Edge && request.uri().path() == api::agent::TOKEN_STATE_PATH {
        return token_state(&service, request).await;
    }
    let header = request.headers().get(AUTHORIZATION);
    let authorization = header.and_then(|value| value.to_str().ok());
    let grant = service
        .auth
        .check(door, authorization, clock::now_s())
        .map_err(refused)?;
    let revoked = service.auth.revoked(grant.clone());
    let reply = tokio::select! {
        reply = route(&service, request) => reply?,
        () = revoked => return Err(refused(Refusal::Unauthorized)),
    };
    Ok(reply.map(|payload| payload.until(service.auth.revoked(grant))))
}

async fn route(service: &Arc<Service>, request: Request<Incoming>) -> Reply {
    let path = request.uri().path().to_owned();
    let path = request::strip_target(&path)?;
    let method = request.method().clone();
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    match path
        .strip_prefix('/')
        .unwrap_or_default()
        .split('/')
        .collect::<Vec<_>>()[..]
    {
        ["health"] => {
            request::allow(&method, &[get])?;
            reply::json(200, &json!({"success": true, "status": "ok"}))
        }
        ["runtime"] => {
            request::allow(&method, &[get])?;
            reply::json(200, &runtime())
        }
        ["runtimes"] if path == request.uri().path() => {
            request::allow(&method, &[get])?;
            reply::json(200, &runtimes())
        }
        ["exec"] => match *request::allow(&method, &[post, get, delete])? {
            Method::POST => exec::create(service, request, false).await,
            Method::GET => exec::list(service),
            _ => exec::delete_all(service),
        },
        ["exec", "stream"] => match *request::allow(&method, &[post, get])? {
            Method::POST => exec::create(service, request, true).await,
            _ => exec::subscribe(service, &request),
        },
        ["exec", id] => match *request::allow(&method, &[get, delete])? {
            Method::GET => exec::get(service, id),
            _ => exec::delete(service, id),
        },
        ["exec", id, "input"] => {
            request::allow(&method, &[post])?;
            let id = id.to_owned();
            exec::input(service, &id, request).await
        }
        ["files"] => {
            request::allow(&method, &[get])?;
            files::list(service, &request).await
        }
        ["files", "stream"] => {
            request::allow(&method, &[get])?;
            files::stream(service, &request)
        }
        ["files", "read"] => {
            request::allow(&method, &[get])?;
            files::read(service, &request).await
        }
        ["files", "stat"] => {
            request::allow(&method, &[get])?;
            files::stat(service, &request).await
        }
        ["files", "write"] => {
            request::allow(&method, &[post, Method::PUT])?;
            files::write(service, request).await
        }
        ["files", "mkdir"] => {
            request::allow(&method, &[post])?;
            files::mkdir(service, request).await
        }
        ["files", "delete"] => {
            request::allow(&method, &[post, delete])?;
            files::delete(service, request).await
        }
        ["files", "transfer" | "search", ..]
        | ["terminals" | "watchers" | "ws" | "proxy" | "desktop", ..] => Err(Failure::new(
            501,
            "not_supported",
            "this version of the runtime does not have this call",
        )),
        _ => Err(Failure::not_found("no such call")),
    }
}

async fn token_state(service: &Arc<Service>, request: Request<Incoming>) -> Reply {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        signed: String,
    }
    request::allow(request.method(), &[Method::POST])?;
    let body: Body = request::body_json(request).await?;
    match service.auth.state_raise(&body.signed) {
        Ok(state) => {
            service.state_keep(body.signed, state.seq);
            let answer = json!({"success": true, "epoch": state.epoch, "seq": state.seq});
            reply::json(200, &answer)
        }
        Err(error @ StateError::Invalid) => Err(Failure::new(403, "forbidden", error)),
        Err(error @ StateError::Stale) => Err(Failure::new(409, "conflict", error)),
    }
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Unauthorized => Failure::new(401, "unauthorized", refusal),
        Refusal::Expired => Failure::new(401, "token_expired", refusal),
        // Never 401: clients wipe their credentials on it (contract §6).
        Refusal::Disabled => Failure::new(403, "forbidden", refusal),
    }
}

fn runtime() -> serde_json::Value {
    json!({
        "success": true,
        "os": "linux",
        "arch": std::env::consts::ARCH,
        "cpus": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        "home": "/root",
        "shell": "/bin/sh",
        "protocol_version": 1,
        "capabilities": ["exec", "files"],
    })
}

fn runtimes() -> serde_json::Value {
    json!({
        "success": true,
        "version": 1,
        "default_target": "default",
        "targets": [{
            "id": "default", "local": true, "available": true, "version": 1,
            "capabilities": ["exec", "files"], "runtime": runtime(),
        }],
    })
}
