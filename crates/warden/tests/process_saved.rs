//! `kill -9` of each process at each step of what is saved, woken and copied: afterwards it is done or
//! as it was, whatever stood before stands, and nothing else is left. Disk processes are the real ones;
//! VMM and vmctl are doubles. Needs root. The moments come from a seed that is printed.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::warden::{
    Attested, DiskOpened, Memory, MemoryEnd, NetRates, Object, Op, Sealed, SlotState, Snapshot,
    Start, VmOpened,
};
use api::{Error, ErrorCode};
use jail::process::Proc;
use model::{ObjectId, Purpose};
use rustix::fd::OwnedFd;
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use warden::Warden;
use warden::journal::{Record, Step};
use world::release::release;
use world::*;

/// Of the workspace, and of the one that is forked from it.
const SLOT: u16 = 1;
const FORK_SLOT: u16 = 2;
const FORK: &str = "ws_00000000000000ab";
/// The snapshot that stands, one that is taken, an archive.
const KEPT: u8 = 1;
const NEXT: u8 = 2;
const ARCHIVE: u8 = 3;
/// A kill in the middle of a step comes within this, ms: a step takes about so long.
const MOMENT_MS: u64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Act {
    Sleep,
    Wake,
    Snapshot,
    Fork,
    Archive,
}

/// What host and vmctl do, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Do {
    SnapshotDiskOpen,
    SnapshotDiskGrant,
    MemoryOpen,
    MemoryGrant,
    Write,
    MemoryEnd,
    VmOpen,
    DiskOpen,
    DiskGrant,
}

const ACTS: [Act; 5] = [
    Act::Sleep,
    Act::Wake,
    Act::Snapshot,
    Act::Fork,
    Act::Archive,
];

impl Act {
    fn steps(self) -> &'static [Do] {
        use Do::{
            DiskGrant, DiskOpen, MemoryEnd, MemoryGrant, MemoryOpen, SnapshotDiskGrant,
            SnapshotDiskOpen, VmOpen, Write,
        };
        match self {
            Self::Sleep | Self::Archive => &[MemoryOpen, MemoryGrant, Write, MemoryEnd],
            Self::Wake => &[MemoryOpen, MemoryGrant, DiskOpen, DiskGrant],
            Self::Fork => &[VmOpen, DiskOpen, DiskGrant],
            Self::Snapshot => &[
                SnapshotDiskOpen,
                SnapshotDiskGrant,
                MemoryOpen,
                MemoryGrant,
                Write,
                MemoryEnd,
            ],
        }
    }

    /// The entries of warden's journal on the way; whether the act is done once it is there.
    fn journal(self) -> &'static [(Step, bool)] {
        match self {
            Self::Sleep => &[(Step::Saving, false), (Step::Close, true)],
            Self::Snapshot | Self::Archive => &[(Step::Saving, false)],
            Self::Wake => &[
                (Step::MemoryWaits, false),
                (Step::Begin, false),
                (Step::Net, false),
                (Step::Jailed, false),
                (Step::Open, false),
                (Step::DiskBegin, false),
                (Step::DiskWaits, false),
                (Step::DiskGrant, false),
                (Step::Spend, false),
                (Step::DiskReady, true),
                (Step::DiskAttached, true),
            ],
            Self::Fork => &[
                (Step::DiskBegin, false),
                (Step::DiskWaits, false),
                (Step::DiskGrant, false),
                (Step::Spend, true),
                (Step::DiskReady, true),
                (Step::DiskAttached, true),
            ],
        }
    }

    fn slot(self) -> u16 {
        match self {
            Self::Fork => FORK_SLOT,
            _ => SLOT,
        }
    }

    /// What it makes, or, a wake, uses up.
    fn objects(self) -> Vec<(Purpose, Option<ObjectId>)> {
        match self {
            Self::Sleep | Self::Wake => vec![(Purpose::Memory, None)],
            Self::Snapshot => pair(NEXT),
            Self::Fork => vec![(Purpose::Disk, None)],
            Self::Archive => vec![(Purpose::Archive, Some(id(ARCHIVE)))],
        }
    }
}

/// Who dies. Warden has tests of its own.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Vmm,
    Vmctl,
    Disk,
    /// The disk process of what is saved, or woken.
    Image,
    Volumes,
}

const VICTIMS: [Victim; 5] = [
    Victim::Vmm,
    Victim::Vmctl,
    Victim::Disk,
    Victim::Image,
    Victim::Volumes,
];

fn id(n: u8) -> ObjectId {
    ObjectId::from_bytes([n; 8])
}

fn pair(n: u8) -> Vec<(Purpose, Option<ObjectId>)> {
    let kinds = [Purpose::SnapshotDisk, Purpose::SnapshotMemory];
    kinds.map(|p| (p, Some(id(n)))).into()
}

/// A machine with one workspace that runs and has a snapshot; the test is host and KMS.
struct Bench {
    world: World,
    warden: Option<Arc<Warden>>,
    run: u64,
    /// The last key that was released, and that of what a disk is copied from.
    key: Option<(Sealed, Option<Sealed>)>,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        let disk = Path::new(LAUNCHER).parent().unwrap().join("examples/disk");
        std::fs::copy(disk, world.dir.join("programs/casemate-disk")).unwrap();
        let mut bench = Self::of(world, None, 1);
        bench.start();
        bench.all(Act::Snapshot, KEPT).unwrap();
        bench
    }

    fn of(world: World, fail_at: Option<Step>, run: u64) -> Self {
        let warden = Some(world.open(fail_at));
        Self {
            world,
            warden,
            run,
            key: None,
        }
    }

    fn warden(&self) -> &Arc<Warden> {
        self.warden.as_ref().unwrap()
    }

    fn ask<T: DeserializeOwned>(&self, op: Op) -> Result<T, Error> {
        let answer = self.warden().answer(op)?;
        Ok(serde_json::from_value(answer).unwrap())
    }

    fn release(&mut self, attestation: &str) -> Sealed {
        self.run += 1;
        release(&self.world, attestation, self.run)
    }

    fn key(&mut self) -> Result<(Sealed, Option<Sealed>), Error> {
        let none = || Error::new(ErrorCode::Conflict, "nothing was attested");
        self.key.take().ok_or_else(none)
    }

    /// The workspace runs, from its disk.
    fn start(&mut self) {
        self.vm_open(SLOT).unwrap();
        self.disk_open(SLOT, WORKSPACE, None).unwrap();
        self.disk_grant(SLOT).unwrap();
        let (slot, open, rates) = (SLOT, vec![edge(9991)], NetRates::default());
        self.ask::<bool>(Op::NetSet { slot, open, rates }).unwrap();
    }

    fn vm_open(&self, slot: u16) -> Result<(), Error> {
        self.ask::<VmOpened>(self.world.vm_open(slot, Start::Cold))
            .map(drop)
    }

    fn disk_open(&mut self, slot: u16, of: &str, from: Option<Snapshot>) -> Result<(), Error> {
        let opened: DiskOpened = self.ask(Op::DiskOpen {
            slot,
            workspace: of.parse().unwrap(),
            start_id: START.parse().unwrap(),
            purpose: Purpose::Disk,
            nonce: "0c".repeat(32),
            disk_mb: 64,
            bytes_per_s: 1 << 30,
            ops_per_s: 100_000,
            pids: 0,
            from,
        })?;
        let from = opened.from.map(|attestation| self.release(&attestation));
        self.key = Some((self.release(&opened.attestation), from));
        Ok(())
    }

    fn disk_grant(&mut self, slot: u16) -> Result<(), Error> {
        let (Sealed { sealed, aad }, from) = self.key()?;
        self.ask::<bool>(Op::DiskGrant {
            slot,
            sealed,
            aad,
            from,
        })
        .map(drop)
    }

    /// One step; a snapshot is `number`.
    fn step(&mut self, act: Act, step: Do, number: u8) -> Result<(), Error> {
        let slot = act.slot();
        let (start_id, nonce) = (START.parse().unwrap(), "0c".repeat(32));
        match step {
            Do::SnapshotDiskOpen => {
                let opened: Attested = self.ask(Op::SnapshotDiskOpen {
                    slot,
                    start_id,
                    nonce,
                })?;
                self.key = Some((self.release(&opened.attestation), None));
            }
            Do::SnapshotDiskGrant => {
                let (Sealed { sealed, aad }, _) = self.key()?;
                self.ask::<bool>(Op::SnapshotDiskGrant {
                    slot,
                    id: id(number),
                    sealed,
                    aad,
                })?;
            }
            Do::MemoryOpen => {
                let (purpose, id) = match act {
                    Act::Snapshot => (Purpose::SnapshotMemory, Some(id(number))),
                    Act::Archive => (Purpose::Archive, Some(id(ARCHIVE))),
                    _ => (Purpose::Memory, None),
                };
                let opened: Attested = self.ask(Op::MemoryOpen {
                    slot,
                    workspace: WORKSPACE.parse().unwrap(),
                    start_id,
                    purpose,
                    nonce,
                    save: act != Act::Wake,
                    id,
                    size_mb: (act == Act::Archive).then_some(8),
                })?;
                self.key = Some((self.release(&opened.attestation), None));
            }
            Do::MemoryGrant => {
                let (Sealed { sealed, aad }, _) = self.key()?;
                self.ask::<Memory>(Op::MemoryGrant { slot, sealed, aad })?;
            }
            Do::Write => self.write()?,
            Do::MemoryEnd => {
                let end = match act {
                    Act::Sleep => MemoryEnd::Sleep,
                    _ => MemoryEnd::Keep,
                };
                self.ask::<bool>(Op::MemoryEnd { slot, end })?;
            }
            Do::VmOpen => self.vm_open(slot)?,
            Do::DiskOpen if act == Act::Fork => {
                let (workspace, id) = (WORKSPACE.parse().unwrap(), id(KEPT));
                self.disk_open(slot, FORK, Some(Snapshot { workspace, id }))?;
            }
            Do::DiskOpen => self.disk_open(slot, WORKSPACE, None)?,
            Do::DiskGrant => self.disk_grant(slot)?,
        }
        Ok(())
    }

    fn all(&mut self, act: Act, number: u8) -> Result<(), Error> {
        let mut steps = act.steps().iter();
        steps.try_for_each(|step| self.step(act, *step, number))
    }

    /// As vmctl has the VMM write: to the last file that it was given.
    fn write(&self) -> Result<(), Error> {
        let gone = |_| Error::new(ErrorCode::VmUnavailable, "vmctl is gone");
        let vmctl = self.pid(Victim::Vmctl, SLOT).ok_or_else(|| gone(()))?;
        let fds = std::fs::read_dir(format!("/proc/{vmctl}/fd")).map_err(|_| gone(()))?;
        let served = fds.flatten().filter(|fd| {
            // A mount that is attached nowhere.
            std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/"))
        });
        let numbers = served.filter_map(|fd| fd.file_name().to_str()?.parse::<i32>().ok());
        let last = numbers.max().ok_or_else(|| gone(()))?;
        let handle = Proc::of(vmctl).and_then(Proc::handle);
        let handle = handle.ok_or_else(|| gone(()))?;
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let file: OwnedFd =
            rustix::process::pidfd_getfd(handle.pidfd(), last, flags).map_err(|_| gone(()))?;
        let written = File::from(file).write_all_at(&[0x5a; 64 << 10], 1 << 20);
        written.map_err(|_| gone(()))
    }

    /// The process now, if there is one.
    fn pid(&self, victim: Victim, slot: u16) -> Option<u32> {
        let slots = status(self.warden()).slots;
        let slot = slots.iter().find(|s| s.slot == slot);
        match victim {
            Victim::Vmm => slot.map(|s| s.vmm_pid).filter(|pid| *pid != 0),
            Victim::Vmctl => slot.map(|s| s.vmctl_pid).filter(|pid| *pid != 0),
            Victim::Disk => slot.and_then(|s| s.disk_pid),
            Victim::Image => {
                let record = self.record(slot?.slot)?;
                let saving = record.saving.map(|(proc, _)| proc);
                saving.or(record.woken).map(|proc| proc.pid)
            }
            Victim::Volumes => self.volumes().first().copied(),
        }
    }

    /// The slot's entry in the journal.
    fn record(&self, slot: u16) -> Option<Record> {
        let entry = self.world.layout.state().join(format!("slots/{slot}.json"));
        let text = std::fs::read_to_string(entry).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// The processes that have this installation's files at rest: one, or none yet.
    fn volumes(&self) -> Vec<u32> {
        let ours = self.world.dir.join(jail::VOLUMES).metadata().unwrap();
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
        let has = |pid: &u32| {
            let at = std::fs::metadata(format!("/proc/{pid}/root/volumes"));
            at.is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()))
        };
        pids.filter(has).collect()
    }

    /// Whether there was such a process to kill.
    fn kill(&self, victim: Victim, slot: u16) -> bool {
        let proc = self.pid(victim, slot).and_then(Proc::of);
        let Some(handle) = proc.and_then(Proc::handle) else {
            return false;
        };
        assert!(handle.kill(SOON), "{victim:?} does not die");
        true
    }

    /// What is at rest of a workspace beside what always is.
    fn objects(&self, of: &str) -> Vec<(Purpose, Option<ObjectId>)> {
        let workspace = of.parse().unwrap();
        let all: Vec<Object> = self.ask(Op::Objects { workspace }).unwrap();
        let mut all: Vec<_> = all.into_iter().map(|o| (o.purpose, o.id)).collect();
        if of == WORKSPACE {
            for there in pair(KEPT).into_iter().chain([(Purpose::Disk, None)]) {
                let at = all.iter().position(|o| *o == there);
                all.remove(at.unwrap_or_else(|| panic!("{there:?} is gone; left: {all:?}")));
            }
        }
        all
    }

    fn close(&self, slot: u16) {
        self.ask::<bool>(Op::SlotClose { slot }).unwrap();
    }

    /// Brings a workspace to where the act begins: it runs, or sleeps.
    fn begin(&mut self, act: Act) {
        if act == Act::Wake {
            self.all(Act::Sleep, NEXT).unwrap();
        }
    }

    /// What must be so after a kill: `done`, where that is certain. Does what host would; the workspace
    /// runs afterwards.
    fn settle(&mut self, act: Act, done: Option<bool>) {
        self.key = None;
        let (slot, end) = (SLOT, MemoryEnd::Drop);
        // As often there is nothing to drop.
        let _ = self.ask::<bool>(Op::MemoryEnd { slot, end });
        let of = if act == Act::Fork { FORK } else { WORKSPACE };
        let (found, made) = (self.objects(of), act.objects());
        match (act, done) {
            (Act::Wake, Some(true)) => assert_eq!(found, [], "memory that was woken"),
            (Act::Wake, Some(false)) => assert_eq!(found, made),
            (_, Some(true)) => assert_eq!(found, made),
            // Of a snapshot the disk's copy may be there; the row does not name it.
            (_, Some(false)) if act != Act::Snapshot => assert_eq!(found, []),
            _ => assert!(found.iter().all(|o| made.contains(o)), "{found:?}"),
        }
        self.close(FORK_SLOT);
        self.close(SLOT);
        self.world.assert_clean();
        assert!(self.volumes().len() <= 1, "an old casemate-volumes");
        match act {
            Act::Sleep | Act::Wake if !found.is_empty() => {
                let woken = self.all(Act::Wake, NEXT);
                if let Err(e) = woken {
                    // Its disk went on before the kill: from the disk, then.
                    let late = act == Act::Wake && done.is_none();
                    assert!(late && e.code == ErrorCode::MemoryStale, "{e:?}");
                    self.close(SLOT);
                    self.start();
                }
                assert_eq!(self.objects(WORKSPACE), []);
                return;
            }
            Act::Fork => {
                let workspace = FORK.parse().unwrap();
                self.ask::<bool>(Op::DiskErase { workspace }).unwrap();
                assert_eq!(self.objects(FORK), []);
            }
            _ => {
                for (purpose, id) in found {
                    let workspace = WORKSPACE.parse().unwrap();
                    self.ask::<bool>(Op::ObjectErase {
                        workspace,
                        purpose,
                        id,
                    })
                    .unwrap();
                }
                assert_eq!(self.objects(WORKSPACE), []);
            }
        }
        self.start();
        let state = status(self.warden()).slots[0].state;
        assert_eq!(state, SlotState::DiskAttached);
    }

    /// That snapshot is whole: a fork of it comes up.
    fn kept_is_whole(&mut self) {
        self.all(Act::Fork, KEPT).unwrap();
        self.settle(Act::Fork, Some(true));
    }
}

#[test]
fn i12_a_process_that_dies_between_two_steps_of_a_save_or_wake_leaves_it_done_or_undone() {
    in_netns(|| {
        let mut b = Bench::new();
        for (act, victim) in ACTS.into_iter().flat_map(|a| VICTIMS.map(|v| (a, v))) {
            let steps = act.steps();
            let mut killed = 0;
            for at in 0..=steps.len() {
                b.begin(act);
                for step in &steps[..at] {
                    b.step(act, *step, NEXT).unwrap();
                }
                println!("{act:?}: {victim:?} dies before {:?}", steps.get(at));
                killed += usize::from(b.kill(victim, act.slot()));
                let rest = &steps[at..];
                let done = rest
                    .iter()
                    .try_for_each(|step| b.step(act, *step, NEXT))
                    .is_ok();
                let last = at + 1 >= steps.len();
                b.settle(act, Some(done).filter(|done| *done || !last));
            }
            assert!(killed > 0 || matches!((act, victim), (Act::Fork, Victim::Image)));
        }
        b.kept_is_whole();
        b.close(SLOT);
        b.world.assert_clean();
    });
}

#[test]
fn i12_a_process_that_dies_in_the_middle_of_a_step_leaves_it_done_or_undone() {
    let mut seed = seed();
    println!("seed={seed}");
    in_netns(move || {
        let mut b = Bench::new();
        for (act, victim) in ACTS.into_iter().flat_map(|a| VICTIMS.map(|v| (a, v))) {
            let steps = act.steps();
            let at = next(&mut seed) as usize % steps.len();
            let moment = Duration::from_millis(next(&mut seed) % MOMENT_MS);
            println!("{act:?}: {victim:?} dies {moment:?} into {:?}", steps[at]);
            b.begin(act);
            for step in &steps[..at] {
                b.step(act, *step, NEXT).unwrap();
            }
            let killer = Killer::new(&b, victim, act.slot(), moment);
            let rest = &steps[at..];
            let done = rest
                .iter()
                .try_for_each(|step| b.step(act, *step, NEXT))
                .is_ok();
            killer.wait();
            b.settle(act, done.then_some(true));
        }
        b.kept_is_whole();
        b.close(SLOT);
        b.world.assert_clean();
    });
}

/// Kills from a thread of its own, once.
struct Killer(std::thread::JoinHandle<()>);

impl Killer {
    fn new(b: &Bench, victim: Victim, slot: u16, moment: Duration) -> Self {
        let bench = Bench {
            world: World::at(&b.world.dir),
            warden: b.warden.clone(),
            run: 0,
            key: None,
        };
        Self(std::thread::spawn(move || {
            std::thread::sleep(moment);
            bench.kill(victim, slot);
        }))
    }

    fn wait(self) {
        self.0.join().unwrap();
    }
}

/// What the next test does in a process of its own, until it dies where it was told to.
#[test]
#[ignore = "run by the test of warden's death"]
fn victim() {
    let Ok(dir) = std::env::var("CMT_DIR") else {
        return;
    };
    let told = std::env::var("CMT_DEATH").unwrap();
    let (act, at, step, run): (Act, usize, Option<Step>, u64) =
        serde_json::from_str(&told).unwrap();
    // Nothing is unwound, nothing dropped.
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let mut b = Bench::of(World::at(Path::new(&dir)), step, run);
    for step in &act.steps()[..at] {
        b.step(act, *step, NEXT).unwrap();
    }
    rustix::process::kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
}

/// Warden dies after `at` steps, or at an entry of its journal; another one takes its place.
fn warden_dies(b: &mut Bench, act: Act, at: usize, step: Option<Step>) {
    b.begin(act);
    b.warden = None;
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "victim"])
        .env("CMT_DIR", &b.world.dir)
        .env(
            "CMT_DEATH",
            serde_json::to_string(&(act, at, step, b.run)).unwrap(),
        )
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let how = if step.is_some() {
        Signal::ABORT
    } else {
        Signal::KILL
    };
    let died = (status.signal(), how.as_raw());
    assert_eq!(died.0, Some(died.1), "{act:?}: {at} steps, {step:?}");
    if let Some(step) = step {
        assert_eq!(b.record(act.slot()).unwrap().step, step);
    }
    // As many keys as it may have had.
    b.run += 20;
    b.warden = Some(b.world.open(None));
}

#[test]
fn i12_a_warden_that_dies_at_any_step_of_a_save_or_wake_leaves_it_done_or_undone() {
    in_netns(|| {
        let mut b = Bench::new();
        for act in ACTS {
            let steps = act.steps().len();
            for at in 1..=steps {
                println!("{act:?}: warden dies after {:?}", act.steps()[at - 1]);
                warden_dies(&mut b, act, at, None);
                b.settle(act, Some(at == steps));
            }
            for (step, done) in act.journal() {
                println!("{act:?}: warden dies at {step:?}");
                warden_dies(&mut b, act, steps, Some(*step));
                // Granted, its disk is another one, whether or not its memory is there.
                let late = act == Act::Wake && *step >= Step::DiskGrant && !done;
                b.settle(act, Some(*done).filter(|_| !late));
            }
        }
        b.kept_is_whole();
        b.close(SLOT);
        b.world.assert_clean();
    });
}

fn seed() -> u64 {
    let given = std::env::var("CASEMATE_SEED").ok();
    let given = given.and_then(|s| s.parse().ok());
    given.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() | 1)
}

/// xorshift64 (Marsaglia 2003).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
