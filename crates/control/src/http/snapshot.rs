//! Sleep, snapshots and what comes of them.

use super::{Answer, Call, view};
use crate::app::{App, sleep as app_sleep, snapshot as app_snapshot};
use crate::op::Op;
use serde_json::json;
use std::sync::Arc;

/// `POST /workspace/{ws}/sleep`
pub async fn sleep(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = app_sleep::workspace_sleep(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "workspace": view::workspace(&seen) })))
}

/// `POST /workspace/{ws}/snapshot`
pub async fn take(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let after = call.body.one_of("after", "resume, pause, stop")?;
    let after = after.unwrap_or_default();
    let memory = call.body.flag("memory")?.unwrap_or(true);
    let seen = app_snapshot::snapshot_take(&app, &op, call.ws(), after, memory).await?;
    Ok(Answer::ok(json!({
        "snapshot": view::snapshot(&seen.0),
        "workspace": view::workspace(&seen),
    })))
}

/// `POST /workspace/{ws}/restore`
pub async fn restore(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = app_snapshot::snapshot_restore(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({
        "snapshot": view::snapshot(&seen.0),
        "workspace": view::workspace(&seen),
    })))
}

/// `POST /workspace/{ws}/fork`
pub async fn fork(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (name, slug) = super::workspace::names(&call.body)?;
    let seen = app_snapshot::workspace_fork(&app, &op, call.ws(), name, slug).await?;
    Ok(Answer {
        status: 201,
        ..Answer::ok(json!({ "workspace": view::workspace(&seen) }))
    })
}
