//! Lifecycle.

use super::fields::{Fields, not_supported};
use super::{Answer, Call, view};
use crate::app::App;
use crate::app::lifecycle::{Change, Ttl, lifecycle_update};
use crate::app::workspace::workspace_get;
use crate::op::Op;
use model::{RestartPolicy, TtlAction};
use serde_json::json;
use std::sync::Arc;

/// The values of `restart_policy`, for messages.
pub const RESTART_POLICIES: &str = "no, always, on-failure";

/// `GET /workspace/{ws}/lifecycle`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(view::lifecycle(&seen, app.now_ms())))
}

/// `POST /workspace/{ws}/lifecycle/permanent`
pub async fn permanent(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let policy = call.body.one_of("restart_policy", RESTART_POLICIES)?;
    let restart_policy = policy.unwrap_or(RestartPolicy::Always);
    change(app, op, &call, Change::Permanent { restart_policy }).await
}

/// `POST /workspace/{ws}/lifecycle/temporary`
pub async fn temporary(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let ttl = ttl(&call.body)?;
    change(app, op, &call, Change::Temporary(ttl)).await
}

/// `PUT /workspace/{ws}/lifecycle/ttl`
pub async fn ttl_set(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let ttl = ttl(&call.body)?;
    change(app, op, &call, Change::Ttl(ttl)).await
}

/// `PUT /workspace/{ws}/lifecycle/idle`: off is what it is; on is not in this version.
pub async fn idle(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = workspace_get(&app, &op, call.ws()).await?;
    call.body.refuse(&["suspend_after", "stop_after"])?;
    Ok(Answer::ok(view::lifecycle(&seen, app.now_ms())))
}

/// `ttl_action`; suspending is not in this version.
///
/// # Errors
/// If it is none.
pub fn ttl_action(body: &Fields) -> api::Result<Option<TtlAction>> {
    let action = body.one_of("ttl_action", "stop, pause, suspend, remove")?;
    if action == Some(TtlAction::Suspend) {
        return Err(not_supported("ttl_action suspend"));
    }
    Ok(action)
}

async fn change(app: Arc<App>, op: Arc<Op>, call: &Call, change: Change) -> api::Result<Answer> {
    let seen = lifecycle_update(&app, &op, call.ws(), change).await?;
    Ok(Answer::ok(json!({
        "workspace": view::workspace(&seen),
        "lifecycle": view::lifecycle(&seen, app.now_ms()),
    })))
}

fn ttl(body: &Fields) -> api::Result<Ttl> {
    Ok(Ttl {
        ttl_s: body.duration("ttl")?,
        action: ttl_action(body)?,
        remove_on_exit: body.flag("remove_on_exit")?,
    })
}
