//! Tells host which workspaces were used, for their idle policies: a request that passed since the
//! last report, or that is still on its way.
//!
//! A few seconds' worth goes in one message; what host did not take is told the next time.
//!
//! Must never tell more than ids: not who asked, nor what.

use std::path::PathBuf;
use std::sync::Arc;

use api::host::{ACTIVE_MAX, Op};
use api::rpc::Client;

use crate::limits::{ACTIVITY_EVERY, ACTIVITY_MAX};
use crate::state::Table;

/// Reports for ever.
pub async fn report(table: Arc<Table>, host: PathBuf) {
    // A client of its own: a slow report must not delay a feed.
    let host = Client::new(host);
    loop {
        tokio::time::sleep(ACTIVITY_EVERY).await;
        report_once(&table, &host).await;
    }
}

async fn report_once(table: &Table, host: &Client) {
    table.used_note_live();
    loop {
        let workspaces = table.used_take(ACTIVE_MAX);
        let more = workspaces.len() == ACTIVE_MAX;
        if workspaces.is_empty() {
            return;
        }
        let op = Op::Active {
            workspaces: workspaces.clone(),
        };
        if let Err(e) = host
            .call_within::<_, bool>("edge.activity", &op, ACTIVITY_MAX)
            .await
        {
            tracing::debug!(error = %e, "host did not take the report");
            table.used_return(workspaces);
            return;
        }
        if !more {
            return;
        }
    }
}
