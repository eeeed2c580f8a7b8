//! What an upstream may send before the head of its answer is whole. hyper bounds one head; it
//! passes over informational answers (1xx) without end, and waits without end for the rest of what
//! was begun.
//!
//! ```text
//!        request handed over             first byte             head handed on
//!   rest ───────────────────▶ awaited ───────────────▶ begun ─────────────────▶ rest
//!                                                        │ too many bytes, or too slow: an error
//! ```
//! Must never bound how long an answer takes to begin (a command may run that long before), or a
//! body.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::limits::ANSWER_BEGUN_MAX_BYTES;

/// Whether an answer is awaited; shared by a connection and whoever sends requests over it.
#[derive(Debug, Default)]
pub struct Head(Arc<AtomicU64>);

impl Head {
    /// A request is handed over.
    pub fn awaited(&self) {
        self.0.fetch_or(1, Ordering::Release);
    }

    /// The head of its answer is there.
    pub fn came(&self) {
        // Odd becomes the next even number: what was begun is told apart from what comes next.
        self.0.fetch_add(1, Ordering::Release);
    }

    /// The number of the answer that is awaited; none at rest.
    fn number(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|n| n % 2 == 1)
    }
}

/// A connection to an upstream.
pub struct Awaited<S> {
    inner: S,
    head: Head,
    within: Duration,
    begun: Option<Begun>,
}

/// An answer of which something came.
struct Begun {
    number: u64,
    bytes: usize,
    late: Pin<Box<Sleep>>,
}

impl<S> Awaited<S> {
    /// At rest; the head of an answer that is begun must be whole `within`.
    pub fn new(inner: S, within: Duration) -> (Self, Head) {
        let head = Head::default();
        let awaited = Self {
            inner,
            head: Head(Arc::clone(&head.0)),
            within,
            begun: None,
        };
        (awaited, head)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Awaited<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let number = self.head.number();
        self.begun.take_if(|b| Some(b.number) != number);
        if let Some(begun) = &mut self.begun {
            if begun.bytes > ANSWER_BEGUN_MAX_BYTES {
                let why = "the answer's head does not end";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
            }
            if begun.late.as_mut().poll(cx).is_ready() {
                let why = "the answer's head does not come to its end";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
            }
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let bytes = buf.filled().len() - before;
        if let Some(number) = number.filter(|_| bytes > 0) {
            // Its time is looked at when more of it is wanted.
            let within = self.within;
            let begun = self.begun.get_or_insert_with(|| Begun {
                number,
                bytes: 0,
                late: Box::pin(sleep(within)),
            });
            begun.bytes += bytes;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Awaited<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const WITHIN: Duration = Duration::from_millis(100);

    fn world() -> (Awaited<DuplexStream>, Head, DuplexStream) {
        let (ours, theirs) = duplex(4 * ANSWER_BEGUN_MAX_BYTES);
        let (awaited, head) = Awaited::new(ours, WITHIN);
        (awaited, head, theirs)
    }

    /// Reads until there is no more, and says why not.
    async fn drain(awaited: &mut Awaited<DuplexStream>) -> (usize, io::Result<()>) {
        let (mut all, mut chunk) = (0, [0; 4096]);
        loop {
            match tokio::time::timeout(3 * WITHIN, awaited.read(&mut chunk)).await {
                Ok(Ok(n)) => all += n,
                Ok(Err(e)) => return (all, Err(e)),
                Err(_) => return (all, Ok(())),
            }
        }
    }

    #[tokio::test]
    async fn what_comes_before_a_head_is_bounded_in_bytes() {
        let (mut awaited, head, mut theirs) = world();
        let much = vec![b'x'; 2 * ANSWER_BEGUN_MAX_BYTES];
        // Not while none is awaited: bodies.
        theirs.write_all(&much).await.unwrap();
        let (all, end) = drain(&mut awaited).await;
        assert_eq!((all, end.is_ok()), (much.len(), true));
        head.awaited();
        theirs.write_all(&much).await.unwrap();
        let (all, end) = drain(&mut awaited).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(all <= ANSWER_BEGUN_MAX_BYTES + 4096, "{all}");
    }

    #[tokio::test]
    async fn a_head_that_is_begun_is_bounded_in_time() {
        let (mut awaited, head, mut theirs) = world();
        head.awaited();
        // Silence is none of its affairs.
        let (all, end) = drain(&mut awaited).await;
        assert_eq!((all, end.is_ok()), (0, true));
        theirs.write_all(b"H").await.unwrap();
        let (all, end) = drain(&mut awaited).await;
        assert_eq!(all, 1);
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn each_answer_is_counted_for_itself() {
        let (mut awaited, head, mut theirs) = world();
        let most = vec![b'x'; ANSWER_BEGUN_MAX_BYTES];
        let mut taken = vec![0; most.len()];
        for _ in 0..3 {
            head.awaited();
            theirs.write_all(&most).await.unwrap();
            awaited.read_exact(&mut taken).await.unwrap();
            head.came();
            tokio::time::sleep(WITHIN).await;
        }
    }
}
