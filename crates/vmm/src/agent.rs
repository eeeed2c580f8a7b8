//! vmctl's end of the channel to the guest's agent: lines of JSON over virtio-serial or vsock.
//!
//! Over vsock the guest connects: its first connection is the channel, and then nobody listens any
//! more. The agent makes it before anything of a workspace runs.
//!
//! The guest is hostile: it may flood, say nothing, or say anything. Reading is bounded by a
//! budget that each request of ours renews; what does not parse is a typed error.

use crate::limits::{AGENT_BUDGET_BYTES, AGENT_WRITE_MAX};
use api::agent::{FromGuest, ToGuest};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;
use rustix::net::{RecvFlags, recv};
use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// The channel.
pub struct Channel {
    end: End,
    buf: Vec<u8>,
    messages: VecDeque<Result<FromGuest, Error>>,
    budget_bytes: usize,
    open: bool,
}

/// This side's end.
enum End {
    Connected(UnixStream),
    /// The guest did not connect yet; what it is to be told waits here.
    Listening(UnixListener, Vec<u8>),
}

/// What is wrong with the channel.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A message above the bound.
    #[error("a message of the guest's agent is longer than {CHANNEL_MESSAGE_MAX_BYTES} bytes")]
    TooLong,
    /// Not a message of the channel.
    #[error("the guest's agent sent what is no message: {0}")]
    Malformed(String),
    /// Ours does not fit.
    #[error("the message to the guest's agent is longer than {CHANNEL_MESSAGE_MAX_BYTES} bytes")]
    TooLarge,
    /// It can't be written.
    #[error("the guest's agent does not take messages: {0}")]
    Write(String),
}

impl Channel {
    /// A channel over the VMM's agent socket.
    ///
    /// # Errors
    /// The socket's.
    pub fn new(socket: UnixStream) -> std::io::Result<Self> {
        socket.set_write_timeout(Some(AGENT_WRITE_MAX))?;
        Ok(Self::over(End::Connected(socket)))
    }

    /// A channel that is the first connection to `listener`.
    ///
    /// # Errors
    /// The listener's.
    pub fn listen(listener: UnixListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::over(End::Listening(listener, Vec::new())))
    }

    fn over(end: End) -> Self {
        Self {
            end,
            buf: Vec::new(),
            messages: VecDeque::new(),
            budget_bytes: AGENT_BUDGET_BYTES,
            open: true,
        }
    }

    /// Sends `message` and renews what the guest may say.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Write`].
    pub fn send(&mut self, message: &ToGuest) -> Result<(), Error> {
        let mut text = serde_json::to_vec(message).map_err(|e| Error::Write(e.to_string()))?;
        text.push(b'\n');
        if text.len() > CHANNEL_MESSAGE_MAX_BYTES {
            return Err(Error::TooLarge);
        }
        self.budget_bytes = AGENT_BUDGET_BYTES;
        match &mut self.end {
            End::Connected(socket) => socket
                .write_all(&text)
                .map_err(|e| Error::Write(e.to_string())),
            End::Listening(_, waiting) => {
                if waiting.len() + text.len() > 2 * CHANNEL_MESSAGE_MAX_BYTES {
                    return Err(Error::Write("it never connected".into()));
                }
                waiting.extend_from_slice(&text);
                Ok(())
            }
        }
    }

    /// Renews what the guest may say: it was asked for as much.
    pub fn renew(&mut self) {
        self.budget_bytes = AGENT_BUDGET_BYTES;
    }

    /// Reads what is there, once, without blocking; takes the guest's connection first.
    pub fn fill(&mut self) {
        if !self.listens() {
            return;
        }
        self.connect();
        let End::Connected(socket) = &self.end else {
            return;
        };
        let mut chunk = [0u8; 16 << 10];
        match recv(socket, &mut chunk, RecvFlags::DONTWAIT) {
            Ok((0, _)) => self.open = false,
            Ok((n, _)) => {
                self.budget_bytes = self.budget_bytes.saturating_sub(n);
                self.take_in(&chunk[..n]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.open = false,
        }
    }

    /// The next message that [`Self::fill`] brought.
    pub fn message(&mut self) -> Option<Result<FromGuest, Error>> {
        self.messages.pop_front()
    }

    /// Whether it is worth waiting for the guest: the channel is open and the budget is left.
    #[must_use]
    pub fn listens(&self) -> bool {
        self.open && self.budget_bytes > 0
    }

    /// The socket, to wait on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.end {
            End::Connected(socket) => socket.as_fd(),
            End::Listening(listener, _) => listener.as_fd(),
        }
    }

    /// Takes the guest's connection, if there is one, and tells it what waited.
    fn connect(&mut self) {
        let End::Listening(listener, waiting) = &mut self.end else {
            return;
        };
        let Ok((mut socket, _)) = listener.accept() else {
            return;
        };
        // Shut down, not only dropped: whoever started us left a copy of the descriptor.
        let told = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both)
            .map_err(std::io::Error::from)
            .and_then(|()| socket.set_nonblocking(false))
            .and_then(|()| socket.set_write_timeout(Some(AGENT_WRITE_MAX)))
            .and_then(|()| socket.write_all(waiting));
        self.open = told.is_ok();
        self.end = End::Connected(socket);
    }

    fn take_in(&mut self, mut bytes: &[u8]) {
        while let Some(at) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = bytes.split_at(at);
            bytes = &rest[1..];
            if self.buf.len() + line.len() > CHANNEL_MESSAGE_MAX_BYTES {
                self.buf.clear();
                self.messages.push_back(Err(Error::TooLong));
                continue;
            }
            self.buf.extend_from_slice(line);
            self.messages.push_back(parse(&self.buf));
            self.buf.clear();
        }
        // One byte above the bound marks the line as too long, however long it becomes.
        let room = (CHANNEL_MESSAGE_MAX_BYTES + 1).saturating_sub(self.buf.len());
        self.buf.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if self.buf.len() > CHANNEL_MESSAGE_MAX_BYTES && room > 0 {
            self.messages.push_back(Err(Error::TooLong));
        }
    }
}

/// Parses one line of the guest's, without its end.
///
/// # Errors
/// [`Error::TooLong`], [`Error::Malformed`].
pub fn parse(line: &[u8]) -> Result<FromGuest, Error> {
    if line.len() > CHANNEL_MESSAGE_MAX_BYTES {
        return Err(Error::TooLong);
    }
    serde_json::from_slice(line).map_err(|e| Error::Malformed(crate::log::clean(&e.to_string())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn channel() -> (Channel, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        (Channel::new(ours).unwrap(), guest)
    }

    fn all(c: &mut Channel) -> Vec<Result<FromGuest, Error>> {
        std::iter::from_fn(|| c.message()).collect()
    }

    #[test]
    fn lines_come_whole_however_they_are_cut() {
        let (mut c, mut guest) = channel();
        for b in b"{\"type\":\"rehearsed\"}\n{\"type\":\"down\"}\n" {
            guest.write_all(&[*b]).unwrap();
            c.fill();
        }
        assert_eq!(all(&mut c), [Ok(FromGuest::Rehearsed), Ok(FromGuest::Down)]);
    }

    #[test]
    fn an_endless_line_is_one_error_and_little_memory() {
        let (mut c, mut guest) = channel();
        let t = std::thread::spawn(move || {
            let _ = guest.write_all(&vec![b'x'; AGENT_BUDGET_BYTES * 2]);
        });
        while c.listens() {
            c.fill();
        }
        assert!(c.buf.len() <= CHANNEL_MESSAGE_MAX_BYTES + 1);
        let got = all(&mut c);
        assert_eq!(got, [Err(Error::TooLong)]);
        drop(c);
        t.join().unwrap();
    }

    #[test]
    fn ours_is_bounded_too() {
        let (mut c, _guest) = channel();
        let attach = ToGuest::Attach(api::agent::Attach {
            time_unix_ns: 0,
            config: "x".repeat(CHANNEL_MESSAGE_MAX_BYTES),
            token_state: String::new(),
            ip: String::new(),
            prefix: 16,
            gateway: String::new(),
        });
        assert_eq!(c.send(&attach), Err(Error::TooLarge));
    }

    #[test]
    fn the_first_connection_is_the_channel_and_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let mut c = Channel::listen(UnixListener::bind(&path).unwrap()).unwrap();
        c.fill();
        assert!(c.listens());
        c.send(&ToGuest::Rehearse).unwrap();
        let mut guest = UnixStream::connect(&path).unwrap();
        guest.write_all(b"{\"type\":\"rehearsed\"}\n").unwrap();
        c.fill();
        assert_eq!(all(&mut c), [Ok(FromGuest::Rehearsed)]);
        c.send(&ToGuest::Shutdown).unwrap();
        let mut told = std::io::BufRead::lines(std::io::BufReader::new(guest));
        for message in [ToGuest::Rehearse, ToGuest::Shutdown] {
            let line = told.next().unwrap().unwrap();
            assert_eq!(serde_json::from_str::<ToGuest>(&line).unwrap(), message);
        }
        assert!(
            UnixStream::connect(&path).is_err(),
            "somebody still listens"
        );
    }

    #[test]
    fn what_waits_for_a_guest_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent")).unwrap();
        let mut c = Channel::listen(listener).unwrap();
        let sent = (0..CHANNEL_MESSAGE_MAX_BYTES)
            .take_while(|_| c.send(&ToGuest::Shutdown).is_ok())
            .count();
        assert!(sent > 1 && sent < CHANNEL_MESSAGE_MAX_BYTES, "{sent}");
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = parse(&line);
        }

        #[test]
        fn no_stream_panics(chunks in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let (mut c, mut guest) = channel();
            for chunk in &chunks {
                guest.write_all(chunk).unwrap();
                c.fill();
            }
            let lines = chunks.concat().iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(all(&mut c).len(), lines);
        }
    }
}
