//! The control plane when things go wrong or end: a log or a machine that is away, crashes, kills,
//! and the end of a time-to-live.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::audit::{Class, Phase};
use api::{Error, ErrorCode};
use common::World;
use model::WorkspaceId;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_log_nothing_opens_and_everything_closes() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let ws = format!("/workspace/{id}");
    let open = w
        .workspace(json!({ "config": { "network_config": { "public_ingress": true } } }))
        .await;
    w.doubles
        .state()
        .failing
        .insert("audit-append.append", ErrorCode::Unavailable);
    // The reconciler may tell host again what it knows; it must not be told anything new.
    let told = |s: &common::doubles::State| {
        let all = s.desired.values();
        all.map(|d| (d.power, d.public_access, d.ingress_ports.clone()))
            .collect::<Vec<_>>()
    };
    let (before, known, starts) = {
        let s = w.doubles.state();
        (s.asked.len(), told(&s), s.starts)
    };
    for (method, path, body) in [
        ("POST", "/workspace".to_owned(), json!({})),
        ("POST", format!("{ws}/restart"), Value::Null),
        (
            "PATCH",
            format!("{ws}/network"),
            json!({ "public_access": true }),
        ),
        (
            "PATCH",
            format!("{ws}/network"),
            json!({ "ingress_ports": [80] }),
        ),
        (
            "POST",
            format!("{ws}/runtime-api-access/enable"),
            Value::Null,
        ),
        ("GET", format!("{ws}/runtime-api-access/token"), Value::Null),
        (
            "GET",
            format!("{ws}/runtime-api-access/token/raw"),
            Value::Null,
        ),
        ("PUT", ws.clone(), json!({ "name": "x" })),
    ] {
        let got = w.ask(1, method, &path, body).await;
        assert_eq!(
            (got.status, &got.body["code"]),
            (503, &json!("audit_unavailable")),
            "{path}"
        );
    }
    let acts = [
        "kms.workspace_key_create",
        "mint.gateway_token",
        "mint.raw_token",
        "mint.runtime_enable",
    ];
    let acted =
        |s: &common::doubles::State| s.asked[before..].iter().any(|a| acts.contains(&a.as_str()));
    {
        let s = w.doubles.state();
        assert!(!acted(&s) && s.starts == starts);
        assert_eq!(told(&s), known);
    }

    w.ok(
        1,
        "PATCH",
        &format!("/workspace/{open}/network"),
        json!({ "public_access": false }),
    )
    .await;
    w.ok(
        1,
        "POST",
        &format!("/workspace/{open}/runtime-api-access/disable"),
        Value::Null,
    )
    .await;
    w.ok(1, "POST", &format!("{ws}/stop"), Value::Null).await;
    w.ok(1, "DELETE", &ws, Value::Null).await;
    let entries = w.doubles.state().entries.len();

    // The spool survives a kill, and is sent when the log is back.
    let mut w = w;
    w.kill();
    w.doubles.state().failing.clear();
    w.start().await;
    let came = |event: &str, phase| {
        let s = w.doubles.state();
        s.entries[entries..]
            .iter()
            .any(|(_, e)| e.event == event && e.phase == phase)
    };
    for event in [
        "workspace.network",
        "runtime_access.disable",
        "workspace.stop",
        "workspace.delete",
    ] {
        for phase in [Phase::Intent, Phase::Outcome] {
            w.until(event, async || came(event, phase).then_some(()))
                .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_kms_makes_nothing_and_leaves_nothing() {
    let w = World::sqlite().await;
    w.doubles.state().kms_sealed = true;
    let got = w
        .ask(1, "POST", "/workspace", json!({ "slug": "aaa" }))
        .await;
    assert_eq!((got.status, &got.body["code"]), (503, &json!("kms_sealed")));
    let list = w.ok(1, "GET", "/workspace", Value::Null).await;
    assert_eq!(list["total"], 0);
    w.doubles.state().kms_sealed = false;
    w.workspace(json!({ "slug": "aaa" })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_workspace_is_restarted_under_its_policy_and_not_for_ever() {
    let w = World::sqlite().await;
    let gone = Error::new(ErrorCode::VmUnavailable, "gone");
    let id = w
        .workspace(json!({ "config": { "max_restarts": 2 } }))
        .await;
    for n in 2..4 {
        w.doubles.crash(&id, Some(gone.clone()));
        w.restart_comes_due(&id).await;
        w.until("a restart", async || {
            let s = w.doubles.state();
            (s.starts == n).then_some(())
        })
        .await;
        w.becomes(&id, "running").await;
    }
    let by_policy = w.doubles.state().entries.iter().any(|(_, e)| {
        e.event == "workspace.restart" && e.actor == "internal:restart" && e.authority.is_some()
    });
    assert!(by_policy);
    w.doubles.crash(&id, Some(gone.clone()));
    let info = w
        .until("given up", async || {
            let info = w.restart_info(&id).await;
            (info["state"] == "failed").then_some(info)
        })
        .await;
    assert_eq!(info["restarts"], 2);
    w.becomes(&id, "stopped").await;
    assert_eq!(w.doubles.state().starts, 3);
    let path = format!("/workspace/{id}");
    let shown = w.ok(1, "GET", &path, Value::Null).await;
    let provisioning = &shown["workspace"]["provisioning"];
    assert_eq!(provisioning["state"], "failed");
    let why = provisioning["error"]["message"].as_str().unwrap();
    assert!(why.contains("2 restarts") && why.contains("gone"), "{why}");
    // Its owner may start it, and then it counts anew.
    w.ok(1, "POST", &format!("{path}/start"), Value::Null).await;
    let info = w.restart_info(&id).await;
    assert_eq!(
        (&info["state"], &info["restarts"]),
        (&json!("ok"), &json!(0))
    );

    // A guest that shut down by itself has not failed.
    let id = w
        .workspace(json!({ "config": { "restart_policy": "on-failure" } }))
        .await;
    w.doubles.crash(&id, None);
    w.becomes(&id, "stopped").await;
    // Without a policy nothing starts it.
    let id = w
        .workspace(json!({ "config": { "restart_policy": "no" } }))
        .await;
    w.doubles.crash(&id, Some(gone));
    w.becomes(&id, "stopped").await;
    assert_eq!(w.doubles.state().starts, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_sealed_kms_uses_up_no_restart() {
    let w = World::sqlite().await;
    let id = w
        .workspace(json!({ "config": { "max_restarts": 1 } }))
        .await;
    let sealed = Error::new(ErrorCode::KmsSealed, "sealed");
    w.doubles.state().kms_sealed = true;
    w.doubles.crash(&id, Some(sealed.clone()));
    w.restart_comes_due(&id).await;
    w.until("the KMS to be asked", async || {
        let s = w.doubles.state();
        s.asked.iter().any(|a| a == "kms.status").then_some(())
    })
    .await;
    // It opens, but three starts find it closed again: none of them counts.
    w.doubles.state().kms_sealed = false;
    w.doubles.state().starts_fail = Some(sealed);
    for n in 2..5 {
        w.until("a try", async || {
            w.pass_ms(61_000);
            (w.doubles.state().starts >= n).then_some(())
        })
        .await;
    }
    w.doubles.state().starts_fail = None;
    w.until("running", async || {
        w.pass_ms(61_000);
        let got = w
            .ask(1, "GET", &format!("/workspace/{id}"), Value::Null)
            .await;
        (got.body["workspace"]["status"] == "running").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_to_live_ends_in_what_the_owner_asked_for() {
    let w = World::sqlite().await;
    let with = |action: &str| json!({ "mode": "temporary", "config": { "ttl": "10m", "ttl_action": action } });
    let stop = w.workspace(with("stop")).await;
    let pause = w.workspace(with("pause")).await;
    let remove = w.workspace(with("remove")).await;
    let kept = w.workspace(with("remove")).await;
    w.pass_ms(599_000);
    w.ok(1, "POST", &format!("/workspace/{kept}/ping"), Value::Null)
        .await;
    w.pass_ms(2_000);
    let status = async |id: &str| {
        let got = w
            .ask(1, "GET", &format!("/workspace/{id}"), Value::Null)
            .await;
        got.body["workspace"]["status"]
            .as_str()
            .unwrap_or("gone")
            .to_owned()
    };
    for (id, wanted) in [
        (&stop, "stopped"),
        (&pause, "paused"),
        (&remove, "gone"),
        (&kept, "running"),
    ] {
        w.until(wanted, async || (status(id).await == wanted).then_some(()))
            .await;
    }
    let ws = remove.parse::<WorkspaceId>().unwrap();
    assert!(w.doubles.state().keys[&ws].is_none());
    let erased = w
        .ok(
            1,
            "GET",
            &format!("/security/erasures/{remove}"),
            Value::Null,
        )
        .await;
    assert!(erased["erasure"]["erasure_receipt"].is_string());
}

/// Kills control after each step of a deletion, twice, and of a creation: the deletion is
/// finished by the next one, the creation unwound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_each_step_is_survived() {
    for mut w in World::each().await {
        for step in ["host.apply", "kms.destroy", "mint.workspace_forget"] {
            let id = w.workspace(json!({})).await;
            let ws = id.parse::<WorkspaceId>().unwrap();
            for round in 0..2 {
                w.doubles.state().silent = Some(step.into());
                let asked =
                    |s: &common::doubles::State| s.asked.iter().filter(|a| *a == step).count();
                let before = asked(&w.doubles.state());
                let path = format!("/workspace/{id}");
                let request = w.ask(1, "DELETE", &path, Value::Null);
                tokio::select! {
                    got = request => assert_eq!(got.status, 200, "{step} {round}: {got:?}"),
                    () = w.until(step, async || (asked(&w.doubles.state()) > before).then_some(())) => {}
                }
                w.kill();
                w.start().await;
            }
            w.doubles.state().silent = None;
            w.kill();
            w.start().await;
            w.until("the deletion's end", async || {
                let got = w
                    .ask(1, "GET", &format!("/security/erasures/{id}"), Value::Null)
                    .await;
                (got.status == 200).then_some(())
            })
            .await;
            assert_eq!(
                w.ask(1, "GET", &format!("/workspace/{id}"), Value::Null)
                    .await
                    .status,
                404
            );
            let s = w.doubles.state();
            assert!(s.keys[&ws].is_none() && s.tokens[&ws].gone, "{step}");
        }
        for step in [
            "kms.workspace_key_create",
            "mint.workspace_register",
            "mint.policy_sign",
        ] {
            w.doubles.state().silent = Some(step.into());
            let before = w.doubles.state().asked.len();
            {
                let request = w.ask(1, "POST", "/workspace", json!({ "idempotency_key": step }));
                tokio::select! {
                    got = request => panic!("{step}: {got:?}"),
                    () = w.until(step, async || w.doubles.state().asked[before..].iter().any(|a| a == step).then_some(())) => {}
                }
            }
            w.kill();
            w.doubles.state().silent = None;
            w.start().await;
            w.until("the creation to be unwound", async || {
                let list = w.ok(1, "GET", "/workspace", Value::Null).await;
                (list["total"] == 0).then_some(())
            })
            .await;
            let s = w.doubles.state();
            assert!(s.keys.values().all(Option::is_none), "{step}");
            assert!(s.tokens.values().all(|t| t.gone), "{step}");
        }
        // And the client that asks again with its key gets a workspace.
        w.workspace(json!({ "idempotency_key": "mint.policy_sign" }))
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_away_keeps_no_key_alive() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    w.doubles
        .state()
        .failing
        .insert("host.apply", ErrorCode::Unavailable);
    let got = w
        .ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
        .await;
    assert_eq!(got["accepted"], true);
    let shown = w
        .ok(1, "GET", &format!("/workspace/{id}"), Value::Null)
        .await;
    assert_eq!(shown["workspace"]["provisioning"]["phase"], "deleting");
    let ws = id.parse::<WorkspaceId>().unwrap();
    assert!(w.doubles.state().keys[&ws].is_none() && w.doubles.state().tokens[&ws].gone);
    w.doubles.state().failing.clear();
    w.until("gone", async || {
        let got = w
            .ask(1, "GET", &format!("/workspace/{id}"), Value::Null)
            .await;
        (got.status == 404).then_some(())
    })
    .await;
}

/// The outcome of a creation is written beside its answer: a kill at that moment leaves it owed,
/// and the next process pays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i19_a_kill_after_the_answer_leaves_the_outcome_to_the_next_process() {
    let mut w = World::sqlite().await;
    let outcomes = |w: &World, of: &dyn Fn(&api::audit::Entry) -> bool| {
        let s = w.doubles.state();
        let all = s.entries.iter().map(|(_, e)| e);
        all.filter(|e| e.event == "workspace.create" && e.phase == Phase::Outcome && of(e))
            .count()
    };
    for _ in 0..5 {
        let id = w.workspace(json!({})).await;
        w.kill();
        w.start().await;
        w.until("the outcome", async || {
            (outcomes(&w, &|e| e.subject.as_deref() == Some(id.as_str())) > 0).then_some(())
        })
        .await;
    }

    // The row alone says so, whatever was in memory.
    w.kill();
    let store = control::store::Store::open("sqlite", &w.paths.state("control"))
        .await
        .unwrap();
    let row = store.workspace_list_all().await.unwrap().swap_remove(0);
    let owe = |w: &mut control::store::Workspace| {
        w.doc.outcome_owed = Some("req_00000000000000aa".into());
        Ok(())
    };
    store.workspace_update(&row, 0, owe).await.unwrap();
    store.close().await;
    w.start().await;
    w.until("the outcome that is owed", async || {
        (outcomes(&w, &|e| e.request_id == "req_00000000000000aa") == 1).then_some(())
    })
    .await;
    let path = format!("/workspace/{}", row.id);
    w.ok(1, "DELETE", &path, Value::Null).await;
    assert_eq!(outcomes(&w, &|e| e.request_id == "req_00000000000000aa"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_was_changed_at_rest_is_an_alarm_once_for_each_start() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let alarms = || {
        let s = w.doubles.state();
        let of = s.entries.iter().filter(|(class, e)| {
            *class == Class::Security
                && e.event == "disk.tampered"
                && e.subject.as_deref() == Some(&id)
                && e.result.as_deref() == Some("disk_tampered")
        });
        of.count()
    };
    let tampered = Error::new(ErrorCode::DiskTampered, "the test wants it so");
    for times in 1..=2 {
        w.doubles.crash(&id, Some(tampered.clone()));
        w.until("an alarm", async || (alarms() == times).then_some(()))
            .await;
        // What is said again while the next start is under way is the same.
        w.restart_comes_due(&id).await;
        w.becomes(&id, "running").await;
        assert_eq!(alarms(), times);
    }
}
