//! Time-to-live, restart policy, idle policy, mode: what the owner asks for. What comes of it
//! without anybody asking is in [`super::standing`].

use super::App;
use super::workspace::{Seen, policy_sign, ready, workspace_for_act};
use crate::audit::Act;
use crate::op::Op;
use crate::store::{Doc, Workspace};
use api::{Error, ErrorCode};
use model::{Idle, Mode, RestartPolicy, TtlAction};
use std::sync::Arc;

/// A change of a workspace's lifecycle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Its disk stays.
    Permanent {
        /// When it is restarted by itself.
        restart_policy: RestartPolicy,
    },
    /// Its disk goes.
    Temporary(Ttl),
    /// Another time-to-live.
    Ttl(Ttl),
    /// What happens when nobody uses it; nothing is off.
    Idle(Option<Idle>),
    /// Several at once; nothing means unchanged.
    Several(Several),
    /// It is used, and its time-to-live counts anew from now.
    Ping {
        /// Another length for this once, seconds; of no effect where there is no time-to-live.
        ttl_s: Option<u64>,
    },
}

/// Several changes at once; nothing means unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Several {
    /// The time-to-live.
    pub ttl: Ttl,
    /// When it is restarted by itself.
    pub restart_policy: Option<RestartPolicy>,
    /// Restarts in a row.
    pub max_restarts: Option<u32>,
    /// What happens when nobody uses it; inner nothing is off.
    pub idle: Option<Option<Idle>>,
}

/// A time-to-live; nothing means unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ttl {
    /// Seconds.
    pub ttl_s: Option<u64>,
    /// What happens at its end.
    pub action: Option<TtlAction>,
    /// Delete when it ends by itself.
    pub remove_on_exit: Option<bool>,
}

/// Changes a workspace's lifecycle, and has mint sign what the platform may do by itself.
///
/// # Errors
/// [`ErrorCode::ValidationError`] for a temporary workspace without a time-to-live.
pub async fn lifecycle_update(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    change: Change,
) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.lifecycle", &w.account, w.id.as_str());
    app.audit.intent(op, &act).await?;
    let done = update(app, op, &w, &change).await;
    app.audit.outcome(op, &act, &done).await;
    let w = done?;
    if matches!(change, Change::Ping { .. }) {
        used(app, op, &w).await;
    }
    let actual = app.actual(op, &w.id).await;
    Ok((w, actual))
}

/// Tells host, whose clock can't be set, that a workspace is used; the row knows it as well.
async fn used(app: &App, op: &Op, w: &Workspace) {
    let active = api::host::Op::Active {
        workspaces: vec![w.id.clone()],
    };
    let told: api::Result<bool> = app.peers.host.call(&op.request_id, &active).await;
    if let Err(e) = told {
        tracing::debug!(workspace = %w.id, error = %e, "a ping that host did not hear");
    }
}

async fn update(app: &App, op: &Op, w: &Workspace, change: &Change) -> api::Result<Workspace> {
    let now_ms = app.now_ms();
    let mut wanted = w.clone();
    apply(&mut wanted.doc, change, now_ms)?;
    let ping = matches!(change, Change::Ping { .. });
    let policy = if ping {
        w.doc.policy.clone()
    } else {
        policy_sign(app, op, &wanted).await?
    };
    app.store
        .workspace_update(w, now_ms, |w| {
            ready(w)?;
            apply(&mut w.doc, change, now_ms)?;
            w.doc.policy.clone_from(&policy);
            Ok(())
        })
        .await
}

fn apply(doc: &mut Doc, change: &Change, now_ms: u64) -> api::Result<()> {
    match change {
        Change::Permanent { restart_policy } => {
            doc.mode = Mode::Permanent;
            doc.restart_policy = *restart_policy;
            (doc.ttl_s, doc.ttl_expires_ms) = (None, None);
            (doc.ttl_action, doc.remove_on_exit) = (TtlAction::Stop, false);
        }
        Change::Temporary(ttl) => {
            doc.mode = Mode::Temporary;
            doc.restart_policy = RestartPolicy::No;
            doc.life.idle = None;
            ttl_apply(doc, ttl, now_ms);
        }
        Change::Ttl(ttl) => ttl_apply(doc, ttl, now_ms),
        Change::Idle(idle) => doc.life.idle = *idle,
        Change::Several(several) => {
            ttl_apply(doc, &several.ttl, now_ms);
            doc.restart_policy = several.restart_policy.unwrap_or(doc.restart_policy);
            doc.max_restarts = several.max_restarts.or(doc.max_restarts);
            doc.life.idle = several.idle.unwrap_or(doc.life.idle);
        }
        Change::Ping { ttl_s } => {
            doc.life.pinged_ms = now_ms;
            if let Some(s) = doc.ttl_s {
                doc.ttl_expires_ms = Some(now_ms + ttl_s.unwrap_or(s) * 1_000);
            }
        }
    }
    check(doc)
}

/// What fits a workspace's mode.
fn check(doc: &Doc) -> api::Result<()> {
    let wrong = |message: &str| Err(Error::new(ErrorCode::ValidationError, message));
    if doc.mode == Mode::Permanent {
        return Ok(());
    }
    if doc.ttl_s.is_none() {
        return wrong("ttl: a temporary workspace needs one, as 600 or \"10m\"");
    }
    if doc.life.idle.is_some() {
        return wrong("suspend_after: only a permanent workspace has an idle policy");
    }
    if doc.restart_policy != RestartPolicy::No {
        return wrong("restart_policy: a temporary workspace is never restarted by itself");
    }
    Ok(())
}

fn ttl_apply(doc: &mut Doc, ttl: &Ttl, now_ms: u64) {
    if let Some(s) = ttl.ttl_s {
        doc.ttl_s = Some(s);
        doc.ttl_expires_ms = Some(now_ms + s * 1_000);
    }
    if let Some(action) = ttl.action {
        doc.ttl_action = action;
    }
    if let Some(remove) = ttl.remove_on_exit {
        doc.remove_on_exit = remove;
    }
}
