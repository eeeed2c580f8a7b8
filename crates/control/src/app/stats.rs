//! Counters of a workspace: numbers only, nothing of what ran (SEE-2).

use super::App;
use super::workspace::{Seen, workspace_get};
use crate::op::Op;
use api::ErrorCode;
use api::warden::Counters;

/// A workspace and its counters; zeros while it does not run.
///
/// # Errors
/// [`ErrorCode::NotFound`], for another account's too.
pub async fn stats_get(app: &App, op: &Op, name: &str) -> api::Result<(Seen, Counters)> {
    let seen = workspace_get(app, op, name).await?;
    let ask = api::host::Op::Counters {
        workspace: seen.0.id.clone(),
    };
    let counters = match app.peers.host.call(&op.request_id, &ask).await {
        Ok(counters) => counters,
        Err(e) if matches!(e.code, ErrorCode::VmNotRunning | ErrorCode::NotFound) => {
            Counters::default()
        }
        Err(e) => return Err(super::host_away(e)),
    };
    Ok((seen, counters))
}
