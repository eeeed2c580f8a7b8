//! Images: memory at rest, and the disks of snapshots, as warden has them made, kept and opened.
//!
//! An image carries a note: of which VM it is, and beside which state of the disk. It is written
//! last, and encrypted and tagged with the rest, so that an image without one was never finished and
//! no image has another's.

use crate::serving::{Disk, Spawned};
use crate::{Client, How, Name};
use api::disk::{Content, ToDisk};
use api::kms::Anchor;
use api::warden::Sealed;
use api::{Error, ErrorCode};
use jail::fault::{At as _, Result};
use model::Purpose;
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What an image comes back with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    /// The VM that the memory is of; of a disk, none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Vm>,
    /// The state of the disk.
    pub disk: Anchor,
}

/// What memory needs to be woken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// Digest of the VMM's executable.
    pub vmm: String,
    /// Digest of its arguments.
    pub machine: String,
    /// The image.
    pub image: String,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
}

impl Note {
    fn text(&self) -> Result<String> {
        serde_json::to_string(self).map_err(Error::internal)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`ErrorCode::MemoryStale`] if it is not one of this version.
    pub fn read(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|_| stale("it has no note that this version reads"))
    }

    /// Whether the disk is the one that this is the memory beside: in that `state`, or, filled from
    /// a snapshot with the note `from`, made of that state.
    ///
    /// # Errors
    /// [`ErrorCode::MemoryStale`].
    pub fn check(&self, state: &Anchor, from: Option<&str>) -> Result {
        let from = from.map(Self::read).transpose()?;
        let is = from.as_ref().map_or(state, |note| &note.disk);
        if *is == self.disk {
            return Ok(());
        }
        Err(stale("the disk has changed since"))
    }
}

/// Memory that can't be woken.
#[must_use]
pub fn stale(why: &str) -> Error {
    let message = "the workspace's saved memory can't be woken; start it from its disk";
    Error::new(ErrorCode::MemoryStale, message).detail(why)
}

/// Memory at rest, and the process that serves it.
pub struct Image {
    /// The process.
    pub disk: Disk,
    of: Name,
    /// Until its file is opened.
    mount: Option<OwnedFd>,
    is_new: bool,
}

impl Image {
    /// Begins a new one of `new_mb` MiB, or opens the one that is there, in the process that was
    /// spawned; and the ephemeral public key that this made.
    ///
    /// # Errors
    /// The files'; the process's.
    pub fn open(
        client: &Mutex<Client>,
        spawned: Spawned,
        of: Name,
        new_mb: Option<u32>,
    ) -> Result<(Self, String)> {
        let (how, content) = match new_mb {
            Some(_) => (How::New, Content::Saving),
            None => (How::Read, Content::Saved),
        };
        let files = lock(client).open(of.clone(), how)?;
        if matches!(of.object, Purpose::Memory | Purpose::SnapshotMemory) {
            at_random(&files.volume)?;
        }
        let (mut disk, hpke_pub, mount) = spawned.go()?;
        let open = ToDisk::Open {
            content,
            size_mb: new_mb.unwrap_or(1),
            bytes_per_s: 1 << 40,
            ops_per_s: 100_000_000,
        };
        disk.send(&open, &[files.volume.as_fd(), files.sidecar.as_fd()])?;
        disk.file = Some(files.volume);
        let image = Self {
            disk,
            of,
            mount: Some(mount),
            is_new: new_mb.is_some(),
        };
        Ok((image, hpke_pub))
    }

    /// Whether it is there already, and is read.
    #[must_use]
    pub fn is_read(&self) -> bool {
        !self.is_new
    }

    /// Gives it its key, once: the mount whose file it is, and the note of one that was there.
    ///
    /// # Errors
    /// The process's.
    pub fn grant(&mut self, key: Sealed) -> Result<(OwnedFd, Option<Note>)> {
        let why = "no memory waits for its key";
        let mount = self.mount.take();
        let mount = mount.ok_or_else(|| Error::new(ErrorCode::Conflict, why))?;
        let (_, _, note) = self.disk.grant(key, self.is_new, None)?;
        let note = note.map(|text| Note::read(&text)).transpose()?;
        Ok((mount, note))
    }

    /// Makes what was saved the workspace's, durably.
    ///
    /// # Errors
    /// When not all of it is durable; the files'.
    pub fn keep(mut self, client: &Mutex<Client>, note: &Note) -> Result {
        let note = note.text()?;
        self.disk.send(&ToDisk::Note { note }, &[])?;
        // The answer to the next request says that this one was done.
        self.disk.anchor()?;
        let gone = || Error::internal("saved memory did not reach the disk");
        let file = self.disk.file.take().ok_or_else(gone)?;
        // It says how far its volume is only once all of it is durable.
        self.disk.end(true).ok_or_else(gone)?;
        lock(client).keep(self.of, &file)
    }
}

/// Has a running disk, whose VM stands still, copied to the image `of`; durably, in the place of the
/// one before.
///
/// # Errors
/// The process's; the files'.
pub fn copy(client: &Mutex<Client>, disk: &Disk, of: Name, key: Sealed) -> Result {
    let files = lock(client).open(of.clone(), How::New)?;
    let copied = disk.anchor().and_then(|said| {
        let (vm, state) = (None, said.statement.anchor);
        let note = Note { vm, disk: state }.text()?;
        disk.copy(key, note, &[files.volume.as_fd(), files.sidecar.as_fd()])
    });
    match copied {
        Ok(()) => lock(client).keep(of, &files.volume),
        Err(e) => lock(client).forget_new(of).and(Err(e)),
    }
}

fn lock(client: &Mutex<Client>) -> MutexGuard<'_, Client> {
    client.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guests touch their memory anywhere. Around each page that is asked for, the host's kernel would
/// read ahead as in a stream, and fill what are holes with zeros, while the guest waits. The
/// advice is the open file's: it holds in whichever process gets it.
fn at_random(volume: &OwnedFd) -> Result {
    fadvise(volume, 0, None, Advice::Random).at("advise on", "the volume")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::num::NonZeroU64;

    /// More than a folio of the page cache, however large.
    const HALF_BYTES: u64 = 8 << 20;

    /// What this thread had the kernel fetch from devices so far, bytes.
    fn fetched_bytes() -> u64 {
        let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        let line = io.lines().find_map(|l| l.strip_prefix("read_bytes: "));
        line.unwrap().parse().unwrap()
    }

    #[test]
    fn of_memory_only_what_is_asked_for_is_read() {
        // Beside the executable: where temporary files are may be memory.
        let exe = std::env::current_exe().unwrap();
        let fetched = |advised: bool| {
            let mut file = tempfile::tempfile_in(exe.parent().unwrap()).unwrap();
            std::io::Write::write_all(&mut file, &vec![7; 2 * HALF_BYTES as usize]).unwrap();
            file.sync_all().unwrap();
            // The first half stays in the cache, as of what was just saved.
            let rest = NonZeroU64::new(HALF_BYTES);
            fadvise(&file, HALF_BYTES, rest, Advice::DontNeed).unwrap();
            let file = OwnedFd::from(file);
            if advised {
                at_random(&file).unwrap();
            }
            let before = fetched_bytes();
            rustix::io::pread(&file, &mut [0; 4096], HALF_BYTES).unwrap();
            fetched_bytes() - before
        };
        assert!(
            fetched(false) > 4096,
            "it is kept from what nobody does here"
        );
        assert_eq!(fetched(true), 4096);
    }

    fn state(batch: u64) -> Anchor {
        let (run, root) = (1, "0a".repeat(32));
        Anchor { run, batch, root }
    }

    #[test]
    fn memory_goes_with_one_state_of_the_disk_or_a_copy_of_it() {
        let (vm, disk) = (None, state(5));
        let note = Note { vm, disk };
        note.check(&state(5), None).unwrap();
        let code = |checked: Result| checked.unwrap_err().code;
        assert_eq!(code(note.check(&state(6), None)), ErrorCode::MemoryStale);
        // Filled from a snapshot: what that is of counts, whatever the new disk's own state.
        let of = |batch| {
            let (vm, disk) = (None, state(batch));
            Note { vm, disk }.text().unwrap()
        };
        note.check(&state(0), Some(&of(5))).unwrap();
        for text in [of(4).as_str(), "{}", ""] {
            let checked = note.check(&state(5), Some(text));
            assert_eq!(code(checked), ErrorCode::MemoryStale, "{text}");
        }
    }
}
