//! vmctl's two sockets and its one loop.
//!
//! One thread, one `poll`: the VMM's control socket, the guest's channel, two listeners, a
//! bounded number of connections. Who may talk is the peer's uid; what they may say is a closed
//! enum; only root may hand over a disk.

use crate::limits::{CLIENT_WRITE_MAX, CONNECTIONS_MAX, DISK_MAX_BYTES, DISK_MIN_BYTES};
use crate::log;
use crate::qemu::qmp::timespec;
use crate::vmctl::Vm;
use crate::{DiskFile, Vmm};
use api::limits::FRAME_MAX_BYTES;
use api::rpc::blocking::write_frame;
use api::rpc::{Reply, Request, VERSION, decode};
use api::vmctl::{Op, WardenOp};
use api::{Error, ErrorCode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde_json::Value;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// Serves one VM until the process is ended.
pub struct Server<V> {
    slot: u16,
    vm: Vm<V, ReplyTo>,
    host: UnixListener,
    warden: UnixListener,
    /// The uid that host runs as; root is always allowed.
    host_uid: u32,
    connections: Vec<Connection>,
    next_connection: u64,
}

/// Whom to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    connection: u64,
    request: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Host,
    Warden,
}

struct Connection {
    number: u64,
    role: Role,
    stream: UnixStream,
    buf: Vec<u8>,
    /// The descriptor that came last, warden's connections only.
    fd: Option<OwnedFd>,
}

/// What a readable thing is.
#[derive(Clone, Copy)]
enum Source {
    Vmm,
    Agent,
    Listener(Role),
    Connection(u64),
}

impl<V: Vmm> Server<V> {
    /// A server of `vm`; `host` and `warden` listen already.
    ///
    /// # Errors
    /// The listeners'.
    pub fn new(
        slot: u16,
        vm: Vm<V, ReplyTo>,
        host: UnixListener,
        warden: UnixListener,
        host_uid: u32,
    ) -> std::io::Result<Self> {
        // A client that is gone before the accept must not block it.
        host.set_nonblocking(true)?;
        warden.set_nonblocking(true)?;
        Ok(Self {
            slot,
            vm,
            host,
            warden,
            host_uid,
            connections: Vec::new(),
            next_connection: 1,
        })
    }

    /// Serves for good.
    ///
    /// # Errors
    /// `poll`'s: nothing else ends it.
    pub fn run(&mut self) -> std::io::Result<()> {
        loop {
            self.turn(None)?;
        }
    }

    /// Waits once, at most `limit`, and handles what came.
    ///
    /// # Errors
    /// `poll`'s.
    pub fn turn(&mut self, limit: Option<Duration>) -> std::io::Result<()> {
        for source in self.wait(limit)? {
            match source {
                Source::Vmm => self.vm.on_vmm(),
                Source::Agent => self.vm.on_agent(),
                Source::Listener(role) => self.accept(role),
                Source::Connection(number) => self.read(number),
            }
        }
        self.vm.on_time(Instant::now());
        for (to, answer) in self.vm.take_answers() {
            self.answer(to, answer);
        }
        Ok(())
    }

    fn wait(&self, limit: Option<Duration>) -> std::io::Result<Vec<Source>> {
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        // The guest's words first: a `down` that came before the VMM's end counts.
        if let Some(agent) = self.vm.agent() {
            sources.push(Source::Agent);
            fds.push(PollFd::from_borrowed_fd(agent.fd(), PollFlags::IN));
        }
        if let Some(vmm) = self.vm.vmm() {
            sources.push(Source::Vmm);
            fds.push(PollFd::from_borrowed_fd(vmm.control_fd(), PollFlags::IN));
        }
        if self.connections.len() < CONNECTIONS_MAX {
            sources.push(Source::Listener(Role::Host));
            fds.push(PollFd::new(&self.host, PollFlags::IN));
            sources.push(Source::Listener(Role::Warden));
            fds.push(PollFd::new(&self.warden, PollFlags::IN));
        }
        for c in &self.connections {
            sources.push(Source::Connection(c.number));
            fds.push(PollFd::new(&c.stream, PollFlags::IN));
        }
        let left = self
            .vm
            .deadline()
            .map(|d| d.saturating_duration_since(Instant::now()));
        let timeout = match (left, limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        match poll(&mut fds, timeout.map(timespec).as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        }
        Ok(sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(s, _)| s)
            .collect())
    }

    fn accept(&mut self, role: Role) {
        let listener = match role {
            Role::Host => &self.host,
            Role::Warden => &self.warden,
        };
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        let uid = match rustix::net::sockopt::socket_peercred(&stream) {
            Ok(c) => c.uid.as_raw(),
            Err(_) => return,
        };
        if uid != 0 && !(role == Role::Host && uid == self.host_uid) {
            let detail = format!("uid {uid} on the {role:?} socket");
            log::line("warn", self.slot, "refused a peer", Some(&detail));
            return;
        }
        if stream.set_nonblocking(false).is_err()
            || stream.set_write_timeout(Some(CLIENT_WRITE_MAX)).is_err()
        {
            return;
        }
        self.connections.push(Connection {
            number: self.next_connection,
            role,
            stream,
            buf: Vec::new(),
            fd: None,
        });
        self.next_connection += 1;
    }

    fn read(&mut self, number: u64) {
        let Some(c) = self.connections.iter_mut().find(|c| c.number == number) else {
            return;
        };
        if c.fill().is_none() {
            return self.drop_connection(number);
        }
        loop {
            let Some(c) = self.connections.iter_mut().find(|c| c.number == number) else {
                return;
            };
            match c.frame() {
                Ok(Some(frame)) => self.frame(number, &frame),
                Ok(None) => return,
                Err(()) => return self.drop_connection(number),
            }
        }
    }

    fn frame(&mut self, number: u64, frame: &[u8]) {
        let Some(c) = self.connections.iter_mut().find(|c| c.number == number) else {
            return;
        };
        match c.role {
            Role::Host => match request::<Op>(frame) {
                Ok((id, op)) => {
                    let to = ReplyTo {
                        connection: number,
                        request: id,
                    };
                    self.vm.request(to, op, Instant::now());
                }
                Err((id, e)) => self.refuse(number, id, e),
            },
            Role::Warden => {
                let fd = c.fd.take();
                match request::<WardenOp>(frame) {
                    Ok((id, op)) => {
                        let kept = match op {
                            WardenOp::DiskFd => came("disk_fd", fd)
                                .and_then(|fd| self.vm.disk_keep(DiskFile::Descriptor(fd))),
                            WardenOp::MemoryFd => {
                                came("memory_fd", fd).and_then(|fd| self.vm.memory_keep(fd))
                            }
                            WardenOp::MemoryDrop => {
                                self.vm.memory_drop();
                                Ok(())
                            }
                            WardenOp::DiskMounted => self.vm.disk_keep(DiskFile::Mounted),
                            WardenOp::DiskReady { size_bytes } => {
                                check_size(size_bytes).and_then(|()| self.vm.disk_ready(size_bytes))
                            }
                        };
                        let to = ReplyTo {
                            connection: number,
                            request: id,
                        };
                        self.answer(to, kept.map(|()| Value::Bool(true)));
                    }
                    Err((id, e)) => self.refuse(number, id, e),
                }
            }
        }
    }

    fn refuse(&mut self, connection: u64, request: u64, error: Error) {
        self.answer(
            ReplyTo {
                connection,
                request,
            },
            Err(error),
        );
    }

    fn answer(&mut self, to: ReplyTo, answer: Result<Value, Error>) {
        let Some(c) = self
            .connections
            .iter_mut()
            .find(|c| c.number == to.connection)
        else {
            return;
        };
        if write_frame(&mut c.stream, &Reply::new(to.request, answer)).is_err() {
            self.drop_connection(to.connection);
        }
    }

    fn drop_connection(&mut self, number: u64) {
        self.connections.retain(|c| c.number != number);
    }
}

impl Connection {
    /// Reads once; `None` when the peer is gone.
    fn fill(&mut self) -> Option<()> {
        let mut chunk = [0u8; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = match recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut chunk)],
            &mut control,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        ) {
            Ok(m) => m,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Some(()),
            Err(_) => return None,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // Host's descriptors are closed as they come.
                if let (Role::Warden, Some(fd)) = (self.role, fds.last()) {
                    self.fd = Some(fd);
                }
            }
        }
        if got.bytes == 0 || got.flags.contains(ReturnFlags::CTRUNC) {
            return None;
        }
        self.buf.extend_from_slice(&chunk[..got.bytes]);
        Some(())
    }

    /// The next whole frame.
    fn frame(&mut self) -> Result<Option<Vec<u8>>, ()> {
        let Some((head, rest)) = self.buf.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*head) as usize;
        if len > FRAME_MAX_BYTES {
            return Err(());
        }
        if rest.len() < len {
            return Ok(None);
        }
        let frame = rest[..len].to_vec();
        self.buf.drain(..4 + len);
        Ok(Some(frame))
    }
}

/// The request's number and body; a refusal carries the number as far as it is known.
fn request<T: serde::de::DeserializeOwned>(frame: &[u8]) -> Result<(u64, T), (u64, Error)> {
    #[derive(serde::Deserialize)]
    struct Head {
        v: u32,
        id: u64,
    }
    let head: Head = decode(frame).map_err(|e| (0, e))?;
    if head.v != VERSION {
        return Err((
            head.id,
            Error::new(
                ErrorCode::BadRequest,
                format!(
                    "protocol version {} is not {VERSION}; update both sides",
                    head.v
                ),
            ),
        ));
    }
    let request: Request<T> = decode(frame).map_err(|e| (head.id, e))?;
    Ok((request.id, request.body))
}

/// The file that came. Its attributes can't be asked for: it answers the VMM's user only.
fn came(op: &str, fd: Option<OwnedFd>) -> Result<OwnedFd, Error> {
    let why = format!("{op} came without a descriptor");
    fd.ok_or_else(|| Error::new(ErrorCode::ValidationError, why))
}

/// Whether it can be a disk's size: warden's word, which has it from the disk process.
fn check_size(size_bytes: u64) -> Result<(), Error> {
    if (DISK_MIN_BYTES..=DISK_MAX_BYTES).contains(&size_bytes) && size_bytes.is_multiple_of(4096) {
        return Ok(());
    }
    let why =
        format!("size_bytes must be a multiple of 4096 from {DISK_MIN_BYTES} to {DISK_MAX_BYTES}");
    Err(Error::new(ErrorCode::ValidationError, why))
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
