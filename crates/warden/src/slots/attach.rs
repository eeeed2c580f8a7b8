//! The disk of a slot: from a VM that waits for one to a volume that its guest has.

use super::{Slot, Warden, check_range, lock, occupied};
use crate::fault::{Result, conflict, invalid};
use crate::journal::{Record, Step};
use crate::layout::{check_digest_id, remove};
use crate::limits::SEALED_MAX_BYTES;
use api::disk::{Anchored, Content, ToDisk};
use api::vmctl::WardenOp;
use api::warden::{DiskOpened, Sealed, Snapshot, Start};
use api::{Error, ErrorCode};
use jail::process::Handle;
use jail::{ends, plan};
use model::limits as bounds;
use model::{Purpose, StartId, WorkspaceId};
use rustix::fd::AsFd;
use std::path::PathBuf;
use vmm::driver::Driver;
use volumes::serving::{self, Disk, Spawned};
use volumes::{How, Name};

impl Warden {
    pub(super) fn disk_open(
        &self,
        slot: u16,
        (workspace, start_id): (WorkspaceId, StartId),
        (purpose, nonce): (Purpose, String),
        volume: (u32, u64, u64),
        pids: u32,
        from: Option<Snapshot>,
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
        // A slot that wakes has its workspace already.
        let own = s.record.workspace.as_ref() == Some(&workspace);
        if !own && (s.woken.is_some() || !lock(&self.in_use).insert(workspace.clone())) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        s.record.workspace = Some(workspace.clone());
        s.record.start_id = Some(start_id.clone());
        let bound = self.vm_bound(&s.record, pids).map(drop);
        let bound = bound.and_then(|()| s.vmm.nproc(plan::vm_pids(s.record.cpus, pids)));
        let waits = bound.and_then(|()| self.disk_open_steps(s, &workspace, volume, from.as_ref()));
        let waits = waits.and_then(|()| {
            let attest = |of: &WorkspaceId, purpose, nonce| {
                self.attest(&s.record, of, &start_id, purpose, nonce)
            };
            let source = from
                .as_ref()
                .map(|of| attest(&of.workspace, Purpose::SnapshotDisk, nonce.clone()));
            Ok((source.transpose()?, attest(&workspace, purpose, nonce)?))
        });
        if waits.is_err() {
            self.fail(s);
        }
        let (from, attestation) = waits?;
        Ok(DiskOpened {
            attestation,
            fresh: s.record.fresh,
            from,
        })
    }

    /// Attests the slot's disk process.
    pub(super) fn attest(
        &self,
        record: &Record,
        of: &WorkspaceId,
        start_id: &StartId,
        purpose: Purpose,
        nonce: String,
    ) -> Result<String> {
        let hpke_pub = record.hpke_pub.clone().ok_or_else(gone)?;
        let runs = record.measurement.clone().ok_or_else(gone)?;
        self.machine
            .attest(of, start_id, purpose, nonce, hpke_pub, runs)
    }

    /// What of a slot's disk needs no workspace: its group, its mount, its process.
    pub(super) fn disk_spawn(&self, slot: u16, group: &str) -> Result<(Spawned, String)> {
        let exe = self.program("casemate-disk")?;
        let measurement = self.digests.of(&exe, "casemate-disk")?;
        self.cgroups.create(group, plan::disk_bounds())?;
        let doors = self.cgroups.doors(group)?;
        Ok((
            Spawned::new(&self.launcher, slot, exe, &doors)?,
            measurement,
        ))
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
        let (disk, hpke_pub, mount) = spawned.go()?;
        record.hpke_pub = Some(hpke_pub);
        let (given, file) = (self.launcher).give_mount(record.driver, slot, vmm, mount)?;
        let with: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        ends::tell(&self.config.layout.vmctl(), slot, given, &with)?;
        Ok(disk)
    }

    fn disk_open_steps(
        &self,
        s: &mut Slot,
        workspace: &WorkspaceId,
        (size_mb, bytes_per_s, ops_per_s): (u32, u64, u64),
        from: Option<&Snapshot>,
    ) -> Result {
        self.step(&mut s.record, Step::DiskBegin)?;
        let how = from.map_or(How::Write, |_| How::New);
        let files = lock(&self.volumes).open(Name::disk(workspace), how)?;
        if files.fresh && from.is_none() && self.disk_of_old(workspace).exists() {
            let why = "this disk was made by an earlier version and can't be checked; copy what it holds with that version, then delete the workspace";
            return Err(Error::new(ErrorCode::DiskCorrupt, why));
        }
        s.record.fresh = files.fresh;
        if s.record.driver == Driver::Firecracker {
            // Prepared by now: it holds its tap, and opens its disk anew at the attach.
            self.launcher.settle(s.record.slot, &s.vmm)?;
            lock(&self.net).taken(s.record.slot)?;
        }
        // What a new one is filled from.
        let beside = match from {
            Some(Snapshot { workspace, id }) => {
                let of = Name::new(workspace, Purpose::SnapshotDisk);
                let id = Some(id.clone());
                let image = lock(&self.volumes).open(Name { id, ..of }, How::Read)?;
                vec![image.volume, image.sidecar]
            }
            None if files.fresh => {
                let state = self.config.layout.state();
                vec![serving::ext4(&self.launcher, &state, size_mb)?]
            }
            None => vec![],
        };
        let disk = s.disk.as_mut().ok_or_else(gone)?;
        let direct = files.direct()?;
        let mut given = vec![files.volume.as_fd(), files.sidecar.as_fd(), direct.as_fd()];
        given.extend(beside.iter().map(AsFd::as_fd));
        let open = ToDisk::Open {
            content: Content::Disk,
            size_mb,
            bytes_per_s,
            ops_per_s,
        };
        disk.send(&open, &given)?;
        disk.file = Some(files.volume);
        self.step(&mut s.record, Step::DiskWaits)
    }

    pub(super) fn disk_grant(&self, slot: u16, key: Sealed, from: Option<Sealed>) -> Result<bool> {
        for key in from.iter().chain([&key]) {
            check_sealed(key)?;
        }
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        if s.record.step != Step::DiskWaits || s.record.dead {
            let why = format!("slot {slot} has no disk that waits for its key");
            return Err(conflict(why));
        }
        let granted = self.disk_grant_steps(s, key, from);
        if granted.is_err() {
            self.fail(s);
        }
        granted.map(|()| true)
    }

    fn disk_grant_steps(&self, s: &mut Slot, key: Sealed, from: Option<Sealed>) -> Result {
        let slot = s.record.slot;
        self.step(&mut s.record, Step::DiskGrant)?;
        let disk = s.disk.as_mut().ok_or_else(gone)?;
        let (size_bytes, state, note) = disk.grant(key, s.record.fresh, from)?;
        if let Some(saved) = &s.beside {
            saved.check(&state, note.as_deref())?;
        }
        if let (true, Some(workspace), Some(file)) =
            (s.record.fresh, &s.record.workspace, &disk.file)
        {
            lock(&self.volumes).keep(Name::disk(workspace), file)?;
            s.record.fresh = false;
        }
        // From here on the disk may change: what was saved beside it is used up, by a wake or by a
        // start without it.
        self.step(&mut s.record, Step::Spend)?;
        if let Some(workspace) = &s.record.workspace {
            lock(&self.volumes).spend(Name::new(workspace, Purpose::Memory))?;
        }
        self.step(&mut s.record, Step::DiskReady)?;
        let ready = WardenOp::DiskReady { size_bytes };
        ends::tell(&self.config.layout.vmctl(), slot, ready, &[])?;
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

    /// Erases one object of the workspace, or all.
    pub(super) fn disk_erase(&self, workspace: &WorkspaceId, of: Option<Name>) -> Result<bool> {
        if of.as_ref().is_some_and(|of| of.object != Purpose::Disk) {
            return lock(&self.volumes)
                .erase(workspace.clone(), of)
                .map(|()| true);
        }
        let mut in_use = lock(&self.in_use);
        if !in_use.insert(workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        drop(in_use);
        let erased = lock(&self.volumes)
            .erase(workspace.clone(), of)
            .and_then(|()| remove(&self.disk_of_old(workspace)));
        lock(&self.in_use).remove(workspace);
        erased.map(|()| true)
    }

    /// Where versions without sidecars had the workspace's disk.
    fn disk_of_old(&self, workspace: &WorkspaceId) -> PathBuf {
        let state = self.config.layout.state();
        state.join(format!("disks/{workspace}.luks"))
    }
}

pub(super) fn check_sealed(key: &Sealed) -> Result {
    if key.sealed.len() > SEALED_MAX_BYTES {
        return Err(invalid("sealed must be at most 16 KiB"));
    }
    check_digest_id("aad", &key.aad)
}

pub(super) fn gone() -> Error {
    Error::internal("the disk process is gone")
}
