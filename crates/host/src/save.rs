//! The steps by which a workspace falls asleep, is kept as a snapshot, and comes up from either; and by
//! which its files become an archive.
//!
//! What is saved is ciphertext before it leaves the process that serves it; host names objects and
//! carries sealed grants. A save holds its lease from its first step on, so that a newer wish can't
//! take it away in the middle.

use crate::fleet::Spare;
use crate::machine::{Act, Stage, Vm};
use crate::workspace::{Shared, Workspace, lost, no_lease};
use api::audit::{Lease, Object};
use api::host::{Archived, Desired};
use api::kms::Released;
use api::warden::{MemoryEnd, Snapshot, VmOpened};
use api::{Error, ErrorCode};
use model::{ObjectId, Purpose, WorkspaceId};
use std::sync::Arc;

/// A save under way.
pub(crate) struct Saving {
    pub(crate) act: Act,
    pub(crate) stage: Stage,
    lease: Lease,
    receipt: serde_json::Value,
    attestation: String,
    released: Option<Released>,
    /// Of an archive, once it is written.
    tar: Option<api::vmctl::Archived>,
}

/// A VM that comes up from saved memory.
#[derive(Default)]
pub(crate) struct Waking {
    attestation: String,
    released: Option<Released>,
    purpose: Purpose,
}

/// What a lease is for, by what it opens and what is wanted.
pub(crate) fn act_of(lease: &Lease, desired: &Desired) -> Act {
    match lease.purpose {
        Purpose::Memory => Act::Sleep,
        Purpose::SnapshotDisk => Act::Snapshot,
        Purpose::Archive if desired.archive.is_some() => Act::Archive,
        Purpose::Archive => Act::Unarchive,
        _ if memory_of(lease).is_some() => Act::Wake,
        _ => Act::Start,
    }
}

/// Which memory a start's or a snapshot's lease opens, and of which snapshot.
fn memory_of(lease: &Lease) -> Option<(Purpose, Option<ObjectId>)> {
    let mut also = lease.also.iter();
    let is_memory = |o: &&Object| matches!(o.purpose, Purpose::Memory | Purpose::SnapshotMemory);
    let memory = also.find(is_memory)?;
    let id = memory.id.clone().filter(|_| memory.purpose.is_by_id());
    Some((memory.purpose, id))
}

/// The snapshot whose disk a start's lease opens: the disk begins as a copy of it.
pub(crate) fn copied_from(lease: &Lease) -> Option<Snapshot> {
    let is_copy = |o: &&Object| o.purpose == Purpose::SnapshotDisk;
    let copied = lease.also.iter().find(is_copy)?;
    Some(Snapshot {
        workspace: copied.workspace.clone(),
        id: copied.id.clone()?,
    })
}

/// What of a workspace is at rest by an id and stays there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    archives: Vec<ObjectId>,
    snapshot: Option<ObjectId>,
    snapshot_next: Option<ObjectId>,
}

impl Kept {
    pub(crate) fn of(desired: &Desired) -> Self {
        Self {
            archives: desired.archives.clone(),
            snapshot: desired.snapshot.clone(),
            snapshot_next: desired.snapshot_next.clone(),
        }
    }

    fn has(&self, purpose: Purpose, id: Option<&ObjectId>) -> bool {
        let snapshots = [self.snapshot.as_ref(), self.snapshot_next.as_ref()];
        match purpose {
            Purpose::Archive => id.is_some_and(|id| self.archives.contains(id)),
            Purpose::SnapshotDisk | Purpose::SnapshotMemory => snapshots.contains(&id),
            Purpose::Disk | Purpose::Memory => true,
        }
    }
}

/// How a start from saved memory is called.
pub(crate) fn from_memory(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::SnapshotMemory => "restore",
        _ => "wake",
    }
}

impl Workspace {
    /// Does the next step of a save; `stage` is how far it is.
    pub(crate) async fn save(
        &mut self,
        act: Act,
        stage: Option<Stage>,
        desired: &Desired,
    ) -> api::Result<()> {
        let shared = Arc::clone(&self.shared);
        let peers = &shared.peers;
        let slot = self.slot()?;
        let Some(stage) = stage else {
            return self.save_begin(act, slot, desired).await;
        };
        if stage == Stage::Ready && matches!(act, Act::Archive | Act::Unarchive) {
            let tar = self.archive_move(slot, desired).await?;
            let saving = self.saving.as_mut().ok_or_else(lost)?;
            (saving.tar, saving.stage) = (Some(tar), Stage::Written);
            return Ok(());
        }
        let saving = self.saving.as_mut().ok_or_else(lost)?;
        let after = match stage {
            Stage::CopyAttested | Stage::Attested => {
                let key = peers
                    .key_release(&saving.lease, &saving.receipt, &saving.attestation)
                    .await?;
                saving.released = Some(key);
                if stage == Stage::Attested {
                    Stage::Keyed
                } else {
                    Stage::CopyKeyed
                }
            }
            Stage::CopyKeyed => {
                let key = saving.released.take().ok_or_else(lost)?;
                let id = saving.lease.object.clone().ok_or_else(no_lease)?;
                peers.copy_grant(slot, id, key).await?;
                if memory_of(&saving.lease).is_none() {
                    self.snapshot = self.saving.take().and_then(|s| s.lease.object);
                    return Ok(());
                }
                Stage::Copied
            }
            Stage::Copied => {
                let memory = memory_of(&saving.lease).ok_or_else(no_lease)?;
                let opened = peers
                    .memory_open(slot, &saving.lease, memory, true, None)
                    .await?;
                saving.attestation = opened.attestation;
                Stage::Attested
            }
            Stage::Keyed => {
                let key = saving.released.take().ok_or_else(lost)?;
                peers.memory_grant(slot, key).await?;
                Stage::Ready
            }
            Stage::Ready => {
                peers.vm_memory_save(slot).await?;
                Stage::Written
            }
            Stage::Written => return self.save_end(act, slot).await,
        };
        saving.stage = after;
        Ok(())
    }

    async fn save_begin(&mut self, act: Act, slot: u16, desired: &Desired) -> api::Result<()> {
        let (lease, receipt) = self.lease(desired).ok_or_else(no_lease)?;
        let (lease, receipt) = (lease.clone(), receipt.clone());
        self.spent = Some(lease.start_id.clone());
        self.error = None;
        if self.undropped {
            // If it can't be dropped now either, warden says so to what comes next.
            self.save_drop().await?;
        }
        let peers = &self.shared.peers;
        let (stage, opened) = match act {
            Act::Snapshot => (Stage::CopyAttested, peers.copy_open(slot, &lease).await?),
            Act::Archive | Act::Unarchive => {
                let id = lease.object.clone().ok_or_else(no_lease)?;
                // The volume's first MiB is its note.
                let size_mb = desired.archive.as_ref().map_or(0, |a| a.max_mb) + 1;
                let size_mb = size_mb.min(*model::limits::DISK_MB.end());
                let archive = (Purpose::Archive, Some(id));
                let makes = act == Act::Archive;
                let size_mb = makes.then_some(size_mb);
                let opened = peers.memory_open(slot, &lease, archive, makes, size_mb);
                (Stage::Attested, opened.await?)
            }
            _ => {
                let memory = (Purpose::Memory, None);
                let opened = peers.memory_open(slot, &lease, memory, true, None);
                (Stage::Attested, opened.await?)
            }
        };
        self.saving = Some(Saving {
            act,
            stage,
            lease,
            receipt,
            attestation: opened.attestation,
            released: None,
            tar: None,
        });
        Ok(())
    }

    /// Waits for the guest to write the archive, or to put it back. A newer wish ends it, whatever that
    /// is about: what closes something can't wait for a tar.
    async fn archive_move(
        &mut self,
        slot: u16,
        desired: &Desired,
    ) -> api::Result<api::vmctl::Archived> {
        let shared = Arc::clone(&self.shared);
        let mut wish = self.desired.clone();
        let written = shared.peers.vm_archive(slot, desired.archive.as_ref());
        let newer = wish.wait_for(|d| d.generation != desired.generation);
        tokio::pin!(written, newer);
        loop {
            let anchor = self.anchor_due();
            tokio::select! {
                written = &mut written => return written,
                _ = &mut newer => {
                    let why = "the workspace was changed while its files were being archived or put back; try again";
                    return Err(Error::new(ErrorCode::Conflict, why));
                }
                () = anchor => self.anchor_carry(),
            }
        }
    }

    async fn save_end(&mut self, act: Act, slot: u16) -> api::Result<()> {
        if matches!(act, Act::Archive | Act::Unarchive) {
            let end = match act {
                Act::Archive => MemoryEnd::Keep,
                _ => MemoryEnd::Drop,
            };
            self.shared.peers.memory_end(slot, end).await?;
            let done = self.saving.take();
            self.archived = done.and_then(|s| {
                let (id, start_id, tar) = (s.lease.object?, s.lease.start_id, s.tar?);
                Some(Archived { id, start_id, tar })
            });
            return Ok(());
        }
        if act == Act::Snapshot {
            self.shared.peers.memory_end(slot, MemoryEnd::Keep).await?;
            self.snapshot = self.saving.take().and_then(|s| s.lease.object);
            return Ok(());
        }
        self.shared.peers.memory_end(slot, MemoryEnd::Sleep).await?;
        self.memory = true;
        self.closed().await
    }

    /// Gives up what is being saved. Warden sweeps it with the slot at the latest, so that a
    /// failure here keeps nothing but the next save from going on.
    pub(crate) async fn save_drop(&mut self) -> api::Result<()> {
        self.saving = None;
        let slot = self.slot()?;
        let dropped = self.shared.peers.memory_end(slot, MemoryEnd::Drop).await;
        // A conflict: there is nothing.
        let dropped = dropped.or_else(|e| match e.code {
            ErrorCode::Conflict => Ok(true),
            _ => Err(e),
        });
        if let Err(e) = &dropped {
            tracing::warn!(workspace = %self.id, error = %e, detail = e.detail, "drop a save");
        }
        self.undropped = dropped.is_err();
        Ok(())
    }

    /// Opens saved memory on a free slot.
    pub(crate) async fn memory_open(&mut self, desired: &Desired) -> api::Result<()> {
        let (lease, _) = self.lease(desired).ok_or_else(no_lease)?;
        let lease = lease.clone();
        let memory = memory_of(&lease).ok_or_else(no_lease)?;
        let purpose = memory.0;
        (self.crashed, self.error) = (false, None);
        let shared = Arc::clone(&self.shared);
        let slot = shared.fleet.slot_for_memory(self.last_slot)?;
        let opened = match shared
            .peers
            .memory_open(slot, &lease, memory, false, None)
            .await
        {
            Ok(opened) => opened,
            Err(e) => {
                shared.fleet.close_some_time(slot).await;
                return Err(e);
            }
        };
        self.spare = Some(Spare {
            slot,
            net: VmOpened {
                ip: String::new(),
                prefix: 0,
                gateway: String::new(),
                mac: String::new(),
            },
            from: from_memory(purpose),
        });
        self.waking = Some(Waking {
            attestation: opened.attestation,
            released: None,
            purpose,
        });
        self.start_id = Some(lease.start_id);
        (self.net, self.vm) = (None, Vm::MemoryAttested);
        self.place_set(false);
        Ok(())
    }

    /// Asks for saved memory's key.
    pub(crate) async fn memory_key(&mut self, desired: &Desired) -> api::Result<()> {
        let (lease, receipt) = self.lease_of_start(desired)?;
        let waking = self.waking.as_ref().ok_or_else(lost)?;
        let peers = &self.shared.peers;
        let key = peers
            .key_release(lease, receipt, &waking.attestation)
            .await?;
        if let Some(waking) = &mut self.waking {
            waking.released = Some(key);
        }
        self.vm = Vm::MemoryKeyed;
        Ok(())
    }

    /// Gives saved memory its key: the VM is there.
    pub(crate) async fn memory_grant(&mut self, desired: &Desired) -> api::Result<()> {
        let slot = self.slot()?;
        let key = self.waking.as_mut().and_then(|w| w.released.take());
        let key = key.ok_or_else(lost)?;
        let memory = self.shared.peers.memory_grant(slot, key).await?;
        let size = desired.resources;
        if (memory.memory_mb, memory.cpus) != (size.memory_mb, size.cpus) {
            return Err(Error::new(
                ErrorCode::MemoryStale,
                "its memory was saved at another size than is wanted now",
            ));
        }
        if let Some(spare) = &mut self.spare {
            spare.net = memory.net;
        }
        self.vm = Vm::Claimed;
        Ok(())
    }

    /// The disk has its key: memory that it was woken with is used up.
    pub(crate) fn memory_used(&mut self) {
        if self
            .waking
            .as_ref()
            .is_some_and(|w| w.purpose == Purpose::Memory)
        {
            self.memory = false;
        }
    }

    /// Whether its memory is saved here, by warden's word.
    pub(crate) async fn memory_look(&self) -> api::Result<bool> {
        match self.shared.peers.objects(&self.id).await {
            Ok(all) => Ok(all.iter().any(|o| o.purpose == Purpose::Memory)),
            Err(e) if e.code == ErrorCode::NotSupported => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Removes the archives and snapshots of a workspace that are none of these, and has the KMS forget the
/// snapshots that stood before. Idempotent.
pub(crate) async fn sweep(
    shared: &Shared,
    workspace: &WorkspaceId,
    kept: &Kept,
) -> api::Result<()> {
    let all = match shared.peers.objects(workspace).await {
        Err(e) if e.code == ErrorCode::NotSupported => return Ok(()),
        all => all?,
    };
    for object in all {
        if !kept.has(object.purpose, object.id.as_ref()) {
            shared
                .peers
                .object_erase(workspace, object.purpose, object.id)
                .await?;
        }
    }
    if let Some(snapshot) = &kept.snapshot {
        shared.peers.snapshot_keep(workspace, snapshot).await?;
    }
    Ok(())
}

/// Removes everything beside a workspace's disk. Idempotent.
pub(crate) async fn erase(shared: &Shared, workspace: &WorkspaceId) -> api::Result<()> {
    let all = match shared.peers.objects(workspace).await {
        Err(e) if e.code == ErrorCode::NotSupported => return Ok(()),
        all => all?,
    };
    for object in all.into_iter().filter(|o| o.purpose != Purpose::Disk) {
        shared
            .peers
            .object_erase(workspace, object.purpose, object.id)
            .await?;
    }
    Ok(())
}
