//! Rate limits as pure functions of time (DSK-5).
//!
//! A bucket fills at its rate up to a burst of [`BURST_NS`] worth. A request takes its whole cost
//! at once and waits until the bucket is out of debt, so what is let through in any time `t` is at
//! most `rate * (t + BURST_NS)`, exactly, whatever the sizes are. Time that runs backwards counts
//! as no time.
//!
//! [`Limiter`] is two buckets behind one lock, shared by the threads; the caller sleeps, before
//! the I/O and holding nothing.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::limits::BURST_NS;

const NS_PER_S: i128 = 1_000_000_000;

/// One rate. Its level counts unit-nanoseconds (a unit costs 10^9 of them), so nothing is rounded.
#[derive(Debug, Clone)]
pub struct Bucket {
    rate: i128,
    level: i128,
    filled_at_ns: u64,
}

impl Bucket {
    /// A full bucket of `rate_per_s` units/s (at least 1) at `now_ns`.
    #[must_use]
    pub fn new(rate_per_s: u64, now_ns: u64) -> Self {
        let rate = i128::from(rate_per_s.max(1));
        Self {
            rate,
            level: rate * i128::from(BURST_NS),
            filled_at_ns: now_ns,
        }
    }

    /// Takes `units` and answers how long to wait before using them, ns.
    pub fn take(&mut self, now_ns: u64, units: u64) -> u64 {
        let passed = i128::from(now_ns.saturating_sub(self.filled_at_ns));
        self.filled_at_ns = self.filled_at_ns.max(now_ns);
        let full = self.rate * i128::from(BURST_NS);
        let filled = self
            .level
            .saturating_add(self.rate.saturating_mul(passed))
            .min(full);
        self.level = filled.saturating_sub(i128::from(units) * NS_PER_S);
        let debt = self.level.min(0).saturating_neg();
        // Rounded up: never early.
        u64::try_from(debt.saturating_add(self.rate - 1) / self.rate).unwrap_or(u64::MAX)
    }
}

/// Bytes/s and operations/s of one disk.
#[derive(Debug)]
pub struct Limiter {
    epoch: Instant,
    buckets: Mutex<(Bucket, Bucket)>,
}

impl Limiter {
    /// Both buckets full.
    #[must_use]
    pub fn new(bytes_per_s: u64, ops_per_s: u64) -> Self {
        let buckets = (Bucket::new(bytes_per_s, 0), Bucket::new(ops_per_s, 0));
        Self {
            epoch: Instant::now(),
            buckets: Mutex::new(buckets),
        }
    }

    /// Begins anew at these rates, with both buckets full.
    pub fn set(&self, bytes_per_s: u64, ops_per_s: u64) {
        let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        *self.buckets.lock().unwrap_or_else(PoisonError::into_inner) =
            (Bucket::new(bytes_per_s, now), Bucket::new(ops_per_s, now));
    }

    /// Takes one operation of `bytes` and answers how long to wait before doing it.
    #[must_use = "the caller waits"]
    pub fn take(&self, bytes: u64) -> Duration {
        let now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut both = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = both.0.take(now, bytes).max(both.1.take(now, 1));
        Duration::from_nanos(wait)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = Bucket::new(1000, 0);
        assert_eq!(bucket.take(0, 100), 0, "the burst");
        assert_eq!(bucket.take(0, 1), 1_000_000);
        assert_eq!(
            bucket.take(1_000_000, 1),
            1_000_000,
            "the first debt is paid, the next waits"
        );
        assert_eq!(
            bucket.take(10_000_000_000, 100),
            0,
            "idle time fills it again"
        );
        assert_eq!(
            bucket.take(10_000_000_000, 1),
            1_000_000,
            "but not above the burst"
        );
    }

    proptest! {
        /// For any requests at any times: within each window that begins and ends with a request,
        /// no more than rate * (window + burst) is let through; and a request waits only as long
        /// as the debt takes.
        #[test]
        fn never_more_than_the_rate_and_the_burst(
            rate in 1u64..1 << 40,
            steps in proptest::collection::vec((0u64..3_000_000_000, 0u64..1 << 21), 1..60),
        ) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now, mut let_through) = (0u64, Vec::new());
            for (gap, units) in steps {
                now += gap;
                let wait = bucket.take(now, units);
                let at = u128::from(now) + u128::from(wait);
                let_through.push((at, u128::from(units)));
                prop_assert!(wait == 0 || u128::from(wait - 1) * u128::from(rate)
                    < let_through.iter().map(|(_, units)| units * 1_000_000_000).sum::<u128>());
            }
            for first in 0..let_through.len() {
                let mut sum = 0;
                for (at, units) in &let_through[first..] {
                    sum += units;
                    let window = at - let_through[first].0 + u128::from(BURST_NS);
                    // The first of a window may be the last part of an older debt.
                    let excess = sum - let_through[first].1;
                    prop_assert!(excess * 1_000_000_000 <= u128::from(rate) * window);
                }
            }
        }

        #[test]
        fn survives_any_clock(rate: u64, steps in proptest::collection::vec(any::<(u64, u32)>(), 0..20)) {
            let mut bucket = Bucket::new(rate, 0);
            for (now, units) in steps {
                let _wait = bucket.take(now, u64::from(units));
            }
        }
    }
}
