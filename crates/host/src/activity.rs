//! When each workspace was used last: what the idle policies go by.
//!
//! The edge reports every few seconds whose requests passed it; a start, a resume and a ping
//! count too. Kept in memory only: a host process that begins anew counts from its own beginning,
//! so that a restart puts a stop off and never brings one forward.
//!
//! Must never go by a clock that can be set.

use model::WorkspaceId;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When each workspace was used last.
pub struct Activity {
    began: Instant,
    last: Mutex<HashMap<WorkspaceId, Instant>>,
}

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

impl Activity {
    /// Nothing was used since now.
    #[must_use]
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            last: Mutex::default(),
        }
    }

    /// A workspace that this host knows is used now.
    pub fn note(&self, workspace: &WorkspaceId) {
        self.lock().insert(workspace.clone(), Instant::now());
    }

    /// Milliseconds since its last use.
    #[must_use]
    pub fn idle_ms(&self, workspace: &WorkspaceId) -> u64 {
        self.idle_ms_at(workspace, Instant::now())
    }

    /// A workspace is gone.
    pub fn forget(&self, workspace: &WorkspaceId) {
        self.lock().remove(workspace);
    }

    fn idle_ms_at(&self, workspace: &WorkspaceId, now: Instant) -> u64 {
        let last = self.lock().get(workspace).copied();
        let idle: Duration = now.saturating_duration_since(last.unwrap_or(self.began));
        u64::try_from(idle.as_millis()).unwrap_or(u64::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkspaceId, Instant>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_workspace_is_idle_since_the_host_began() {
        let (activity, id) = (Activity::new(), WorkspaceId::from_bytes([1; 8]));
        let later = activity.began + Duration::from_secs(90);
        assert_eq!(activity.idle_ms_at(&id, later), 90_000);
        activity.note(&id);
        assert!(activity.idle_ms_at(&id, later) <= 90_000);
        let noted = activity.lock()[&id];
        assert_eq!(
            activity.idle_ms_at(&id, noted + Duration::from_secs(7)),
            7_000
        );
        activity.forget(&id);
        assert_eq!(activity.idle_ms_at(&id, later), 90_000);
    }
}
