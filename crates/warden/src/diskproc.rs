//! One workspace's disk: its file, its mount, its process, and the word about it that the KMS
//! believes.
//!
//! ```text
//! with the VM:    fuse mount, attached nowhere ─▶ process ─hello─▶ its file opened once as the
//!                 VMM's uid ─▶ vmctl; mount closed
//! the workspace:  backing file (new: *.new) ─▶ process; attestation ─grant─▶ ready ─▶ *.new renamed
//! ```
//!
//! A volume that was being formatted when anything died is still `*.new`: it never held data and
//! is removed. Must never see a key: grants pass through sealed.

use crate::fault::{At, Result, conflict, log};
use crate::layout::{open_beneath, remove, sync_dir_of};
use crate::limits::{DISK_CLOSE_WAIT, HELLO_WAIT, READY_WAIT};
use api::disk::{FromDisk, ToDisk};
use api::limits::CHANNEL_MESSAGE_MAX_BYTES;
use api::{Error, ErrorCode};
use jail::channel;
use jail::limits::{KILL_WAIT, MKFS_UID};
use jail::process::{Handle, readable};
use model::WorkspaceId;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FlockOperation, Gid, OFlags, Uid};
use rustix::process::PidfdGetfdFlags;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A workspace's file of ciphertext.
#[derive(Debug)]
pub struct Backing {
    /// Open for reading and writing, locked; the lock is the open file's, so it holds as long as
    /// any process has it.
    pub file: OwnedFd,
    /// It has to be formatted.
    pub fresh: bool,
}

/// The directory of disks.
#[derive(Debug, Clone)]
pub struct Disks {
    dir: PathBuf,
}

impl Disks {
    /// The disks in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Opens, or begins, the workspace's file.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] while another process has it.
    pub fn open(&self, workspace: &WorkspaceId, uid: u32) -> Result<Backing> {
        let path = self.path(workspace);
        let (file, fresh) = match open_beneath(&self.dir, &name(workspace), OFlags::RDWR, 0) {
            Ok(file) => (file, false),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let flags = OFlags::RDWR | OFlags::CREATE;
                let file = open_beneath(&self.dir, &new_name(workspace), flags, 0o600);
                (file.at("make", path.display())?, true)
            }
            Err(e) => return Err(e).at("open", path.display()),
        };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| conflict("the workspace's disk is in use; stop it first"))?;
        if fresh {
            // What an interrupted format left is no volume.
            rustix::fs::ftruncate(&file, 0).at("empty", path.display())?;
        }
        rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
            .at("own", path.display())?;
        Ok(Backing { file, fresh })
    }

    /// Makes a formatted volume the workspace's disk, durably.
    ///
    /// # Errors
    /// The file's.
    pub fn keep(&self, workspace: &WorkspaceId, file: &OwnedFd) -> Result {
        let path = self.path(workspace);
        rustix::fs::fsync(file).at("sync", path.display())?;
        std::fs::rename(self.dir.join(new_name(workspace)), &path)
            .and_then(|()| sync_dir_of(&path))
            .at("keep", path.display())
    }

    /// Gives a closed disk back to root, with all that was written on the platter.
    ///
    /// # Errors
    /// The file's.
    pub fn rest(&self, workspace: &WorkspaceId) -> Result {
        match open_beneath(&self.dir, &name(workspace), OFlags::RDWR, 0) {
            Ok(file) => {
                rustix::fs::fdatasync(&file).at("sync the disk of", workspace)?;
                rustix::fs::fchown(&file, Some(Uid::ROOT), Some(Gid::ROOT))
                    .at("own the disk of", workspace)
            }
            Err(_) => Ok(()),
        }
    }

    /// Removes a volume that was never finished.
    ///
    /// # Errors
    /// The file's.
    pub fn forget_new(&self, workspace: &WorkspaceId) -> Result {
        remove(&self.dir.join(new_name(workspace)))
    }

    /// Removes every volume that was never finished.
    ///
    /// # Errors
    /// The directory's.
    pub fn sweep_new(&self) -> Result {
        for entry in std::fs::read_dir(&self.dir)
            .at("read", self.dir.display())?
            .flatten()
        {
            if entry.path().extension().is_some_and(|e| e == "new") {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the workspace's disk, durably. None is as good.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] while a process has it.
    pub fn erase(&self, workspace: &WorkspaceId) -> Result {
        let path = self.path(workspace);
        if let Ok(file) = open_beneath(&self.dir, &name(workspace), OFlags::RDWR, 0) {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|_| conflict("the workspace's disk is in use; stop it first"))?;
        }
        self.forget_new(workspace)?;
        remove(&path)?;
        sync_dir_of(&path).at("sync the directory of", path.display())
    }

    /// Bytes that the workspace's disk takes up.
    #[must_use]
    pub fn bytes(&self, workspace: &WorkspaceId) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::symlink_metadata(self.path(workspace)).map_or(0, |m| m.blocks() * 512)
    }

    fn path(&self, workspace: &WorkspaceId) -> PathBuf {
        self.dir.join(name(workspace))
    }
}

fn name(workspace: &WorkspaceId) -> String {
    format!("{workspace}.luks")
}

fn new_name(workspace: &WorkspaceId) -> String {
    format!("{workspace}.new")
}

/// A running disk process.
pub struct Disk {
    /// The process.
    pub handle: Handle,
    /// Its channel.
    pub control: Option<OwnedFd>,
    /// The backing file, from when there is a workspace.
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

    /// Ends it after its VMM. With `grace` it is asked to flush, or, adopted and without a channel,
    /// ends by itself as its mount has gone; it is killed if it has not in time. What it wrote is
    /// in the kernel's hands either way; [`Disks::rest`] brings it to the platter.
    pub fn end(&mut self, grace: bool) {
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
