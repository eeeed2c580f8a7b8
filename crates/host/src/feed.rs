//! The actual states, as others read them: a map, and a sequence number that grows with every
//! change, so that a reader who names the last one it has misses nothing.
//!
//! The sequence begins at the clock's milliseconds × 1,024: a reader that carries a number from
//! before a restart of host gets every state again.

use crate::limits::{CHANGES_MAX, TOMBSTONES_MAX};
use api::host::{Actual, ActualState, Changes};
use model::WorkspaceId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// The feed.
pub struct Feed {
    inner: Mutex<Inner>,
    seq: watch::Sender<u64>,
}

struct Inner {
    seq: u64,
    states: HashMap<WorkspaceId, (u64, Actual)>,
    tombstones: usize,
}

impl Feed {
    /// An empty feed of a host that starts at `now_ms`.
    #[must_use]
    pub fn new(now_ms: u64) -> Self {
        let seq = now_ms.saturating_mul(1_024);
        Self {
            inner: Mutex::new(Inner {
                seq,
                states: HashMap::new(),
                tombstones: 0,
            }),
            seq: watch::Sender::new(seq),
        }
    }

    /// Publishes that somebody asks for a workspace that rests, if such a request may wake it.
    pub fn want(&self, workspace: &WorkspaceId) {
        let rests =
            |a: &&Actual| a.wakes && matches!(a.state, ActualState::Asleep | ActualState::Stopped);
        if let Some(actual) = self.get(workspace).as_ref().filter(rests) {
            let wanted = true;
            self.publish(Actual {
                wanted,
                ..actual.clone()
            });
        }
    }

    /// Publishes a state; one that changes nothing is no change.
    pub fn publish(&self, actual: Actual) {
        let mut inner = self.lock();
        let before = inner.states.get(&actual.workspace).map(|(_, a)| a);
        if before == Some(&actual) {
            return;
        }
        let was = before.is_some_and(|a| a.state == ActualState::Deleted);
        let is = actual.state == ActualState::Deleted;
        inner.tombstones = inner.tombstones + usize::from(is) - usize::from(was);
        inner.seq += 1;
        let seq = inner.seq;
        inner.states.insert(actual.workspace.clone(), (seq, actual));
        if inner.tombstones > TOMBSTONES_MAX {
            inner.drop_oldest_tombstone();
        }
        drop(inner);
        self.seq.send_replace(seq);
    }

    /// A workspace's state.
    #[must_use]
    pub fn get(&self, workspace: &WorkspaceId) -> Option<Actual> {
        self.lock().states.get(workspace).map(|(_, a)| a.clone())
    }

    /// All states.
    #[must_use]
    pub fn list(&self) -> Vec<Actual> {
        self.lock()
            .states
            .values()
            .map(|(_, a)| a.clone())
            .collect()
    }

    /// What changed after `since`, waiting up to `wait` for something.
    pub async fn changes(&self, since: u64, wait: Duration) -> Changes {
        let mut seq = self.seq.subscribe();
        // A number that this host never gave is of another clock: everything is news then.
        let since = if since > *seq.borrow() { 0 } else { since };
        // Either something is there, or the wait is over; both are answered.
        let _ = tokio::time::timeout(wait, seq.wait_for(|s| *s > since)).await;
        self.after(since)
    }

    /// Waits up to `wait` until `done` holds for a workspace's state; returns the state as it is
    /// then, if there is one.
    pub async fn wait(
        &self,
        workspace: &WorkspaceId,
        wait: Duration,
        done: impl Fn(&Actual) -> bool,
    ) -> Option<Actual> {
        let mut seq = self.seq.subscribe();
        let reached = seq.wait_for(|_| self.get(workspace).is_some_and(|a| done(&a)));
        let _ = tokio::time::timeout(wait, reached).await;
        self.get(workspace)
    }

    fn after(&self, since: u64) -> Changes {
        let inner = self.lock();
        let mut news: Vec<_> = inner.states.values().filter(|(s, _)| *s > since).collect();
        news.sort_unstable_by_key(|(s, _)| *s);
        let seq = match news.get(CHANGES_MAX) {
            Some(_) => news[CHANGES_MAX - 1].0,
            None => inner.seq,
        };
        let states = news.iter().take(CHANGES_MAX).map(|(_, a)| a.clone());
        Changes {
            seq,
            states: states.collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn drop_oldest_tombstone(&mut self) {
        let gone = |a: &Actual| a.state == ActualState::Deleted;
        let oldest = self.states.values().filter(|(_, a)| gone(a));
        if let Some(id) = oldest
            .min_by_key(|(s, _)| *s)
            .map(|(_, a)| a.workspace.clone())
        {
            self.states.remove(&id);
            self.tombstones -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn actual(n: u64, state: ActualState) -> Actual {
        Actual {
            workspace: WorkspaceId::from_bytes(n.to_be_bytes()),
            generation: 1,
            state,
            start_id: None,
            ip: None,
            public_access: false,
            since_ms: None,
            started_from: None,
            memory: false,
            wakes: false,
            wanted: false,
            snapshot: None,
            archived: None,
            error: None,
        }
    }

    #[tokio::test]
    async fn a_reader_from_before_a_restart_gets_everything_again() {
        let before = Feed::new(1_000);
        before.publish(actual(1, ActualState::Running));
        let seq = before.changes(0, Duration::ZERO).await.seq;
        let after = Feed::new(2_000);
        after.publish(actual(1, ActualState::Crashed));
        assert_eq!(after.changes(seq, Duration::ZERO).await.states.len(), 1);
        // And so does one from a host whose clock went back.
        let back = Feed::new(1);
        back.publish(actual(1, ActualState::Stopped));
        assert_eq!(back.changes(seq, Duration::ZERO).await.states.len(), 1);
    }

    #[tokio::test]
    async fn a_long_answer_goes_on_where_it_ended() {
        let feed = Feed::new(5);
        for n in 0..2_500 {
            feed.publish(actual(n, ActualState::Stopped));
        }
        let (mut since, mut seen) = (0, Vec::new());
        for _ in 0..3 {
            let c = feed.changes(since, Duration::ZERO).await;
            since = c.seq;
            seen.extend(c.states.into_iter().map(|a| a.workspace));
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 2_500);
    }

    #[tokio::test]
    async fn tombstones_are_bounded() {
        let feed = Feed::new(5);
        for n in 0..TOMBSTONES_MAX as u64 + 10 {
            feed.publish(actual(n, ActualState::Deleted));
        }
        assert_eq!(feed.list().len(), TOMBSTONES_MAX);
        assert!(feed.get(&WorkspaceId::from_bytes([0; 8])).is_none());
    }

    proptest! {
        /// A reader that asks now and then ends up with the last state of each workspace.
        #[test]
        fn nothing_is_missed(ops in proptest::collection::vec((0u64..6, 0usize..4, any::<bool>()), 1..80)) {
            let states = [ActualState::Stopped, ActualState::Starting, ActualState::Running, ActualState::Deleted];
            let rt = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            rt.block_on(async {
                let feed = Feed::new(7);
                let mut mirror = HashMap::new();
                let mut since = 0;
                for (ws, state, read) in ops {
                    feed.publish(actual(ws, states[state]));
                    if read {
                        let c = feed.changes(since, Duration::ZERO).await;
                        since = c.seq;
                        mirror.extend(c.states.into_iter().map(|a| (a.workspace.clone(), a)));
                    }
                }
                let c = feed.changes(since, Duration::ZERO).await;
                mirror.extend(c.states.into_iter().map(|a| (a.workspace.clone(), a)));
                for a in feed.list() {
                    assert_eq!(mirror.get(&a.workspace), Some(&a));
                }
            });
        }
    }
}
