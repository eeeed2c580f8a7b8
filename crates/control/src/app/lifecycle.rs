//! Time-to-live, restart policy, mode.

use super::App;
use super::workspace::{Seen, policy_sign, ready, workspace_for_act};
use crate::audit::Act;
use crate::op::Op;
use crate::store::{Doc, Workspace};
use api::{Error, ErrorCode};
use model::{Mode, RestartPolicy, TtlAction};
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
    /// Counts anew from now.
    Ping {
        /// Another length, seconds.
        ttl_s: Option<u64>,
    },
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
    let actual = app.actual(op, &w.id).await;
    Ok((w, actual))
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
            ttl_apply(doc, ttl, now_ms);
        }
        Change::Ttl(ttl) => ttl_apply(doc, ttl, now_ms),
        Change::Ping { ttl_s } => {
            if let Some(s) = ttl_s.or(doc.ttl_s) {
                doc.ttl_expires_ms = Some(now_ms + s * 1_000);
            }
        }
    }
    if doc.mode == Mode::Temporary && doc.ttl_s.is_none() {
        return Err(Error::new(
            ErrorCode::ValidationError,
            "ttl: a temporary workspace needs one, as 600 or \"10m\"",
        ));
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
