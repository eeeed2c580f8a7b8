//! What to do next for one workspace: a pure function of what is wanted and what is so.
//!
//! ```text
//!            claim          disk_open         net_set, key_release     disk_grant         attach
//!  Absent ──────────▶ Claimed ────────▶ Attested ──────────────────▶ Keyed ──────────▶ DiskIn ──────▶ Running
//!    ▲ │                 ▲                  │                          │                 │          │  ▲  │
//!    │ │ memory_open     │ memory_grant     │                          │                 │     pause│  │  │ shutdown,
//!    │ └──▶ MemoryAttested ─▶ MemoryKeyed   │ any failure, a stop, a restart of host     │          ▼  │  │ VM gone
//!    │  close      └──────────────┴─────────┴────────┬─────────────────┴─────────────────┘       Paused  ◀┘
//!    └─────────────────────────────────────────── Down                                              │
//!                                                                                                   │ save
//!  of a paused VM, its disk first where it is a snapshot:                                           ▼
//!   copy_open ─▶ CopyAttested ─▶ CopyKeyed ─▶ memory_open ─▶ Attested ─▶ Keyed ─▶ Ready ─▶ Written ─▶ save_end
//!  of a running one, an archive made or put back: memory_open ─▶ Attested ─▶ Keyed ─▶ Ready ─▶ Written ─▶ save_end
//! ```
//!
//! - A start needs a lease that was not used yet; without one the workspace rests where it is,
//!   and control, which sees it, asks for a lease under the owner's request or standing policy.
//! - What a lease opens says what it is for: a start, a wake (or restore), a sleep, a snapshot,
//!   an archive.
//! - A wish without a token state is of a workspace whose key and tokens are being made: its start
//!   goes on to an attested disk, beside that, and waits there.
//! - A VM whose start failed at any step is closed and never used again: it may hold an identity.
//! - Rules are set before the guest runs, and before anything else whenever they changed. Those of a
//!   guest that wakes are set once it is up: it has reseeded and has another TLS key by then, and
//!   until then no packet passes its slot, either way.
//! - A stop asks the guest (`shutdown`); a delete does not: its key is gone anyway.
//! - A sleep or snapshot that fails leaves the workspace as it was: what was begun is dropped, and
//!   the guest goes on. A wake that fails before its disk is granted leaves it asleep.
//! - Archives and snapshots that are not wanted are removed before the workspace rests, and before a
//!   snapshot is begun: by then the KMS knows the one before it for the one that stands.
//! - Saved memory beside a start from the disk is stale: it is removed before that start.
//! - After a kill of host, whatever is between `Absent` and `Running` is found as `Down`, and what
//!   was being saved is dropped: answers that were in flight are lost, and leases are never written
//!   to disk.
//!
//! The cost: a start or a save that host's own death interrupts needs a new lease.
//!
//! Must never hold a clock, a socket or a lease.

use model::Power;

/// How far the workspace's VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vm {
    /// There is none.
    Absent,
    /// The process that serves its saved memory is attested and waits for its key.
    MemoryAttested,
    /// That key is in hand.
    MemoryKeyed,
    /// One without identity, or on saved memory, is ours.
    Claimed,
    /// The disk process is attested and waits for its key.
    Attested,
    /// The sealed key is in hand.
    Keyed,
    /// The VMM has the disk.
    DiskIn,
    /// The agent is up.
    Running,
    /// Memory kept, no CPU.
    Paused,
    /// Over, in whatever way; to be closed.
    Down,
}

/// What a lease is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// A start from the disk, or from a copy of a snapshot's.
    Start,
    /// A start from saved memory.
    Wake,
    /// Memory to disk, and the VM is over.
    Sleep,
    /// Memory and disk, copied.
    Snapshot,
    /// A tar of its files, while it runs on.
    Archive,
    /// The files of such a tar, put back.
    Unarchive,
}

/// How far a save is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The disk process is attested for the copy of its disk.
    CopyAttested,
    /// The copy's key is in hand.
    CopyKeyed,
    /// The copy is there.
    Copied,
    /// The process for memory, or for an archive, is attested.
    Attested,
    /// Its key is in hand.
    Keyed,
    /// vmctl has the file.
    Ready,
    /// Memory, or the archive, is in it; or it is put back.
    Written,
}

/// What is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// How far the VM is.
    pub vm: Vm,
    /// What is being saved of it, and how far that is.
    pub saving: Option<(Act, Stage)>,
    /// The rules in force are those wanted.
    pub net_current: bool,
    /// It comes up from saved memory.
    pub waking: bool,
    /// What a lease that was not used is for.
    pub lease: Option<Act>,
    /// The workspace has its key and its tokens.
    pub provisioned: bool,
    /// The disk file is gone.
    pub erased: bool,
    /// Its memory is saved here: it is asleep.
    pub memory: bool,
    /// The VM refused to pause or resume for this generation.
    pub refused: bool,
    /// It could not be saved for this generation.
    pub unsaved: bool,
    /// No archive and no snapshot is here but those that are wanted.
    pub swept: bool,
}

/// The next thing to do. Each may be done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take a VM without identity, from the pool or by opening one.
    Claim,
    /// Spawn and attest the process that serves saved memory, on a free slot.
    MemoryOpen,
    /// Ask the KMS for saved memory's key.
    MemoryKey,
    /// Give it to that process: the VM is there, on its memory.
    MemoryGrant,
    /// Spawn and attest the disk process.
    DiskOpen,
    /// Ask the KMS.
    KeyRelease,
    /// Give the disk process its sealed key.
    DiskGrant,
    /// Set the firewall triples.
    NetSet,
    /// Attach the disk (or go on with saved memory), continue the guest, wait for its agent.
    Attach,
    /// Stop the virtual CPUs.
    Pause,
    /// Continue them.
    Resume,
    /// The next step of a save.
    Save(Act, Option<Stage>),
    /// What is being saved is given up.
    SaveDrop,
    /// Saved memory is removed.
    Forget,
    /// Archives and snapshots that are not wanted are removed.
    Sweep,
    /// Ask the guest to end.
    Shutdown,
    /// End everything on the slot.
    Close,
    /// Remove the disk file and everything beside it.
    Erase,
    /// Nothing: wait for something to change.
    Rest,
}

/// The next step towards `power`.
#[must_use]
pub fn next(power: Power, facts: &Facts) -> Step {
    match (power, facts.vm) {
        (_, Vm::Down) => Step::Close,

        (Power::Deleted, Vm::Absent) if facts.erased => Step::Rest,
        (Power::Deleted, Vm::Absent) => Step::Erase,
        (Power::Deleted, _) => Step::Close,

        (_, Vm::Running | Vm::Paused) => up(power, facts),
        (_, Vm::Absent) => absent(power, facts),

        (Power::Stopped, _) => Step::Close,
        // Past this point the saved memory is used up: it goes on, and is put to sleep anew.
        (Power::Asleep, Vm::MemoryAttested | Vm::MemoryKeyed | Vm::Claimed | Vm::Attested) => {
            Step::Close
        }

        (_, Vm::MemoryAttested) => Step::MemoryKey,
        (_, Vm::MemoryKeyed) => Step::MemoryGrant,
        (_, Vm::Claimed) => Step::DiskOpen,
        (_, Vm::Attested | Vm::DiskIn) if !facts.net_current && !facts.waking => Step::NetSet,
        (_, Vm::Attested) if !facts.provisioned => Step::Rest,
        (_, Vm::Attested) => Step::KeyRelease,
        (_, Vm::Keyed) => Step::DiskGrant,
        (_, Vm::DiskIn) => Step::Attach,
    }
}

/// The next step of a workspace without a VM.
fn absent(power: Power, facts: &Facts) -> Step {
    match (power, facts.lease) {
        (Power::Stopped, _) if facts.memory => Step::Forget,
        (Power::Running | Power::Paused, Some(Act::Wake)) => Step::MemoryOpen,
        (Power::Running | Power::Paused, Some(Act::Start)) if facts.memory => Step::Forget,
        (Power::Running | Power::Paused, Some(Act::Start)) => Step::Claim,
        _ => rest(facts),
    }
}

/// Nothing, once what is not wanted is gone.
fn rest(facts: &Facts) -> Step {
    if facts.swept { Step::Rest } else { Step::Sweep }
}

/// The next step of a workspace whose guest is up.
fn up(power: Power, facts: &Facts) -> Step {
    let paused = facts.vm == Vm::Paused;
    if let Some((act, stage)) = facts.saving {
        let called_off = match act {
            Act::Sleep => power != Power::Asleep || !paused,
            Act::Archive | Act::Unarchive => power != Power::Running || paused,
            _ => !paused,
        };
        if called_off || facts.unsaved {
            return Step::SaveDrop;
        }
        return Step::Save(act, Some(stage));
    }
    if !facts.net_current && power != Power::Stopped {
        return Step::NetSet;
    }
    let act = facts.lease.filter(|_| !facts.unsaved && !facts.refused);
    let saves = match (power, act) {
        (Power::Asleep, Some(Act::Sleep)) => act,
        (Power::Running | Power::Paused | Power::Stopped, Some(Act::Snapshot)) => act,
        (Power::Running, Some(Act::Archive | Act::Unarchive)) => act,
        _ => None,
    };
    match (power, saves) {
        (_, Some(Act::Archive | Act::Unarchive)) if paused => Step::Resume,
        (_, Some(act @ (Act::Archive | Act::Unarchive))) => Step::Save(act, None),
        (_, Some(Act::Snapshot)) if !facts.swept => Step::Sweep,
        (_, Some(act)) if paused => Step::Save(act, None),
        (_, Some(_)) => Step::Pause,
        // A stopped CPU can't say goodbye.
        (Power::Stopped, None) if paused && !facts.refused => Step::Resume,
        (Power::Stopped, None) if paused => Step::Close,
        (Power::Stopped, None) => Step::Shutdown,
        (Power::Running | Power::Asleep, None) if paused && !facts.refused => Step::Resume,
        (Power::Paused, None) if !paused && !facts.refused => Step::Pause,
        _ => rest(facts),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const VMS: [Vm; 10] = [
        Vm::Absent,
        Vm::MemoryAttested,
        Vm::MemoryKeyed,
        Vm::Claimed,
        Vm::Attested,
        Vm::Keyed,
        Vm::DiskIn,
        Vm::Running,
        Vm::Paused,
        Vm::Down,
    ];
    const STAGES: [Stage; 7] = [
        Stage::CopyAttested,
        Stage::CopyKeyed,
        Stage::Copied,
        Stage::Attested,
        Stage::Keyed,
        Stage::Ready,
        Stage::Written,
    ];
    const ACTS: [Act; 6] = [
        Act::Start,
        Act::Wake,
        Act::Sleep,
        Act::Snapshot,
        Act::Archive,
        Act::Unarchive,
    ];
    const POWERS: [Power; 5] = [
        Power::Running,
        Power::Paused,
        Power::Asleep,
        Power::Stopped,
        Power::Deleted,
    ];

    /// What follows a stage of a save; none: it is done.
    fn stage_after(act: Act, stage: Option<Stage>) -> Option<Stage> {
        match stage {
            None if act == Act::Snapshot => Some(Stage::CopyAttested),
            Some(Stage::CopyAttested) => Some(Stage::CopyKeyed),
            Some(Stage::CopyKeyed) => Some(Stage::Copied),
            None | Some(Stage::Copied) => Some(Stage::Attested),
            Some(Stage::Attested) => Some(Stage::Keyed),
            Some(Stage::Keyed) => Some(Stage::Ready),
            Some(Stage::Ready) => Some(Stage::Written),
            Some(Stage::Written) => None,
        }
    }

    /// What a step that succeeds makes of the facts.
    fn done(step: Step, mut f: Facts) -> Facts {
        match step {
            Step::Claim => (f.vm, f.net_current) = (Vm::Claimed, false),
            Step::MemoryOpen => {
                (f.vm, f.net_current, f.waking) = (Vm::MemoryAttested, false, true);
            }
            Step::MemoryKey => f.vm = Vm::MemoryKeyed,
            Step::MemoryGrant => f.vm = Vm::Claimed,
            Step::DiskOpen => f.vm = Vm::Attested,
            Step::KeyRelease => (f.vm, f.lease) = (Vm::Keyed, None),
            Step::DiskGrant => (f.vm, f.memory) = (Vm::DiskIn, false),
            Step::NetSet => f.net_current = true,
            Step::Attach => (f.vm, f.waking) = (Vm::Running, false),
            Step::Resume => f.vm = Vm::Running,
            Step::Pause => f.vm = Vm::Paused,
            Step::Save(act, stage) => {
                f.lease = None;
                f.saving = stage_after(act, stage).map(|s| (act, s));
                if f.saving.is_none() && act == Act::Sleep {
                    (f.vm, f.memory) = (Vm::Absent, true);
                }
            }
            Step::SaveDrop => f.saving = None,
            Step::Forget => f.memory = false,
            Step::Sweep => f.swept = true,
            Step::Shutdown => (f.vm, f.saving) = (Vm::Down, None),
            Step::Close => (f.vm, f.saving, f.waking) = (Vm::Absent, None, false),
            Step::Erase => (f.erased, f.memory) = (true, false),
            Step::Rest => {}
        }
        f
    }

    /// What a step that fails, or a kill of host after it, leaves behind.
    fn broken(step: Step, mut f: Facts) -> Facts {
        match step {
            Step::Claim | Step::MemoryOpen | Step::Rest | Step::Erase => f.lease = None,
            Step::Pause | Step::Resume => f.refused = true,
            Step::NetSet if matches!(f.vm, Vm::Running | Vm::Paused) => {}
            Step::Save(..) => (f.unsaved, f.lease) = (true, None),
            Step::SaveDrop => f.saving = None,
            Step::Close | Step::Forget | Step::Sweep => {}
            _ => (f.vm, f.lease) = (Vm::Down, None),
        }
        f
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let b = any::<bool>;
        let saving = proptest::option::of((2..ACTS.len(), 0..STAGES.len()));
        let lease = proptest::option::of(0..ACTS.len());
        let bits = (b(), b(), b(), b(), b(), b(), b(), b());
        (0..VMS.len(), saving, lease, bits).prop_map(
            |(vm, saving, lease, (n, p, e, m, r, u, a, w))| {
                let vm = VMS[vm];
                let up = matches!(vm, Vm::Running | Vm::Paused);
                let waking = match vm {
                    Vm::Absent | Vm::Running | Vm::Paused => false,
                    Vm::MemoryAttested | Vm::MemoryKeyed => true,
                    _ => w,
                };
                Facts {
                    vm,
                    saving: saving.map(|(a, s)| (ACTS[a], STAGES[s])).filter(|_| up),
                    // A slot that was made for saved memory begins closed.
                    net_current: n && !waking,
                    waking,
                    lease: lease.map(|a| ACTS[a]),
                    provisioned: p,
                    erased: e,
                    // A guest that is up has used its memory up.
                    memory: m && !up,
                    refused: r,
                    unsaved: u,
                    swept: a,
                }
            },
        )
    }

    fn fresh(lease: Act) -> Facts {
        Facts {
            vm: Vm::Absent,
            saving: None,
            net_current: true,
            waking: false,
            lease: Some(lease),
            provisioned: true,
            erased: false,
            memory: false,
            refused: false,
            unsaved: false,
            swept: true,
        }
    }

    /// Runs to rest; panics if it never rests.
    fn settle(power: Power, mut f: Facts) -> (Facts, Vec<Step>) {
        let mut taken = Vec::new();
        for _ in 0..24 {
            match next(power, &f) {
                Step::Rest => return (f, taken),
                step => {
                    taken.push(step);
                    f = done(step, f);
                }
            }
        }
        panic!("{power:?} never rests: {taken:?}");
    }

    #[test]
    fn a_start_takes_each_step_once_and_in_order() {
        let unprovisioned = Facts {
            provisioned: false,
            ..fresh(Act::Start)
        };
        let (end, taken) = settle(Power::Running, unprovisioned);
        assert_eq!(
            end.vm,
            Vm::Attested,
            "no key is asked for before it is made"
        );
        assert_eq!(taken, [Step::Claim, Step::DiskOpen, Step::NetSet]);
        let provisioned = Facts {
            provisioned: true,
            ..end
        };
        let (end, taken) = settle(Power::Running, provisioned);
        assert_eq!(end.vm, Vm::Running);
        assert_eq!(taken, [Step::KeyRelease, Step::DiskGrant, Step::Attach]);
    }

    #[test]
    fn a_sleep_and_a_wake_take_each_step_once_and_in_order() {
        let up = Facts {
            vm: Vm::Running,
            ..fresh(Act::Sleep)
        };
        let save = |act, stage| Step::Save(act, stage);
        let (asleep, taken) = settle(Power::Asleep, up);
        assert_eq!((asleep.vm, asleep.memory), (Vm::Absent, true));
        assert_eq!(
            taken,
            [
                Step::Pause,
                save(Act::Sleep, None),
                save(Act::Sleep, Some(Stage::Attested)),
                save(Act::Sleep, Some(Stage::Keyed)),
                save(Act::Sleep, Some(Stage::Ready)),
                save(Act::Sleep, Some(Stage::Written)),
            ]
        );
        let wakes = Facts {
            lease: Some(Act::Wake),
            ..asleep
        };
        let (awake, taken) = settle(Power::Running, wakes);
        assert_eq!((awake.vm, awake.memory), (Vm::Running, false));
        assert_eq!(
            taken,
            [
                Step::MemoryOpen,
                Step::MemoryKey,
                Step::MemoryGrant,
                Step::DiskOpen,
                Step::KeyRelease,
                Step::DiskGrant,
                Step::Attach,
                Step::NetSet,
            ]
        );
        // A start from the disk makes the memory stale: it goes first.
        let starts = Facts {
            lease: Some(Act::Start),
            ..asleep
        };
        let (_, taken) = settle(Power::Running, starts);
        assert_eq!(taken[..2], [Step::Forget, Step::Claim]);
    }

    #[test]
    fn a_snapshot_copies_the_disk_before_memory_and_leaves_what_was_wanted() {
        for (power, last, vm) in [
            (Power::Running, Step::Resume, Vm::Running),
            (Power::Stopped, Step::Close, Vm::Absent),
        ] {
            let up = Facts {
                vm: Vm::Running,
                ..fresh(Act::Snapshot)
            };
            let (end, taken) = settle(power, up);
            assert_eq!((end.vm, taken.last()), (vm, Some(&last)));
            let saves = taken.iter().filter(|s| matches!(s, Step::Save(..)));
            assert_eq!(saves.count(), 8, "{taken:?}");
            assert_eq!(taken[..2], [Step::Pause, Step::Save(Act::Snapshot, None)]);
        }
        let up = Facts {
            vm: Vm::Running,
            swept: false,
            ..fresh(Act::Snapshot)
        };
        let (end, taken) = settle(Power::Paused, up);
        assert_eq!((end.vm, taken[0]), (Vm::Paused, Step::Sweep));
    }

    #[test]
    fn an_archive_is_made_of_a_guest_that_runs_and_goes_on() {
        let up = Facts {
            vm: Vm::Running,
            ..fresh(Act::Archive)
        };
        let save = |stage| Step::Save(Act::Archive, stage);
        let taken = [
            save(None),
            save(Some(Stage::Attested)),
            save(Some(Stage::Keyed)),
            save(Some(Stage::Ready)),
            save(Some(Stage::Written)),
        ];
        assert_eq!(settle(Power::Running, up).1, taken);
        // What is stopped or paused meanwhile has none.
        let writes = Facts {
            saving: Some((Act::Archive, Stage::Ready)),
            ..up
        };
        for power in [Power::Stopped, Power::Paused, Power::Asleep] {
            let (end, taken) = settle(
                power,
                Facts {
                    lease: None,
                    ..writes
                },
            );
            assert_eq!(taken[0], Step::SaveDrop, "{power:?}");
            assert_eq!(end.saving, None);
            let saves = |s: &&Step| matches!(s, Step::Save(..));
            assert_eq!(settle(power, up).1.iter().filter(saves).count(), 0);
        }
    }

    proptest! {
        #[test]
        fn every_wish_comes_to_rest(f in facts(), p in 0..POWERS.len()) {
            let power = POWERS[p];
            let (end, taken) = settle(power, f);
            let is_up = matches!(end.vm, Vm::Running | Vm::Paused);
            match power {
                Power::Deleted => prop_assert!(end.vm == Vm::Absent && end.erased),
                Power::Stopped => prop_assert!(end.vm == Vm::Absent && !end.memory),
                _ if end.vm == Vm::Attested => prop_assert!(!f.provisioned),
                Power::Running => prop_assert!(
                    matches!(end.vm, Vm::Running | Vm::Absent) || (end.vm == Vm::Paused && f.refused)),
                Power::Paused => prop_assert!(
                    matches!(end.vm, Vm::Paused | Vm::Absent) || (end.vm == Vm::Running && f.refused)),
                // What can't be saved goes on as it was.
                Power::Asleep => prop_assert!(end.vm == Vm::Absent || is_up),
            }
            // A guest never runs behind rules that are not the wanted ones.
            if is_up {
                prop_assert!(end.net_current && end.saving.is_none());
            }
            let deleted = power == Power::Deleted;
            prop_assert!(end.swept || deleted || end.vm == Vm::Attested);
            let at = |s| taken.iter().position(|t| *t == s);
            if let Some(attach) = at(Step::Attach) {
                let wakes = f.waking || taken.contains(&Step::MemoryGrant);
                let set = at(Step::NetSet);
                let claimed = taken.contains(&Step::Claim);
                prop_assert!(wakes || f.net_current && !claimed || set.unwrap() < attach);
            }
            // And no key is asked for that is not made.
            prop_assert!(f.provisioned || !taken.contains(&Step::KeyRelease));
            // A slot is taken once, and memory that is there is never passed over in silence.
            let claims = |s: &&Step| matches!(s, Step::Claim | Step::MemoryOpen);
            prop_assert!(taken.iter().filter(claims).count() <= 1);
            if f.memory && taken.contains(&Step::Claim) {
                prop_assert!(at(Step::Forget) < at(Step::Claim));
            }
        }

        /// Whatever fails on the way, no packet passes to or from a guest that was woken before it
        /// said that it is up, which it says when it has reseeded and has another TLS key; and none
        /// to or from one that started before its own rules stand.
        #[test]
        fn i28_no_packet_passes_a_woken_guest_before_it_has_reseeded(
            f in facts(), p in 0..POWERS.len(), fails in proptest::collection::vec(any::<bool>(), 24),
        ) {
            let mut f = f;
            for fail in fails {
                let step = next(POWERS[p], &f);
                prop_assert!(!(f.waking && step == Step::NetSet), "{f:?}");
                prop_assert!(step != Step::Attach || f.waking != f.net_current, "{f:?}");
                f = if fail { broken(step, f) } else { done(step, f) };
            }
        }

        #[test]
        fn failures_at_any_steps_still_come_to_rest(
            f in facts(), p in 0..POWERS.len(), fails in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let power = POWERS[p];
            let mut f = f;
            for fail in fails {
                let step = next(power, &f);
                f = if fail { broken(step, f) } else { done(step, f) };
            }
            settle(power, f);
        }

        /// Whatever fails on the way, saved memory stays until its disk is granted, a start from the
        /// disk was asked for, or the owner stops or deletes.
        #[test]
        fn memory_is_never_lost_by_a_failure(
            wakes: bool, fails in proptest::collection::vec(any::<bool>(), 12),
        ) {
            let mut f = Facts { memory: true, ..fresh(Act::Wake) };
            let power = if wakes { Power::Running } else { Power::Asleep };
            let mut granted = false;
            for fail in fails {
                let step = next(power, &f);
                granted |= step == Step::DiskGrant && !fail;
                f = if fail { broken(step, f) } else { done(step, f) };
                prop_assert!(f.memory || granted);
            }
        }

        /// A save that fails anywhere leaves a guest that goes on.
        #[test]
        fn a_failed_save_leaves_a_running_guest(
            n in 2..ACTS.len(), at in 0_usize..8,
        ) {
            let act = ACTS[n];
            let power = if act == Act::Sleep { Power::Asleep } else { Power::Running };
            let mut f = Facts { vm: Vm::Running, ..fresh(act) };
            for _ in 0..=at {
                f = done(next(power, &f), f);
            }
            let step = next(power, &f);
            if matches!(step, Step::Save(..)) {
                let (end, taken) = settle(power, broken(step, f));
                prop_assert_eq!(end.vm, Vm::Running);
                prop_assert!(!taken.iter().any(|s| matches!(s, Step::Save(..) | Step::Close)));
            }
        }

        #[test]
        fn nothing_starts_without_a_lease(f in facts(), p in 0..POWERS.len()) {
            let f = Facts { lease: None, vm: Vm::Absent, ..f };
            let still = [Step::Rest, Step::Erase, Step::Forget, Step::Sweep];
            prop_assert!(still.contains(&next(POWERS[p], &f)));
        }

        #[test]
        fn what_is_to_be_gone_is_never_continued(f in facts()) {
            let step = next(Power::Deleted, &f);
            prop_assert!(matches!(step, Step::Close | Step::Erase | Step::Rest));
        }
    }
}
