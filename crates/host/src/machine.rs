//! What to do next for one workspace: a pure function of what is wanted and what is so.
//!
//! ```text
//!            claim          disk_open         net_set, key_release     disk_grant         attach
//!  Absent ──────────▶ Claimed ────────▶ Attested ──────────────────▶ Keyed ──────────▶ DiskIn ──────▶ Running
//!    ▲                   │                  │                          │                 │          │  ▲  │
//!    │                   └──────────────────┴────────┬─────────────────┴─────────────────┘     pause│  │  │ shutdown,
//!    │  close                                        │ any failure, a stop, a restart of host       ▼  │  │ VM gone
//!    └─────────────────────────────────────────── Down ◀───────────────────────────────────────  Paused  ◀┘
//! ```
//!
//! - A start needs a lease that was not used yet; without one the workspace rests where it is,
//!   and control, which sees it, asks for a lease under the owner's request or standing policy.
//! - A wish without a token state is of a workspace whose key and tokens are being made: its start
//!   goes on to an attested disk, beside that, and waits there.
//! - A VM whose start failed at any step is closed and never used again: it may hold an identity.
//! - Rules are set before the guest runs, and before anything else whenever they changed.
//! - A stop asks the guest (`shutdown`); a delete does not: its key is gone anyway.
//! - After a kill of host, whatever is between `Absent` and `Running` is found as `Down`: answers
//!   that were in flight are lost, and leases are never written to disk.
//!
//! The cost: a start that host's own death interrupts needs a new lease.
//!
//! Must never hold a clock, a socket or a lease.

use model::Power;

/// How far the workspace's VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vm {
    /// There is none.
    Absent,
    /// One without identity is ours.
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

/// What is so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// How far the VM is.
    pub vm: Vm,
    /// The rules in force are those wanted.
    pub net_current: bool,
    /// There is a lease that was not used.
    pub lease_usable: bool,
    /// The workspace has its key and its tokens.
    pub provisioned: bool,
    /// The disk file is gone.
    pub erased: bool,
    /// The VM refused to pause or resume for this generation.
    pub refused: bool,
}

/// The next thing to do. Each may be done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take a VM without identity, from the pool or by opening one.
    Claim,
    /// Spawn and attest the disk process.
    DiskOpen,
    /// Ask the KMS.
    KeyRelease,
    /// Give the disk process its sealed key.
    DiskGrant,
    /// Set the firewall triples.
    NetSet,
    /// Attach the disk, continue the guest, wait for its agent.
    Attach,
    /// Stop the virtual CPUs.
    Pause,
    /// Continue them.
    Resume,
    /// Ask the guest to end.
    Shutdown,
    /// End everything on the slot.
    Close,
    /// Remove the disk file.
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

        (Power::Stopped, Vm::Absent) => Step::Rest,
        (Power::Stopped, Vm::Running) => Step::Shutdown,
        // A stopped CPU can't say goodbye.
        (Power::Stopped, Vm::Paused) if !facts.refused => Step::Resume,
        (Power::Stopped, _) => Step::Close,

        (Power::Running, Vm::Absent) if facts.lease_usable => Step::Claim,
        (Power::Running | Power::Paused, Vm::Absent) => Step::Rest,
        (_, Vm::Claimed) => Step::DiskOpen,
        (_, Vm::Attested | Vm::DiskIn | Vm::Running | Vm::Paused) if !facts.net_current => {
            Step::NetSet
        }
        (_, Vm::Attested) if !facts.provisioned => Step::Rest,
        (_, Vm::Attested) => Step::KeyRelease,
        (_, Vm::Keyed) => Step::DiskGrant,
        (_, Vm::DiskIn) => Step::Attach,

        (Power::Running, Vm::Paused) if !facts.refused => Step::Resume,
        (Power::Paused, Vm::Running) if !facts.refused => Step::Pause,
        (_, Vm::Running | Vm::Paused) => Step::Rest,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const VMS: [Vm; 8] = [
        Vm::Absent,
        Vm::Claimed,
        Vm::Attested,
        Vm::Keyed,
        Vm::DiskIn,
        Vm::Running,
        Vm::Paused,
        Vm::Down,
    ];
    const POWERS: [Power; 4] = [
        Power::Running,
        Power::Paused,
        Power::Stopped,
        Power::Deleted,
    ];

    /// What a step that succeeds makes of the facts.
    fn done(step: Step, mut f: Facts) -> Facts {
        match step {
            Step::Claim => (f.vm, f.net_current) = (Vm::Claimed, false),
            Step::DiskOpen => f.vm = Vm::Attested,
            Step::KeyRelease => (f.vm, f.lease_usable) = (Vm::Keyed, false),
            Step::DiskGrant => f.vm = Vm::DiskIn,
            Step::NetSet => f.net_current = true,
            Step::Attach | Step::Resume => f.vm = Vm::Running,
            Step::Pause => f.vm = Vm::Paused,
            Step::Shutdown => f.vm = Vm::Down,
            Step::Close => f.vm = Vm::Absent,
            Step::Erase => f.erased = true,
            Step::Rest => {}
        }
        f
    }

    /// What a step that fails, or a kill of host after it, leaves behind.
    fn broken(step: Step, mut f: Facts) -> Facts {
        match step {
            Step::Claim | Step::Rest | Step::Erase => f.lease_usable = false,
            Step::Pause | Step::Resume => f.refused = true,
            Step::NetSet if matches!(f.vm, Vm::Running | Vm::Paused) => {}
            Step::Close => {}
            _ => (f.vm, f.lease_usable) = (Vm::Down, false),
        }
        f
    }

    fn facts() -> impl Strategy<Value = Facts> {
        let b = any::<bool>;
        (0..VMS.len(), b(), b(), b(), b(), b()).prop_map(|(vm, n, l, p, e, r)| Facts {
            vm: VMS[vm],
            net_current: n,
            lease_usable: l,
            provisioned: p,
            erased: e,
            refused: r,
        })
    }

    /// Runs to rest; panics if it never rests.
    fn settle(power: Power, mut f: Facts) -> (Facts, Vec<Step>) {
        let mut taken = Vec::new();
        for _ in 0..16 {
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
        let fresh = Facts {
            vm: Vm::Absent,
            net_current: true,
            lease_usable: true,
            provisioned: false,
            erased: false,
            refused: false,
        };
        let (end, taken) = settle(Power::Running, fresh);
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

    proptest! {
        #[test]
        fn every_wish_comes_to_rest(f in facts(), p in 0..POWERS.len()) {
            let power = POWERS[p];
            let (end, taken) = settle(power, f);
            match power {
                Power::Deleted => prop_assert!(end.vm == Vm::Absent && end.erased),
                Power::Stopped => prop_assert_eq!(end.vm, Vm::Absent),
                _ if end.vm == Vm::Attested => prop_assert!(!f.provisioned),
                Power::Running => prop_assert!(
                    matches!(end.vm, Vm::Running | Vm::Absent) || (end.vm == Vm::Paused && f.refused)),
                Power::Paused => prop_assert!(
                    matches!(end.vm, Vm::Paused | Vm::Absent) || (end.vm == Vm::Running && f.refused)),
            }
            // A guest never runs behind rules that are not the wanted ones.
            if matches!(end.vm, Vm::Running | Vm::Paused) {
                prop_assert!(end.net_current);
            }
            let at = |s| taken.iter().position(|t| *t == s);
            if let Some(attach) = at(Step::Attach) {
                prop_assert!(f.net_current && !taken.contains(&Step::Claim) || at(Step::NetSet).unwrap() < attach);
            }
            // And no key is asked for that is not made.
            prop_assert!(f.provisioned || !taken.contains(&Step::KeyRelease));
        }

        #[test]
        fn failures_at_any_steps_still_come_to_rest(
            f in facts(), p in 0..POWERS.len(), fails in proptest::collection::vec(any::<bool>(), 8),
        ) {
            let power = POWERS[p];
            let mut f = f;
            for fail in fails {
                let step = next(power, &f);
                f = if fail { broken(step, f) } else { done(step, f) };
            }
            settle(power, f);
        }

        #[test]
        fn nothing_starts_without_a_lease(f in facts(), p in 0..POWERS.len()) {
            let f = Facts { lease_usable: false, vm: Vm::Absent, ..f };
            prop_assert!(matches!(next(POWERS[p], &f), Step::Rest | Step::Erase));
        }

        #[test]
        fn what_is_to_be_gone_is_never_continued(f in facts()) {
            let step = next(Power::Deleted, &f);
            prop_assert!(matches!(step, Step::Close | Step::Erase | Step::Rest));
        }
    }
}
