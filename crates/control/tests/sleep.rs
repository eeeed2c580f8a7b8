//! Sleep, wake, snapshot, restore and fork, against doubles of audit, KMS, mint and host.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::audit::Phase;
use api::{Error, ErrorCode};
use common::World;
use model::{Power, Purpose, WorkspaceId};
use serde_json::{Value, json};

fn id_of(id: &str) -> WorkspaceId {
    id.parse().unwrap()
}

/// Intents of one event.
fn intents(w: &World, event: &str) -> Vec<api::audit::Entry> {
    let s = w.doubles.state();
    let of = s
        .entries
        .iter()
        .filter(|(_, e)| e.event == event && e.phase == Phase::Intent);
    of.map(|(_, e)| e.clone()).collect()
}

async fn post(w: &World, id: &str, what: &str, body: Value) -> common::Got {
    w.ask(1, "POST", &format!("/workspace/{id}/{what}"), body)
        .await
}

async fn lifecycle(w: &World, id: &str) -> Value {
    let path = format!("/workspace/{id}/lifecycle");
    w.ok(1, "GET", &path, Value::Null).await
}

async fn power_of(w: &World, id: &str) -> Power {
    let s = w.doubles.state();
    s.desired[&id_of(id)].power
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_sleeps_when_asked_and_a_start_wakes_it() {
    for w in World::each().await {
        let id = w.workspace(json!({})).await;
        let asleep = post(&w, &id, "sleep", Value::Null).await;
        assert_eq!(asleep.status, 200, "{asleep:?}");
        let shown = &asleep.body["workspace"];
        assert_eq!(
            (&shown["status"], &shown["info"]["asleep"]),
            (&json!("stopped"), &json!(true))
        );
        assert_eq!(shown["info"]["user_requested_stop"], false);
        assert!(lifecycle(&w, &id).await["asleep_since"].is_string());
        // Asked again, it sleeps on; nothing of what runs in it can be paused or kept.
        post(&w, &id, "sleep", Value::Null).await;
        assert_eq!(intents(&w, "workspace.sleep").len(), 1);
        for what in ["pause", "resume"] {
            assert_eq!(post(&w, &id, what, Value::Null).await.status, 409);
        }
        let kept = post(&w, &id, "snapshot", Value::Null).await;
        assert_eq!(
            (kept.status, &kept.body["code"]),
            (409, &json!("vm_not_running"))
        );

        let up = post(&w, &id, "start", Value::Null).await;
        assert_eq!(up.body["status"], "running", "{up:?}");
        let wake = intents(&w, "workspace.wake").pop().unwrap();
        let opens: Vec<_> = wake.lease.unwrap().objects().map(|o| o.purpose).collect();
        assert_eq!(opens, [Purpose::Disk, Purpose::Memory]);
        assert!(intents(&w, "workspace.start").is_empty());

        // With force, its memory is given up.
        post(&w, &id, "sleep", Value::Null).await;
        let up = post(&w, &id, "start", json!({ "force": true })).await;
        assert_eq!(up.body["status"], "running", "{up:?}");
        assert_eq!(intents(&w, "workspace.start").len(), 1);
        assert!(w.doubles.state().memory.is_empty());
        // Each sleep is another object.
        let slept = intents(&w, "workspace.sleep");
        let objects: Vec<_> = slept
            .iter()
            .map(|e| &e.lease.as_ref().unwrap().object)
            .collect();
        assert!(objects[0].is_some() && objects[0] != objects[1]);
        // A stop of what sleeps is a stop.
        post(&w, &id, "sleep", Value::Null).await;
        assert_eq!(post(&w, &id, "stop", Value::Null).await.status, 200);
        assert!(w.doubles.state().memory.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_uses_sleeps_wakes_on_request_and_is_stopped_in_the_end() {
    let w = World::sqlite().await;
    let idle = json!({ "config": { "idle": { "suspend_after": "10m", "stop_after": "1h" } } });
    let id = w.workspace(idle).await;
    let other = w.workspace(json!({})).await;
    for id in [&id, &other] {
        w.doubles.state().idle_ms.insert(id_of(id), 600_000);
    }
    w.pass_ms(600_000);
    w.until("sleep", async || {
        lifecycle(&w, &id).await["asleep"].as_bool().filter(|a| *a)
    })
    .await;
    assert_eq!(power_of(&w, &other).await, Power::Running);
    let slept = intents(&w, "workspace.sleep").pop().unwrap();
    assert!(slept.actor.starts_with("internal:") && slept.authority.is_some());
    assert_eq!(lifecycle(&w, &id).await["wakes_on_request"], true);

    w.doubles.want(&id);
    w.becomes(&id, "running").await;
    assert_eq!(intents(&w, "workspace.wake").len(), 1);

    w.doubles.state().idle_ms.insert(id_of(&id), 600_000);
    w.pass_ms(600_000);
    w.until("sleep", async || {
        lifecycle(&w, &id).await["asleep"].as_bool().filter(|a| *a)
    })
    .await;
    w.pass_ms(3_600_000);
    w.until("the end of its sleep", async || {
        w.doubles.state().memory.is_empty().then_some(())
    })
    .await;
    w.becomes(&id, "stopped").await;
    let shown = lifecycle(&w, &id).await;
    assert_eq!(
        (&shown["asleep"], &shown["wakes_on_request"]),
        (&json!(false), &json!(true))
    );
    // A request starts it from its disk; what its owner stopped, none starts.
    w.doubles.want(&id);
    w.becomes(&id, "running").await;
    let wake = intents(&w, "workspace.wake").pop().unwrap();
    assert!(wake.lease.unwrap().also.is_empty());
    post(&w, &id, "stop", Value::Null).await;
    assert_eq!(lifecycle(&w, &id).await["wakes_on_request"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sleep_that_fails_leaves_it_running_and_says_why() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let why = Error::new(ErrorCode::StorageFull, "no room for its memory");
    w.doubles.state().starts_fail = Some(why);
    let failed = post(&w, &id, "sleep", Value::Null).await;
    assert_eq!(failed.body["code"], "storage_full", "{failed:?}");
    w.becomes(&id, "running").await;
    assert_eq!(power_of(&w, &id).await, Power::Running);
    assert_eq!(w.restart_info(&id).await["last_error"], "storage_full");
    w.doubles.state().starts_fail = None;
    assert_eq!(post(&w, &id, "sleep", Value::Null).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_dies_on_its_way_to_sleep_is_a_crash_like_any_other() {
    let w = World::sqlite().await;
    for (policy, ends_as) in [("always", "running"), ("no", "stopped")] {
        let body = json!({ "config": { "restart_policy": policy } });
        let id = w.workspace(body).await;
        w.doubles.state().dies_asleep = true;
        let failed = post(&w, &id, "sleep", Value::Null).await;
        assert_ne!(failed.status, 200, "{failed:?}");
        w.doubles.state().dies_asleep = false;
        if policy == "always" {
            w.restart_comes_due(&id).await;
        }
        w.becomes(&id, ends_as).await;
        w.until("it does not sleep", async || {
            (power_of(&w, &id).await != Power::Asleep).then_some(())
        })
        .await;
        assert_eq!(lifecycle(&w, &id).await["asleep"], false);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_whose_memory_is_gone_is_stopped_and_says_why() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    assert_eq!(post(&w, &id, "sleep", Value::Null).await.status, 200);
    w.doubles.memory_lose(&id);
    w.until("it is stopped", async || {
        (power_of(&w, &id).await == Power::Stopped).then_some(())
    })
    .await;
    assert_eq!(w.restart_info(&id).await["last_error"], "memory_stale");
    assert_eq!(post(&w, &id, "start", Value::Null).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_can_not_be_woken_is_never_lost_in_silence() {
    let w = World::sqlite().await;
    let stale = Error::new(ErrorCode::MemoryStale, "of another VMM");
    let away = Error::new(ErrorCode::VmUnavailable, "no room");
    for (policy, why, sleeps_on) in [
        ("no", &stale, true),
        ("always", &away, true),
        ("no", &away, true),
        ("always", &stale, false),
    ] {
        let body = json!({ "config": { "restart_policy": policy } });
        let id = w.workspace(body).await;
        post(&w, &id, "sleep", Value::Null).await;
        w.doubles.state().starts_fail = Some(why.clone());
        let failed = post(&w, &id, "start", Value::Null).await;
        assert_eq!(failed.body["code"], why.code.as_str(), "{failed:?}");
        w.until("it is said", async || {
            let info = w.restart_info(&id).await;
            (info["last_error"] == why.code.as_str()).then_some(())
        })
        .await;
        w.doubles.state().starts_fail = None;
        if sleeps_on {
            w.until("it sleeps on", async || {
                lifecycle(&w, &id).await["asleep"].as_bool().filter(|a| *a)
            })
            .await;
            assert_eq!(post(&w, &id, "start", Value::Null).await.status, 200);
        } else {
            w.pass_ms(1_000);
            w.becomes(&id, "running").await;
            let info = w.restart_info(&id).await;
            let said = info["message"].as_str().unwrap();
            assert!(said.contains("started anew"), "{info}");
        }
        w.ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ttl_action_suspend_puts_to_sleep() {
    let w = World::sqlite().await;
    let body = json!({ "config": { "ttl": "10m", "ttl_action": "suspend" } });
    let id = w.workspace(body).await;
    w.pass_ms(600_000);
    w.until("sleep", async || {
        let shown = lifecycle(&w, &id).await;
        (shown["asleep"] == true && shown["expires_at"].is_null()).then_some(())
    })
    .await;
    let slept = intents(&w, "workspace.sleep");
    assert_eq!(slept.len(), 1);
    // The owner starts it again, and its time counts anew.
    post(&w, &id, "start", Value::Null).await;
    assert!(lifecycle(&w, &id).await["expires_at"].is_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_taken_restored_and_forked() {
    for w in World::each().await {
        let body =
            json!({ "config": { "env": ["A=1"], "network_config": { "public_ingress": true } } });
        let id = w.workspace(body).await;
        for what in ["restore", "fork"] {
            let none = post(&w, &id, what, json!({})).await;
            assert_eq!(
                (none.status, &none.body["code"]),
                (409, &json!("conflict")),
                "{what}"
            );
        }
        for (after, status) in [
            (json!({}), "running"),
            (json!({ "after": "pause" }), "paused"),
            (json!({ "after": "resume" }), "running"),
            (json!({ "after": "stop" }), "stopped"),
        ] {
            let got = post(&w, &id, "snapshot", after.clone()).await;
            assert_eq!(got.status, 200, "{got:?}");
            assert_eq!(got.body["workspace"]["status"], status, "{after}");
            assert!(got.body["snapshot"]["created_at"].is_string());
        }
        let got = post(&w, &id, "snapshot", json!({ "memory": "no" })).await;
        assert_eq!(got.status, 422);
        assert!(got.body["message"].as_str().unwrap().contains("memory"));
        let got = post(&w, &id, "snapshot", json!({ "after": "sleep" })).await;
        assert_eq!(got.status, 422);
        assert!(got.body["message"].as_str().unwrap().contains("after"));

        let up = post(&w, &id, "restore", json!({})).await;
        assert_eq!(up.body["workspace"]["status"], "running", "{up:?}");
        let restore = intents(&w, "workspace.restore").pop().unwrap();
        assert_eq!(restore.lease.unwrap().also.len(), 2);

        // Of the disk only: neither it nor a restore from it opens a memory.
        let kept = post(&w, &id, "snapshot", json!({ "memory": false })).await;
        assert_eq!(kept.body["snapshot"]["memory"], false, "{kept:?}");
        let snapshot = intents(&w, "workspace.snapshot").pop().unwrap();
        assert_eq!(snapshot.lease.unwrap().also, []);
        let up = post(&w, &id, "restore", json!({})).await;
        assert_eq!(up.body["workspace"]["status"], "running", "{up:?}");
        let restore = intents(&w, "workspace.restore").pop().unwrap();
        let also: Vec<_> = restore.lease.unwrap().also;
        assert_eq!(also.len(), 1);
        assert_eq!(also[0].purpose, Purpose::SnapshotDisk);

        let fork = post(&w, &id, "fork", json!({ "name": "twin" })).await;
        assert_eq!(fork.status, 201, "{fork:?}");
        let twin = &fork.body["workspace"];
        let twin_id = twin["id"].as_str().unwrap().to_owned();
        assert_eq!(
            (&twin["name"], &twin["status"]),
            (&json!("twin"), &json!("running"))
        );
        assert_ne!(twin_id, id);
        {
            let s = w.doubles.state();
            let [a, b] = [&id, &twin_id].map(|id| s.desired[&id_of(id)].clone());
            assert!(a.public_access && !b.public_access, "a fork is dark");
            assert_ne!(a.config, b.config);
            assert!(b.config.contains("A=1") && b.config.contains(&twin_id));
            assert_eq!(s.keys.len(), 2);
        }
        let forked = intents(&w, "workspace.fork").pop().unwrap();
        assert_eq!(forked.data["source"], id.as_str());
        let of: Vec<_> = forked.lease.unwrap().objects().collect();
        assert_eq!(of[1].workspace, id_of(&id));
        assert_eq!(of[1].purpose, Purpose::SnapshotDisk);
        assert_eq!(of.len(), 2);
        // It outlives what it was forked from.
        w.ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
            .await;
        w.becomes(&twin_id, "running").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_fails_is_none_and_the_workspace_goes_on() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let why = Error::new(ErrorCode::StorageFull, "no room");
    w.doubles.state().starts_fail = Some(why);
    let failed = post(&w, &id, "snapshot", json!({ "after": "stop" })).await;
    assert_eq!(failed.status, 504, "{failed:?}");
    w.doubles.state().starts_fail = None;
    w.becomes(&id, "running").await;
    assert_eq!(power_of(&w, &id).await, Power::Running);
    assert_eq!(lifecycle(&w, &id).await["snapshot"], Value::Null);
    assert_eq!(post(&w, &id, "restore", json!({})).await.status, 409);
    // Nor does it cost the one before.
    let kept = post(&w, &id, "snapshot", json!({})).await;
    assert_eq!(kept.status, 200, "{kept:?}");
    let why = Error::new(ErrorCode::StorageFull, "no room");
    w.doubles.state().starts_fail = Some(why);
    assert_eq!(post(&w, &id, "snapshot", json!({})).await.status, 504);
    w.doubles.state().starts_fail = None;
    w.until("its host knows of one", async || {
        (snapshots(&w, &id).len() == 1).then_some(())
    })
    .await;
    let up = post(&w, &id, "restore", json!({})).await;
    assert_eq!(up.body["workspace"]["status"], "running", "{up:?}");
}

/// The snapshots that host was told of, and has.
fn snapshots(w: &World, id: &str) -> Vec<model::ObjectId> {
    let s = w.doubles.state();
    s.snapshots.get(&id_of(id)).cloned().unwrap_or_default()
}

/// Host took it and control died before it heard: it is none, the one before stands, and the log says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_a_kill_interrupts_leaves_the_one_before() {
    for mut w in World::each().await {
        let id = w.workspace(json!({})).await;
        let kept = post(&w, &id, "snapshot", json!({})).await;
        assert_eq!(kept.status, 200, "{kept:?}");
        let before = snapshots(&w, &id);
        w.doubles.state().silent = Some("host.apply".into());
        let taken = w.until("the snapshot at host", async || {
            (snapshots(&w, &id).len() == 2).then_some(())
        });
        tokio::select! {
            got = post(&w, &id, "snapshot", json!({})) => panic!("{got:?}"),
            () = taken => {}
        }
        w.doubles.state().silent = None;
        w.kill();
        w.start().await;
        w.until("it is given up", async || {
            (snapshots(&w, &id) == before).then_some(())
        })
        .await;
        let ends: Vec<_> = {
            let s = w.doubles.state();
            let all = s.entries.iter().map(|(_, e)| e);
            let ends = all.filter(|e| e.event == "workspace.snapshot" && e.phase == Phase::Outcome);
            ends.cloned().collect()
        };
        let results: Vec<_> = ends.iter().filter_map(|e| e.result.as_deref()).collect();
        // Said once, or again by the next control.
        let given_up = results[1..].iter().all(|r| *r == "unavailable");
        assert!(
            results[0] == "ok" && results.len() > 1 && given_up,
            "{results:?}"
        );
        let asked = intents(&w, "workspace.snapshot").pop().unwrap();
        assert_eq!(ends[1].request_id, asked.request_id);
        let up = post(&w, &id, "restore", json!({})).await;
        assert_eq!(up.body["workspace"]["status"], "running", "{up:?}");
        assert_eq!(snapshots(&w, &id), before);
    }
}
