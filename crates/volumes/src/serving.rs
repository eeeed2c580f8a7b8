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

use crate::limits::{
    ANCHOR_WAIT, ANCHORS_MAX, COPY_WAIT, DISK_CLOSE_WAIT, HELLO_WAIT, MKFS_WAIT, READY_WAIT,
};
use api::disk::{Anchored, FromDisk, ToDisk};
use api::kms::Anchor;
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;
use api::warden::Sealed;
use api::{Error, ErrorCode};
use jail::ask::Kind;
use jail::fault::{At, Result, log};
use jail::limits::{KILL_WAIT, MKFS_UID, VMM_UID};
use jail::process::{Handle, Launcher, Proc, Waiting, readable};
use jail::{channel, mount, open_beneath, small};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Gid, OFlags, Uid};
use rustix::process::PidfdGetfdFlags;
use std::path::Path;
use std::time::Duration;

/// Size of the file, bytes; state; note.
pub type Ready = (u64, Anchor, Option<String>);

/// A disk process that waits in its jail.
pub struct Spawned {
    waiting: Waiting,
    control: OwnedFd,
    mount: OwnedFd,
}

impl Spawned {
    /// Makes a mount that is attached nowhere, and a process of `slot` that is to serve it; it runs
    /// `exe` and joins the control groups of `doors`.
    ///
    /// # Errors
    /// The step that failed.
    pub fn new(launcher: &Launcher, slot: u16, exe: OwnedFd, doors: &[OwnedFd]) -> Result<Self> {
        let mount = mount::of(VMM_UID + u32::from(slot))?;
        let (control, theirs) = channel::pair().at("make a channel of slot", slot)?;
        let kept = control.try_clone().at("keep the channel of slot", slot)?;
        // Dropped here: the process alone holds the connection, so its death ends the mount.
        let given = [exe, kept, theirs, mount.server, mount.second];
        Ok(Self {
            waiting: launcher.spawn(Kind::Disk { slot }, doors, &given)?,
            control,
            mount: mount.mount,
        })
    }

    /// The process.
    #[must_use]
    pub fn proc(&self) -> Proc {
        self.waiting.handle.proc
    }

    /// Lets it run: the process, the ephemeral public key that it made, its mount.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn go(self) -> Result<(Disk, String, OwnedFd)> {
        let disk = Disk {
            handle: self.waiting.go()?,
            control: Some(self.control),
            file: None,
        };
        let hpke_pub = disk.hello()?;
        Ok((disk, hpke_pub, self.mount))
    }
}

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

    fn hello(&self) -> Result<String> {
        match self.receive(HELLO_WAIT)? {
            FromDisk::Hello { hpke_pub } => check_hex(&hpke_pub).map(|()| hpke_pub),
            _ => Err(out_of_turn()),
        }
    }

    /// Hands over the sealed grant, and that of what the disk is filled from; once the volume is
    /// open: the file's size, bytes, the volume's state, and the note of what it was filled from or
    /// of memory.
    ///
    /// # Errors
    /// The disk process's own.
    pub fn grant(&self, key: Sealed, format: bool, from: Option<Sealed>) -> Result<Ready> {
        let Sealed { sealed, aad } = key;
        let wait = from.as_ref().map_or(READY_WAIT, |_| COPY_WAIT);
        let grant = ToDisk::Grant {
            sealed,
            aad,
            format,
            from,
        };
        self.send(&grant, &[])?;
        match self.receive(wait)? {
            FromDisk::Ready {
                size_bytes,
                state,
                note,
            } => Ok((size_bytes, state, note)),
            _ => Err(out_of_turn()),
        }
    }

    /// Copies the disk to a new image.
    ///
    /// # Errors
    /// The disk process's own.
    pub fn copy(&self, key: Sealed, note: String, files: &[BorrowedFd<'_>]) -> Result {
        self.send(&ToDisk::Copy { key, note }, files)?;
        match self.receive(COPY_WAIT)? {
            FromDisk::Copied => Ok(()),
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
            check_hex(hex)?;
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
            FromDisk::Failed { code, message } => Err(Error::new(code, says(code)).detail(message)),
            said => Ok(said),
        }
    }

    fn channel(&self) -> Result<&OwnedFd> {
        let channel = self.control.as_ref();
        channel.ok_or_else(|| Error::internal("the disk process has no channel"))
    }
}

/// For the client: what happened, and what to do.
fn says(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::DiskTampered => {
            "the workspace's disk or saved memory was changed, exchanged or rolled back while it was \
             at rest, and is not opened; have the operator put the newest files back, or go back to \
             its snapshot"
        }
        _ => "the workspace's disk does not open",
    }
}

fn check_hex(text: &str) -> Result {
    let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == 64 && text.bytes().all(digit) {
        return Ok(());
    }
    Err(out_of_turn())
}

fn out_of_turn() -> Error {
    Error::internal("the disk process spoke out of turn")
}

/// Where in warden's state the empty file systems are that new volumes are filled from.
pub const EXT4: &str = "ext4";

/// Removes all of them: another version may have made them otherwise. Whoever has one open keeps it.
///
/// # Errors
/// The directory's.
pub fn ext4_forget(state: &Path) -> Result {
    let dir = state.join(EXT4);
    for entry in std::fs::read_dir(&dir).at("read", dir.display())?.flatten() {
        small::remove(&entry.path())?;
    }
    Ok(())
}

/// The one of `mb` MiB; made once per size.
///
/// # Errors
/// mkfs's step that failed.
pub fn ext4(launcher: &Launcher, state: &Path, mb: u32) -> Result<OwnedFd> {
    let (dir, name) = (&state.join(EXT4), format!("{mb}.img"));
    if let Ok(file) = open_beneath(dir, &name, OFlags::RDONLY, 0) {
        return Ok(file);
    }
    // A name of its own per thread: two starts may want the same size at once.
    let temp = format!("{mb}.{}.tmp", rustix::thread::gettid().as_raw_nonzero());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
    let file = open_beneath(dir, &temp, flags, 0o600).at("make", &temp)?;
    let uid = MKFS_UID;
    rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
        .at("own", &temp)?;
    rustix::fs::ftruncate(&file, u64::from(mb) << 20).at("size", &temp)?;
    let format = || {
        mkfs(
            launcher,
            open_beneath(dir, &temp, OFlags::PATH, 0).at("open", &temp)?,
        )?;
        rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT)).at("own", &temp)?;
        rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o444))
            .at("make read-only", &temp)?;
        rustix::fs::fsync(&file).at("sync", &temp)?;
        std::fs::rename(dir.join(&temp), dir.join(&name)).at("keep", &name)
    };
    if let Err(e) = format() {
        small::remove(&dir.join(&temp))?;
        return Err(e);
    }
    open_beneath(dir, &name, OFlags::RDONLY, 0).at("open", &name)
}

/// Makes an empty ext4 in `file`, in a jail.
fn mkfs(launcher: &Launcher, file: OwnedFd) -> Result {
    let mkfs = launcher.spawn(Kind::Mkfs, &[], &[file])?.go()?;
    if !readable(mkfs.pidfd(), MKFS_WAIT) {
        let _ = mkfs.kill(KILL_WAIT);
        return Err(Error::internal("mke2fs took too long"));
    }
    match mkfs.reap() {
        Some(0) => Ok(()),
        status => Err(Error::internal(format!(
            "mke2fs failed: {status:?} (install e2fsprogs 1.47 or later)"
        ))),
    }
}
