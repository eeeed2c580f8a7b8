//! What the platform does to a workspace by itself, as its owner asked it to: restarts, ends of
//! time, stops of what nobody uses.
//!
//! Each act is announced with the standing policy that mint signed when the owner asked for it,
//! and is decided from the row alone:
//!
//! ```text
//!  exit seen ─▶ row: start owed at T ─▶ T ─▶ row: handed to host as generation G ─▶ host has seen G
//!                        │ kill: decided again       │ kill: handed over again            │ kill: it is done
//! ```
//!
//! A row that changed since it was read is left for the next look: whoever changed it comes first.
//!
//! Must never use up a restart that was not tried, or stop what was used since.

use super::workspace::ready;
use super::{App, power, removal, sleep};
use crate::audit::Act;
use crate::op::Op;
use crate::store::Workspace;
use api::host::{Actual, ActualState};
use api::{Error, ErrorCode};
use model::lifecycle::{AfterExit, Exit, after_exit};
use model::{Power, RestartPolicy, TtlAction};
use std::sync::Arc;

/// Refuses a row that is not the one that was seen.
///
/// # Errors
/// [`ErrorCode::Conflict`].
pub fn unmoved(now: &Workspace, seen: &Workspace) -> api::Result<()> {
    ready(now)?;
    if now.generation == seen.generation {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::Conflict,
        "the workspace was changed by another request",
    ))
}

/// A workspace that should run does not: a start is owed to it, or it is left stopped.
///
/// # Errors
/// The store's; a row that changed.
pub async fn exited(app: &Arc<App>, w: &Workspace, actual: &Actual) -> api::Result<()> {
    let op = Op::internal("exit");
    let act = Act::new("workspace.exited", &w.account, w.id.as_str());
    app.audit.fact(&op, &act, actual.error.as_ref()).await;
    if let Some(why) = actual
        .error
        .as_ref()
        .filter(|_| sleep::sleeps(w, Some(actual)))
    {
        return not_woken(app, w, why).await;
    }
    // What was paused is not started for it: its owner did not want it to run now.
    let wanted = w.doc.power == Power::Running && w.doc.policy.is_some();
    let policy = if wanted {
        w.doc.restart_policy
    } else {
        RestartPolicy::No
    };
    let exit = Exit {
        restarts: w.doc.restarts,
        failed: actual.error.is_some(),
        sealed: is_sealed(actual),
    };
    let now_ms = app.now_ms();
    let after = after_exit(policy, w.doc.max_restarts, exit, now_ms);
    let error = match after {
        AfterExit::GiveUp => Some(given_up(w.doc.restarts, actual)),
        _ => actual.error.clone(),
    };
    app.store
        .workspace_update(w, now_ms, |row| {
            unmoved(row, w)?;
            row.doc.last_error.clone_from(&error);
            match after {
                AfterExit::Restart { at_ms, restarts } => {
                    row.doc.restarts = restarts;
                    row.doc.life.restart_at_ms = Some(at_ms);
                }
                AfterExit::Stay | AfterExit::GiveUp => {
                    power::exit(row);
                    row.doc.life.given_up = after == AfterExit::GiveUp;
                }
            }
            Ok(())
        })
        .await?;
    // The next look tells host, and sees when the start is due.
    app.wake.notify_one();
    Ok(())
}

/// A wake failed and the memory is still there. It sleeps on, or, if that memory can never be woken
/// and its restart policy says so, it is started from its disk; the row says why.
async fn not_woken(app: &App, w: &Workspace, why: &Error) -> api::Result<()> {
    let anew = sleep::never_wakes(why)
        && w.doc.restart_policy != RestartPolicy::No
        && w.doc.policy.is_some();
    let now_ms = app.now_ms();
    let said = if anew {
        "its memory could not be woken, and it is started anew from its disk"
    } else {
        "its memory could not be woken; it sleeps on, and start with force gives that memory up"
    };
    let said = Error::new(why.code, format!("{said}: {}", why.message));
    app.store
        .workspace_update(w, now_ms, |row| {
            unmoved(row, w)?;
            row.doc.last_error = Some(said.clone());
            if anew {
                row.doc.life.restart_at_ms = Some(now_ms);
            } else {
                row.doc.power = Power::Asleep;
                row.doc.life.settle();
            }
            Ok(())
        })
        .await?;
    app.wake.notify_one();
    Ok(())
}

/// Whether a start failed for want of an unsealed KMS.
#[must_use]
pub fn is_sealed(actual: &Actual) -> bool {
    let code = actual.error.as_ref().map(|e| e.code);
    code == Some(ErrorCode::KmsSealed)
}

fn given_up(restarts: u32, actual: &Actual) -> Error {
    let last = actual.error.as_ref();
    let last = last.map_or("it shut down by itself", |e| e.message.as_str());
    let message = format!(
        "it ended after each of {restarts} restarts in a row, which is max_restarts; see why and \
         start it again (the last time: {last})"
    );
    Error::new(ErrorCode::VmUnavailable, message)
}

/// The start that is owed: once, under the owner's standing policy.
///
/// # Errors
/// What keeps it from being handed to host now.
pub async fn restart(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let allowed = w.doc.restart_policy != RestartPolicy::No;
    let Some(policy) = w.doc.policy.as_deref().filter(|_| allowed) else {
        return disown(app, w).await;
    };
    let op = Op::internal("restart");
    let _busy = app.busy_quietly(&w.id);
    let mut act = Act::new("workspace.restart", &w.account, w.id.as_str());
    act.policy = Some(policy);
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let receipt = app.audit.intent_with_lease(&op, &act, &lease).await?;
    app.metrics.restarts.inc();
    let done = async {
        let w = app
            .store
            .workspace_update(w, app.now_ms(), |row| {
                unmoved(row, w)?;
                row.doc.power = Power::Running;
                row.doc.life.restart_at_ms = None;
                row.doc.life.restart_generation = Some(row.generation + 1);
                row.doc.life.resources_running = None;
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

/// A start was handed over that host may not have seen: it is, again, if that is so.
///
/// # Errors
/// Host's, or as for [`restart`].
pub async fn restart_again(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let ask = api::host::Op::Get {
        workspace: w.id.clone(),
    };
    let seen: api::Result<Actual> = app.peers.host.call("internal:restart", &ask).await;
    match seen {
        Ok(actual) if Some(actual.generation) >= w.doc.life.restart_generation => {
            app.actual_note(actual);
            app.wake.notify_one();
            Ok(())
        }
        Err(e) if e.code != ErrorCode::NotFound => Err(e),
        _ => restart(app, w).await,
    }
}

/// A start is owed that nothing allows: the workspace stays stopped.
async fn disown(app: &App, w: &Workspace) -> api::Result<()> {
    let why = Error::new(
        ErrorCode::VmUnavailable,
        "a restart was interrupted after its stop; start it again",
    );
    app.store
        .workspace_update(w, app.now_ms(), |row| {
            unmoved(row, w)?;
            row.doc.life.settle();
            row.doc.power = Power::Stopped;
            row.doc.last_error = Some(why.clone());
            Ok(())
        })
        .await
        .map(drop)
}

/// The time-to-live is over.
///
/// # Errors
/// What keeps its end from being brought about now.
pub async fn expire(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let action = w.doc.ttl_action;
    if action == TtlAction::Remove {
        return removal::workspace_expire(app, w).await.map(drop);
    }
    let actual = app.actual_known(&w.id);
    let asleep = w.doc.power == Power::Asleep;
    if action == TtlAction::Suspend {
        if asleep
            && actual
                .as_ref()
                .is_none_or(|a| a.state != ActualState::Asleep)
        {
            return Ok(()); // On its way; if it can't, it is stopped next.
        }
        let may = w.doc.life.sleep_failed_ms.is_none();
        if may && is_up(w, actual.as_ref()) {
            return sleep::standing_sleep(app, w).await;
        }
    }
    let rests = asleep && action != TtlAction::Stop;
    let pauses = action == TtlAction::Pause && w.doc.power != Power::Stopped;
    close(app, w, "workspace.expire", |row| {
        row.doc.ttl_expires_ms = None;
        if rests {
            // It keeps its memory and uses no CPU: all that was asked.
        } else if pauses {
            row.doc.power = Power::Paused;
        } else {
            power::exit(row);
        }
    })
    .await
}

/// Nobody used it for as long as its owner allows.
///
/// # Errors
/// What keeps it from being stopped now.
pub async fn idle_stop(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    close(app, w, "workspace.idle_stop", |row| {
        power::exit(row);
        row.doc.life.idle_stopped = true;
    })
    .await
}

/// A closing act under the standing policy.
async fn close(
    app: &App,
    w: &Workspace,
    event: &'static str,
    change: impl Fn(&mut Workspace),
) -> api::Result<()> {
    let op = Op::internal("expire");
    let mut act = Act::new(event, &w.account, w.id.as_str());
    act.policy = w.doc.policy.as_deref();
    app.audit.intent_closing(&op, &act).await;
    let done = async {
        let w = app
            .store
            .workspace_update(w, app.now_ms(), |row| {
                unmoved(row, w)?;
                change(row);
                Ok(())
            })
            .await?;
        app.host_apply(&op, &w, None, 0).await.map(drop)
    };
    let done: api::Result<()> = done.await;
    app.audit.outcome(&op, &act, &done).await;
    done
}

/// Whether a workspace runs and is wanted to, so that not being used matters.
#[must_use]
pub fn is_up(w: &Workspace, actual: Option<&Actual>) -> bool {
    w.doc.power == Power::Running && actual.is_some_and(|a| a.state == ActualState::Running)
}
