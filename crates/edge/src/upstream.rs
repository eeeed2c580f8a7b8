//! Kept-alive HTTP/1.1 connections to what is behind the edge.
//!
//! One request at a time goes over a connection. It returns to its pool only when its answer was
//! read to the proper end; in every other case it is closed. A request is sent again only when
//! the connection had taken nothing of it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::{Error, ErrorCode};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::awaited::{Awaited, Head};
use crate::body::{AtEnd, Payload};
use crate::limits::{
    ANSWER_BEGUN_MAX, ANSWER_HEAD_MAX_BYTES, HEADERS_MAX, UPSTREAM_BUFFER_BYTES, UPSTREAM_IDLE_MAX,
};

/// Idle connections by destination.
pub struct Pool<K> {
    idle: Arc<Mutex<HashMap<K, Vec<Idle>>>>,
    idle_max: usize,
}

struct Idle {
    link: Link,
    since: Instant,
}

/// One connection.
pub struct Link {
    sender: SendRequest<Payload>,
    head: Head,
    close: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close.cancel();
    }
}

impl Link {
    /// Speaks HTTP/1.1 over a stream.
    ///
    /// # Errors
    /// The handshake's.
    pub async fn new<S>(stream: S) -> Result<Self, hyper::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (stream, head) = Awaited::new(stream, ANSWER_BEGUN_MAX);
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(HEADERS_MAX)
            .max_header_size(ANSWER_HEAD_MAX_BYTES)
            .max_buf_size(UPSTREAM_BUFFER_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        let close = CancellationToken::new();
        let closed = close.clone();
        tokio::spawn(async move {
            tokio::select! {
                // Its fault shows in the request that it carried.
                _ = connection => {}
                () = closed.cancelled() => {}
            }
        });
        // Until its task has run once it seems in use, and a pool would drop it.
        sender.ready().await?;
        Ok(Self {
            sender,
            head,
            close,
        })
    }

    /// Closes the connection when cancelled, whatever it is doing.
    #[must_use]
    pub fn closer(&self) -> CancellationToken {
        self.close.clone()
    }
}

/// A connection whose answer is being read.
pub struct Lease<K: Hash + Eq> {
    link: Option<Link>,
    key: K,
    home: Arc<Mutex<HashMap<K, Vec<Idle>>>>,
    idle_max: usize,
    ended: bool,
}

impl<K: Hash + Eq> AtEnd for Lease<K> {
    fn at_end(&mut self) {
        self.ended = true;
    }
}

impl<K: Hash + Eq> Drop for Lease<K> {
    fn drop(&mut self) {
        let Some(link) = self
            .link
            .take()
            .filter(|l| self.ended && !l.close.is_cancelled())
        else {
            return;
        };
        let mut idle = lock(&self.home);
        if let Some(list) = idle.get_mut(&self.key)
            && list.len() < self.idle_max
        {
            list.push(Idle {
                link,
                since: Instant::now(),
            });
        }
    }
}

impl<K: Hash + Eq + Clone> Pool<K> {
    /// An empty pool that keeps up to `idle_max` connections per destination.
    #[must_use]
    pub fn new(idle_max: usize) -> Self {
        Self {
            idle: Arc::default(),
            idle_max,
        }
    }

    /// An idle connection that can be used.
    pub fn take(&self, key: &K) -> Option<Link> {
        let mut idle = lock(&self.idle);
        // The entry marks the destination as one to keep connections to.
        let list = idle.entry(key.clone()).or_default();
        while let Some(Idle { link, since }) = list.pop() {
            if since.elapsed() <= UPSTREAM_IDLE_MAX
                && link.sender.is_ready()
                && !link.close.is_cancelled()
            {
                return Some(link);
            }
        }
        None
    }

    /// Keeps a connection that carried nothing yet, for the next request.
    pub fn put(&self, key: K, link: Link) {
        let mut idle = lock(&self.idle);
        let list = idle.entry(key).or_default();
        if list.len() < self.idle_max {
            let since = Instant::now();
            list.push(Idle { link, since });
        }
    }

    /// Sends a request over `link`.
    ///
    /// # Errors
    /// What happened, and the request if nothing of it was sent.
    pub async fn send(
        &self,
        key: K,
        mut link: Link,
        request: Request<Payload>,
    ) -> Result<(Response<Incoming>, Lease<K>), (hyper::Error, Option<Request<Payload>>)> {
        link.head.awaited();
        match link.sender.try_send_request(request).await {
            Ok(response) => {
                link.head.came();
                let lease = Lease {
                    link: Some(link),
                    key,
                    home: Arc::clone(&self.idle),
                    idle_max: self.idle_max,
                    ended: false,
                };
                Ok((response, lease))
            }
            Err(mut e) => {
                let unsent = e.take_message();
                Err((e.into_error(), unsent))
            }
        }
    }

    /// Closes idle connections that are old or whose destination `stays` no longer wants.
    pub fn sweep(&self, stays: impl Fn(&K) -> bool) {
        lock(&self.idle).retain(|key, list| {
            list.retain(|i| i.since.elapsed() <= UPSTREAM_IDLE_MAX && i.link.sender.is_ready());
            stays(key)
        });
    }
}

/// The error of an upstream that broke off or answered nonsense.
#[must_use]
pub fn broken(who: &str, e: &hyper::Error) -> Error {
    Error::new(
        ErrorCode::BadGateway,
        format!("{who} gave no proper answer; try again"),
    )
    .detail(format!("upstream: {e}"))
}

fn lock<K>(m: &Mutex<HashMap<K, Vec<Idle>>>) -> MutexGuard<'_, HashMap<K, Vec<Idle>>> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
