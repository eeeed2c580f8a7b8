//! The rate of this machine's time-stamp counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long it is watched: 1 µs of jitter is then 20 ppm.
const WATCH: Duration = Duration::from_millis(50);
/// No counter is slower or faster, kHz.
const PLAUSIBLE_KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// kHz, measured once; `None` where the counter does not run at one rate all the time.
#[must_use]
pub fn khz() -> Option<u32> {
    static KHZ: OnceLock<Option<u32>> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        if !steady(&info) {
            return None;
        }
        let clock = quanta::Clock::new();
        let (from, start) = (clock.raw(), Instant::now());
        std::thread::sleep(WATCH);
        let (to, took) = (clock.raw(), start.elapsed());
        rate_khz(to.checked_sub(from)?, took)
    })
}

fn steady(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|l| l.starts_with("flags"));
    flags.is_some_and(|l| {
        ["constant_tsc", "nonstop_tsc"]
            .iter()
            .all(|f| l.split_whitespace().any(|w| w == *f))
    })
}

fn rate_khz(ticks: u64, took: Duration) -> Option<u32> {
    let ns = took.as_nanos().max(1);
    let khz = u64::try_from(u128::from(ticks) * 1_000_000 / ns).ok()?;
    // A clock that counts nanoseconds is no counter: the library fell back to it.
    let nanoseconds = (999_900..=1_000_100).contains(&khz);
    (PLAUSIBLE_KHZ.contains(&khz) && !nanoseconds)
        .then(|| u32::try_from(khz).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        let ms = Duration::from_millis;
        assert_eq!(rate_khz(130_000_000, ms(50)), Some(2_600_000));
        assert_eq!(rate_khz(50_000_000, ms(50)), None);
        assert_eq!(rate_khz(1, ms(50)), None);
        assert_eq!(rate_khz(u64::MAX, ms(50)), None);
        assert!(steady("flags\t\t: fpu constant_tsc nonstop_tsc x\n"));
        assert!(!steady("flags\t\t: fpu constant_tsc x\n"));
        assert!(!steady(""));
        assert_eq!(khz(), khz());
    }
}
