//! Locks over ranges of sectors: readers share, a writer is alone.
//!
//! One slot per caller under way, found by a linear look: there are as many as threads. A caller
//! holds one range at a time, so nothing can lock up.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::limits::RANGES_MAX;

/// The ranges that are in use.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    slots: Mutex<[Option<Held>; RANGES_MAX]>,
    freed: Condvar,
}

#[derive(Debug)]
struct Held {
    sectors: Range<u64>,
    exclusive: bool,
}

impl Held {
    fn excludes(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive)
            && self.sectors.start < other.sectors.end
            && other.sectors.start < self.sectors.end
    }
}

impl Ranges {
    /// Waits until no other caller holds an overlapping range (two readers may).
    pub(crate) fn lock(&self, sectors: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let wanted = Held { sectors, exclusive };
        let mut slots = self.slots();
        loop {
            let free = slots.iter().position(Option::is_none);
            match free {
                Some(slot) if !slots.iter().flatten().any(|held| held.excludes(&wanted)) => {
                    slots[slot] = Some(wanted);
                    return RangeGuard { ranges: self, slot };
                }
                _ => {
                    slots = self
                        .freed
                        .wait(slots)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }

    fn slots(&self) -> MutexGuard<'_, [Option<Held>; RANGES_MAX]> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives its range back when dropped.
pub(crate) struct RangeGuard<'a> {
    ranges: &'a Ranges,
    slot: usize,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.ranges.slots()[self.slot] = None;
        self.ranges.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_overlaps_with_a_writer_exclude() {
        let held = |sectors, exclusive| Held { sectors, exclusive };
        assert!(held(0..4, true).excludes(&held(3..9, false)));
        assert!(held(3..4, false).excludes(&held(0..9, true)));
        assert!(!held(0..4, false).excludes(&held(0..4, false)));
        assert!(!held(0..4, true).excludes(&held(4..8, true)));
    }

    #[test]
    fn more_callers_than_slots_take_turns() {
        let (ranges, shared) = (Ranges::default(), Mutex::new(0u32));
        std::thread::scope(|scope| {
            for _ in 0..4 * RANGES_MAX {
                scope.spawn(|| {
                    let _range = ranges.lock(5..6, true);
                    // The range alone keeps the others out.
                    *shared.try_lock().expect("nobody else is in the range") += 1;
                });
            }
        });
        assert_eq!(
            *shared.lock().unwrap_or_else(PoisonError::into_inner),
            4 * RANGES_MAX as u32
        );
    }
}
