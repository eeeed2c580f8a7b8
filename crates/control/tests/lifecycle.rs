//! What the platform does to a workspace by itself, and that it does it once, whichever process
//! is killed in between.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::audit::Phase;
use api::{Error, ErrorCode};
use common::World;
use model::WorkspaceId;
use serde_json::{Value, json};

fn gone() -> Error {
    Error::new(ErrorCode::VmUnavailable, "gone")
}

fn key(id: &str) -> WorkspaceId {
    id.parse().unwrap()
}

/// Intents of an event about a workspace.
fn intents(w: &World, event: &str, id: &str) -> usize {
    let s = w.doubles.state();
    let of = s.entries.iter().filter(|(_, e)| {
        e.event == event && e.phase == Phase::Intent && e.subject.as_deref() == Some(id)
    });
    of.count()
}

async fn until_asked(w: &World, op: &str, more_than: usize) {
    let asked = || {
        let s = w.doubles.state();
        s.asked.iter().filter(|a| *a == op).count()
    };
    w.until(op, async || (asked() > more_than).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i25_a_restart_is_tried_once_whatever_is_killed() {
    for mut w in World::each().await {
        let id = w.workspace(json!({})).await;
        // Control is killed when host has taken the start, but control has not heard so.
        w.doubles.crash(&id, Some(gone()));
        w.restart_comes_due(&id).await;
        w.doubles.state().silent = Some("host.apply".into());
        w.until("a start", async || {
            (w.doubles.state().starts == 2).then_some(())
        })
        .await;
        w.kill();
        w.doubles.state().silent = None;
        w.start().await;
        w.becomes(&id, "running").await;
        assert_eq!(w.doubles.state().starts, 2);
        assert_eq!(w.restart_info(&id).await["restarts"], 1);

        // Control is killed when host has not heard of the start: it is tried, and counted once.
        w.doubles.crash(&id, Some(gone()));
        w.restart_comes_due(&id).await;
        let asked = w.doubles.state().asked.len();
        w.doubles
            .state()
            .failing
            .insert("host.apply", ErrorCode::Unavailable);
        w.until("a start that does not reach host", async || {
            let s = w.doubles.state();
            s.asked[asked..]
                .iter()
                .any(|a| a == "host.apply")
                .then_some(())
        })
        .await;
        w.kill();
        w.doubles.state().failing.clear();
        w.start().await;
        // If the kill came before the row was written, the start is still owed.
        w.pass_ms(model::lifecycle::RESTART_PAUSE_MAX_MS);
        w.becomes(&id, "running").await;
        assert_eq!(w.doubles.state().starts, 3);
        assert_eq!(w.restart_info(&id).await["restarts"], 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i25_times_that_pass_while_control_is_dead_are_acted_on_once() {
    for mut w in World::each().await {
        let with = |action: &str| json!({ "mode": "temporary", "config": { "ttl": "10m", "ttl_action": action } });
        let stop = w.workspace(with("stop")).await;
        let pause = w.workspace(with("pause")).await;
        w.kill();
        w.pass_ms(601_000);
        w.start().await;
        w.becomes(&stop, "stopped").await;
        w.becomes(&pause, "paused").await;
        w.kill();
        w.start().await;
        w.becomes(&stop, "stopped").await;
        for id in [&stop, &pause] {
            assert_eq!(intents(&w, "workspace.expire", id), 1);
            let s = w.doubles.state();
            let of = |e: &&api::audit::Entry| {
                e.event == "workspace.expire" && e.subject.as_deref() == Some(id)
            };
            let entry = s.entries.iter().map(|(_, e)| e).find(of).unwrap();
            assert!(entry.authority.is_some(), "the standing policy");
        }
        // Started again, its time counts anew.
        w.ok(1, "POST", &format!("/workspace/{stop}/start"), Value::Null)
            .await;
        w.ok(
            1,
            "POST",
            &format!("/workspace/{pause}/resume"),
            Value::Null,
        )
        .await;
        w.pass_ms(601_000);
        w.becomes(&stop, "stopped").await;
        w.becomes(&pause, "paused").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_that_is_killed_after_its_stop_is_finished() {
    let mut w = World::sqlite().await;
    let always = w.workspace(json!({})).await;
    let never = w
        .workspace(json!({ "config": { "restart_policy": "no" } }))
        .await;
    for id in [&always, &never] {
        w.doubles.state().silent = Some("host.apply".into());
        let path = format!("/workspace/{id}/restart");
        {
            let request = w.ask(1, "POST", &path, Value::Null);
            let stopped = w.until("the stop", async || {
                let s = w.doubles.state();
                (s.desired[&key(id)].power == model::Power::Stopped).then_some(())
            });
            tokio::select! {
                got = request => panic!("{got:?}"),
                () = stopped => {}
            }
        }
        w.kill();
        w.doubles.state().silent = None;
        w.start().await;
    }
    w.becomes(&always, "running").await;
    // Nothing allows the start of the other one: it says so.
    w.until("a reason", async || {
        let info = w.restart_info(&never).await;
        let why = info["message"].as_str().unwrap_or_default();
        why.contains("interrupted").then_some(())
    })
    .await;
    w.becomes(&never, "stopped").await;
    w.ok(1, "POST", &format!("/workspace/{never}/start"), Value::Null)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remove_on_exit_removes_at_any_end_but_not_at_a_restart() {
    let mut w = World::sqlite().await;
    let body = |action: &str| {
        json!({ "mode": "temporary", "config": {
            "ttl": "10m", "ttl_action": action, "remove_on_exit": true } })
    };
    let crashed = w.workspace(body("stop")).await;
    let stopped = w.workspace(body("stop")).await;
    let expired = w.workspace(body("stop")).await;
    w.ok(
        1,
        "POST",
        &format!("/workspace/{expired}/restart"),
        Value::Null,
    )
    .await;
    w.becomes(&expired, "running").await;
    w.doubles.crash(&crashed, None);
    w.becomes(&crashed, "gone").await;
    // A kill between the stop and the removal puts it off only.
    w.doubles
        .state()
        .failing
        .insert("kms.destroy", ErrorCode::Unavailable);
    w.ok(
        1,
        "POST",
        &format!("/workspace/{stopped}/stop"),
        Value::Null,
    )
    .await;
    w.kill();
    w.doubles.state().failing.clear();
    w.start().await;
    w.becomes(&stopped, "gone").await;
    w.pass_ms(601_000);
    w.becomes(&expired, "gone").await;
    let s = w.doubles.state();
    assert!(s.keys.values().all(Option::is_none));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_uses_is_stopped_and_what_is_used_is_not() {
    let mut w = World::sqlite().await;
    let idle = json!({ "config": { "idle": { "suspend_after": 0, "stop_after": "1h" } } });
    let unused = w.workspace(idle.clone()).await;
    let used = w.workspace(idle.clone()).await;
    let pinged = w.workspace(idle).await;
    let free = w.workspace(json!({})).await;
    {
        let mut s = w.doubles.state();
        s.idle_ms.insert(key(&unused), 3_600_000);
        s.idle_ms.insert(key(&used), 1_000);
        s.idle_ms.insert(key(&pinged), 3_600_000);
        s.idle_ms.insert(key(&free), 9_999_999);
    }
    w.pass_ms(3_599_000);
    w.ok(1, "POST", &format!("/workspace/{pinged}/ping"), Value::Null)
        .await;
    assert_eq!(w.doubles.state().idle_ms[&key(&pinged)], 0, "host is told");
    // A host that begins anew forgets the ping; the row does not.
    w.doubles.state().idle_ms.insert(key(&pinged), 3_600_000);
    w.pass_ms(2_000);
    w.becomes(&unused, "stopped").await;
    w.kill();
    w.start().await;
    until_asked(&w, "host.idle", 0).await;
    for id in [&used, &pinged, &free] {
        w.becomes(id, "running").await;
        assert_eq!(intents(&w, "workspace.idle_stop", id), 0);
    }
    assert_eq!(intents(&w, "workspace.idle_stop", &unused), 1);
    w.pass_ms(3_600_000);
    w.becomes(&pinged, "stopped").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_outlasts_a_kill_of_control_and_is_no_exit() {
    let mut w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let at = |act: &str| format!("/workspace/{id}/{act}");
    w.ok(1, "POST", &at("pause"), Value::Null).await;
    let twice = w.ask(1, "POST", &at("pause"), Value::Null).await;
    assert_eq!(
        (twice.status, &twice.body["code"]),
        (409, &json!("conflict"))
    );
    w.kill();
    w.start().await;
    w.becomes(&id, "paused").await;
    w.ok(1, "POST", &at("resume"), Value::Null).await;
    // Memory that is lost while it is paused is not run again for it.
    w.ok(1, "POST", &at("pause"), Value::Null).await;
    w.doubles.crash(&id, Some(gone()));
    w.becomes(&id, "stopped").await;
    assert_eq!(w.doubles.state().starts, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_counts_now_or_from_the_next_start_and_a_disk_only_grows() {
    for w in World::each().await {
        let id = w.workspace(json!({})).await;
        let path = format!("/workspace/{id}/resources");
        let later = w.ok(1, "PUT", &path, json!({ "cpus": 2, "disk_size_mb": 9_000 }));
        let later = later.await;
        assert_eq!(
            later["updated"],
            json!({ "cpus": 2, "disk_size_mb": 9_000 })
        );
        assert_eq!(later["relaunched"], false);
        let shown = w.ok(1, "GET", &path, Value::Null).await;
        let shown = &shown["resources"];
        assert_eq!(
            (&shown["cpus"], &shown["running"]["cpus"]),
            (&json!(2), &json!(1))
        );
        assert_eq!(w.doubles.state().starts, 1);
        let now = w.ok(1, "PATCH", &path, json!({ "apply": true })).await;
        assert_eq!(now["relaunched"], true);
        assert_eq!(now["resources"]["running"], Value::Null);
        assert_eq!(w.doubles.state().starts, 2);
        assert_eq!(w.doubles.state().desired[&key(&id)].resources.cpus, 2);
        // Nothing to apply: nothing is interrupted.
        let same = w.ok(1, "PATCH", &path, json!({ "cpus": 2, "apply": true }));
        assert_eq!(same.await["relaunched"], false);

        let shrink = w
            .ask(1, "PUT", &path, json!({ "disk_size_mb": 8_192 }))
            .await;
        assert_eq!(
            (shrink.status, &shrink.body["code"]),
            (422, &json!("validation_error"))
        );
        let why = shrink.body["message"].as_str().unwrap();
        assert!(
            why.starts_with("disk_size_mb:") && why.contains("9000"),
            "{why}"
        );
        for (field, value) in [("cpus", 33), ("memory_mb", 64), ("disk_size_mb", 204_801)] {
            let got = w.ask(1, "PUT", &path, json!({ field: value })).await;
            assert_eq!(got.status, 422);
            assert!(got.body["message"].as_str().unwrap().starts_with(field));
        }
        w.ok(1, "POST", &format!("/workspace/{id}/pause"), Value::Null)
            .await;
        let paused = w.ask(1, "PUT", &path, json!({ "cpus": 3, "apply": true }));
        let paused = paused.await;
        assert_eq!(
            (paused.status, &paused.body["code"]),
            (409, &json!("conflict"))
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lifecycle_is_what_its_owner_last_asked_for() {
    let mut w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let at = |rest: &str| format!("/workspace/{id}{rest}");
    let shown = w.ok(1, "GET", &at("/lifecycle"), Value::Null).await;
    assert_eq!(
        (&shown["mode"], &shown["idle"]),
        (&json!("permanent"), &Value::Null)
    );
    assert_eq!(shown["snapshot_supported"], true);
    let idle = json!({ "suspend_after": 120, "stop_after": "2h" });
    w.ok(1, "PUT", &at("/lifecycle/idle"), idle).await;
    w.ok(
        1,
        "POST",
        &at("/lifecycle/permanent"),
        json!({ "restart_policy": "unless-stopped" }),
    )
    .await;
    w.kill();
    w.start().await;
    let shown = w.ok(1, "GET", &at("/lifecycle"), Value::Null).await;
    assert_eq!(
        shown["idle"],
        json!({ "suspend_after": 120, "stop_after": 7_200 })
    );
    assert_eq!(shown["restart_policy"], "unless-stopped");

    w.ok(
        1,
        "POST",
        &at("/lifecycle/temporary"),
        json!({ "ttl": "1h", "ttl_action": "pause" }),
    )
    .await;
    let shown = w.ok(1, "GET", &at("/lifecycle"), Value::Null).await;
    assert_eq!(
        (&shown["mode"], &shown["restart_policy"], &shown["idle"]),
        (&json!("temporary"), &json!("no"), &Value::Null)
    );
    assert_eq!(shown["expires_at"], "2027-01-15T09:00:00Z");
    let longer = json!({ "ttl_seconds": 7_200 });
    let ping = w.ok(1, "POST", &at("/ping"), longer).await;
    assert_eq!(ping["expires_at"], "2027-01-15T10:00:00Z");
    let ping = w.ok(1, "POST", &at("/ping"), Value::Null).await;
    assert_eq!(ping["expires_at"], "2027-01-15T09:00:00Z");
    w.ok(
        1,
        "PUT",
        &at("/lifecycle/ttl"),
        json!({ "ttl": "30m", "ttl_action": "remove" }),
    )
    .await;

    // A config is merged; what a guest is told counts from the next start on.
    let merged = json!({ "name": "n", "config": {
        "cpus": 2, "env": ["A=2"], "ttl": 60, "ttl_action": "stop",
        "network_config": { "ingress_ports": [80] }, "unknown": 1 } });
    let got = w.ok(1, "PUT", &at(""), merged).await;
    let shown = &got["workspace"];
    assert_eq!(
        (
            &shown["name"],
            &shown["resources"]["cpus"],
            &shown["lifecycle"]["ttl"]
        ),
        (&json!("n"), &json!(2), &json!(60))
    );
    let config = w.ok(1, "GET", &at("/config"), Value::Null).await;
    assert_eq!(config["config"]["env"], json!(["A"]));
    w.ok(1, "POST", &at("/restart"), Value::Null).await;
    let sent = w.doubles.state().desired[&key(&id)].clone();
    assert!(sent.config.contains("A=2") && sent.ingress_ports == [80]);
    let info = w.ok(1, "GET", &at("/info"), Value::Null).await;
    assert_eq!(
        (&info["info"]["cpus"], &info["info"]["is_running"]),
        (&json!(2), &json!(true))
    );
    let estimate = w
        .ok(
            1,
            "GET",
            "/workspace/estimate?cpu=2&ram_mb=512",
            Value::Null,
        )
        .await;
    assert_eq!(estimate["estimate"]["memory_mb"], 512);

    w.ok(1, "POST", &at("/lifecycle/permanent"), Value::Null)
        .await;
    let shown = w.ok(1, "GET", &at("/lifecycle"), Value::Null).await;
    assert_eq!(
        (&shown["ttl"], &shown["expires_at"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(shown["restart_policy"], "always");
    w.ok(1, "DELETE", &at("/lifecycle"), Value::Null).await;
    w.becomes(&id, "gone").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lifecycle_that_can_t_be_is_refused_by_its_field() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let short = w
        .workspace(json!({ "mode": "temporary", "config": { "ttl": "1h" } }))
        .await;
    let ws = format!("/workspace/{id}");
    let temporary = format!("/workspace/{short}");
    for (method, path, body, status, word) in [
        (
            "PUT",
            format!("{ws}/lifecycle/idle"),
            json!({}),
            422,
            "suspend_after",
        ),
        (
            "PUT",
            format!("{ws}/lifecycle/idle"),
            json!({ "suspend_after": 119 }),
            422,
            "suspend_after",
        ),
        (
            "PUT",
            format!("{ws}/lifecycle/idle"),
            json!({ "suspend_after": 120, "stop_after": 3_599 }),
            422,
            "stop_after",
        ),
        (
            "PUT",
            format!("{ws}/lifecycle/idle"),
            json!({ "suspend_after": -1 }),
            422,
            "suspend_after",
        ),
        (
            "PUT",
            format!("{temporary}/lifecycle/idle"),
            json!({ "suspend_after": 120 }),
            422,
            "suspend_after",
        ),
        (
            "POST",
            format!("{ws}/lifecycle/temporary"),
            json!({}),
            422,
            "ttl",
        ),
        (
            "POST",
            format!("{ws}/lifecycle/temporary"),
            json!({ "ttl": "400d" }),
            422,
            "ttl",
        ),
        (
            "POST",
            format!("{ws}/lifecycle/temporary"),
            json!({ "ttl": 60, "remove_on_exit": 1 }),
            422,
            "remove_on_exit",
        ),
        (
            "POST",
            format!("{ws}/lifecycle/permanent"),
            json!({ "restart_policy": "often" }),
            422,
            "restart_policy",
        ),
        (
            "PUT",
            format!("{ws}/lifecycle/ttl"),
            json!({ "ttl_action": "explode" }),
            422,
            "ttl_action",
        ),
        (
            "POST",
            format!("{ws}/ping"),
            json!({ "ttl_seconds": 0 }),
            422,
            "ttl_seconds",
        ),
        (
            "PUT",
            ws.clone(),
            json!({ "config": { "max_restarts": 1_001 } }),
            422,
            "config.max_restarts",
        ),
        (
            "PUT",
            ws.clone(),
            json!({ "config": { "disk_size_mb": 64 } }),
            422,
            "disk_size_mb",
        ),
        (
            "PUT",
            ws.clone(),
            json!({ "config": { "idle": { "suspend_after": 1 } } }),
            422,
            "config.idle.suspend_after",
        ),
        (
            "PUT",
            ws.clone(),
            json!({ "config": { "disks": [1] } }),
            501,
            "config.disks",
        ),
        (
            "PUT",
            temporary,
            json!({ "config": { "restart_policy": "always" } }),
            422,
            "restart_policy",
        ),
        (
            "POST",
            "/workspace".into(),
            json!({ "mode": "temporary", "config": { "ttl": 60, "idle": { "suspend_after": 120 } } }),
            422,
            "config.idle",
        ),
        (
            "PUT",
            format!("{ws}/resources"),
            json!({ "apply": "now" }),
            422,
            "apply",
        ),
        (
            "GET",
            "/workspace/estimate?cpu=33".into(),
            Value::Null,
            422,
            "cpu",
        ),
        ("GET", "/workspace/archived".into(), Value::Null, 501, ""),
        ("POST", format!("{ws}/resume"), Value::Null, 409, "paused"),
    ] {
        let got = w.ask(1, method, &path, body.clone()).await;
        assert_eq!(got.status, status, "{method} {path} {body}: {}", got.body);
        let said = got.body["message"].as_str().unwrap();
        assert!(said.contains(word), "{method} {path} {body}: {said}");
    }
    // Nothing of it happened.
    let shown = w
        .ok(1, "GET", &format!("{ws}/lifecycle"), Value::Null)
        .await;
    assert_eq!(
        (&shown["mode"], &shown["idle"]),
        (&json!("permanent"), &Value::Null)
    );
}
