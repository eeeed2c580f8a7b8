//! Bodies on their way: counted, cut when they must end, never collected (EDGE-2).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The other side's connection failed.
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
    /// What allowed it no longer does.
    #[error("the request was revoked")]
    Cut,
}

/// A body to be sent.
pub type Payload = UnsyncBoxBody<Bytes, BodyError>;

/// A body that is there already.
#[must_use]
pub fn full(bytes: impl Into<Bytes>) -> Payload {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body passed through frame by frame: the next one is asked for when the receiver takes it.
pub struct Relay<K> {
    inner: Incoming,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    bytes: Arc<AtomicU64>,
    /// Held as long as the body lives; told when it ended as it should.
    kept: K,
}

/// What hears of a body's proper end.
pub trait AtEnd {
    /// The last frame has passed.
    fn at_end(&mut self);
}

impl AtEnd for () {
    fn at_end(&mut self) {}
}

impl<K: AtEnd + Send + Unpin + 'static> Relay<K> {
    /// Passes `inner` on until `cut`, adding to `bytes`.
    pub fn payload(
        inner: Incoming,
        cut: Option<CancellationToken>,
        bytes: Arc<AtomicU64>,
        mut kept: K,
    ) -> Payload {
        if inner.is_end_stream() {
            kept.at_end();
        }
        let cut = cut.map(|c| Box::pin(c.cancelled_owned()));
        Self {
            inner,
            cut,
            bytes,
            kept,
        }
        .boxed_unsync()
    }
}

impl<K: AtEnd + Unpin> Body for Relay<K> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(cut) = &mut self.cut
            && cut.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(BodyError::Cut)));
        }
        let frame = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, Bytes::len);
                self.bytes.fetch_add(len as u64, Ordering::Relaxed);
                if self.inner.is_end_stream() {
                    self.kept.at_end();
                }
            }
            None => self.kept.at_end(),
            Some(Err(_)) => {}
        }
        Poll::Ready(frame.map(|f| f.map_err(BodyError::Broken)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A body with something that must live as long as it does.
pub struct Guarded<G> {
    inner: Payload,
    _guard: G,
}

impl<G: Send + Unpin + 'static> Guarded<G> {
    /// Keeps `guard` until the body has been sent or given up.
    pub fn new(inner: Payload, guard: G) -> Self {
        Self {
            inner,
            _guard: guard,
        }
    }
}

impl<G: Unpin> Body for Guarded<G> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
