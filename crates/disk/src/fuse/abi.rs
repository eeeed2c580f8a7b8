//! The part of the FUSE protocol (7.31, `linux/fuse.h`) that one regular file needs.
//!
//! Requests are read field by field from bytes and answers written the same way: no cast, no
//! `unsafe`. The kernel is trusted with memory safety anyway, but not with being bug-free.

use crate::limits::{BACKGROUND_MAX, READAHEAD_MAX_BYTES, REQUEST_MAX_BYTES};

pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const FORGET: u32 = 2;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;

const SET_MODE_OR_OWNER: u32 = 1 | 1 << 1 | 1 << 2;
const SET_SIZE: u32 = 1 << 3;

/// The root, which is the file.
pub(super) const ROOT_ID: u64 = 1;
pub(super) const HEADER_BYTES: usize = 40;
/// Of a write: its header and arguments, before the data.
pub(super) const WRITE_HEAD_BYTES: usize = HEADER_BYTES + ARGUMENTS_BYTES;
pub(super) const ANSWER_HEADER_BYTES: usize = 16;
const ARGUMENTS_BYTES: usize = 40;
/// Longest answer but data.
pub(super) const ANSWER_MAX_BYTES: usize = 104;

const MAJOR: u32 = 7;
/// What is answered; from 7.28 the kernel heeds `max_pages`.
const MINOR: u32 = 31;
const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;
const FOPEN_DIRECT_IO: u32 = 1;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// How long the kernel may believe our attributes, s, once there is a volume: nothing of them
/// changes.
const ATTR_VALID_S: u64 = 86_400;
const BLOCK_BYTES: u32 = 4096;

/// A request's header, and as many of its arguments as a write has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    arguments: [u8; ARGUMENTS_BYTES],
    /// All that follows the header, a write's data included.
    arguments_bytes: usize,
}

impl Request {
    /// `None`: it is not as long as it says.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, behind) = bytes.split_at_checked(HEADER_BYTES)?;
        let len = usize::try_from(u32_at(header, 0)?).ok()?;
        (len == bytes.len()).then_some(())?;
        let mut arguments = [0; ARGUMENTS_BYTES];
        let n = behind.len().min(ARGUMENTS_BYTES);
        arguments[..n].copy_from_slice(&behind[..n]);
        Some(Self {
            opcode: u32_at(header, 4)?,
            unique: u64_at(header, 8)?,
            node: u64_at(header, 16)?,
            uid: u32_at(header, 24)?,
            arguments,
            arguments_bytes: behind.len(),
        })
    }

    /// Of `READ` and `WRITE`: offset and size, the size within its bound.
    pub(super) fn span(&self) -> Option<(u64, usize)> {
        let size = usize::try_from(self.u32(16)?).ok()?;
        let offset = self.u64(8)?;
        (size <= REQUEST_MAX_BYTES).then_some((offset, size))
    }

    /// Of `WRITE`: whether `size` bytes of data are there.
    pub(super) fn has_data(&self, size: usize) -> bool {
        self.arguments_bytes == ARGUMENTS_BYTES + size
    }

    /// Of `FALLOCATE`: offset, length, mode.
    pub(super) fn fallocate(&self) -> Option<(u64, u64, u32)> {
        Some((self.u64(8)?, self.u64(16)?, self.u32(24)?))
    }

    /// Of `SETATTR`: the size it sets, if it sets neither mode nor owner.
    pub(super) fn resize(&self) -> Option<u64> {
        let valid = self.u32(0)?;
        (valid & SET_SIZE != 0 && valid & SET_MODE_OR_OWNER == 0).then_some(())?;
        self.u64(16)
    }

    /// Of `INIT`: the answer, or `None` for a kernel before 7.31.
    pub(super) fn init(&self) -> Option<Answer> {
        let (major, minor) = (self.u32(0)?, self.u32(4)?);
        (major == MAJOR && minor >= MINOR).then_some(())?;
        let (readahead, offered) = (self.u32(8)?, self.u32(12)?);
        let mut out = Answer::default();
        out.u32(MAJOR);
        out.u32(MINOR);
        out.u32(readahead.min(READAHEAD_MAX_BYTES));
        out.u32(offered & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES));
        out.u16(BACKGROUND_MAX);
        out.u16(BACKGROUND_MAX * 3 / 4); // Congested from here.
        out.u32(REQUEST_MAX_BYTES as u32);
        out.u32(1); // Granularity of times, ns.
        out.u16((REQUEST_MAX_BYTES / 4096) as u16);
        out.zeros(64 - 30);
        Some(out)
    }

    /// A field of the arguments, if they were long enough to hold it.
    fn u32(&self, at: usize) -> Option<u32> {
        (at + 4 <= self.arguments_bytes).then_some(())?;
        u32_at(&self.arguments, at)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        (at + 8 <= self.arguments_bytes).then_some(())?;
        u64_at(&self.arguments, at)
    }
}

/// A short answer's bytes.
#[derive(Debug)]
pub(super) struct Answer {
    bytes: [u8; ANSWER_MAX_BYTES],
    len: usize,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            bytes: [0; ANSWER_MAX_BYTES],
            len: 0,
        }
    }
}

impl Answer {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// To `GETATTR`: a regular file of `size_bytes`, 0600, owned by `uid` (and the gid of the
    /// same number).
    pub(super) fn attributes(size_bytes: u64, uid: u32) -> Self {
        let mut out = Self::default();
        out.u64(if size_bytes == 0 { 0 } else { ATTR_VALID_S });
        out.u64(0);
        out.u64(ROOT_ID);
        out.u64(size_bytes);
        out.u64(size_bytes / 512);
        out.zeros(3 * 8 + 3 * 4); // Times: none.
        out.u32(libc::S_IFREG | 0o600);
        out.u32(1); // Links.
        out.u32(uid);
        out.u32(uid);
        out.u32(0);
        out.u32(BLOCK_BYTES);
        out.u32(0);
        out
    }

    /// To `OPEN`: no page cache, writes in parallel.
    pub(super) fn opened() -> Self {
        let mut out = Self::default();
        out.u64(0);
        out.u32(FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES);
        out.u32(0);
        out
    }

    /// To `WRITE`.
    pub(super) fn written(bytes: usize) -> Self {
        let mut out = Self::default();
        out.u32(bytes as u32); // At most REQUEST_MAX_BYTES.
        out.u32(0);
        out
    }

    /// To `STATFS`: block and fragment size only.
    pub(super) fn statfs() -> Self {
        let mut out = Self::default();
        out.zeros(5 * 8);
        out.u32(BLOCK_BYTES);
        out.u32(255);
        out.u32(BLOCK_BYTES);
        out.zeros(28);
        out
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    fn zeros(&mut self, n: usize) {
        self.len += n;
        assert!(self.len <= ANSWER_MAX_BYTES);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

/// The header of an answer with `payload_bytes` behind it; `errno` is 0 or positive.
pub(super) fn answer_header(
    unique: u64,
    errno: i32,
    payload_bytes: usize,
) -> [u8; ANSWER_HEADER_BYTES] {
    let len = (ANSWER_HEADER_BYTES + payload_bytes) as u32; // REQUEST_MAX_BYTES and a few more.
    let mut out = [0; ANSWER_HEADER_BYTES];
    out[..4].copy_from_slice(&len.to_ne_bytes());
    out[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    out[8..].copy_from_slice(&unique.to_ne_bytes());
    out
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_have_the_kernels_sizes() {
        assert_eq!(Answer::attributes(1, 1).bytes().len(), 104);
        assert_eq!(Answer::opened().bytes().len(), 16);
        assert_eq!(Answer::written(1).bytes().len(), 8);
        assert_eq!(Answer::statfs().bytes().len(), 80);
    }

    proptest! {
        #[test]
        fn survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), sound: bool) {
            let mut bytes = bytes;
            if sound && bytes.len() >= 4 {
                let len = bytes.len() as u32;
                bytes[..4].copy_from_slice(&len.to_ne_bytes());
            }
            if let Some(request) = Request::parse(&bytes) {
                let _any = (request.span(), request.fallocate(), request.init());
                prop_assert!(bytes.len() >= HEADER_BYTES);
            }
        }
    }
}
