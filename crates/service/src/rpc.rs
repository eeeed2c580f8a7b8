//! The server side of the internal protocols: a unix socket, an allow-list of peers by the
//! kernel's word (SO_PEERCRED), bounded frames, connections and requests in flight.

use crate::limits::{DRAIN_MAX, RPC_CONNECTIONS_MAX};
use crate::paths::Paths;
use anyhow::Context as _;
use api::limits::{FRAME_MAX_BYTES, RPC_IN_FLIGHT_MAX};
use api::rpc::{Reply, Request, VERSION, decode, encode};
use api::{Error, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, watch};

/// Who is on the other side of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its uid, by the kernel.
    pub uid: u32,
    /// The process of that uid: `edge`, `control`, …, `root`.
    pub process: String,
}

/// Process names and their uids, as the supervisor wrote them.
#[derive(Debug, Clone)]
pub struct Uids(BTreeMap<String, u32>);

impl Uids {
    /// Reads the supervisor's table.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn load(paths: &Paths) -> anyhow::Result<Self> {
        let path = paths.uids();
        let bytes = crate::files::read_bounded(&path, 64 << 10)
            .with_context(|| format!("read {} (`casemate up` writes it)", path.display()))?;
        let mut map: BTreeMap<String, u32> =
            serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
        map.insert("root".into(), 0);
        Ok(Self(map))
    }

    /// A table of one's own, for tests.
    #[must_use]
    pub fn from_map(map: BTreeMap<String, u32>) -> Self {
        Self(map)
    }

    /// A process's uid.
    #[must_use]
    pub fn uid(&self, process: &str) -> Option<u32> {
        self.0.get(process).copied()
    }

    /// The first of `allow` that has this uid.
    fn peer(&self, uid: u32, allow: &[&str]) -> Option<Peer> {
        let process = allow.iter().find(|p| self.0.get(**p) == Some(&uid))?;
        Some(Peer {
            uid,
            process: (*process).to_owned(),
        })
    }
}

/// The value of an answer.
///
/// # Errors
/// [`ErrorCode::Internal`] if it can't be expressed in JSON.
pub fn ok<T: Serialize>(value: &T) -> api::Result<serde_json::Value> {
    serde_json::to_value(value).map_err(Error::internal)
}

/// Binds a socket that replaces a stale one.
///
/// # Errors
/// The socket's path and the system's error.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove stale {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("bind {}", path.display()))?;
    // Anyone may connect; who is heard is decided by the peer's uid.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))
        .with_context(|| format!("chmod {}", path.display()))?;
    Ok(listener)
}

/// The peer of a connection, if it is one of `allow`.
#[must_use]
pub fn peer_of(stream: &UnixStream, uids: &Uids, allow: &[&str]) -> Option<Peer> {
    uids.peer(stream.peer_cred().ok()?.uid(), allow)
}

/// Serves requests until `stop` turns true, then waits for those in flight.
///
/// A peer that is not in `allow` is answered nothing: its connection is closed.
pub async fn serve<Op, H, F>(
    listener: UnixListener,
    uids: Arc<Uids>,
    allow: &'static [&'static str],
    mut stop: watch::Receiver<bool>,
    handler: H,
) where
    Op: DeserializeOwned + Send + 'static,
    H: Fn(Peer, String, Op) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = api::Result<serde_json::Value>> + Send + 'static,
{
    let connections = Arc::new(Semaphore::new(RPC_CONNECTIONS_MAX));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!(error = %e, "accept");
                    tokio::task::yield_now().await;
                    continue;
                }
            },
            () = stopped(&mut stop) => break,
        };
        let Some(peer) = peer_of(&stream, &uids, allow) else {
            match stream.peer_cred().map(|c| c.uid()) {
                // The supervisor knocks to see whether somebody is in.
                Ok(0) => tracing::debug!("root is not on this socket's list"),
                uid => tracing::warn!(?uid, "peer not allowed"),
            }
            continue;
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            tracing::warn!(peer = %peer.process, "too many connections");
            continue;
        };
        let handler = handler.clone();
        let stop = stop.clone();
        tokio::spawn(async move {
            connection(stream, peer, handler, stop).await;
            drop(permit);
        });
    }
    drop(listener);
    let all = u32::try_from(RPC_CONNECTIONS_MAX).unwrap_or(u32::MAX);
    if tokio::time::timeout(DRAIN_MAX, connections.acquire_many(all))
        .await
        .is_err()
    {
        tracing::warn!("drain timed out");
    }
}

/// Ends when `stop` turns true or its sender is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|s| *s).await;
}

async fn connection<Op, H, F>(
    stream: UnixStream,
    peer: Peer,
    handler: H,
    mut stop: watch::Receiver<bool>,
) where
    Op: DeserializeOwned + Send + 'static,
    H: Fn(Peer, String, Op) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = api::Result<serde_json::Value>> + Send + 'static,
{
    let (mut read, write) = stream.into_split();
    let write = Arc::new(Mutex::new(write));
    let in_flight = Arc::new(Semaphore::new(RPC_IN_FLIGHT_MAX));
    loop {
        let len = tokio::select! {
            len = read.read_u32() => len,
            () = stopped(&mut stop) => break,
        };
        let Ok(len) = len.map(|l| l as usize) else {
            break;
        };
        if len > FRAME_MAX_BYTES {
            tracing::warn!(peer = %peer.process, len, "frame above the bound");
            break;
        }
        let mut buf = vec![0u8; len];
        if read.read_exact(&mut buf).await.is_err() {
            break;
        }
        let Ok(permit) = Arc::clone(&in_flight).acquire_owned().await else {
            break;
        };
        let (handler, peer, write) = (handler.clone(), peer.clone(), Arc::clone(&write));
        tokio::spawn(async move {
            let reply = answer(&buf, peer, handler).await;
            let frame = encode(&reply).or_else(|e| encode(&Reply::<()>::new(reply.id, Err(e))));
            if let Ok(frame) = frame {
                // A peer that went away needs no answer.
                let _ = write.lock().await.write_all(&frame).await;
            }
            drop(permit);
        });
    }
    // Answers in flight hold the write half; wait for them.
    let all = u32::try_from(RPC_IN_FLIGHT_MAX).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(DRAIN_MAX, in_flight.acquire_many(all)).await;
}

async fn answer<Op, H, F>(buf: &[u8], peer: Peer, handler: H) -> Reply<serde_json::Value>
where
    Op: DeserializeOwned,
    H: Fn(Peer, String, Op) -> F,
    F: Future<Output = api::Result<serde_json::Value>>,
{
    let began = Instant::now();
    let request: Request<Op> = match decode(buf) {
        Ok(r) => r,
        Err(e) => return Reply::new(Head::of(buf).id, Err(e)),
    };
    let id = request.id;
    if request.v != VERSION {
        return Reply::new(
            id,
            Err(Error::new(
                ErrorCode::BadRequest,
                format!(
                    "protocol version {} is not spoken here, {VERSION} is",
                    request.v
                ),
            )),
        );
    }
    let request_id = request.request_id;
    let result = handler(peer.clone(), request_id.clone(), request.body).await;
    if let Err(e) = &result {
        tracing::info!(
            peer = %peer.process, request_id, code = e.code.as_str(), message = %e.message,
            detail = e.detail.as_deref().unwrap_or(""), "refused"
        );
    }
    if tracing::enabled!(tracing::Level::DEBUG) {
        let op = Head::of(buf).body.op;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(peer = %peer.process, request_id, op, ms, "answered");
    }
    Reply::new(id, result)
}

/// Enough of a request to answer it with an error, and to name it in the log.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Head {
    id: u64,
    body: Tag,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Tag {
    op: String,
}

impl Head {
    /// What can be read of it.
    fn of(buf: &[u8]) -> Self {
        serde_json::from_slice(buf).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use api::rpc::Client;

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
    enum Op {
        Double { n: u64 },
    }

    async fn double(_: Peer, _: String, op: Op) -> api::Result<serde_json::Value> {
        let Op::Double { n } = op;
        ok(&(n * 2))
    }

    fn world(me: u32) -> (tempfile::TempDir, std::path::PathBuf, watch::Sender<bool>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let uids = Uids::from_map([("me".to_owned(), me)].into());
        let (tx, rx) = watch::channel(false);
        let listener = bind(&path).unwrap();
        tokio::spawn(serve(listener, Arc::new(uids), &["me"], rx, double));
        (dir, path, tx)
    }

    #[tokio::test]
    async fn calls_are_multiplexed_and_drained() {
        let me = rustix::process::getuid().as_raw();
        let (_dir, path, stop) = world(me);
        let client = Client::new(&path);
        let calls = (0..500u64).map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                client
                    .call::<_, u64>("req_0", &Op::Double { n })
                    .await
                    .unwrap()
                    == n * 2
            })
        });
        for call in calls.collect::<Vec<_>>() {
            assert!(call.await.unwrap());
        }
        stop.send(true).unwrap();
        // The socket no longer answers, and the client says so instead of hanging.
        let gone = async {
            loop {
                if let Err(e) = client.call::<_, u64>("req_0", &Op::Double { n: 1 }).await {
                    break e;
                }
            }
        };
        let e = tokio::time::timeout(std::time::Duration::from_secs(5), gone)
            .await
            .unwrap();
        assert_eq!(e.code, ErrorCode::Unavailable);
    }

    #[tokio::test]
    async fn i2_a_stranger_is_not_heard() {
        let (_dir, path, _stop) = world(4_000_000);
        let e = Client::new(&path)
            .call::<_, u64>("r", &Op::Double { n: 1 })
            .await
            .unwrap_err();
        assert_eq!(e.code, ErrorCode::Unavailable);
    }

    #[tokio::test]
    async fn hostile_frames_get_an_error_or_a_closed_door() {
        let me = rustix::process::getuid().as_raw();
        let (_dir, path, _stop) = world(me);
        for (frame, answered) in [
            (b"\x00\x00\x00\x02{}".to_vec(), true),
            (b"\x00\x00\x00\x05hello".to_vec(), true),
            (b"\xff\xff\xff\xff".to_vec(), false),
        ] {
            let mut s = UnixStream::connect(&path).await.unwrap();
            s.write_all(&frame).await.unwrap();
            let len = s.read_u32().await;
            assert_eq!(len.is_ok(), answered);
            if let Ok(len) = len {
                let mut buf = vec![0; len as usize];
                s.read_exact(&mut buf).await.unwrap();
                assert!(String::from_utf8(buf).unwrap().contains("bad_request"));
            }
        }
    }
}
