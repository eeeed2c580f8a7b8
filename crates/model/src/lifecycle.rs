//! What a clock and an exit do to a workspace, as functions of stored facts and a time.
//!
//! A time that is due is stored, not held: whoever reads the row after a kill decides the same.
//! Times are milliseconds since the epoch. A wall clock may jump; no jump makes one of these
//! wait longer than its own length again, or happen more than once.
//!
//! Must never read a clock.

use crate::RestartPolicy;

/// Unplanned restarts in a row before a workspace is left alone, where its owner set no bound.
pub const RESTARTS_MAX: u32 = 5;
/// Pause before the first unplanned restart, ms; doubles each time.
pub const RESTART_PAUSE_MS: u64 = 1_000;
/// Longest pause before an unplanned restart, ms.
pub const RESTART_PAUSE_MAX_MS: u64 = 300_000;
/// A workspace that ran this long starts counting anew, ms.
pub const RESTARTS_FORGIVEN_AFTER_MS: u64 = 600_000;

/// A workspace that should run ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Unplanned restarts before this one, in a row.
    pub restarts: u32,
    /// It did not shut down by itself.
    pub failed: bool,
    /// It ended for want of an unsealed KMS, which is no fault of its own.
    pub sealed: bool,
}

/// What follows an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterExit {
    /// It is started again.
    Restart {
        /// When.
        at_ms: u64,
        /// Unplanned restarts in a row, this one included where it counts.
        restarts: u32,
    },
    /// Its policy does not ask for a restart.
    Stay,
    /// It ended so often in a row that it is given up.
    GiveUp,
}

/// What follows an exit that is seen at `now_ms`.
#[must_use]
pub fn after_exit(
    policy: RestartPolicy,
    max_restarts: Option<u32>,
    exit: Exit,
    now_ms: u64,
) -> AfterExit {
    let wanted = match policy {
        RestartPolicy::No => false,
        RestartPolicy::Always | RestartPolicy::UnlessStopped => true,
        RestartPolicy::OnFailure => exit.failed,
    };
    if !wanted {
        return AfterExit::Stay;
    }
    if exit.sealed {
        return AfterExit::Restart {
            at_ms: now_ms.saturating_add(RESTART_PAUSE_MS),
            restarts: exit.restarts,
        };
    }
    match max_restarts.unwrap_or(RESTARTS_MAX) {
        0 => AfterExit::Stay,
        most if exit.restarts >= most => AfterExit::GiveUp,
        _ => AfterExit::Restart {
            at_ms: now_ms.saturating_add(restart_pause_ms(exit.restarts)),
            restarts: exit.restarts + 1,
        },
    }
}

/// The pause before a restart that follows `restarts` others, ms.
#[must_use]
pub fn restart_pause_ms(restarts: u32) -> u64 {
    // 2^9 s is beyond the longest.
    (RESTART_PAUSE_MS << restarts.min(9)).min(RESTART_PAUSE_MAX_MS)
}

/// Whether a restart is due. A time further away than any pause was set by a clock that has
/// gone back since: it is due.
#[must_use]
pub fn restart_due(at_ms: u64, now_ms: u64) -> bool {
    now_ms >= at_ms || at_ms - now_ms > RESTART_PAUSE_MAX_MS
}

/// Whether a workspace that is up since `since_ms` starts counting its restarts anew.
#[must_use]
pub fn restarts_forgiven(since_ms: u64, now_ms: u64) -> bool {
    now_ms.saturating_sub(since_ms) >= RESTARTS_FORGIVEN_AFTER_MS
}

/// How long a workspace was not used at least, ms: the machine's monotonic `idle_ms`, or the time
/// since the last ping if that is shorter. A ping of the future is of a clock that has gone back
/// since, and says nothing.
#[must_use]
pub fn idle_ms(idle_ms: u64, pinged_ms: u64, now_ms: u64) -> u64 {
    match now_ms.checked_sub(pinged_ms) {
        Some(since_ping) => idle_ms.min(since_ping),
        None => idle_ms,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000_000;

    fn exit(restarts: u32) -> Exit {
        Exit {
            restarts,
            failed: true,
            sealed: false,
        }
    }

    #[test]
    fn policies_restart_what_they_name() {
        use RestartPolicy::{Always, No, OnFailure, UnlessStopped};
        let clean = Exit {
            failed: false,
            ..exit(0)
        };
        let restarts = |policy, exit| {
            matches!(
                after_exit(policy, None, exit, NOW),
                AfterExit::Restart { .. }
            )
        };
        for (policy, after_failure, after_shutdown) in [
            (No, false, false),
            (OnFailure, true, false),
            (Always, true, true),
            (UnlessStopped, true, true),
        ] {
            assert_eq!(restarts(policy, exit(0)), after_failure, "{policy:?}");
            assert_eq!(restarts(policy, clean), after_shutdown, "{policy:?}");
        }
    }

    #[test]
    fn pauses_double_up_to_their_bound() {
        let pauses: Vec<u64> = (0..11).map(|n| restart_pause_ms(n) / 1_000).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(restart_pause_ms(u32::MAX), RESTART_PAUSE_MAX_MS);
    }

    #[test]
    fn a_loop_of_crashes_ends_at_its_bound() {
        let always = |max, n| after_exit(RestartPolicy::Always, max, exit(n), NOW);
        assert_eq!(
            always(Some(2), 1),
            AfterExit::Restart {
                at_ms: NOW + 2_000,
                restarts: 2
            }
        );
        assert_eq!(always(Some(2), 2), AfterExit::GiveUp);
        assert_eq!(always(None, RESTARTS_MAX), AfterExit::GiveUp);
        assert_eq!(always(Some(0), 0), AfterExit::Stay);
    }

    #[test]
    fn a_sealed_kms_uses_up_nothing() {
        let sealed = Exit {
            sealed: true,
            ..exit(7)
        };
        let after = after_exit(RestartPolicy::Always, Some(1), sealed, NOW);
        assert_eq!(
            after,
            AfterExit::Restart {
                at_ms: NOW + RESTART_PAUSE_MS,
                restarts: 7
            }
        );
    }

    #[test]
    fn a_clock_that_went_back_keeps_nothing_waiting() {
        assert!(restart_due(NOW, NOW) && restart_due(NOW, NOW + 1));
        assert!(!restart_due(NOW + 1_000, NOW));
        assert!(restart_due(NOW + 86_400_000, NOW));
        assert_eq!(idle_ms(9_000, NOW - 5_000, NOW), 5_000);
        assert_eq!(idle_ms(3_000, NOW - 5_000, NOW), 3_000);
        assert_eq!(idle_ms(3_000, NOW + 86_400_000, NOW), 3_000);
    }

    proptest! {
        /// Any run of crashes ends, and its pauses never shrink nor pass their bound.
        #[test]
        fn restarts_are_bounded(max in 0_u32..=1_000, now in 0..u64::MAX / 2) {
            let mut restarts = 0;
            let mut pause = 0;
            while let AfterExit::Restart { at_ms, restarts: n } =
                after_exit(RestartPolicy::Always, Some(max), exit(restarts), now)
            {
                prop_assert_eq!(n, restarts + 1);
                prop_assert!(n <= max && at_ms - now >= pause);
                prop_assert!(at_ms - now <= RESTART_PAUSE_MAX_MS);
                (pause, restarts) = (at_ms - now, n);
            }
            prop_assert_eq!(restarts, max);
        }

        #[test]
        fn what_is_not_due_becomes_due(at in any::<u64>(), now in any::<u64>()) {
            prop_assert!(restart_due(at, now) || restart_due(at, now.saturating_add(RESTART_PAUSE_MAX_MS)));
        }

        #[test]
        fn idle_is_never_longer_than_the_machine_says(a in any::<u64>(), b in any::<u64>(), c in any::<u64>()) {
            prop_assert!(idle_ms(a, b, c) <= a);
        }
    }
}
