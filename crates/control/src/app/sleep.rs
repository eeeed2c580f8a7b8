//! Sleep and wake: a workspace's memory at rest, under a key of its own, and back.
//!
//! ```text
//!  Running ──sleep──▶ Asleep ──wake: start, or a request at its gateway──▶ Running
//!     ▲                 │ │ stop_after, stop
//!     └── it could not ─┘ └──▶ Stopped (its memory is removed)
//! ```
//!
//! Each sleep makes a new object, whose id stands in the row before host hears of it; the memory is
//! there if host says so. A wake that fails while the memory is still there leaves the workspace
//! asleep, unless that memory can never be woken: then it is started anew if its restart policy
//! says so. Either way the row says why.
//!
//! Must never start a workspace from its disk, and so lose its memory, without the owner's word:
//! `force`, a stop, or a restart policy.

use super::power::{exit, start_with};
use super::standing::unmoved;
use super::workspace::{Seen, ready, workspace_get};
use super::{App, signed};
use crate::audit::Act;
use crate::limits::{SLEEP_WAIT_MS, WAKE_RETRY_MS};
use crate::op::Op;
use crate::store::Workspace;
use api::audit::{Lease, Object};
use api::host::{Actual, ActualState};
use api::mint::{Policy, PolicyAct};
use api::{Error, ErrorCode, context};
use model::{ObjectId, Power, Purpose};
use std::sync::Arc;

/// Puts a running workspace to sleep; one that sleeps is left alone.
///
/// # Errors
/// [`ErrorCode::VmNotRunning`], or why it could not be: it runs on then.
pub async fn workspace_sleep(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    match actual.as_ref().map(|a| a.state) {
        Some(ActualState::Asleep) => return Ok((w, actual)),
        Some(ActualState::Running) if w.doc.power == Power::Running => {}
        _ => {
            return Err(Error::new(
                ErrorCode::VmNotRunning,
                "only a running workspace can be put to sleep; start it first",
            ));
        }
    }
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.sleep", &w.account, w.id.as_str());
    put_to_sleep(app, op, &act, &w, SLEEP_WAIT_MS, ready).await
}

/// Wakes a workspace that sleeps.
///
/// # Errors
/// Why it does not run.
pub async fn wake(app: &Arc<App>, op: &Op, w: &Workspace, wait_ms: u64) -> api::Result<Seen> {
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.wake", &w.account, w.id.as_str());
    let lease = wake_lease(app, w);
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let woken = start_with(app, op, w, &lease, &receipt, wait_ms).await;
    app.audit.outcome(op, &act, &woken).await;
    woken
}

/// Whether its memory is at rest, so that a start is a wake.
#[must_use]
pub fn sleeps(w: &Workspace, actual: Option<&Actual>) -> bool {
    w.doc.life.memory.is_some() && actual.is_some_and(|a| a.memory)
}

/// Nobody used it for as long as its owner allows, or its time is over: it sleeps, under the
/// owner's standing policy.
///
/// # Errors
/// What keeps it from being put to sleep now.
pub async fn standing_sleep(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let op = Op::internal("sleep");
    let _busy = app.busy_quietly(&w.id);
    let mut act = Act::new("workspace.sleep", &w.account, w.id.as_str());
    act.policy = w.doc.policy.as_deref();
    put_to_sleep(app, &op, &act, w, 0, |row| unmoved(row, w))
        .await
        .map(drop)
}

/// Its gateway was asked for: it wakes, under the owner's standing policy. One that was stopped for
/// not being used starts from its disk.
///
/// # Errors
/// What keeps it from being woken now.
pub async fn standing_wake(app: &Arc<App>, w: &Workspace, actual: &Actual) -> api::Result<()> {
    let op = Op::internal("wake");
    let _busy = app.busy_quietly(&w.id);
    let mut act = Act::new("workspace.wake", &w.account, w.id.as_str());
    act.policy = w.doc.policy.as_deref();
    let lease = if sleeps(w, Some(actual)) {
        wake_lease(app, w)
    } else {
        app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    };
    let receipt = app.audit.intent_with_lease(&op, &act, &lease).await?;
    app.metrics.wakes.inc();
    let done = async {
        let now_ms = app.now_ms();
        let w = app
            .store
            .workspace_update(w, now_ms, |row| {
                unmoved(row, w)?;
                row.doc.power = Power::Running;
                row.doc.life.settle();
                row.doc.life.wake_tried_ms = now_ms;
                Ok(())
            })
            .await?;
        app.host_apply(&op, &w, Some((&lease, &receipt)), 0)
            .await
            .map(drop)
    };
    let done: api::Result<()> = done.await;
    app.audit.outcome(&op, &act, &done).await;
    done
}

/// Whether a request at its gateway may wake it.
#[must_use]
pub fn wakes(w: &Workspace) -> bool {
    let rests = w.doc.power == Power::Asleep || w.doc.life.idle_stopped;
    rests && w.doc.life.idle.is_some() && w.doc.policy.is_some()
}

/// Whether a request at its gateway is to wake it now.
#[must_use]
pub fn wake_due(w: &Workspace, actual: &Actual, now_ms: u64) -> bool {
    let tried_ms = w.doc.life.wake_tried_ms;
    // A try of the future is of a clock that has gone back since.
    let rested = now_ms
        .checked_sub(tried_ms)
        .is_none_or(|ms| ms >= WAKE_RETRY_MS);
    actual.wanted && wakes(w) && rested
}

/// A sleep that host could not bring about: the workspace runs on, and the row says why.
///
/// # Errors
/// The store's; host's.
pub async fn stays_awake(app: &App, w: &Workspace, why: Option<Error>) -> api::Result<()> {
    let now_ms = app.now_ms();
    let w = app
        .store
        .workspace_update(w, now_ms, |row| {
            ready(row)?;
            // Whoever asked for something else meanwhile comes first.
            let same = row.doc.life.memory == w.doc.life.memory;
            if same && row.doc.power == Power::Asleep {
                row.doc.power = Power::Running;
                row.doc.life.sleep_failed_ms = Some(now_ms);
                row.doc.last_error.clone_from(&why);
            }
            Ok(())
        })
        .await?;
    let op = Op::internal("sleep");
    app.host_apply(&op, &w, None, 0).await.map(drop)
}

/// Its memory is not where it should be: it is stopped, and the row says why.
///
/// # Errors
/// The store's; a row that changed.
pub async fn memory_lost(app: &App, w: &Workspace, actual: &Actual) -> api::Result<()> {
    let op = Op::internal("exit");
    let act = Act::new("workspace.exited", &w.account, w.id.as_str());
    app.audit.fact(&op, &act, actual.error.as_ref()).await;
    let why = Error::new(
        ErrorCode::MemoryStale,
        "it was asleep and its memory is lost; what is on its disk is there: start it",
    );
    app.store
        .workspace_update(w, app.now_ms(), |row| {
            unmoved(row, w)?;
            let idle = row.doc.life.idle.is_some();
            exit(row);
            row.doc.life.idle_stopped = idle;
            row.doc.last_error = Some(why.clone());
            Ok(())
        })
        .await
        .map(drop)
}

/// Whether what kept memory from waking will do so each time.
#[must_use]
pub fn never_wakes(e: &Error) -> bool {
    matches!(
        e.code,
        ErrorCode::MemoryStale
            | ErrorCode::DiskTampered
            | ErrorCode::DiskCorrupt
            | ErrorCode::KeyRefused
    )
}

/// Whether the owner's standing policy names an act.
#[must_use]
pub fn policy_allows(app: &App, w: &Workspace, act: PolicyAct) -> bool {
    let text = w.doc.policy.as_deref();
    text.is_some_and(|text| {
        let policy: api::Result<Policy> = signed("policy", text, &app.mint_key, context::POLICY);
        policy.is_ok_and(|p| p.acts.contains(&act))
    })
}

async fn put_to_sleep(
    app: &App,
    op: &Op,
    act: &Act<'_>,
    w: &Workspace,
    wait_ms: u64,
    check: impl Fn(&Workspace) -> api::Result<()>,
) -> api::Result<Seen> {
    let object = ObjectId::from_bytes(seal::random::bytes());
    let lease = Lease {
        purpose: Purpose::Memory,
        object: Some(object.clone()),
        ..app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    };
    let receipt = app.audit.intent_with_lease(op, act, &lease).await?;
    let done = async {
        let now_ms = app.now_ms();
        let w = app
            .store
            .workspace_update(w, now_ms, |row| {
                check(row)?;
                row.doc.power = Power::Asleep;
                row.doc.last_error = None;
                row.doc.life.settle();
                row.doc.life.memory = Some(object.clone());
                row.doc.life.slept_ms = now_ms;
                // What kept an earlier memory from waking says nothing of this one.
                row.doc.life.wake_tried_ms = 0;
                Ok(())
            })
            .await?;
        let actual = app
            .host_apply(op, &w, Some((&lease, &receipt)), wait_ms)
            .await?;
        let fresh = actual.generation >= w.generation;
        match actual.state {
            ActualState::Asleep if fresh => Ok((w, Some(actual))),
            // The reconciler sees what comes of it.
            _ if wait_ms == 0 => Ok((w, Some(actual))),
            ActualState::Running | ActualState::Paused if fresh => {
                let why = actual.error.clone().unwrap_or_else(|| {
                    Error::new(
                        ErrorCode::VmUnavailable,
                        "the workspace could not be put to sleep and runs on",
                    )
                });
                stays_awake(app, &w, Some(why.clone())).await?;
                Err(why)
            }
            _ => Err(Error::new(
                ErrorCode::Timeout,
                "the workspace does not sleep yet; it goes on, ask again",
            )),
        }
    };
    let done = done.await;
    app.audit.outcome(op, act, &done).await;
    done
}

fn wake_lease(app: &App, w: &Workspace) -> Lease {
    let memory = Object {
        workspace: w.id.clone(),
        purpose: Purpose::Memory,
        id: w.doc.life.memory.clone(),
    };
    Lease {
        also: vec![memory],
        ..app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    }
}
