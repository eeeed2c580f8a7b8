//! A client's HTTP/1.1 connection as hyper sees it, with two things added that hyper has no hook
//! for:
//!
//! - hyper answers an unreadable head by itself. That answer is replaced by one of ours, so that
//!   it carries HSTS and the contract's error body like every other (EDGE-1).
//! - hyper drops `Content-Length` where `Transfer-Encoding` stands too, as RFC 9112 (6.1) allows.
//!   The head's bytes are kept until the request is served, so that the edge can refuse it.
//!
//! ```text
//!          request served           body dropped            flushed
//!   idle ────────────────▶ busy ────────────────▶ ended ────────────────▶ idle
//! ```
//! What is written while idle is hyper's own answer: it writes ours only between "served" and
//! "flushed". A client that takes no bytes for a while is cut off.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::limits::{HEAD_MAX_BYTES, WRITE_STALL_MAX};

const IDLE: u8 = 0;
const BUSY: u8 = 1;
const ENDED: u8 = 2;

/// Where a connection is between requests; shared with the service that answers them.
#[derive(Debug, Default)]
pub struct Phase {
    phase: AtomicU8,
    head: Mutex<Vec<u8>>,
}

impl Phase {
    /// A request is being served. Whether its head, as far as it was seen, has a
    /// `Content-Length`.
    #[must_use]
    pub fn served(&self) -> bool {
        self.phase.store(BUSY, Ordering::Release);
        let head = std::mem::take(&mut *self.head());
        has_content_length(&head)
    }

    /// Its answer has been handed over whole.
    pub fn ended(&self) {
        self.phase.store(ENDED, Ordering::Release);
    }

    fn flushed(&self) {
        // Busy stays busy.
        let _ = self
            .phase
            .compare_exchange(ENDED, IDLE, Ordering::AcqRel, Ordering::Relaxed);
    }

    fn is_idle(&self) -> bool {
        self.phase.load(Ordering::Acquire) == IDLE
    }

    fn head(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the answer that replaces hyper's own with this status.
pub type Refuse = Box<dyn Fn(u16) -> Bytes + Send + Sync>;

/// The connection.
pub struct Wire<S> {
    inner: S,
    phase: Arc<Phase>,
    refuse: Refuse,
    ours: Option<Bytes>,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Wire<S> {
    /// Wraps a connection.
    pub fn new(inner: S, phase: Arc<Phase>, refuse: Refuse) -> Self {
        Self {
            inner,
            phase,
            refuse,
            ours: None,
            stalled: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        if self.phase.is_idle() {
            let mut head = self.phase.head();
            let room = HEAD_MAX_BYTES.saturating_sub(head.len());
            let news = &buf.filled()[before..];
            head.extend_from_slice(&news[..news.len().min(room)]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> Wire<S> {
    /// Fails when the other side has taken nothing for too long.
    fn watched<T>(
        &mut self,
        cx: &mut Context<'_>,
        poll: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            return poll;
        }
        let stalled = self.stalled.get_or_insert_with(|| {
            Box::pin(tokio::time::sleep_until(Instant::now() + WRITE_STALL_MAX))
        });
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client takes no bytes",
        )))
    }

    /// Writes our answer in place of `theirs`.
    fn poll_refusal(&mut self, cx: &mut Context<'_>, theirs: &[u8]) -> Poll<io::Result<usize>> {
        let mut ours = match self.ours.take() {
            Some(rest) => rest,
            None => (self.refuse)(status_of(theirs)),
        };
        while ours.has_remaining() {
            match Pin::new(&mut self.inner).poll_write(cx, &ours) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => ours.advance(n),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => {
                    self.ours = Some(ours);
                    return self.watched(cx, Poll::Pending);
                }
            }
        }
        self.stalled = None;
        Poll::Ready(Ok(theirs.len()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !buf.is_empty() && self.phase.is_idle() {
            return self.poll_refusal(cx, buf);
        }
        let poll = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.watched(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let (true, Some(first)) = (self.phase.is_idle(), bufs.iter().find(|b| !b.is_empty())) {
            return self.poll_refusal(cx, first);
        }
        let poll = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.watched(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.inner).poll_flush(cx);
        let flushed = ready!(self.watched(cx, poll));
        self.phase.flushed();
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.watched(cx, poll)
    }
}

/// The status in an answer's first line; 400 if there is none.
fn status_of(answer: &[u8]) -> u16 {
    answer
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok())
        .filter(|status| (400..500).contains(status))
        .unwrap_or(400)
}

/// Whether a head, up to its empty line, has a line of that name.
fn has_content_length(bytes: &[u8]) -> bool {
    for line in bytes.split(|b| *b == b'\n').skip(1) {
        if line.trim_ascii().is_empty() {
            return false;
        }
        let name = line.split(|b| *b == b':').next().unwrap_or_default();
        if name.trim_ascii().eq_ignore_ascii_case(b"content-length") {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_are_seen_in_the_head_only() {
        assert!(has_content_length(
            b"GET / HTTP/1.1\r\na: b\r\ncOntent-length : 3\r\n\r\n"
        ));
        assert!(!has_content_length(
            b"GET / HTTP/1.1\r\na: b\r\n\r\ncontent-length: 3\r\n"
        ));
        assert!(!has_content_length(b"content-length: 3"));
    }

    #[test]
    fn statuses_are_client_errors() {
        assert_eq!(status_of(b"HTTP/1.1 431 X\r\n"), 431);
        assert_eq!(status_of(b"HTTP/1.1 200 X\r\n"), 400);
        assert_eq!(status_of(b"HT"), 400);
    }

    proptest! {
        #[test]
        fn hostile_heads_never_panic(bytes: Vec<u8>) {
            let _ = (has_content_length(&bytes), status_of(&bytes));
        }
    }
}
