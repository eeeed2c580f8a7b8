//! Calls of a guest's agent as the edge makes them, for the checks: run as the edge's user, inside
//! the network of the taps. What is shown is the HTTP status, never a body.

use anyhow::Context as _;
use model::WorkspaceId;
use model::limits::{PORT_AGENT_RAW, PORT_AGENT_TLS};
use seal::sign::{SigningKey, VerifyingKey};
use seal::tls::Identity;
use service::paths::Paths;
use std::net::Ipv4Addr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

const WAIT: Duration = Duration::from_secs(5);

/// Status of `GET path` over mTLS with the edge's identity, and with `token` if it is not empty.
///
/// # Errors
/// When there is no answer.
pub async fn over_mtls(
    paths: &Paths,
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
    path: &str,
    token: &str,
) -> anyhow::Result<String> {
    let stream = connect(paths, workspace, ip, edge(paths)?).await?;
    status(stream, path, token).await
}

/// The same with a guest that no mint knows: `guest` is its identity, `edge` the one that it takes for
/// the edge's. For measurements.
///
/// # Errors
/// When there is no answer.
pub async fn over_mtls_unlisted(
    (guest, edge): (&VerifyingKey, &Identity),
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
    path: &str,
    token: &str,
) -> anyhow::Result<String> {
    status(dial(guest, workspace, ip, edge).await?, path, token).await
}

/// The edge's identity: its user may read it.
fn edge(paths: &Paths) -> anyhow::Result<Identity> {
    let seed = service::files::read_bounded(&paths.state("edge").join("identity.seed"), 32)?;
    let seed: [u8; 32] = seed
        .try_into()
        .ok()
        .context("the edge's identity is not 32 bytes")?;
    Ok(Identity::from_seed(&seed))
}

/// Calls `POST /exec` with `body` again and again on one connection, over mTLS with the edge's
/// identity and with `token`; how long each call took.
///
/// # Errors
/// When there is no answer, or one that is no success.
pub async fn exec_many(
    paths: &Paths,
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
    token: &str,
    body: &str,
    calls: usize,
) -> anyhow::Result<Vec<Duration>> {
    let mut stream = connect(paths, workspace, ip, edge(paths)?).await?;
    let request = format!(
        "POST /exec HTTP/1.1\r\nhost: agent\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut took = Vec::new();
    let mut answer = Vec::new();
    for _ in 0..calls {
        let began = std::time::Instant::now();
        stream.write_all(request.as_bytes()).await?;
        answer.clear();
        while !is_whole(&answer)? {
            let read = tokio::time::timeout(WAIT, stream.read_buf(&mut answer)).await??;
            anyhow::ensure!(read > 0, "the agent hung up");
        }
        took.push(began.elapsed());
    }
    Ok(took)
}

/// Whether a successful answer with a `content-length` is there to its end.
fn is_whole(answer: &[u8]) -> anyhow::Result<bool> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        anyhow::ensure!(answer.len() < 64 << 10, "no HTTP answer");
        return Ok(false);
    };
    anyhow::ensure!(
        head.starts_with("HTTP/1.1 200"),
        "the agent answered {}",
        head.lines().next().unwrap_or_default()
    );
    let length = head
        .lines()
        .filter_map(|l| l.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .context("an answer without a length")?;
    Ok(body.len() >= length)
}

/// Whether the agent answers a client with another certificate: `answered` or `refused`.
///
/// # Errors
/// When it can't be dialled.
pub async fn as_stranger(
    paths: &Paths,
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
) -> anyhow::Result<&'static str> {
    let stranger = Identity::new(SigningKey::generate());
    let answer = match connect(paths, workspace, ip, stranger).await {
        Ok(stream) => status(stream, "/health", "").await,
        Err(e) => Err(e),
    };
    Ok(if answer.is_ok() {
        "answered"
    } else {
        "refused"
    })
}

/// Whether the agent's TLS port answers plain HTTP: `answered` or `refused`.
///
/// # Errors
/// When it can't be dialled.
pub async fn plain(ip: Ipv4Addr) -> anyhow::Result<&'static str> {
    let stream = TcpStream::connect((ip, PORT_AGENT_TLS)).await?;
    Ok(if status(stream, "/health", "").await.is_ok() {
        "answered"
    } else {
        "refused"
    })
}

/// Status of `GET path` on the raw-token port.
///
/// # Errors
/// When there is no answer.
pub async fn raw(ip: Ipv4Addr, path: &str, token: &str) -> anyhow::Result<String> {
    let stream = tokio::time::timeout(WAIT, TcpStream::connect((ip, PORT_AGENT_RAW))).await??;
    status(stream, path, token).await
}

async fn connect(
    paths: &Paths,
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
    client: Identity,
) -> anyhow::Result<impl AsyncRead + AsyncWrite + Unpin + use<>> {
    let op = api::mint::Op::TokenState {
        workspace: workspace.clone(),
    };
    let signed: api::mint::Signed = api::rpc::Client::new(paths.socket("mint", "mint"))
        .call("verify", &op)
        .await?;
    let mint = service::trust::key(paths, service::trust::MINT)?;
    let state: api::mint::TokenState =
        seal::sign::Signed::parse(signed.signed)?.verify(&mint, api::context::TOKEN_STATE)?;
    let anchor = VerifyingKey::from_hex(&state.identity_pub)?;
    dial(&anchor, workspace, ip, &client).await
}

async fn dial(
    guest: &VerifyingKey,
    workspace: &WorkspaceId,
    ip: Ipv4Addr,
    client: &Identity,
) -> anyhow::Result<impl AsyncRead + AsyncWrite + Unpin + use<>> {
    let leaf = client.leaf("edge.casemate.internal", Duration::from_secs(600))?;
    let config = seal::tls::client_config(guest, Some(leaf), seal::tls::HTTP1)?;
    let name = api::agent::tls_name(workspace);
    let tcp = tokio::time::timeout(WAIT, TcpStream::connect((ip, PORT_AGENT_TLS))).await??;
    // Else the request waits until the guest has acknowledged the end of the handshake.
    tcp.set_nodelay(true)?;
    let connector = seal::tls::tokio_rustls::TlsConnector::from(config);
    Ok(tokio::time::timeout(WAIT, connector.connect(name.try_into()?, tcp)).await??)
}

/// One request, and the status of its answer.
async fn status(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    token: &str,
) -> anyhow::Result<String> {
    let authorization = if token.is_empty() {
        String::new()
    } else {
        format!("authorization: Bearer {token}\r\n")
    };
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: agent\r\n{authorization}connection: close\r\n\r\n");
    tokio::time::timeout(WAIT, stream.write_all(request.as_bytes())).await??;
    let mut head = [0u8; 12];
    tokio::time::timeout(WAIT, stream.read_exact(&mut head)).await??;
    let head = std::str::from_utf8(&head).context("no HTTP answer")?;
    let status = head.strip_prefix("HTTP/1.1 ").context("no HTTP answer")?;
    Ok(status.to_owned())
}
