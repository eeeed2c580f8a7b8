//! Workspaces, quota, images, erasure receipts.

use super::fields::Fields;
use super::{Answer, Call, view};
use crate::app::workspace::{self as app_workspace, Names, Spec};
use crate::app::{App, image, lifecycle, network, removal, resources, stats};
use crate::limits::{CMD_ARGS_MAX, IDEMPOTENCY_KEY_MAX_CHARS, PAGE};
use crate::op::Op;
use model::limits::{
    CPUS, DISK_MB, ENV_ITEM_MAX_BYTES, ENV_MAX, MAX_RESTARTS, MEMORY_MB, NAME_MAX_CHARS, SLUG_CHARS,
};
use model::{Mode, Resources, RestartPolicy};
use serde_json::{Value, json};
use std::sync::Arc;

/// Fields of `config` that this version does not do.
const UNSUPPORTED: &[&str] = &[
    "static_network",
    "keep_logs",
    "enable_kvm",
    "ssh_access",
    "workloads",
    "ready_check",
    "desktop",
    "macos",
    "kernel_id",
    "proxy_assignment_id",
    "root_disk_id",
    "disks",
];

/// Words that are paths beside workspaces' ids.
const RESERVED: [&str; 6] = [
    "images", "quota", "estimate", "usage", "activity", "archived",
];

/// `POST /workspace`
pub async fn create(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let spec = spec(&call.body)?;
    let seen = app_workspace::workspace_create(&app, &op, spec).await?;
    Ok(Answer {
        status: 201,
        ..Answer::ok(json!({ "workspace": view::workspace(&seen) }))
    })
}

/// `GET /workspace`
pub async fn list(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let page = call.query_number("page", 1, 1..=1_000_000)?;
    let limit = call.query_number("limit", PAGE.0, 1..=PAGE.1)?;
    let wanted = |name: &str| {
        call.query
            .get(name)
            .filter(|v| !v.is_empty() && *v != "all")
    };
    let keep = |seen: &app_workspace::Seen| {
        let shown = view::workspace(seen);
        let same = |name: &str| wanted(name).is_none_or(|v| shown[name] == *v.as_str());
        // No workspace of this version is in a namespace.
        same("status") && same("mode") && wanted("namespace").is_none()
    };
    let (seen, total) = app_workspace::workspace_list(&app, &op, keep, page, limit).await?;
    let workspaces: Vec<Value> = seen.iter().map(view::workspace).collect();
    Ok(Answer::ok(json!({
        "workspaces": workspaces, "total": total, "page": page, "limit": limit,
    })))
}

/// `GET /workspace/{ws}`
pub async fn get(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = app_workspace::workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "workspace": view::workspace(&seen) })))
}

/// `POST /workspace/{ws}/provisioning/retry`
pub async fn provisioning_retry(
    app: Arc<App>,
    op: Arc<Op>,
    call: Arc<Call>,
) -> api::Result<Answer> {
    let seen = app_workspace::provisioning_retry(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "workspace": view::workspace(&seen) })))
}

/// `PUT /workspace/{ws}`
pub async fn update(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let body = &call.body;
    let config = body.object("config")?;
    config.refuse(UNSUPPORTED)?;
    let cleared = |name: &str, value: Option<String>| body.has(name).then_some(value);
    let names = Names {
        name: body.text_within("name", NAME_MAX_CHARS)?,
        slug: cleared("slug", slug(body)?),
        logo: cleared("logo", body.text("logo")?),
        env: config.has("env").then(|| env(&config)).transpose()?,
        cmd: config.has("cmd").then(|| cmd(&config)).transpose()?,
    };
    let several = several(body, &config)?;
    let resize = super::resources::resize(&config)?;
    let net = config.object("network_config")?;
    super::network::refuse(&net)?;
    let rules = network::Patch {
        public_access: public_access(&net)?,
        ingress_ports: net.ports("ingress_ports")?,
    };
    // All that is asked for is well formed: now it is done, one act after the other.
    let mut seen = None;
    if several != lifecycle::Several::default() {
        let change = lifecycle::Change::Several(several);
        seen = Some(lifecycle::lifecycle_update(&app, &op, call.ws(), change).await?);
    }
    if !resize.is_empty() {
        let (resized, _) = resources::resources_update(&app, &op, call.ws(), resize).await?;
        seen = Some(resized);
    }
    if rules != network::Patch::default() {
        seen = Some(network::network_update(&app, &op, call.ws(), rules).await?);
    }
    if names != Names::default() || seen.is_none() {
        seen = Some(app_workspace::workspace_update(&app, &op, call.ws(), names).await?);
    }
    Ok(Answer::ok(
        json!({ "workspace": seen.as_ref().map(view::workspace) }),
    ))
}

/// The name and the slug of a workspace to be.
///
/// # Errors
/// If one is out of its bounds.
pub fn names(body: &Fields) -> api::Result<(Option<String>, Option<String>)> {
    Ok((body.text_within("name", NAME_MAX_CHARS)?, slug(body)?))
}

/// What of the lifecycle a config merge names.
fn several(body: &Fields, config: &Fields) -> api::Result<lifecycle::Several> {
    let mut ttl = super::lifecycle::ttl(config)?;
    let seconds = body.number("auto_stop_seconds", 1..=31_622_400)?;
    ttl.ttl_s = ttl.ttl_s.or(seconds.map(u64::from));
    let idle = match config.get("idle") {
        None => config.has("idle").then_some(None),
        Some(_) => Some(super::lifecycle::idle_policy(&config.object("idle")?)?),
    };
    Ok(lifecycle::Several {
        ttl,
        restart_policy: super::lifecycle::restart_policy(config)?,
        max_restarts: config.number("max_restarts", MAX_RESTARTS)?,
        idle,
    })
}

/// `public_ingress`, or `public_access` as the network's own route calls it.
fn public_access(net: &Fields) -> api::Result<Option<bool>> {
    let public = net.flag("public_ingress")?;
    Ok(public.or(net.flag("public_access")?))
}

/// `DELETE /workspace/{ws}` and `DELETE /workspace/{ws}/lifecycle`
pub async fn delete(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    Ok(Answer::ok(
        match removal::workspace_delete(&app, &op, call.ws()).await? {
            removal::Removed::Gone(receipt) => json!({ "erasure_receipt": receipt }),
            removal::Removed::Accepted => json!({ "accepted": true }),
        },
    ))
}

/// `GET /workspace/{ws}/details`
pub async fn details(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (seen, counters) = stats::stats_get(&app, &op, call.ws()).await?;
    let access = crate::app::runtime_access::access_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({
        "workspace": view::workspace(&seen),
        "stats": super::power::stats_view(&app, &seen, &counters),
        "ssh": { "supported": false, "ssh_enabled": false, "connection": null },
        "api_access": { "enabled": access.enabled, "running": access.running },
        "lifecycle": view::lifecycle(&seen, app.now_ms()),
        "config": view::config(&seen.0),
    })))
}

/// `GET /workspace/{ws}/config`
pub async fn config(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let (w, _) = app_workspace::workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(json!({ "config": view::config(&w) })))
}

/// `GET /workspace/{ws}/info`
pub async fn info(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let seen = app_workspace::workspace_get(&app, &op, call.ws()).await?;
    Ok(Answer::ok(
        json!({ "info": view::info(&seen, app.now_ms()) }),
    ))
}

/// `GET /workspace/estimate`: nothing is charged for here; what can be said is whether such a
/// workspace may be made.
pub async fn estimate(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let default = Resources::default();
    let number = |name: &str, default: u32, range: &std::ops::RangeInclusive<u32>| {
        let range = *range.start() as usize..=*range.end() as usize;
        call.query_number(name, default as usize, range)
    };
    let cpus = number("cpu", default.cpus, &CPUS)?;
    let memory_mb = number("ram_mb", default.memory_mb, &MEMORY_MB)?;
    let disk_size_mb = number("disk_mb", default.disk_size_mb, &DISK_MB)?;
    let all = app.store.workspace_list(op.account()?).await?;
    Ok(Answer::ok(json!({ "estimate": {
        "cpus": cpus,
        "memory_mb": memory_mb,
        "disk_size_mb": disk_size_mb,
        "can_create": all.len() < app.config.limits.workspaces_per_account as usize,
        "cost": null,
    }})))
}

/// `GET /workspace/quota`
pub async fn quota(app: Arc<App>, op: Arc<Op>, _: Arc<Call>) -> api::Result<Answer> {
    let all = app.store.workspace_list(op.account()?).await?;
    let max = app.config.limits.workspaces_per_account as usize;
    let temporary = all.iter().filter(|w| w.doc.mode == Mode::Temporary).count();
    let can_create = all.len() < max;
    Ok(Answer::ok(json!({
        "plan": "self-hosted",
        "plan_label": "Self-hosted",
        "max_workspaces": max,
        "current_workspaces": all.len(),
        "max_sandboxes": max,
        "current_sandboxes": temporary,
        "limits": {
            "cpus": CPUS.end(), "memory_mb": MEMORY_MB.end(), "disk_size_mb": DISK_MB.end(),
        },
        "pool": null,
        "pool_usage": { "count": all.len() },
        "running_pool": null,
        "running_pool_usage": null,
        "can_create": can_create,
        "reason": (!can_create).then_some("the account has all the workspaces it may have"),
    })))
}

/// `GET /workspace/images`
pub async fn images(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let search = call.query.get("search").map(String::as_str);
    let category = |name: &str| {
        if name.contains("debian") {
            "os"
        } else {
            "runtime"
        }
    };
    let wanted = call
        .query
        .get("category")
        .map(String::as_str)
        .filter(|c| *c != "all");
    let images = image::image_list(&app, &op, search).await?;
    let kept = images
        .iter()
        .filter(|i| wanted.is_none_or(|c| category(&i.name) == c));
    let images: Vec<Value> = kept
        .map(|i| {
            json!({
                "id": i.name,
                "label": i.name,
                "desc": i.description,
                "category": category(&i.name),
                "image": i.name,
                "digest": i.id,
                "logo": null,
                "color": null,
            })
        })
        .collect();
    Ok(Answer::ok(json!({
        "images": images,
        "categories": [{ "id": "os", "label": "Systems" }, { "id": "runtime", "label": "Runtimes" }],
    })))
}

/// `GET /security/erasures/{ws}`
pub async fn erasure(app: Arc<App>, op: Arc<Op>, call: Arc<Call>) -> api::Result<Answer> {
    let e = app.store.erasure_get(op.account()?, call.ws()).await?;
    Ok(Answer::ok(json!({ "erasure": {
        "workspace": e.workspace,
        "erasure_receipt": e.receipt,
        "erased_at": view::time(e.time_ms),
    }})))
}

/// Reads a create body.
///
/// # Errors
/// The field that is wrong, or that this version does not support.
pub fn spec(body: &Fields) -> api::Result<Spec> {
    let config = body.object("config")?;
    let net = config.object("network_config")?;
    body.refuse(&["namespace", "region"])?;
    config.refuse(UNSUPPORTED)?;
    super::network::refuse(&net)?;
    let default = Resources::default();
    let size = |names: [&str; 3], old: &[&str], range, default| -> api::Result<u32> {
        let inner = config.number_of(&names, range)?;
        let outer = body.number_of(&names, range)?;
        Ok(inner
            .or(outer)
            .or(body.number_of(old, range)?)
            .unwrap_or(default))
    };
    let resources = Resources {
        cpus: size(["cpus", "cpu", "vcpus"], &["vcpus"], &CPUS, default.cpus)?,
        memory_mb: size(
            ["memory_mb", "ram_mb", "memory"],
            &["ram_mb"],
            &MEMORY_MB,
            default.memory_mb,
        )?,
        disk_size_mb: size(
            ["disk_size_mb", "writable_size_mb", "disk_mb"],
            &["disk_mb"],
            &DISK_MB,
            default.disk_size_mb,
        )?,
    };
    let mode = body
        .one_of("mode", "permanent, temporary")?
        .unwrap_or(Mode::Permanent);
    let ttl_s = config.duration("ttl")?;
    if mode == Mode::Temporary && ttl_s.is_none() {
        return Err(config.wrong("ttl", "a temporary workspace needs one, as 600 or \"10m\""));
    }
    let policy = super::lifecycle::restart_policy(&config)?;
    let restart_policy = match mode {
        Mode::Temporary => RestartPolicy::No,
        Mode::Permanent => policy.unwrap_or_default(),
    };
    let idle = match config.get("idle") {
        None => None,
        Some(_) => super::lifecycle::idle_policy(&config.object("idle")?)?,
    };
    if mode == Mode::Temporary && idle.is_some() {
        return Err(config.wrong("idle", "only a permanent workspace has an idle policy"));
    }
    Ok(Spec {
        name: body.text_within("name", NAME_MAX_CHARS)?,
        slug: slug(body)?,
        image: body.text("image")?,
        mode,
        wait_ready: body.flag("wait_ready")?.unwrap_or(true),
        idempotency_key: body
            .text_within("idempotency_key", IDEMPOTENCY_KEY_MAX_CHARS)?
            .filter(|k| !k.is_empty()),
        resources,
        env: env(&config)?,
        cmd: cmd(&config)?,
        public_access: public_access(&net)?.unwrap_or(false),
        ingress_ports: net.ports("ingress_ports")?.unwrap_or_default(),
        restart_policy,
        max_restarts: config.number("max_restarts", MAX_RESTARTS)?,
        ttl_s,
        ttl_action: super::lifecycle::ttl_action(&config)?.unwrap_or_default(),
        remove_on_exit: config.flag("remove_on_exit")?.unwrap_or(false),
        idle,
    })
}

fn slug(body: &Fields) -> api::Result<Option<String>> {
    let Some(slug) = body.text_within("slug", *SLUG_CHARS.end())? else {
        return Ok(None);
    };
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !SLUG_CHARS.contains(&slug.len()) || !slug.bytes().all(allowed) {
        return Err(body.wrong("slug", "must be 3 to 128 of a-z, 0-9 and '-'"));
    }
    if RESERVED.contains(&slug.as_str()) {
        return Err(body.wrong("slug", "is a word of the API; take another"));
    }
    Ok(Some(slug))
}

/// `["K=V"]` or `[{key, value}]`.
fn env(config: &Fields) -> api::Result<Vec<String>> {
    let wrong = || config.wrong("env", "must be an array of \"K=V\" or {key, value}");
    let mut env = Vec::new();
    for item in config.array("env", ENV_MAX)?.unwrap_or_default() {
        let item = match item {
            Value::String(s) => s.clone(),
            Value::Object(o) => match (o.get("key"), o.get("value")) {
                (Some(Value::String(k)), Some(Value::String(v))) => format!("{k}={v}"),
                _ => return Err(wrong()),
            },
            _ => return Err(wrong()),
        };
        let (key, _) = item.split_once('=').ok_or_else(wrong)?;
        let name = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        if key.is_empty() || !key.bytes().all(name) || key.as_bytes()[0].is_ascii_digit() {
            return Err(config.wrong("env", "names must be letters, digits and '_'"));
        }
        if item.len() > ENV_ITEM_MAX_BYTES || item.contains('\0') {
            return Err(config.wrong("env", "an entry must be at most 8 KiB, without NUL"));
        }
        env.push(item);
    }
    Ok(env)
}

/// A string (for a shell) or an array of arguments.
fn cmd(config: &Fields) -> api::Result<Vec<String>> {
    let wrong = || config.wrong("cmd", "must be a string, or an array of up to 64 strings");
    let args = match config.get("cmd") {
        None => return Ok(Vec::new()),
        Some(Value::String(s)) if s.is_empty() => return Ok(Vec::new()),
        Some(Value::String(s)) => vec!["/bin/sh".into(), "-c".into(), s.clone()],
        Some(Value::Array(a)) if a.len() <= CMD_ARGS_MAX => a
            .iter()
            .map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<api::Result<Vec<_>>>()?,
        Some(_) => return Err(wrong()),
    };
    if args
        .iter()
        .any(|a| a.contains('\0') || a.len() > ENV_ITEM_MAX_BYTES)
    {
        return Err(config.wrong("cmd", "an argument must be at most 8 KiB, without NUL"));
    }
    Ok(args)
}
