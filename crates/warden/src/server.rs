//! The socket: who may ask, how much at once.

use crate::fault::{At, Result, log};
use crate::layout::{Layout, read_small, remove};
use crate::limits::{CONNECTIONS_MAX, IN_FLIGHT_MAX};
use crate::slots::Warden;
use api::Error;
use api::rpc::blocking::{Leave, converse};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd as _, OwnedFd};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
        let open = Leave::of(&connections);
        let run = move || {
            let _open = open;
            let answer = move |id: &str, op| answer(&warden, id, op);
            if let Err(e) = converse(&stream, &busy, IN_FLIGHT_MAX, answer) {
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

/// One request, of whoever may ask.
fn answer(warden: &Arc<Warden>, request_id: &str, op: api::warden::Op) -> Result<Value> {
    let result = warden.answer(op);
    if let Err(e) = &result {
        let request_id = clean(request_id);
        log(
            "refused",
            serde_json::json!({"request_id": request_id, "error": e}),
        );
    }
    result
}

/// A request id as it may stand in a log.
fn clean(id: &str) -> String {
    id.chars()
        .filter(|c| c.is_ascii_alphanumeric() || "_:-.".contains(*c))
        .take(64)
        .collect()
}
