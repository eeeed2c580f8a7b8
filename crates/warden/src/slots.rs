//! Slots: what each operation does, step by step.
//!
//! ```text
//!             VmOpen                DiskOpen              DiskGrant
//!   (none) ───────────▶ open ───────────────▶ waits ───────────────▶ attached
//!     ▲                  │ a build: TemplateSeal                        │
//!     └────── SlotClose ─┴── from anywhere; a death marks it dead ──────┘
//! ```
//!
//! - Each step is in the journal before it is done; a failed operation unwinds by name.
//! - A slot is locked for one operation at a time; Status reads a copy and waits for nobody.
//! - Ending a slot: the VMM first, so that it closes its file; if it hangs on a dead disk, the
//!   disk goes before it. Then the disk, then vmctl, tap, rules, groups, files, journal.
//!
//! What it costs: a start that fails half-way loses its VM; host takes another one.

mod attach;
mod memory;
mod sweep;

use crate::attest::Machine;
use crate::fault::{At, Result, artifact_missing, conflict, failed, invalid, log, missing};
use crate::journal::{Journal, Record, Step};
use crate::layout::{Digests, Layout, check_digest_id, open_beneath, remove};
use crate::limits::OPEN_MAX;
use crate::templates::{Parts, Templates};
use crate::watch::Watch;
use api::Error;
use api::warden::{
    Counters, NetRates, Op, Open, Sealed, Slot as View, Source, Start, Status, VmOpened,
};
use jail::ask::Kind;
use jail::cgroup::Cgroups;
use jail::ends::Ends;
use jail::limits::{KILL_WAIT, VMM_UID};
use jail::plan;
use jail::process::{self, Handle, Launcher, Proc};
use jail::vmm::Vmm;
use model::WorkspaceId;
use model::limits as bounds;
use net::Network;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm::driver::Driver;
use volumes::Name;
use volumes::image::{Image, Note};
use volumes::serving::Disk;

/// What warden is started with.
pub struct Config {
    /// Where everything is.
    pub layout: Layout,
    /// The guests' network.
    pub network: Network,
    /// The uid whose connections may reach guests.
    pub edge_uid: u32,
    /// Where casemate-jail, -net, -volumes, -disk and -vmctl are.
    pub programs: PathBuf,
    /// The driver of the VMM.
    pub vmm: Vmm,
    /// Arguments every vmctl gets: numbers.
    pub host_uid: u32,
    /// For tests of crashes: panic when this step's entry has been written.
    pub fail_at: Option<Step>,
}

/// Warden.
pub struct Warden {
    config: Config,
    machine: Machine,
    journal: Journal,
    templates: Templates,
    digests: Digests,
    cgroups: Cgroups,
    launcher: Launcher,
    net: Mutex<net::Client>,
    volumes: Mutex<volumes::Client>,
    slots: Mutex<HashMap<u16, Arc<Mutex<Option<Slot>>>>>,
    views: Mutex<BTreeMap<u16, View>>,
    /// Memory to wake from that waits for its key, on slots that have nothing else.
    waking: Mutex<HashMap<u16, (Record, Image)>>,
    /// Workspaces whose disk is on a slot, or on its way.
    in_use: Mutex<HashSet<WorkspaceId>>,
    watch: Arc<Watch>,
}

struct Slot {
    record: Record,
    vmm: Handle,
    vmctl: Handle,
    disk: Option<Disk>,
    /// Serves the memory that the VM was woken from, as long as it maps it.
    woken: Option<Disk>,
    /// What this memory goes with.
    beside: Option<Note>,
    /// Serves what its memory is being saved to.
    saving: Option<Image>,
    /// What the VMM says last; empty for an adopted one.
    stderr: Option<OwnedFd>,
}

impl Warden {
    /// Takes over what a warden before this one left, and removes what can't be taken over.
    ///
    /// # Errors
    /// What is missing on this machine.
    pub fn open(config: Config) -> Result<Arc<Self>> {
        let layout = config.layout.clone();
        layout.create()?;
        let machine = Machine::load(&layout)?;
        let state = layout.state();
        let launcher = Launcher {
            program: config.programs.join("casemate-jail"),
            root: layout.root().into(),
        };
        let net = net::Client::new(
            launcher.clone(),
            config.programs.join("casemate-net"),
            config.network,
            config.edge_uid,
        );
        let program = config.programs.join("casemate-volumes");
        let volumes = volumes::Client::new(launcher.clone(), program);
        let warden = Arc::new(Self {
            journal: Journal::new(state.join("slots")),
            templates: Templates::new(&state, machine.key.clone()),
            digests: Digests::default(),
            cgroups: Cgroups::open(&layout.instance())?,
            launcher,
            net: Mutex::new(net),
            volumes: Mutex::new(volumes),
            slots: Mutex::default(),
            views: Mutex::default(),
            waking: Mutex::default(),
            in_use: Mutex::default(),
            watch: Arc::new(Watch::new()?),
            machine,
            config,
        });
        warden.sweep()?;
        crate::watch::run(&warden)?;
        Ok(warden)
    }

    /// Answers one request.
    ///
    /// # Errors
    /// As each operation says.
    pub fn answer(self: &Arc<Self>, op: Op) -> Result<serde_json::Value> {
        match op {
            Op::Status => json(Ok(self.status())),
            Op::VmOpen {
                slot,
                how,
                image,
                memory_mb,
                cpus,
            } => json(self.vm_open(slot, how, image, memory_mb, cpus)),
            Op::TemplateSeal { slot } => json(self.template_seal(slot)),
            Op::DiskOpen {
                slot,
                workspace,
                start_id,
                purpose,
                nonce,
                disk_mb,
                bytes_per_s,
                ops_per_s,
                pids,
                from,
            } => {
                let (whose, key) = ((workspace, start_id), (purpose, nonce));
                let volume = (disk_mb, bytes_per_s, ops_per_s);
                json(self.disk_open(slot, whose, key, volume, pids, from))
            }
            Op::DiskGrant {
                slot,
                sealed,
                aad,
                from,
            } => {
                let key = Sealed { sealed, aad };
                json(self.disk_grant(slot, key, from))
            }
            Op::SnapshotDiskOpen {
                slot,
                start_id,
                nonce,
            } => json(self.snapshot_open(slot, &start_id, nonce)),
            Op::SnapshotDiskGrant {
                slot,
                id,
                sealed,
                aad,
            } => {
                let key = Sealed { sealed, aad };
                json(self.snapshot_grant(slot, id, key))
            }
            Op::MemoryOpen {
                slot,
                workspace,
                start_id,
                purpose,
                nonce,
                save,
                id,
                size_mb,
            } => {
                let of = Name::new(&workspace, purpose);
                let of = Name { id, ..of };
                json(self.memory_open(slot, of, (start_id, nonce), save, size_mb))
            }
            Op::MemoryGrant { slot, sealed, aad } => {
                let key = Sealed { sealed, aad };
                json(self.memory_grant(slot, key))
            }
            Op::MemoryEnd { slot, end } => json(self.memory_end(slot, end)),
            Op::ObjectErase {
                workspace,
                purpose,
                id,
            } => {
                let of = Name::new(&workspace, purpose);
                json(self.disk_erase(&workspace, Some(Name { id, ..of })))
            }
            Op::Objects { workspace } => json(self.objects(&workspace)),
            Op::NetSet { slot, open, rates } => json(self.net_set(slot, open, rates)),
            Op::DiskAnchor { slot, end } => json(self.disk_anchor(slot, end)),
            Op::SlotClose { slot } => json(self.slot_close(slot)),
            Op::DiskErase { workspace } => json(self.disk_erase(&workspace, None)),
            Op::Counters { slot } => json(self.counters(slot)),
        }
    }

    /// Closes every slot.
    pub fn close_all(&self) {
        let slots: Vec<u16> = lock(&self.slots).keys().copied().collect();
        for slot in slots {
            if let Err(e) = self.slot_close(slot) {
                failed("close.failed", slot, e);
            }
        }
        self.cgroups.forget();
    }

    fn status(&self) -> Status {
        let ours = |p: &Parts| {
            self.parts(self.config.vmm.driver, &p.image, p.memory_mb, p.cpus)
                .is_ok_and(|now| now == *p)
        };
        let templates = self.templates.list();
        Status {
            host: self.machine.host.clone(),
            cgroup: self.cgroups.version().into(),
            accel: self.config.vmm.why.clone(),
            slots: lock(&self.views).values().cloned().collect(),
            templates: templates
                .into_iter()
                .filter(ours)
                .map(|p| (p.image, p.memory_mb, p.cpus))
                .collect(),
            weakened: self.weakened(),
        }
    }

    fn weakened(&self) -> Vec<String> {
        let mut weak = jail::weakened();
        if self.cgroups.version() == "v1" {
            weak.push("cgroup v1: no memory.min for disk processes".into());
        }
        weak
    }

    fn vm_open(
        &self,
        slot: u16,
        how: Start,
        image: String,
        memory_mb: u32,
        cpus: u32,
    ) -> Result<VmOpened> {
        check_slot(slot)?;
        check_digest_id("image", &image)?;
        check_range("memory_mb", memory_mb, &bounds::MEMORY_MB)?;
        check_range("cpus", cpus, &bounds::CPUS)?;
        if how == Start::Wake {
            return Err(invalid("how must not be wake; see memory_grant"));
        }
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        self.check_free(slot, &held)?;
        let record = Record {
            driver: self.config.vmm.driver,
            ..Record::new(slot, how, image, memory_mb, cpus)
        };
        let opened = self.vm_open_steps(record.clone(), None);
        self.opened(&mut held, &record, opened)
    }

    /// Takes in a slot that was made, or removes what there is of it.
    fn opened(
        &self,
        held: &mut Option<Slot>,
        record: &Record,
        opened: Result<Slot>,
    ) -> Result<VmOpened> {
        let slot = record.slot;
        match opened {
            Ok(opened) => {
                let opened = held.insert(opened);
                let disks = [&opened.disk, &opened.woken];
                let disks = disks.into_iter().flatten().map(|d| &d.handle);
                for handle in disks.chain([&opened.vmm, &opened.vmctl]) {
                    self.watch.add(slot, handle)?;
                }
                Ok(self.config.network.of(slot))
            }
            Err(e) => {
                self.clear(record)?;
                Err(e)
            }
        }
    }

    /// `saved`: mount and state of the memory that it is woken from.
    fn vm_open_steps(&self, mut record: Record, saved: Option<[OwnedFd; 2]>) -> Result<Slot> {
        let slot = record.slot;
        let (how, driver) = (record.how, record.driver);
        let (memory_mb, cpus) = (record.memory_mb, record.cpus);
        // All that can be missing is looked for before anything is made.
        let image = self.image(&record.image)?;
        let parts = self.parts(driver, &record.image, memory_mb, cpus)?;
        self.config.vmm.check(&parts.vmm)?;
        let boot = match how {
            Start::Template | Start::Wake => vec![],
            Start::Cold | Start::Build => {
                vec![
                    self.artifact(plan::KERNEL)?,
                    self.artifact(plan::INITRAMFS)?,
                ]
            }
        };
        let vmctl_exe = self.program("casemate-vmctl")?;
        self.step(&mut record, Step::Begin)?;
        let files = match how {
            Start::Cold | Start::Wake => None,
            Start::Template => Some(self.templates.open(&parts)?),
            Start::Build => {
                let uid = VMM_UID + u32::from(slot);
                Some(self.templates.build(slot, uid, memory_mb)?)
            }
        };
        self.step(&mut record, Step::Net)?;
        self.cgroups
            .create(&slot_group(slot), plan::slot_bounds(cpus))?;
        let doors = self.vm_bound(&record, 0)?;
        // Firecracker opens its own; see `disk_open_steps`.
        let tap = (driver == Driver::Qemu).then(|| lock(&self.net).tap(slot));

        let ends = Ends::new(&self.config.layout.vmctl(), slot)?;
        let (stderr, stderr_w) = process::words()?;
        let kind = Kind::Vmm {
            slot,
            how,
            memory_mb,
            cpus,
            driver,
            kvm: self.config.vmm.kvm,
        };
        let mut given = vec![image, stderr_w];
        given.extend(ends.vmm);
        given.extend(tap.transpose()?);
        given.extend(boot);
        given.extend(files.into_iter().flat_map(|f| [f.memory, f.state]));
        given.extend(saved.into_iter().flatten());
        let vmm = self.launcher.spawn(kind, &doors, &given)?;
        let kind = Kind::Vmctl {
            slot,
            how,
            driver,
            memory_mb,
            cpus,
            host_uid: self.config.host_uid,
        };
        let given: Vec<OwnedFd> = std::iter::once(vmctl_exe).chain(ends.vmctl).collect();
        let vmctl = self.launcher.spawn(kind, &doors, &given)?;
        drop(given);
        // A build never gets a disk.
        let disk = match record.how {
            Start::Build => None,
            Start::Template | Start::Cold | Start::Wake => {
                let (spawned, measurement) = self.disk_spawn(slot, &disk_group(slot))?;
                record.disk = Some(spawned.proc());
                record.measurement = Some(measurement);
                Some(spawned)
            }
        };
        record.vmm = Some(vmm.handle.proc);
        record.vmctl = Some(vmctl.handle.proc);
        self.step(&mut record, Step::Jailed)?;
        let vmm = vmm.go()?;
        let vmctl = vmctl.go()?;
        let disk = disk
            .map(|waiting| self.disk_serve(&mut record, &vmm, waiting))
            .transpose()?;
        self.step(&mut record, Step::Open)?;
        Ok(Slot {
            record,
            vmm,
            vmctl,
            disk,
            woken: None,
            beside: None,
            saving: None,
            stderr: Some(stderr),
        })
    }

    fn template_seal(&self, slot: u16) -> Result<bool> {
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        if s.record.how != Start::Build {
            return Err(conflict(format!("slot {slot} is no build")));
        }
        let r = &s.record;
        let parts = self.parts(r.driver, &r.image, r.memory_mb, r.cpus)?;
        self.step(&mut s.record, Step::Seal)?;
        self.end(s);
        let _ = s.vmctl.kill(KILL_WAIT);
        // Nobody is left who could write the files while they are measured.
        let sealed = if self.cgroups.remove(&slot_group(slot)) {
            self.templates.seal(slot, parts)
        } else {
            Err(Error::internal(format!(
                "a process of build slot {slot} can't be killed"
            )))
        };
        let record = s.record.clone();
        *held = None;
        self.clear(&record)?;
        sealed.map(|()| true)
    }

    fn net_set(&self, slot: u16, open: Vec<Open>, rates: NetRates) -> Result<bool> {
        if open.len() > OPEN_MAX {
            let why = format!("open must have at most {OPEN_MAX} entries");
            return Err(invalid(why));
        }
        for o in &open {
            match o.source {
                _ if o.port == 0 => return Err(invalid("open.port must not be 0")),
                Source::Slot(from) if from == slot => {
                    return Err(invalid("open.source must be another slot"));
                }
                Source::Slot(from) => check_slot(from)?,
                Source::Edge => {}
            }
        }
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let s = occupied(slot, &mut held)?;
        // Of the entry and the firewall the entry comes first: a restart builds the one from the
        // other, so that what was asked to close stays closed.
        (s.record.open, s.record.rates) = (open, rates);
        self.journal.write(&s.record)?;
        lock(&self.net).set(slot, s.record.rules())?;
        Ok(true)
    }

    fn slot_close(&self, slot: u16) -> Result<bool> {
        check_slot(slot)?;
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let waiting = lock(&self.waking).remove(&slot);
        if let Some((record, _)) = &waiting {
            self.clear(record)?;
        }
        self.close_held(slot, &mut held)
    }

    fn close_held(&self, slot: u16, held: &mut Option<Slot>) -> Result<bool> {
        let Some(s) = held.as_mut() else {
            return Ok(true);
        };
        // Closed to the network before anything else, and whatever else fails.
        let cut = lock(&self.net).remove(slot);
        let journal = self.step(&mut s.record, Step::Close);
        self.end(s);
        let _ = s.vmctl.kill(KILL_WAIT);
        let record = s.record.clone();
        *held = None;
        self.clear(&record)?;
        cut.and(journal).map(|()| true)
    }

    fn counters(&self, slot: u16) -> Result<Counters> {
        let view = lock(&self.views).get(&slot).cloned();
        let view = view.ok_or_else(|| missing(format!("slot {slot} is empty")))?;
        let mut counters = lock(&self.net).counters(slot)?;
        counters.cpu_ns = self.cgroups.cpu_ns(&slot_group(slot));
        counters.memory_bytes = self.cgroups.memory_bytes(&vm_group(slot));
        if let Some(workspace) = &view.workspace {
            counters.disk_bytes = lock(&self.volumes).bytes(Name::disk(workspace))?;
        }
        Ok(counters)
    }

    /// A process ended: told by the watcher, which holds no lock.
    pub(crate) fn process_gone(&self, slot: u16, proc: Proc, status: Option<i32>) {
        let cell = self.cell(slot);
        let mut held = lock(&cell);
        let Some(s) = held.as_mut() else { return };
        let which = match proc {
            p if s.record.vmm == Some(p) => "vmm",
            p if s.record.vmctl == Some(p) => "vmctl",
            p if s.record.disk == Some(p) => "disk",
            p if s.record.woken == Some(p) => "memory",
            // Of an earlier tenant of the slot.
            _ => return,
        };
        let said = s
            .stderr
            .as_ref()
            .filter(|_| which == "vmm")
            .map(process::last_words);
        let pid = proc.pid;
        let about = serde_json::json!({"slot": slot, "which": which, "pid": pid, "status": status, "said": said});
        log("process.gone", about);
        // vmctl stays, to say why, until the slot is closed.
        self.fail(s);
    }

    /// Marks a slot dead and stops what runs on it; the rest goes when it is closed.
    fn fail(&self, s: &mut Slot) {
        s.record.dead = true;
        if let Err(e) = self.publish(&s.record) {
            failed("journal.failed", s.record.slot, e);
        }
        self.end(s);
        // With what the disk said last.
        if let Err(e) = self.journal.write(&s.record) {
            failed("journal.failed", s.record.slot, e);
        }
    }

    /// Ends VMM and disk.
    fn end(&self, s: &mut Slot) {
        let gone = s.vmm.kill(KILL_WAIT);
        if let Some(mut disk) = s.disk.take() {
            // Not gone: it waits for an answer of its disk. Without one, the disk goes first.
            if let Some(said) = disk.end(gone) {
                s.record.anchor = Some(said);
            }
        }
        // Of these nothing is to be kept but what was refused of memory; their groups end them,
        // whatever they wait for.
        let memory = s.woken.take().and_then(|mut memory| memory.end(gone));
        if let (Some(memory), Some(said)) = (memory, &mut s.record.anchor) {
            said.refused += memory.refused;
            said.first_refused = said.first_refused.or(memory.first_refused);
        }
        s.saving = None;
        for group in [woken_group, saving_group] {
            // What is stuck in one shows when the slot is cleared.
            let _ = self.cgroups.remove(&group(s.record.slot));
        }
        if !gone && !s.vmm.kill(KILL_WAIT) {
            failed("vmm.stuck", s.record.slot, s.vmm.proc.pid);
        }
    }

    /// Removes all that a slot of that record may have left, by name. Idempotent.
    fn clear(&self, record: &Record) -> Result {
        let slot = record.slot;
        lock(&self.views).remove(&slot);
        let groups = self.cgroups.remove(&slot_group(slot));
        let cut = lock(&self.net).remove(slot);
        for name in [format!("{slot}.sock"), format!("{slot}.warden.sock")] {
            remove(&self.config.layout.vmctl().join(name))?;
        }
        self.templates.build_remove(slot)?;
        if let Some(workspace) = &record.workspace {
            if record.fresh {
                lock(&self.volumes).forget_new(Name::disk(workspace))?;
            }
            if let Some((_, object)) = record.saving {
                lock(&self.volumes).forget_new(Name::new(workspace, object))?;
            }
            lock(&self.in_use).remove(workspace);
        }
        cut?;
        if !groups {
            let why = format!("a process of slot {slot} can't be killed; the slot stays closed");
            return Err(Error::internal(why));
        }
        self.journal.remove(slot)
    }

    /// Writes what is about to be done.
    fn step(&self, record: &mut Record, step: Step) -> Result {
        record.step = step;
        self.publish(record)?;
        assert!(
            self.config.fail_at != Some(step),
            "killed at {step:?}, as asked"
        );
        Ok(())
    }

    fn publish(&self, record: &Record) -> Result {
        self.journal.write(record)?;
        if record.step >= Step::Open || record.step == Step::MemoryWaits {
            let view = record.view(self.config.network.of(record.slot));
            lock(&self.views).insert(record.slot, view);
        }
        Ok(())
    }

    /// Bounds the VMM and its vmctl; the doors to their group. `pids` 0 is our own bound.
    fn vm_bound(&self, record: &Record, pids: u32) -> Result<Vec<OwnedFd>> {
        let (group, translator_mb) = (vm_group(record.slot), self.config.vmm.translator_mb());
        let bounds = plan::vm_bounds(record.memory_mb, record.cpus, translator_mb, pids);
        self.cgroups.create(&group, bounds)?;
        self.cgroups.doors(&group)
    }

    fn image(&self, id: &str) -> Result<OwnedFd> {
        let name = format!("images/{id}.erofs");
        let fd = open_beneath(&self.config.layout.artifacts(), &name, OFlags::RDONLY, 0)
            .map_err(|_| missing(format!("image {id} is not on this machine")))?;
        if self.digests.of(&fd, &name)? == id {
            return Ok(fd);
        }
        Err(Error::internal(format!(
            "image {name} is not what its name says; import it again"
        )))
    }

    fn artifact(&self, name: &str) -> Result<OwnedFd> {
        open_beneath(&self.config.layout.artifacts(), name, OFlags::RDONLY, 0)
            .at("open artifact", name)
            .map_err(|e| artifact_missing(name, &e))
    }

    /// An executable of our own, for measuring and running.
    fn program(&self, name: &str) -> Result<OwnedFd> {
        open_beneath(&self.config.programs, name, OFlags::RDONLY, 0).at("open", name)
    }

    /// What a template of these would be a template of.
    fn parts(&self, driver: Driver, image: &str, memory_mb: u32, cpus: u32) -> Result<Parts> {
        let digest = |name: &str| self.digests.of(self.artifact(name)?, name);
        let machine = plan::machine(driver, self.config.vmm.kvm, memory_mb, cpus);
        Ok(Parts {
            vmm: digest(&plan::executable(driver))?,
            machine: hex::encode(seal::hash::sha256(machine.as_bytes())),
            kernel: digest(plan::KERNEL)?,
            initramfs: digest(plan::INITRAMFS)?,
            image: image.into(),
            memory_mb,
            cpus,
        })
    }

    fn cell(&self, slot: u16) -> Arc<Mutex<Option<Slot>>> {
        Arc::clone(lock(&self.slots).entry(slot).or_default())
    }

    pub(crate) fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    fn check_free(&self, slot: u16, held: &Option<Slot>) -> Result {
        if held.is_none() && !lock(&self.waking).contains_key(&slot) {
            return Ok(());
        }
        Err(conflict(format!("slot {slot} is in use")))
    }
}

/// An answer as it travels.
fn json(answer: Result<impl serde::Serialize>) -> Result<serde_json::Value> {
    serde_json::to_value(answer?).map_err(Error::internal)
}

/// What is on the slot.
fn occupied(slot: u16, held: &mut Option<Slot>) -> Result<&mut Slot> {
    held.as_mut()
        .ok_or_else(|| missing(format!("slot {slot} is empty")))
}

fn check_slot(slot: u16) -> Result {
    check_range("slot", slot.into(), &(0..=u32::from(bounds::SLOTS_MAX) - 1))
}

fn check_range(name: &str, value: u32, range: &std::ops::RangeInclusive<u32>) -> Result {
    if range.contains(&value) {
        return Ok(());
    }
    Err(invalid(format!(
        "{name} must be between {} and {}, not {value}",
        range.start(),
        range.end()
    )))
}

fn slot_group(slot: u16) -> String {
    format!("slot-{slot}")
}

fn vm_group(slot: u16) -> String {
    format!("slot-{slot}/vm")
}

fn woken_group(slot: u16) -> String {
    format!("slot-{slot}/woken")
}

fn saving_group(slot: u16) -> String {
    format!("slot-{slot}/saving")
}

fn disk_group(slot: u16) -> String {
    format!("slot-{slot}/disk")
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
