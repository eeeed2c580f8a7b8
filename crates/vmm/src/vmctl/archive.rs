//! An archive on its way: the guest says the bytes of a tar, and they go to the one file that warden
//! handed over, which can be written and not read; or the guest asks for them, and they come from such
//! a file, which can be read and not written.
//!
//! What the guest says is hostile: pieces are bounded, and so is their sum; a message of another
//! archive is passed over. What is in them is the workspace's, and is neither looked at nor logged.

use super::{State, Vm, agent_error, unix_ns};
use crate::limits::ARCHIVE_WAIT_MAX_MS;
use crate::{Vmm, log};
use api::agent::{ARCHIVE_CHUNK_BYTES, FromGuest, ToGuest};
use api::vmctl::Archived;
use api::{Error, ErrorCode};
use base64::Engine as _;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Which way an archive goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the guest, at most so many bytes.
    Make(u64),
    /// To the guest.
    PutBack,
}

/// The archive that is under way.
pub(super) struct Archive {
    /// Tells its messages from those of one before.
    pub(super) number: u64,
    file: OwnedFd,
    bytes: u64,
    way: Way,
}

impl Archive {
    pub(super) fn new(number: u64, file: OwnedFd, way: Way) -> Self {
        Self {
            number,
            file,
            bytes: 0,
            way,
        }
    }

    /// The next piece of the file, as the guest is told it; none: that was all.
    ///
    /// # Errors
    /// [`ErrorCode::DiskTampered`] when it can't be read.
    pub(super) fn give(&mut self) -> Result<String, Error> {
        let mut piece = vec![0; ARCHIVE_CHUNK_BYTES];
        let mut got = 0;
        while got < piece.len() {
            match rustix::io::read(&self.file, &mut piece[got..]) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(unread(e)),
            }
        }
        self.bytes += got as u64;
        Ok(base64::engine::general_purpose::STANDARD.encode(&piece[..got]))
    }

    /// Writes the next piece.
    ///
    /// # Errors
    /// [`ErrorCode::BadGateway`] for what is no piece, [`ErrorCode::StorageFull`], the file's.
    pub(super) fn take(&mut self, data: &str) -> Result<(), Error> {
        let piece = base64::engine::general_purpose::STANDARD
            .decode(data)
            .ok()
            .filter(|piece| (1..=ARCHIVE_CHUNK_BYTES).contains(&piece.len()));
        let piece = piece.ok_or_else(|| {
            let why = "the workspace's guest sent what is no piece of an archive";
            Error::new(ErrorCode::BadGateway, why)
        })?;
        let bytes = self.bytes + piece.len() as u64;
        let Way::Make(max_bytes) = self.way else {
            let why = "the workspace's guest sent pieces of an archive that it was to take";
            return Err(Error::new(ErrorCode::BadGateway, why));
        };
        if bytes > max_bytes {
            let mib = max_bytes >> 20;
            let why = format!(
                "the archive is larger than the {mib} MiB that are left for it; delete another, or \
                 leave more out"
            );
            return Err(Error::new(ErrorCode::StorageFull, why));
        }
        let mut rest = &piece[..];
        while !rest.is_empty() {
            match rustix::io::write(&self.file, rest) {
                Ok(0) => return Err(unwritten(rustix::io::Errno::IO)),
                Ok(n) => rest = &rest[n..],
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(unwritten(e)),
            }
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Makes it durable; what came of it, with the guest's word for the numbers.
    ///
    /// # Errors
    /// The file's.
    pub(super) fn done(&self, entries: u64, skipped: u64) -> Result<Archived, Error> {
        if self.way != Way::PutBack {
            rustix::fs::fdatasync(&self.file).map_err(unwritten)?;
        }
        Ok(Archived {
            bytes: self.bytes,
            entries,
            skipped,
        })
    }

    /// The file: its process ends with its last descriptor.
    pub(super) fn into_file(self) -> OwnedFd {
        self.file
    }
}

fn unwritten(e: rustix::io::Errno) -> Error {
    let code = match e {
        rustix::io::Errno::NOSPC => ErrorCode::StorageFull,
        _ => ErrorCode::VmUnavailable,
    };
    Error::new(code, "the archive could not be written").detail(e)
}

fn unread(e: rustix::io::Errno) -> Error {
    let why = "the archive can't be read: it was changed while it was at rest";
    Error::new(ErrorCode::DiskTampered, why).detail(e)
}

impl<V: Vmm, T> Vm<V, T> {
    /// Begins one; `told` is what the guest is told, but for its number.
    pub(super) fn archive(
        &mut self,
        reply: T,
        told: impl FnOnce(u64) -> ToGuest,
        way: Way,
        wait_ms: u64,
        now: Instant,
    ) {
        let refused = if self.state != State::Running {
            Some(self.conflict("only a running workspace can be archived"))
        } else if wait_ms == 0 || wait_ms > ARCHIVE_WAIT_MAX_MS {
            let why = format!("wait_ms must be 1 to {ARCHIVE_WAIT_MAX_MS}");
            Some(Error::new(ErrorCode::ValidationError, why))
        } else if self.memory.is_none() {
            Some(self.conflict("no file waits for an archive"))
        } else {
            None
        };
        // Of what a guest before a sleep still had to say, nothing is taken for this one.
        let number = unix_ns().max(self.archives + 1);
        let told = told(number);
        let told = refused.map_or_else(|| self.agent.send(&told).map_err(|e| agent_error(&e)), Err);
        match (told, self.memory.take()) {
            (Ok(()), Some(file)) => {
                self.archives = number;
                self.archive = Some(Archive::new(number, file, way));
                self.wait(reply, now, Duration::from_millis(wait_ms));
            }
            (told, file) => {
                self.memory = file;
                let why = told.err().unwrap_or_else(|| self.conflict("no file"));
                self.answers.push((reply, Err(why)));
            }
        }
    }

    /// What the guest says of the archive that is under way; all else is passed over.
    pub(super) fn on_archive(&mut self, message: &FromGuest) {
        let Some(archive) = &mut self.archive else {
            return;
        };
        match message {
            FromGuest::ArchiveData { number, data } if *number == archive.number => {
                match archive.take(data) {
                    // It was taken in, and its sum is bounded: the guest may say the next.
                    Ok(()) => self.agent.renew(),
                    Err(e) => self.archive_end(Err(e)),
                }
            }
            FromGuest::ArchiveNext { number } if *number == archive.number => {
                let given = match archive.way {
                    Way::PutBack => archive.give(),
                    Way::Make(_) => return,
                };
                let number = *number;
                let told = given.and_then(|data| {
                    let next = ToGuest::ArchiveData { number, data };
                    self.agent.send(&next).map_err(|e| agent_error(&e))
                });
                if let Err(e) = told {
                    self.archive_end(Err(e));
                }
            }
            FromGuest::ArchiveDone {
                number,
                entries,
                skipped,
            } if *number == archive.number => {
                let done = archive.done(*entries, *skipped);
                self.archive_end(done.map(|done| json!(done)));
            }
            FromGuest::ArchiveFailed {
                number,
                path,
                full,
                message,
            } if *number == archive.number => {
                let (code, why) = match (path, full, archive.way) {
                    (Some(n), _, Way::Make(_)) => {
                        let why = "there is no such path on the workspace's disk";
                        (ErrorCode::ValidationError, format!("vm_paths[{n}]: {why}"))
                    }
                    (_, true, Way::PutBack) => {
                        let why =
                            "the workspace's disk is full; a part of the archive was put back";
                        (ErrorCode::StorageFull, why.into())
                    }
                    (_, _, Way::Make(_)) => {
                        let why = "the workspace's guest could not archive its files";
                        (ErrorCode::BadGateway, why.into())
                    }
                    (_, _, Way::PutBack) => {
                        let why = "the workspace's guest could not put back all of the archive";
                        (ErrorCode::BadGateway, why.into())
                    }
                };
                self.archive_end(Err(Error::new(code, why).detail(log::clean(message))));
            }
            _ => {}
        }
    }

    /// Ends the archive; a guest that still says it is told to stop.
    pub(super) fn archive_end(&mut self, answer: Result<Value, Error>) {
        let Some(archive) = self.archive.take() else {
            return;
        };
        self.saved = Some(archive.into_file());
        if answer.is_err()
            && self.state == State::Running
            && let Err(e) = self.agent.send(&ToGuest::ArchiveStop)
        {
            let (e, what) = (e.to_string(), "the guest was not told to stop archiving");
            log::line("warn", self.slot, what, Some(&e));
        }
        self.answer(answer);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn base64(bytes: &[u8]) -> String {
        base64::engine::general_purpose::STANDARD.encode(bytes)
    }

    #[test]
    fn pieces_make_one_file_and_no_more_than_it_may_hold() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut archive = Archive::new(1, file.reopen().unwrap().into(), Way::Make(1 << 20));
        archive.take(&base64(b"one")).unwrap();
        for bad in ["", "!", &base64(&vec![0; ARCHIVE_CHUNK_BYTES + 1])] {
            assert_eq!(archive.take(bad).unwrap_err().code, ErrorCode::BadGateway);
        }
        archive.take(&base64(b"two")).unwrap();
        let said = archive.done(2, 1).unwrap();
        assert_eq!((said.bytes, said.entries, said.skipped), (6, 2, 1));
        assert_eq!(std::fs::read(file.path()).unwrap(), b"onetwo");
        let piece = base64(&vec![7; ARCHIVE_CHUNK_BYTES]);
        let refused = std::iter::repeat_with(|| archive.take(&piece)).find_map(Result::err);
        assert_eq!(refused.unwrap().code, ErrorCode::StorageFull);
        assert!(std::fs::metadata(file.path()).unwrap().len() <= 1 << 20);
    }

    #[test]
    fn a_file_that_is_read_only_is_no_archive() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut archive = Archive::new(1, file.into(), Way::Make(100));
        let refused = archive.take(&base64(b"x")).unwrap_err();
        assert_eq!(refused.code, ErrorCode::VmUnavailable);
        // And one that is write-only is none to put back.
        let file = std::fs::File::options().write(true).open("/dev/null");
        let mut archive = Archive::new(1, file.unwrap().into(), Way::PutBack);
        assert_eq!(archive.give().unwrap_err().code, ErrorCode::DiskTampered);
        assert_eq!(
            archive.take(&base64(b"x")).unwrap_err().code,
            ErrorCode::BadGateway
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,64}", max in 0u64..64) {
            let file = tempfile::tempfile().unwrap();
            let mut archive = Archive::new(1, file.into(), Way::Make(max));
            let _ = archive.take(&text);
            prop_assert!(archive.bytes <= max);
        }
    }
}
