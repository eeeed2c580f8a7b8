//! Archives, against doubles of audit, KMS, mint and host; with SQLite and with PostgreSQL.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::audit::{Entry, Phase};
use api::{Error, ErrorCode};
use common::World;
use model::limits::ARCHIVES_MAX;
use model::{ObjectId, Purpose, WorkspaceId};
use serde_json::{Value, json};

const MADE: &str = "workspace.archive";
const GONE: &str = "workspace.archive_delete";

fn entries(w: &World, event: &str, phase: Phase) -> Vec<Entry> {
    let s = w.doubles.state();
    let all = s.entries.iter().map(|(_, e)| e);
    let of = all.filter(|e| e.event == event && e.phase == phase);
    of.cloned().collect()
}

/// What host was told to keep.
fn kept(w: &World, id: &str) -> Vec<ObjectId> {
    let s = w.doubles.state();
    s.desired[&id.parse::<WorkspaceId>().unwrap()]
        .archives
        .clone()
}

async fn make(w: &World, id: &str, body: Value) -> common::Got {
    let path = format!("/workspace/{id}/archives");
    w.ask(1, "POST", &path, body).await
}

async fn versions(w: &World, id: &str) -> Vec<String> {
    let path = format!("/workspace/{id}/archives");
    let got = w.ok(1, "GET", &path, Value::Null).await;
    let all = got["archives"].as_array().unwrap().clone();
    let version = |a: &Value| a["version"].as_str().unwrap().to_owned();
    all.iter().map(version).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn archives_are_made_listed_described_and_deleted() {
    for w in World::each().await {
        let id = w.workspace(json!({})).await;
        assert!(versions(&w, &id).await.is_empty());
        w.doubles.state().archive_bytes = 5_120;
        let first = make(&w, &id, Value::Null).await;
        assert_eq!(first.status, 201, "{first:?}");
        let shown = &first.body["archive"];
        assert_eq!(
            (&shown["version"], &shown["size"], &shown["format"]),
            (&json!("1"), &json!(5_120), &json!("tar"))
        );
        assert_eq!(shown["vm_paths"], json!(["/"]));
        let body = json!({ "version": "before-upgrade", "format": "tar",
            "vm_paths": ["/root", "/etc"], "exclude_vm_paths": ["/root/.cache"] });
        assert_eq!(make(&w, &id, body).await.status, 201);
        assert_eq!(make(&w, &id, json!({ "version": 41 })).await.status, 201);
        assert_eq!(make(&w, &id, json!({})).await.status, 201);
        let all = ["1", "before-upgrade", "41", "42"];
        assert_eq!(versions(&w, &id).await, all);
        assert_eq!(kept(&w, &id).len(), all.len());

        // Each is an object of its own, announced with the lease of its key and nothing else.
        let intents = entries(&w, MADE, Phase::Intent);
        let leases: Vec<_> = intents.iter().map(|e| e.lease.clone().unwrap()).collect();
        assert!(
            leases
                .iter()
                .all(|l| l.purpose == Purpose::Archive && l.also.is_empty())
        );
        let objects: Vec<_> = leases.iter().map(|l| l.object.clone().unwrap()).collect();
        assert_eq!(objects, kept(&w, &id));
        let outcomes = entries(&w, MADE, Phase::Outcome);
        assert!(outcomes.len() == 4 && outcomes.iter().all(|e| e.result.as_deref() == Some("ok")));

        let at = |version: &str| format!("/workspace/{id}/archives/{version}");
        let one = w.ok(1, "GET", &at("before-upgrade"), Value::Null).await;
        assert_eq!(
            (&one["version"], &one["entries"]),
            (&json!("before-upgrade"), &json!(2))
        );
        assert_eq!(one["exclude_vm_paths"], json!(["/root/.cache"]));
        for (account, version) in [(1, "none"), (2, "1")] {
            for method in ["GET", "DELETE"] {
                let none = w.ask(account, method, &at(version), Value::Null).await;
                assert_eq!(
                    (none.status, &none.body["code"]),
                    (404, &json!("not_found"))
                );
            }
        }
        let taken = make(&w, &id, json!({ "version": "41" })).await;
        assert_eq!(taken.status, 409, "{taken:?}");
        assert!(
            taken.body["message"]
                .as_str()
                .unwrap()
                .starts_with("version: ")
        );

        // Deleted with or without its file: without its record it is nothing.
        w.ok(
            1,
            "DELETE",
            &format!("{}?delete_file=true", at("41")),
            Value::Null,
        )
        .await;
        assert_eq!(versions(&w, &id).await, ["1", "before-upgrade", "42"]);
        assert_eq!(
            kept(&w, &id),
            [objects[0].clone(), objects[1].clone(), objects[3].clone()]
        );
        // A number is never used again by itself.
        w.ok(1, "DELETE", &at("42"), Value::Null).await;
        assert_eq!(
            make(&w, &id, json!({})).await.body["archive"]["version"],
            "43"
        );
        let all = format!("/workspace/{id}/archives");
        w.ok(1, "DELETE", &all, Value::Null).await;
        assert!(versions(&w, &id).await.is_empty() && kept(&w, &id).is_empty());
        assert_eq!(entries(&w, GONE, Phase::Intent).len(), 3);
        assert_eq!(entries(&w, GONE, Phase::Outcome).len(), 3);
        w.ok(1, "DELETE", &all, Value::Null).await;
        assert_eq!(entries(&w, GONE, Phase::Intent).len(), 3, "there was none");

        make(&w, &id, json!({})).await;
        w.ok(1, "DELETE", &format!("/workspace/{id}"), Value::Null)
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn archives_have_bounds_and_want_a_workspace_that_runs() {
    let w = World::sqlite().await;
    let body = json!({ "config": { "disk_size_mb": 64 } });
    let id = w.workspace(body).await;
    let conflict = |got: &common::Got| {
        assert_eq!(
            (got.status, &got.body["code"]),
            (409, &json!("conflict")),
            "{got:?}"
        );
        got.body["message"].as_str().unwrap().to_owned()
    };
    // Together as large as its disk, at most: what host may write shrinks with each.
    w.doubles.state().archive_bytes = 40 << 20;
    for left in [40_u64 << 20, 24 << 20] {
        let made = make(&w, &id, json!({})).await;
        assert_eq!(made.body["archive"]["size"], left, "{made:?}");
    }
    let full = conflict(&make(&w, &id, json!({})).await);
    assert!(full.contains("disk"), "{full}");
    let all = format!("/workspace/{id}/archives");
    w.ok(1, "DELETE", &all, Value::Null).await;
    w.doubles.state().archive_bytes = 1_024;
    for _ in 0..ARCHIVES_MAX {
        assert_eq!(make(&w, &id, json!({})).await.status, 201);
    }
    let many = conflict(&make(&w, &id, json!({})).await);
    assert!(many.contains(&ARCHIVES_MAX.to_string()), "{many}");

    let before = entries(&w, MADE, Phase::Intent).len();
    for what in ["pause", "stop"] {
        w.ok(1, "POST", &format!("/workspace/{id}/{what}"), Value::Null)
            .await;
        let refused = make(&w, &id, json!({ "version": "x" })).await;
        assert_eq!(
            (refused.status, &refused.body["code"]),
            (409, &json!("vm_not_running"))
        );
    }
    let wrong = make(&w, &id, json!({ "vm_paths": ["root"] })).await;
    assert_eq!(wrong.status, 422);
    assert!(
        wrong.body["message"]
            .as_str()
            .unwrap()
            .starts_with("vm_paths[0]: ")
    );
    assert_eq!(
        entries(&w, MADE, Phase::Intent).len(),
        before,
        "nothing of it was begun"
    );
    // What is stopped keeps its archives, and they can be deleted.
    assert_eq!(versions(&w, &id).await.len(), ARCHIVES_MAX);
    let last = format!("{all}/{}", versions(&w, &id).await[0]);
    w.ok(1, "DELETE", &last, Value::Null).await;
    assert_eq!(kept(&w, &id).len(), ARCHIVES_MAX - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_fails_is_none_and_without_the_log_there_is_none() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    let full = Error::new(ErrorCode::StorageFull, "the test wants it so");
    w.doubles.state().starts_fail = Some(full);
    let failed = make(&w, &id, json!({ "version": "a" })).await;
    assert_eq!(failed.body["code"], "storage_full", "{failed:?}");
    w.doubles.state().starts_fail = None;
    assert!(versions(&w, &id).await.is_empty() && kept(&w, &id).is_empty());
    let outcome = entries(&w, MADE, Phase::Outcome).pop().unwrap();
    assert_eq!(outcome.result.as_deref(), Some("storage_full"));
    assert_eq!(make(&w, &id, json!({ "version": "a" })).await.status, 201);

    let away = ("audit-append.append", ErrorCode::Unavailable);
    w.doubles.state().failing.extend([away]);
    let refused = make(&w, &id, json!({ "version": "b" })).await;
    assert_eq!(refused.body["code"], "audit_unavailable");
    assert_eq!(kept(&w, &id).len(), 1);
    // Closing goes ahead.
    let at = format!("/workspace/{id}/archives/a");
    w.ok(1, "DELETE", &at, Value::Null).await;
    assert!(kept(&w, &id).is_empty());
}

/// Host made it and control died before it heard: it is none, its file goes, and the log says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i27_an_archive_that_a_kill_interrupts_is_taken_back() {
    for mut w in World::each().await {
        let id = w.workspace(json!({})).await;
        assert_eq!(
            make(&w, &id, json!({ "version": "kept" })).await.status,
            201
        );
        w.doubles.state().silent = Some("host.apply".into());
        let begun = w.until("the archive at host", async || {
            (kept(&w, &id).len() == 2).then_some(())
        });
        tokio::select! {
            got = make(&w, &id, json!({ "version": "lost" })) => panic!("{got:?}"),
            () = begun => {}
        }
        w.doubles.state().silent = None;
        w.kill();
        w.start().await;
        w.until("it is taken back", async || {
            (kept(&w, &id).len() == 1).then_some(())
        })
        .await;
        assert_eq!(versions(&w, &id).await, ["kept"]);
        let outcomes = entries(&w, MADE, Phase::Outcome);
        let results: Vec<_> = outcomes
            .iter()
            .filter_map(|e| e.result.as_deref())
            .collect();
        // Said once, or again by the next control.
        let taken_back = results[1..].iter().all(|r| *r == "unavailable");
        assert!(
            results[0] == "ok" && results.len() > 1 && taken_back,
            "{results:?}"
        );
        let asked = entries(&w, MADE, Phase::Intent).pop().unwrap().request_id;
        assert_eq!(outcomes[1].request_id, asked);
        assert_eq!(
            make(&w, &id, json!({ "version": "lost" })).await.status,
            201
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_is_put_back_into_a_workspace_that_runs() {
    let w = World::sqlite().await;
    let id = w.workspace(json!({})).await;
    make(&w, &id, json!({ "version": "a" })).await;
    let object = kept(&w, &id)[0].clone();
    let restore = async |version: &str| {
        let path = format!("/workspace/{id}/archives/{version}/restore");
        w.ask(1, "POST", &path, Value::Null).await
    };
    for _ in 0..2 {
        let done = restore("a").await;
        assert_eq!(done.status, 200, "{done:?}");
        assert_eq!(done.body["restored"], json!({ "entries": 3, "skipped": 0 }));
    }
    let event = "workspace.archive_restore";
    let lease = entries(&w, event, Phase::Intent)
        .pop()
        .unwrap()
        .lease
        .unwrap();
    assert_eq!(
        (lease.purpose, lease.object),
        (Purpose::Archive, Some(object.clone()))
    );
    assert_eq!(restore("b").await.status, 404);
    let tampered = Error::new(ErrorCode::DiskTampered, "the test wants it so");
    w.doubles.state().starts_fail = Some(tampered);
    assert_eq!(restore("a").await.body["code"], "disk_tampered");
    w.doubles.state().starts_fail = None;
    let results = entries(&w, event, Phase::Outcome).into_iter();
    let results: Vec<_> = results.filter_map(|e| e.result).collect();
    assert_eq!(results, ["ok", "ok", "disk_tampered"]);
    assert_eq!(kept(&w, &id), [object]);
    w.ok(1, "POST", &format!("/workspace/{id}/stop"), Value::Null)
        .await;
    assert_eq!(restore("a").await.body["code"], "vm_not_running");
}
