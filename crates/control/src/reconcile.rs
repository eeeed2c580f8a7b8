//! Brings what is stored and what is so together. Takes no input: reads everything, may run
//! twice, is woken by news from host, by requests and by a timer.
//!
//! What it does by itself it does under the owner's standing policy, or to close something.

use crate::app::{App, archive, creation, power, removal, sleep, snapshot, standing};
use crate::limits::{NEWS_WAIT_MS, RECONCILE_EVERY, RECONCILE_GAP, SLEEP_RETRY_MS};
use crate::op::Op;
use crate::store::{Stage, Workspace};
use api::host::{ACTIVE_MAX, Actual, ActualState, Changes, Idle};
use api::mint::PolicyAct;
use model::{Power, lifecycle};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Runs until `stop`.
pub async fn run(app: Arc<App>, mut stop: watch::Receiver<bool>) {
    let news = tokio::spawn(news(Arc::clone(&app)));
    loop {
        let pause = converge(&app).await;
        let news = async {
            tokio::time::sleep(RECONCILE_GAP).await;
            app.wake.notified().await;
        };
        tokio::select! {
            () = news => {}
            // A request waits for it.
            () = app.wanted.notified() => {}
            () = tokio::time::sleep(pause.max(RECONCILE_GAP)) => {}
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
                    if changes.states.iter().any(|a| a.wanted) {
                        app.wanted.notify_one();
                    }
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

/// One look at everything; how long until the next is due.
pub async fn converge(app: &Arc<App>) -> Duration {
    app.alarms_say().await;
    let left = app.audit.spool_flush().await;
    app.metrics
        .spooled
        .set(i64::try_from(left).unwrap_or(i64::MAX));
    let all = match app.store.workspace_list_all().await {
        Ok(all) => all,
        Err(e) => {
            tracing::error!(error = %e, detail = e.detail, "reconcile");
            return RECONCILE_EVERY;
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
    for w in &all {
        if app.is_busy(&w.id) {
            continue;
        }
        if let Err(e) = one(app, w, &mut kms_sealed).await {
            tracing::warn!(workspace = %w.id, code = e.code.as_str(), error = %e, detail = e.detail, "reconcile");
        }
    }
    idle_ends(app, &all).await;
    pause(&all, app.now_ms())
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
    if let Some(request_id) = &w.doc.outcome_owed {
        let mut op = Op::internal("reconcile.create");
        op.request_id.clone_from(request_id);
        return creation::outcome_pay(app, &op, w, None).await;
    }
    if archive::is_begun(w) || w.doc.life.snapshot_next.is_some() {
        // Whoever was at it may have come to its end since the list was read.
        let now = app.store.workspace_get(&w.account, w.id.as_str()).await?;
        standing::unmoved(&now, w)?;
    }
    if archive::is_begun(w) {
        return archive::archive_unwind(app, w).await;
    }
    if w.doc.life.snapshot_next.is_some() {
        return snapshot::snapshot_unwind(app, w).await;
    }
    let now_ms = app.now_ms();
    if w.doc.ttl_expires_ms.is_some_and(|t| t <= now_ms) {
        return standing::expire(app, w).await;
    }
    let actual = app.actual_known(&w.id);
    let heard = actual.as_ref().map(|a| a.generation);
    match actual {
        Some(actual) if actual.generation >= w.generation => {
            settle(app, w, &actual, kms_sealed).await
        }
        _ if w.doc.power == Power::Running && heard < w.doc.life.restart_generation => {
            standing::restart_again(app, w).await
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
    let now_ms = app.now_ms();
    let owed = w.doc.life.restart_at_ms;
    match (actual.state, w.doc.power) {
        (ActualState::Asleep, Power::Asleep) if sleep::wake_due(w, actual, now_ms) => {
            sleep::standing_wake(app, w, actual).await
        }
        (ActualState::Asleep, Power::Asleep) if sleep_ends_ms(w).is_some_and(|t| t <= now_ms) => {
            standing::idle_stop(app, w).await
        }
        (ActualState::Stopped, Power::Stopped) if sleep::wake_due(w, actual, now_ms) => {
            sleep::standing_wake(app, w, actual).await
        }
        // One whose VM died on the way never slept: it is a crash like any other.
        (ActualState::Running | ActualState::Paused | ActualState::Crashed, Power::Asleep) => {
            sleep::stays_awake(app, w, actual.error.clone()).await
        }
        (ActualState::Failed, Power::Asleep) => sleep::memory_lost(app, w, actual).await,
        (ActualState::Running, _) => {
            power::ran_note(app, w, Some(actual)).await?;
            let forgiven = actual
                .since_ms
                .is_some_and(|t| lifecycle::restarts_forgiven(t, now_ms));
            if w.doc.restarts > 0 && forgiven {
                let calm = |w: &mut Workspace| {
                    w.doc.restarts = 0;
                    Ok(())
                };
                app.store.workspace_update(w, now_ms, calm).await?;
            }
            Ok(())
        }
        (ActualState::Crashed | ActualState::Failed, Power::Paused) => {
            standing::exited(app, w, actual).await
        }
        (ActualState::Crashed | ActualState::Failed, Power::Running) => {
            match owed {
                None => standing::exited(app, w, actual).await,
                Some(at_ms) if !lifecycle::restart_due(at_ms, now_ms) => Ok(()),
                // Waits, and uses up no attempt.
                Some(_) if standing::is_sealed(actual) && kms_is_sealed(app, kms_sealed).await => {
                    Ok(())
                }
                Some(_) => standing::restart(app, w).await,
            }
        }
        (ActualState::Stopped, Power::Stopped) if w.doc.life.remove_due => {
            removal::workspace_expire(app, w).await.map(drop)
        }
        // Control was killed between the stop and the start of a restart.
        (ActualState::Stopped, Power::Stopped) if owed.is_some() => standing::restart(app, w).await,
        _ => Ok(()),
    }
}

/// When a workspace that sleeps is stopped, ms since the epoch.
fn sleep_ends_ms(w: &Workspace) -> Option<u64> {
    let stop_after_s = w.doc.life.idle?.stop_after_s;
    let asleep = w.doc.power == Power::Asleep && stop_after_s > 0;
    asleep.then(|| w.doc.life.slept_ms.saturating_add(stop_after_s * 1_000))
}

/// Whether what nobody uses is put to sleep, and not stopped: its owner wants it, mint signed that,
/// and it did not fail a moment ago.
fn may_sleep(app: &App, w: &Workspace, now_ms: u64) -> bool {
    let failed_ms = w.doc.life.sleep_failed_ms;
    let rested = failed_ms.is_none_or(|t| now_ms.saturating_sub(t) >= SLEEP_RETRY_MS);
    let wanted = w.doc.life.idle.is_some_and(|i| i.suspend_after_s > 0);
    wanted && rested && sleep::policy_allows(app, w, PolicyAct::Sleep)
}

/// Puts to sleep, or stops, what nobody uses. Host is asked about those only that could be due.
async fn idle_ends(app: &Arc<App>, all: &[Workspace]) {
    let now_ms = app.now_ms();
    let limit_ms = |w: &Workspace| {
        w.doc.life.idle.map_or(0, |i| match i.suspend_after_s {
            s if s > 0 && may_sleep(app, w, now_ms) => s * 1_000,
            _ => i.stop_after_s * 1_000,
        })
    };
    let due: Vec<&Workspace> = all
        .iter()
        .filter(|w| {
            let actual = app.actual_known(&w.id);
            let limit_ms = limit_ms(w);
            let since_ms = actual.as_ref().and_then(|a| a.since_ms).unwrap_or(now_ms);
            w.doc.stage == Stage::Ready
                && limit_ms > 0
                && standing::is_up(w, actual.as_ref())
                && lifecycle::idle_ms(u64::MAX, since_ms, now_ms) >= limit_ms
                && !app.is_busy(&w.id)
        })
        .collect();
    for some in due.chunks(ACTIVE_MAX) {
        let ask = api::host::Op::Idle {
            workspaces: some.iter().map(|w| w.id.clone()).collect(),
        };
        let idle: api::Result<Vec<Idle>> = app.peers.host.call("internal:idle", &ask).await;
        let idle: HashMap<_, _> = match idle {
            Ok(idle) => idle.into_iter().map(|i| (i.workspace, i.idle_ms)).collect(),
            Err(e) => {
                tracing::debug!(error = %e, detail = e.detail, "host does not say what is idle");
                return;
            }
        };
        for w in some {
            let unused = idle.get(&w.id).is_some_and(|ms| {
                lifecycle::idle_ms(*ms, w.doc.life.pinged_ms, now_ms) >= limit_ms(w)
            });
            if !unused {
                continue;
            }
            let done = if may_sleep(app, w, now_ms) {
                sleep::standing_sleep(app, w).await
            } else {
                standing::idle_stop(app, w).await
            };
            if let Err(e) = done {
                tracing::warn!(workspace = %w.id, code = e.code.as_str(), error = %e, "idle");
            }
        }
    }
}

/// When the next look is due: nothing waits longer than to its own time.
fn pause(all: &[Workspace], now_ms: u64) -> Duration {
    let due = |w: &Workspace| {
        [
            w.doc.ttl_expires_ms,
            w.doc.life.restart_at_ms,
            sleep_ends_ms(w),
        ]
    };
    let next_ms = all.iter().flat_map(due).flatten();
    let next_ms = next_ms.filter_map(|t| t.checked_sub(now_ms)).min();
    let pause = next_ms.map_or(RECONCILE_EVERY, Duration::from_millis);
    pause.min(RECONCILE_EVERY)
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
