//! Workspaces as the contract shows them.

use crate::app::start_error;
use crate::app::workspace::Seen;
use crate::store::{Archive, Stage, Workspace};
use api::ErrorCode;
use api::host::{Actual, ActualState};
use model::lifecycle::RESTARTS_MAX;
use model::{Idle, Mode, Power, Resources, RestartPolicy, TtlAction};
use serde_json::{Value, json};

/// The contract's workspace object.
#[must_use]
pub fn workspace((w, actual): &Seen) -> Value {
    let d = &w.doc;
    let running = is_running(w, actual.as_ref());
    let status = status(w, actual.as_ref());
    let r = &d.resources;
    json!({
        "id": w.id,
        "slug": w.slug,
        "name": d.name,
        "logo": d.logo,
        "namespace": null,
        "mode": mode(d.mode),
        "image": d.image,
        "status": status,
        "ready": running,
        "info": {
            "status": status,
            "is_running": running,
            "asleep": is_asleep(actual.as_ref()),
            "user_requested_stop": d.power == Power::Stopped && d.last_error.is_none() && !d.life.idle_stopped,
        },
        "provisioning": provisioning(w, actual.as_ref()),
        "lifecycle": {
            "ttl": d.ttl_s,
            "ttl_action": ttl_action(d.ttl_action),
            "remove_on_exit": d.remove_on_exit,
            "restart_policy": d.restart_policy.word(),
            "ttl_expires_at": d.ttl_expires_ms.map(time),
        },
        "resources": {
            "cpus": r.cpus,
            "memory_mb": r.memory_mb,
            "disk_size_mb": r.disk_size_mb,
        },
        "ip": actual.as_ref().and_then(|a| a.ip.clone()),
        "started_from": actual.as_ref().and_then(|a| a.started_from.clone()),
        "created_at": time(w.created_ms),
        "updated_at": time(d.updated_ms),
    })
}

/// One of `running stopped paused creating starting stopping`. What sleeps is `stopped`, and
/// `info.asleep` says the rest: a start wakes it.
#[must_use]
pub fn status(w: &Workspace, actual: Option<&Actual>) -> &'static str {
    match (w.doc.stage, actual.map(|a| a.state)) {
        (Stage::Deleting, _) => "stopping",
        (Stage::Creating, _) => "creating",
        (_, Some(ActualState::Running)) => "running",
        (_, Some(ActualState::Paused)) => "paused",
        (_, Some(ActualState::Stopping)) => "stopping",
        (_, Some(ActualState::Starting)) => "starting",
        (_, Some(ActualState::Crashed | ActualState::Failed)) if restarts(w) => "starting",
        (_, None) if w.doc.power == Power::Running && w.doc.completed_ms.is_none() => "starting",
        _ => "stopped",
    }
}

/// The contract's lifecycle object.
#[must_use]
pub fn lifecycle((w, actual): &Seen, now_ms: u64) -> Value {
    let d = &w.doc;
    let expires = d.ttl_expires_ms.map(time);
    let since = actual.as_ref().and_then(|a| a.since_ms);
    json!({
        "idle": idle(d.life.idle),
        "snapshot_supported": true,
        "snapshot_unavailable_reason": null,
        "snapshot": snapshot(w),
        "asleep": is_asleep(actual.as_ref()),
        "asleep_since": is_asleep(actual.as_ref()).then(|| time(d.life.slept_ms)),
        "wakes_on_request": crate::app::sleep::wakes(w),
        "mode": mode(d.mode),
        "status": status(w, actual.as_ref()),
        "restart_policy": d.restart_policy.word(),
        "max_restarts": d.max_restarts,
        "restart_info": restart_info(w),
        "ttl": d.ttl_s,
        "ttl_action": ttl_action(d.ttl_action),
        "remove_on_exit": d.remove_on_exit,
        "uptime": since.map_or(0, |t| now_ms.saturating_sub(t) / 1_000),
        "expires_at": expires,
        "ttl_expires_at": expires,
        "pause_supported": true,
        "created_at": time(w.created_ms),
    })
}

/// The snapshot, if there is one.
#[must_use]
pub fn snapshot(w: &Workspace) -> Value {
    let snapshot = w.doc.life.snapshot.as_ref();
    match snapshot.and_then(|s| Some((s, s.taken_ms?))) {
        None => Value::Null,
        Some((s, taken_ms)) => json!({
            "id": s.id,
            "created_at": time(taken_ms),
            "cpus": s.resources.cpus,
            "memory_mb": s.resources.memory_mb,
            "disk_size_mb": s.resources.disk_size_mb,
            "memory": s.memory,
        }),
    }
}

/// The contract's archive.
#[must_use]
pub fn archive(a: &Archive) -> Value {
    let made = a.made.as_ref();
    let bytes = made.map(|m| m.bytes);
    json!({
        "version": a.version,
        "created_at": time(made.map_or(a.begun_ms, |m| m.made_ms)),
        "size": bytes,
        "size_bytes": bytes,
        "format": super::archive::FORMAT,
        "vm_paths": a.paths,
        "exclude_vm_paths": a.exclude,
        "entries": made.map(|m| m.entries),
        "skipped": made.map(|m| m.skipped),
    })
}

/// Whether its memory is at rest.
fn is_asleep(actual: Option<&Actual>) -> bool {
    actual.is_some_and(|a| a.memory && a.state == ActualState::Asleep)
}

fn idle(idle: Option<Idle>) -> Value {
    match idle {
        None => Value::Null,
        Some(i) => json!({ "suspend_after": i.suspend_after_s, "stop_after": i.stop_after_s }),
    }
}

/// How far unplanned restarts are: `state` is `ok`, `waiting` (see `next_restart_at`) or `failed`.
fn restart_info(w: &Workspace) -> Value {
    let d = &w.doc;
    let owed = d.life.restart_at_ms;
    let state = match owed {
        _ if d.life.given_up => "failed",
        Some(_) => "waiting",
        None => "ok",
    };
    json!({
        "state": state,
        "restarts": d.restarts,
        "max_restarts": d.max_restarts.unwrap_or(RESTARTS_MAX),
        "next_restart_at": owed.map(time),
        "last_error": d.last_error.as_ref().map(|e| e.code.as_str()),
        "message": d.last_error.as_ref().map(|e| e.message.as_str()),
    })
}

/// The contract's resources object; `running` is the size of the VM that runs, where another is
/// wanted from the next start on.
#[must_use]
pub fn resources((w, actual): &Seen) -> Value {
    let r = w.doc.resources;
    let size = |r: Resources| {
        json!({
            "cpus": r.cpus, "memory_mb": r.memory_mb, "disk_size_mb": r.disk_size_mb,
        })
    };
    json!({
        "cpus": r.cpus,
        "memory_mb": r.memory_mb,
        "disk_size_mb": r.disk_size_mb,
        "writable_size_mb": r.disk_size_mb,
        "cpu_config": { "quota": r.cpus * 100 },
        "status": status(w, actual.as_ref()),
        "running": w.doc.life.resources_running.map(size),
    })
}

/// What runs, for people: no secret, no address of the machine.
#[must_use]
pub fn info((w, actual): &Seen, now_ms: u64) -> Value {
    let actual = actual.as_ref();
    let since_ms = actual.and_then(|a| a.since_ms);
    let r = w.doc.life.resources_running.unwrap_or(w.doc.resources);
    json!({
        "id": w.id,
        "status": status(w, actual),
        "is_running": is_running(w, actual),
        "image": w.doc.image,
        "image_digest": w.doc.image_id,
        "cpus": r.cpus,
        "memory_mb": r.memory_mb,
        "disk_size_mb": r.disk_size_mb,
        "ip": actual.and_then(|a| a.ip.clone()),
        "start_id": actual.and_then(|a| a.start_id.clone()),
        "started_from": actual.and_then(|a| a.started_from.clone()),
        "started_at": since_ms.map(time),
        "uptime": since_ms.map_or(0, |t| now_ms.saturating_sub(t) / 1_000),
    })
}

/// The contract's flat network object.
#[must_use]
pub fn network((w, actual): &Seen) -> Value {
    let ip = actual.as_ref().and_then(|a| a.ip.clone());
    let ingress: &[&str] = if w.doc.public_access { &["host"] } else { &[] };
    json!({
        "ip": ip,
        "gateway": null,
        "public_access": w.doc.public_access,
        "allow_internet": false,
        "ingress": ingress,
        "ingress_ports": w.doc.ingress_ports,
        "egress": [],
        "egress_ports": [],
        "outbound_ip": null,
        "outbound_mode": "managed",
        "outbound_proxy": null,
        "private_links": [],
    })
}

/// The contract's VM config; names of environment variables, not their values.
#[must_use]
pub fn config(w: &Workspace) -> Value {
    let d = &w.doc;
    let guest = serde_json::from_str::<api::agent::GuestConfig>(&d.config).ok();
    let names = guest.iter().flat_map(|g| &g.env);
    let names: Vec<_> = names
        .filter_map(|kv| kv.split('=').next().map(str::to_owned))
        .collect();
    let mut config = json!({
        "image": d.image,
        "image_digest": d.image_id,
        "mode": mode(d.mode),
        "cpus": d.resources.cpus,
        "memory_mb": d.resources.memory_mb,
        "disk_size_mb": d.resources.disk_size_mb,
        "restart_policy": d.restart_policy.word(),
        "max_restarts": d.max_restarts,
        "idle": idle(d.life.idle),
        "ttl": d.ttl_s,
        "ttl_action": ttl_action(d.ttl_action),
        "remove_on_exit": d.remove_on_exit,
        "env": names,
        "hostname": guest.as_ref().map(|g| g.hostname.clone()),
    });
    config["network_config"] = json!({
        "allow_internet": false,
        "public_ingress": d.public_access,
        "ingress_ports": d.ingress_ports,
    });
    config
}

/// ISO 8601, UTC.
#[must_use]
pub fn time(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(ms)
        .unwrap_or(jiff::Timestamp::MAX)
        .to_string()
}

/// Whether it runs, and nothing is about to end it.
#[must_use]
pub fn is_running(w: &Workspace, actual: Option<&Actual>) -> bool {
    w.doc.stage == Stage::Ready && actual.is_some_and(|a| a.state == ActualState::Running)
}

fn provisioning(w: &Workspace, actual: Option<&Actual>) -> Value {
    let d = &w.doc;
    let error = actual
        .and_then(start_error)
        .filter(|_| !d.life.given_up)
        .or_else(|| d.last_error.clone());
    let first_failed = d.completed_ms.is_none() && error.is_some() && !restarts(w);
    let sealed = error
        .as_ref()
        .is_some_and(|e| e.code == ErrorCode::KmsSealed);
    let (state, phase, message) = match d.stage {
        Stage::Deleting => ("deleting", "deleting", "being deleted"),
        Stage::Creating => ("provisioning", "creating", "keys and tokens are being made"),
        Stage::Ready if d.life.given_up => ("failed", "failed", "it is not restarted any more"),
        Stage::Ready if first_failed => ("failed", "failed", "the first start failed"),
        Stage::Ready if d.completed_ms.is_some() || is_running(w, actual) => {
            ("ready", "ready", "ready")
        }
        Stage::Ready if d.power == Power::Stopped => ("ready", "ready", "stopped"),
        Stage::Ready if sealed => (
            "provisioning",
            "kms_sealed",
            "waits until the KMS is unsealed",
        ),
        Stage::Ready => ("provisioning", "starting", "starting"),
    };
    let error = error.filter(|_| first_failed || sealed || d.life.given_up);
    json!({
        "state": state,
        "phase": phase,
        "message": message,
        "error": error.map(|e| json!({ "code": e.code, "message": e.message })),
        "created_at": time(w.created_ms),
        "updated_at": time(d.updated_ms),
        "completed_at": d.completed_ms.map(time),
    })
}

/// Whether the reconciler will start it again.
fn restarts(w: &Workspace) -> bool {
    let d = &w.doc;
    let left = d.restarts < d.max_restarts.unwrap_or(RESTARTS_MAX);
    d.power == Power::Running
        && d.policy.is_some()
        && d.restart_policy != RestartPolicy::No
        && (left || d.life.restart_at_ms.is_some())
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Permanent => "permanent",
        Mode::Temporary => "temporary",
    }
}

fn ttl_action(action: TtlAction) -> &'static str {
    match action {
        TtlAction::Stop => "stop",
        TtlAction::Pause => "pause",
        TtlAction::Suspend => "suspend",
        TtlAction::Remove => "remove",
    }
}
