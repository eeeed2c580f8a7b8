//! Everything mint knows, in memory: so that a credential is checked without touching the disk.

use crate::store::{All, ApiKey, Workspace};
use model::{AccountId, KeyId, WorkspaceId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// The book. A change is written to the store first, then here.
#[derive(Default)]
pub struct Book {
    accounts: HashSet<AccountId>,
    keys: HashMap<KeyId, ApiKey>,
    workspaces: HashMap<WorkspaceId, Workspace>,
    /// Each workspace once, at its last change: what followers read in order.
    by_seq: BTreeMap<u64, WorkspaceId>,
}

impl Book {
    /// The book of a store.
    #[must_use]
    pub fn of(all: All) -> Self {
        let mut book = Self {
            accounts: all.accounts.into_iter().collect(),
            ..Self::default()
        };
        for key in all.keys {
            book.key_put(key);
        }
        for w in all.workspaces {
            book.workspace_put(w);
        }
        book
    }

    /// Whether there is such an account.
    #[must_use]
    pub fn has_account(&self, id: &AccountId) -> bool {
        self.accounts.contains(id)
    }

    /// How many accounts there are.
    #[must_use]
    pub fn accounts(&self) -> usize {
        self.accounts.len()
    }

    /// Adds an account.
    pub fn account_put(&mut self, id: AccountId) {
        self.accounts.insert(id);
    }

    /// An API key, revoked ones included.
    #[must_use]
    pub fn key(&self, id: &KeyId) -> Option<&ApiKey> {
        self.keys.get(id)
    }

    /// How many API keys there are.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Adds or replaces an API key.
    pub fn key_put(&mut self, key: ApiKey) {
        self.keys.insert(key.id.clone(), key);
    }

    /// A workspace, deleted ones included.
    #[must_use]
    pub fn workspace(&self, id: &WorkspaceId) -> Option<&Workspace> {
        self.workspaces.get(id)
    }

    /// Adds or replaces a workspace.
    pub fn workspace_put(&mut self, w: Workspace) {
        if let Some(old) = self.workspaces.get(&w.id) {
            self.by_seq.remove(&old.seq);
        }
        self.by_seq.insert(w.seq, w.id.clone());
        self.workspaces.insert(w.id.clone(), w);
    }

    /// The number of the last change.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.by_seq.last_key_value().map_or(0, |(seq, _)| *seq)
    }

    /// The workspaces that changed after `since`, oldest change first, at most `max`.
    pub fn changed(&self, since: u64, max: usize) -> impl Iterator<Item = &Workspace> {
        let after = self.by_seq.range(since.saturating_add(1)..).take(max);
        after.filter_map(|(_, id)| self.workspaces.get(id))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A follower that asks in steps ends with the newest row of each workspace.
        #[test]
        fn a_follower_misses_nothing(
            changes in proptest::collection::vec((0u8..6, any::<bool>()), 0..60),
            step in 1usize..5,
        ) {
            let (mut book, mut seen, mut at) = (Book::default(), HashMap::new(), 0);
            let follow = |book: &Book, seen: &mut HashMap<_, _>, at: &mut u64| {
                for w in book.changed(*at, step) {
                    *at = w.seq;
                    seen.insert(w.id.clone(), w.clone());
                }
            };
            for (n, (ws, ask)) in changes.iter().enumerate() {
                let seq = book.seq() + 1;
                book.workspace_put(Workspace {
                    id: WorkspaceId::from_bytes([*ws; 8]),
                    account: AccountId::from_bytes([1; 8]),
                    identity_pub: String::new(),
                    epoch: n as u64,
                    raw_version: 1,
                    enabled: true,
                    gone: false,
                    seq,
                });
                if *ask {
                    follow(&book, &mut seen, &mut at);
                }
            }
            for _ in 0..=changes.len() {
                follow(&book, &mut seen, &mut at);
            }
            prop_assert_eq!(&seen, &book.workspaces);
            prop_assert_eq!(at, book.seq());
        }
    }
}
