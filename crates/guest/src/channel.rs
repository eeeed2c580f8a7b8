//! The agent's channel to vmctl: newline-delimited JSON both ways, bounded. It is a virtio-serial
//! port, or, where the machine has a vsock instead, a connection that this side makes.
//!
//! ```text
//!            device found                    reset by a restore, or closed
//! open ──────────────────▶ connected ◀──connect again, paced──┐
//!                              └──────────────────────────────┘   (vsock only)
//! ```
//!
//! A restore resets every vsock connection, and another vmctl waits at the other end: what was half
//! read is dropped, and what is sent from then on goes by the new connection. A port stays.
//!
//! Must never carry a secret of ours or anything that a workspace's process printed (an archive that
//! was asked for goes over it), nor listen: whatever else runs in the guest could connect.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::agent::{FromGuest, PORT_NAME, ToGuest, VSOCK_PORT};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;

use crate::limits::{DEVICE_WAIT, FAILURE_MESSAGE_MAX_CHARS, RECONNECT_PAUSE_MAX};
use crate::sys;

/// How often a port without a host on its other end is looked at, and the first pause between two
/// attempts to connect.
const POLL: Duration = Duration::from_millis(5);
/// A vsock among the virtio devices (virtio 1.2, 5.10.1).
const VSOCK_DEVICE: u32 = 19;
/// Where the machine's virtio devices are.
pub(crate) const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";

/// The sending half; clones share it.
#[derive(Clone)]
pub struct Sender(Arc<Mutex<File>>);

/// The receiving half.
pub struct Receiver {
    from: File,
    /// Makes the connection again, and where it is to be known; a port needs none.
    again: Option<(Dial, Sender)>,
    buffer: Vec<u8>,
    /// The rest of a line that is too long is being thrown away.
    skipping: bool,
}

/// Makes a connection, within a bound of its own.
type Dial = Box<dyn FnMut() -> io::Result<File> + Send>;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A message.
    Message(Box<ToGuest>),
    /// A line that is none.
    Malformed,
}

/// Finds the port by its name, or a vsock, waiting for either to appear.
///
/// # Errors
/// If neither appears in time, the port can't be opened, or nobody is at the vsock's other end.
pub fn open() -> io::Result<(Sender, Receiver)> {
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        let port = port(Path::new("/sys/class/virtio-ports"));
        if let Some(path) = port.filter(|path| path.exists()) {
            let port = File::options().read(true).write(true).open(path)?;
            let sender = Sender(Arc::new(Mutex::new(port.try_clone()?)));
            return Ok((sender, Receiver::new(port, None)));
        }
        if vsock(Path::new(VIRTIO_DEVICES)) {
            return connected(Box::new(|| sys::vsock_connect(VSOCK_PORT)), deadline);
        }
        if Instant::now() > deadline {
            let what = format!("no virtio-serial port named {PORT_NAME}, and no vsock");
            return Err(io::Error::new(io::ErrorKind::NotFound, what));
        }
        std::thread::sleep(POLL);
    }
}

/// Whether a vsock is among these devices.
pub(crate) fn vsock(devices: &Path) -> bool {
    let Ok(devices) = std::fs::read_dir(devices) else {
        return false;
    };
    devices.flatten().any(|device| {
        let kind = std::fs::read_to_string(device.path().join("device")).unwrap_or_default();
        let kind = kind.trim_end().trim_start_matches("0x");
        u32::from_str_radix(kind, 16) == Ok(VSOCK_DEVICE)
    })
}

fn port(class: &Path) -> Option<PathBuf> {
    for port in std::fs::read_dir(class).ok()?.flatten() {
        let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            return Some(Path::new("/dev").join(port.file_name()));
        }
    }
    None
}

/// A channel over what `dial` makes, again and again.
fn connected(mut dial: Dial, deadline: Instant) -> io::Result<(Sender, Receiver)> {
    let socket = loop {
        match dial() {
            Ok(socket) => break socket,
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(POLL),
        }
    };
    let sender = Sender(Arc::new(Mutex::new(socket.try_clone()?)));
    let again = (dial, sender.clone());
    Ok((sender, Receiver::new(socket, Some(again))))
}

impl Sender {
    /// Sends one message. Blocks while the host does not read.
    ///
    /// # Errors
    /// If the port, or the connection, is gone.
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
    fn new(from: File, again: Option<(Dial, Sender)>) -> Self {
        Self {
            from,
            again,
            buffer: Vec::new(),
            skipping: false,
        }
    }

    /// Waits for the next line. A connection that ended is made again, without a bound but at a
    /// pace: a workspace goes on without vmctl, as it does over a port that nobody reads.
    ///
    /// # Errors
    /// If the port is gone.
    pub fn receive(&mut self) -> io::Result<Received> {
        loop {
            if let Some(received) = self.next_line() {
                return Ok(received);
            }
            let mut chunk = [0; 4096];
            match (self.from.read(&mut chunk), &self.again) {
                (Err(e), _) if e.kind() == io::ErrorKind::Interrupted => {}
                (Ok(0) | Err(_), Some(_)) => self.connect_again(),
                // Nobody is connected on the other side (yet, or any more).
                (Ok(0), None) => std::thread::sleep(POLL),
                (Ok(len), _) => self.buffer.extend_from_slice(&chunk[..len]),
                (Err(e), None) => return Err(e),
            }
        }
    }

    fn connect_again(&mut self) {
        (self.buffer, self.skipping) = (Vec::new(), false);
        let Some((dial, sender)) = &mut self.again else {
            return;
        };
        let mut pause = POLL;
        loop {
            let made = dial().and_then(|socket| Ok((socket.try_clone()?, socket)));
            if let Ok((to, from)) = made {
                *sender.0.lock().unwrap_or_else(PoisonError::into_inner) = to;
                self.from = from;
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
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
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    fn lines(parts: &[&[u8]]) -> Vec<Received> {
        let mut receiver = Receiver::new(File::open("/dev/null").unwrap(), None);
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

    /// A channel to the first listener's socket; the next connection goes to the next socket.
    fn dialled(far: Vec<UnixStream>) -> (Sender, Receiver) {
        let mut far = far.into_iter();
        let dial = move || {
            let refused = || io::Error::from(io::ErrorKind::ConnectionReset);
            far.next()
                .map(|socket| File::from(OwnedFd::from(socket)))
                .ok_or_else(refused)
        };
        connected(Box::new(dial), Instant::now()).unwrap()
    }

    #[test]
    fn a_reset_connection_is_made_again_and_both_halves_use_the_new_one() {
        let (first, first_far) = UnixStream::pair().unwrap();
        let (second, second_far) = UnixStream::pair().unwrap();
        let (sender, mut receiver) = dialled(vec![first_far, second_far]);
        sender.send(&FromGuest::Rehearsed).unwrap();
        let mut line = String::new();
        let mut first = BufReader::new(first);
        first.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"type\":\"rehearsed\"}\n");
        let rehearse = b"{\"type\":\"rehearse\"}\n";
        first.get_mut().write_all(rehearse).unwrap();
        // Half of a line, and the end: the other half comes from nobody.
        first.get_mut().write_all(&rehearse[..7]).unwrap();
        drop(first);
        (&second).write_all(rehearse).unwrap();
        for _ in 0..2 {
            let received = receiver.receive().unwrap();
            assert_eq!(received, Received::Message(Box::new(ToGuest::Rehearse)));
        }
        sender.clone().send(&FromGuest::Down).unwrap();
        line.clear();
        BufReader::new(second).read_line(&mut line).unwrap();
        assert_eq!(line, "{\"type\":\"down\"}\n");
    }

    /// A line that was too long for its bound takes nothing of the next connection with it.
    #[test]
    fn what_was_skipped_ends_with_its_connection() {
        let (first, first_far) = UnixStream::pair().unwrap();
        let (second, second_far) = UnixStream::pair().unwrap();
        let (_sender, mut receiver) = dialled(vec![first_far, second_far]);
        let flood = std::thread::spawn(move || {
            let long = vec![b'x'; CHANNEL_MESSAGE_MAX_BYTES * 3];
            (&first).write_all(&long).unwrap();
        });
        (&second).write_all(b"{\"type\":\"shutdown\"}\n").unwrap();
        let received = receiver.receive().unwrap();
        assert_eq!(received, Received::Message(Box::new(ToGuest::Shutdown)));
        flood.join().unwrap();
    }

    #[test]
    fn nobody_at_the_other_end_is_an_error_at_the_deadline() {
        let refused = || Err(io::ErrorKind::ConnectionReset.into());
        let opened = connected(Box::new(refused), Instant::now());
        assert_eq!(opened.err().unwrap().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_vsock_is_known_by_its_device_number() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!vsock(&dir.path().join("absent")));
        for (name, kind) in [
            ("virtio0", "0x0002\n"),
            ("virtio1", "junk"),
            ("virtio2", ""),
        ] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("device"), kind).unwrap();
        }
        assert!(!vsock(dir.path()));
        std::fs::write(dir.path().join("virtio1/device"), "0x0013\n").unwrap();
        assert!(vsock(dir.path()));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let newlines = bytes.iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(lines(&[&bytes]).len(), newlines);
        }
    }
}
