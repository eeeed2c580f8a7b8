//! Serving one file over FUSE.
//!
//! Each [`Worker`] is a thread with its own queue on `/dev/fuse`, its own cipher and one buffer,
//! made before the first request; a request allocates nothing. A write's data is read from the
//! device straight to a page boundary, encrypted in place and written from there.
//!
//! ```text
//! read request -> wait for the rate limit -> enter the gate, if it is open -> do it -> answer -> leave
//! ```
//!
//! [`Serving::close`] shuts the gate: what is inside ends and is answered, what is outside is
//! never answered, so nothing was promised about it.
//!
//! The file is opened once; what a VMM is woken from, twice. Whoever held it last, the file is never opened again.
//!
//! Own code instead of a library: the protocol for one file is this small, and the library at
//! hand opens `/dev/fuse` by path while it serves (which the sandbox forbids), can't be stopped,
//! and hands out writes that can't be encrypted in place.

mod abi;

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use api::agent::VOLUME_OFFSET_BYTES;
use seal::Zeroize;

use self::abi::{Answer, Request};
use crate::bucket::Limiter;
use crate::limits::REQUEST_MAX_BYTES;

const PAGE_BYTES: usize = 4096;
/// Where a request is read to, so that a write's data begins at a page.
const REQUEST_AT: usize = PAGE_BYTES - abi::WRITE_HEAD_BYTES;
const DATA_AT: usize = PAGE_BYTES;
const PUNCH: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
const ZERO: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;
const ZERO_KEEP: u32 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u32;

/// What the file holds. Errors go to the VMM as they are.
pub trait Content {
    /// Its size, bytes: 0 until there is a volume; never changes then.
    fn size_bytes(&self) -> u64;
    /// How often it may be opened, in all.
    fn opens_max(&self) -> u32 {
        1
    }
    /// Whether setting this size is answered as done. It changes nothing.
    fn may_resize(&self, to_bytes: u64) -> bool {
        to_bytes == self.size_bytes()
    }
    /// Fills `buf` from `offset` and answers how much there was before the end.
    ///
    /// # Errors
    /// The backing file's.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes `data`, and may leave anything in it.
    ///
    /// # Errors
    /// What may not be written, and the backing file's.
    fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Makes a range zeros.
    ///
    /// # Errors
    /// Like [`Content::write`].
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The backing file's; what was written before may be lost then.
    fn sync(&self) -> io::Result<()>;
}

/// What all workers share.
#[derive(Debug)]
pub struct Serving {
    owner_uid: Option<u32>,
    limiter: Limiter,
    opens: AtomicU32,
    /// True once the gate is shut.
    gate: RwLock<bool>,
}

impl Serving {
    /// A file, not opened yet, under the given limits. It is `owner_uid`'s; without one, it is
    /// whoever's the mount lets in.
    #[must_use]
    pub fn new(owner_uid: Option<u32>, limiter: Limiter) -> Self {
        Self {
            owner_uid,
            limiter,
            opens: AtomicU32::new(0),
            gate: RwLock::new(false),
        }
    }

    /// Other limits from here on.
    pub fn limit(&self, bytes_per_s: u64, ops_per_s: u64) {
        self.limiter.set(bytes_per_s, ops_per_s);
    }

    /// Ends serving for good: waits for the requests under way, then makes all of it durable.
    ///
    /// # Errors
    /// The backing file's.
    pub fn close(&self, content: &impl Content) -> io::Result<()> {
        *self.gate.write().unwrap_or_else(PoisonError::into_inner) = true;
        content.sync()
    }
}

/// Why a worker stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The mount is gone: nobody will ever ask again.
    MountGone,
    /// [`Serving::close`] was called.
    Closed,
}

/// One thread of service.
pub struct Worker<C> {
    device: Arc<File>,
    content: C,
    serving: Arc<Serving>,
    buffer: Buffer,
}

impl<C: Content> Worker<C> {
    /// A worker on `device`, an open `/dev/fuse` with a mount behind it.
    #[must_use]
    pub fn new(device: Arc<File>, content: C, serving: Arc<Serving>) -> Self {
        Self {
            device,
            content,
            serving,
            buffer: Buffer::new(),
        }
    }

    /// Serves until the mount is gone or the gate is shut.
    ///
    /// # Errors
    /// The device's.
    pub fn serve(&mut self) -> io::Result<End> {
        loop {
            let buffer = &mut self.buffer.bytes()[REQUEST_AT..];
            match (&*self.device).read(buffer) {
                Ok(len) => {
                    if let ControlFlow::Break(end) = self.request(len)? {
                        return Ok(end);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENODEV) => return Ok(End::MountGone),
                    // The request was taken back before it was read.
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    fn request(&mut self, len: usize) -> io::Result<ControlFlow<End>> {
        let request = Request::parse(&self.buffer.bytes()[REQUEST_AT..REQUEST_AT + len])
            .ok_or_else(|| io::Error::other("the kernel sent a FUSE request of a wrong length"))?;
        if let Some(bytes) = cost_bytes(&request) {
            let wait = self.serving.limiter.take(bytes);
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
        }
        let serving = Arc::clone(&self.serving);
        let shut = serving.gate.read().unwrap_or_else(PoisonError::into_inner);
        if *shut {
            return Ok(ControlFlow::Break(End::Closed));
        }
        let reply = self.answer(&request);
        let opened = request.opcode == abi::OPEN && matches!(reply, Reply::Short(_));
        let sent = self.send(request.unique, &reply);
        if let (Reply::Data(len), Some((0..VOLUME_OFFSET_BYTES, _))) = (&reply, request.span()) {
            // The identity leaves no copy in ordinary memory.
            self.buffer.bytes()[DATA_AT..DATA_AT + len].zeroize();
        }
        match sent {
            Ok(()) => {}
            Err(error) => match error.raw_os_error() {
                // Whoever asked is gone: the answer was for nobody.
                Some(libc::ENOENT) if opened => {
                    self.serving.opens.fetch_sub(1, Ordering::SeqCst);
                }
                Some(libc::ENOENT | libc::ENODEV) => {} // The next read sees it, if it is the end.
                _ => return Err(error),
            },
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Does what is asked for.
    fn answer(&mut self, request: &Request) -> Reply {
        match request.opcode {
            abi::FORGET | abi::BATCH_FORGET => return Reply::Nothing,
            abi::INIT => {
                return request
                    .init()
                    .map_or(Reply::Errno(libc::EPROTO), Reply::Short);
            }
            abi::STATFS => return Reply::Short(Answer::statfs()),
            abi::DESTROY => return Reply::DONE,
            _ if request.node != abi::ROOT_ID => return Reply::Errno(libc::ENOSYS),
            _ => {}
        }
        match request.opcode {
            abi::GETATTR => self.attributes(request),
            abi::SETATTR
                if request
                    .resize()
                    .is_some_and(|to| self.content.may_resize(to)) =>
            {
                self.attributes(request)
            }
            abi::SETATTR => Reply::Errno(libc::EPERM),
            abi::OPEN => self.open(request),
            abi::READ => self.read(request),
            abi::WRITE => self.write(request),
            abi::FALLOCATE => self.fallocate(request),
            abi::FSYNC | abi::FLUSH => done(self.content.sync()),
            abi::RELEASE => Reply::DONE,
            // The kernel does without and does not ask again.
            _ => Reply::Errno(libc::ENOSYS),
        }
    }

    fn attributes(&self, request: &Request) -> Reply {
        Reply::Short(Answer::attributes(
            self.content.size_bytes(),
            self.serving.owner_uid.unwrap_or(request.uid),
        ))
    }

    fn open(&self, request: &Request) -> Reply {
        if self
            .serving
            .owner_uid
            .is_some_and(|owner| owner != request.uid)
        {
            return Reply::Errno(libc::EACCES);
        }
        let max = self.content.opens_max();
        let one_more = |opens: u32| (opens < max).then_some(opens + 1);
        let (to, from) = (Ordering::SeqCst, Ordering::SeqCst);
        if self.serving.opens.fetch_update(to, from, one_more).is_err() {
            return Reply::Errno(libc::EBUSY);
        }
        Reply::Short(Answer::opened())
    }

    fn read(&mut self, request: &Request) -> Reply {
        let Some((offset, size)) = request.span() else {
            return Reply::Errno(libc::EINVAL);
        };
        let room = &mut self.buffer.bytes()[DATA_AT..DATA_AT + size];
        match self.content.read(offset, room) {
            Ok(len) => Reply::Data(len),
            Err(error) => failed(&error),
        }
    }

    fn write(&mut self, request: &Request) -> Reply {
        match request.span() {
            Some((offset, size)) if request.has_data(size) => {
                let data = &mut self.buffer.bytes()[DATA_AT..DATA_AT + size];
                match self.content.write(offset, data) {
                    Ok(()) => Reply::Short(Answer::written(size)),
                    Err(error) => failed(&error),
                }
            }
            _ => Reply::Errno(libc::EINVAL),
        }
    }

    fn fallocate(&self, request: &Request) -> Reply {
        match request.fallocate() {
            Some((offset, len, PUNCH | ZERO | ZERO_KEEP)) => done(self.content.zero(offset, len)),
            Some(_) => Reply::Errno(libc::EOPNOTSUPP),
            None => Reply::Errno(libc::EINVAL),
        }
    }

    fn send(&mut self, unique: u64, reply: &Reply) -> io::Result<()> {
        let (errno, payload): (i32, &[u8]) = match reply {
            Reply::Nothing => return Ok(()),
            Reply::Errno(errno) => (*errno, &[]),
            Reply::Short(answer) => (0, answer.bytes()),
            Reply::Data(len) => (0, &self.buffer.bytes()[DATA_AT..DATA_AT + len]),
        };
        let header = abi::answer_header(unique, errno, payload.len());
        let sent =
            (&*self.device).write_vectored(&[IoSlice::new(&header), IoSlice::new(payload)])?;
        assert_eq!(
            sent,
            header.len() + payload.len(),
            "FUSE takes an answer whole"
        );
        Ok(())
    }
}

/// What to answer.
#[derive(Debug)]
enum Reply {
    Nothing,
    Errno(i32),
    Short(Answer),
    /// So many bytes at `DATA_AT` of the buffer.
    Data(usize),
}

impl Reply {
    const DONE: Self = Self::Errno(0);
}

fn done(result: io::Result<()>) -> Reply {
    result.map_or_else(|error| failed(&error), |()| Reply::DONE)
}

/// The host's answer goes to the guest as it is: `ENOSPC` stays `ENOSPC`.
fn failed(error: &io::Error) -> Reply {
    Reply::Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// What a request takes of the byte rate; `None`: it is free, also of the operation rate.
fn cost_bytes(request: &Request) -> Option<u64> {
    match request.opcode {
        abi::READ | abi::WRITE => Some(request.span().map_or(0, |(_, size)| size as u64)),
        abi::FSYNC | abi::FLUSH | abi::FALLOCATE => Some(0),
        _ => None,
    }
}

/// A worker's buffer, at a page boundary.
struct Buffer {
    bytes: Vec<u8>,
    from: usize,
}

impl Buffer {
    const LEN: usize = DATA_AT + REQUEST_MAX_BYTES;

    fn new() -> Self {
        let bytes = vec![0; Self::LEN + PAGE_BYTES];
        let from = bytes.as_ptr().align_offset(PAGE_BYTES);
        assert!(from < PAGE_BYTES);
        Self { bytes, from }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + Self::LEN]
    }
}
