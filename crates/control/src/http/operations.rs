//! The operation table: every path of the contract and of ours, what it does, and whether it is
//! an act. The router, the OpenAPI description and the tests that walk all operations read it.

use super::{
    Answer, Answered, Call, Handler, archive, lifecycle, network, openapi, power, resources,
    runtime_access, snapshot, workspace,
};
use crate::app::App;
use crate::op::Op;
use api::{Error, ErrorCode};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

/// What an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Needs no credential and tells nothing.
    Public,
    /// Reads.
    Read,
    /// Acts: leaves an entry before and after.
    Act,
    /// Is of the contract, but not of this version.
    Unsupported,
}

/// An operation.
pub struct Operation {
    /// Its name, noun first.
    pub id: &'static str,
    /// The method.
    pub method: &'static str,
    /// The route's template.
    pub path: &'static str,
    /// What it is.
    pub kind: Kind,
    /// A line for people.
    pub summary: &'static str,
    /// Name of the body's schema.
    pub body: Option<&'static str>,
    /// What answers it.
    pub run: Handler,
}

/// What a method and path are.
pub enum Matched {
    /// An operation, with the path's parameters.
    Operation(&'static Operation, HashMap<&'static str, String>),
    /// A path that takes other methods.
    OtherMethod,
    /// No path.
    Nothing,
}

impl Matched {
    /// The operation, if there is one.
    #[must_use]
    pub fn operation(&self) -> Option<&'static Operation> {
        match self {
            Self::Operation(o, _) => Some(o),
            _ => None,
        }
    }
}

/// Finds the operation of a method and path; a literal segment wins over a parameter.
#[must_use]
pub fn find(method: &str, path: &str) -> Matched {
    let all = || OPERATIONS.iter().chain(UNSUPPORTED);
    let mut best: Option<(usize, Matched)> = None;
    for o in all() {
        let Some(params) = parameters(o.path, path) else {
            continue;
        };
        let n = params.len();
        let here = if o.method == method {
            Matched::Operation(o, params)
        } else {
            Matched::OtherMethod
        };
        let better = match &best {
            None => true,
            Some((m, b)) => n < *m || n == *m && matches!(b, Matched::OtherMethod),
        };
        if better {
            best = Some((n, here));
        }
    }
    best.map_or(Matched::Nothing, |(_, m)| m)
}

/// The parameters of `path` as `template` names them, if it fits.
fn parameters(template: &'static str, path: &str) -> Option<HashMap<&'static str, String>> {
    let mut params = HashMap::new();
    let mut have = path.split('/');
    for want in template.split('/') {
        let have = have.next()?;
        match want.strip_prefix('{').and_then(|w| w.strip_suffix('}')) {
            Some(name) => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
                if have.is_empty() || have.len() > 255 || !have.bytes().all(plain) {
                    return None;
                }
                params.insert(name, have.to_owned());
            }
            None if want == have => {}
            None => return None,
        }
    }
    have.next().is_none().then_some(params)
}

const fn operation(
    id: &'static str,
    method: &'static str,
    path: &'static str,
    kind: Kind,
    summary: &'static str,
    body: Option<&'static str>,
    run: Handler,
) -> Operation {
    Operation {
        id,
        method,
        path,
        kind,
        summary,
        body,
        run,
    }
}

const fn unsupported(method: &'static str, path: &'static str) -> Operation {
    let summary = "Not in this version";
    operation(
        "not_supported",
        method,
        path,
        Kind::Unsupported,
        summary,
        None,
        refuse,
    )
}

fn refuse(_: Arc<App>, _: Arc<Op>, _: Arc<Call>) -> Answered {
    Box::pin(std::future::ready(Err(Error::new(
        ErrorCode::NotSupported,
        "this version does not support this part of the API",
    ))))
}

async fn health(_: Arc<App>, _: Arc<Op>, _: Arc<Call>) -> api::Result<Answer> {
    Ok(Answer::ok(json!({ "status": "ok" })))
}

async fn openapi(_: Arc<App>, _: Arc<Op>, _: Arc<Call>) -> api::Result<Answer> {
    Ok(Answer::ok(openapi::document()))
}

/// What this version does.
pub static OPERATIONS: &[Operation] = &[
    operation(
        "health",
        "GET",
        "/health",
        Kind::Public,
        "Whether the API answers",
        None,
        |a, o, c| Box::pin(health(a, o, c)),
    ),
    operation(
        "openapi",
        "GET",
        "/openapi.json",
        Kind::Public,
        "This description",
        None,
        |a, o, c| Box::pin(openapi(a, o, c)),
    ),
    operation(
        "workspace_create",
        "POST",
        "/workspace",
        Kind::Act,
        "Make a workspace and start it",
        Some("WorkspaceCreate"),
        |a, o, c| Box::pin(workspace::create(a, o, c)),
    ),
    operation(
        "workspace_list",
        "GET",
        "/workspace",
        Kind::Read,
        "List workspaces",
        None,
        |a, o, c| Box::pin(workspace::list(a, o, c)),
    ),
    operation(
        "image_list",
        "GET",
        "/workspace/images",
        Kind::Read,
        "List images",
        None,
        |a, o, c| Box::pin(workspace::images(a, o, c)),
    ),
    operation(
        "quota_get",
        "GET",
        "/workspace/quota",
        Kind::Read,
        "What the account may have",
        None,
        |a, o, c| Box::pin(workspace::quota(a, o, c)),
    ),
    operation(
        "estimate_get",
        "GET",
        "/workspace/estimate",
        Kind::Read,
        "Whether a workspace of a size may be made",
        None,
        |a, o, c| Box::pin(workspace::estimate(a, o, c)),
    ),
    operation(
        "workspace_get",
        "GET",
        "/workspace/{ws}",
        Kind::Read,
        "Get a workspace",
        None,
        |a, o, c| Box::pin(workspace::get(a, o, c)),
    ),
    operation(
        "workspace_update",
        "PUT",
        "/workspace/{ws}",
        Kind::Act,
        "Change names, or merge a config; most of a config counts from the next start on",
        Some("WorkspaceUpdate"),
        |a, o, c| Box::pin(workspace::update(a, o, c)),
    ),
    operation(
        "workspace_delete",
        "DELETE",
        "/workspace/{ws}",
        Kind::Act,
        "Delete a workspace and destroy its key",
        None,
        |a, o, c| Box::pin(workspace::delete(a, o, c)),
    ),
    operation(
        "provisioning_retry",
        "POST",
        "/workspace/{ws}/provisioning/retry",
        Kind::Act,
        "Try a failed first start again",
        None,
        |a, o, c| Box::pin(workspace::provisioning_retry(a, o, c)),
    ),
    operation(
        "workspace_details",
        "GET",
        "/workspace/{ws}/details",
        Kind::Read,
        "Everything of a workspace",
        None,
        |a, o, c| Box::pin(workspace::details(a, o, c)),
    ),
    operation(
        "workspace_config",
        "GET",
        "/workspace/{ws}/config",
        Kind::Read,
        "Its config; environment by name only",
        None,
        |a, o, c| Box::pin(workspace::config(a, o, c)),
    ),
    operation(
        "resources_get",
        "GET",
        "/workspace/{ws}/resources",
        Kind::Read,
        "Its size",
        None,
        |a, o, c| Box::pin(resources::get(a, o, c)),
    ),
    operation(
        "resources_put",
        "PUT",
        "/workspace/{ws}/resources",
        Kind::Act,
        "Change its size, now (`apply`) or from the next start on; a disk only grows",
        Some("Resources"),
        |a, o, c| Box::pin(resources::update(a, o, c)),
    ),
    operation(
        "resources_update",
        "PATCH",
        "/workspace/{ws}/resources",
        Kind::Act,
        "Change its size, now (`apply`) or from the next start on; a disk only grows",
        Some("Resources"),
        |a, o, c| Box::pin(resources::update(a, o, c)),
    ),
    operation(
        "workspace_info",
        "GET",
        "/workspace/{ws}/info",
        Kind::Read,
        "What runs",
        None,
        |a, o, c| Box::pin(workspace::info(a, o, c)),
    ),
    operation(
        "stats_get",
        "GET",
        "/workspace/{ws}/stats",
        Kind::Read,
        "Its counters",
        None,
        |a, o, c| Box::pin(power::stats(a, o, c)),
    ),
    operation(
        "workspace_start",
        "POST",
        "/workspace/{ws}/start",
        Kind::Act,
        "Start; wake, if it sleeps",
        Some("Start"),
        |a, o, c| Box::pin(power::start(a, o, c)),
    ),
    operation(
        "workspace_sleep",
        "POST",
        "/workspace/{ws}/sleep",
        Kind::Act,
        "Encrypt memory to disk and end the VM, until it is started or its gateway is asked for",
        None,
        |a, o, c| Box::pin(snapshot::sleep(a, o, c)),
    ),
    operation(
        "snapshot_take",
        "POST",
        "/workspace/{ws}/snapshot",
        Kind::Act,
        "Keep memory and disk as they are, in the place of the snapshot before",
        Some("Snapshot"),
        |a, o, c| Box::pin(snapshot::take(a, o, c)),
    ),
    operation(
        "snapshot_restore",
        "POST",
        "/workspace/{ws}/restore",
        Kind::Act,
        "Back to the snapshot: what runs ends, and its disk is as it was then",
        None,
        |a, o, c| Box::pin(snapshot::restore(a, o, c)),
    ),
    operation(
        "workspace_fork",
        "POST",
        "/workspace/{ws}/fork",
        Kind::Act,
        "Make a new workspace from the snapshot's disk, with a key and an identity of its own",
        Some("Fork"),
        |a, o, c| Box::pin(snapshot::fork(a, o, c)),
    ),
    operation(
        "archive_create",
        "POST",
        "/workspace/{ws}/archives",
        Kind::Act,
        "Keep a tar of a running workspace's files, encrypted under a key of its own",
        Some("Archive"),
        |a, o, c| Box::pin(archive::create(a, o, c)),
    ),
    operation(
        "archive_list",
        "GET",
        "/workspace/{ws}/archives",
        Kind::Read,
        "Its archives, the oldest first",
        None,
        |a, o, c| Box::pin(archive::list(a, o, c)),
    ),
    operation(
        "archive_get",
        "GET",
        "/workspace/{ws}/archives/{version}",
        Kind::Read,
        "What one of its archives is",
        None,
        |a, o, c| Box::pin(archive::get(a, o, c)),
    ),
    operation(
        "archive_delete",
        "DELETE",
        "/workspace/{ws}/archives/{version}",
        Kind::Act,
        "Delete one of its archives",
        None,
        |a, o, c| Box::pin(archive::delete(a, o, c)),
    ),
    operation(
        "archive_delete_all",
        "DELETE",
        "/workspace/{ws}/archives",
        Kind::Act,
        "Delete all its archives",
        None,
        |a, o, c| Box::pin(archive::delete_all(a, o, c)),
    ),
    operation(
        "archive_restore",
        "POST",
        "/workspace/{ws}/archives/{version}/restore",
        Kind::Act,
        "Put back the files of an archive, each in the place of the one that is there",
        None,
        |a, o, c| Box::pin(archive::restore(a, o, c)),
    ),
    operation(
        "workspace_stop",
        "POST",
        "/workspace/{ws}/stop",
        Kind::Act,
        "Stop",
        None,
        |a, o, c| Box::pin(power::stop(a, o, c)),
    ),
    operation(
        "workspace_restart",
        "POST",
        "/workspace/{ws}/restart",
        Kind::Act,
        "Stop and start",
        None,
        |a, o, c| Box::pin(power::restart(a, o, c)),
    ),
    operation(
        "workspace_pause",
        "POST",
        "/workspace/{ws}/pause",
        Kind::Act,
        "Keep memory, use no CPU",
        None,
        |a, o, c| Box::pin(power::pause(a, o, c)),
    ),
    operation(
        "workspace_resume",
        "POST",
        "/workspace/{ws}/resume",
        Kind::Act,
        "Continue a paused workspace",
        None,
        |a, o, c| Box::pin(power::resume(a, o, c)),
    ),
    operation(
        "workspace_ping",
        "POST",
        "/workspace/{ws}/ping",
        Kind::Act,
        "It is used; count the time-to-live anew",
        Some("Ping"),
        |a, o, c| Box::pin(power::ping(a, o, c)),
    ),
    operation(
        "lifecycle_get",
        "GET",
        "/workspace/{ws}/lifecycle",
        Kind::Read,
        "Time-to-live, restart policy, mode",
        None,
        |a, o, c| Box::pin(lifecycle::get(a, o, c)),
    ),
    operation(
        "lifecycle_delete",
        "DELETE",
        "/workspace/{ws}/lifecycle",
        Kind::Act,
        "Delete a workspace and destroy its key",
        None,
        |a, o, c| Box::pin(workspace::delete(a, o, c)),
    ),
    operation(
        "lifecycle_permanent",
        "POST",
        "/workspace/{ws}/lifecycle/permanent",
        Kind::Act,
        "Make permanent",
        Some("Permanent"),
        |a, o, c| Box::pin(lifecycle::permanent(a, o, c)),
    ),
    operation(
        "lifecycle_temporary",
        "POST",
        "/workspace/{ws}/lifecycle/temporary",
        Kind::Act,
        "Make temporary",
        Some("Ttl"),
        |a, o, c| Box::pin(lifecycle::temporary(a, o, c)),
    ),
    operation(
        "lifecycle_ttl",
        "PUT",
        "/workspace/{ws}/lifecycle/ttl",
        Kind::Act,
        "Set the time-to-live",
        Some("Ttl"),
        |a, o, c| Box::pin(lifecycle::ttl_set(a, o, c)),
    ),
    operation(
        "lifecycle_idle",
        "PUT",
        "/workspace/{ws}/lifecycle/idle",
        Kind::Act,
        "What happens when nobody uses it",
        Some("Idle"),
        |a, o, c| Box::pin(lifecycle::idle(a, o, c)),
    ),
    operation(
        "network_get",
        "GET",
        "/workspace/{ws}/network",
        Kind::Read,
        "The firewall layer",
        None,
        |a, o, c| Box::pin(network::get(a, o, c)),
    ),
    operation(
        "network_update",
        "PATCH",
        "/workspace/{ws}/network",
        Kind::Act,
        "Change the firewall layer",
        Some("NetworkPatch"),
        |a, o, c| Box::pin(network::update(a, o, c)),
    ),
    operation(
        "erasure_get",
        "GET",
        "/security/erasures/{ws}",
        Kind::Read,
        "The proof that a workspace's key was destroyed",
        None,
        |a, o, c| Box::pin(workspace::erasure(a, o, c)),
    ),
    operation(
        "runtime_access_get",
        "GET",
        "/workspace/{ws}/runtime-api-access",
        Kind::Read,
        "Whether the runtime API is on",
        None,
        |a, o, c| Box::pin(runtime_access::get(a, o, c)),
    ),
    operation(
        "runtime_access_enable",
        "POST",
        "/workspace/{ws}/runtime-api-access/enable",
        Kind::Act,
        "Turn it on; a gateway token",
        None,
        |a, o, c| Box::pin(runtime_access::enable(a, o, c)),
    ),
    operation(
        "runtime_access_disable",
        "POST",
        "/workspace/{ws}/runtime-api-access/disable",
        Kind::Act,
        "Turn it off",
        None,
        |a, o, c| Box::pin(runtime_access::disable(a, o, c)),
    ),
    operation(
        "runtime_access_token_rotate",
        "POST",
        "/workspace/{ws}/runtime-api-access/token",
        Kind::Act,
        "A new gateway token; every earlier one ends",
        None,
        |a, o, c| Box::pin(runtime_access::token_rotate(a, o, c)),
    ),
    operation(
        "runtime_access_token_get",
        "GET",
        "/workspace/{ws}/runtime-api-access/token",
        Kind::Act,
        "A gateway token",
        None,
        |a, o, c| Box::pin(runtime_access::token_get(a, o, c)),
    ),
    operation(
        "runtime_access_token_raw",
        "GET",
        "/workspace/{ws}/runtime-api-access/token/raw",
        Kind::Act,
        "The raw connection token",
        None,
        |a, o, c| Box::pin(runtime_access::token_raw(a, o, c)),
    ),
    operation(
        "runtime_access_internal_get",
        "GET",
        "/workspace/{ws}/internal-api-access",
        Kind::Read,
        "Whether the runtime API is on",
        None,
        |a, o, c| Box::pin(runtime_access::get(a, o, c)),
    ),
    operation(
        "runtime_access_internal_enable",
        "POST",
        "/workspace/{ws}/internal-api-access/enable",
        Kind::Act,
        "Turn it on; a gateway token",
        None,
        |a, o, c| Box::pin(runtime_access::enable(a, o, c)),
    ),
    operation(
        "runtime_access_internal_disable",
        "POST",
        "/workspace/{ws}/internal-api-access/disable",
        Kind::Act,
        "Turn it off",
        None,
        |a, o, c| Box::pin(runtime_access::disable(a, o, c)),
    ),
    operation(
        "runtime_access_internal_token_rotate",
        "POST",
        "/workspace/{ws}/internal-api-access/token",
        Kind::Act,
        "A new gateway token; every earlier one ends",
        None,
        |a, o, c| Box::pin(runtime_access::token_rotate(a, o, c)),
    ),
    operation(
        "runtime_access_internal_token_get",
        "GET",
        "/workspace/{ws}/internal-api-access/token",
        Kind::Act,
        "A gateway token",
        None,
        |a, o, c| Box::pin(runtime_access::token_get(a, o, c)),
    ),
    operation(
        "runtime_access_internal_token_raw",
        "GET",
        "/workspace/{ws}/internal-api-access/token/raw",
        Kind::Act,
        "The raw connection token",
        None,
        |a, o, c| Box::pin(runtime_access::token_raw(a, o, c)),
    ),
];

/// What of the contract it does not.
pub static UNSUPPORTED: &[Operation] = &[
    unsupported("POST", "/workspace/{ws}/runtime-api-access/reconnect"),
    unsupported("POST", "/workspace/{ws}/runtime-api-access/workspace"),
    unsupported("POST", "/workspace/{ws}/internal-api-access/reconnect"),
    unsupported("POST", "/workspace/{ws}/internal-api-access/workspace"),
    unsupported("GET", "/workspace/archived"),
    unsupported("GET", "/workspace/usage"),
    unsupported("GET", "/workspace/activity"),
    unsupported("POST", "/workspace/{ws}/network/ip"),
    unsupported("GET", "/workspace/{ws}/public-access"),
    unsupported("POST", "/workspace/{ws}/public-access"),
    unsupported("PATCH", "/workspace/{ws}/public-access/{port}"),
    unsupported("DELETE", "/workspace/{ws}/public-access/{port}"),
    unsupported("GET", "/workspace/{ws}/ssh"),
    unsupported("POST", "/workspace/{ws}/ssh/enable"),
    unsupported("POST", "/workspace/{ws}/ssh/disable"),
    unsupported("POST", "/workspace/{ws}/ssh/password"),
    unsupported("POST", "/workspace/{ws}/ssh/key"),
    unsupported("POST", "/workspace/{ws}/workloads"),
    unsupported("GET", "/workspace/{ws}/workloads"),
    unsupported("DELETE", "/workspace/{ws}/workloads"),
    unsupported("GET", "/workspace/{ws}/workloads/stats/stream"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}"),
    unsupported("PUT", "/workspace/{ws}/workloads/{id}"),
    unsupported("PATCH", "/workspace/{ws}/workloads/{id}"),
    unsupported("DELETE", "/workspace/{ws}/workloads/{id}"),
    unsupported("POST", "/workspace/{ws}/workloads/{id}/start"),
    unsupported("POST", "/workspace/{ws}/workloads/{id}/stop"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}/status"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}/logs"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}/stats"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}/stats/stream"),
    unsupported("GET", "/workspace/{ws}/workloads/{id}/logs/stream"),
    unsupported("GET", "/workspace/{ws}/metadata"),
    unsupported("PUT", "/workspace/{ws}/metadata"),
    unsupported("PATCH", "/workspace/{ws}/metadata"),
    unsupported("GET", "/workspace/{ws}/logs"),
    unsupported("DELETE", "/workspace/{ws}/logs"),
    unsupported("GET", "/workspace/{ws}/logs/list"),
    unsupported("GET", "/workspace/{ws}/logs/file/{name}"),
    unsupported("GET", "/workspace/{ws}/logs/stream/boot"),
    unsupported("GET", "/workspace/{ws}/logs/stream/cmd"),
    unsupported("GET", "/workspace/{ws}/stats/stream"),
    unsupported("GET", "/workspace/{ws}/usage"),
    unsupported("DELETE", "/workspace/{ws}/usage"),
    unsupported("GET", "/workspace/{ws}/usage/totals"),
    unsupported("GET", "/workspace/{ws}/usage/credits/chart"),
    unsupported("POST", "/workspace/{ws}/usage/tracking/start"),
    unsupported("POST", "/workspace/{ws}/usage/tracking/stop"),
    unsupported("POST", "/tokens"),
    unsupported("POST", "/namespaces"),
    unsupported("POST", "/namespaces/ensure"),
    unsupported("GET", "/namespaces"),
    unsupported("GET", "/namespaces/{id}"),
    unsupported("PUT", "/namespaces/{id}"),
    unsupported("DELETE", "/namespaces/{id}"),
    unsupported("POST", "/namespaces/{id}/suspend"),
    unsupported("POST", "/namespaces/{id}/activate"),
    unsupported("POST", "/namespaces/{id}/stop-workspaces"),
    unsupported("GET", "/namespaces/{id}/activity"),
    unsupported("GET", "/namespaces/{id}/usage"),
    unsupported("GET", "/namespaces/{id}/usage-units"),
    unsupported("POST", "/credits/namespace-quota"),
    unsupported("POST", "/credits/reset-quota"),
    unsupported("GET", "/credits/namespaces"),
    unsupported("GET", "/credits/namespaces/{ns}"),
    unsupported("POST", "/credits/defaults"),
    unsupported("GET", "/credits/defaults"),
    unsupported("GET", "/credits/defaults/all"),
    unsupported("DELETE", "/credits/defaults"),
    unsupported("POST", "/credits/defaults/toggle-auto-apply"),
    unsupported("GET", "/webhooks"),
    unsupported("GET", "/webhooks/events"),
    unsupported("POST", "/webhooks"),
    unsupported("PUT", "/webhooks/{id}"),
    unsupported("DELETE", "/webhooks/{id}"),
    unsupported("GET", "/workspace/{ws}/domain"),
    unsupported("POST", "/workspace/{ws}/domain"),
    unsupported("DELETE", "/workspace/{ws}/domain"),
    unsupported("POST", "/workspace/{ws}/domain/check"),
    unsupported("POST", "/workspace/{ws}/domain/ssl/renew"),
    unsupported("POST", "/domain/check-slug"),
    unsupported("POST", "/domain/verify"),
    unsupported("GET", "/domain/routes"),
    unsupported("GET", "/domain/ssls"),
    unsupported("PUT", "/domain/ssls/{domain}/auto-renew"),
    unsupported("POST", "/auth/token"),
    unsupported("POST", "/auth/session"),
    unsupported("GET", "/auth/session/{id}/poll"),
    unsupported("GET", "/settings/profile"),
    unsupported("GET", "/workspace/{ws}/overlay"),
    unsupported("GET", "/workspace/{ws}/overlay/usage"),
    unsupported("PUT", "/workspace/{ws}/overlay/resize"),
    unsupported("POST", "/workspace/{ws}/overlay/sync"),
    unsupported("POST", "/workspace/{ws}/desktop/install"),
    unsupported("GET", "/workspace/{ws}/desktop/installation"),
    unsupported("POST", "/workspace/{ws}/desktop/ssh"),
];
