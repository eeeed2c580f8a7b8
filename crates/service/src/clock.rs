//! The one place that reads the wall clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A clock: the system's, or one that a test moves.
#[derive(Debug, Clone)]
pub struct Clock(Option<Arc<AtomicU64>>);

impl Clock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self(None)
    }

    /// A clock that stands at `ms` until it is set; for tests.
    #[must_use]
    pub fn manual(ms: u64) -> Self {
        Self(Some(Arc::new(AtomicU64::new(ms))))
    }

    /// Milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        match &self.0 {
            Some(ms) => ms.load(Ordering::Acquire),
            None => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// Seconds since 1970-01-01 UTC.
    #[must_use]
    pub fn now_s(&self) -> i64 {
        i64::try_from(self.now_ms() / 1000).unwrap_or(i64::MAX)
    }

    /// Moves a manual clock; the system's does not move.
    pub fn set_ms(&self, ms: u64) {
        if let Some(m) = &self.0 {
            m.store(ms, Ordering::Release);
        }
    }
}
