//! A workspace's size.

use super::fields::Fields;
use super::{Answer, Call, view};
use crate::app::App;
use crate::app::resources::{Resize, resources_update};
use crate::app::workspace::workspace_get;
use crate::op::Op;
use model::limits::{CPUS, DISK_MB, MEMORY_MB};
use serde_json::{Map, json};
use std::sync::Arc;

/// `GET /workspace/{ws}/resources`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "resources": view::resources(&seen) })))
}

/// `PUT` and `PATCH /workspace/{ws}/resources`
pub async fn update(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let resize = Resize {
        apply: call.body.flag("apply")?.unwrap_or(false),
        ..resize(&call.body)?
    };
    let (seen, relaunched) = resources_update(&app, &op, call.ws(), resize).await?;
    let mut updated = Map::new();
    for (name, value) in [
        ("cpus", resize.cpus),
        ("memory_mb", resize.memory_mb),
        ("disk_size_mb", resize.disk_size_mb),
    ] {
        if let Some(value) = value {
            updated.insert(name.into(), value.into());
        }
    }
    Ok(Answer::ok(json!({
        "updated": updated,
        "relaunched": relaunched,
        "resources": view::resources(&seen),
    })))
}

/// The size that a body or a config asks for, not applied at once.
///
/// # Errors
/// The field that is out of its bounds.
pub fn resize(body: &Fields) -> api::Result<Resize> {
    Ok(Resize {
        cpus: body.number_of(&["cpus", "cpu"], &CPUS)?,
        memory_mb: body.number_of(&["memory_mb", "ram_mb", "memory"], &MEMORY_MB)?,
        disk_size_mb: body.number_of(&["disk_size_mb", "writable_size_mb", "disk_mb"], &DISK_MB)?,
        apply: false,
    })
}
