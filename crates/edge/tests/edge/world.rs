//! The world: fakes, and clients.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::host::{Actual, ActualState};
use api::mint::{Assertion, Credential, GatewayClaims, TokenState};
use api::{Error, ErrorCode, agent, context, host, mint};
use bytes::Bytes;
use edge::hosts::Hosts;
use edge::state::GuestNet;
use edge::{Edge, Parts};
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::{AccountId, KeyId, StartId, WorkspaceId};
use seal::sign::{Signed, SigningKey, VerifyingKey};
use seal::tls::rustls_pki_types::ServerName;
use seal::tls::tokio_rustls::client::TlsStream;
use seal::tls::tokio_rustls::{TlsAcceptor, TlsConnector};
use seal::tls::{
    HTTP1, HTTP2_AND_1, Identity, client_config_ca, local_ca, server_config, server_config_pem,
};
use service::clock::Clock;
use service::rpc::{Uids, ok};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub const API: &str = "api.test";
pub const GW: &str = "gw.test";
pub const NOW_S: i64 = 1_800_000_000;
pub const DEADLINE: Duration = Duration::from_secs(20);

pub type Body = UnsyncBoxBody<Bytes, std::convert::Infallible>;

pub fn body(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed_unsync()
}

/// What control was sent.
#[derive(Debug, Clone)]
pub struct Sent {
    pub method: String,
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

pub struct World {
    pub edge: Arc<Edge>,
    pub address: SocketAddr,
    pub ca: String,
    pub clock: Clock,
    pub mint_key: SigningKey,
    pub gateway_key: SigningKey,
    pub edge_public: VerifyingKey,
    pub mint: Arc<Feed<String>>,
    pub host: Arc<Feed<Actual>>,
    pub control: Arc<Mutex<Vec<Sent>>>,
    pub port: u16,
    guest_listener: Mutex<Option<TcpListener>>,
    pub stop: watch::Sender<bool>,
    pub served: tokio::task::JoinHandle<()>,
    _stops: Vec<watch::Sender<bool>>,
    _dir: tempfile::TempDir,
}

/// A feed of changes: numbered states.
pub struct Feed<T> {
    states: Mutex<HashMap<WorkspaceId, (u64, T)>>,
    seq: watch::Sender<u64>,
    pub hangs: AtomicBool,
    pub refuses: AtomicBool,
    /// Who waits for news hears none.
    pub slow: AtomicBool,
    /// How often that was so.
    pub unheard: AtomicUsize,
    /// How often it was told that a workspace is wanted.
    pub wanted: AtomicUsize,
}

impl<T: Clone> Feed<T> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            states: Mutex::default(),
            seq: watch::Sender::new(1),
            hangs: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
            slow: AtomicBool::new(false),
            unheard: AtomicUsize::new(0),
            wanted: AtomicUsize::new(0),
        })
    }

    /// Forgets all states, without a word.
    pub fn forget(&self) {
        self.states.lock().unwrap().clear();
    }

    fn put(&self, workspace: &WorkspaceId, state: T) {
        let seq = *self.seq.borrow() + 1;
        self.states
            .lock()
            .unwrap()
            .insert(workspace.clone(), (seq, state));
        self.seq.send_replace(seq);
    }

    async fn changes(&self, since: u64, wait_ms: u64) -> api::Result<(u64, Vec<T>)> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Unavailable, "refused by the test"));
        }
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let mut seq = self.seq.subscribe();
        let wait = Duration::from_millis(wait_ms);
        let _ = tokio::time::timeout(wait, seq.wait_for(|s| *s > since)).await;
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        if wait_ms > 0 && self.slow.load(Ordering::Relaxed) {
            self.unheard.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(wait).await;
            return Ok((since, Vec::new()));
        }
        let states = self.states.lock().unwrap();
        let news = states
            .values()
            .filter(|(s, _)| *s > since)
            .map(|(_, t)| t.clone())
            .collect();
        Ok((*self.seq.borrow(), news))
    }
}

impl World {
    pub async fn new() -> Arc<Self> {
        Self::with(false).await
    }

    /// One whose requests soon give a workspace that sleeps up, if `slow`.
    pub async fn with(slow: bool) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let uids = BTreeMap::from([("me".to_owned(), rustix::process::getuid().as_raw())]);
        let uids = Arc::new(Uids::from_map(uids));
        let (mint_key, gateway_key) = (SigningKey::generate(), SigningKey::generate());
        let identity = Identity::new(SigningKey::generate());
        let edge_public = identity.public();
        let (mint, host) = (Feed::new(), Feed::new());
        let control = Arc::new(Mutex::new(Vec::new()));
        let mut stops = Vec::new();

        let (tx, rx) = watch::channel(false);
        stops.push(tx);
        let (feed, key) = (Arc::clone(&mint), mint_key.clone());
        tokio::spawn(service::rpc::serve(
            service::rpc::bind(&at("mint")).unwrap(),
            Arc::clone(&uids),
            &["me"],
            rx,
            move |_, _, op| mint_answers(Arc::clone(&feed), key.clone(), op),
        ));
        let (tx, rx) = watch::channel(false);
        stops.push(tx);
        let feed = Arc::clone(&host);
        tokio::spawn(service::rpc::serve(
            service::rpc::bind(&at("host")).unwrap(),
            uids,
            &["me"],
            rx,
            move |_, _, op| host_answers(Arc::clone(&feed), op),
        ));
        tokio::spawn(control_answers(at("control"), Arc::clone(&control)));

        let guest_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = guest_listener.local_addr().unwrap().port();
        let clock = Clock::manual(NOW_S as u64 * 1000);
        let edge = Arc::new(Edge::new(Parts {
            hosts: Hosts::new(&[API.into()], &[GW.into()]).unwrap(),
            identity,
            mint_key: mint_key.public(),
            gateway_key: gateway_key.public(),
            mint: at("mint"),
            host: at("host"),
            control: at("control"),
            net: GuestNet {
                base: "127.0.0.0".parse().unwrap(),
                port,
            },
            clock: clock.clone(),
            connections_max: 1_000,
            wake_max: Duration::from_millis(if slow { 300 } else { 15_000 }),
        }));
        let ca = local_ca::make().unwrap();
        let names = [API.to_owned(), GW.to_owned(), "localhost".to_owned()];
        let cert = local_ca::issue(&ca.key_pem, &names, &[], Duration::from_secs(3600)).unwrap();
        let config = server_config_pem(&cert.cert_pem, &cert.key_pem, HTTP2_AND_1).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopping) = watch::channel(false);
        let serving = Arc::clone(&edge);
        let served = tokio::spawn(async move {
            let (_tls, tls) = watch::channel(config);
            serving.serve(vec![listener], tls, stopping).await;
        });
        let world = Arc::new(Self {
            edge,
            address,
            ca: ca.cert_pem,
            clock,
            mint_key,
            gateway_key,
            edge_public,
            mint,
            host,
            control,
            port,
            guest_listener: Mutex::new(Some(guest_listener)),
            stop,
            served,
            _stops: stops,
            _dir: dir,
        });
        let table = Arc::clone(&world.edge.table);
        eventually("the feeds are there", move || table.is_fresh()).await;
        world
    }

    /// A running, open workspace with a guest at 127.0.0.1 (the first) or 127.0.0.`n`.
    pub async fn workspace(self: &Arc<Self>, n: u8) -> Workspace {
        let listener = match n {
            1 => self.guest_listener.lock().unwrap().take().unwrap(),
            _ => TcpListener::bind(format!("127.0.0.{n}:{}", self.port))
                .await
                .unwrap(),
        };
        let id = WorkspaceId::from_bytes([n; 8]);
        let identity = Identity::new(SigningKey::generate());
        let seen = Arc::new(GuestSeen::default());
        tokio::spawn(guest(
            id.clone(),
            identity.clone(),
            self.edge_public,
            listener,
            Arc::clone(&seen),
        ));
        let ws = Workspace {
            world: Arc::clone(self),
            state: Mutex::new(TokenState {
                workspace: id.clone(),
                account: AccountId::from_bytes([n; 8]),
                epoch: 1,
                raw_hash: String::new(),
                enabled: true,
                gone: false,
                identity_pub: identity.public().to_hex(),
                seq: 0,
            }),
            actual: Mutex::new(Actual {
                workspace: id.clone(),
                generation: 1,
                state: ActualState::Running,
                start_id: Some(StartId::from_bytes([n; 8])),
                ip: Some(format!("127.0.0.{n}")),
                public_access: true,
                since_ms: None,
                started_from: None,
                memory: false,
                wakes: false,
                wanted: false,
                snapshot: None,
                archived: None,
                error: None,
            }),
            seen,
            id,
        };
        ws.token_state(|_| {});
        ws.actual(|_| {});
        let token = ws.token(|_| {});
        let world = Arc::clone(self);
        // The edge has heard of it when it stops answering 404.
        until("the workspace is known", || async {
            world.get(&token, "/health").await.status() == 200
        })
        .await;
        ws
    }

    /// A gateway request over a fresh HTTP/1.1 connection.
    pub async fn get(&self, token: &str, path: &str) -> Response<Bytes> {
        let request = Request::get(path)
            .header("host", GW)
            .header("authorization", format!("Bearer {token}"))
            .body(body(""))
            .unwrap();
        self.send(request).await
    }

    pub async fn send(&self, request: Request<Body>) -> Response<Bytes> {
        let response = self.send_streaming(request).await;
        let (parts, incoming) = response.into_parts();
        let bytes = within(incoming.collect()).await.unwrap().to_bytes();
        Response::from_parts(parts, bytes)
    }

    pub async fn send_streaming(&self, request: Request<Body>) -> Response<Incoming> {
        let tls = self.tls(HTTP1).await;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
            .await
            .unwrap();
        tokio::spawn(connection);
        within(sender.send_request(request)).await.unwrap()
    }

    pub async fn send_h2(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        let tls = self.tls(HTTP2_AND_1).await;
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tls))
                .await
                .unwrap();
        tokio::spawn(connection);
        within(sender.send_request(request)).await
    }

    pub async fn tls(&self, alpn: &[&str]) -> TlsStream<TcpStream> {
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let config = client_config_ca(&self.ca, alpn).unwrap();
        let name = ServerName::try_from(API).unwrap();
        within(TlsConnector::from(config).connect(name, tcp))
            .await
            .unwrap()
    }

    /// Writes raw bytes and reads until the edge closes.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut tls = self.tls(HTTP1).await;
        tls.write_all(bytes).await.unwrap();
        tls.flush().await.unwrap();
        let mut out = Vec::new();
        let mut buf = [0; 4096];
        loop {
            match within(tls.read(&mut buf)).await {
                Ok(0) | Err(_) => return String::from_utf8_lossy(&out).into_owned(),
                Ok(n) => out.extend_from_slice(&buf[..n]),
            }
        }
    }

    pub fn control_seen(&self) -> Vec<Sent> {
        self.control.lock().unwrap().clone()
    }
}

pub struct Workspace {
    pub world: Arc<World>,
    pub id: WorkspaceId,
    state: Mutex<TokenState>,
    actual: Mutex<Actual>,
    pub seen: Arc<GuestSeen>,
}

impl Workspace {
    pub fn token_state(&self, change: impl FnOnce(&mut TokenState)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        state.seq += 1;
        let signed = Signed::new(&self.world.mint_key, context::TOKEN_STATE, &*state);
        self.world.mint.put(&self.id, signed.as_str().to_owned());
    }

    pub fn actual(&self, change: impl FnOnce(&mut Actual)) {
        let mut actual = self.actual.lock().unwrap();
        change(&mut actual);
        self.world.host.put(&self.id, actual.clone());
    }

    pub fn claims(&self) -> GatewayClaims {
        let state = self.state.lock().unwrap();
        GatewayClaims {
            iss: "casemate".into(),
            sub: state.account.to_string(),
            aud: self.id.to_string(),
            iat: NOW_S - 10,
            exp: NOW_S + 600,
            jti: "00112233445566778899aabbccddeeff".into(),
            epoch: state.epoch,
        }
    }

    pub fn token(&self, change: impl FnOnce(&mut GatewayClaims)) -> String {
        let mut claims = self.claims();
        change(&mut claims);
        seal::jwt::sign(&self.world.gateway_key, &claims)
    }

    /// Waits until a request is answered so.
    pub async fn becomes(&self, token: &str, status: u16, code: &str) {
        until(&format!("{status} {code}"), || async {
            let answer = self.world.get(token, "/health").await;
            answer.status() == status && (code.is_empty() || code_of(&answer) == code)
        })
        .await;
    }
}

pub fn code_of(answer: &Response<Bytes>) -> String {
    let json: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(json["success"], false);
    assert_eq!(json["error"], json["code"]);
    assert!(json["requestId"].as_str().unwrap().starts_with("req_"));
    assert!(!json["message"].as_str().unwrap().is_empty());
    json["code"].as_str().unwrap().to_owned()
}

async fn mint_answers(
    feed: Arc<Feed<String>>,
    key: SigningKey,
    op: mint::Op,
) -> api::Result<serde_json::Value> {
    match op {
        mint::Op::Assert {
            credential,
            binding,
        } => {
            let good = match &credential {
                Credential::ApiKey {
                    client_id,
                    client_secret,
                } => client_id == "key_1" && client_secret == "sesame",
                Credential::Bearer { token } => token == "bearer-token",
            };
            if !good {
                return Err(Error::new(ErrorCode::Unauthorized, "wrong credential"));
            }
            let assertion = Assertion {
                account: AccountId::from_bytes([1; 8]),
                key: KeyId::from_bytes([1; 8]),
                binding,
                iat_ms: 0,
                exp_ms: 30_000,
                jti: "0".repeat(32),
            };
            let signed = Signed::new(&key, context::ASSERTION, &assertion).to_string();
            ok(&mint::Signed { signed })
        }
        mint::Op::Changes { since, wait_ms } => {
            let (seq, states) = feed.changes(since, wait_ms).await?;
            ok(&mint::Changes { seq, states })
        }
        _ => Err(Error::new(ErrorCode::BadRequest, "not in this world")),
    }
}

async fn host_answers(feed: Arc<Feed<Actual>>, op: host::Op) -> api::Result<serde_json::Value> {
    match op {
        host::Op::Changes { since, wait_ms } => {
            let (seq, states) = feed.changes(since, wait_ms).await?;
            ok(&host::Changes { seq, states })
        }
        host::Op::Want { .. } => {
            feed.wanted.fetch_add(1, Ordering::SeqCst);
            ok(&true)
        }
        _ => Err(Error::new(ErrorCode::BadRequest, "not in this world")),
    }
}

async fn control_answers(path: std::path::PathBuf, sent: Arc<Mutex<Vec<Sent>>>) {
    let listener = service::rpc::bind(&path).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let sent = Arc::clone(&sent);
        let answer = service_fn(move |request: Request<Incoming>| {
            let sent = Arc::clone(&sent);
            async move {
                let (parts, incoming) = request.into_parts();
                let body = incoming.collect().await?.to_bytes();
                sent.lock().unwrap().push(Sent {
                    method: parts.method.to_string(),
                    target: parts.uri.to_string(),
                    headers: parts.headers,
                    body,
                });
                let response = Response::builder()
                    .header("content-type", "application/json")
                    .header("etag", "\"x\"")
                    .header("cache-control", "public, max-age=9")
                    .header("casemate-internal", "x")
                    .body(self::body(r#"{"success":true}"#));
                Ok::<_, hyper::Error>(response.unwrap())
            }
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), answer),
        );
    }
}

/// What a guest saw.
#[derive(Default)]
pub struct GuestSeen {
    pub connections: AtomicUsize,
    pub open: AtomicUsize,
    pub requests: Mutex<Vec<(String, HeaderMap)>>,
    pub bytes: AtomicU64,
    pub token_states: Mutex<Vec<String>>,
    /// Take no more of uploads.
    pub clogged: AtomicBool,
    /// Say this again and again, whatever is asked.
    pub says: Mutex<Option<&'static str>>,
}

struct Open(Arc<GuestSeen>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn guest(
    id: WorkspaceId,
    identity: Identity,
    edge: VerifyingKey,
    listener: TcpListener,
    seen: Arc<GuestSeen>,
) {
    let leaf = identity
        .leaf(&agent::tls_name(&id), Duration::from_secs(3600))
        .unwrap();
    let acceptor = TlsAcceptor::from(server_config(leaf, Some(edge), HTTP1).unwrap());
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        seen.connections.fetch_add(1, Ordering::SeqCst);
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        tokio::spawn(async move {
            seen.open.fetch_add(1, Ordering::SeqCst);
            let _open = Open(Arc::clone(&seen));
            let Ok(mut tls) = acceptor.accept(tcp).await else {
                return;
            };
            let says = *seen.says.lock().unwrap();
            if let Some(says) = says {
                // Until it is hung up on.
                while tls.write_all(says.as_bytes()).await.is_ok() {}
                return;
            }
            let answer = service_fn(move |r| guest_answers(Arc::clone(&seen), r));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(tls), answer)
                .await;
        });
    }
}

async fn guest_answers(
    seen: Arc<GuestSeen>,
    request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, hyper::Error>>, hyper::Error> {
    let path = request.uri().path().to_owned();
    seen.requests
        .lock()
        .unwrap()
        .push((request.uri().to_string(), request.headers().clone()));
    let full = |text: String| {
        Full::new(Bytes::from(text))
            .map_err(|never| match never {})
            .boxed_unsync()
    };
    let mut response = Response::new(full(String::new()));
    match path.as_str() {
        "/casemate/v1/token-state" => {
            let bytes = request.collect().await?.to_bytes();
            let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            seen.token_states
                .lock()
                .unwrap()
                .push(json["signed"].as_str().unwrap().to_owned());
        }
        "/echo" => *response.body_mut() = request.into_body().boxed_unsync(),
        "/sink" => {
            let mut incoming = request.into_body();
            while let Some(frame) = incoming.frame().await {
                let len = frame?.data_ref().map_or(0, Bytes::len);
                seen.bytes.fetch_add(len as u64, Ordering::SeqCst);
                while seen.clogged.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        "/source" => {
            let count: u64 = request.uri().query().unwrap().parse().unwrap();
            *response.body_mut() = source(count, Arc::clone(&seen)).boxed_unsync();
        }
        "/hang" => *response.body_mut() = source(u64::MAX, Arc::clone(&seen)).boxed_unsync(),
        "/silent" => std::future::pending().await,
        "/hostile" => {
            let headers = response.headers_mut();
            headers.insert("strict-transport-security", "max-age=0".parse().unwrap());
            headers.insert("set-cookie", "a=b".parse().unwrap());
            headers.insert("cache-control", "public".parse().unwrap());
            headers.insert("casemate-x", "1".parse().unwrap());
            headers.insert("connection", "x-hop".parse().unwrap());
            headers.insert("x-hop", "1".parse().unwrap());
        }
        _ => *response.body_mut() = full(r#"{"success":true,"status":"ok"}"#.into()),
    }
    Ok(response)
}

/// `count` chunks of 64 KiB; then, if endless, silence.
fn source(
    count: u64,
    seen: Arc<GuestSeen>,
) -> impl hyper::body::Body<Data = Bytes, Error = hyper::Error> {
    let chunk = Bytes::from(vec![7u8; 64 << 10]);
    let endless = count == u64::MAX;
    let (tx, rx) = tokio::sync::mpsc::channel::<Bytes>(1);
    tokio::spawn(async move {
        for _ in 0..if endless { 1 } else { count } {
            if tx.send(chunk.clone()).await.is_err() {
                return;
            }
            seen.bytes.fetch_add(chunk.len() as u64, Ordering::SeqCst);
        }
        if endless {
            tx.closed().await;
        }
    });
    StreamBody::new(futures(rx))
}

fn futures(
    mut rx: tokio::sync::mpsc::Receiver<Bytes>,
) -> impl futures_util::Stream<Item = Result<Frame<Bytes>, hyper::Error>> {
    futures_util::stream::poll_fn(move |cx| rx.poll_recv(cx).map(|b| b.map(|b| Ok(Frame::data(b)))))
}

pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("in time")
}

/// Polls until `done`.
pub async fn until<F, R>(what: &str, mut done: F)
where
    F: FnMut() -> R,
    R: Future<Output = bool>,
{
    let polled = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(DEADLINE, polled).await.is_ok(),
        "never: {what}"
    );
}

pub async fn eventually(what: &str, done: impl Fn() -> bool) {
    until(what, || std::future::ready(done())).await;
}

/// The count at which something stops: no progress between two looks.
pub async fn stalls(count: impl Fn() -> u64) -> u64 {
    within(async {
        loop {
            let before = count();
            tokio::time::sleep(Duration::from_millis(300)).await;
            if before > 0 && count() == before {
                return before;
            }
        }
    })
    .await
}
