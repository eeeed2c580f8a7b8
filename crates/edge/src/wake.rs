//! A request to a workspace that rests: host is told that it is wanted, and the request waits.
//!
//! Only what both layers let pass comes here: the token is good and the gateway is open. However
//! many requests wait for one workspace, host is asked once in a while for all of them; whether it
//! is woken is control's to decide, under its owner's standing policy.
//!
//! Must never ask for a workspace whose request was not admitted but for its sleep, nor keep more
//! requests waiting than [`WAKES_WAITING_MAX`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::rpc::Client;
use api::{Error, ErrorCode, host};
use http::StatusCode;
use model::WorkspaceId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::answer::Refusal;
use crate::limits::{WAKE_ASK_EVERY, WAKE_ASK_MAX, WAKE_RETRY_AFTER_S, WAKES_WAITING_MAX};

/// The workspaces that requests wait for.
pub struct Wakes {
    host: Client,
    /// How long a request waits.
    pub wake_max: Duration,
    room: Arc<Semaphore>,
    waiting: Mutex<HashMap<WorkspaceId, Waiting>>,
}

#[derive(Default)]
struct Waiting {
    requests: usize,
    asked: Option<Instant>,
}

/// A request's place among those that wait.
pub struct Turn<'a> {
    wakes: &'a Wakes,
    workspace: WorkspaceId,
    _room: OwnedSemaphorePermit,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut waiting = self.wakes.lock();
        if let Some(w) = waiting.get_mut(&self.workspace) {
            w.requests -= 1;
            if w.requests == 0 {
                waiting.remove(&self.workspace);
            }
        }
    }
}

impl Wakes {
    /// Nobody waits.
    #[must_use]
    pub fn new(host: Client, wake_max: Duration) -> Self {
        Self {
            host,
            wake_max,
            room: Arc::new(Semaphore::new(WAKES_WAITING_MAX)),
            waiting: Mutex::default(),
        }
    }

    /// Whether a request waits for this workspace.
    #[must_use]
    pub fn is_awaited(&self, workspace: &WorkspaceId) -> bool {
        self.lock().contains_key(workspace)
    }

    /// A place among those that wait.
    ///
    /// # Errors
    /// 503 with `Retry-After` if too many do.
    pub fn enter(&self, workspace: &WorkspaceId) -> Result<Turn<'_>, Refusal> {
        let room = Arc::clone(&self.room).try_acquire_owned();
        let room = room.map_err(|_| slow())?;
        self.lock().entry(workspace.clone()).or_default().requests += 1;
        Ok(Turn {
            wakes: self,
            workspace: workspace.clone(),
            _room: room,
        })
    }
}

impl Turn<'_> {
    /// Tells host that the workspace is wanted, unless that was done a moment ago.
    pub async fn ask(&self) {
        {
            let mut waiting = self.wakes.lock();
            let w = waiting.entry(self.workspace.clone()).or_default();
            if w.asked.is_some_and(|t| t.elapsed() < WAKE_ASK_EVERY) {
                return;
            }
            w.asked = Some(Instant::now());
        }
        let want = host::Op::Want {
            workspace: self.workspace.clone(),
        };
        let asked: api::Result<bool> = self
            .wakes
            .host
            .call_within("edge.wake", &want, WAKE_ASK_MAX)
            .await;
        if let Err(e) = asked {
            tracing::warn!(error = %e, "host was not told of a request to a workspace that rests");
        }
    }
}

impl Wakes {
    fn lock(&self) -> MutexGuard<'_, HashMap<WorkspaceId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer to a request that waited long enough.
#[must_use]
pub fn slow() -> Refusal {
    let error = Error::new(
        ErrorCode::VmUnavailable,
        "the workspace is waking up; try again",
    );
    Refusal {
        error,
        status: StatusCode::SERVICE_UNAVAILABLE,
        retry_after_s: Some(WAKE_RETRY_AFTER_S),
    }
}
