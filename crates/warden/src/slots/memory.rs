//! Memory of workspaces at rest, and the disks that go with it: what a sleep, a wake and a snapshot
//! need of a slot.
//!
//! ```text
//!   attached ──MemoryOpen──▶ waits ──MemoryGrant──▶ vmctl has the file ──MemoryEnd──▶ attached,
//!                                                                     or asleep: the slot closed
//!   (none) ──MemoryOpen──▶ waits ──MemoryGrant──▶ open, on that memory ──disk──▶ attached
//! ```
//!
//! An archive of a workspace's files is saved the same way, by its guest, while it runs on, and read.
//!
//! A wake that does not find the VMM and the state of the disk that the memory goes with is refused
//! before anything runs or is used up.

use super::attach::{check_sealed, gone};
use super::{Slot, Warden, lock, occupied, saving_group, slot_group, woken_group};
use crate::fault::{Result, conflict, failed, invalid};
use crate::journal::{Record, Step};
use crate::layout::check_digest_id;
use api::Error;
use api::vmctl::WardenOp;
use api::warden::{Attested, Memory, MemoryEnd, Object, Sealed, Start};
use jail::ask::OpenFor;
use jail::{ends, plan};
use model::limits as bounds;
use model::{ObjectId, Purpose, StartId, WorkspaceId};
use rustix::fd::AsFd as _;
use vmm::driver::Driver;
use vmm::qemu::argv::{SAVED_MAX_MIB, saved_mib};
use volumes::Name;
use volumes::image::{self, Image, Note, Vm, stale};

impl Warden {
    pub(super) fn memory_open(
        &self,
        slot: u16,
        of: Name,
        (start_id, nonce): (StartId, String),
        save: bool,
        new_mb: Option<u32>,
    ) -> Result<Attested> {
        super::check_slot(slot)?;
        check_digest_id("nonce", &nonce)?;
        let is_archive = of.object == Purpose::Archive;
        let is_sized = new_mb.is_some() == (save && is_archive);
        let is_disk = matches!(of.object, Purpose::Disk | Purpose::SnapshotDisk);
        if is_disk || !of.is_object() || !is_sized {
            let why = "purpose must be memory, or snapshot_memory or archive with an id; an archive that is made has a size_mb";
            return Err(invalid(why));
        }
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        if save || is_archive {
            let s = occupied(slot, &mut held)?;
            check_disk(s, &of.workspace)?;
            let is_qemu = s.record.driver == Driver::Qemu;
            let no_memory = !is_qemu || s.record.memory_mb > SAVED_MAX_MIB;
            if s.saving.is_some() || (no_memory && !is_archive) {
                let why = format!(
                    "it is being saved, has more than {SAVED_MAX_MIB} MiB, or is not QEMU's"
                );
                return Err(conflict(why));
            }
            let new_mb = new_mb.unwrap_or_else(|| saved_mib(s.record.memory_mb));
            super::check_range("size_mb", new_mb, &(1..=*bounds::DISK_MB.end()))?;
            let (key, new_mb) = ((&start_id, nonce), Some(new_mb).filter(|_| save));
            let opened = self.image_open(&mut s.record, of, new_mb, false, key);
            let Ok((image, attested)) = opened else {
                self.saving_end(s)?;
                return opened.map(|(_, attested)| attested);
            };
            s.saving = Some(image);
            return Ok(attested);
        }
        self.check_free(slot, &held)?;
        if !lock(&self.in_use).insert(of.workspace.clone()) {
            return Err(conflict("the workspace's disk is in use; stop it first"));
        }
        // Of which VM it is, its note says.
        let mut record = Record::new(slot, Start::Wake, String::new(), 0, 0);
        record.workspace = Some(of.workspace.clone());
        record.start_id = Some(start_id.clone());
        let opened = self.image_open(&mut record, of, None, true, (&start_id, nonce));
        let Ok((image, attested)) = opened else {
            self.clear(&record)?;
            return opened.map(|(_, attested)| attested);
        };
        lock(&self.waking).insert(slot, (record, image));
        Ok(attested)
    }

    /// Spawns a process for the image and has it attested.
    fn image_open(
        &self,
        record: &mut Record,
        of: Name,
        new_mb: Option<u32>,
        wakes: bool,
        (start_id, nonce): (&StartId, String),
    ) -> Result<(Image, Attested)> {
        let group = if wakes { woken_group } else { saving_group };
        if wakes {
            let bounds = plan::slot_bounds(1);
            self.cgroups.create(&slot_group(record.slot), bounds)?;
        }
        let (spawned, runs) = self.disk_spawn(record.slot, &group(record.slot))?;
        if !wakes {
            record.saving = Some((spawned.proc(), of.object));
            self.publish(record)?;
        } else {
            record.woken = Some(spawned.proc());
            self.step(record, Step::MemoryWaits)?;
        }
        let (workspace, purpose) = (of.workspace.clone(), of.object);
        let (image, hpke_pub) = Image::open(&self.volumes, spawned, of, new_mb)?;
        let attestation = self
            .machine
            .attest(&workspace, start_id, purpose, nonce, hpke_pub, runs)?;
        Ok((image, Attested { attestation }))
    }

    pub(super) fn memory_grant(&self, slot: u16, key: Sealed) -> Result<Memory> {
        check_sealed(&key)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let waking = lock(&self.waking).remove(&slot);
        if let Some((mut record, image)) = waking {
            let woken = self.wake_steps(&mut record, image, key);
            self.opened(&mut held, &record, woken)?;
        } else {
            let s = occupied(slot, &mut held)?;
            let Some(image) = &mut s.saving else {
                return Err(conflict(format!("slot {slot} saves no memory")));
            };
            let reads = image.is_read();
            let access = if reads { OpenFor::Wake } else { OpenFor::Save };
            let granted = image.grant(key).and_then(|(mount, _)| {
                let file = self.launcher.open_mount(slot, access, mount)?;
                let vmctl = self.config.layout.vmctl();
                // One that a warden before this one left.
                ends::tell(&vmctl, slot, WardenOp::MemoryDrop, &[])?;
                ends::tell(&vmctl, slot, WardenOp::MemoryFd, &[file.as_fd()])
            });
            if let Err(e) = granted {
                self.saving_end(s)?;
                return Err(e);
            }
        }
        let s = occupied(slot, &mut held)?;
        Ok(Memory {
            image: s.record.image.clone(),
            memory_mb: s.record.memory_mb,
            cpus: s.record.cpus,
            net: self.config.network.of(slot),
        })
    }

    /// Opens the image, and makes the VM that it is of.
    fn wake_steps(&self, record: &mut Record, mut image: Image, key: Sealed) -> Result<Slot> {
        let (mount, note) = image.grant(key)?;
        let note = note.ok_or_else(|| stale("it has no note"))?;
        let vm = note.vm.clone().ok_or_else(|| stale("it is no memory"))?;
        if self.vm_of(&vm.image, vm.memory_mb, vm.cpus)? != vm {
            return Err(stale("it is of another version of the VMM"));
        }
        (record.image, record.memory_mb, record.cpus) = (vm.image, vm.memory_mb, vm.cpus);
        let file = mount.try_clone().map_err(Error::internal)?;
        let state = self.launcher.open_mount(record.slot, OpenFor::Wake, file)?;
        let mut s = self.vm_open_steps(record.clone(), Some([mount, state]))?;
        (s.woken, s.beside) = (Some(image.disk), Some(note));
        Ok(s)
    }

    /// What can be woken of such a VM here, now.
    fn vm_of(&self, image: &str, memory_mb: u32, cpus: u32) -> Result<Vm> {
        let parts = self.parts(Driver::Qemu, image, memory_mb, cpus)?;
        Ok(Vm {
            vmm: parts.vmm,
            machine: parts.machine,
            image: parts.image,
            memory_mb,
            cpus,
        })
    }

    pub(super) fn memory_end(&self, slot: u16, end: MemoryEnd) -> Result<bool> {
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        let Some(image) = s.saving.take() else {
            return Err(conflict(format!("slot {slot} saves no memory")));
        };
        let kept = match end {
            MemoryEnd::Drop => Ok(()),
            MemoryEnd::Keep | MemoryEnd::Sleep => self.image_keep(s, image),
        };
        // The last descriptor of the file, and not before: its process ends with it. If vmctl is
        // gone, so is that.
        let _ = ends::tell(&self.config.layout.vmctl(), slot, WardenOp::MemoryDrop, &[]);
        self.saving_end(s)?;
        kept?;
        if end == MemoryEnd::Sleep {
            return self.close_held(slot, &mut held);
        }
        Ok(true)
    }

    /// Makes what was saved the workspace's image, with the disk's state in its note.
    fn image_keep(&self, s: &mut Slot, image: Image) -> Result {
        self.step(&mut s.record, Step::Saving)?;
        let disk = s.disk.as_ref().ok_or_else(gone)?;
        let r = &s.record;
        let of_memory = r.saving.is_some_and(|(_, o)| o != Purpose::Archive);
        let vm = of_memory.then(|| self.vm_of(&r.image, r.memory_mb, r.cpus));
        let (vm, disk) = (vm.transpose()?, disk.anchor()?.statement.anchor);
        image.keep(&self.volumes, &Note { vm, disk })
    }

    /// Ends the process that memory is saved to; what is not kept by then is nothing.
    fn saving_end(&self, s: &mut Slot) -> Result {
        s.saving = None;
        if !self.cgroups.remove(&saving_group(s.record.slot)) {
            failed("saving.stuck", s.record.slot, "can't be killed");
        }
        let saved = s.record.saving.take();
        if let (Some((_, object)), Some(workspace)) = (saved, &s.record.workspace) {
            lock(&self.volumes).forget_new(Name::new(workspace, object))?;
        }
        s.record.step = Step::DiskAttached;
        self.publish(&s.record)
    }

    pub(super) fn snapshot_open(
        &self,
        slot: u16,
        start_id: &StartId,
        nonce: String,
    ) -> Result<Attested> {
        check_digest_id("nonce", &nonce)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        let of = snapshot_of(s)?;
        let attestation = self.attest(&s.record, &of.workspace, start_id, of.object, nonce)?;
        Ok(Attested { attestation })
    }

    pub(super) fn snapshot_grant(&self, slot: u16, id: ObjectId, key: Sealed) -> Result<bool> {
        check_sealed(&key)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        let (id, of) = (Some(id), snapshot_of(s)?);
        let of = Name { id, ..of };
        let disk = s.disk.as_ref().ok_or_else(gone)?;
        image::copy(&self.volumes, disk, of, key).map(|()| true)
    }

    pub(super) fn objects(&self, workspace: &WorkspaceId) -> Result<Vec<Object>> {
        lock(&self.volumes).list(workspace.clone())
    }
}

fn snapshot_of(s: &Slot) -> Result<Name> {
    let workspace = s.record.workspace.clone().ok_or_else(gone)?;
    check_disk(s, &workspace)?;
    Ok(Name::new(&workspace, Purpose::SnapshotDisk))
}

/// Whether the slot has that workspace's disk.
fn check_disk(s: &Slot, of: &WorkspaceId) -> Result {
    let at_rest = s.record.step == Step::DiskAttached && !s.record.dead;
    if at_rest && s.record.workspace.as_ref() == Some(of) {
        return Ok(());
    }
    let why = format!("slot {} does not have the workspace's disk", s.record.slot);
    Err(conflict(why))
}
