//! Workspaces: create, list, get, update.

use super::creation::{self, Permit};
use super::{App, signed, start_error, timed};
use crate::audit::Act;
use crate::limits::{READY_WAIT_MS, READY_WAIT_POLLING_MS};
use crate::op::Op;
use crate::store::{Doc, Life, Stage, Workspace};
use api::agent::GuestConfig;
use api::host::{Actual, Image, Info};
use api::mint::{PolicyAct, TokenState};
use api::{Error, ErrorCode, context, mint};
use model::{HostId, Idle, Mode, Power, Resources, RestartPolicy, TtlAction, WorkspaceId};
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
    /// Delete when it ends.
    pub remove_on_exit: bool,
    /// What happens when nobody uses it.
    pub idle: Option<Idle>,
}

/// A workspace and what is so of it.
pub type Seen = (Workspace, Option<Actual>);

/// Changes of a workspace's names, and of what its guest is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// A name for people.
    pub name: Option<String>,
    /// A name in URLs; inner nothing clears it.
    pub slug: Option<Option<String>>,
    /// A picture; inner nothing clears it.
    pub logo: Option<Option<String>>,
    /// `K=V`, from the next start on.
    pub env: Option<Vec<String>>,
    /// A command to run, from the next start on.
    pub cmd: Option<Vec<String>>,
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
    let wanted = spec.image.as_deref().unwrap_or(&app.config.host.pool_image);
    let (host, image) = timed(op, "image", image_find(app, op, wanted)).await?;
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
            image_id: image.id,
            resources: spec.resources,
            config: guest_config(&id, &spec)?,
            host,
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
            outcome_owed: None,
            deletion: None,
            completed_ms: None,
            restarts: 0,
            last_error: None,
            life: Life {
                idle: spec.idle,
                ..Life::default()
            },
            updated_ms: now_ms,
        },
        id,
    };
    let lease = app.lease_new(&w.id, &w.doc.host, &w.doc.config);
    let act = creation::act(&w);
    let receipt = timed(op, "intent", app.audit.intent_with_lease(op, &act, &lease)).await?;
    let wait_ms = if spec.wait_ready {
        READY_WAIT_MS
    } else {
        READY_WAIT_POLLING_MS
    };
    let permit = Permit {
        create: &receipt,
        lease: &lease,
        receipt: &receipt,
    };
    creation::make(app, op, w, permit, wait_ms).await
}

/// The machine, and its image of this name or id.
async fn image_find(app: &Arc<App>, op: &Op, wanted: &str) -> api::Result<(HostId, Image)> {
    let find = |info: &Info| {
        let mut all = info.images.iter();
        let image = all.find(|i| i.name == wanted || i.id == wanted)?;
        Some((info.host.clone(), image.clone()))
    };
    if let Some(found) = app.host_info_recent().as_ref().and_then(find) {
        return Ok(found);
    }
    let info = app.host_info(op).await?;
    find(&info).ok_or_else(|| {
        let have: Vec<_> = info.images.iter().map(|i| i.name.as_str()).collect();
        let message = format!(
            "image: there is none of that name; there are: {}",
            have.join(", ")
        );
        Error::new(ErrorCode::ValidationError, message)
    })
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
    let idle = w.doc.life.idle;
    let ends = w.doc.ttl_s.is_some() && w.doc.ttl_action != TtlAction::Remove;
    if ends || idle.is_some_and(|i| i.stop_after_s > 0) {
        acts.push(PolicyAct::Stop);
    }
    let suspends = w.doc.ttl_s.is_some() && w.doc.ttl_action == TtlAction::Suspend;
    if suspends || idle.is_some_and(|i| i.suspend_after_s > 0) {
        acts.push(PolicyAct::Sleep);
    }
    if idle.is_some() {
        acts.push(PolicyAct::Wake);
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
            if names.env.is_some() || names.cmd.is_some() {
                let mut config: GuestConfig =
                    serde_json::from_str(&w.doc.config).map_err(Error::internal)?;
                config.env = names.env.clone().unwrap_or(config.env);
                config.cmd = names.cmd.clone().unwrap_or(config.cmd);
                w.doc.config = guest_config_text(&config)?;
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
    guest_config_text(&config)
}

fn guest_config_text(config: &GuestConfig) -> api::Result<String> {
    let text = serde_json::to_string(config).map_err(Error::internal)?;
    if text.len() > crate::limits::GUEST_CONFIG_MAX_BYTES {
        return Err(Error::new(
            ErrorCode::ValidationError,
            "config.env and config.cmd together must be at most 32 KiB",
        ));
    }
    Ok(text)
}
