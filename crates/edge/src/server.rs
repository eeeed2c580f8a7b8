//! The public face: accepts, speaks TLS 1.3 and HTTP, finds the plane, and answers.
//!
//! ```text
//!  accept ─▶ room? ─▶ TLS 1.3 ─▶ HTTP/1.1 or 2 (by ALPN) ─▶ host ─▶ control | gateway ─▶ HSTS
//! ```
//! Of a request only time, source address, status and bytes are recorded (EDGE-3).
//! One answer is not ours to mark: a head that HTTP/2 unpacks to more than 64 KiB is refused by the
//! library itself, with a bare 431.
//! Must never write a body anywhere (EDGE-2), or answer without HSTS (EDGE-1).

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderValue, Request, Response, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use model::RequestId;
use rustix::net::sockopt;
use seal::tls::rustls::ServerConfig;
use seal::tls::tokio_rustls::TlsAcceptor;
use seal::tls::tokio_rustls::server::TlsStream;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use api::ErrorCode;

use crate::answer::{Refusal, unreadable};
use crate::body::{Guarded, Payload};
use crate::control::Control;
use crate::crowd::Crowd;
use crate::gateway::Gateway;
use crate::hosts::{Hosts, Plane};
use crate::limits::{
    CONNECTION_BUFFER_BYTES, CONNECTIONS_PER_SOURCE_MAX, DRAIN_MAX, H2_CONNECTION_WINDOW_BYTES,
    H2_HEAD_MAX_BYTES, H2_SEND_BUFFER_BYTES, H2_STREAM_WINDOW_BYTES, H2_STREAMS_MAX, HANDSHAKE_MAX,
    HEAD_MAX_BYTES, HEAD_READ_MAX, HEADERS_MAX, IDLE_MAX, KEEP_ALIVE_ANSWER_MAX, KEEP_ALIVE_EVERY,
};
use crate::metrics::Metrics;
use crate::wire::{Phase, Wire};
use crate::{headers, limits};

/// What answers.
pub struct Server {
    /// Names.
    pub hosts: Hosts,
    /// The control plane.
    pub control: Control,
    /// The gateway.
    pub gateway: Gateway,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Connections at once.
    pub connections_max: usize,
}

/// Serves until `stop` turns true, then lets requests in flight end.
pub async fn serve(
    server: Arc<Server>,
    listeners: Vec<TcpListener>,
    tls: watch::Receiver<Arc<ServerConfig>>,
    mut stop: watch::Receiver<bool>,
) {
    let crowd = Crowd::new(server.connections_max, CONNECTIONS_PER_SOURCE_MAX);
    let tracker = TaskTracker::new();
    let kill = CancellationToken::new();
    let mut accepting = tokio::task::JoinSet::new();
    for listener in listeners {
        let (server, tls, stop, crowd) = (
            Arc::clone(&server),
            tls.clone(),
            stop.clone(),
            Arc::clone(&crowd),
        );
        let (tracker, kill) = (tracker.clone(), kill.clone());
        accepting.spawn(async move {
            loop {
                let (stream, address) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(e) => {
                        // Out of files, or the client is gone already: a breath, no spinning.
                        tracing::warn!(error = %e, "accept");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                };
                let source = address.ip().to_canonical();
                let Some(place) = crowd.enter(source, 1) else {
                    server.metrics.connections_refused.inc();
                    continue;
                };
                let config = Arc::clone(&tls.borrow());
                let (server, stop, kill) = (Arc::clone(&server), stop.clone(), kill.clone());
                tracker.spawn(async move {
                    server.metrics.connections.inc();
                    tokio::select! {
                        () = connection(&server, stream, source, config, stop) => {}
                        () = kill.cancelled() => {}
                    }
                    server.metrics.connections.dec();
                    drop(place);
                });
            }
        });
    }
    stopped(&mut stop).await;
    accepting.shutdown().await;
    tracker.close();
    if tokio::time::timeout(DRAIN_MAX, tracker.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            left = tracker.len(),
            "drain timed out; closing what is left"
        );
        kill.cancel();
        tracker.wait().await;
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|s| *s).await;
}

/// Drives a connection until it ends, asking it to finish when the edge stops or nothing happens.
macro_rules! drive {
    ($connection:expr, $stop:expr, $activity:expr) => {{
        let mut connection = std::pin::pin!($connection);
        let (mut asked, mut idle) = (false, false);
        loop {
            tokio::select! {
                // Its fault is the client's: it went away or spoke no HTTP.
                _ = connection.as_mut() => break,
                () = stopped($stop), if !asked => asked = true,
                () = $activity.idle(), if !asked => (asked, idle) = (true, true),
                // It was asked, and had nothing to finish.
                () = tokio::time::sleep(KEEP_ALIVE_ANSWER_MAX), if idle => break,
            }
            connection.as_mut().graceful_shutdown();
        }
    }};
}

async fn connection(
    server: &Arc<Server>,
    stream: TcpStream,
    source: IpAddr,
    config: Arc<ServerConfig>,
    mut stop: watch::Receiver<bool>,
) {
    // Without these, small answers wait and dead clients stay; a refusal breaks nothing.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let _ = sockopt::set_tcp_keepidle(&stream, KEEP_ALIVE_EVERY);
    let handshake = tokio::time::timeout(HANDSHAKE_MAX, TlsAcceptor::from(config).accept(stream));
    let Ok(Ok(tls)) = handshake.await else {
        server.metrics.handshakes_failed.inc();
        return;
    };
    server.metrics.handshakes.inc();
    let activity = Arc::new(Activity::default());
    let phase = Arc::new(Phase::default());
    let h2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
    let answer = {
        let (server, activity, phase) = (
            Arc::clone(server),
            Arc::clone(&activity),
            Arc::clone(&phase),
        );
        service_fn(move |request: Request<Incoming>| {
            let busy = Busy::new(Arc::clone(&activity));
            let both_framings =
                !h2 && phase.served() && request.headers().contains_key(header::TRANSFER_ENCODING);
            let ended = (!h2).then(|| Arc::clone(&phase));
            let seen = Seen::new(source, Arc::clone(&server.metrics), ended, busy);
            let server = Arc::clone(&server);
            async move { Ok::<_, Infallible>(server.answer(seen, request, both_framings).await) }
        })
    };
    if h2 {
        let connection = h2_builder().serve_connection(TokioIo::new(tls), answer);
        drive!(connection, &mut stop, activity);
    } else {
        let wire = h1_wire(server, tls, source, phase);
        let connection = h1_builder().serve_connection(TokioIo::new(wire), answer);
        drive!(connection, &mut stop, activity);
    }
}

fn h1_wire(
    server: &Arc<Server>,
    tls: TlsStream<TcpStream>,
    source: IpAddr,
    phase: Arc<Phase>,
) -> Wire<TlsStream<TcpStream>> {
    let metrics = Arc::clone(&server.metrics);
    let refuse = move |status| {
        let seen = Seen::new(source, Arc::clone(&metrics), None, Busy::default());
        let refusal = unreadable(status);
        let body = refusal.json(&seen.request_id);
        seen.set_status(refusal.status.as_u16());
        seen.add_bytes(body.len());
        let head = format!(
            "HTTP/1.1 {} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\ncache-control: no-store\r\nstrict-transport-security: {}\r\n\
             x-content-type-options: nosniff\r\nx-request-id: {}\r\n\r\n",
            refusal.status.as_u16(),
            refusal.status.canonical_reason().unwrap_or("Bad Request"),
            body.len(),
            headers::HSTS,
            seen.request_id,
        );
        [head.into_bytes(), body].concat().into()
    };
    Wire::new(tls, phase, Box::new(refuse))
}

fn h1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_MAX)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEAD_MAX_BYTES)
        .max_buf_size(CONNECTION_BUFFER_BYTES);
    builder
}

fn h2_builder() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(H2_HEAD_MAX_BYTES)
        .initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(H2_SEND_BUFFER_BYTES)
        .keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_ANSWER_MAX);
    builder
}

impl Server {
    async fn answer(
        &self,
        seen: Seen,
        request: Request<Incoming>,
        both_framings: bool,
    ) -> Response<Payload> {
        let seen = Arc::new(seen);
        let h1 = request.version() < Version::HTTP_2;
        let mut response = match self.route(&seen, request, both_framings).await {
            Ok(response) => response,
            Err(refusal) => {
                let mut response = refusal.response(&seen.request_id);
                if h1 && refusal.is_malformed() {
                    // Where it ends may be in doubt: nothing more is read from there.
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(header::CONNECTION, close);
                }
                let length = response.body().size_hint().exact().unwrap_or(0);
                seen.add_bytes(usize::try_from(length).unwrap_or(0));
                response
            }
        };
        headers::set_ours(response.headers_mut(), &seen.request_id);
        seen.set_status(response.status().as_u16());
        response.map(|body| http_body_util::BodyExt::boxed_unsync(Guarded::new(body, seen)))
    }

    async fn route(
        &self,
        seen: &Arc<Seen>,
        request: Request<Incoming>,
        both_framings: bool,
    ) -> Result<Response<Payload>, Refusal> {
        if both_framings {
            return Err(Refusal::new(
                ErrorCode::BadRequest,
                "Content-Length and Transfer-Encoding must not stand in one request",
            ));
        }
        let size = headers::size_bytes(request.headers()) + request.uri().path().len();
        if size > HEAD_MAX_BYTES || request.headers().len() > limits::HEADERS_MAX {
            return Err(unreadable(431));
        }
        let (parts, body) = request.into_parts();
        let plane = self.hosts.plane(&parts)?;
        let request = Request::from_parts(parts, body);
        // The planes' futures are large; the box keeps the connection's small.
        match plane {
            Plane::Control => Box::pin(self.control.serve(seen, request)).await,
            Plane::Gateway => Box::pin(self.gateway.serve(seen, request)).await,
        }
    }
}

/// One request, as it is recorded: when it is dropped, its answer has been sent or given up.
pub struct Seen {
    /// Its id in every log of the platform.
    pub request_id: String,
    /// Where it came from.
    pub source: IpAddr,
    bytes: Arc<AtomicU64>,
    status: AtomicU16,
    metrics: Arc<Metrics>,
    phase: Option<Arc<Phase>>,
    _busy: Busy,
}

impl Seen {
    fn new(source: IpAddr, metrics: Arc<Metrics>, phase: Option<Arc<Phase>>, busy: Busy) -> Self {
        metrics.in_flight.inc();
        Self {
            request_id: RequestId::from_bytes(seal::random::bytes()).to_string(),
            source,
            bytes: Arc::default(),
            status: AtomicU16::new(0),
            metrics,
            phase,
            _busy: busy,
        }
    }

    /// Where bytes of its bodies are counted, both ways together.
    #[must_use]
    pub fn bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes)
    }

    /// Counts bytes of a body.
    pub fn add_bytes(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn set_status(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        // 0: the client went away before there was an answer.
        let status = self.status.load(Ordering::Relaxed);
        let bytes = self.bytes.load(Ordering::Relaxed);
        tracing::info!(target: "access", source = %self.source, status, bytes);
        self.metrics.answered(status);
        self.metrics.bytes.inc_by(bytes);
        self.metrics.in_flight.dec();
        if let Some(phase) = &self.phase {
            phase.ended();
        }
    }
}

/// Whether anything happens on a connection.
#[derive(Default)]
struct Activity {
    in_flight: AtomicUsize,
    begun: AtomicUsize,
}

impl Activity {
    /// Ends when nothing has happened for [`IDLE_MAX`].
    async fn idle(&self) {
        loop {
            let begun = self.begun.load(Ordering::Relaxed);
            tokio::time::sleep(IDLE_MAX).await;
            if self.in_flight.load(Ordering::Relaxed) == 0
                && self.begun.load(Ordering::Relaxed) == begun
            {
                return;
            }
        }
    }
}

/// A request in flight on a connection.
#[derive(Default)]
struct Busy(Option<Arc<Activity>>);

impl Busy {
    fn new(activity: Arc<Activity>) -> Self {
        activity.in_flight.fetch_add(1, Ordering::Relaxed);
        activity.begun.fetch_add(1, Ordering::Relaxed);
        Self(Some(activity))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(activity) = &self.0 {
            activity.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
