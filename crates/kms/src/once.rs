//! What may be used once: nonces of leases, and assertions (one workspace each).
//!
//! Kept in memory until they could not pass the time checks any more. A restart forgets them; the
//! log index of the new run's first entry then refuses every lease that is older (see
//! [`crate::check::release`]), so nothing is usable twice.

use crate::check::Refusal;
use crate::limits::NONCES_MAX;
use model::WorkspaceId;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Used nonces and assertions.
#[derive(Default)]
pub struct Once {
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    nonces: HashMap<String, u64>,
    assertions: HashMap<String, (WorkspaceId, u64)>,
    /// No entry ends before this; sweeping earlier finds nothing.
    sweep_at_ms: u64,
}

impl Once {
    /// Uses up `nonce`, and ties `assertion` (its `jti`) to `workspace`; both are remembered until
    /// `until_ms`. A request that fails later has used them up all the same.
    ///
    /// # Errors
    /// [`Refusal::LeaseUsed`], [`Refusal::AuthorityUsed`], or [`Refusal::Busy`] when full.
    pub fn take(
        &self,
        nonce: &str,
        assertion: Option<&str>,
        workspace: &WorkspaceId,
        until_ms: u64,
        now_ms: u64,
    ) -> Result<(), Refusal> {
        let mut t = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if now_ms >= t.sweep_at_ms {
            t.nonces.retain(|_, until| *until > now_ms);
            t.assertions.retain(|_, (_, until)| *until > now_ms);
            t.sweep_at_ms = now_ms.saturating_add(1_000);
        }
        if t.nonces.contains_key(nonce) {
            return Err(Refusal::LeaseUsed);
        }
        if t.nonces.len() >= NONCES_MAX || t.assertions.len() >= NONCES_MAX {
            return Err(Refusal::Busy);
        }
        if let Some(jti) = assertion {
            let known = t
                .assertions
                .entry(jti.to_owned())
                .or_insert_with(|| (workspace.clone(), until_ms));
            if known.0 != *workspace {
                return Err(Refusal::AuthorityUsed);
            }
            known.1 = known.1.max(until_ms);
        }
        t.nonces.insert(nonce.to_owned(), until_ms);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_nonce_once_and_each_assertion_for_one_workspace() {
        let once = Once::default();
        let [a, b] = [1, 2].map(|n| WorkspaceId::from_bytes([n; 8]));
        once.take("n1", Some("j1"), &a, 100, 0).unwrap();
        assert_eq!(
            once.take("n1", Some("j1"), &a, 100, 0),
            Err(Refusal::LeaseUsed)
        );
        once.take("n2", Some("j1"), &a, 100, 0).unwrap();
        assert_eq!(
            once.take("n3", Some("j1"), &b, 100, 0),
            Err(Refusal::AuthorityUsed)
        );
        once.take("n3", None, &b, 100, 0).unwrap();
        // Remembered to the end, forgotten after it.
        assert_eq!(once.take("n1", None, &a, 100, 99), Err(Refusal::LeaseUsed));
        once.take("n1", None, &a, 5_000, 2_000).unwrap();
    }

    #[test]
    fn is_bounded() {
        let once = Once::default();
        let ws = WorkspaceId::from_bytes([1; 8]);
        for n in 0..NONCES_MAX {
            once.take(&n.to_string(), None, &ws, 10, 0).unwrap();
        }
        assert_eq!(once.take("one more", None, &ws, 10, 0), Err(Refusal::Busy));
        once.take("one more", None, &ws, 2_000, 1_001).unwrap();
    }
}
