//! Requests to workspaces that rest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::host::ActualState;

use crate::world::{NOW_S, Workspace, World, code_of, until};

/// It sleeps, a request may wake it, and the edge knows.
async fn falls_asleep(ws: &Workspace) {
    ws.actual(|a| {
        (a.state, a.memory, a.wakes) = (ActualState::Asleep, true, true);
        (a.start_id, a.ip) = (None, None);
    });
    let table = Arc::clone(&ws.world.edge.table);
    until("it sleeps", || {
        let (table, id) = (Arc::clone(&table), ws.id.clone());
        async move { table.may_wake(&id) }
    })
    .await;
}

fn wakes_up(ws: &Workspace, n: u8) {
    ws.actual(|a| {
        (a.state, a.memory, a.wakes) = (ActualState::Running, false, false);
        a.start_id = Some(model::StartId::from_bytes([n; 8]));
        a.ip = Some("127.0.0.1".into());
    });
}

fn wanted(world: &World) -> usize {
    world.host.wanted.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_to_a_sleeping_workspace_wait_for_one_wake() {
    let world = World::new().await;
    let ws = Arc::new(world.workspace(1).await);
    falls_asleep(&ws).await;
    let token = ws.token(|_| {});
    let requests: Vec<_> = (0..16)
        .map(|_| {
            let (world, token) = (Arc::clone(&world), token.clone());
            tokio::spawn(async move { world.get(&token, "/health").await.status() })
        })
        .collect();
    let asked = Arc::clone(&world);
    until("host is told", || {
        let asked = Arc::clone(&asked);
        async move { wanted(&asked) > 0 }
    })
    .await;
    // It passes through a start, in which nothing says any more that it may wake.
    ws.actual(|a| (a.state, a.wakes) = (ActualState::Starting, false));
    assert!(requests.iter().all(|r| !r.is_finished()));
    wakes_up(&ws, 2);
    for request in requests {
        assert_eq!(request.await.unwrap(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_pass_wakes_nothing() {
    let world = World::new().await;
    let ws = world.workspace(1).await;
    let good = ws.token(|_| {});
    falls_asleep(&ws).await;
    let sleeping = ws.token(|c| c.epoch = 0);
    let other = ws.token(|c| c.sub = "acct_0000000000000000".into());
    let expired = ws.token(|c| (c.iat, c.exp) = (NOW_S - 900, NOW_S - 300));
    let (head, signature) = good.rsplit_once('.').unwrap();
    let forged = format!("{head}.{}", signature.chars().rev().collect::<String>());
    for token in [&sleeping, &other, &expired, &forged] {
        assert_eq!(world.get(token, "/health").await.status(), 401);
    }
    ws.actual(|a| a.public_access = false);
    ws.becomes(&good, 403, "network_blocked").await;
    ws.actual(|a| a.public_access = true);
    ws.token_state(|t| t.enabled = false);
    ws.becomes(&good, 403, "forbidden").await;
    ws.token_state(|t| t.enabled = true);
    // What its owner stopped, or put to sleep without an idle policy, no request wakes.
    for state in [ActualState::Asleep, ActualState::Stopped] {
        ws.actual(|a| (a.state, a.wakes) = (state, false));
        ws.becomes(&good, 409, "vm_not_running").await;
    }
    assert_eq!(wanted(&world), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_its_budget_a_request_is_told_to_try_again() {
    let world = World::with(true).await;
    let ws = world.workspace(1).await;
    falls_asleep(&ws).await;
    let token = ws.token(|_| {});
    let answer = world.get(&token, "/health").await;
    assert_eq!(answer.status(), 503);
    assert_eq!(code_of(&answer), "VM_UNAVAILABLE");
    assert_eq!(answer.headers()["retry-after"], "1");
    assert!(wanted(&world) > 0);
    wakes_up(&ws, 2);
    ws.becomes(&token, 200, "").await;
}
