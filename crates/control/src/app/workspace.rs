//! Workspaces: create, list, get, update.

use super::{App, signed, start_error, timed};
use crate::audit::Act;
use crate::limits::{READY_WAIT_MS, READY_WAIT_POLLING_MS};
use crate::op::Op;
use crate::store::{Doc, Inserted, Stage, Workspace};
use api::agent::GuestConfig;
use api::audit::Lease;
use api::host::Actual;
use api::mint::{PolicyAct, TokenState};
use api::{Error, ErrorCode, context, kms, mint};
use model::{Mode, Power, Resources, RestartPolicy, TtlAction, WorkspaceId};
use serde_json::Value;
use std::sync::Arc;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// A name for people.
    pub name: Option<String>,
    /// A name in URLs.
    pub slug: Option<String>,
    /// The image's name.
    pub image: Option<String>,
    /// How long its disk lives.
    pub mode: Mode,
    /// The client does not poll: wait longer.
    pub wait_ready: bool,
    /// Same key, same workspace.
    pub idempotency_key: Option<String>,
    /// Its size.
    pub resources: Resources,
    /// `K=V`.
    pub env: Vec<String>,
    /// A command to run.
    pub cmd: Vec<String>,
    /// The edge may reach its agent.
    pub public_access: bool,
    /// The contract's `ingress_ports`.
    pub ingress_ports: Vec<u16>,
    /// When it is restarted by itself.
    pub restart_policy: RestartPolicy,
    /// Restarts in a row.
    pub max_restarts: Option<u32>,
    /// Time-to-live, seconds.
    pub ttl_s: Option<u64>,
    /// What happens at its end.
    pub ttl_action: TtlAction,
    /// Delete when it ends by itself.
    pub remove_on_exit: bool,
}

/// A workspace and what is so of it.
pub type Seen = (Workspace, Option<Actual>);

/// Changes of a workspace's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// A name for people.
    pub name: Option<String>,
    /// A name in URLs; inner nothing clears it.
    pub slug: Option<Option<String>>,
    /// A picture; inner nothing clears it.
    pub logo: Option<Option<String>>,
}

/// Makes a workspace and starts it.
///
/// # Errors
/// What is wrong with the request, or why nothing was made.
pub async fn workspace_create(app: &Arc<App>, op: &Op, spec: Spec) -> api::Result<Seen> {
    let (account, assertion) = op.client()?;
    if let Some(key) = &spec.idempotency_key
        && let Some(before) = app.store.workspace_by_idempotency_key(account, key).await?
    {
        let actual = app.actual(op, &before.id).await;
        return Ok((before, actual));
    }
    let info = timed(op, "host_info", app.host_info(op)).await?;
    let wanted = spec.image.as_deref().unwrap_or(&app.config.host.pool_image);
    let image = info
        .images
        .iter()
        .find(|i| i.name == wanted || i.id == wanted)
        .ok_or_else(|| {
            let have: Vec<_> = info.images.iter().map(|i| i.name.as_str()).collect();
            let message = format!(
                "image: there is none of that name; there are: {}",
                have.join(", ")
            );
            Error::new(ErrorCode::ValidationError, message)
        })?;
    let id = WorkspaceId::from_bytes(seal::random::bytes());
    let now_ms = app.now_ms();
    let w = Workspace {
        account: account.clone(),
        slug: spec.slug.clone(),
        idempotency_key: spec.idempotency_key.clone(),
        generation: 1,
        created_ms: now_ms,
        doc: Doc {
            name: spec
                .name
                .clone()
                .or(spec.slug.clone())
                .unwrap_or_else(|| id.to_string()),
            logo: None,
            mode: spec.mode,
            image: image.name.clone(),
            image_id: image.id.clone(),
            resources: spec.resources,
            config: guest_config(&id, &spec)?,
            host: info.host.clone(),
            stage: Stage::Creating,
            power: Power::Running,
            public_access: spec.public_access,
            ingress_ports: spec.ingress_ports.clone(),
            restart_policy: spec.restart_policy,
            max_restarts: spec.max_restarts,
            ttl_s: spec.ttl_s,
            ttl_action: spec.ttl_action,
            ttl_expires_ms: spec.ttl_s.map(|s| now_ms + s * 1_000),
            remove_on_exit: spec.remove_on_exit,
            policy: None,
            token_state: String::new(),
            creating_under: Some(assertion.to_owned()),
            deletion: None,
            completed_ms: None,
            restarts: 0,
            restart_not_before_ms: 0,
            last_error: None,
            updated_ms: now_ms,
        },
        id,
    };
    let _busy = app.busy(&w.id);
    let mut act = Act::new("workspace.create", account, w.id.as_str());
    act.data.insert("image".into(), w.doc.image.clone().into());
    act.data.insert("cpus".into(), w.doc.resources.cpus.into());
    act.data
        .insert("memory_mb".into(), w.doc.resources.memory_mb.into());
    act.data
        .insert("disk_size_mb".into(), w.doc.resources.disk_size_mb.into());
    act.data
        .insert("public_access".into(), w.doc.public_access.into());
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let receipt = timed(op, "intent", app.audit.intent_with_lease(op, &act, &lease)).await?;
    let wait_ms = if spec.wait_ready {
        READY_WAIT_MS
    } else {
        READY_WAIT_POLLING_MS
    };
    let made = make(app, op, &w, &lease, &receipt, wait_ms).await;
    timed(op, "outcome", app.audit.outcome(op, &act, &made)).await;
    made
}

/// Everything after the intent.
async fn make(
    app: &Arc<App>,
    op: &Op,
    w: &Workspace,
    lease: &Lease,
    receipt: &Value,
    wait_ms: u64,
) -> api::Result<Seen> {
    let max = app.config.limits.workspaces_per_account;
    if let Inserted::Existing(before) = timed(op, "row", app.store.workspace_insert(w, max)).await? {
        let actual = app.actual(op, &before.id).await;
        return Ok((*before, actual));
    }
    let identity = match timed(op, "key", key_create(app, op, w, receipt)).await {
        Ok(identity) => identity,
        Err(e) => {
            // Unwind: nothing of it must stay. A clear refusal made no key to destroy.
            let unsure = [
                ErrorCode::Unavailable,
                ErrorCode::Internal,
                ErrorCode::Timeout,
            ];
            let keyless = !unsure.contains(&e.code);
            super::removal::unwind(app, op, w, keyless).await;
            return Err(e);
        }
    };
    let w = match timed(op, "provision", provision(app, op, w, identity)).await {
        Ok(w) => w,
        Err(e) => {
            super::removal::unwind(app, op, w, false).await;
            return Err(e);
        }
    };
    // From here on it exists, whether or not it runs yet.
    let apply = app.host_apply(op, &w, Some((lease, receipt)), wait_ms);
    let actual = match timed(op, "host", apply).await {
        Ok(actual) => Some(actual),
        Err(e) => {
            tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "first start");
            None
        }
    };
    let w = timed(op, "note", super::power::ran_note(app, &w, actual.as_ref())).await?;
    Ok((w, actual))
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

/// Tokens and policy.
async fn provision(app: &App, op: &Op, w: &Workspace, identity: String) -> api::Result<Workspace> {
    let (_, assertion) = op.client()?;
    let register = mint::Op::WorkspaceRegister {
        assertion: assertion.to_owned(),
        identity,
    };
    let state: mint::Signed = app.peers.mint.call(&op.request_id, &register).await?;
    token_state_check(app, w, &state.signed)?;
    let policy = policy_sign(app, op, w).await?;
    app.store
        .workspace_update(w, app.now_ms(), |w| {
            w.doc.stage = Stage::Ready;
            w.doc.creating_under = None;
            w.doc.token_state.clone_from(&state.signed);
            w.doc.policy.clone_from(&policy);
            Ok(())
        })
        .await
}

/// Mint's standing policy for what the platform may do to this workspace by itself; nothing if
/// that is nothing.
///
/// # Errors
/// Mint's.
pub async fn policy_sign(app: &App, op: &Op, w: &Workspace) -> api::Result<Option<String>> {
    let (_, assertion) = op.client()?;
    let mut acts = Vec::new();
    if w.doc.restart_policy != RestartPolicy::No {
        acts.push(PolicyAct::Restart);
    }
    if w.doc.remove_on_exit || w.doc.ttl_action == TtlAction::Remove {
        acts.push(PolicyAct::Expire);
    }
    if acts.is_empty() {
        return Ok(None);
    }
    let sign = mint::Op::PolicySign {
        assertion: assertion.to_owned(),
        workspace: w.id.clone(),
        acts,
    };
    let signed: mint::Signed = app.peers.mint.call(&op.request_id, &sign).await?;
    Ok(Some(signed.signed))
}

/// Reads a token state of this workspace.
///
/// # Errors
/// [`ErrorCode::Internal`] if it is not mint's, or of another workspace.
pub fn token_state_check(app: &App, w: &Workspace, text: &str) -> api::Result<TokenState> {
    let state: TokenState = signed("token state", text, &app.mint_key, context::TOKEN_STATE)?;
    if state.workspace != w.id || state.account != w.account {
        return Err(Error::internal(
            "mint's token state is of another workspace",
        ));
    }
    Ok(state)
}

/// A page of an account's workspaces, newest first, and how many there are in all.
///
/// # Errors
/// The store's.
pub async fn workspace_list(
    app: &App,
    op: &Op,
    keep: impl Fn(&Seen) -> bool,
    page: usize,
    limit: usize,
) -> api::Result<(Vec<Seen>, usize)> {
    let all = app.store.workspace_list(op.account()?).await?;
    let seen = all.into_iter().map(|w| {
        let actual = app.actual_known(&w.id);
        (w, actual)
    });
    let kept: Vec<Seen> = seen.filter(keep).collect();
    let total = kept.len();
    let from = page.saturating_sub(1).saturating_mul(limit);
    Ok((kept.into_iter().skip(from).take(limit).collect(), total))
}

/// One of the account's workspaces.
///
/// # Errors
/// [`ErrorCode::NotFound`], for another account's too.
pub async fn workspace_get(app: &App, op: &Op, name: &str) -> api::Result<Seen> {
    let w = app.store.workspace_get(op.account()?, name).await?;
    let actual = app.actual(op, &w.id).await;
    Ok((w, actual))
}

/// One of the account's workspaces that is not being deleted: what an act may act on.
///
/// # Errors
/// [`ErrorCode::NotFound`] or [`ErrorCode::Conflict`].
pub async fn workspace_for_act(app: &App, op: &Op, name: &str) -> api::Result<Workspace> {
    let w = app.store.workspace_get(op.account()?, name).await?;
    ready(&w)?;
    Ok(w)
}

/// Refuses a workspace that is being made or deleted.
///
/// # Errors
/// [`ErrorCode::Conflict`].
pub fn ready(w: &Workspace) -> api::Result<()> {
    match w.doc.stage {
        Stage::Ready => Ok(()),
        Stage::Creating => Err(Error::new(
            ErrorCode::Conflict,
            "the workspace is being created; wait until it is ready",
        )),
        Stage::Deleting => Err(Error::new(
            ErrorCode::Conflict,
            "the workspace is being deleted",
        )),
    }
}

/// Changes names.
///
/// # Errors
/// [`ErrorCode::Conflict`] for a slug in use.
pub async fn workspace_update(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    names: Names,
) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let act = Act::new("workspace.update", &w.account, w.id.as_str());
    app.audit.intent(op, &act).await?;
    let changed = app
        .store
        .workspace_update(&w, app.now_ms(), |w| {
            ready(w)?;
            if let Some(name) = &names.name {
                w.doc.name.clone_from(name);
            }
            if let Some(slug) = &names.slug {
                w.slug.clone_from(slug);
            }
            if let Some(logo) = &names.logo {
                w.doc.logo.clone_from(logo);
            }
            Ok(())
        })
        .await;
    app.audit.outcome(op, &act, &changed).await;
    app.wake.notify_one();
    let changed = changed?;
    let actual = app.actual(op, &changed.id).await;
    Ok((changed, actual))
}

/// Starts a workspace again whose first start failed.
///
/// # Errors
/// As for a start.
pub async fn provisioning_retry(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    if w.doc.completed_ms.is_none() && actual.as_ref().is_none_or(|a| start_error(a).is_some()) {
        return super::power::start(app, op, &w, READY_WAIT_POLLING_MS).await;
    }
    Ok((w, actual))
}

fn guest_config(id: &WorkspaceId, spec: &Spec) -> api::Result<String> {
    let config = GuestConfig {
        workspace: id.clone(),
        hostname: id.as_str().replace('_', "-"),
        env: spec.env.clone(),
        cmd: spec.cmd.clone(),
    };
    let text = serde_json::to_string(&config).map_err(Error::internal)?;
    if text.len() > crate::limits::GUEST_CONFIG_MAX_BYTES {
        return Err(Error::new(
            ErrorCode::ValidationError,
            "config.env and config.cmd together must be at most 32 KiB",
        ));
    }
    Ok(text)
}
