//! Snapshots: disk and memory, copied under keys of their own; one a workspace, the latest. Back to
//! it, or from it into a new workspace. A fork needs the disk only: so a snapshot may do without
//! memory.
//!
//! ```text
//!  (none) ──take: named in the row, as the next──▶ begun ──host took it: it is the row's snapshot──▶ stands
//!     ▲                                             │                                                │
//!     └── it failed, or control died; that before ──┘     (none) ◀── the next one stands ────────────┘
//!         it stands
//! ```
//!
//! The row is what counts: host keeps what it names and removes every other, and tells the KMS which one
//! stands. One that was interrupted is none. A restore ends what runs and replaces the disk; the snapshot
//! stays.
//!
//! A fork is a new workspace with a key, an identity and a policy of its own, dark like any other.
//! Its disk is a copy, encrypted under its own key before it runs; no memory goes with it, for that
//! holds the other's identity. It outlives what it was forked from.

use super::App;
use super::creation::{self, Permit};
use super::power::{start_with, stop_with};
use super::workspace::{Seen, ready, workspace_for_act, workspace_get};
use crate::audit::Act;
use crate::limits::{READY_WAIT_MS, SLEEP_WAIT_MS};
use crate::op::Op;
use crate::store::{Doc, Life, Snapshot, Stage, Workspace};
use api::agent::GuestConfig;
use api::audit::{Lease, Object};
use api::host::ActualState;
use api::{Error, ErrorCode};
use model::{ObjectId, Power, Purpose, WorkspaceId};
use std::sync::Arc;

/// What becomes of a workspace after its snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum After {
    /// It runs on.
    #[default]
    Resume,
    /// It is paused.
    Pause,
    /// It is stopped.
    Stop,
}

/// Takes a snapshot, in the place of the one before; without `memory` of the disk only, as if the
/// power had been cut at that moment.
///
/// # Errors
/// [`ErrorCode::VmNotRunning`], or why it could not be taken: the workspace runs on then.
pub async fn snapshot_take(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    after: After,
    memory: bool,
) -> api::Result<Seen> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    let state = actual.as_ref().map(|a| a.state);
    if !matches!(state, Some(ActualState::Running | ActualState::Paused)) {
        return Err(Error::new(
            ErrorCode::VmNotRunning,
            "a snapshot is of a running or paused workspace; start it first",
        ));
    }
    let _busy = app.busy(&w.id);
    let act = Act::new("workspace.snapshot", &w.account, w.id.as_str());
    let id = ObjectId::from_bytes(seal::random::bytes());
    let object = |purpose| Object {
        workspace: w.id.clone(),
        purpose,
        id: Some(id.clone()),
    };
    let lease = Lease {
        purpose: Purpose::SnapshotDisk,
        object: Some(id.clone()),
        also: memory
            .then(|| object(Purpose::SnapshotMemory))
            .into_iter()
            .collect(),
        ..app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    };
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let taken = async {
        let before = w.doc.power;
        // Nothing runs between the snapshot and what comes after it.
        let power = match after {
            After::Resume => Power::Running,
            After::Pause | After::Stop => Power::Paused,
        };
        let w = app
            .store
            .workspace_update(&w, app.now_ms(), |w| {
                ready(w)?;
                if w.doc.life.snapshot_next.is_some() {
                    let why = "another snapshot of it is being taken; wait for it";
                    return Err(Error::new(ErrorCode::Conflict, why));
                }
                w.doc.power = power;
                let resources = w.doc.life.resources_running.unwrap_or(w.doc.resources);
                w.doc.life.snapshot_next = Some(Box::new(Snapshot {
                    id: id.clone(),
                    request_id: op.request_id.clone(),
                    taken_ms: None,
                    resources,
                    memory,
                }));
                Ok(())
            })
            .await?;
        let actual = app
            .host_apply(op, &w, Some((&lease, &receipt)), SLEEP_WAIT_MS)
            .await?;
        if actual.snapshot.as_ref() != Some(&id) {
            power_back(app, op, &w, before).await?;
            return Err(actual.error.unwrap_or_else(|| {
                Error::new(
                    ErrorCode::Timeout,
                    "the snapshot was not taken in time; take it again",
                )
            }));
        }
        let now_ms = app.now_ms();
        let w = app
            .store
            .workspace_update(&w, now_ms, |w| {
                let life = &mut w.doc.life;
                let next = life.snapshot_next.take_if(|next| next.id == id);
                let next = next.ok_or_else(|| {
                    let why = "the snapshot was given up while it was being taken; take it again";
                    Error::new(ErrorCode::Conflict, why)
                })?;
                life.snapshot = Some(Snapshot {
                    taken_ms: Some(now_ms),
                    ..*next
                });
                Ok(())
            })
            .await?;
        if after == After::Stop {
            return stop_with(app, op, &w, super::power::exit).await;
        }
        Ok((w, Some(actual)))
    };
    let taken = taken.await;
    app.audit.outcome(op, &act, &taken).await;
    if taken.is_err()
        // If this can't be done now, the reconciler finds it begun.
        && let Err(e) = give_up(app, &w, &id).await
    {
        tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "a snapshot stays begun");
    }
    taken
}

/// Gives up what was begun by a control that is gone, and says so in the log: the one before it stands.
///
/// # Errors
/// What keeps it from being given up now.
pub async fn snapshot_unwind(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let _busy = app.busy_quietly(&w.id);
    let Some(next) = &w.doc.life.snapshot_next else {
        return Ok(());
    };
    let mut op = Op::internal("reconcile.snapshot");
    op.request_id.clone_from(&next.request_id);
    let act = Act::new("workspace.snapshot", &w.account, w.id.as_str());
    let why = "the snapshot was not taken to its end; take it again";
    let lost: api::Result<()> = Err(Error::new(ErrorCode::Unavailable, why));
    app.audit.outcome(&op, &act, &lost).await;
    give_up(app, w, &next.id).await
}

/// Takes a snapshot that was begun out of the row. Host hears of it from the reconciler.
async fn give_up(app: &App, w: &Workspace, id: &ObjectId) -> api::Result<()> {
    app.store
        .workspace_update(w, app.now_ms(), |w| {
            w.doc.life.snapshot_next.take_if(|next| next.id == *id);
            Ok(())
        })
        .await
        .map(drop)
}

/// Brings a workspace back to its snapshot: what runs ends, and its disk is as it was then.
///
/// # Errors
/// [`ErrorCode::Conflict`] without a snapshot, or why it does not run.
pub async fn snapshot_restore(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Seen> {
    let w = workspace_for_act(app, op, name).await?;
    let snapshot = taken(&w)?.clone();
    if snapshot.resources.disk_size_mb != w.doc.resources.disk_size_mb {
        return Err(Error::new(
            ErrorCode::Conflict,
            "its disk has another size than its snapshot's; take another snapshot",
        ));
    }
    let _busy = app.busy(&w.id);
    let (w, _) = {
        let act = Act::new("workspace.stop", &w.account, w.id.as_str());
        app.audit.intent_closing(op, &act).await;
        let stopped = stop_with(app, op, &w, super::power::exit).await;
        app.audit.outcome(op, &act, &stopped).await;
        stopped?
    };
    match restore(app, op, &w, &snapshot, snapshot.memory).await {
        // Its disk is worth having without its memory.
        Err(e) if snapshot.memory && e.code == ErrorCode::MemoryStale => {
            restore(app, op, &w, &snapshot, false).await
        }
        restored => restored,
    }
}

async fn restore(
    app: &Arc<App>,
    op: &Op,
    w: &Workspace,
    snapshot: &Snapshot,
    with_memory: bool,
) -> api::Result<Seen> {
    let mut act = Act::new("workspace.restore", &w.account, w.id.as_str());
    act.data.insert("memory".into(), with_memory.into());
    let object = |purpose| Object {
        workspace: w.id.clone(),
        purpose,
        id: Some(snapshot.id.clone()),
    };
    let mut also = vec![object(Purpose::SnapshotDisk)];
    also.extend(with_memory.then(|| object(Purpose::SnapshotMemory)));
    let lease = Lease {
        also,
        ..app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    };
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let sized = app
        .store
        .workspace_update(w, app.now_ms(), |w| {
            ready(w)?;
            let other = snapshot.resources != w.doc.resources;
            w.doc.life.resources_running = Some(snapshot.resources).filter(|_| other);
            Ok(())
        })
        .await;
    let restored = match sized {
        Ok(w) => start_with(app, op, &w, &lease, &receipt, READY_WAIT_MS).await,
        Err(e) => Err(e),
    };
    app.audit.outcome(op, &act, &restored).await;
    restored
}

/// Makes a new workspace from the snapshot of another.
///
/// # Errors
/// [`ErrorCode::Conflict`] without a snapshot, or why nothing was made.
pub async fn workspace_fork(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    named: Option<String>,
    slug: Option<String>,
) -> api::Result<Seen> {
    let (_, assertion) = op.client()?;
    let source = workspace_for_act(app, op, name).await?;
    let snapshot = taken(&source)?.clone();
    let id = WorkspaceId::from_bytes(seal::random::bytes());
    let now_ms = app.now_ms();
    let d = &source.doc;
    let fork = Workspace {
        account: source.account.clone(),
        idempotency_key: None,
        generation: 1,
        created_ms: now_ms,
        doc: Doc {
            name: named.or(slug.clone()).unwrap_or_else(|| id.to_string()),
            logo: None,
            resources: snapshot.resources,
            config: config_of(&id, &d.config)?,
            stage: Stage::Creating,
            power: Power::Running,
            public_access: false,
            ingress_ports: Vec::new(),
            ttl_expires_ms: d.ttl_s.map(|s| now_ms.saturating_add(s * 1_000)),
            policy: None,
            token_state: String::new(),
            creating_under: Some(assertion.to_owned()),
            outcome_owed: None,
            deletion: None,
            completed_ms: None,
            restarts: 0,
            last_error: None,
            life: Life {
                idle: d.life.idle,
                ..Life::default()
            },
            updated_ms: now_ms,
            ..d.clone()
        },
        slug,
        id,
    };
    // Two intents: the first makes its key, the second opens that key and the snapshot's.
    let made = app.lease_new(&fork.id, &fork.doc.host, &fork.doc.config);
    let create = app
        .audit
        .intent_with_lease(op, &creation::act(&fork), &made)
        .await?;
    let mut act = Act::new("workspace.fork", &fork.account, fork.id.as_str());
    act.data.insert("source".into(), source.id.as_str().into());
    let lease = Lease {
        also: vec![Object {
            workspace: source.id.clone(),
            purpose: Purpose::SnapshotDisk,
            id: Some(snapshot.id),
        }],
        ..app.lease_new(&fork.id, &fork.doc.host, &fork.doc.config)
    };
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let permit = Permit {
        create: &create,
        lease: &lease,
        receipt: &receipt,
    };
    let forked = creation::make(app, op, fork.clone(), permit, READY_WAIT_MS).await;
    app.audit.outcome(op, &act, &forked).await;
    forked
}

/// The snapshot of a workspace, if it has one that was taken to its end.
fn taken(w: &Workspace) -> api::Result<&Snapshot> {
    let snapshot = w.doc.life.snapshot.as_ref();
    snapshot.filter(|s| s.taken_ms.is_some()).ok_or_else(|| {
        Error::new(
            ErrorCode::Conflict,
            "the workspace has no snapshot; take one first",
        )
    })
}

/// The guest's config under another name.
fn config_of(id: &WorkspaceId, text: &str) -> api::Result<String> {
    let config: GuestConfig = serde_json::from_str(text).map_err(Error::internal)?;
    let config = GuestConfig {
        workspace: id.clone(),
        hostname: id.as_str().replace('_', "-"),
        ..config
    };
    serde_json::to_string(&config).map_err(Error::internal)
}

/// The power that was wanted before.
async fn power_back(app: &App, op: &Op, w: &Workspace, power: Power) -> api::Result<()> {
    if w.doc.power == power {
        return Ok(());
    }
    let w = app
        .store
        .workspace_update(w, app.now_ms(), |w| {
            w.doc.power = power;
            Ok(())
        })
        .await?;
    app.host_apply(op, &w, None, 0).await.map(drop)
}
