//! Answers: JSON, streams, and failures in the contract's envelope.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::Response;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use serde::Serialize;
use tokio::sync::mpsc;

/// What a handler gives.
pub(super) type Reply = Result<Response<Payload>, Failure>;

type Revoked = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A body.
pub(super) enum Payload {
    /// All at once.
    Full(Option<Bytes>),
    /// Chunks until the sender is dropped; cut off when the caller's right ends.
    Stream {
        /// The chunks.
        chunks: mpsc::Receiver<Bytes>,
        /// Ready when the caller's right has ended.
        revoked: Option<Revoked>,
    },
}

/// The caller's right ended in the middle of a stream.
#[derive(Debug, thiserror::Error)]
#[error("the token was revoked")]
pub(super) struct Cut;

impl Payload {
    /// Cuts a stream off as soon as `revoked` is ready.
    pub(super) fn until(self, revoked: impl Future<Output = ()> + Send + 'static) -> Self {
        match self {
            Self::Stream { chunks, .. } => Self::Stream {
                chunks,
                revoked: Some(Box::pin(revoked)),
            },
            full @ Self::Full(_) => full,
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream { chunks, revoked } => {
                if let Some(ended) = revoked
                    && ended.as_mut().poll(cx).is_ready()
                {
                    chunks.close();
                    *revoked = None;
                    return Poll::Ready(Some(Err(Cut)));
                }
                let chunk = chunks.poll_recv(cx);
                chunk.map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Stream { .. } => SizeHint::default(),
        }
    }
}

/// A failure as the client sees it.
#[derive(Debug)]
pub(super) struct Failure {
    status: u16,
    code: &'static str,
    message: String,
}

impl Failure {
    pub(super) fn new(status: u16, code: &'static str, message: impl ToString) -> Self {
        Self {
            status,
            code,
            message: message.to_string(),
        }
    }

    pub(super) fn bad_request(message: impl ToString) -> Self {
        Self::new(400, "bad_request", message)
    }

    pub(super) fn invalid(message: impl ToString) -> Self {
        Self::new(422, "validation_error", message)
    }

    pub(super) fn not_found(message: impl ToString) -> Self {
        Self::new(404, "not_found", message)
    }

    pub(super) fn too_large(message: impl ToString) -> Self {
        Self::new(413, "too_large", message)
    }

    /// What the kernel said about a path, in the contract's codes (§3.2).
    pub(super) fn file(error: &std::io::Error, path: &str) -> Self {
        use std::io::ErrorKind as Kind;
        match error.kind() {
            Kind::NotFound => Self::not_found(format!("{path}: no such file or directory")),
            Kind::PermissionDenied => Self::new(403, "forbidden", format!("{path}: {error}")),
            Kind::InvalidInput
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::InvalidFilename => Self::bad_request(format!("{path}: {error}")),
            Kind::StorageFull => Self::new(
                507,
                "disk_full",
                "the workspace's disk is full; delete something",
            ),
            _ if error.raw_os_error() == Some(libc::ELOOP) => {
                Self::bad_request(format!("{path}: {error}"))
            }
            _ => Self::new(500, "io_error", format!("{path}: {error}")),
        }
    }

    pub(super) fn response(self, request_id: Option<&str>) -> Response<Payload> {
        #[derive(Serialize)]
        struct Body<'a> {
            success: bool,
            error: &'a str,
            code: &'a str,
            message: &'a str,
            #[serde(rename = "requestId", skip_serializing_if = "Option::is_none")]
            request_id: Option<&'a str>,
        }
        let body = Body {
            success: false,
            error: self.code,
            code: self.code,
            message: &self.message,
            request_id,
        };
        let body = serde_json::to_vec(&body).expect("strings and a bool are JSON");
        full(self.status, "application/json", body.into())
    }
}

/// A JSON answer.
pub(super) fn json(status: u16, body: &impl Serialize) -> Reply {
    let body = serde_json::to_vec(body)
        .map_err(|_| Failure::new(500, "internal_error", "the answer can't be written as JSON"))?;
    Ok(full(status, "application/json", body.into()))
}

/// A stream of `content_type`, and where its chunks go.
pub(super) fn stream(
    content_type: &'static str,
    queue_chunks: usize,
) -> (mpsc::Sender<Bytes>, Response<Payload>) {
    let (sender, chunks) = mpsc::channel(queue_chunks);
    let payload = Payload::Stream {
        chunks,
        revoked: None,
    };
    (sender, response(200, content_type, payload))
}

fn full(status: u16, content_type: &'static str, body: Bytes) -> Response<Payload> {
    response(status, content_type, Payload::Full(Some(body)))
}

fn response(status: u16, content_type: &'static str, payload: Payload) -> Response<Payload> {
    let mut response = Response::new(payload);
    *response.status_mut() =
        hyper::StatusCode::from_u16(status).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
