//! Deletion: a closing act whose every step is journaled in the row, so that a kill anywhere
//! resumes where it was.
//!
//! ```text
//! Ready ──▶ Deleting ──┬─ host: VM ended, disk file erased ─┐
//!                      ├─ KMS: key destroyed, receipt kept ─┼──▶ row removed, receipt kept
//!                      └─ mint: tokens revoked, forgotten ──┘
//! ```
//!
//! The steps do not wait for each other's success: a machine that is away keeps no key alive.

use super::{App, signed};
use crate::audit::Act;
use crate::limits::DELETE_WAIT_MS;
use crate::op::Op;
use crate::store::{Deletion, Stage, Workspace};
use api::host::ActualState;
use api::kms::Erasure;
use api::{Error, ErrorCode, context, kms, mint};
use model::{Power, TtlAction};
use std::sync::Arc;

/// What came of a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// Nothing is left; the KMS's erasure receipt, if there was a key.
    Gone(Option<String>),
    /// A part of the platform is away: it goes on by itself.
    Accepted,
}

/// Deletes a workspace.
///
/// # Errors
/// [`ErrorCode::NotFound`], for another account's too.
pub async fn workspace_delete(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Removed> {
    let (account, assertion) = op.client()?;
    let w = app.store.workspace_get(account, name).await?;
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.delete", &w.account, w.id.as_str());
    app.audit.intent_closing(op, &act).await;
    let removed = async {
        let w = begin(app, op, &w, vec![assertion.to_owned()]).await?;
        drive(app, op, &w).await
    };
    let removed = removed.await;
    let result = match &removed {
        Err(e) if e.code != ErrorCode::NotFound => {
            tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "deletion goes on later");
            Ok(Removed::Accepted)
        }
        other => other.clone(),
    };
    if !matches!(result, Ok(Removed::Accepted)) {
        app.audit.outcome(op, &act, &result).await;
    }
    result
}

/// Deletes a workspace at the end of its time or of its run, under the owner's standing policy,
/// if it is as it was seen.
///
/// # Errors
/// [`ErrorCode::Conflict`] if it changed since, or what keeps it from being done now.
pub async fn workspace_expire(app: &Arc<App>, w: &Workspace) -> api::Result<Removed> {
    let op = Op::internal("expire");
    let _busy = app.busy_quietly(&w.id);
    let policy = w.doc.policy.clone();
    let mut act = Act::new("workspace.delete", &w.account, w.id.as_str());
    act.policy = policy.as_deref();
    app.audit.intent_closing(&op, &act).await;
    let now = app.store.workspace_get(&w.account, w.id.as_str()).await?;
    if let Err(e) = super::standing::unmoved(&now, w) {
        app.audit.outcome::<()>(&op, &act, &Err(e.clone())).await;
        return Err(e);
    }
    let w = begin(app, &op, w, policy.clone().into_iter().collect()).await?;
    let removed = drive(app, &op, &w).await;
    if removed.is_ok() {
        app.audit.outcome(&op, &act, &removed).await;
    }
    removed
}

/// Goes on with a deletion that was begun.
///
/// # Errors
/// What keeps it from being done now.
pub async fn resume(app: &Arc<App>, w: &Workspace) -> api::Result<Removed> {
    let _busy = app.busy_quietly(&w.id);
    let mut op = Op::internal("reconcile.delete");
    if let Some(d) = &w.doc.deletion {
        op.request_id.clone_from(&d.request_id);
    }
    let removed = drive(app, &op, w).await;
    if removed.is_ok() {
        let act = Act::new("workspace.delete", &w.account, w.id.as_str());
        app.audit.outcome(&op, &act, &removed).await;
    }
    removed
}

/// Takes a creation back that did not come to its end; goes on later where it must. `keyless`:
/// no key was made, and so no token either.
pub async fn unwind(app: &Arc<App>, op: &Op, w: &Workspace, keyless: bool) {
    let authority = w.doc.creating_under.clone();
    let undone = async {
        let mut w = begin(app, op, w, authority.into_iter().collect()).await?;
        if keyless {
            w = note(app, &w, |d| (d.key_done, d.mint_done) = (true, true)).await?;
        }
        drive(app, op, &w).await
    };
    if let Err(e) = undone.await {
        tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "unwinding goes on later");
    }
}

/// Writes the journal's first line.
async fn begin(
    app: &App,
    op: &Op,
    w: &Workspace,
    authorities: Vec<String>,
) -> api::Result<Workspace> {
    app.store
        .workspace_update(w, app.now_ms(), |w| {
            w.doc.stage = Stage::Deleting;
            w.doc.power = Power::Deleted;
            w.idempotency_key = None;
            match &mut w.doc.deletion {
                // A second request lends its fresher authority.
                Some(d) => {
                    for a in &authorities {
                        if !d.authorities.contains(a) {
                            d.authorities.insert(0, a.clone());
                            d.authorities.truncate(4);
                        }
                    }
                }
                none => {
                    let mut all = authorities.clone();
                    // Mint signed `expire` where the owner asked for it.
                    let expires = w.doc.remove_on_exit || w.doc.ttl_action == TtlAction::Remove;
                    let policy = w.doc.policy.clone().filter(|p| expires && !all.contains(p));
                    all.extend(policy);
                    *none = Some(Deletion {
                        request_id: op.request_id.clone(),
                        actor: op.actor.name(),
                        authorities: all,
                        host_done: false,
                        key_done: false,
                        receipt: None,
                        mint_done: false,
                    });
                }
            }
            Ok(())
        })
        .await
}

/// Does what is not done yet; answers when nothing is left.
async fn drive(app: &App, op: &Op, w: &Workspace) -> api::Result<Removed> {
    let mut w = w.clone();
    let mut waits = None;
    if !journal(&w)?.host_done {
        match host_step(app, op, &w).await {
            Ok(()) => w = note(app, &w, |d| d.host_done = true).await?,
            Err(e) => waits = Some(e),
        }
    }
    if !journal(&w)?.key_done {
        match key_step(app, op, &w).await {
            Ok(receipt) => {
                w = note(app, &w, |d| {
                    d.key_done = true;
                    d.receipt.clone_from(&receipt);
                })
                .await?;
            }
            Err(e) => waits = Some(e),
        }
    }
    if !journal(&w)?.mint_done {
        match mint_step(app, op, &w).await {
            Ok(()) => w = note(app, &w, |d| d.mint_done = true).await?,
            Err(e) => waits = Some(e),
        }
    }
    if let Some(e) = waits {
        return Err(e);
    }
    if let Some(request_id) = &w.doc.outcome_owed {
        // With the row goes the note that its creation's outcome is owed.
        let mut op = Op::internal("reconcile.create");
        op.request_id.clone_from(request_id);
        super::creation::outcome_pay(app, &op, &w, None).await?;
    }
    let receipt = journal(&w)?.receipt.clone();
    app.store
        .workspace_erase(&w, receipt.as_deref(), app.now_ms())
        .await?;
    Ok(Removed::Gone(receipt))
}

async fn host_step(app: &App, op: &Op, w: &Workspace) -> api::Result<()> {
    let actual = app.host_apply(op, w, None, DELETE_WAIT_MS).await?;
    if actual.state == ActualState::Deleted {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::VmUnavailable,
        "the machine has not confirmed the deletion yet",
    ))
}

/// Destroys the key by the first authority that is taken; nothing if there never was one.
async fn key_step(app: &App, op: &Op, w: &Workspace) -> api::Result<Option<String>> {
    let mut refused = no_authority();
    for authority in &journal(w)?.authorities {
        let destroy = kms::Op::Destroy {
            workspace: w.id.clone(),
            authority: authority.clone(),
        };
        match app
            .peers
            .kms
            .call::<_, kms::Destroyed>(&op.request_id, &destroy)
            .await
        {
            Ok(done) => {
                let erasure: Erasure = signed(
                    "erasure receipt",
                    &done.receipt,
                    &app.kms_key,
                    context::ERASURE,
                )?;
                if erasure.workspace != w.id {
                    return Err(Error::internal("the KMS's receipt is of another workspace"));
                }
                return Ok(Some(done.receipt));
            }
            Err(e) if e.code == ErrorCode::NotFound => return Ok(None),
            Err(e) if is_refusal(e.code) => refused = e,
            Err(e) => return Err(e),
        }
    }
    Err(refused)
}

async fn mint_step(app: &App, op: &Op, w: &Workspace) -> api::Result<()> {
    let mut refused = no_authority();
    for authority in &journal(w)?.authorities {
        let forget = mint::Op::WorkspaceForget {
            authority: authority.clone(),
            workspace: w.id.clone(),
        };
        match app
            .peers
            .mint
            .call::<_, bool>(&op.request_id, &forget)
            .await
        {
            Ok(_) => return Ok(()),
            Err(e) if e.code == ErrorCode::NotFound => return Ok(()),
            Err(e) if is_refusal(e.code) => refused = e,
            Err(e) => return Err(e),
        }
    }
    Err(refused)
}

async fn note(app: &App, w: &Workspace, f: impl Fn(&mut Deletion)) -> api::Result<Workspace> {
    app.store
        .workspace_update(w, app.now_ms(), |w| {
            if let Some(d) = &mut w.doc.deletion {
                f(d);
            }
            Ok(())
        })
        .await
}

fn journal(w: &Workspace) -> api::Result<&Deletion> {
    w.doc
        .deletion
        .as_ref()
        .ok_or_else(|| Error::internal("a deletion without its journal"))
}

fn is_refusal(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::KeyRefused
            | ErrorCode::Forbidden
            | ErrorCode::Unauthorized
            | ErrorCode::TokenExpired
            | ErrorCode::BadRequest
    )
}

fn no_authority() -> Error {
    Error::new(
        ErrorCode::Forbidden,
        "nothing allows this deletion any more; ask for it again",
    )
}
