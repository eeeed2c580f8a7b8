//! The socket: who may ask, how much at once.

use crate::fault::{At, Result, log};
use crate::layout::{Layout, read_small, remove};
use crate::limits::{CONNECTIONS_MAX, IN_FLIGHT_MAX};
use crate::slots::{Warden, lock};
use api::rpc::{Reply, Request, VERSION, blocking, decode};
use api::{Error, ErrorCode};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd as _, OwnedFd};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Process names → uids, as the supervisor wrote them.
///
/// # Errors
/// When the file is missing or damaged.
pub fn uids(layout: &Layout) -> Result<BTreeMap<String, u32>> {
    let path = layout.run().join("uids.json");
    let text = read_small(&path)?;
    let missing = || format!("{} is missing; start with `casemate up`", path.display());
    let text = text.ok_or_else(|| Error::internal(missing()))?;
    serde_json::from_str(&text).at("read", path.display())
}

/// Binds warden's socket.
///
/// # Errors
/// The path's.
pub fn bind(layout: &Layout) -> Result<UnixListener> {
    let path = layout.own_run().join("warden.sock");
    remove(&path)?;
    let listener = UnixListener::bind(&path).at("bind", path.display())?;
    // Who may ask is decided by the kernel's word for the peer's uid, below.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))
        .at("open up", path.display())?;
    Ok(listener)
}

/// Serves until `stop` becomes readable; then refuses new requests and returns when none is under
/// way.
///
/// # Errors
/// The listener's.
pub fn serve(
    warden: &Arc<Warden>,
    listener: &UnixListener,
    host_uid: u32,
    stop: &OwnedFd,
) -> Result {
    let connections = Arc::new(AtomicUsize::new(0));
    let busy = Arc::new(AtomicUsize::new(0));
    loop {
        let mut polls = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut polls, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).at("wait on", "the socket"),
        }
        if !polls[1].revents().is_empty() {
            break;
        }
        if polls[0].revents().is_empty() {
            continue;
        }
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                log("accept.failed", serde_json::json!({"error": e.to_string()}));
                continue;
            }
        };
        let uid = rustix::net::sockopt::socket_peercred(&stream).map(|c| c.uid.as_raw());
        if !uid.as_ref().is_ok_and(|u| *u == 0 || *u == host_uid) {
            log("peer.refused", serde_json::json!({"uid": uid.ok()}));
            continue;
        }
        if connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            connections.fetch_sub(1, Ordering::AcqRel);
            let why = "too many connections";
            log("peer.refused", serde_json::json!({"why": why}));
            continue;
        }
        let (warden, busy) = (Arc::clone(warden), Arc::clone(&busy));
        let open = Leave(Arc::clone(&connections));
        let run = move || {
            let _open = open;
            if let Err(e) = converse(&warden, &stream, &busy) {
                log("peer.lost", serde_json::json!({"error": e.to_string()}));
            }
        };
        std::thread::Builder::new()
            .name("peer".into())
            .spawn(run)
            .at("start", "a thread")?;
    }
    // What is under way ends within the bounds of its own waits.
    while busy.load(Ordering::Acquire) > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

/// Counts something down when it is over, however that comes.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Requests of one connection: each in a thread of its own, so that a slow one holds up no other
/// slot's.
fn converse(
    warden: &Arc<Warden>,
    stream: &UnixStream,
    busy: &Arc<AtomicUsize>,
) -> std::io::Result<()> {
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let mut reader = stream.try_clone()?;
    while let Some(bytes) = blocking::read_frame(&mut reader)? {
        let request: Request<api::warden::Op> = match decode(&bytes) {
            Ok(request) => request,
            Err(e) => {
                // Its number may still be legible; without one the peer can't be answered.
                #[derive(serde::Deserialize)]
                struct Head {
                    id: u64,
                }
                let Head { id } = serde_json::from_slice(&bytes)?;
                reply(&writer, id, Err(e))?;
                continue;
            }
        };
        if request.v != VERSION {
            let (v, why) = (request.v, "is not spoken here; upgrade both sides");
            let refused = Error::new(ErrorCode::BadRequest, format!("protocol version {v} {why}"));
            reply(&writer, request.id, Err(refused))?;
            continue;
        }
        let leave = Leave(Arc::clone(busy));
        if busy.fetch_add(1, Ordering::AcqRel) >= IN_FLIGHT_MAX {
            let why = "too many requests at once; try again";
            let busy = Error::new(ErrorCode::RateLimited, why);
            reply(&writer, request.id, Err(busy))?;
            continue;
        }
        let (warden, writer) = (Arc::clone(warden), Arc::clone(&writer));
        let run = move || {
            let _leave = leave;
            let Request {
                id,
                request_id,
                body,
                ..
            } = request;
            let result = warden.answer(body);
            if let Err(e) = &result {
                log(
                    "refused",
                    serde_json::json!({"request_id": clean(&request_id), "error": e}),
                );
            }
            // A peer that went away has its answer in the next Status.
            let _ = reply(&writer, id, result);
        };
        std::thread::Builder::new()
            .name("request".into())
            .spawn(run)?;
    }
    Ok(())
}

fn reply(
    writer: &Mutex<UnixStream>,
    id: u64,
    result: Result<serde_json::Value>,
) -> std::io::Result<()> {
    blocking::write_frame(&mut *lock(writer), &Reply::new(id, result))
}

/// A request id as it may stand in a log.
fn clean(id: &str) -> String {
    id.chars()
        .filter(|c| c.is_ascii_alphanumeric() || "_:-.".contains(*c))
        .take(64)
        .collect()
}
