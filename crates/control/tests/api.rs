//! The control API, against doubles of the processes that it asks.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::audit::{Class, Phase};
use api::{Error, ErrorCode};
use common::World;
use control::http::operations::{Kind, OPERATIONS, UNSUPPORTED};
use model::WorkspaceId;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_lives_from_creation_to_erasure() {
    for w in World::each().await {
        let body = json!({
            "name": "my box", "slug": "my-box", "image": "python-3", "wait_ready": false,
            "config": { "cpus": 2, "env": ["A=1", { "key": "B", "value": "2" }], "network_config": { "public_ingress": true } },
        });
        let got = w.ask(1, "POST", "/workspace", body).await;
        assert_eq!(got.status, 201, "{got:?}");
        let made = &got.body["workspace"];
        let id = made["id"].as_str().unwrap().to_owned();
        assert_eq!(
            (&made["ready"], &made["status"]),
            (&json!(true), &json!("running"))
        );
        assert_eq!(made["provisioning"]["state"], "ready");
        assert_eq!(made["resources"]["cpus"], 2);
        assert_eq!(made["lifecycle"]["restart_policy"], "always");

        let list = w
            .ok(
                1,
                "GET",
                "/workspace?page=1&limit=5&status=running",
                Value::Null,
            )
            .await;
        assert_eq!(
            (&list["total"], &list["workspaces"][0]["id"]),
            (&json!(1), &json!(id))
        );
        let none = w
            .ok(1, "GET", "/workspace?mode=temporary", Value::Null)
            .await;
        assert_eq!(none["total"], 0);
        let at = |rest: &str| format!("/workspace/my-box{rest}");
        assert_eq!(
            w.ok(1, "GET", &at(""), Value::Null).await["workspace"]["id"],
            id
        );

        let net = w.ok(1, "GET", &at("/network"), Value::Null).await;
        assert_eq!(
            (&net["public_access"], &net["ingress"]),
            (&json!(true), &json!(["host"]))
        );
        let net = w
            .ok(
                1,
                "PATCH",
                &at("/network"),
                json!({ "public_access": false, "ingress_ports": [80, 22, 80] }),
            )
            .await;
        assert_eq!(
            (&net["public_access"], &net["ingress_ports"]),
            (&json!(false), &json!([22, 80]))
        );
        let sent = w.doubles.state().desired[&id.parse::<WorkspaceId>().unwrap()].clone();
        assert!(!sent.public_access && sent.ingress_ports == [22, 80]);

        let access = w
            .ok(1, "GET", &at("/runtime-api-access"), Value::Null)
            .await;
        assert_eq!(
            (&access["enabled"], &access["running"]),
            (&json!(false), &json!(false))
        );
        let on = w
            .ok(1, "POST", &at("/runtime-api-access/enable"), Value::Null)
            .await;
        assert!(on["enabled"] == true && on["token"].as_str().unwrap().starts_with("jwt-"));
        let first = w
            .ok(1, "GET", &at("/internal-api-access/token"), Value::Null)
            .await;
        let rotated = w
            .ok(1, "POST", &at("/runtime-api-access/token"), Value::Null)
            .await;
        assert_ne!(first["token"], rotated["token"]);
        let raw = w
            .ok(1, "GET", &at("/runtime-api-access/token/raw"), Value::Null)
            .await;
        assert_eq!(
            (&raw["ip"], &raw["port"]),
            (&json!("10.117.0.9"), &json!(9990))
        );
        w.ok(1, "POST", &at("/runtime-api-access/disable"), Value::Null)
            .await;

        for (power, status) in [
            ("pause", "paused"),
            ("resume", "running"),
            ("stop", "stopped"),
            ("stop", "stopped"),
            ("start", "running"),
            ("start", "running"),
            ("restart", "running"),
        ] {
            let got = w
                .ok(1, "POST", &at(&format!("/{power}")), Value::Null)
                .await;
            assert_eq!(got["status"], status, "{power}");
        }
        for path in ["/details", "/config", "/resources", "/stats", "/lifecycle"] {
            w.ok(1, "GET", &at(path), Value::Null).await;
        }
        let config = w.ok(1, "GET", &at("/config"), Value::Null).await;
        assert_eq!(
            config["config"]["env"],
            json!(["A", "B"]),
            "names, not values"
        );
        w.ok(1, "GET", "/workspace/quota", Value::Null).await;
        let images = w
            .ok(1, "GET", "/workspace/images?search=PYTHON", Value::Null)
            .await;
        assert_eq!(images["images"][0]["image"], "python-3");

        let renamed = w
            .ok(1, "PUT", &at(""), json!({ "slug": null, "name": "n" }))
            .await;
        assert_eq!(renamed["workspace"]["slug"], Value::Null);
        assert_eq!(w.ask(1, "GET", &at(""), Value::Null).await.status, 404);

        let path = format!("/workspace/{id}");
        let gone = w.ok(1, "DELETE", &path, Value::Null).await;
        let receipt = gone["erasure_receipt"].as_str().unwrap();
        let kept = w
            .ok(1, "GET", &format!("/security/erasures/{id}"), Value::Null)
            .await;
        assert_eq!(kept["erasure"]["erasure_receipt"], receipt);
        assert_eq!(w.ask(1, "GET", &path, Value::Null).await.status, 404);
        assert_eq!(w.ask(1, "DELETE", &path, Value::Null).await.status, 404);
        let ws = id.parse::<WorkspaceId>().unwrap();
        let s = w.doubles.state();
        assert!(s.keys[&ws].is_none() && s.tokens[&ws].gone);
    }
}

/// The operation table is walked: as nobody, as a stranger, and as the owner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i19_each_operation_is_closed_to_others_and_each_act_leaves_entries() {
    let w = World::sqlite().await;
    for o in OPERATIONS
        .iter()
        .filter(|o| o.kind != Kind::Public)
        .chain(UNSUPPORTED)
    {
        // A workspace of its own, in the state the operation wants.
        let fails = Error::new(ErrorCode::VmUnavailable, "the test wants it so");
        let first_fails = o.id == "provisioning_retry";
        w.doubles.state().starts_fail = first_fails.then_some(fails);
        let id = w
            .workspace(json!({ "config": { "ttl": "1h", "restart_policy": "no" } }))
            .await;
        w.doubles.state().starts_fail = None;
        match o.id {
            "workspace_resume" => drop(
                w.ok(1, "POST", &format!("/workspace/{id}/pause"), Value::Null)
                    .await,
            ),
            "workspace_start" => drop(
                w.ok(1, "POST", &format!("/workspace/{id}/stop"), Value::Null)
                    .await,
            ),
            "snapshot_restore" | "workspace_fork" => drop(
                w.ok(1, "POST", &format!("/workspace/{id}/snapshot"), Value::Null)
                    .await,
            ),
            "archive_get" | "archive_restore" | "archive_delete" | "archive_delete_all" => drop(
                w.ok(
                    1,
                    "POST",
                    &format!("/workspace/{id}/archives"),
                    json!({ "version": 7 }),
                )
                .await,
            ),
            "erasure_get" => drop(
                w.ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
                    .await,
            ),
            _ => {}
        }
        let fill = |s: &str| match s {
            "{ws}" => id.clone(),
            s if s.starts_with('{') => "7".into(),
            s => s.to_owned(),
        };
        let path = o.path.split('/').map(fill).collect::<Vec<_>>().join("/");
        let nobody = w.raw(o.method, &path, "", b"").await;
        assert_eq!(
            (nobody.status, &nobody.body["code"]),
            (401, &json!("unauthorized")),
            "{}",
            o.id
        );
        let body = match o.id {
            "lifecycle_temporary" => json!({ "ttl": 600 }),
            "lifecycle_idle" => json!({ "suspend_after": 0 }),
            _ => json!({}),
        };
        if o.kind == Kind::Unsupported {
            let got = w.ask(1, o.method, &path, body).await;
            assert_eq!(
                (got.status, &got.body["code"]),
                (501, &json!("not_supported")),
                "{path}"
            );
            w.ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
                .await;
            continue;
        }
        if o.path.contains("{ws}") {
            let before = w.doubles.state().asked.len();
            let stranger = w.ask(2, o.method, &path, body.clone()).await;
            assert_eq!(
                (stranger.status, &stranger.body["code"]),
                (404, &json!("not_found")),
                "{}",
                o.id
            );
            let s = w.doubles.state();
            let acted = s.asked[before..].iter().filter(|a| {
                !matches!(
                    a.as_str(),
                    "audit-append.append" | "host.changes" | "host.apply"
                )
            });
            assert_eq!(acted.count(), 0, "{}: {:?}", o.id, &s.asked[before..]);
        }
        let got = w.ask(1, o.method, &path, body).await;
        assert!(got.status < 300, "{}: {got:?}", o.id);
        assert!(got.request_id.starts_with("req_"));
        let entries = || {
            let s = w.doubles.state();
            let of = s
                .entries
                .iter()
                .filter(|(_, e)| e.request_id == got.request_id);
            of.cloned().collect::<Vec<_>>()
        };
        let of_host = || {
            let all = entries().into_iter();
            all.filter(|(c, _)| *c == Class::Host).collect::<Vec<_>>()
        };
        // A closing act does not wait for a slow log; its entries come all the same.
        let host = w
            .until("the act's entries", async || {
                let host = of_host();
                let has = |phase| host.iter().any(|(_, e)| e.phase == phase);
                let all = o.kind != Kind::Act || (has(Phase::Intent) && has(Phase::Outcome));
                all.then_some(host)
            })
            .await;
        if o.kind == Kind::Act {
            let intent = host.iter().position(|(_, e)| e.phase == Phase::Intent);
            let outcome = host.iter().position(|(_, e)| e.phase == Phase::Outcome);
            assert!(intent.unwrap() < outcome.unwrap(), "{}: {host:?}", o.id);
            let intent = &host[intent.unwrap()].1;
            assert!(intent.authority.is_some() && intent.account.is_some());
        } else {
            assert!(host.is_empty(), "{}: a reading left {host:?}", o.id);
        }
        // MON-3: each call, with its route, status and latency, and no more.
        let call = w
            .until("the call's own entry", async || {
                entries().into_iter().find(|(c, _)| *c == Class::Api)
            })
            .await;
        assert_eq!(call.1.data["route"], o.path);
        assert_eq!(call.1.data["status"], got.status);
        assert!(call.1.data["latency_ms"].is_u64());
        assert_eq!(call.1.data.len(), 4);
        assert!(!call.1.actor.is_empty() && call.1.account.is_some());
        w.ask(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i18_an_assertion_serves_the_request_it_is_of_and_once() {
    let w = World::sqlite().await;
    let head = |a: &str| format!("casemate-assertion: {a}\r\n");
    let a = w.assertion(1, "GET", "/workspace", b"");
    for (method, path, body) in [
        ("GET", "/workspace?page=2", &b""[..]),
        ("POST", "/workspace", b""),
        ("GET", "/workspace", b"{}"),
    ] {
        assert_eq!(
            w.raw(method, path, &head(&a), body).await.status,
            401,
            "{method} {path}"
        );
    }
    assert_eq!(w.raw("GET", "/workspace", &head(&a), b"").await.status, 200);
    assert_eq!(
        w.raw("GET", "/workspace", &head(&a), b"").await.status,
        401,
        "used"
    );
    let two = format!(
        "{}{}",
        head(&w.assertion(1, "GET", "/workspace", b"")),
        head("x")
    );
    assert_eq!(w.raw("GET", "/workspace", &two, b"").await.status, 401);
    let old = w.assertion(1, "GET", "/workspace", b"");
    w.clock.set_ms(w.clock.now_ms() + 30_000);
    assert_eq!(
        w.raw("GET", "/workspace", &head(&old), b"").await.status,
        401,
        "over"
    );
    // The client's own credential means nothing here.
    let key =
        "x-client-id: key_0101010101010101\r\nx-client-secret: sk\r\nauthorization: Bearer x\r\n";
    assert_eq!(w.raw("GET", "/workspace", key, b"").await.status, 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_requests_get_the_contracts_codes_and_name_the_field() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({ "slug": "taken" })).await;
    let ws = format!("/workspace/{id}");
    let net = format!("{ws}/network");
    for (method, path, body, status, code, word) in [
        (
            "POST",
            "/workspace",
            json!({ "config": { "cpus": 0 } }),
            422,
            "validation_error",
            "config.cpus",
        ),
        (
            "POST",
            "/workspace",
            json!({ "memory_mb": 1 }),
            422,
            "validation_error",
            "memory_mb",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "disk_size_mb": "big" } }),
            422,
            "validation_error",
            "config.disk_size_mb",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": 5 }),
            422,
            "validation_error",
            "config",
        ),
        (
            "POST",
            "/workspace",
            json!({ "slug": "A b" }),
            422,
            "validation_error",
            "slug",
        ),
        (
            "POST",
            "/workspace",
            json!({ "slug": "images" }),
            422,
            "validation_error",
            "slug",
        ),
        (
            "POST",
            "/workspace",
            json!({ "image": "nope" }),
            422,
            "validation_error",
            "image",
        ),
        (
            "POST",
            "/workspace",
            json!({ "mode": "eternal" }),
            422,
            "validation_error",
            "mode",
        ),
        (
            "POST",
            "/workspace",
            json!({ "mode": "temporary" }),
            422,
            "validation_error",
            "config.ttl",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "env": ["novalue"] } }),
            422,
            "validation_error",
            "config.env",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "env": ["A=\u{0}"] } }),
            422,
            "validation_error",
            "config.env",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "cmd": [1] } }),
            422,
            "validation_error",
            "config.cmd",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "network_config": { "allow_internet": true } } }),
            422,
            "validation_error",
            "allow_internet",
        ),
        (
            "POST",
            "/workspace",
            json!({ "namespace": "n" }),
            501,
            "not_supported",
            "namespace",
        ),
        (
            "POST",
            "/workspace",
            json!({ "config": { "workloads": [{}] } }),
            501,
            "not_supported",
            "config.workloads",
        ),
        (
            "POST",
            "/workspace",
            json!({ "slug": "taken" }),
            409,
            "conflict",
            "slug",
        ),
        (
            "PATCH",
            &net,
            json!({ "ingress_ports": [0] }),
            422,
            "validation_error",
            "ingress_ports",
        ),
        (
            "PATCH",
            &net,
            json!({ "ingress_ports": [65536] }),
            422,
            "validation_error",
            "ingress_ports",
        ),
        (
            "PATCH",
            &net,
            json!({ "ingress_ports": vec![1; 51] }),
            422,
            "validation_error",
            "50",
        ),
        (
            "PATCH",
            &net,
            json!({ "public_access": "yes" }),
            422,
            "validation_error",
            "public_access",
        ),
        (
            "PATCH",
            &net,
            json!({ "allow_internet": true }),
            422,
            "validation_error",
            "allow_internet",
        ),
        (
            "PATCH",
            &net,
            json!({ "egress": ["*"] }),
            501,
            "not_supported",
            "egress",
        ),
        (
            "PATCH",
            &net,
            json!({ "ingress": ["10.0.0.1"] }),
            501,
            "not_supported",
            "ingress",
        ),
        (
            "PATCH",
            &net,
            json!({ "private_link_ids": ["ws_0000000000000000"] }),
            501,
            "not_supported",
            "private_link_ids",
        ),
        (
            "PATCH",
            &net,
            json!({ "outbound_mode": "custom" }),
            501,
            "not_supported",
            "outbound_mode",
        ),
        (
            "POST",
            &format!("{ws}/resume"),
            Value::Null,
            409,
            "conflict",
            "paused",
        ),
        (
            "GET",
            "/workspace?limit=101",
            Value::Null,
            422,
            "validation_error",
            "limit",
        ),
        (
            "GET",
            "/workspace/ws_0000000000000000",
            Value::Null,
            404,
            "not_found",
            "",
        ),
        ("GET", "/nope", Value::Null, 404, "not_found", ""),
        (
            "GET",
            "/workspace/%2e%2e",
            Value::Null,
            404,
            "not_found",
            "",
        ),
        (
            "PATCH",
            "/workspace",
            Value::Null,
            405,
            "method_not_allowed",
            "",
        ),
        (
            "POST",
            "/workspace/images",
            Value::Null,
            405,
            "method_not_allowed",
            "",
        ),
    ] {
        let got = w.ask(1, method, path, body.clone()).await;
        let b = &got.body;
        assert_eq!(
            (got.status, &b["code"]),
            (status, &json!(code)),
            "{method} {path} {body}: {b}"
        );
        assert!(b["message"].as_str().unwrap().contains(word), "{b}");
        assert_eq!((&b["success"], &b["error"]), (&json!(false), &b["code"]));
        assert_eq!(b["requestId"], got.request_id);
    }
    // Harmless ways to ask for what is so anyway.
    w.ok(
        1,
        "PATCH",
        &net,
        json!({ "allow_internet": false, "egress": [], "unknown": 1 }),
    )
    .await;
    w.ok(
        1,
        "PUT",
        &format!("{ws}/lifecycle/idle"),
        json!({ "suspend_after": 0 }),
    )
    .await;

    let a = w.assertion(1, "POST", "/workspace", b"{oops");
    let got = w
        .raw(
            "POST",
            "/workspace",
            &format!("casemate-assertion: {a}\r\n"),
            b"{oops",
        )
        .await;
    assert_eq!(
        (got.status, &got.body["code"]),
        (400, &json!("bad_request"))
    );
    let large = vec![b' '; api::limits::CONTROL_BODY_MAX_BYTES + 1];
    let got = w.raw("POST", "/workspace", "", &large).await;
    assert_eq!(
        (got.status, &got.body["code"]),
        (413, &json!("payload_too_large"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_idempotency_key_makes_one_workspace() {
    for w in World::each().await {
        let body = json!({ "idempotency_key": "k1" });
        let first = w.workspace(body.clone()).await;
        assert_eq!(w.workspace(body.clone()).await, first);
        let theirs = w.ok(2, "POST", "/workspace", body.clone()).await;
        assert_ne!(theirs["workspace"]["id"], first);
        assert_eq!(w.doubles.state().keys.len(), 2);
        w.ok(1, "DELETE", &format!("/workspace/{first}"), Value::Null)
            .await;
        assert_ne!(w.workspace(body).await, first);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_has_no_more_workspaces_than_it_may() {
    let w = World::with(None, |c| c.limits.workspaces_per_account = 2).await;
    for _ in 0..2 {
        w.workspace(json!({})).await;
    }
    let got = w.ask(1, "POST", "/workspace", json!({})).await;
    assert_eq!(
        (got.status, &got.body["code"]),
        (409, &json!("SANDBOX_LIMIT_REACHED"))
    );
    let quota = w.ok(1, "GET", "/workspace/quota", Value::Null).await;
    assert_eq!(quota["can_create"], false);
}
