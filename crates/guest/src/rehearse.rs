//! A dress rehearsal of a start, so that the kernel's caches are warm and, under emulation, the
//! code is translated: a whole attach by the very code of a start, on a stand-in for the disk with
//! a made-up identity, and calls of the real HTTP service through TLS.
//!
//! It is **a process of its own** in its own mount and UTS namespaces: when it has ended, its
//! keys, files, mounts and the state of its random generator are gone with it, by construction.
//! What it changes of the machine itself, the clock and `eth0`, it sets back or an attach sets
//! anew. Must never touch the workspace's disk, nor open a TCP connection for a template: the
//! kernel draws the secrets of its sequence numbers and timestamps at the first, once and for all,
//! and all clones would share them. After a restore its own attach has reseeded the generator.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use api::agent::{Attach, GuestConfig, IDENTITY_MAGIC, IdentityBlock, TOKEN_STATE_PATH, tls_name};
use api::mint::{GatewayClaims, TokenState};
use model::{AccountId, StartId, WorkspaceId};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;
use seal::Zeroizing;
use seal::random::Generation;
use seal::sign::{Signed, SigningKey};
use seal::tls::tokio_rustls::TlsConnector;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

use crate::attach::{self, Workspace, memory_bytes};
use crate::boot::{BASE_DEVICE, BootError, step};
use crate::exec::Tasks;
use crate::http::{Service, edge_connection, serve_edge};
use crate::standin::{standin, standin_gone_wait};
use crate::{clock, identity, net};

/// The argument that makes the agent's executable the rehearsal.
pub const ARGUMENT: &str = "rehearse";
/// A rehearsal that takes longer has failed, s.
const TIMEOUT_S: u64 = 60;
/// Its addresses: TEST-NET-1 (RFC 5737), which nobody has.
const IP: &str = "192.0.2.2";
const GATEWAY: &str = "192.0.2.1";

/// How much is rehearsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// For a template: all that should be in the kernel's caches.
    Caches,
    /// After a restore: what a start runs, so that this very VMM has translated it.
    Code,
}

impl Extent {
    const fn word(self) -> &'static str {
        match self {
            Self::Caches => "caches",
            Self::Code => "code",
        }
    }
}

/// Runs the rehearsal as a process and waits for it. Only while nothing else reaps.
///
/// # Errors
/// If it fails.
pub fn rehearse(extent: Extent) -> Result<(), BootError> {
    let failed = || step("rehearsing");
    let status = Command::new("/proc/self/exe")
        .args([ARGUMENT, extent.word()])
        .status()
        .map_err(failed())?;
    standin_gone_wait();
    net::release().map_err(step("taking the rehearsal's address away"))?;
    if status.success() {
        Ok(())
    } else {
        Err(failed()(std::io::Error::other(format!(
            "it ended with {status}"
        ))))
    }
}

/// The rehearsal itself: what the process does. `extent` is the word of an [`Extent`].
///
/// # Errors
/// Which step failed.
pub fn run(extent: &str) -> Result<(), BootError> {
    // SAFETY: this process has one thread; it leaves namespaces and splits no memory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWUTS) }
        .map_err(|e| step("leaving the namespaces")(e.into()))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(|e| step("making mounts private")(e.into()))?;
    // As an attach does, but before this process's first draw, which comes before its attach.
    Generation::of_process().map_err(step("beginning a generation"))?;
    let play = Play::new();
    let (device, held) = standin(&play.identity).map_err(step("making a stand-in for the disk"))?;
    // The disk's driver, which the stand-in has not: what is there is no identity.
    let _ = identity::read(Path::new(BASE_DEVICE));
    let workspace = attach::attach(&play.attach, &device)
        .map_err(|e| step("attaching the stand-in")(std::io::Error::other(e.to_string())))?;
    drop(held);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(step("starting the runtime"))?;
    let rehearsal = async {
        let timeout = Duration::from_secs(TIMEOUT_S);
        let caches = extent == Extent::Caches.word();
        let played = tokio::time::timeout(timeout, play.calls(workspace, caches)).await;
        played.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    };
    runtime
        .block_on(rehearsal)
        .map_err(step("calling the service"))
}

/// A request of the rehearsal.
struct Call {
    method: &'static str,
    path: &'static str,
    body: &'static str,
    /// Also after a restore.
    code: bool,
    /// Whether the rehearsal fails with it: an image need not have a Python.
    must: bool,
}

const fn call(method: &'static str, path: &'static str, body: &'static str) -> Call {
    Call {
        method,
        path,
        body,
        code: false,
        must: true,
    }
}

const CALLS: &[Call] = &[
    Call {
        code: true,
        ..call("POST", TOKEN_STATE_PATH, "")
    },
    Call {
        code: true,
        ..call("POST", "/exec", r#"{"cmd":["true"]}"#)
    },
    Call {
        code: true,
        ..call("POST", "/exec", r#"{"cmd":["true"]}"#)
    },
    call(
        "POST",
        "/exec/stream",
        r#"{"cmd":["echo rehearsal | cat"]}"#,
    ),
    Call {
        must: false,
        ..call("POST", "/exec", r#"{"cmd":["python3","-c","pass"]}"#)
    },
    call("GET", "/files?path=/etc", ""),
    call(
        "POST",
        "/files/write",
        r#"{"path":"/root/rehearsal","content":"x"}"#,
    ),
];

/// A throw-away workspace and a client of it.
struct Play {
    workspace: WorkspaceId,
    identity: Zeroizing<Vec<u8>>,
    attach: Attach,
    /// A later token state than the attach's, as the edge brings it.
    told: String,
    /// Signs gateway tokens.
    gateway: SigningKey,
    guest: seal::tls::Identity,
    edge: seal::tls::Identity,
}

impl Play {
    fn new() -> Self {
        let (mint, gateway) = (SigningKey::generate(), SigningKey::generate());
        let seed: Zeroizing<[u8; 32]> = seal::random::bytes().into();
        let guest = seal::tls::Identity::from_seed(&seed);
        let edge = seal::tls::Identity::new(SigningKey::generate());
        let workspace = WorkspaceId::from_bytes([0; 8]);
        let config = GuestConfig {
            workspace: workspace.clone(),
            hostname: "rehearsal".into(),
            env: Vec::new(),
            cmd: Vec::new(),
        };
        let config = serde_json::json!(config).to_string();
        let mut state = TokenState {
            workspace: workspace.clone(),
            account: AccountId::from_bytes([0; 8]),
            epoch: 1,
            raw_hash: String::new(),
            enabled: true,
            gone: false,
            identity_pub: guest.public().to_hex(),
            seq: 1,
        };
        let signed =
            |state: &TokenState| Signed::new(&mint, api::context::TOKEN_STATE, state).to_string();
        let token_state = signed(&state);
        state.seq += 1;
        let told = serde_json::json!({ "signed": signed(&state) }).to_string();
        let block = serde_json::json!(IdentityBlock {
            workspace: workspace.clone(),
            start_id: StartId::from_bytes([0; 8]),
            seed: hex::encode(seal::random::bytes::<64>()),
            identity_seed: hex::encode(*seed),
            config_digest: hex::encode(seal::hash::sha256(config.as_bytes())),
            mint_key: mint.public().to_hex(),
            gateway_key: gateway.public().to_hex(),
            edge_key: edge.public().to_hex(),
        })
        .to_string();
        let length = u32::try_from(block.len()).unwrap_or(u32::MAX).to_be_bytes();
        let identity = [IDENTITY_MAGIC, &length[..], block.as_bytes()].concat();
        Self {
            attach: Attach {
                time_unix_ns: clock::now_ms() * 1_000_000,
                config,
                token_state,
                ip: IP.into(),
                prefix: 24,
                gateway: GATEWAY.into(),
            },
            told,
            identity: identity.into(),
            workspace,
            gateway,
            guest,
            edge,
        }
    }

    /// Serves `made` and calls it, all on one connection: no TCP one for a template.
    async fn calls(&self, made: Workspace, template: bool) -> std::io::Result<()> {
        let tasks = Tasks::new(made.launcher);
        let service = Service::new(made.auth, tasks, made.files, memory_bytes(), None);
        if template {
            let (stream, theirs) = UnixStream::pair()?;
            tokio::spawn(edge_connection(theirs, made.tls, service));
            return self.converse(stream, CALLS.iter()).await;
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let serving = tokio::spawn(serve_edge(listener, watch::channel(made.tls).1, service));
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let calls = CALLS.iter().filter(|call| call.code);
        self.converse(stream, calls).await?;
        serving.abort();
        Ok(())
    }

    async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        calls: impl Iterator<Item = &Call>,
    ) -> std::io::Result<()> {
        let other = std::io::Error::other::<String>;
        let name = tls_name(&self.workspace);
        let leaf = self
            .edge
            .leaf("edge.casemate.internal", Duration::from_secs(600));
        let client = leaf
            .and_then(|leaf| {
                seal::tls::client_config(&self.guest.public(), Some(leaf), seal::tls::HTTP1)
            })
            .map_err(|e| other(e.to_string()))?;
        let server = name.clone().try_into();
        let server = server.map_err(|_| other("the TLS name".into()))?;
        let mut stream = TlsConnector::from(Arc::clone(&client))
            .connect(server, stream)
            .await?;
        let token = self.token();
        for call in calls {
            let (method, path) = (call.method, call.path);
            let body = match path {
                TOKEN_STATE_PATH => &self.told,
                _ => call.body,
            };
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: {name}\r\nauthorization: Bearer {token}\r\n\
                 content-length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body.as_bytes()).await?;
            let answer = answer(&mut stream).await?;
            if call.must && !answer.starts_with(b"HTTP/1.1 20") {
                let answer = String::from_utf8_lossy(&answer[..answer.len().min(500)]).into_owned();
                return Err(other(format!("{method} {path}: {answer}")));
            }
        }
        Ok(())
    }

    fn token(&self) -> String {
        let now_s = clock::now_s();
        seal::jwt::sign(
            &self.gateway,
            &GatewayClaims {
                iss: "casemate".into(),
                sub: AccountId::from_bytes([0; 8]).to_string(),
                aud: self.workspace.to_string(),
                iat: now_s,
                exp: now_s + 60,
                jti: "rehearsal".into(),
                epoch: 1,
            },
        )
    }
}

/// Reads one answer of the service: its length is named, or it comes in chunks.
async fn answer(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    loop {
        if let Some(at) = answer.windows(4).position(|w| w == b"\r\n\r\n") {
            let (head, body) = answer.split_at(at + 4);
            let head = String::from_utf8_lossy(head).to_ascii_lowercase();
            let length = head.split_once("content-length: ").and_then(|(_, rest)| {
                let (length, _) = rest.split_once("\r\n")?;
                length.parse::<usize>().ok()
            });
            let whole = match length {
                Some(length) => body.len() >= length,
                None => body.ends_with(b"0\r\n\r\n"),
            };
            if whole {
                return Ok(answer);
            }
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}
