//! A workspace's size: from its next start on, or at once by a relaunch.
//!
//! Must never make a disk smaller: what is on it would be cut off.

use super::App;
use super::power::workspace_restart;
use super::workspace::{Seen, ready, workspace_get};
use crate::audit::Act;
use crate::op::Op;
use crate::store::Workspace;
use api::host::ActualState;
use api::{Error, ErrorCode};
use model::{Power, Resources};
use std::sync::Arc;

/// Another size; nothing means unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resize {
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory, MiB.
    pub memory_mb: Option<u32>,
    /// Disk, MiB; grows only.
    pub disk_size_mb: Option<u32>,
    /// Relaunch a workspace that runs with another size than is wanted.
    pub apply: bool,
}

impl Resize {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The size that it makes of another.
    ///
    /// # Errors
    /// [`ErrorCode::ValidationError`] for a disk that would shrink.
    pub fn of(&self, now: Resources) -> api::Result<Resources> {
        let wanted = Resources {
            cpus: self.cpus.unwrap_or(now.cpus),
            memory_mb: self.memory_mb.unwrap_or(now.memory_mb),
            disk_size_mb: self.disk_size_mb.unwrap_or(now.disk_size_mb),
        };
        let wrong = |message: String| Error::new(ErrorCode::ValidationError, message);
        wanted.check().map_err(wrong)?;
        if wanted.disk_size_mb < now.disk_size_mb {
            return Err(wrong(format!(
                "disk_size_mb: a disk never shrinks, and this one has {} MiB; ask for that or more",
                now.disk_size_mb
            )));
        }
        Ok(wanted)
    }
}

/// Changes a workspace's size; whether it was relaunched for it.
///
/// # Errors
/// [`ErrorCode::ValidationError`] for a size that can't be, [`ErrorCode::Conflict`] for a paused
/// workspace that is to be relaunched, or why the relaunch failed: the size stays then, for the
/// next start.
pub async fn resources_update(
    app: &Arc<App>,
    op: &Op,
    name: &str,
    resize: Resize,
) -> api::Result<(Seen, bool)> {
    let (w, actual) = workspace_get(app, op, name).await?;
    ready(&w)?;
    resize.of(w.doc.resources)?;
    let state = actual.as_ref().map(|a| a.state);
    if resize.apply && (w.doc.power == Power::Paused || state == Some(ActualState::Paused)) {
        return Err(Error::new(
            ErrorCode::Conflict,
            "apply: a relaunch would lose the memory of a paused workspace; resume or stop it first",
        ));
    }
    let _busy = app.busy(&w.id);
    let mut act = Act::new("workspace.resources", &w.account, w.id.as_str());
    for (field, value) in [
        ("cpus", resize.cpus),
        ("memory_mb", resize.memory_mb),
        ("disk_size_mb", resize.disk_size_mb),
    ] {
        if let Some(value) = value {
            act.data.insert(field.into(), value.into());
        }
    }
    app.audit.intent(op, &act).await?;
    let has_vm = matches!(
        state,
        Some(
            ActualState::Starting
                | ActualState::Running
                | ActualState::Paused
                | ActualState::Asleep
        )
    );
    let resized = app
        .store
        .workspace_update(&w, app.now_ms(), |w| {
            ready(w)?;
            let wanted = resize.of(w.doc.resources)?;
            let running = w.doc.life.resources_running.unwrap_or(w.doc.resources);
            w.doc.life.resources_running = Some(running).filter(|r| has_vm && *r != wanted);
            w.doc.resources = wanted;
            Ok(())
        })
        .await;
    app.audit.outcome(op, &act, &resized).await;
    let w = resized?;
    if relaunch_needed(&w, resize.apply) {
        let seen = workspace_restart(app, op, w.id.as_str()).await?;
        return Ok((seen, true));
    }
    Ok(((w, actual), false))
}

fn relaunch_needed(w: &Workspace, apply: bool) -> bool {
    apply && w.doc.power == Power::Running && w.doc.life.resources_running.is_some()
}
