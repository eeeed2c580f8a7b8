//! A synchronous QMP client: one command at a time, each bounded in time, lines bounded in
//! length. A VMM that was taken over from inside may say anything here.

use crate::limits::{QMP_COMMAND_MAX, QMP_EVENTS_MAX, QMP_LINE_MAX_BYTES, QUIT_MAX};
use crate::{Error, Event};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use rustix::time::Timespec;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A greeted QMP connection.
pub struct Qmp {
    socket: UnixStream,
    buf: Vec<u8>,
    /// Where the search for the line's end goes on, so that it stays linear.
    scanned: usize,
    events: VecDeque<Event>,
    next_id: u64,
    gone: bool,
}

impl Qmp {
    /// Reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(socket: UnixStream) -> Result<Self, Error> {
        socket
            .set_write_timeout(Some(QMP_COMMAND_MAX))
            .map_err(|source| Error::Io {
                command: "greet",
                source,
            })?;
        let mut qmp = Self {
            socket,
            buf: Vec::new(),
            scanned: 0,
            events: VecDeque::new(),
            next_id: 1,
            gone: false,
        };
        let line = qmp.line("greet", Instant::now() + QMP_COMMAND_MAX, QMP_COMMAND_MAX)?;
        if !parse("greet", &line)?
            .get("QMP")
            .is_some_and(Value::is_object)
        {
            return Err(Error::Malformed {
                command: "greet",
                why: "no QMP greeting".into(),
            });
        }
        qmp.command("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Sends one command and waits for its answer; events on the way are kept.
    ///
    /// # Errors
    /// See [`Error`].
    pub(crate) fn command(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, Error> {
        let id = self.ask(&[(command, arguments)], None)?;
        self.answer(command, id)
    }

    /// Sends all `commands` at once, `fd` with the first, and waits for all answers: the VMM does
    /// them in order, a later one also after an earlier one failed.
    ///
    /// # Errors
    /// The first refusal; see [`Error`].
    pub(crate) fn commands(
        &mut self,
        commands: &[(&'static str, Value)],
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let first = self.ask(commands, Some(fd))?;
        let mut done = Ok(());
        for (id, (command, _)) in (first..).zip(commands) {
            match self.answer(command, id) {
                Ok(_) => {}
                // The other answers come all the same.
                Err(e @ Error::Refused { .. }) => done = done.and(Err(e)),
                Err(e) => return Err(e),
            }
        }
        done
    }

    /// Ends the VMM and waits until its socket closes.
    ///
    /// # Errors
    /// It did not close in time.
    pub(crate) fn quit(&mut self) -> Result<(), Error> {
        match self.command("quit", Value::Null) {
            Ok(_) | Err(Error::Gone { .. }) => {}
            Err(e) => return Err(e),
        }
        let deadline = Instant::now() + QUIT_MAX;
        loop {
            match self.line("quit", deadline, QUIT_MAX) {
                Err(Error::Gone { .. }) => return Ok(()),
                Err(e) => return Err(e),
                Ok(_) => {}
            }
        }
    }

    /// Takes in what is there and gives the next event.
    pub(crate) fn event(&mut self) -> Option<Event> {
        while !self.gone {
            let now = Instant::now();
            match self.line("event", now, Duration::ZERO) {
                Ok(line) => match parse("event", &line) {
                    Ok(v) => self.note_event(&v),
                    Err(_) => self.gone = true,
                },
                Err(Error::Timeout { .. }) => break,
                Err(_) => self.gone = true,
            }
        }
        self.events
            .pop_front()
            .or_else(|| self.gone.then_some(Event::Gone))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends `commands`; gives the first one's id, from which they count up.
    fn ask(
        &mut self,
        commands: &[(&'static str, Value)],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<u64, Error> {
        let command = commands.first().map_or("", |(name, _)| name);
        if self.gone {
            return Err(Error::Gone { command });
        }
        let first = self.next_id;
        let mut text = String::new();
        for (name, arguments) in commands {
            let mut request = json!({"execute": name, "id": self.next_id});
            if !arguments.is_null() {
                request["arguments"] = arguments.clone();
            }
            text.push_str(&request.to_string());
            text.push('\n');
            self.next_id += 1;
        }
        self.send(command, text.as_bytes(), fd)?;
        Ok(first)
    }

    /// Waits for the answer to the request `id`.
    fn answer(&mut self, command: &'static str, id: u64) -> Result<Value, Error> {
        let deadline = Instant::now() + QMP_COMMAND_MAX;
        loop {
            let line = self.line(command, deadline, QMP_COMMAND_MAX)?;
            let answer = parse(command, &line)?;
            if answer.get("event").is_some() {
                self.note_event(&answer);
                continue;
            }
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                return Err(Error::Malformed {
                    command,
                    why: "an answer to another request".into(),
                });
            }
            if let Some(e) = answer.get("error") {
                let why = e.get("desc").and_then(Value::as_str).unwrap_or("no reason");
                return Err(Error::Refused {
                    command,
                    why: crate::log::clean(why),
                });
            }
            return match answer {
                Value::Object(mut o) => o.remove("return").ok_or_else(|| Error::Malformed {
                    command,
                    why: "neither return nor error".into(),
                }),
                _ => Err(Error::Malformed {
                    command,
                    why: "not an object".into(),
                }),
            };
        }
    }

    fn send(
        &mut self,
        command: &'static str,
        mut bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let fds = fd.map(|fd| [fd]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            let fits = control.push(SendAncillaryMessage::ScmRights(fds));
            assert!(fits, "the buffer was made for one descriptor");
        }
        while !bytes.is_empty() {
            match sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            ) {
                Ok(n) => {
                    bytes = &bytes[n..];
                    control.clear();
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    self.gone = true;
                    return Err(Error::Gone { command });
                }
                Err(rustix::io::Errno::AGAIN) => {
                    return Err(Error::Timeout {
                        command,
                        after: QMP_COMMAND_MAX,
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

    /// The next line; waits until `deadline`, which is `after` from the wait's start.
    fn line(
        &mut self,
        command: &'static str,
        deadline: Instant,
        after: Duration,
    ) -> Result<Vec<u8>, Error> {
        loop {
            if let Some(at) = self.buf[self.scanned..].iter().position(|b| *b == b'\n') {
                let end = self.scanned + at;
                let rest = self.buf.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buf, rest);
                line.truncate(end);
                self.scanned = 0;
                return Ok(line);
            }
            self.scanned = self.buf.len();
            if self.buf.len() > QMP_LINE_MAX_BYTES {
                self.gone = true;
                return Err(Error::Malformed {
                    command,
                    why: "a line above 1 MiB".into(),
                });
            }
            if !readable(&self.socket, deadline).map_err(|source| Error::Io { command, source })? {
                return Err(Error::Timeout { command, after });
            }
            let mut chunk = [0u8; 16 << 10];
            match recv(&self.socket, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => {
                    self.gone = true;
                    return Err(Error::Gone { command });
                }
                Ok((n, _)) => self.buf.extend_from_slice(&chunk[..n]),
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

    fn note_event(&mut self, v: &Value) {
        let event = match v.get("event").and_then(Value::as_str) {
            Some("SHUTDOWN") => match v.pointer("/data/reason").and_then(Value::as_str) {
                Some("guest-reset") => Event::Reset,
                Some("guest-panic") => Event::Panic,
                _ => Event::Shutdown,
            },
            Some("GUEST_PANICKED") => Event::Panic,
            Some("BLOCK_IO_ERROR") => Event::DiskError,
            _ => return,
        };
        // A disk that fails all the time is one event.
        if event == Event::DiskError && self.events.back() == Some(&event) {
            return;
        }
        if self.events.len() == QMP_EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

fn parse(command: &'static str, line: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(line).map_err(|e| Error::Malformed {
        command,
        why: e.to_string(),
    })
}

/// Waits until `socket` can be read; false at the deadline. A passed deadline still looks once.
pub(crate) fn readable(socket: &impl AsFd, deadline: Instant) -> std::io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// A bounded duration for the kernel.
pub(crate) fn timespec(d: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(d.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{BufRead, BufReader, Write};

    /// A VMM double that greets and then answers each command with the next of `answers`.
    fn double(answers: Vec<Vec<u8>>) -> (UnixStream, std::thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let t = std::thread::spawn(move || {
            let mut w = theirs.try_clone().unwrap();
            let mut r = BufReader::new(theirs);
            w.write_all(b"{\"QMP\": {\"version\": {}}}\n").unwrap();
            let mut seen = Vec::new();
            let mut line = String::new();
            r.read_line(&mut line).unwrap();
            w.write_all(b"{\"return\": {}, \"id\": 1}\n").unwrap();
            for a in answers {
                line.clear();
                if r.read_line(&mut line).unwrap_or(0) == 0 {
                    break;
                }
                seen.push(line.clone());
                if w.write_all(&a).is_err() {
                    break;
                }
            }
            seen
        });
        (ours, t)
    }

    #[test]
    fn events_between_are_kept() {
        let (s, t) = double(vec![
            b"{\"event\": \"STOP\"}\n{\"event\":\"SHUTDOWN\",\"data\":{\"reason\":\"guest-reset\"}}\n{\"return\": {\"x\": 1}, \"id\": 2}\n"
                .to_vec(),
        ]);
        let mut q = Qmp::new(s).unwrap();
        assert_eq!(q.command("stop", Value::Null).unwrap(), json!({"x": 1}));
        assert_eq!(q.event(), Some(Event::Reset));
        t.join().unwrap();
        assert_eq!(q.event(), Some(Event::Gone));
    }

    #[test]
    fn a_refusal_is_typed() {
        let (s, t) = double(vec![
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u0007pe\"}, \"id\": 2}\n"
                .to_vec(),
        ]);
        let mut q = Qmp::new(s).unwrap();
        let e = q.command("cont", Value::Null).unwrap_err();
        assert!(
            matches!(e, Error::Refused { command: "cont", ref why } if why == "no pe"),
            "{e}"
        );
        t.join().unwrap();
    }

    #[test]
    fn commands_go_out_at_once_and_the_first_refusal_counts() {
        let refusal = |id, why| {
            format!("{{\"error\": {{\"desc\": \"{why}\"}}, \"id\": {id}}}\n").into_bytes()
        };
        let good = b"{\"return\": {}, \"id\": 4}\n{\"return\": {}, \"id\": 5}\n".to_vec();
        // All answers wait until the last command came: one by one this would not end.
        let answers = [refusal(2, "a"), refusal(3, "b"), good].concat();
        let (s, t) = double(vec![vec![], vec![], answers]);
        let mut q = Qmp::new(s).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let commands = ["add-fd", "x", "y"].map(|name| (name, Value::Null));
        let e = q.commands(&commands, null.as_fd()).unwrap_err();
        assert!(
            matches!(e, Error::Refused { command: "add-fd", ref why } if why == "a"),
            "{e}"
        );
        t.join().unwrap();
        assert_eq!(q.answer("later", 5).unwrap(), json!({}));
    }

    #[test]
    fn garbage_is_malformed_and_never_a_panic() {
        for bad in [
            &b"\xff\xfe\n"[..],
            b"[]\n",
            b"{}\n",
            b"{\"return\":{},\"id\":77}\n",
            b"\n",
            b"{\"id\":2}\n",
        ] {
            let (s, t) = double(vec![bad.to_vec()]);
            let mut q = Qmp::new(s).unwrap();
            let e = q.command("cont", Value::Null).unwrap_err();
            assert!(matches!(e, Error::Malformed { .. }), "{bad:?}: {e}");
            t.join().unwrap();
        }
    }

    #[test]
    fn an_endless_line_is_cut() {
        let (s, t) = double(vec![vec![b'x'; QMP_LINE_MAX_BYTES + (64 << 10)]]);
        let mut q = Qmp::new(s).unwrap();
        let e = q.command("cont", Value::Null).unwrap_err();
        assert!(matches!(e, Error::Malformed { .. }), "{e}");
        drop(q);
        t.join().unwrap();
    }

    #[test]
    fn a_closed_socket_is_gone() {
        let (s, t) = double(vec![]);
        let mut q = Qmp::new(s).unwrap();
        t.join().unwrap();
        assert!(matches!(
            q.command("cont", Value::Null),
            Err(Error::Gone { .. })
        ));
        assert!(q.quit().is_ok());
    }
}
