//! What was opened closes: revocation, darkness, lost feeds.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use model::StartId;

use crate::world::{GW, Workspace, World, body, code_of, eventually, stalls, until, within};

/// A stream that has begun.
async fn stream(ws: &Workspace, token: &str) -> Response<Incoming> {
    let request = Request::get("/hang")
        .header("host", GW)
        .header("authorization", format!("Bearer {token}"));
    let mut answer = ws
        .world
        .send_streaming(request.body(body("")).unwrap())
        .await;
    assert_eq!(answer.status(), 200);
    assert!(within(answer.frame()).await.unwrap().is_ok());
    answer
}

/// Reads on until the stream is cut.
async fn is_cut(mut answer: Response<Incoming>) {
    within(async {
        loop {
            match answer.frame().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return,
                None => panic!("a cut stream must not look finished"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_raised_epoch_cuts_live_streams_and_is_told_to_the_guest() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let old = ws.token(|_| {});
    let newer = ws.token(|c| c.epoch = 2);
    let cut = stream(&ws, &old).await;
    let mut stays = stream(&ws, &newer).await;
    let upload = {
        // The answer has not begun: it ends with the refusal.
        let (w, old) = (Arc::clone(&w), old.clone());
        tokio::spawn(async move { w.get(&old, "/silent").await })
    };
    eventually("the guest has it", || {
        ws.seen
            .requests
            .lock()
            .unwrap()
            .iter()
            .any(|(t, _)| t == "/silent")
    })
    .await;
    ws.token_state(|s| s.epoch = 2);
    is_cut(cut).await;
    assert_eq!(code_of(&within(upload).await.unwrap()), "unauthorized");
    ws.becomes(&old, 401, "unauthorized").await;
    ws.becomes(&newer, 200, "").await;
    eventually("the guest is told", || {
        ws.seen.token_states.lock().unwrap().len() >= 2
    })
    .await;
    // The newer stream is still there.
    let more = tokio::time::timeout(std::time::Duration::from_millis(20), stays.frame()).await;
    assert!(!matches!(more, Ok(None | Some(Err(_)))), "{more:?}");
}

#[tokio::test]
async fn darkness_restarts_and_deletion_cut_everything() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let live = stream(&ws, &token).await;
    ws.actual(|a| a.public_access = false);
    is_cut(live).await;
    eventually("no connection is left", || {
        ws.seen.open.load(Ordering::SeqCst) == 0
    })
    .await;

    ws.actual(|a| a.public_access = true);
    ws.becomes(&token, 200, "").await;
    let live = stream(&ws, &token).await;
    ws.actual(|a| a.start_id = Some(StartId::from_bytes([9; 8])));
    is_cut(live).await;

    ws.becomes(&token, 200, "").await;
    let live = stream(&ws, &token).await;
    ws.token_state(|s| s.gone = true);
    is_cut(live).await;
    ws.becomes(&token, 404, "not_found").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_keeps_no_connection_to_the_guest() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let request = Request::get("/source?100000")
        .header("host", GW)
        .header("authorization", format!("Bearer {token}"));
    let answer = w.send_streaming(request.body(body("")).unwrap()).await;
    // All buffers on the way are full: nobody asks for the body any more.
    stalls(|| ws.seen.bytes.load(Ordering::SeqCst)).await;
    ws.actual(|a| a.public_access = false);
    eventually("the guest's connections close", || {
        ws.seen.open.load(Ordering::SeqCst) == 0
    })
    .await;
    is_cut(answer).await;
}

#[tokio::test]
async fn a_client_that_goes_away_frees_the_guest() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let live = stream(&ws, &ws.token(|_| {})).await;
    let (count, _) = w.edge.table.counts();
    assert_eq!(count, 1);
    drop(live);
    eventually("its place is free", || w.edge.table.counts().0 == 0).await;
}

#[tokio::test]
async fn i21_without_mint_or_host_nothing_passes() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    for feed in ["mint refuses", "mint hangs", "host refuses", "host hangs"] {
        let flag = match feed {
            "mint refuses" => &w.mint.refuses,
            "mint hangs" => &w.mint.hangs,
            "host refuses" => &w.host.refuses,
            _ => &w.host.hangs,
        };
        flag.store(true, Ordering::Relaxed);
        until(feed, || async {
            code_or_ok(&w.get(&token, "/health").await) == "unavailable"
        })
        .await;
        // The other plane does not need it, unless mint itself is asked.
        let health = Request::get("/health").header("host", crate::world::API);
        assert_eq!(w.send(health.body(body("")).unwrap()).await.status(), 200);
        flag.store(false, Ordering::Relaxed);
        ws.becomes(&token, 200, "").await;
    }
}

fn code_or_ok(answer: &Response<bytes::Bytes>) -> String {
    if answer.status() == 200 {
        "ok".into()
    } else {
        code_of(answer)
    }
}

#[tokio::test]
async fn what_host_no_longer_names_after_a_restart_is_gone() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let live = stream(&ws, &token).await;
    w.host.forget();
    w.host.refuses.store(true, Ordering::Relaxed);
    until("lost", || async { !w.edge.table.is_fresh() }).await;
    w.host.refuses.store(false, Ordering::Relaxed);
    is_cut(live).await;
    ws.becomes(&token, 403, "network_blocked").await;
}
