//! Power and counters.

use super::{Answer, Call, view};
use crate::app::lifecycle::{Change, lifecycle_update};
use crate::app::workspace::Seen;
use crate::app::{App, power, stats as app_stats};
use crate::op::Op;
use api::warden::Counters;
use serde_json::{Value, json};
use std::sync::Arc;

/// `POST /workspace/{ws}/start`
pub async fn start(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let force = call.body.flag("force")?.unwrap_or(false);
    power::workspace_start(&app, &op, call.ws(), force)
        .await
        .map(|s| state(&s))
}

/// `POST /workspace/{ws}/stop`
pub async fn stop(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    power::workspace_stop(&app, &op, call.ws())
        .await
        .map(|s| state(&s))
}

/// `POST /workspace/{ws}/restart`
pub async fn restart(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    power::workspace_restart(&app, &op, call.ws())
        .await
        .map(|s| state(&s))
}

/// `POST /workspace/{ws}/pause`
pub async fn pause(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    power::workspace_pause(&app, &op, call.ws())
        .await
        .map(|s| state(&s))
}

/// `POST /workspace/{ws}/resume`
pub async fn resume(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    power::workspace_resume(&app, &op, call.ws())
        .await
        .map(|s| state(&s))
}

/// `POST /workspace/{ws}/ping`
pub async fn ping(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let change = Change::Ping {
        ttl_s: call.body.duration("ttl_seconds")?,
    };
    let (w, _) = lifecycle_update(&app, &op, call.ws(), change).await?;
    let expires = w.doc.ttl_expires_ms.map(view::time);
    Ok(Answer::ok(
        json!({ "expires_at": expires, "ttl_expires_at": expires }),
    ))
}

/// `GET /workspace/{ws}/stats`
pub async fn stats(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (seen, counters) = app_stats::stats_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(
        json!({ "stats": stats_view(&app, &seen, &counters) }),
    ))
}

/// Counters in both spellings of the contract. CPU use is the mean since the start, in percent
/// of one CPU.
#[must_use]
pub fn stats_view(app: &App, seen: &Seen, c: &Counters) -> Value {
    const MIB: u64 = 1 << 20;
    let now_ms = app.now_ms();
    let since = seen.1.as_ref().and_then(|a| a.since_ms);
    let uptime_ms = since.map_or(0, |t| now_ms.saturating_sub(t));
    let cpu = (c.cpu_ns / 10_000).checked_div(uptime_ms).unwrap_or(0);
    let memory_mb = u64::from(seen.0.doc.resources.memory_mb);
    let disk_mb = u64::from(seen.0.doc.resources.disk_size_mb);
    let memory = (c.memory_bytes / MIB * 100)
        .checked_div(memory_mb)
        .unwrap_or(0);
    let disk = (c.disk_bytes / MIB * 100).checked_div(disk_mb).unwrap_or(0);
    json!({
        "cpu_usage": cpu,
        "memory_usage": memory,
        "disk_usage": disk,
        "network": { "rx": c.in_packets, "tx": c.out_packets, "unit": "packets" },
        "timestamp": view::time(now_ms),
        "cpuUsage": cpu,
        "memoryUsage": memory,
        "memoryUsedMB": c.memory_bytes / MIB,
        "memoryTotalMB": memory_mb,
        "guestDiskUsed": c.disk_bytes,
        "guestDiskTotal": disk_mb * MIB,
        "networkIn": c.in_packets,
        "networkOut": c.out_packets,
        "networkInDropped": c.in_dropped_packets,
        "networkOutDropped": c.out_dropped_packets,
        "cpuTimeNs": c.cpu_ns,
        "uptime": uptime_ms / 1_000,
    })
}

fn state((w, actual): &Seen) -> Answer {
    Answer::ok(json!({ "status": view::status(w, actual.as_ref()) }))
}
