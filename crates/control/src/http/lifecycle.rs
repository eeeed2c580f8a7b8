//! Lifecycle.

use super::fields::Fields;
use super::{Answer, Call, view};
use crate::app::App;
use crate::app::lifecycle::{Change, Ttl, lifecycle_update};
use crate::app::workspace::workspace_get;
use crate::op::Op;
use model::limits::{STOP_AFTER_MIN_S, SUSPEND_AFTER_MIN_S};
use model::{Idle, RestartPolicy, TtlAction};
use serde_json::json;
use std::sync::Arc;

/// `GET /workspace/{ws}/lifecycle`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(view::lifecycle(&seen, app.now_ms())))
}

/// `POST /workspace/{ws}/lifecycle/permanent`
pub async fn permanent(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let restart_policy = restart_policy(&call.body)?.unwrap_or(RestartPolicy::Always);
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

/// `PUT /workspace/{ws}/lifecycle/idle`
pub async fn idle(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let idle = idle_policy(&call.body)?;
    change(app, op, &call, Change::Idle(idle)).await
}

/// `suspend_after` and `stop_after`; nothing if both are off.
///
/// # Errors
/// If one is out of its bounds, or `suspend_after` is missing.
pub fn idle_policy(body: &Fields) -> api::Result<Option<Idle>> {
    let suspend_after_s = body
        .duration_or_off("suspend_after", SUSPEND_AFTER_MIN_S)?
        .ok_or_else(|| body.wrong("suspend_after", "is needed; 0 is off"))?;
    let stop_after_s = body
        .duration_or_off("stop_after", STOP_AFTER_MIN_S)?
        .unwrap_or(0);
    let idle = Idle {
        suspend_after_s,
        stop_after_s,
    };
    Ok(Some(idle).filter(|i| i.suspend_after_s > 0 || i.stop_after_s > 0))
}

/// `restart_policy`.
///
/// # Errors
/// If it is none.
pub fn restart_policy(body: &Fields) -> api::Result<Option<RestartPolicy>> {
    body.one_of("restart_policy", RestartPolicy::VALUES)
}

/// `ttl_action`.
///
/// # Errors
/// If it is none.
pub fn ttl_action(body: &Fields) -> api::Result<Option<TtlAction>> {
    body.one_of("ttl_action", "stop, pause, suspend, remove")
}

async fn change(app: Arc<App>, op: Arc<Op>, call: &Call, change: Change) -> api::Result<Answer> {
    let seen = lifecycle_update(&app, &op, call.ws(), change).await?;
    Ok(Answer::ok(json!({
        "workspace": view::workspace(&seen),
        "lifecycle": view::lifecycle(&seen, app.now_ms()),
    })))
}

/// `ttl`, `ttl_action`, `remove_on_exit`.
///
/// # Errors
/// If one is wrong.
pub fn ttl(body: &Fields) -> api::Result<Ttl> {
    Ok(Ttl {
        ttl_s: body.duration("ttl")?,
        action: ttl_action(body)?,
        remove_on_exit: body.flag("remove_on_exit")?,
    })
}
