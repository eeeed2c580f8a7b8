//! The sockets, with a VMM that does nothing.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::agent::Channel;
use crate::qemu::How;
use crate::{Error as VmmError, Event};
use api::rpc::blocking::read_frame;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};

struct Idle(UnixStream);

impl Vmm for Idle {
    fn memory_save(&mut self, _: BorrowedFd<'_>) -> Result<(), crate::Error> {
        Ok(())
    }
    fn wake(&mut self) -> Result<(), crate::Error> {
        Ok(())
    }
    fn restore(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn save(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn cont(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn stop(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn disk_attach(&mut self, _: &DiskFile, _: u64) -> Result<(), VmmError> {
        Ok(())
    }
    fn quit(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn event(&mut self) -> Option<Event> {
        None
    }
    fn control_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

struct World {
    server: Server<Idle>,
    dir: tempfile::TempDir,
    _vmm: UnixStream,
    _guest: UnixStream,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let (vmm, vmm_far) = UnixStream::pair().unwrap();
    let (agent, guest) = UnixStream::pair().unwrap();
    let vm = Vm::new(7, How::Template, Idle(vmm), Channel::new(agent).unwrap());
    let listen = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
    let server = Server::new(7, vm, listen("host"), listen("warden"), 0).unwrap();
    World {
        server,
        dir,
        _vmm: vmm_far,
        _guest: guest,
    }
}

impl World {
    fn connect(&self, name: &str) -> UnixStream {
        let s = UnixStream::connect(self.dir.path().join(name)).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        s
    }

    /// Turns until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..20 {
            self.server.turn(Some(Duration::ZERO)).unwrap();
        }
    }

    fn exchange(&mut self, s: &mut UnixStream, bytes: &[u8]) -> Option<Reply<Value>> {
        s.write_all(bytes).unwrap();
        self.settle();
        let frame = read_frame(s).ok()??;
        Some(decode(&frame).unwrap())
    }
}

fn frame(text: &str) -> Vec<u8> {
    let mut f = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    f.extend_from_slice(text.as_bytes());
    f
}

fn body(text: &str) -> Vec<u8> {
    frame(&format!(
        r#"{{"v":1,"id":5,"request_id":"req_0","body":{text}}}"#
    ))
}

fn send_fd(s: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let n = sendmsg(s, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(n, bytes.len());
}

#[test]
fn status_is_answered_and_pieces_are_put_together() {
    let mut w = world();
    let mut s = w.connect("host");
    let request = body(r#"{"op":"status"}"#);
    for b in &request[..request.len() - 1] {
        s.write_all(&[*b]).unwrap();
        w.settle();
    }
    let r = w.exchange(&mut s, &request[request.len() - 1..]).unwrap();
    assert_eq!(
        (r.id, r.ok),
        (5, Some(serde_json::json!({"vm": "created"})))
    );
}

#[test]
fn i17_what_is_no_request_is_refused() {
    let mut w = world();
    for bad in [
        frame("nonsense"),
        frame(r#"{"v":2,"id":5,"request_id":"","body":{"op":"status"}}"#),
        body(r#"{"op":"human-monitor-command"}"#),
        body(r#"{"op":"shutdown","grace_ms":1,"signal":9}"#),
        body(r#"{"op":"disk_fd"}"#),
    ] {
        let mut s = w.connect("host");
        let r = w.exchange(&mut s, &bad).unwrap();
        assert_eq!(r.err.unwrap().code, ErrorCode::BadRequest);
    }
    // A length that is none ends the connection, and only it.
    let mut s = w.connect("host");
    assert!(w.exchange(&mut s, &u32::MAX.to_be_bytes()).is_none());
    let mut s = w.connect("host");
    assert!(w.exchange(&mut s, &body(r#"{"op":"status"}"#)).is_some());
}

#[test]
fn a_disk_comes_by_wardens_socket_and_is_looked_at() {
    let mut w = world();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    let give = |w: &mut World, fd: Option<BorrowedFd<'_>>, request: &str| {
        let mut s = w.connect("warden");
        let request = body(request);
        if let Some(fd) = fd {
            send_fd(&s, &request, fd);
            w.exchange(&mut s, b"").unwrap()
        } else {
            w.exchange(&mut s, &request).unwrap()
        }
    };
    let ready = |size: u64| format!(r#"{{"op":"disk_ready","size_bytes":{size}}}"#);
    let keep = r#"{"op":"disk_fd"}"#;
    let r = give(&mut w, None, &ready(4 << 20));
    assert_eq!(r.err.unwrap().code, ErrorCode::Conflict, "no file yet");
    let r = give(&mut w, None, keep);
    assert_eq!(r.err.unwrap().code, ErrorCode::ValidationError);
    assert!(give(&mut w, Some(file.as_fd()), keep).ok.is_some());
    for size in [0, (4 << 20) + 512, u64::MAX] {
        let r = give(&mut w, None, &ready(size));
        assert_eq!(r.err.unwrap().code, ErrorCode::ValidationError, "{size}");
    }
    assert!(give(&mut w, None, &ready(4 << 20)).ok.is_some());
    for (fd, request) in [(Some(file.as_fd()), keep.into()), (None, ready(4 << 20))] {
        let r = give(&mut w, fd, &request);
        assert_eq!(r.err.unwrap().code, ErrorCode::Conflict);
    }
}

#[test]
fn connections_are_bounded() {
    let mut w = world();
    let held: Vec<UnixStream> = (0..CONNECTIONS_MAX + 4)
        .map(|_| w.connect("host"))
        .collect();
    for _ in 0..CONNECTIONS_MAX + 4 {
        w.settle();
    }
    assert_eq!(w.server.connections.len(), CONNECTIONS_MAX);
    drop(held);
    w.settle();
    let mut s = w.connect("host");
    assert!(w.exchange(&mut s, &body(r#"{"op":"status"}"#)).is_some());
}
