//! Bodies pass through: not kept, not written, and no faster than they are taken.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::Frame;

use crate::world::{Body, GW, World, body, eventually, stalls, within};

const CHUNK: usize = 64 << 10;
const CHUNKS: u64 = 3_200; // 200 MiB
const GROWTH_MAX: u64 = 32 << 20;

/// Resident memory of this process, bytes.
fn rss() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Bytes that this process had written to storage.
fn written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find(|l| l.starts_with("write_bytes: ")).unwrap();
    line["write_bytes: ".len()..].parse().unwrap()
}

fn upload(chunks: u64) -> (Body, std::sync::Arc<std::sync::atomic::AtomicU64>) {
    let given = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = std::sync::Arc::clone(&given);
    let chunk = Bytes::from(vec![3u8; CHUNK]);
    let stream = futures_util::stream::poll_fn(move |_| {
        let n = count.load(Ordering::SeqCst);
        std::task::Poll::Ready((n < chunks).then(|| {
            count.store(n + 1, Ordering::SeqCst);
            Ok(Frame::data(chunk.clone()))
        }))
    });
    (
        http_body_util::StreamBody::new(stream).boxed_unsync(),
        given,
    )
}

#[tokio::test]
async fn two_hundred_mebibytes_each_way_leave_no_trace() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let auth = format!("Bearer {}", ws.token(|_| {}));
    let warm = w.get(&ws.token(|_| {}), "/source?16").await;
    assert_eq!(warm.body().len(), 16 * CHUNK);
    ws.seen.bytes.store(0, Ordering::SeqCst);
    let (memory, disk) = (rss(), written());

    let (up, _) = upload(CHUNKS);
    let request = Request::post("/sink")
        .header("host", GW)
        .header("authorization", &auth);
    let answer = within(w.send(request.body(up).unwrap())).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(ws.seen.bytes.load(Ordering::SeqCst), CHUNKS * CHUNK as u64);

    let request = Request::get(format!("/source?{CHUNKS}"));
    let request = request.header("host", GW).header("authorization", &auth);
    let mut answer = w.send_streaming(request.body(body("")).unwrap()).await;
    let mut taken = 0;
    let mut peak = 0;
    while let Some(frame) = within(answer.frame()).await {
        taken += frame.unwrap().data_ref().map_or(0, Bytes::len) as u64;
        peak = peak.max(rss());
    }
    assert_eq!(taken, CHUNKS * CHUNK as u64);
    let growth = peak.saturating_sub(memory);
    assert!(growth < GROWTH_MAX, "grew by {growth} bytes");
    assert_eq!(written() - disk, 0, "bodies reached storage");
}

#[tokio::test]
async fn a_guest_that_takes_nothing_holds_the_client_back() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    ws.seen.clogged.store(true, Ordering::SeqCst);
    let (up, given) = upload(CHUNKS);
    let request = Request::post("/sink")
        .header("host", GW)
        .header("authorization", format!("Bearer {}", ws.token(|_| {})));
    let sending = tokio::spawn({
        let w = std::sync::Arc::clone(&w);
        async move { w.send(request.body(up).unwrap()).await.status() }
    });
    // It stops when all buffers on the way are full.
    let given_then = stalls(|| given.load(Ordering::SeqCst)).await;
    assert!(
        given_then * (CHUNK as u64) < 64 << 20,
        "{given_then} chunks were taken"
    );
    ws.seen.clogged.store(false, Ordering::SeqCst);
    assert_eq!(within(sending).await.unwrap(), 200);
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_the_guest_back() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let request = Request::get(format!("/source?{CHUNKS}"))
        .header("host", GW)
        .header("authorization", format!("Bearer {}", ws.token(|_| {})));
    let answer = w.send_streaming(request.body(body("")).unwrap()).await;
    let given_then = stalls(|| ws.seen.bytes.load(Ordering::SeqCst)).await;
    assert!(given_then < 64 << 20, "{given_then} bytes were taken");
    let bytes = within(answer.collect()).await.unwrap().to_bytes();
    assert_eq!(bytes.len() as u64, CHUNKS * CHUNK as u64);
}

#[tokio::test]
async fn connections_to_guests_are_used_again() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    eventually("the guest is told", || {
        !ws.seen.token_states.lock().unwrap().is_empty()
    })
    .await;
    w.get(&token, "/health").await;
    let before = ws.seen.connections.load(Ordering::SeqCst);
    assert_eq!(before, 1, "a first request goes where its guest was told");
    for _ in 0..20 {
        assert_eq!(w.get(&token, "/health").await.status(), 200);
    }
    assert!(ws.seen.connections.load(Ordering::SeqCst) <= before + 1);
}
