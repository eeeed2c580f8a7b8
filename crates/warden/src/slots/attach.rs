//! The disk of a slot: from a VM that waits for one to a volume that its guest has.

use super::{Slot, Warden, check_range, disk_group, lock};
use crate::diskproc::{self, Backing, Disk};
use crate::fault::{At, Result, conflict, invalid, missing};
use crate::journal::{Record, Step};
use crate::layout::check_digest_id;
use crate::limits::{DISK_UID, KILL_WAIT, MKFS_WAIT, SEALED_MAX_BYTES, VMM_UID};
use crate::process::Waiting;
use crate::{plans, process, vm};
use api::Error;
use api::disk::ToDisk;
use api::vmctl::WardenOp;
use api::warden::{DiskOpened, Start};
use model::limits as bounds;
use model::{Purpose, StartId, WorkspaceId};
use rustix::fd::{AsFd, OwnedFd};

/// The fields of [`Op::DiskOpen`].
pub(super) struct DiskAsk {
    pub(super) workspace: WorkspaceId,
    pub(super) start_id: StartId,
    pub(super) purpose: Purpose,
    pub(super) nonce: String,
    pub(super) disk_mb: u32,
    pub(super) bytes_per_s: u64,
    pub(super) ops_per_s: u64,
}

/// A disk process that waits in its jail.
pub(super) struct Spawned {
    waiting: Waiting,
    control: OwnedFd,
    mount: OwnedFd,
}

impl Warden {
    pub(super) fn disk_open(&self, slot: u16, ask: DiskAsk) -> Result<DiskOpened> {
        check_range("disk_mb", ask.disk_mb, &bounds::DISK_MB)?;
        check_digest_id("nonce", &ask.nonce)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = held
            .as_mut()
            .ok_or_else(|| missing(format!("slot {slot} is empty")))?;
        if s.record.step != Step::Open || s.record.dead || s.record.how == Start::Build {
            return Err(conflict(format!(
                "slot {slot} holds no VM that waits for a disk"
            )));
        }
        if !lock(&self.in_use).insert(ask.workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        s.record.workspace = Some(ask.workspace.clone());
        s.record.start_id = Some(ask.start_id.clone());
        let opened = self.disk_open_steps(s, ask);
        if opened.is_err() {
            self.fail(s);
        }
        opened
    }

    /// What of a slot's disk needs no workspace: its group, its mount, its process.
    pub(super) fn disk_spawn(&self, record: &mut Record) -> Result<Spawned> {
        let slot = record.slot;
        let exe = plans::executable(&self.config.programs, "casemate-disk")?;
        record.measurement = Some(self.digests.of(&exe, "casemate-disk")?);
        let group = disk_group(slot);
        self.cgroups.create(&group, plans::disk_bounds())?;
        let mount = diskproc::mount(VMM_UID + u32::from(slot))?;
        let (control, theirs) = seqpacket()?;
        let channel = control.try_clone().at("keep the channel of slot", slot)?;
        let jail = plans::disk(
            &self.config.layout,
            slot,
            exe,
            channel,
            vec![theirs, mount.server, mount.second],
            self.cgroups.dirs(&group),
        )?;
        let waiting = process::spawn(&self.config.launcher, "the disk", &jail.plan, &jail.fds())?;
        record.disk = Some(waiting.handle.proc);
        // From here on the process alone holds the connection: its death ends the mount.
        Ok(Spawned {
            waiting,
            control,
            mount: mount.mount,
        })
    }

    /// Lets the disk process run, and opens the file that it serves, once, as the VMM's user; then
    /// no path to it is left. vmctl keeps it for the attach.
    pub(super) fn disk_serve(&self, record: &mut Record, spawned: Spawned) -> Result<Disk> {
        let slot = record.slot;
        let disk = Disk {
            handle: spawned.waiting.go("the disk")?,
            control: Some(spawned.control),
            file: None,
        };
        record.hpke_pub = Some(disk.hello()?);
        let plan = plans::mount_opener(&self.config.layout, slot);
        let (launcher, mount) = (&self.config.launcher, spawned.mount.as_fd());
        let file = process::open_mount(launcher, "the disk's file", &plan, mount)?;
        vm::tell(&self.config.layout, slot, WardenOp::DiskFd, &[file.as_fd()])?;
        Ok(disk)
    }

    fn disk_open_steps(&self, s: &mut Slot, ask: DiskAsk) -> Result<DiskOpened> {
        let slot = s.record.slot;
        self.step(&mut s.record, Step::DiskBegin)?;
        let Backing { file, fresh } = self
            .disks
            .open(&ask.workspace, DISK_UID + u32::from(slot))?;
        s.record.fresh = fresh;
        let template = fresh.then(|| self.ext4(ask.disk_mb)).transpose()?;
        let open = ToDisk::Open {
            size_mb: ask.disk_mb,
            bytes_per_s: ask.bytes_per_s,
            ops_per_s: ask.ops_per_s,
        };
        let disk = s.disk.as_mut().ok_or_else(gone)?;
        let files = [Some(file.as_fd()), template.as_ref().map(AsFd::as_fd)];
        disk.send(&open, &files.into_iter().flatten().collect::<Vec<_>>())?;
        disk.file = Some(file);
        self.step(&mut s.record, Step::DiskWaits)?;
        let attestation = self.machine.attest(
            &ask.workspace,
            &ask.start_id,
            ask.purpose,
            ask.nonce,
            s.record.hpke_pub.clone().ok_or_else(gone)?,
            s.record.measurement.clone().ok_or_else(gone)?,
        )?;
        Ok(DiskOpened { attestation, fresh })
    }

    pub(super) fn disk_grant(&self, slot: u16, sealed: String, aad: String) -> Result<bool> {
        if sealed.len() > SEALED_MAX_BYTES {
            return Err(invalid("sealed must be at most 16 KiB"));
        }
        check_digest_id("aad", &aad)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = held
            .as_mut()
            .ok_or_else(|| missing(format!("slot {slot} is empty")))?;
        if s.record.step != Step::DiskWaits || s.record.dead {
            return Err(conflict(format!(
                "slot {slot} has no disk that waits for its key"
            )));
        }
        let granted = self.disk_grant_steps(s, sealed, aad);
        if granted.is_err() {
            self.fail(s);
        }
        granted.map(|()| true)
    }

    fn disk_grant_steps(&self, s: &mut Slot, sealed: String, aad: String) -> Result {
        let slot = s.record.slot;
        self.step(&mut s.record, Step::DiskGrant)?;
        let disk = s.disk.as_mut().ok_or_else(gone)?;
        let size_bytes = disk.grant(sealed, aad, s.record.fresh)?;
        if let (true, Some(workspace), Some(file)) =
            (s.record.fresh, &s.record.workspace, &disk.file)
        {
            self.disks.keep(workspace, file)?;
            s.record.fresh = false;
        }
        self.step(&mut s.record, Step::DiskReady)?;
        let ready = WardenOp::DiskReady { size_bytes };
        vm::tell(&self.config.layout, slot, ready, &[])?;
        self.step(&mut s.record, Step::DiskAttached)
    }

    pub(super) fn disk_erase(&self, workspace: &WorkspaceId) -> Result<bool> {
        let mut in_use = lock(&self.in_use);
        if !in_use.insert(workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        drop(in_use);
        let erased = self.disks.erase(workspace);
        lock(&self.in_use).remove(workspace);
        erased.map(|()| true)
    }

    /// The empty file system that a new volume of that size is filled from.
    fn ext4(&self, mb: u32) -> Result<OwnedFd> {
        let layout = &self.config.layout;
        let (shipped, made) = (layout.artifacts().join("ext4"), layout.state().join("ext4"));
        diskproc::ext4_template(&shipped, &made, mb, |file| self.mkfs(file))
    }

    /// Makes an empty ext4 in `file`, in a jail.
    fn mkfs(&self, file: OwnedFd) -> Result {
        let jail = plans::mkfs(&self.config.layout, file)?;
        let mkfs = process::spawn(&self.config.launcher, "mke2fs", &jail.plan, &jail.fds())?
            .go("mke2fs")?;
        if !process::readable(mkfs.pidfd(), MKFS_WAIT) {
            let _ = mkfs.kill(KILL_WAIT);
            return Err(Error::internal("mke2fs took too long"));
        }
        match mkfs.reap() {
            Some(0) => Ok(()),
            status => Err(Error::internal(format!(
                "mke2fs failed: {status:?} (install e2fsprogs)"
            ))),
        }
    }
}

fn gone() -> Error {
    Error::internal("the disk process is gone")
}

fn seqpacket() -> Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .at("make", "a channel")
}
