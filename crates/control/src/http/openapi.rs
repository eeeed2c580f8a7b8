//! The OpenAPI description, made from the operation table; `api/openapi.json` is a copy of it
//! that a test keeps equal.

use super::operations::{Kind, OPERATIONS, Operation};
use crate::limits::PAGE;
use model::limits::{
    ARCHIVE_PATHS_MAX, CPUS, DISK_MB, INGRESS_PORTS_MAX, MAX_RESTARTS, MEMORY_MB, NAME_MAX_CHARS,
    SLUG_CHARS, STOP_AFTER_MIN_S, SUSPEND_AFTER_MIN_S,
};
use serde_json::{Map, Value, json};

/// The key that says that a body is this document, and has no `success`.
pub const MARK: &str = "openapi";

/// The document.
#[must_use]
pub fn document() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for o in OPERATIONS {
        let path = paths.entry(o.path).or_insert_with(|| json!({}));
        path[o.method.to_lowercase()] = operation(o);
    }
    json!({
        MARK: "3.1.0",
        "info": {
            "title": "Casemate control API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Isolated workspaces for untrusted code. Paths of the contract that are not listed here answer 501 not_supported.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "security": [{ "clientId": [], "clientSecret": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "clientId": { "type": "apiKey", "in": "header", "name": "X-Client-ID" },
                "clientSecret": { "type": "apiKey", "in": "header", "name": "X-Client-Secret" },
            },
            "schemas": schemas(),
        },
    })
}

fn operation(o: &Operation) -> Value {
    let mut described = json!({
        "operationId": o.id,
        "summary": o.summary,
        "responses": {
            (if matches!(o.id, "workspace_create" | "archive_create") { "201" } else { "200" }): {
                "description": "Done",
                "content": { "application/json": { "schema": answer(o) } },
            },
        },
    });
    if o.kind == Kind::Public {
        described["security"] = json!([]);
    } else {
        described["responses"]["default"] = json!({
            "description": "Refused or failed",
            "content": { "application/json": { "schema": reference("Error") } },
        });
    }
    let mut parameters: Vec<Value> = o
        .path
        .split('/')
        .filter_map(|s| s.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            json!({
                "name": name, "in": "path", "required": true, "schema": { "type": "string" },
                "description": "Id or slug of the workspace",
            })
        })
        .collect();
    parameters.extend(query(o));
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if let Some(body) = o.body {
        described["requestBody"] = json!({
            "content": { "application/json": { "schema": reference(body) } },
        });
    }
    described
}

fn query(o: &Operation) -> Vec<Value> {
    let text = |name: &str| json!({ "name": name, "in": "query", "schema": { "type": "string" } });
    match o.id {
        "workspace_list" => vec![
            json!({ "name": "page", "in": "query", "schema": { "type": "integer", "minimum": 1, "default": 1 } }),
            json!({ "name": "limit", "in": "query", "schema": {
                "type": "integer", "minimum": 1, "maximum": PAGE.1, "default": PAGE.0,
            } }),
            text("status"),
            text("mode"),
        ],
        "estimate_get" => ["cpu", "ram_mb", "disk_mb"]
            .map(|n| json!({ "name": n, "in": "query", "schema": { "type": "integer" } }))
            .to_vec(),
        "image_list" => vec![text("search"), text("category")],
        _ => Vec::new(),
    }
}

fn answer(o: &Operation) -> Value {
    let with = |name: &str, schema: Value| {
        json!({
            "type": "object",
            "required": ["success", name],
            "properties": { "success": { "const": true }, name: schema },
        })
    };
    match o.id {
        "workspace_create" | "workspace_get" | "workspace_update" | "provisioning_retry" => {
            with("workspace", reference("Workspace"))
        }
        "workspace_list" => with(
            "workspaces",
            json!({ "type": "array", "items": reference("Workspace") }),
        ),
        "network_get" | "network_update" => reference("Network"),
        "workspace_delete" | "lifecycle_delete" => json!({
            "type": "object",
            "required": ["success"],
            "properties": {
                "success": { "const": true },
                "erasure_receipt": { "type": ["string", "null"], "description": "Signed by the KMS: the key is destroyed" },
                "accepted": { "const": true, "description": "A part of the platform is away; the deletion goes on by itself" },
            },
        }),
        id if id.starts_with("runtime_access") && id.contains("token") => {
            with("token", json!({ "type": "string" }))
        }
        "archive_create" => with("archive", archive()),
        "archive_list" => with("archives", json!({ "type": "array", "items": archive() })),
        "archive_get" => archive(),
        _ => reference("Success"),
    }
}

fn archive() -> Value {
    json!({
        "type": "object",
        "required": ["version", "created_at", "size", "format"],
        "properties": {
            "version": { "type": "string" },
            "created_at": { "type": "string", "format": "date-time" },
            "size": { "type": "integer", "description": "Bytes of the tar; `size_bytes` is the same" },
            "format": { "const": "tar" },
        },
    })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

fn schemas() -> Value {
    let duration = json!({
        "description": "Seconds, or as \"30s\", \"5m\", \"1h\", \"7d\"",
        "oneOf": [{ "type": "integer", "minimum": 1 }, { "type": "string" }],
    });
    let size = |r: &std::ops::RangeInclusive<u32>| json!({ "type": "integer", "minimum": r.start(), "maximum": r.end() });
    let ports = json!({
        "type": "array", "maxItems": INGRESS_PORTS_MAX,
        "items": { "type": "integer", "minimum": 1, "maximum": 65_535 },
    });
    let slug = json!({
        "type": ["string", "null"], "pattern": "^[a-z0-9-]+$",
        "minLength": SLUG_CHARS.start(), "maxLength": SLUG_CHARS.end(),
    });
    let name = json!({ "type": "string", "maxLength": NAME_MAX_CHARS });
    let policy = json!({ "enum": ["no", "never", "always", "on-failure", "unless-stopped"] });
    let off = |least: u64| {
        json!({
            "description": format!("0 (off), or a duration of at least {least} s"),
            "oneOf": [{ "type": "integer", "minimum": 0 }, { "type": "string" }],
        })
    };
    let idle = json!({
        "type": "object",
        "required": ["suspend_after"],
        "properties": {
            "suspend_after": off(SUSPEND_AFTER_MIN_S),
            "stop_after": off(STOP_AFTER_MIN_S),
        },
    });
    let action = json!({ "enum": ["stop", "pause", "suspend", "remove"] });
    json!({
        "Success": { "type": "object", "required": ["success"], "properties": { "success": { "const": true } } },
        "Error": {
            "type": "object",
            "required": ["success", "error", "code", "message", "requestId"],
            "properties": {
                "success": { "const": false },
                "error": { "type": "string" },
                "code": { "enum": api::ErrorCode::ALL.iter().map(|c| c.as_str()).collect::<Vec<_>>() },
                "message": { "type": "string" },
                "requestId": { "type": "string" },
            },
        },
        "WorkspaceCreate": {
            "type": "object",
            "properties": {
                "name": name, "slug": slug, "image": { "type": "string" },
                "mode": { "enum": ["permanent", "temporary"], "default": "permanent" },
                "wait_ready": { "type": "boolean", "default": true },
                "idempotency_key": { "type": "string" },
                "config": {
                    "type": "object",
                    "properties": {
                        "cpus": size(&CPUS), "memory_mb": size(&MEMORY_MB), "disk_size_mb": size(&DISK_MB),
                        "env": { "type": "array", "items": { "oneOf": [
                            { "type": "string" },
                            { "type": "object", "properties": { "key": { "type": "string" }, "value": { "type": "string" } } },
                        ] } },
                        "cmd": { "oneOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }] },
                        "ttl": duration, "ttl_action": action, "remove_on_exit": { "type": "boolean" },
                        "restart_policy": policy, "max_restarts": {
                            "type": "integer", "minimum": MAX_RESTARTS.start(), "maximum": MAX_RESTARTS.end(),
                        },
                        "idle": { "oneOf": [{ "type": "null" }, idle] },
                        "network_config": {
                            "type": "object",
                            "properties": {
                                "allow_internet": { "const": false },
                                "public_ingress": { "type": "boolean" },
                                "ingress_ports": ports,
                            },
                        },
                    },
                },
            },
        },
        "WorkspaceUpdate": {
            "type": "object",
            "properties": {
                "name": name, "slug": slug, "logo": { "type": ["string", "null"] },
                "config": { "description": "Merged; fields as in WorkspaceCreate's", "type": "object" },
            },
        },
        "Resources": {
            "type": "object",
            "properties": {
                "cpus": size(&CPUS), "memory_mb": size(&MEMORY_MB), "disk_size_mb": size(&DISK_MB),
                "apply": { "type": "boolean", "default": false, "description": "Relaunch now if it runs" },
            },
        },
        "Idle": idle,
        "NetworkPatch": {
            "type": "object",
            "properties": {
                "public_access": { "type": "boolean" },
                "allow_internet": { "const": false },
                "ingress_ports": ports,
            },
        },
        "Permanent": { "type": "object", "properties": { "restart_policy": policy } },
        "Ttl": {
            "type": "object",
            "properties": { "ttl": duration, "ttl_action": action, "remove_on_exit": { "type": "boolean" } },
        },
        "Start": {
            "type": "object",
            "properties": { "force": {
                "type": "boolean", "default": false,
                "description": "Start what sleeps from its disk; its memory is given up",
            } },
        },
        "Snapshot": {
            "type": "object",
            "properties": {
                "after": { "enum": ["resume", "pause", "stop"], "default": "resume" },
                "memory": {
                    "type": "boolean", "default": true,
                    "description": "Keep memory too; a fork needs the disk only",
                },
            },
        },
        "Archive": {
            "type": "object",
            "properties": {
                "version": {
                    "type": ["string", "integer"],
                    "description": "Its name, unique in the workspace; by default the next number",
                },
                "format": { "enum": ["tar"], "default": "tar" },
                "vm_paths": {
                    "type": "array", "items": { "type": "string" },
                    "maxItems": ARCHIVE_PATHS_MAX, "default": ["/"],
                    "description": "Absolute paths: what it holds",
                },
                "exclude_vm_paths": {
                    "type": "array", "items": { "type": "string" },
                    "maxItems": ARCHIVE_PATHS_MAX,
                    "description": "Absolute paths that it leaves out, with all below them",
                },
            },
        },
        "Fork": { "type": "object", "properties": { "name": name, "slug": slug } },
        "Ping": { "type": "object", "properties": { "ttl_seconds": duration } },
        "Network": {
            "type": "object",
            "required": ["success", "public_access", "allow_internet", "ingress", "ingress_ports"],
            "properties": {
                "success": { "const": true },
                "ip": { "type": ["string", "null"] },
                "public_access": { "type": "boolean" },
                "allow_internet": { "const": false },
                "ingress": { "type": "array", "items": { "type": "string" } },
                "ingress_ports": ports,
            },
        },
        "Workspace": {
            "type": "object",
            "required": ["id", "name", "mode", "image", "status", "ready", "info", "provisioning", "lifecycle", "resources", "created_at", "updated_at"],
            "properties": {
                "id": { "type": "string" }, "slug": slug, "name": { "type": "string" },
                "mode": { "enum": ["permanent", "temporary"] }, "image": { "type": "string" },
                "status": { "enum": ["running", "stopped", "paused", "creating", "starting", "stopping"] },
                "ready": { "type": "boolean" },
                "info": { "type": "object" }, "provisioning": { "type": ["object", "null"] },
                "lifecycle": { "type": "object" }, "resources": { "type": "object" },
                "ip": { "type": ["string", "null"] },
                "created_at": { "type": "string", "format": "date-time" },
                "updated_at": { "type": "string", "format": "date-time" },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// `UPDATE_EXPECT=1 cargo test -p casemate-control` writes the file.
    #[test]
    fn the_committed_description_is_the_served_one() {
        let text = format!("{}\n", serde_json::to_string_pretty(&document()).unwrap());
        expect_test::expect_file!["../../../../api/openapi.json"].assert_eq(&text);
    }

    #[test]
    fn references_lead_somewhere() {
        let d = document();
        let text = d.to_string();
        for part in text.split("#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(d["components"]["schemas"].get(name).is_some(), "{name}");
        }
    }
}
