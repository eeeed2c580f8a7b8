//! Framing and the multiplexed client of the internal protocols.
//!
//! A frame is a big-endian u32 length and that many bytes of JSON, at most
//! [`FRAME_MAX_BYTES`](crate::limits::FRAME_MAX_BYTES). Several requests may be in flight on one
//! connection; answers carry the request's `id` and come in any order.

use crate::error::{Error, ErrorCode};
use crate::limits::FRAME_MAX_BYTES;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The protocol version that both sides speak.
pub const VERSION: u32 = 1;

/// A request on the wire.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request<T> {
    /// Protocol version.
    pub v: u32,
    /// Number of this request on its connection.
    pub id: u64,
    /// The request id that every log of the platform carries.
    pub request_id: String,
    /// The operation.
    pub body: T,
}

/// An answer on the wire: exactly one of `ok` and `err`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    /// The request's number.
    pub id: u64,
    /// The value.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub ok: Option<T>,
    /// The error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub err: Option<Error>,
}

impl<T> Reply<T> {
    /// The answer to request `id`.
    pub fn new(id: u64, result: Result<T, Error>) -> Self {
        match result {
            Ok(v) => Self {
                id,
                ok: Some(v),
                err: None,
            },
            Err(e) => Self {
                id,
                ok: None,
                err: Some(e),
            },
        }
    }

    /// The value or the error; neither is the peer's fault and an error of its own.
    ///
    /// # Errors
    /// The peer's error.
    pub fn into_result(self) -> Result<T, Error> {
        match (self.ok, self.err) {
            (Some(v), None) => Ok(v),
            (None, Some(e)) => Err(e),
            _ => Err(Error::internal(
                "an answer with neither or both of ok and err",
            )),
        }
    }
}

/// Encodes one frame.
///
/// # Errors
/// [`ErrorCode::TooLarge`] above the bound.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    let mut out = vec![0u8; 4];
    serde_json::to_writer(&mut out, value).map_err(Error::internal)?;
    let len = out.len() - 4;
    if len > FRAME_MAX_BYTES {
        return Err(Error::new(
            ErrorCode::TooLarge,
            "the message is larger than 1 MiB",
        ));
    }
    let len = u32::try_from(len).map_err(Error::internal)?;
    out[..4].copy_from_slice(&len.to_be_bytes());
    Ok(out)
}

/// Decodes a frame's bytes (without the length).
///
/// # Errors
/// [`ErrorCode::BadRequest`], naming what does not fit.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::new(ErrorCode::BadRequest, format!("malformed message: {e}")))
}

/// Frames over blocking streams, for the synchronous processes.
pub mod blocking {
    use super::{Reply, Request, VERSION, decode, encode};
    use crate::error::{Error, ErrorCode};
    use crate::limits::FRAME_MAX_BYTES;
    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::Duration;

    /// Reads one frame; `None` at a clean end of the stream.
    ///
    /// # Errors
    /// The stream's, or [`ErrorKind::InvalidData`] for a length above the bound.
    pub fn read_frame(r: &mut impl Read) -> std::io::Result<Option<Vec<u8>>> {
        let mut len = [0u8; 4];
        match r.read_exact(&mut len) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e),
        }
        let len = u32::from_be_bytes(len) as usize;
        if len > FRAME_MAX_BYTES {
            return Err(std::io::Error::new(
                ErrorKind::InvalidData,
                "frame above 1 MiB",
            ));
        }
        let mut buf = vec![0u8; len];
        r.read_exact(&mut buf)?;
        Ok(Some(buf))
    }

    /// Writes one frame.
    ///
    /// # Errors
    /// The stream's, or [`ErrorKind::InvalidData`] for a message above the bound.
    pub fn write_frame<T: Serialize>(w: &mut impl Write, value: &T) -> std::io::Result<()> {
        let bytes = encode(value)
            .map_err(|e| std::io::Error::new(ErrorKind::InvalidData, e.to_string()))?;
        w.write_all(&bytes)
    }

    /// Counts something down when it is over, however that comes.
    pub struct Leave(Arc<AtomicUsize>);

    impl Leave {
        /// Of what was counted up already.
        #[must_use]
        pub fn of(counter: &Arc<AtomicUsize>) -> Self {
            Self(Arc::clone(counter))
        }
    }

    impl Drop for Leave {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Answers the requests of one connection until its peer closes it: each in a thread of its
    /// own, so that a slow one holds up no other; at most `max` at once, of all connections that
    /// share `busy`.
    ///
    /// # Errors
    /// The stream's; what is not even a request's head.
    pub fn converse<Q: DeserializeOwned + Send + 'static>(
        stream: &UnixStream,
        busy: &Arc<AtomicUsize>,
        max: usize,
        answer: impl Fn(&str, Q) -> Result<serde_json::Value, Error> + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        let answer = Arc::new(answer);
        let writer = Arc::new(Mutex::new(stream.try_clone()?));
        let reply = |writer: &Mutex<UnixStream>, id, result| {
            let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
            write_frame(&mut *stream, &Reply::new(id, result))
        };
        let mut reader = stream.try_clone()?;
        while let Some(bytes) = read_frame(&mut reader)? {
            let request: Request<Q> = match decode(&bytes) {
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
                let refused =
                    Error::new(ErrorCode::BadRequest, format!("protocol version {v} {why}"));
                reply(&writer, request.id, Err(refused))?;
                continue;
            }
            let leave = Leave::of(busy);
            if busy.fetch_add(1, Ordering::AcqRel) >= max {
                let why = "too many requests at once; try again";
                let busy = Error::new(ErrorCode::RateLimited, why);
                reply(&writer, request.id, Err(busy))?;
                continue;
            }
            let (answer, writer) = (Arc::clone(&answer), Arc::clone(&writer));
            let run = move || {
                let _leave = leave;
                let result = answer(&request.request_id, request.body);
                // A peer that went away asks again, or sees what came of it.
                let _ = reply(&writer, request.id, result);
            };
            std::thread::Builder::new()
                .name("request".into())
                .spawn(run)?;
        }
        Ok(())
    }

    /// One call on a fresh connection.
    ///
    /// # Errors
    /// The peer's error, or [`ErrorCode::Unavailable`] when it does not answer in `timeout`.
    pub fn call<Q: Serialize, A: DeserializeOwned>(
        socket: &Path,
        request_id: &str,
        body: &Q,
        timeout: Duration,
    ) -> Result<A, Error> {
        let name = socket.display();
        let gone = |what: &str, e: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::Unavailable,
                "a part of the platform does not answer; see `casemate status`",
            )
            .detail(format!("{what} {name}: {e}"))
        };
        let mut s = UnixStream::connect(socket).map_err(|e| gone("connect", &e))?;
        s.set_read_timeout(Some(timeout))
            .map_err(|e| gone("set timeout", &e))?;
        s.set_write_timeout(Some(timeout))
            .map_err(|e| gone("set timeout", &e))?;
        write_frame(
            &mut s,
            &Request {
                v: VERSION,
                id: 1,
                request_id: request_id.into(),
                body,
            },
        )
        .map_err(|e| gone("write", &e))?;
        let bytes = read_frame(&mut s)
            .map_err(|e| gone("read", &e))?
            .ok_or_else(|| gone("read", &"closed without an answer"))?;
        decode::<Reply<A>>(&bytes)?.into_result()
    }
}

#[cfg(feature = "client")]
pub use client::Client;

#[cfg(feature = "client")]
mod client {
    use super::{Reply, Request, VERSION, decode, encode};
    use crate::error::{Error, ErrorCode};
    use crate::limits::{FRAME_MAX_BYTES, RPC_TIMEOUT};
    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
    use tokio::sync::oneshot;

    type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>>;

    /// A client of one socket: connects when first used, again after the peer went away, and
    /// multiplexes calls over that one connection. Cheap to clone.
    #[derive(Clone)]
    pub struct Client {
        path: Arc<PathBuf>,
        link: Arc<tokio::sync::Mutex<Option<Arc<Link>>>>,
        next_id: Arc<AtomicU64>,
    }

    struct Link {
        writer: tokio::sync::Mutex<OwnedWriteHalf>,
        waiting: Waiting,
        closed: Arc<std::sync::atomic::AtomicBool>,
        reader: tokio::task::JoinHandle<()>,
    }

    impl Drop for Link {
        fn drop(&mut self) {
            self.reader.abort();
        }
    }

    impl Client {
        /// A client of the socket at `path`; does not connect yet.
        pub fn new(path: impl AsRef<Path>) -> Self {
            Self {
                path: Arc::new(path.as_ref().to_owned()),
                link: Arc::default(),
                next_id: Arc::new(AtomicU64::new(1)),
            }
        }

        /// One call, waiting at most [`RPC_TIMEOUT`].
        ///
        /// # Errors
        /// The peer's error, or [`ErrorCode::Unavailable`] when it does not answer.
        pub async fn call<Q: Serialize, A: DeserializeOwned>(
            &self,
            request_id: &str,
            body: &Q,
        ) -> Result<A, Error> {
            self.call_within(request_id, body, RPC_TIMEOUT).await
        }

        /// One call, waiting at most `timeout`.
        ///
        /// # Errors
        /// The peer's error, or [`ErrorCode::Unavailable`] when it does not answer.
        pub async fn call_within<Q: Serialize, A: DeserializeOwned>(
            &self,
            request_id: &str,
            body: &Q,
            timeout: Duration,
        ) -> Result<A, Error> {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let frame = encode(&Request {
                v: VERSION,
                id,
                request_id: request_id.to_owned(),
                body,
            })?;
            let answer = tokio::time::timeout(timeout, self.exchange(id, &frame))
                .await
                .map_err(|_| self.gone("no answer in time"))??;
            decode::<Reply<A>>(&answer)?.into_result()
        }

        async fn exchange(&self, id: u64, frame: &[u8]) -> Result<Vec<u8>, Error> {
            let link = self.link().await?;
            let (tx, rx) = oneshot::channel();
            lock(&link.waiting).insert(id, tx);
            // Dropped on a timeout too, so that an abandoned call leaves no entry.
            let _forget = Forget {
                waiting: &link.waiting,
                id,
            };
            if let Err(e) = link.writer.lock().await.write_all(frame).await {
                link.closed.store(true, Ordering::Release);
                return Err(self.gone(e));
            }
            if link.closed.load(Ordering::Acquire) {
                return Err(self.gone("closed"));
            }
            rx.await.map_err(|_| self.gone("closed before the answer"))
        }

        async fn link(&self) -> Result<Arc<Link>, Error> {
            let mut slot = self.link.lock().await;
            if let Some(link) = slot.as_ref().filter(|l| !l.closed.load(Ordering::Acquire)) {
                return Ok(Arc::clone(link));
            }
            let stream = UnixStream::connect(self.path.as_path())
                .await
                .map_err(|e| self.gone(e))?;
            let (read, write) = stream.into_split();
            let waiting = Waiting::default();
            let closed = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let reader = tokio::spawn(read_answers(
                read,
                Arc::clone(&waiting),
                Arc::clone(&closed),
            ));
            let link = Arc::new(Link {
                writer: tokio::sync::Mutex::new(write),
                waiting,
                closed,
                reader,
            });
            *slot = Some(Arc::clone(&link));
            Ok(link)
        }

        fn gone(&self, why: impl std::fmt::Display) -> Error {
            Error::new(
                ErrorCode::Unavailable,
                "a part of the platform does not answer; try again, and see `casemate status`",
            )
            .detail(format!("{}: {why}", self.path.display()))
        }
    }

    struct Forget<'a> {
        waiting: &'a Waiting,
        id: u64,
    }

    impl Drop for Forget<'_> {
        fn drop(&mut self) {
            lock(self.waiting).remove(&self.id);
        }
    }

    async fn read_answers(
        mut read: OwnedReadHalf,
        waiting: Waiting,
        closed: Arc<std::sync::atomic::AtomicBool>,
    ) {
        #[derive(serde::Deserialize)]
        struct Head {
            id: u64,
        }
        while let Ok(len) = read.read_u32().await {
            let len = len as usize;
            if len > FRAME_MAX_BYTES {
                break;
            }
            let mut buf = vec![0u8; len];
            if read.read_exact(&mut buf).await.is_err() {
                break;
            }
            let Ok(head) = serde_json::from_slice::<Head>(&buf) else {
                break;
            };
            if let Some(tx) = lock(&waiting).remove(&head.id) {
                // A caller that gave up is no fault of the connection.
                let _ = tx.send(buf);
            }
        }
        closed.store(true, Ordering::Release);
        lock(&waiting).clear();
    }

    fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        m.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
