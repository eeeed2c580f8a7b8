//! HTTP/1.1 over one connected socket: one request, one answer, each bounded in bytes and time.
//!
//! The other end may have been taken over from inside. An answer that comes late or does not fit
//! can't be told from the next one, so after any of that the connection is not used again.

use crate::Error;
use crate::limits::{API_BODY_MAX_BYTES, API_HEAD_MAX_BYTES, API_WRITE_MAX};
use crate::qemu::qmp::readable;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Most headers of an answer; Firecracker sends up to six.
const HEADERS_MAX: usize = 16;

/// What the server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// At most [`API_BODY_MAX_BYTES`].
    pub body: Vec<u8>,
}

/// A connection.
pub(crate) struct Http {
    socket: UnixStream,
    gone: bool,
}

impl Http {
    pub(crate) fn new(socket: UnixStream) -> Result<Self, Error> {
        socket
            .set_nonblocking(false)
            .and_then(|()| socket.set_write_timeout(Some(API_WRITE_MAX)))
            .map_err(|source| Error::Io {
                command: "connect",
                source,
            })?;
        Ok(Self {
            socket,
            gone: false,
        })
    }

    /// Sends a request and waits `limit` for its answer. `command` names it in errors.
    pub(crate) fn exchange(
        &mut self,
        command: &'static str,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
        limit: Duration,
    ) -> Result<Answer, Error> {
        if self.gone || self.spoke_unasked() {
            return Err(Error::Gone { command });
        }
        let answer = self
            .send(command, &request(method, path, body))
            .and_then(|()| self.receive(command, limit));
        // Whatever comes after a failure answers nothing that is asked later.
        self.gone = answer.is_err();
        answer
    }

    /// Whether the connection is of no more use: closed, or bytes came that nobody asked for.
    pub(crate) fn ended(&mut self) -> bool {
        self.gone || self.spoke_unasked()
    }

    /// Makes no more use of the connection.
    pub(crate) fn close(&mut self) {
        self.gone = true;
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn spoke_unasked(&mut self) -> bool {
        let quiet = matches!(
            recv(&self.socket, &mut [0u8; 1], RecvFlags::DONTWAIT),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
        );
        self.gone |= !quiet;
        self.gone
    }

    fn send(&self, command: &'static str, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(Error::Gone { command });
                }
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(Error::Timeout {
                        command,
                        after: API_WRITE_MAX,
                    });
                }
                Err(e) => {
                    return Err(Error::Io {
                        command,
                        source: e.into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn receive(&self, command: &'static str, limit: Duration) -> Result<Answer, Error> {
        let deadline = Instant::now() + limit;
        let mut buf = Vec::new();
        loop {
            match parse(&buf) {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => {}
                Err(why) => {
                    return Err(Error::Malformed {
                        command,
                        why: why.into(),
                    });
                }
            }
            if !readable(&self.socket, deadline).map_err(|source| Error::Io { command, source })? {
                return Err(Error::Timeout {
                    command,
                    after: limit,
                });
            }
            let mut chunk = [0u8; 4 << 10];
            match recv(&self.socket, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => {
                    return Err(Error::Gone { command });
                }
                Ok((n, _)) => buf.extend_from_slice(&chunk[..n]),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => {
                    return Err(Error::Io {
                        command,
                        source: e.into(),
                    });
                }
            }
        }
    }
}

fn request(method: &str, path: &str, body: Option<&[u8]>) -> Vec<u8> {
    let mut out = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").into_bytes();
    if let Some(body) = body {
        let head = format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(body);
    } else {
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// The answer that `bytes` are, whole; `None` while some of it is missing.
///
/// # Errors
/// What can't become an answer that this client takes: not HTTP/1.1, a head or body above its
/// bound, no length or more than one, a coding, an interim answer, anything after the end.
pub fn parse(bytes: &[u8]) -> Result<Option<Answer>, &'static str> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let head_bytes = match head.parse(bytes) {
        Ok(httparse::Status::Complete(n)) => n,
        Ok(httparse::Status::Partial) if bytes.len() < API_HEAD_MAX_BYTES => return Ok(None),
        Ok(httparse::Status::Partial) => return Err("a head above its bound"),
        Err(httparse::Error::TooManyHeaders) => return Err("too many headers"),
        Err(_) => return Err("not HTTP"),
    };
    if head_bytes > API_HEAD_MAX_BYTES {
        return Err("a head above its bound");
    }
    if head.version != Some(1) {
        return Err("not HTTP/1.1");
    }
    let status = head.code.unwrap_or(0);
    if !(200..=599).contains(&status) {
        return Err("a status that is no answer");
    }
    let mut length = None;
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err("a transfer coding");
        }
        if header.name.eq_ignore_ascii_case("content-length")
            && length.replace(body_length(header.value)?).is_some()
        {
            return Err("two lengths");
        }
    }
    let length = match (status, length) {
        (204, None | Some(0)) => 0,
        (204, Some(_)) => return Err("a body where none can be"),
        (_, Some(n)) => n,
        (_, None) => return Err("no length"),
    };
    let body = &bytes[head_bytes..];
    if body.len() > length {
        return Err("bytes after the end");
    }
    Ok((body.len() == length).then(|| Answer {
        status,
        body: body.to_vec(),
    }))
}

fn body_length(text: &[u8]) -> Result<usize, &'static str> {
    let digits = std::str::from_utf8(text)
        .ok()
        .filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit()))
        .ok_or("a length that is no number")?;
    match digits.parse::<usize>() {
        Ok(n) if n <= API_BODY_MAX_BYTES => Ok(n),
        _ => Err("a body above its bound"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_as_firecracker_writes_them() {
        let none = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        let none = parse(none).unwrap().unwrap();
        assert_eq!((none.status, none.body.len()), (204, 0));
        let fault = b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
            Content-Type: application/json\r\nContent-Length: 21\r\n\r\n{\"fault_message\":\"x\"}";
        let fault = parse(fault).unwrap().unwrap();
        assert_eq!(fault.status, 400);
        assert_eq!(fault.body, b"{\"fault_message\":\"x\"}");
    }

    #[test]
    fn what_is_no_answer() {
        let many = format!(
            "HTTP/1.1 204 \r\n{}\r\n",
            "a: b\r\n".repeat(HEADERS_MAX + 1)
        );
        let long = format!("HTTP/1.1 204 \r\na: {}", "b".repeat(API_HEAD_MAX_BYTES));
        let large = format!(
            "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n",
            API_BODY_MAX_BYTES + 1
        );
        for (bytes, why) in [
            ("{\"QMP\": {}}\n", "not HTTP"),
            ("HTTP/1.0 204 \r\n\r\n", "not HTTP/1.1"),
            ("HTTP/1.1 100 \r\n\r\n", "a status that is no answer"),
            ("HTTP/1.1 999 \r\n\r\n", "a status that is no answer"),
            ("HTTP/1.1 200 \r\n\r\n", "no length"),
            (
                "HTTP/1.1 204 \r\nContent-Length: 1\r\n\r\n",
                "a body where none can be",
            ),
            (
                "HTTP/1.1 200 \r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n",
                "two lengths",
            ),
            (
                "HTTP/1.1 200 \r\nContent-Length: +1\r\n\r\n",
                "a length that is no number",
            ),
            (
                "HTTP/1.1 200 \r\nContent-Length: \r\n\r\n",
                "a length that is no number",
            ),
            (
                "HTTP/1.1 200 \r\nContent-Length: 99999999999999999999999\r\n\r\n",
                "a body above its bound",
            ),
            (
                "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
                "a transfer coding",
            ),
            ("HTTP/1.1 204 \r\n\r\nx", "bytes after the end"),
            (&many, "too many headers"),
            (&long, "a head above its bound"),
            (&large, "a body above its bound"),
        ] {
            assert_eq!(parse(bytes.as_bytes()), Err(why), "{bytes:.60}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse(&bytes);
        }

        /// Bytes that begin as an answer does go deeper.
        #[test]
        fn no_head_panics(tail in "[ -~\r\n]{0,400}") {
            let _ = parse(format!("HTTP/1.1 2{tail}").as_bytes());
        }

        /// However an answer is cut, it is found once, at its very end.
        #[test]
        fn an_answer_is_whole_at_its_end_only(
            status in 200u16..600,
            body in proptest::collection::vec(any::<u8>(), 0..300),
            name in "X-[a-z]{1,20}",
            value in "[a-zA-Z0-9 ]{0,40}",
        ) {
            let body = if status == 204 { Vec::new() } else { body };
            let mut bytes = format!(
                "HTTP/1.1 {status} \r\n{name}: {value}\r\nContent-Length: {}\r\n\r\n",
                body.len()
            ).into_bytes();
            bytes.extend_from_slice(&body);
            for end in 0..bytes.len() {
                prop_assert_eq!(parse(&bytes[..end]), Ok(None));
            }
            prop_assert_eq!(parse(&bytes), Ok(Some(Answer { status, body })));
            bytes.push(b'H');
            prop_assert_eq!(parse(&bytes), Err("bytes after the end"));
        }

        /// Memory stays bounded: past the bounds, nothing is ever "some of it is missing".
        #[test]
        fn waiting_ends(byte in any::<u8>()) {
            let mut bytes = b"HTTP/1.1 200 \r\na: ".to_vec();
            bytes.resize(API_HEAD_MAX_BYTES + API_BODY_MAX_BYTES + 1, byte);
            prop_assert!(parse(&bytes).is_err());
        }
    }
}
