//! Runtime API access.

use super::{Answer, Call};
use crate::app::{App, runtime_access as access};
use crate::op::Op;
use model::limits::PORT_AGENT_RAW;
use serde_json::json;
use std::sync::Arc;

/// `GET /workspace/{ws}/runtime-api-access`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let a = access::access_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(
        json!({ "enabled": a.enabled, "running": a.running }),
    ))
}

/// `POST /workspace/{ws}/runtime-api-access/enable`
pub async fn enable(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    // Its future is a large one.
    let g = Box::pin(access::access_enable(&app, &op, call.ws())).await?;
    Ok(Answer::ok(json!({ "enabled": true, "token": g.token })))
}

/// `POST /workspace/{ws}/runtime-api-access/disable`
pub async fn disable(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    access::access_disable(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "enabled": false })))
}

/// `POST /workspace/{ws}/runtime-api-access/token`
pub async fn token_rotate(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (g, _) = access::token_get(&app, &op, call.ws(), true).await?;
    Ok(Answer::ok(json!({ "token": g.token })))
}

/// `GET /workspace/{ws}/runtime-api-access/token`
pub async fn token_get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (g, enabled) = access::token_get(&app, &op, call.ws(), false).await?;
    Ok(Answer::ok(json!({ "token": g.token, "enabled": enabled })))
}

/// `GET /workspace/{ws}/runtime-api-access/token/raw`
pub async fn token_raw(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let raw = access::token_raw(&app, &op, call.ws()).await?;
    Ok(Answer::ok(
        json!({ "token": raw.token, "ip": raw.ip, "port": PORT_AGENT_RAW }),
    ))
}
