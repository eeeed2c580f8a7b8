//! Brings what is stored and what is so together. Takes no input: reads everything, may run
//! twice, is woken by news from host, by requests and by a timer.
//!
//! What it does by itself it does under the owner's standing policy, or to close something.

use crate::app::removal;
use crate::app::{App, power};
use crate::audit::Act;
use crate::limits::{
    NEWS_WAIT_MS, RECONCILE_EVERY, RECONCILE_GAP, RESTART_PAUSE_MAX_MS, RESTART_PAUSE_MS,
    RESTARTS_FORGIVEN_AFTER_MS, RESTARTS_MAX,
};
use crate::op::Op;
use crate::store::{Stage, Workspace};
use api::ErrorCode;
use api::host::{Actual, ActualState, Changes};
use model::{Power, RestartPolicy, TtlAction};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Runs until `stop`.
pub async fn run(app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let news = tokio::spawn(news(Arc::clone(&app)));
    loop {
        converge(&app).await;
        tokio::time::sleep(RECONCILE_GAP).await;
        tokio::select! {
            () = app.wake.notified() => {}
            () = tokio::time::sleep(RECONCILE_EVERY) => {}
            _ = stop.wait_for(|s| *s) => break,
        }
    }
    news.abort();
}

/// Follows host's states.
async fn news(app: Arc<App>) {
    let mut since = 0;
    loop {
        let ask = api::host::Op::Changes {
            since,
            wait_ms: NEWS_WAIT_MS,
        };
        let wait = Duration::from_millis(NEWS_WAIT_MS) + Duration::from_secs(5);
        match app
            .peers
            .host
            .call_within::<_, Changes>("internal:control", &ask, wait)
            .await
        {
            Ok(changes) => {
                since = changes.seq;
                if !changes.states.is_empty() {
                    changes.states.into_iter().for_each(|a| app.actual_note(a));
                    app.wake.notify_one();
                }
            }
            Err(e) => {
                tracing::debug!(error = %e, detail = e.detail, "no news from host");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// One look at everything.
pub async fn converge(app: &Arc<App>) {
    let left = app.audit.spool_flush().await;
    app.metrics
        .spooled
        .set(i64::try_from(left).unwrap_or(i64::MAX));
    let all = match app.store.workspace_list_all().await {
        Ok(all) => all,
        Err(e) => {
            tracing::error!(error = %e, detail = e.detail, "reconcile");
            return;
        }
    };
    app.metrics
        .workspaces
        .set(i64::try_from(all.len()).unwrap_or(i64::MAX));
    let deleting = all
        .iter()
        .filter(|w| w.doc.stage == Stage::Deleting)
        .count();
    app.metrics
        .deletions_waiting
        .set(i64::try_from(deleting).unwrap_or(i64::MAX));
    let mut kms_sealed = None;
    for w in all {
        if app.is_busy(&w.id) {
            continue;
        }
        if let Err(e) = one(app, &w, &mut kms_sealed).await {
            tracing::warn!(workspace = %w.id, code = e.code.as_str(), error = %e, detail = e.detail, "reconcile");
        }
    }
}

async fn one(app: &Arc<App>, w: &Workspace, kms_sealed: &mut Option<bool>) -> api::Result<()> {
    match w.doc.stage {
        // Nobody works on it: the process that did is gone.
        Stage::Creating | Stage::Deleting => {
            removal_start(app, w);
            return Ok(());
        }
        Stage::Ready => {}
    }
    let now_ms = app.now_ms();
    if w.doc.ttl_expires_ms.is_some_and(|t| t <= now_ms) {
        return expire(app, w).await;
    }
    match app.actual_known(&w.id) {
        Some(actual) if actual.generation >= w.generation => {
            settle(app, w, &actual, kms_sealed).await
        }
        _ => push(app, w).await,
    }
}

/// Goes on with a deletion, or takes a creation back, beside everything else: a machine that is
/// away holds up no other workspace.
fn removal_start(app: &Arc<App>, w: &Workspace) {
    let busy = app.busy_quietly(&w.id);
    let (app, w) = (Arc::clone(app), w.clone());
    tokio::spawn(async move {
        let _busy = busy;
        if w.doc.stage == Stage::Creating {
            removal::unwind(&app, &Op::internal("reconcile.create"), &w, false).await;
            return;
        }
        match removal::resume(&app, &w).await {
            Ok(_) => tracing::info!(workspace = %w.id, "deletion finished"),
            Err(e) => {
                tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "deletion waits");
            }
        }
    });
}

/// Tells host what it missed.
async fn push(app: &App, w: &Workspace) -> api::Result<()> {
    let op = Op::internal("reconcile.push");
    // What comes of it is told by `news`, in order.
    app.host_apply(&op, w, None, 0).await.map(drop)
}

async fn settle(
    app: &Arc<App>,
    w: &Workspace,
    actual: &Actual,
    kms_sealed: &mut Option<bool>,
) -> api::Result<()> {
    let wanted = matches!(w.doc.power, Power::Running | Power::Paused);
    let now_ms = app.now_ms();
    match actual.state {
        ActualState::Running => {
            power::ran_note(app, w, Some(actual)).await?;
            let forgiven = actual
                .since_ms
                .is_some_and(|t| t + RESTARTS_FORGIVEN_AFTER_MS <= now_ms);
            if w.doc.restarts > 0 && forgiven {
                let calm = |w: &mut Workspace| {
                    w.doc.restarts = 0;
                    Ok(())
                };
                app.store.workspace_update(w, now_ms, calm).await?;
            }
            Ok(())
        }
        ActualState::Crashed | ActualState::Failed if wanted => {
            ended(app, w, actual, kms_sealed).await
        }
        _ => Ok(()),
    }
}

/// A workspace that should run does not: restart it, or leave it stopped.
async fn ended(
    app: &Arc<App>,
    w: &Workspace,
    actual: &Actual,
    kms_sealed: &mut Option<bool>,
) -> api::Result<()> {
    let sealed = actual
        .error
        .as_ref()
        .is_some_and(|e| e.code == ErrorCode::KmsSealed);
    let allowed = match w.doc.restart_policy {
        RestartPolicy::No => false,
        RestartPolicy::Always => true,
        RestartPolicy::OnFailure => actual.error.is_some(),
    };
    let most = w.doc.max_restarts.unwrap_or(RESTARTS_MAX);
    let policy = w.doc.policy.as_deref().filter(|_| allowed);
    let Some(policy) = policy.filter(|_| sealed || w.doc.restarts < most) else {
        return leave_stopped(app, w, actual).await;
    };
    if app.now_ms() < w.doc.restart_not_before_ms {
        return Ok(());
    }
    if sealed && kms_is_sealed(app, kms_sealed).await {
        return Ok(()); // Waits, and uses up no attempt.
    }
    restart(app, w, policy, sealed).await
}

async fn restart(app: &Arc<App>, w: &Workspace, policy: &str, free: bool) -> api::Result<()> {
    let op = Op::internal("restart");
    let _busy = app.busy_quietly(&w.id);
    let mut act = Act::new("workspace.restart", &w.account, w.id.as_str());
    act.policy = Some(policy);
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let receipt = app.audit.intent_with_lease(&op, &act, &lease).await?;
    app.metrics.restarts.inc();
    let now_ms = app.now_ms();
    let done = async {
        let w = app
            .store
            .workspace_update(w, now_ms, |w| {
                crate::app::workspace::ready(w)?;
                w.doc.restarts += u32::from(!free);
                let doublings = w.doc.restarts.min(16);
                let pause = (RESTART_PAUSE_MS << doublings).min(RESTART_PAUSE_MAX_MS);
                w.doc.restart_not_before_ms = now_ms + pause;
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

async fn leave_stopped(app: &Arc<App>, w: &Workspace, actual: &Actual) -> api::Result<()> {
    let op = Op::internal("exit");
    let act = Act::new("workspace.exited", &w.account, w.id.as_str());
    app.audit.fact(&op, &act, actual.error.as_ref()).await;
    if w.doc.remove_on_exit {
        return removal::workspace_expire(app, w).await.map(drop);
    }
    let error = actual.error.clone();
    let stopped = app
        .store
        .workspace_update(w, app.now_ms(), |w| {
            crate::app::workspace::ready(w)?;
            w.doc.power = Power::Stopped;
            w.doc.last_error.clone_from(&error);
            Ok(())
        })
        .await?;
    push(app, &stopped).await
}

/// The time-to-live is over.
async fn expire(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let power = match w.doc.ttl_action {
        TtlAction::Remove => return removal::workspace_expire(app, w).await.map(drop),
        TtlAction::Pause if w.doc.power == Power::Running => Power::Paused,
        TtlAction::Pause => w.doc.power,
        TtlAction::Stop | TtlAction::Suspend => Power::Stopped,
    };
    let op = Op::internal("expire");
    let act = Act::new("workspace.expire", &w.account, w.id.as_str());
    app.audit.intent_closing(&op, &act).await;
    let done = async {
        let w = app
            .store
            .workspace_update(w, app.now_ms(), |w| {
                crate::app::workspace::ready(w)?;
                w.doc.power = power;
                w.doc.ttl_expires_ms = None;
                Ok(())
            })
            .await?;
        push(app, &w).await
    };
    let done = done.await;
    app.audit.outcome(&op, &act, &done).await;
    done
}

/// Whether the KMS is sealed, asked once a round; one that does not answer counts as sealed.
async fn kms_is_sealed(app: &App, known: &mut Option<bool>) -> bool {
    if let Some(sealed) = *known {
        return sealed;
    }
    let status = app
        .peers
        .kms
        .call::<_, api::kms::Status>("internal:control", &api::kms::Op::Status)
        .await;
    let sealed = status.map_or(true, |s| s.sealed);
    *known = Some(sealed);
    sealed
}
