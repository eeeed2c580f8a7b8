//! A dress rehearsal of a start, so that the kernel's caches are warm and, under emulation, the
//! code is translated: mounts, keys, a TLS handshake and an exec through the real HTTP service.
//!
//! It is **a process of its own** in its own mount and UTS namespaces: when it has ended, its
//! keys, files, mounts and the state of its random generator are gone with it, by construction.
//! Must never touch the workspace's disk.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use api::agent::tls_name;
use api::mint::{GatewayClaims, TokenState};
use model::{AccountId, WorkspaceId};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;
use seal::sign::{Signed, SigningKey};
use seal::tls::tokio_rustls::TlsConnector;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::attach::{DISK, memory_bytes};
use crate::auth::Auth;
use crate::boot::{BASE, BootError, step};
use crate::exec::Tasks;
use crate::http::{Service, serve_edge};
use crate::launch::Launcher;
use crate::standin::{standin_gone_wait, standin_mount};
use crate::{clock, rootfs};

/// The argument that makes the agent's executable the rehearsal.
pub const ARGUMENT: &str = "rehearse";
/// A rehearsal that takes longer has failed, s.
const TIMEOUT_S: u64 = 60;

/// Runs the rehearsal as a process and waits for it. Only while nothing else reaps.
///
/// # Errors
/// If it fails.
pub fn rehearse() -> Result<(), BootError> {
    let failed = || step("rehearsing");
    let status = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .status()
        .map_err(failed())?;
    standin_gone_wait();
    if status.success() {
        Ok(())
    } else {
        Err(failed()(std::io::Error::other(format!(
            "it ended with {status}"
        ))))
    }
}

/// The rehearsal itself: what the process does.
///
/// # Errors
/// Which step failed.
pub fn run() -> Result<(), BootError> {
    // SAFETY: this process has one thread; it leaves namespaces and splits no memory.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWUTS) }
        .map_err(|e| step("leaving the namespaces")(e.into()))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(|e| step("making mounts private")(e.into()))?;
    let disk = Path::new(DISK);
    standin_mount(disk).map_err(step("mounting a stand-in for the disk"))?;
    let root = rootfs::assemble(Path::new(BASE), disk, Path::new("/root-rehearsal"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(step("starting the runtime"))?;
    let rehearsal = async {
        let timeout = Duration::from_secs(TIMEOUT_S);
        let calls = tokio::time::timeout(timeout, calls(root)).await;
        calls.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    };
    runtime
        .block_on(rehearsal)
        .map_err(step("calling the service"))
}

/// A throw-away workspace, its service, and a client that calls it.
async fn calls(root: rootfs::Root) -> std::io::Result<()> {
    let other = std::io::Error::other::<String>;
    let (mint, gateway) = (SigningKey::generate(), SigningKey::generate());
    let (guest, edge) = (SigningKey::generate(), SigningKey::generate());
    let guest = seal::tls::Identity::new(guest);
    let edge = seal::tls::Identity::new(edge);
    let workspace = WorkspaceId::from_bytes([0; 8]);
    let account = AccountId::from_bytes([0; 8]);
    let state = TokenState {
        workspace: workspace.clone(),
        account: account.clone(),
        epoch: 1,
        raw_hash: String::new(),
        enabled: true,
        gone: false,
        identity_pub: guest.public().to_hex(),
        seq: 1,
    };
    let state = Signed::new(&mint, api::context::TOKEN_STATE, &state);
    let now_s = clock::now_s();
    let token = seal::jwt::sign(
        &gateway,
        &GatewayClaims {
            iss: "casemate".into(),
            sub: account.to_string(),
            aud: workspace.to_string(),
            iat: now_s,
            exp: now_s + 60,
            jti: "rehearsal".into(),
            epoch: 1,
        },
    );
    let auth = Auth::new(
        workspace.clone(),
        mint.public(),
        gateway.public(),
        state.as_str(),
    )
    .map_err(|e| other(e.to_string()))?;
    let name = tls_name(&workspace);
    let ttl = Duration::from_secs(600);
    let tls = |e: seal::SealError| other(e.to_string());
    let server = seal::tls::server_config(
        guest.leaf(&name, ttl).map_err(tls)?,
        Some(edge.public()),
        seal::tls::HTTP1,
    )
    .map_err(tls)?;
    let client = seal::tls::client_config(
        &guest.public(),
        Some(edge.leaf("edge.casemate.internal", ttl).map_err(tls)?),
        seal::tls::HTTP1,
    )
    .map_err(tls)?;
    let tasks = Tasks::new(Launcher::new(Some(root.namespace), &[]));
    let service = Service::new(auth, tasks, Arc::new(root.files), memory_bytes(), None);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let serving = tokio::spawn(serve_edge(listener, server, service));
    let python = r#"{"cmd":["python3","-c","pass"]}"#;
    for (method, path, body, must) in [
        ("POST", "/exec", r#"{"cmd":["/bin/true"]}"#, true),
        (
            "POST",
            "/exec/stream",
            r#"{"cmd":["echo rehearsal | cat"]}"#,
            true,
        ),
        ("POST", "/exec", python, false),
        ("GET", "/files?path=/etc", "", true),
        (
            "POST",
            "/files/write",
            r#"{"path":"/root/rehearsal","content":"x"}"#,
            true,
        ),
    ] {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let server = name
            .clone()
            .try_into()
            .map_err(|_| other("the TLS name".into()))?;
        let mut stream = TlsConnector::from(Arc::clone(&client))
            .connect(server, stream)
            .await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {name}\r\nauthorization: Bearer {token}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        if must && !answer.starts_with(b"HTTP/1.1 20") {
            let answer = String::from_utf8_lossy(&answer[..answer.len().min(500)]).into_owned();
            return Err(other(format!("{method} {path}: {answer}")));
        }
    }
    serving.abort();
    Ok(())
}
