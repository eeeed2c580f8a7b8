//! What follows the intent of a creation. Its steps wait only for what they need:
//!
//! ```text
//!  row ─┬─▶ host: a VM claimed, its disk opened and attested ──────────┐
//!       └─▶ KMS: key ─▶ mint: tokens ─┬────────────────────────────────┴─▶ host: key, disk, guest ─┬─▶ answer ─▶ outcome
//!                                     └─▶ mint: policy ─▶ row: ready, outcome owed ────────────────┘
//! ```
//!
//! The row stands before anything else does, and is ready before the client is answered. Whatever
//! is killed before, the reconciler takes back; after, it pays the outcome that the row owes.
//!
//! Must never answer for a workspace whose row is not ready, or whose outcome is neither in the log
//! nor owed.

use super::workspace::{Seen, policy_sign, token_state_check};
use super::{App, Busy, signed, timed};
use crate::audit::Act;
use crate::op::Op;
use crate::store::{Inserted, Stage, Workspace};
use api::audit::Lease;
use api::host::{Actual, ActualState};
use api::{Error, ErrorCode, context, kms, mint};
use serde_json::Value;
use std::sync::Arc;

/// A start's permission: the lease, and the log's receipt for the intent that holds it.
#[derive(Clone, Copy)]
pub struct Permit<'a> {
    /// The log's receipt for the intent that makes the key.
    pub create: &'a Value,
    /// The lease.
    pub lease: &'a Lease,
    /// The receipt.
    pub receipt: &'a Value,
}

/// The act, as the log has it.
#[must_use]
pub fn act(w: &Workspace) -> Act<'_> {
    let mut act = Act::new("workspace.create", &w.account, w.id.as_str());
    let d = &w.doc;
    act.data.insert("image".into(), d.image.clone().into());
    act.data.insert("cpus".into(), d.resources.cpus.into());
    act.data
        .insert("memory_mb".into(), d.resources.memory_mb.into());
    act.data
        .insert("disk_size_mb".into(), d.resources.disk_size_mb.into());
    act.data
        .insert("public_access".into(), d.public_access.into());
    act
}

/// Makes what the intent announced, waits up to `wait_ms` for it to run, and sees to the outcome.
///
/// # Errors
/// Why it was not made; then nothing of it stays.
pub async fn make(
    app: &Arc<App>,
    op: &Op,
    w: Workspace,
    permit: Permit<'_>,
    wait_ms: u64,
) -> api::Result<Seen> {
    let busy = app.busy(&w.id);
    let max = app.config.limits.workspaces_per_account;
    let made = match timed(op, "row", app.store.workspace_insert(&w, max)).await {
        Ok(Inserted::New) => provision(app, op, &w, permit, wait_ms).await,
        Ok(Inserted::Existing(before)) => {
            let actual = app.actual(op, &before.id).await;
            Ok((*before, actual))
        }
        Err(e) => Err(e),
    };
    match made {
        Ok((mut made, actual)) if made.id == w.id => {
            let ran = actual.as_ref().is_some_and(runs).then(|| app.now_ms());
            outcome_later(app, op, &made, ran, busy);
            made.doc.completed_ms = made.doc.completed_ms.or(ran);
            Ok((made, actual))
        }
        other => {
            app.audit.outcome(op, &act(&w), &other).await;
            other
        }
    }
}

/// Writes the outcome that a ready row owes, and that it ran, if it did. May run twice: the log
/// then has it twice.
///
/// # Errors
/// The store's.
pub async fn outcome_pay(
    app: &App,
    op: &Op,
    w: &Workspace,
    ran_ms: Option<u64>,
) -> api::Result<()> {
    app.audit.outcome(op, &act(w), &Ok::<_, Error>(())).await;
    let paid = app.store.workspace_update(w, app.now_ms(), |w| {
        w.doc.outcome_owed = None;
        w.doc.completed_ms = w.doc.completed_ms.or(ran_ms);
        Ok(())
    });
    match paid.await {
        Err(e) if e.code != ErrorCode::NotFound => Err(e),
        _ => Ok(()), // It may be deleted already.
    }
}

/// Pays beside the answer. A kill leaves it to the reconciler: the row says what is owed.
fn outcome_later(app: &Arc<App>, op: &Op, w: &Workspace, ran_ms: Option<u64>, busy: Busy) {
    let (app, op, w) = (Arc::clone(app), op.clone(), w.clone());
    tokio::spawn(async move {
        let _busy = busy;
        if let Err(e) = outcome_pay(&app, &op, &w, ran_ms).await {
            tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "outcome noted later");
        }
    });
}

/// Everything after the row; takes it back if it does not come to its end.
async fn provision(
    app: &Arc<App>,
    op: &Op,
    w: &Workspace,
    permit: Permit<'_>,
    wait_ms: u64,
) -> api::Result<Seen> {
    let begin = timed(op, "begin", host_begin(app, op, w, permit));
    let (_, tokens) = tokio::join!(begin, tokens(app, op, w, permit.create));
    let known = match tokens {
        Ok(token_state) => {
            let mut w = w.clone();
            w.doc.token_state = token_state;
            w
        }
        Err((keyless, e)) => {
            super::removal::unwind(app, op, w, keyless).await;
            return Err(e);
        }
    };
    let run = async { Ok(timed(op, "run", host_run(app, op, &known, permit, wait_ms)).await) };
    let made = tokio::try_join!(run, timed(op, "ready", row_ready(app, op, &known)));
    match made {
        Ok((actual, w)) => Ok((w, actual)),
        Err(e) => {
            super::removal::unwind(app, op, w, false).await;
            Err(e)
        }
    }
}

/// Tells host to go as far as it may without the key. Whatever is wrong shows when it is told to
/// go on.
async fn host_begin(app: &App, op: &Op, w: &Workspace, permit: Permit<'_>) {
    let begun = app.host_apply(op, w, Some((permit.lease, permit.receipt)), 0);
    if let Err(e) = begun.await {
        tracing::debug!(workspace = %w.id, error = %e, detail = e.detail, "not begun");
    }
}

/// Has it run. It exists whether or not it does: a first start that failed can be tried again.
async fn host_run(
    app: &App,
    op: &Op,
    w: &Workspace,
    permit: Permit<'_>,
    wait_ms: u64,
) -> Option<Actual> {
    let lease = Some((permit.lease, permit.receipt));
    match app.host_apply(op, w, lease, wait_ms).await {
        Ok(actual) => Some(actual),
        Err(e) => {
            tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "first start");
            None
        }
    }
}

/// Key and tokens; the token state. An error says too whether it is clear that no key was made.
async fn tokens(
    app: &App,
    op: &Op,
    w: &Workspace,
    receipt: &Value,
) -> Result<String, (bool, Error)> {
    let identity = timed(op, "key", key_create(app, op, w, receipt)).await;
    let identity = identity.map_err(|e| {
        let unsure = [
            ErrorCode::Unavailable,
            ErrorCode::Internal,
            ErrorCode::Timeout,
        ];
        (!unsure.contains(&e.code), e)
    })?;
    timed(op, "tokens", register(app, op, w, identity))
        .await
        .map_err(|e| (false, e))
}

/// The workspace's key; answers the KMS's statement of its identity.
async fn key_create(app: &App, op: &Op, w: &Workspace, receipt: &Value) -> api::Result<String> {
    let create = kms::Op::WorkspaceKeyCreate {
        receipt: receipt.clone(),
    };
    let made: kms::KeyCreated = app.peers.kms.call(&op.request_id, &create).await?;
    let identity: kms::Identity = signed(
        "identity statement",
        &made.identity,
        &app.kms_key,
        context::IDENTITY,
    )?;
    if identity.workspace != w.id || identity.account != w.account {
        return Err(Error::internal(
            "the KMS's statement is of another workspace",
        ));
    }
    Ok(made.identity)
}

/// Makes it known to mint; answers its token state.
async fn register(app: &App, op: &Op, w: &Workspace, identity: String) -> api::Result<String> {
    let (_, assertion) = op.client()?;
    let register = mint::Op::WorkspaceRegister {
        assertion: assertion.to_owned(),
        identity,
    };
    let state: mint::Signed = app.peers.mint.call(&op.request_id, &register).await?;
    token_state_check(app, w, &state.signed)?;
    Ok(state.signed)
}

/// The policy, and the row that says that the workspace exists and owes its outcome.
async fn row_ready(app: &App, op: &Op, w: &Workspace) -> api::Result<Workspace> {
    let policy = policy_sign(app, op, w).await?;
    app.store
        .workspace_update(w, app.now_ms(), |row| {
            row.doc.stage = Stage::Ready;
            row.doc.creating_under = None;
            row.doc.token_state.clone_from(&w.doc.token_state);
            row.doc.policy.clone_from(&policy);
            row.doc.outcome_owed = Some(op.request_id.clone());
            Ok(())
        })
        .await
}

fn runs(actual: &Actual) -> bool {
    actual.state == ActualState::Running
}
