//! Refused credentials go into the log, but not as fast as an attacker likes.
//!
//! Each source has [`REFUSALS_LOGGED_PER_S`] entries a second; what is above is counted, and the
//! source's next entry says how many. Ids that do not exist share one source, so inventing ids
//! buys nothing.

use crate::limits::{REFUSAL_SOURCES_MAX, REFUSALS_LOGGED_PER_S};
use model::KeyId;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Bounds the log's load by refusals.
#[derive(Default)]
pub struct Refusals {
    sources: Mutex<HashMap<Option<KeyId>, Source>>,
}

#[derive(Default)]
struct Source {
    second: u64,
    logged: u32,
    suppressed: u64,
}

impl Refusals {
    /// Whether to log this refusal; if so, how many were not logged since the last one that was.
    /// `source` is a key that exists, or nothing.
    pub fn admit(&self, source: Option<&KeyId>, now_ms: u64) -> Option<u64> {
        let second = now_ms / 1000;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = source.cloned();
        if sources.len() >= REFUSAL_SOURCES_MAX && !sources.contains_key(&at) {
            sources.retain(|_, s| s.suppressed > 0 || s.second == second);
            if sources.len() >= REFUSAL_SOURCES_MAX {
                at = None;
            }
        }
        let s = sources.entry(at).or_default();
        if s.second != second {
            (s.second, s.logged) = (second, 0);
        }
        if s.logged >= REFUSALS_LOGGED_PER_S {
            s.suppressed += 1;
            return None;
        }
        s.logged += 1;
        Some(std::mem::take(&mut s.suppressed))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn logs_ten_a_second_and_counts_the_rest() {
        let r = Refusals::default();
        let logged = (0..1_000)
            .filter(|_| r.admit(None, 5_000).is_some())
            .count();
        assert_eq!(logged, 10);
        // Another source is not drowned by it.
        assert_eq!(r.admit(Some(&KeyId::from_bytes([1; 8])), 5_000), Some(0));
        assert_eq!(r.admit(None, 6_000), Some(990));
        assert_eq!(r.admit(None, 6_001), Some(0));
    }

    #[test]
    fn is_bounded() {
        let r = Refusals::default();
        for n in 0..10_000u64 {
            r.admit(Some(&KeyId::from_bytes(n.to_be_bytes())), 5_000);
        }
        assert!(r.sources.lock().unwrap().len() <= REFUSAL_SOURCES_MAX + 1);
    }
}
