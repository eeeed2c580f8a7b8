//! The executable: init, the handover of listeners, readiness, what it logs, and its stop.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use seal::sign::{SigningKey, VerifyingKey};
use seal::tls::rustls_pki_types::ServerName;
use seal::tls::tokio_rustls::TlsConnector;
use seal::tls::{HTTP1, client_config_ca};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{eventually, within};

fn edge(root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_casemate-edge"));
    command.arg("--root").arg(root);
    command
}

/// Ends the process it started, whatever the test's end.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn init(root: &Path) -> serde_json::Value {
    let out = edge(root)
        .arg("init")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    serde_json::from_slice(&out.stdout).unwrap()
}

#[tokio::test]
async fn it_starts_serves_logs_four_fields_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for made in [
        "run/casemate/edge",
        "var/lib/casemate/edge",
        "etc/casemate/trust",
    ] {
        std::fs::create_dir_all(root.join(made)).unwrap();
    }
    let trust = init(root)["trust"].clone();
    assert_eq!(init(root)["trust"], trust, "init is idempotent");
    VerifyingKey::from_hex(trust["edge.pub"].as_str().unwrap()).unwrap();
    let ca = trust["ca.pem"].as_str().unwrap();
    for name in ["mint.pub", "gateway.pub"] {
        let key = SigningKey::generate().public().to_hex();
        std::fs::write(root.join("etc/casemate/trust").join(name), key).unwrap();
    }

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let log = root.join("log");
    let mut child = Reaped(
        edge(root)
            .arg("run")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap(),
    );
    let fds = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut buffer = SendAncillaryBuffer::new(&mut space);
    assert!(buffer.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(
        &ours,
        &[IoSlice::new(b"listeners")],
        &mut buffer,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
    let ready = root.join("run/casemate/edge/ready");
    eventually("it is ready", || ready.exists()).await;

    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let config = client_config_ca(ca, HTTP1).unwrap();
    let mut tls = within(TlsConnector::from(config).connect(name, tcp))
        .await
        .unwrap();
    let secret = "GET /s3cret-path?q=1 HTTP/1.1\r\nhost: localhost\r\nx-client-id: key_s3cret\r\n\
                  x-client-secret: s3cret\r\nconnection: close\r\n\r\n";
    tls.write_all(secret.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(tls.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("strict-transport-security"));

    let metrics = root.join("run/casemate/edge/metrics.sock");
    let mut socket = tokio::net::UnixStream::connect(metrics).await.unwrap();
    let get = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    socket.write_all(get.as_bytes()).await.unwrap();
    let mut text = String::new();
    within(socket.read_to_string(&mut text)).await.unwrap();
    for line in [
        "casemate_edge_handshakes_total 1",
        "casemate_edge_feeds_fresh 0",
    ] {
        assert!(text.contains(line), "{text}");
    }

    let pid = rustix::process::Pid::from_child(&child.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut status = None;
    crate::world::until("it stops", || {
        status = child.0.try_wait().unwrap();
        std::future::ready(status.is_some())
    })
    .await;
    assert!(status.unwrap().success());
    assert!(!ready.exists());

    let log = std::fs::read_to_string(log).unwrap();
    assert!(
        !log.contains("s3cret") && !log.contains("localhost"),
        "{log}"
    );
    let access: Vec<serde_json::Value> = log
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
        .filter(|l| l["target"] == "access")
        .collect();
    assert_eq!(access.len(), 1, "{log}");
    let fields: Vec<_> = access[0]["fields"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    assert_eq!(fields, ["bytes", "source", "status"]);
    let line: Vec<_> = access[0].as_object().unwrap().keys().cloned().collect();
    assert_eq!(line, ["fields", "level", "target", "timestamp"]);
    assert_eq!(access[0]["fields"]["status"], 503);
}

#[test]
fn without_a_supervisor_it_says_who_starts_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = edge(dir.path())
        .arg("run")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("casemate up"), "{text}");
}
