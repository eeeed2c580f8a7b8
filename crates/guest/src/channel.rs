//! The agent's virtio-serial port to vmctl: newline-delimited JSON both ways, bounded.
//!
//! Must never carry a secret or anything that a workspace's process printed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::agent::{FromGuest, PORT_NAME, ToGuest};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;

use crate::limits::{DEVICE_WAIT, FAILURE_MESSAGE_MAX_CHARS};

/// How often a port without a host on its other end is looked at.
const POLL: Duration = Duration::from_millis(5);

/// The sending half; clones share it.
#[derive(Clone)]
pub struct Sender(Arc<Mutex<File>>);

/// The receiving half.
pub struct Receiver {
    port: File,
    buffer: Vec<u8>,
    /// The rest of a line that is too long is being thrown away.
    skipping: bool,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A message.
    Message(Box<ToGuest>),
    /// A line that is none.
    Malformed,
}

/// Finds the port by its name and opens it, waiting for it to appear.
///
/// # Errors
/// If it does not appear in time or can't be opened.
pub fn open() -> io::Result<(Sender, Receiver)> {
    let deadline = Instant::now() + DEVICE_WAIT;
    let path = loop {
        match find(Path::new("/sys/class/virtio-ports")) {
            Some(path) if path.exists() => break path,
            _ if Instant::now() > deadline => {
                let what = format!("no virtio-serial port named {PORT_NAME}");
                return Err(io::Error::new(io::ErrorKind::NotFound, what));
            }
            _ => std::thread::sleep(POLL),
        }
    };
    let port = File::options().read(true).write(true).open(path)?;
    let sender = Sender(Arc::new(Mutex::new(port.try_clone()?)));
    Ok((sender, Receiver::new(port)))
}

fn find(class: &Path) -> Option<PathBuf> {
    for port in std::fs::read_dir(class).ok()?.flatten() {
        let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Some(Path::new("/dev").join(port.file_name()));
        }
    }
    None
}

impl Sender {
    /// Sends one message. Blocks while the host does not read.
    ///
    /// # Errors
    /// If the port is gone.
    pub fn send(&self, message: &FromGuest) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        port.write_all(&line)
    }

    /// Says that something failed. If not even that can be said, the host sees no answer and ends
    /// the machine.
    pub fn send_failed(&self, code: &str, message: &str) {
        let message = message.chars().take(FAILURE_MESSAGE_MAX_CHARS).collect();
        let code = code.to_owned();
        let _ = self.send(&FromGuest::Failed { code, message });
    }
}

impl Receiver {
    fn new(port: File) -> Self {
        Self {
            port,
            buffer: Vec::new(),
            skipping: false,
        }
    }

    /// Waits for the next line.
    ///
    /// # Errors
    /// If the port is gone.
    pub fn receive(&mut self) -> io::Result<Received> {
        loop {
            if let Some(received) = self.next_line() {
                return Ok(received);
            }
            let mut chunk = [0; 4096];
            match self.port.read(&mut chunk) {
                // Nobody is connected on the other side (yet, or any more).
                Ok(0) => std::thread::sleep(POLL),
                Ok(len) => self.buffer.extend_from_slice(&chunk[..len]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes one line out of the buffer, if there is one.
    fn next_line(&mut self) -> Option<Received> {
        let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
            if self.buffer.len() > CHANNEL_MESSAGE_MAX_BYTES {
                self.buffer.clear();
                self.skipping = true;
            }
            return None;
        };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        if std::mem::take(&mut self.skipping) || line.len() > CHANNEL_MESSAGE_MAX_BYTES {
            return Some(Received::Malformed);
        }
        Some(match serde_json::from_slice(&line) {
            Ok(message) => Received::Message(Box::new(message)),
            Err(_) => Received::Malformed,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn lines(parts: &[&[u8]]) -> Vec<Received> {
        let mut receiver = Receiver::new(File::open("/dev/null").unwrap());
        let mut out = Vec::new();
        for part in parts {
            receiver.buffer.extend_from_slice(part);
            while let Some(received) = receiver.next_line() {
                out.push(received);
            }
        }
        out
    }

    #[test]
    fn lines_are_put_together_and_bounded() {
        let rehearse = || Received::Message(Box::new(ToGuest::Rehearse));
        let text = b"{\"type\":\"rehearse\"}\n";
        assert_eq!(
            lines(&[&text[..5], &text[5..], text]),
            [rehearse(), rehearse()]
        );
        let long = vec![b'x'; CHANNEL_MESSAGE_MAX_BYTES + 1];
        assert_eq!(
            lines(&[&long, &long, b"\n", text]),
            [Received::Malformed, rehearse()]
        );
        assert_eq!(lines(&[b"{\"type\":\"shutdown\",\"x\":1}\n"]).len(), 1);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let newlines = bytes.iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(lines(&[&bytes]).len(), newlines);
        }
    }
}
