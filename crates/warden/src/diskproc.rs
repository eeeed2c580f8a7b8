//! One workspace's disk: its mount, its process, and the word about it that the KMS believes.
//!
//! ```text
//! with the VM:    fuse mount, attached nowhere ─▶ process ─hello─▶ its file opened once as the
//!                 VMM's uid ─▶ vmctl; mount closed
//! the workspace:  files from casemate-volumes ─▶ process; attestation ─grant─▶ ready ─▶ kept, if new
//! ```
//!
//! A volume that was being formatted when anything died is not kept: it never held data and is
//! removed. Must never see a key: grants pass through sealed.

use crate::fault::{At, Result, log};
use crate::layout::{open_beneath, remove};
use crate::limits::{ANCHOR_WAIT, ANCHORS_MAX, DISK_CLOSE_WAIT, HELLO_WAIT, READY_WAIT};
use api::disk::{Anchored, FromDisk, ToDisk};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;
use api::{Error, ErrorCode};
use jail::channel;
use jail::limits::{KILL_WAIT, MKFS_UID};
use jail::process::{Handle, readable};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Gid, OFlags, Uid};
use rustix::process::PidfdGetfdFlags;
use std::path::Path;
use std::time::Duration;

/// A running disk process.
pub struct Disk {
    /// The process.
    pub handle: Handle,
    /// Its channel.
    pub control: Option<OwnedFd>,
    /// The volume's file, from when there is a workspace.
    pub file: Option<OwnedFd>,
}

impl Disk {
    /// One that an earlier warden started: its channel's other end is kept by the process itself.
    #[must_use]
    pub fn adopt(handle: Handle) -> Self {
        let flags = PidfdGetfdFlags::empty();
        // Without it the disk still ends by itself when its mount goes.
        let control = rustix::process::pidfd_getfd(handle.pidfd(), 0, flags).ok();
        Self {
            handle,
            control,
            file: None,
        }
    }

    /// Its ephemeral public key.
    ///
    /// # Errors
    /// When it says anything else, or nothing.
    pub fn hello(&self) -> Result<String> {
        match self.receive(HELLO_WAIT)? {
            FromDisk::Hello { hpke_pub } => {
                crate::layout::check_digest_id("hpke_pub", &hpke_pub).map(|()| hpke_pub)
            }
            _ => Err(out_of_turn()),
        }
    }

    /// Hands over the sealed grant; the size of the file, once the volume is open.
    ///
    /// # Errors
    /// The disk process's own.
    pub fn grant(&self, sealed: String, aad: String, format: bool) -> Result<u64> {
        let grant = ToDisk::Grant {
            sealed,
            aad,
            format,
        };
        self.send(&grant, &[])?;
        match self.receive(READY_WAIT)? {
            FromDisk::Ready { size_bytes } => Ok(size_bytes),
            _ => Err(out_of_turn()),
        }
    }

    /// How far the disk has got.
    ///
    /// # Errors
    /// When it says anything else, or nothing in time.
    pub fn anchor(&self) -> Result<Anchored> {
        self.send(&ToDisk::Anchor, &[])?;
        self.anchored(ANCHOR_WAIT)
    }

    fn anchored(&self, wait: Duration) -> Result<Anchored> {
        let FromDisk::Anchor(said) = self.receive(wait)? else {
            return Err(out_of_turn());
        };
        for hex in [&said.statement.anchor.root, &said.statement.mac] {
            crate::layout::check_digest_id("anchor", hex)?;
        }
        Ok(said)
    }

    /// Ends it after its VMM; what it said last of how far it got. With `grace` it is asked to flush, or, adopted and without a channel,
    /// ends by itself as its mount has gone; it is killed if it has not in time, which loses what
    /// its guest has not flushed.
    pub fn end(&mut self, grace: bool) -> Option<Anchored> {
        if self.control.is_some() {
            // It may have died.
            let _ = self.send(&ToDisk::Close, &[]);
        }
        let wait = if grace {
            DISK_CLOSE_WAIT
        } else {
            Duration::ZERO
        };
        if !self.handle.wait_gone(wait) && !self.handle.kill(KILL_WAIT) {
            let pid = self.handle.proc.pid;
            log("disk.stuck", serde_json::json!({"pid": pid}));
        }
        self.file = None;
        // In the channel, whether it was asked or its mount was gone first.
        let said = std::iter::from_fn(|| self.anchored(Duration::ZERO).ok());
        said.take(ANCHORS_MAX).last()
    }

    /// Sends a message, with descriptors.
    ///
    /// # Errors
    /// The channel's.
    pub fn send(&self, message: &ToDisk, fds: &[BorrowedFd<'_>]) -> Result {
        channel::send(self.channel()?, message, fds).at("speak to", "the disk process")
    }

    fn receive(&self, wait: Duration) -> Result<FromDisk> {
        let channel = self.channel()?.as_fd();
        if !readable(channel, wait) {
            let message = "the disk did not open in time; try again";
            return Err(Error::new(ErrorCode::Timeout, message));
        }
        let (bytes, _) =
            channel::recv(channel, CHANNEL_MESSAGE_MAX_BYTES).at("hear", "the disk process")?;
        if bytes.is_empty() {
            return Err(Error::internal("the disk process died"));
        }
        match serde_json::from_slice(&bytes).at("understand", "the disk process")? {
            FromDisk::Failed { code, message } => {
                Err(Error::new(code, "the workspace's disk does not open").detail(message))
            }
            said => Ok(said),
        }
    }

    fn channel(&self) -> Result<&OwnedFd> {
        let channel = self.control.as_ref();
        channel.ok_or_else(|| Error::internal("the disk process has no channel"))
    }
}

fn out_of_turn() -> Error {
    Error::internal("the disk process spoke out of turn")
}

/// The empty file system of `mb` MiB that new volumes are filled from, made once per size.
///
/// # Errors
/// mkfs's step that failed.
pub fn ext4_template(
    shipped: &Path,
    made: &Path,
    mb: u32,
    format: impl FnOnce(OwnedFd) -> Result,
) -> Result<OwnedFd> {
    let name = format!("{mb}.img");
    for dir in [shipped, made] {
        if let Ok(file) = open_beneath(dir, &name, OFlags::RDONLY, 0) {
            return Ok(file);
        }
    }
    // A name of its own per thread: two starts may want the same size at once.
    let temp = format!("{mb}.{}.tmp", rustix::thread::gettid().as_raw_nonzero());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
    let file = open_beneath(made, &temp, flags, 0o600).at("make", &temp)?;
    let uid = MKFS_UID;
    rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
        .at("own", &temp)?;
    rustix::fs::ftruncate(&file, u64::from(mb) << 20).at("size", &temp)?;
    let done =
        format(open_beneath(made, &temp, OFlags::PATH, 0).at("open", &temp)?).and_then(|()| {
            rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT)).at("own", &temp)?;
            rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o444))
                .at("make read-only", &temp)?;
            rustix::fs::fsync(&file).at("sync", &temp)?;
            std::fs::rename(made.join(&temp), made.join(&name)).at("keep", &name)
        });
    if done.is_err() {
        remove(&made.join(&temp))?;
    }
    done?;
    open_beneath(made, &name, OFlags::RDONLY, 0).at("open", &name)
}
