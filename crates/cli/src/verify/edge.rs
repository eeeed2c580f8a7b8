//! EDGE: TLS and the way in.

use super::Finding;
use super::dsk::write_canary;
use super::world::World;
use anyhow::{Context as _, ensure};
use reqwest::Method;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub(super) async fn edge_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let address = *w
        .probe
        .config
        .edge
        .listen
        .first()
        .context("edge.listen is empty")?;
    let mut seen = Vec::new();
    for (name, minor) in [("TLS 1.0", 1), ("TLS 1.1", 2), ("TLS 1.2", 3)] {
        let answer = old_hello(address, minor).with_context(|| format!("{name} hello"))?;
        ensure!(
            answer != Answer::ServerHello,
            "the edge answered a {name} hello with a ServerHello"
        );
        seen.push(format!("{name} {answer:?}"));
    }
    let [control, gateway] = crate::urls(w.probe.config);
    let mut statuses = Vec::new();
    for url in [
        format!("{control}/health"),
        format!("{control}/workspace"),
        format!("{control}/no/such/thing"),
        format!("{gateway}/health"),
        format!("{gateway}/no/such/thing"),
    ] {
        let answer = w.owner.http().request(Method::GET, &url).send().await?;
        let hsts = answer.headers().get("strict-transport-security");
        ensure!(
            hsts.is_some(),
            "{url} answered {} without HSTS",
            answer.status()
        );
        statuses.push(answer.status().as_u16().to_string());
    }
    Finding::pass(format!(
        "{}; TLS 1.3 answers; HSTS on {} answers ({})",
        seen.join(", "),
        statuses.len(),
        statuses.join(", ")
    ))
}

pub(super) async fn edge_5(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let slot = w.slot(&id)?;
    let plain = w.as_edge(&["agent-plain", &slot.net.ip], "")?;
    ensure!(plain != "answered", "the agent's port answered plain HTTP");
    let stranger = w.as_edge(&["agent-stranger", &id, &slot.net.ip], "")?;
    ensure!(
        stranger != "answered",
        "the agent took a client that is not the edge"
    );
    let Ok(capture) = Capture::start(w, slot.slot) else {
        return Finding::not_yet(format!(
            "plain HTTP to the agent: {plain}; a foreign certificate: {stranger}; the wire was not looked at: apt-get install tcpdump"
        ));
    };
    let mark = write_canary(w, &id).await?;
    let token = w.owner.runtime_token(&id).await?;
    let (status, body) = w.gateway(&token, "/files/read?path=/root/canary").await?;
    ensure!(
        status == 200 && body["content"] == *mark,
        "reading the canary back: {status}"
    );
    let bytes = capture.stop()?;
    let found = bytes
        .windows(mark.len())
        .filter(|b| *b == mark.as_bytes())
        .count();
    let jwt = bytes
        .windows(20)
        .filter(|b| *b == &token.as_bytes()[..20])
        .count();
    w.public(&id, false).await?;
    ensure!(
        found == 0 && jwt == 0,
        "on the tap: canary {found} times, token {jwt} times"
    );
    Finding::pass(format!(
        "plain HTTP to the agent: {plain}; a foreign certificate: {stranger}; a canary sent in and read back: 0 times in {} bytes captured on the tap",
        bytes.len()
    ))
}

/// A capture of two small calls is larger than this.
const CAPTURE_MIN_BYTES: usize = 1_000;

/// What an old hello was answered.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The handshake goes on.
    ServerHello,
    /// A fatal alert.
    Alert,
    /// The connection was closed.
    Closed,
}

/// Sends a minimal ClientHello of an old version, as RFC 5246 section 7.4.1.2 has it.
fn old_hello(address: std::net::SocketAddr, minor: u8) -> anyhow::Result<Answer> {
    let mut body = vec![3, minor];
    body.extend_from_slice(&[7; 32]);
    body.push(0);
    // ECDHE and RSA suites of the time.
    let suites: &[u8] = &[
        0xc0, 0x2b, 0xc0, 0x2f, 0xc0, 0x0a, 0xc0, 0x14, 0, 0x2f, 0, 0x35,
    ];
    body.extend_from_slice(&[0, u8::try_from(suites.len())?]);
    body.extend_from_slice(suites);
    body.extend_from_slice(&[1, 0]);
    // supported_groups, ec_point_formats, signature_algorithms.
    let extensions: &[u8] = &[
        0, 10, 0, 6, 0, 4, 0, 29, 0, 23, 0, 11, 0, 2, 1, 0, 0, 13, 0, 8, 0, 6, 4, 3, 8, 4, 4, 1,
    ];
    body.extend_from_slice(&[0, u8::try_from(extensions.len())?]);
    body.extend_from_slice(extensions);
    let mut record = vec![22, 3, 1, 0, u8::try_from(body.len() + 4)?];
    record.extend_from_slice(&[1, 0, 0, u8::try_from(body.len())?]);
    record.extend_from_slice(&body);
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&record)?;
    let mut answer = [0u8; 1];
    Ok(match stream.read(&mut answer) {
        Ok(1) if answer[0] == 22 => Answer::ServerHello,
        Ok(1) if answer[0] == 21 => Answer::Alert,
        _ => Answer::Closed,
    })
}

/// A capture of what crosses a tap.
struct Capture {
    child: std::process::Child,
    stderr: std::process::ChildStderr,
    file: std::path::PathBuf,
}

impl Capture {
    fn start(w: &World<'_>, slot: u16) -> anyhow::Result<Self> {
        let fabric = crate::supervise::processes::fabric_name(w.probe.paths, w.probe.config);
        let name = format!("casemate-verify-{}.pcap", std::process::id());
        let file = w.probe.paths.state("log").join(name);
        let mut child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{fabric}"))
            .args([
                "--",
                "tcpdump",
                "--immediate-mode",
                "-Z",
                "root",
                "-U",
                "-s",
                "0",
                "-i",
                &format!("cm{slot}"),
                "-w",
            ])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        // It listens once it has said so.
        let mut said = String::new();
        let mut stderr = child.stderr.take().context("no stderr")?;
        let mut byte = [0u8; 1];
        while !said.contains("listening on") {
            if stderr.read(&mut byte)? == 0 || said.len() > 4096 {
                child.wait()?;
                anyhow::bail!("tcpdump does not run: {said}");
            }
            said.push(char::from(byte[0]));
        }
        Ok(Self {
            child,
            stderr,
            file,
        })
    }

    fn stop(mut self) -> anyhow::Result<Vec<u8>> {
        if let Some(pid) = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "tcpdump does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut said = String::new();
        self.stderr.read_to_string(&mut said)?;
        let bytes = std::fs::read(&self.file)?;
        std::fs::remove_file(&self.file)?;
        ensure!(
            bytes.len() > CAPTURE_MIN_BYTES,
            "the capture holds only {} bytes; tcpdump said: {}",
            bytes.len(),
            said.trim().replace('\n', "; ")
        );
        Ok(bytes)
    }
}
