//! Archives: tars of a workspace's files, versioned, each encrypted under a key of its own.
//!
//! ```text
//!  (none) ──make: named in the row──▶ begun ──host made it: its size is in the row──▶ an archive
//!     ▲                                 │                                               │
//!     └── it failed, or control died ───┴───────────────── delete ──────────────────────┘
//! ```
//!
//! The row is what counts: host keeps the archives that the row names, and removes every other. One
//! that was begun is none: it is in no listing, and whoever finds it begun, after a death of control,
//! takes it out of the row.
//!
//! Must never list an archive that host did not say it has made.

use super::App;
use super::workspace::{Seen, ready, workspace_for_act, workspace_get};
use crate::audit::Act;
use crate::limits::{ARCHIVE_WAIT_MS, DELETE_WAIT_MS};
use crate::op::Op;
use crate::store::{Archive, Made, Workspace};
use api::audit::Lease;
use api::host::{Actual, ActualState};
use api::vmctl::Archived;
use api::{Error, ErrorCode};
use model::limits::ARCHIVES_MAX;
use model::{ObjectId, Power, Purpose};
use std::sync::Arc;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its version; none: the next number.
    pub version: Option<String>,
    /// What it holds.
    pub paths: Vec<String>,
    /// What it leaves out.
    pub exclude: Vec<String>,
}

/// Makes an archive of a running workspace.
///
/// # Errors
/// [`ErrorCode::VmNotRunning`]; [`ErrorCode::Conflict`] for a version that there is, or without room;
/// why it was not made: nothing is left of it then.
pub async fn archive_make(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    wanted: &Wanted,
) -> api::Result<Archive> {
    let w = running(workspace_get(app, op, name).await?)?;
    let _busy = app.busy(&w.id);
    let archive = Archive {
        version: wanted.version.clone().unwrap_or_else(|| next(&w)),
        id: ObjectId::from_bytes(seal::random::bytes()),
        begun_ms: app.now_ms(),
        request_id: op.request_id.clone(),
        paths: wanted.paths.clone(),
        exclude: wanted.exclude.clone(),
        made: None,
    };
    admit(&w, &archive)?;
    let mut act = Act::new("workspace.archive", &w.account, w.id.as_str());
    act.data
        .insert("archive".into(), archive.id.as_str().into());
    let lease = lease_of(app, &w, &archive.id);
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let made = async {
        let w = app
            .store
            .workspace_update(&w, app.now_ms(), |w| {
                ready(w)?;
                admit(w, &archive)?;
                w.doc.life.archive_last = number(&archive).max(w.doc.life.archive_last);
                w.doc.life.archives.push(archive.clone());
                Ok(())
            })
            .await?;
        let asked = Some((&lease, &receipt));
        let actual = app.host_apply(op, &w, asked, ARCHIVE_WAIT_MS).await?;
        let late = "the archive was not made in time; leave more out, or make several";
        let tar = tar_of(actual, &lease, late)?;
        let now_ms = app.now_ms();
        let made = Made {
            made_ms: now_ms,
            bytes: tar.bytes,
            entries: tar.entries,
            skipped: tar.skipped,
        };
        app.store
            .workspace_update(&w, now_ms, |w| {
                let mut all = w.doc.life.archives.iter_mut();
                let of = all.find(|a| a.id == archive.id).ok_or_else(|| {
                    let why = "the archive was deleted while it was being made";
                    Error::new(ErrorCode::Conflict, why)
                })?;
                of.made = Some(made.clone());
                Ok(())
            })
            .await?;
        Ok(made)
    };
    let made = made.await;
    app.audit.outcome(op, &act, &made).await;
    match made {
        Ok(made) => Ok(Archive {
            made: Some(made),
            ..archive
        }),
        Err(e) => {
            // If this can't be done now, the reconciler finds it begun.
            if let Err(e) = take_out(app, op, &w, &[archive.id], 0).await {
                tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "an archive stays begun");
            }
            Err(e)
        }
    }
}

/// Puts back the files of an archive, each in the place of the one that is there; what came of it.
///
/// # Errors
/// [`ErrorCode::VmNotRunning`], [`ErrorCode::NotFound`], [`ErrorCode::DiskTampered`]; what was put back
/// by then stays.
pub async fn archive_restore(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    version: &str,
) -> api::Result<(Archive, Archived)> {
    let w = running(workspace_get(app, op, name).await?)?;
    let all = w.doc.life.archives.iter();
    let archive = all
        .filter(|a| a.made.is_some())
        .find(|a| a.version == version);
    let archive = archive.ok_or_else(not_found)?.clone();
    if is_begun(&w) {
        return Err(being_made());
    }
    let _busy = app.busy(&w.id);
    let mut act = Act::new("workspace.archive_restore", &w.account, w.id.as_str());
    act.data
        .insert("archive".into(), archive.id.as_str().into());
    let lease = lease_of(app, &w, &archive.id);
    let receipt = app.audit.intent_with_lease(op, &act, &lease).await?;
    let restored = async {
        let now_ms = app.now_ms();
        let w = app
            .store
            .workspace_update(&w, now_ms, |w| {
                ready(w)?;
                if is_begun(w) {
                    return Err(being_made());
                }
                // Another generation, also twice in one millisecond.
                let last = &mut w.doc.life.archive_restored_ms;
                *last = now_ms.max(*last + 1);
                Ok(())
            })
            .await?;
        let asked = Some((&lease, &receipt));
        let actual = app.host_apply(op, &w, asked, ARCHIVE_WAIT_MS).await?;
        let late = "the archive was not put back in time; a part of it may be";
        tar_of(actual, &lease, late)
    };
    let restored = restored.await;
    app.audit.outcome(op, &act, &restored).await;
    restored.map(|tar| (archive, tar))
}

/// A workspace's archives, the oldest first.
///
/// # Errors
/// [`ErrorCode::NotFound`].
pub async fn archive_list(app: &Arc<App>, op: &Op, name: &str) -> api::Result<Vec<Archive>> {
    let w = app.store.workspace_get(op.account()?, name).await?;
    let all = w.doc.life.archives.into_iter();
    Ok(all.filter(|a| a.made.is_some()).collect())
}

/// One of them.
///
/// # Errors
/// [`ErrorCode::NotFound`].
pub async fn archive_get(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    version: &str,
) -> api::Result<Archive> {
    let all = archive_list(app, op, name).await?;
    all.into_iter()
        .find(|a| a.version == version)
        .ok_or_else(not_found)
}

/// Deletes one, or all; whether host has said that nothing of them is left.
///
/// # Errors
/// [`ErrorCode::NotFound`] for a version that there is not.
pub async fn archive_delete(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    version: Option<&str>,
) -> api::Result<bool> {
    let w = workspace_for_act(app, op, name).await?;
    let made = w.doc.life.archives.iter().filter(|a| a.made.is_some());
    let of = made.filter(|a| version.is_none_or(|v| a.version == v));
    let gone: Vec<ObjectId> = of.map(|a| a.id.clone()).collect();
    if gone.is_empty() {
        return version.map_or(Ok(true), |_| Err(not_found()));
    }
    let _busy = app.busy(&w.id);
    let mut act = Act::new("workspace.archive_delete", &w.account, w.id.as_str());
    act.data.insert("archives".into(), serde_json::json!(gone));
    app.audit.intent_closing(op, &act).await;
    let deleted = take_out(app, op, &w, &gone, DELETE_WAIT_MS).await;
    app.audit.outcome(op, &act, &deleted).await;
    deleted
}

/// Takes out what was begun by a control that is gone, and says so in the log.
///
/// # Errors
/// What keeps it from being taken out now.
pub async fn archive_unwind(app: &Arc<App>, w: &Workspace) -> api::Result<()> {
    let _busy = app.busy_quietly(&w.id);
    let begun = w.doc.life.archives.iter().filter(|a| a.made.is_none());
    for archive in begun {
        let mut op = Op::internal("reconcile.archive");
        op.request_id.clone_from(&archive.request_id);
        let mut act = Act::new("workspace.archive", &w.account, w.id.as_str());
        act.data
            .insert("archive".into(), archive.id.as_str().into());
        let why = "the archive was not made to its end; make it again";
        let lost: api::Result<()> = Err(Error::new(ErrorCode::Unavailable, why));
        app.audit.outcome(&op, &act, &lost).await;
        take_out(app, &op, w, std::slice::from_ref(&archive.id), 0).await?;
    }
    Ok(())
}

/// Whether one was begun: by a request that is at it, or that was lost.
#[must_use]
pub fn is_begun(w: &Workspace) -> bool {
    w.doc.life.archives.iter().any(|a| a.made.is_none())
}

/// What a workspace's disk leaves for one more archive, MiB.
#[must_use]
pub fn room_mb(w: &Workspace) -> u32 {
    let made = w.doc.life.archives.iter().filter_map(|a| a.made.as_ref());
    let used: u64 = made.map(|m| m.bytes.div_ceil(1 << 20)).sum();
    let used = u32::try_from(used).unwrap_or(u32::MAX);
    w.doc.resources.disk_size_mb.saturating_sub(used)
}

/// A workspace whose guest can be asked for files.
fn running((w, actual): Seen) -> api::Result<Workspace> {
    ready(&w)?;
    let runs = actual.is_some_and(|a| a.state == ActualState::Running);
    if runs && w.doc.power == Power::Running {
        return Ok(w);
    }
    let why =
        "only a running workspace can be archived, or have an archive put back; start it first";
    Err(Error::new(ErrorCode::VmNotRunning, why))
}

fn lease_of(app: &App, w: &Workspace, id: &ObjectId) -> Lease {
    Lease {
        purpose: Purpose::Archive,
        object: Some(id.clone()),
        ..app.lease_new(&w.id, &w.doc.host, &w.doc.config)
    }
}

/// What host says of the act under this lease.
fn tar_of(actual: Actual, lease: &Lease, late: &str) -> api::Result<Archived> {
    match actual.archived.filter(|a| a.start_id == lease.start_id) {
        Some(archived) => Ok(archived.tar),
        None => Err(actual
            .error
            .unwrap_or_else(|| Error::new(ErrorCode::Timeout, late))),
    }
}

fn being_made() -> Error {
    let why = "another archive is being made; wait for it";
    Error::new(ErrorCode::Conflict, why)
}

/// Whether the workspace may have it beside its others.
fn admit(w: &Workspace, archive: &Archive) -> api::Result<()> {
    let conflict = |why: String| Err(Error::new(ErrorCode::Conflict, why));
    let all = &w.doc.life.archives;
    if all.iter().any(|a| a.version == archive.version) {
        return conflict(format!("version: there is an archive {}", archive.version));
    }
    if is_begun(w) {
        return Err(being_made());
    }
    if all.len() >= ARCHIVES_MAX {
        let why = format!("the workspace has its {ARCHIVES_MAX} archives; delete one first");
        return conflict(why);
    }
    if room_mb(w) == 0 {
        let why = "archives take up as much as the workspace's disk, at most; delete one first";
        return conflict(why.into());
    }
    Ok(())
}

/// Takes archives out of the row and tells host; whether it has removed them.
async fn take_out(
    app: &App,
    op: &Op,
    w: &Workspace,
    ids: &[ObjectId],
    wait_ms: u64,
) -> api::Result<bool> {
    let w = app
        .store
        .workspace_update(w, app.now_ms(), |w| {
            w.doc.life.archives.retain(|a| !ids.contains(&a.id));
            Ok(())
        })
        .await?;
    match app.host_apply(op, &w, None, wait_ms).await {
        Ok(actual) => Ok(actual.generation >= w.generation),
        // They are gone from the row: the reconciler tells host as soon as it answers.
        Err(e) => {
            tracing::warn!(workspace = %w.id, error = %e, detail = e.detail, "host removes archives later");
            Ok(false)
        }
    }
}

/// The number after the last that was used.
fn next(w: &Workspace) -> String {
    w.doc.life.archive_last.saturating_add(1).to_string()
}

fn number(archive: &Archive) -> u64 {
    archive.version.parse().unwrap_or(0)
}

fn not_found() -> Error {
    Error::new(ErrorCode::NotFound, "there is no such archive")
}
