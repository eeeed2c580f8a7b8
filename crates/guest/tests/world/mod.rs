//! A workspace's service on loopback, and clients of both its doors.
#![allow(clippy::unwrap_used, unreachable_pub, dead_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::agent::tls_name;
use api::mint::{GatewayClaims, TokenState};
use guest::auth::Auth;
use guest::exec::Tasks;
use guest::fsroot::FsRoot;
use guest::http::{Service, serve_direct, serve_edge};
use guest::launch::Launcher;
use model::WorkspaceId;
use seal::sign::{Signed, SigningKey};
use seal::tls::Identity;
use seal::tls::tokio_rustls::TlsConnector;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const RAW: &str = "5ec2e75ec2e75ec2e75ec2e75ec2e7";
const WS: &str = "ws_0123456789abcdef";
const ACCOUNT: &str = "acct_0123456789abcdef";
/// No answer takes this long, even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub struct World {
    pub dir: tempfile::TempDir,
    pub edge: SocketAddr,
    pub direct: SocketAddr,
    pub mint: SigningKey,
    pub gateway: SigningKey,
    pub guest_identity: Identity,
    pub edge_identity: Identity,
    service: Arc<Service>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.service.tasks().delete_all();
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
    /// The body ended as HTTP says it must.
    pub complete: bool,
}

impl Answer {
    pub fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    /// Asserts that this is a failure in the contract's envelope.
    #[track_caller]
    pub fn failed(&self, status: u16, code: &str) {
        let body = self.json();
        assert_eq!(
            (self.status, &body["code"]),
            (status, &Value::from(code)),
            "{body}"
        );
        assert_eq!(
            (&body["success"], &body["error"]),
            (&false.into(), &Value::from(code))
        );
        assert!(body["message"].is_string());
        assert!(
            self.head.contains("content-type: application/json"),
            "{}",
            self.head
        );
    }
}

impl World {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let root = FsRoot::open_directory(&dir.path().join("root")).unwrap();
        let key = |n| SigningKey::from_seed(&[n; 32]);
        let (mint, gateway) = (key(1), key(2));
        let (guest_identity, edge_identity) = (Identity::new(key(3)), Identity::new(key(4)));
        let workspace: WorkspaceId = WS.parse().unwrap();
        let signed = Signed::new(&mint, api::context::TOKEN_STATE, &state());
        let auth = Auth::new(
            workspace.clone(),
            mint.public(),
            gateway.public(),
            signed.as_str(),
        )
        .unwrap();
        let env = ["GIVEN=value".to_owned(), "nonsense".to_owned()];
        let tasks = Tasks::new(Launcher::new(None, &env));
        let kept = dir.path().join("state/token-state");
        let service = Service::new(auth, tasks, Arc::new(root), 1 << 30, Some(kept));
        let leaf = guest_identity
            .leaf(&tls_name(&workspace), DEADLINE)
            .unwrap();
        let anchor = Some(edge_identity.public());
        let tls = seal::tls::server_config(leaf, anchor, seal::tls::HTTP1).unwrap();
        let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (edge, direct) = (listen().await.unwrap(), listen().await.unwrap());
        let (edge_at, direct_at) = (edge.local_addr().unwrap(), direct.local_addr().unwrap());
        tokio::spawn(serve_edge(
            edge,
            tokio::sync::watch::channel(tls).1,
            Arc::clone(&service),
        ));
        tokio::spawn(serve_direct(direct, Arc::clone(&service)));
        Self {
            dir,
            edge: edge_at,
            direct: direct_at,
            mint,
            gateway,
            guest_identity,
            edge_identity,
            service,
        }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn signed_state(&self, state: &TokenState) -> String {
        Signed::new(&self.mint, api::context::TOKEN_STATE, state).to_string()
    }

    pub fn jwt(&self, epoch: u64) -> String {
        seal::jwt::sign(&self.gateway, &claims(epoch))
    }

    /// A request at the direct door with the raw token.
    pub async fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let auth = format!("authorization: Bearer {RAW}\r\n");
        self.call_with(method, path, &auth, body).await
    }

    pub async fn call_with(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let request = request(method, path, headers, body);
        exchange(TcpStream::connect(self.direct).await.unwrap(), &request).await
    }

    /// A request at the edge's door, as the edge, with this bearer token.
    pub async fn call_edge(&self, method: &str, path: &str, token: &str, body: &str) -> Answer {
        let stream = self.edge_connect(Some(&self.edge_identity)).await.unwrap();
        let auth = match token {
            "" => String::new(),
            token => format!("authorization: Bearer {token}\r\n"),
        };
        exchange(stream, &request(method, path, &auth, body)).await
    }

    pub async fn edge_connect(
        &self,
        client: Option<&Identity>,
    ) -> std::io::Result<impl AsyncRead + AsyncWrite + Unpin + use<>> {
        let leaf = client.map(|client| client.leaf("edge.casemate.internal", DEADLINE).unwrap());
        let anchor = self.guest_identity.public();
        let config = seal::tls::client_config(&anchor, leaf, seal::tls::HTTP1).unwrap();
        let name = tls_name(&WS.parse().unwrap()).try_into().unwrap();
        let stream = TcpStream::connect(self.edge).await?;
        TlsConnector::from(config).connect(name, stream).await
    }
}

pub fn state() -> TokenState {
    TokenState {
        workspace: WS.parse().unwrap(),
        account: ACCOUNT.parse().unwrap(),
        epoch: 3,
        raw_hash: hex::encode(seal::hash::sha256(RAW.as_bytes())),
        enabled: true,
        gone: false,
        identity_pub: String::new(),
        seq: 10,
    }
}

pub fn claims(epoch: u64) -> GatewayClaims {
    let now_s = guest::clock::now_s();
    GatewayClaims {
        iss: "casemate".into(),
        sub: ACCOUNT.into(),
        aud: WS.into(),
        iat: now_s,
        exp: now_s + 3600,
        jti: "00".repeat(16),
        epoch,
    }
}

pub fn request(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    let len = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len}\r\n\
         connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

pub async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, request: &[u8]) -> Answer {
    // A server that refuses a long body early may close while it is still being sent.
    let _ = stream.write_all(request).await;
    answer(stream).await
}

/// Reads to the end of the connection.
pub async fn answer<S: AsyncRead + Unpin>(mut stream: S) -> Answer {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut bytes)).await;
    let _ = read.expect("no answer in time");
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Answer {
    let end = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .expect("no head")
        + 4;
    let head = String::from_utf8(bytes[..end].to_vec())
        .unwrap()
        .to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let raw = &bytes[end..];
    let (body, complete) = if head.contains("transfer-encoding: chunked") {
        dechunk(raw)
    } else {
        (raw.to_vec(), true)
    };
    Answer {
        status,
        head,
        body,
        complete,
    }
}

fn dechunk(mut raw: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(end) = raw.windows(2).position(|w| w == b"\r\n") else {
            return (body, false);
        };
        let text = std::str::from_utf8(&raw[..end]).unwrap();
        let len = usize::from_str_radix(text, 16).unwrap();
        if len == 0 {
            return (body, true);
        }
        let Some(chunk) = raw.get(end + 2..end + 2 + len) else {
            return (body, false);
        };
        body.extend_from_slice(chunk);
        raw = raw.get(end + 4 + len..).unwrap_or_default();
    }
}

/// The events of an SSE body, by the same rules as the SDK's parser.
pub fn events(body: &str) -> Vec<(String, Value)> {
    let (mut out, mut name) = (Vec::new(), String::new());
    let mut lines: Vec<_> = body.split('\n').collect();
    lines.pop();
    for line in lines {
        if let Some(event) = line.strip_prefix("event: ") {
            name = event.trim().to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            out.push((
                std::mem::take(&mut name),
                serde_json::from_str(data).unwrap(),
            ));
        } else if line.is_empty() {
            name.clear();
        }
    }
    out
}

/// What a stream of these events printed.
pub fn printed(events: &[(String, Value)], stream: &str) -> Vec<u8> {
    use base64::Engine as _;
    let chunks = events.iter().filter(|(name, _)| name == stream);
    let decode = |(_, data): &(String, Value)| {
        base64::engine::general_purpose::STANDARD
            .decode(data["data"].as_str().unwrap())
            .unwrap()
    };
    chunks.flat_map(decode).collect()
}
