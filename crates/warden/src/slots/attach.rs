//! The disk of a slot: from a VM that waits for one to a volume that its guest has.

use super::{Slot, Warden, check_range, disk_group, lock, occupied};
use crate::diskproc::{self, Disk};
use crate::fault::{At, Result, conflict, invalid};
use crate::journal::{Record, Step};
use crate::layout::{check_digest_id, remove};
use crate::limits::{MKFS_WAIT, SEALED_MAX_BYTES};
use crate::vm;
use api::disk::{Anchored, ToDisk};
use api::vmctl::WardenOp;
use api::warden::{DiskOpened, Start};
use api::{Error, ErrorCode};
use jail::ask::Kind;
use jail::limits::{KILL_WAIT, VMM_UID};
use jail::process::{self, Handle, Waiting};
use jail::{channel, mount, plan};
use model::limits as bounds;
use model::{Purpose, StartId, WorkspaceId};
use rustix::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use vmm::driver::Driver;
use volumes::{How, Name};

/// A disk process that waits in its jail.
pub(super) struct Spawned {
    waiting: Waiting,
    control: OwnedFd,
    mount: OwnedFd,
}

impl Warden {
    pub(super) fn disk_open(
        &self,
        slot: u16,
        (workspace, start_id): (WorkspaceId, StartId),
        (purpose, nonce): (Purpose, String),
        volume: (u32, u64, u64),
        pids: u32,
    ) -> Result<DiskOpened> {
        check_range("disk_mb", volume.0, &bounds::DISK_MB)?;
        if pids != 0 {
            check_range("pids", pids, &bounds::PIDS)?;
        }
        check_digest_id("nonce", &nonce)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        if s.record.step != Step::Open || s.record.dead || s.record.how == Start::Build {
            let why = format!("slot {slot} holds no VM that waits for a disk");
            return Err(conflict(why));
        }
        if !lock(&self.in_use).insert(workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        s.record.workspace = Some(workspace.clone());
        s.record.start_id = Some(start_id.clone());
        let bound = self.vm_bound(&s.record, pids).map(drop);
        let bound = bound.and_then(|()| s.vmm.nproc(plan::vm_pids(s.record.cpus, pids)));
        let waits = bound.and_then(|()| self.disk_open_steps(s, &workspace, volume));
        let waits = waits.and_then(|()| {
            let hpke_pub = s.record.hpke_pub.clone().ok_or_else(gone)?;
            let runs = s.record.measurement.clone().ok_or_else(gone)?;
            self.machine
                .attest(&workspace, &start_id, purpose, nonce, hpke_pub, runs)
        });
        if waits.is_err() {
            self.fail(s);
        }
        Ok(DiskOpened {
            attestation: waits?,
            fresh: s.record.fresh,
            from: None,
        })
    }

    /// What of a slot's disk needs no workspace: its group, its mount, its process.
    pub(super) fn disk_spawn(&self, record: &mut Record) -> Result<Spawned> {
        let slot = record.slot;
        let exe = self.program("casemate-disk")?;
        record.measurement = Some(self.digests.of(&exe, "casemate-disk")?);
        let group = disk_group(slot);
        self.cgroups.create(&group, plan::disk_bounds())?;
        let doors = self.cgroups.doors(&group)?;
        let mount = mount::of(VMM_UID + u32::from(slot))?;
        let (control, theirs) = channel::pair().at("make a channel of slot", slot)?;
        let kept = control.try_clone().at("keep the channel of slot", slot)?;
        let given = [exe, kept, theirs, mount.server, mount.second];
        let waiting = self.launcher.spawn(Kind::Disk { slot }, &doors, &given)?;
        // From here on the process alone holds the connection: its death ends the mount.
        drop(given);
        record.disk = Some(waiting.handle.proc);
        Ok(Spawned {
            waiting,
            control,
            mount: mount.mount,
        })
    }

    /// Lets the disk process run, and gives the file that it serves to the VMM, which alone may open
    /// it, once: as a descriptor that vmctl keeps for the attach, or in its jail. No other path to it
    /// is left.
    pub(super) fn disk_serve(
        &self,
        record: &mut Record,
        vmm: &Handle,
        spawned: Spawned,
    ) -> Result<Disk> {
        let slot = record.slot;
        let disk = Disk {
            handle: spawned.waiting.go()?,
            control: Some(spawned.control),
            file: None,
        };
        record.hpke_pub = Some(disk.hello()?);
        let (given, file) = (self.launcher).give_mount(record.driver, slot, vmm, spawned.mount)?;
        let with: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        vm::tell(&self.config.layout, slot, given, &with)?;
        Ok(disk)
    }

    fn disk_open_steps(
        &self,
        s: &mut Slot,
        workspace: &WorkspaceId,
        (size_mb, bytes_per_s, ops_per_s): (u32, u64, u64),
    ) -> Result {
        self.step(&mut s.record, Step::DiskBegin)?;
        let files = lock(&self.volumes).open(Name::disk(workspace), How::Write)?;
        if files.fresh && self.disk_of_old(workspace).exists() {
            let why = "this disk was made by an earlier version and can't be checked; copy what it holds with that version, then delete the workspace";
            return Err(Error::new(ErrorCode::DiskCorrupt, why));
        }
        s.record.fresh = files.fresh;
        let template = files.fresh.then(|| self.ext4(size_mb)).transpose()?;
        if s.record.driver == Driver::Firecracker {
            // Prepared by now: it holds its tap, and opens its disk anew at the attach.
            self.launcher.settle(s.record.slot, &s.vmm)?;
            lock(&self.net).taken(s.record.slot)?;
        }
        let disk = s.disk.as_mut().ok_or_else(gone)?;
        let mut given = vec![files.volume.as_fd(), files.sidecar.as_fd()];
        given.extend(template.as_ref().map(AsFd::as_fd));
        let open = ToDisk::Open {
            size_mb,
            bytes_per_s,
            ops_per_s,
        };
        disk.send(&open, &given)?;
        disk.file = Some(files.volume);
        self.step(&mut s.record, Step::DiskWaits)
    }

    pub(super) fn disk_grant(&self, slot: u16, sealed: String, aad: String) -> Result<bool> {
        if sealed.len() > SEALED_MAX_BYTES {
            return Err(invalid("sealed must be at most 16 KiB"));
        }
        check_digest_id("aad", &aad)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        if s.record.step != Step::DiskWaits || s.record.dead {
            let why = format!("slot {slot} has no disk that waits for its key");
            return Err(conflict(why));
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
            lock(&self.volumes).keep(Name::disk(workspace), file)?;
            s.record.fresh = false;
        }
        self.step(&mut s.record, Step::DiskReady)?;
        let ready = WardenOp::DiskReady { size_bytes };
        vm::tell(&self.config.layout, slot, ready, &[])?;
        self.step(&mut s.record, Step::DiskAttached)
    }

    /// How far the slot's disk has got; with `end`, its last word.
    pub(super) fn disk_anchor(&self, slot: u16, end: bool) -> Result<Option<Anchored>> {
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        if end && !s.record.dead {
            self.fail(s);
        } else if let (Step::DiskAttached, Some(disk)) = (s.record.step, &s.disk) {
            s.record.anchor = Some(disk.anchor()?);
        }
        Ok(s.record.anchor.clone())
    }

    pub(super) fn disk_erase(&self, workspace: &WorkspaceId) -> Result<bool> {
        let mut in_use = lock(&self.in_use);
        if !in_use.insert(workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        drop(in_use);
        let erased = lock(&self.volumes)
            .erase(workspace.clone(), None)
            .and_then(|()| remove(&self.disk_of_old(workspace)));
        lock(&self.in_use).remove(workspace);
        erased.map(|()| true)
    }

    /// Where versions without sidecars had the workspace's disk.
    fn disk_of_old(&self, workspace: &WorkspaceId) -> PathBuf {
        let state = self.config.layout.state();
        state.join(format!("disks/{workspace}.luks"))
    }

    /// The empty file system that a new volume of that size is filled from.
    fn ext4(&self, mb: u32) -> Result<OwnedFd> {
        let layout = &self.config.layout;
        let (shipped, made) = (layout.artifacts().join("ext4"), layout.state().join("ext4"));
        diskproc::ext4_template(&shipped, &made, mb, |file| self.mkfs(file))
    }

    /// Makes an empty ext4 in `file`, in a jail.
    fn mkfs(&self, file: OwnedFd) -> Result {
        let mkfs = self.launcher.spawn(Kind::Mkfs, &[], &[file])?.go()?;
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
