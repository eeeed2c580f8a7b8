//! Power: start, stop, restart, pause, resume. Sleep and wake are in [`super::sleep`].

use super::sleep::{sleeps, wake};
use super::workspace::{Seen, ready, workspace_for_act, workspace_get};
use super::{App, start_error};
use crate::audit::Act;
use crate::limits::{READY_WAIT_MS, STOP_WAIT_MS};
use crate::op::Op;
use crate::store::{Doc, Workspace};
use api::audit::Lease;
use api::host::{Actual, ActualState};
use api::{Error, ErrorCode};
use model::Power;
use serde_json::Value;
use std::sync::Arc;

/// Starts a workspace; one that runs already is left alone, a paused one goes on, one that sleeps
/// wakes. `force` starts one that sleeps from its disk: its memory is given up.
///
/// # Errors
/// Why it does not run.
pub async fn workspace_start(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    force: bool,
) -> api::Result<Seen> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    match actual.as_ref().map(|a| a.state) {
        Some(ActualState::Running) if w.doc.power == Power::Running => Ok((w, actual)),
        Some(ActualState::Paused) => workspace_resume(app, op, name).await,
        _ if !force && sleeps(&w, actual.as_ref()) => wake(app, op, &w, READY_WAIT_MS).await,
        _ => start(app, op, &w, READY_WAIT_MS).await,
    }
}

/// Starts a workspace that has no VM.
///
/// # Errors
/// Why it does not run.
pub async fn start(app: &Arc<App>, op: &Op, w: &Workspace, wait_ms: u64) -> api::Result<Seen> {
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.start", &w.account, w.id.as_str());
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let started = start_with(app, op, w, &lease, &receipt, wait_ms).await;
    app.audit.outcome(op, &act, &started).await;
    started
}

/// Stops a workspace; answers when host says that it is so. Idempotent.
///
/// # Errors
/// [`ErrorCode::VmUnavailable`] if host does not confirm; it will stop when host is back.
pub async fn workspace_stop(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.stop", &w.account, w.id.as_str());
    app.audit.intent_closing(op, &act).await;
    let stop = |w: &mut Workspace| exit(w);
    let stopped = stop_with(app, op, &w, stop).await;
    app.audit.outcome(op, &act, &stopped).await;
    stopped
}

/// Stops and starts a workspace.
///
/// # Errors
/// Why it does not run.
pub async fn workspace_restart(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.restart", &w.account, w.id.as_str());
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let restarted = async {
        let now_ms = app.now_ms();
        // If control is killed in between, the start is owed.
        let stop = |w: &mut Workspace| {
            w.doc.power = Power::Stopped;
            w.doc.life.settle();
            w.doc.life.restart_at_ms = Some(now_ms);
        };
        let (w, _) = stop_with(app, op, &w, stop).await?;
        start_with(app, op, &w, &lease, &receipt, READY_WAIT_MS).await
    };
    let restarted = restarted.await;
    app.audit.outcome(op, &act, &restarted).await;
    restarted
}

/// Stops the virtual CPUs; memory is kept.
///
/// # Errors
/// [`ErrorCode::Conflict`] if it does not run.
pub async fn workspace_pause(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    hold(app, op, name, Power::Paused).await
}

/// Continues a paused workspace.
///
/// # Errors
/// [`ErrorCode::Conflict`] if it is not paused.
pub async fn workspace_resume(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    hold(app, op, name, Power::Running).await
}

/// Takes note that a workspace ran for the first time.
///
/// # Errors
/// The store's.
pub async fn ran_note(app: &App, w: &Workspace, actual: Option<&Actual>) -> api::Result<Workspace> {
    if w.doc.completed_ms.is_some() || actual.is_none_or(|a| a.state != ActualState::Running) {
        return Ok(w.clone());
    }
    let now_ms = app.now_ms();
    app.store
        .workspace_update(w, now_ms, |w| {
            w.doc.completed_ms.get_or_insert(now_ms);
            Ok(())
        })
        .await
}

/// The error of a pause or resume that its state does not allow, else the state wanted.
async fn hold(app: &Arc<App>, op: &Op, name: &str, power: Power) -> api::Result<Seen> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    let (event, from, to) = match power {
        Power::Paused => ("workspace.pause", ActualState::Running, ActualState::Paused),
        _ => (
            "workspace.resume",
            ActualState::Paused,
            ActualState::Running,
        ),
    };
    if actual.as_ref().is_none_or(|a| a.state != from) {
        let message = match power {
            Power::Paused => "only a running workspace can be paused",
            _ => "only a paused workspace can be resumed",
        };
        return Err(Error::new(ErrorCode::Conflict, message));
    }
    let _busy = app.busy(&w.id);
    let act = Act::new(event, &w.account, w.id.as_str());
    if power == Power::Paused {
        app.audit.intent_closing(op, &act).await;
    } else {
        app.audit.intent(op, &act).await?;
    }
    let done = async {
        let now_ms = app.now_ms();
        let w = app
            .store
            .workspace_update(&w, now_ms, |w| {
                ready(w)?;
                w.doc.power = power;
                if power == Power::Running {
                    ttl_renew(&mut w.doc, now_ms);
                }
                Ok(())
            })
            .await?;
        let actual = app.host_apply(op, &w, None, STOP_WAIT_MS).await?;
        if actual.state == to {
            return Ok((w, Some(actual)));
        }
        Err(actual.error.unwrap_or_else(|| {
            Error::new(
                ErrorCode::Timeout,
                "the workspace did not follow in time; ask again",
            )
        }))
    };
    let done = done.await;
    app.audit.outcome(op, &act, &done).await;
    done
}

pub(super) async fn start_with(
    app: &App,
    op: &Op,
    w: &Workspace,
    lease: &Lease,
    receipt: &Value,
    wait_ms: u64,
) -> api::Result<Seen> {
    let now_ms = app.now_ms();
    let w = app
        .store
        .workspace_update(w, now_ms, |w| {
            ready(w)?;
            same_config(w, lease)?;
            w.doc.power = Power::Running;
            w.doc.restarts = 0;
            w.doc.last_error = None;
            w.doc.life.settle();
            if lease.also.is_empty() {
                w.doc.life.resources_running = None;
            }
            ttl_renew(&mut w.doc, now_ms);
            // A change of itself, so that host sees a newer generation.
            w.doc.updated_ms += 1;
            Ok(())
        })
        .await?;
    let actual = app
        .host_apply(op, &w, Some((lease, receipt)), wait_ms)
        .await?;
    if let Some(e) = start_error(&actual) {
        return Err(e);
    }
    let w = ran_note(app, &w, Some(&actual)).await?;
    Ok((w, Some(actual)))
}

/// Stops, as `change` notes it in the row, and waits for host's word.
pub(super) async fn stop_with(
    app: &App,
    op: &Op,
    w: &Workspace,
    change: impl Fn(&mut Workspace),
) -> api::Result<Seen> {
    let w = app
        .store
        .workspace_update(w, app.now_ms(), |w| {
            ready(w)?;
            change(w);
            Ok(())
        })
        .await?;
    let actual = app.host_apply(op, &w, None, STOP_WAIT_MS).await?;
    match actual.state {
        ActualState::Stopped => Ok((w, Some(actual))),
        _ => Err(Error::new(
            ErrorCode::VmUnavailable,
            "the machine has not confirmed the stop yet; it goes on, ask again",
        )),
    }
}

/// Notes that a workspace is stopped for good: nothing is owed to it but, if its owner asked for
/// that, its removal.
pub(super) fn exit(w: &mut Workspace) {
    if w.doc.power == Power::Stopped && w.doc.life.restart_at_ms.is_none() {
        return; // It was stopped before.
    }
    w.doc.power = Power::Stopped;
    w.doc.life.settle();
    w.doc.life.remove_due = w.doc.remove_on_exit;
}

/// A time-to-live that has ended counts anew once the workspace runs again.
fn ttl_renew(doc: &mut Doc, now_ms: u64) {
    if doc.ttl_expires_ms.is_none() {
        doc.ttl_expires_ms = doc.ttl_s.map(|s| now_ms.saturating_add(s * 1_000));
    }
}

/// Refuses a start under a lease that names another config than the row holds by now: the guest
/// would refuse it.
fn same_config(w: &Workspace, lease: &Lease) -> api::Result<()> {
    let digest = hex::encode(seal::hash::sha256(w.doc.config.as_bytes()));
    if digest == lease.config_digest {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::Conflict,
        "its config was changed by another request; ask again",
    ))
}
