//! Who may pass: the token's layer, the firewall's layer, and neither for the other.

use api::host::ActualState;
use base64_of as b64;
use http::Request;
use seal::jwt;
use seal::sign::SigningKey;
use std::sync::atomic::Ordering;

use crate::world::{GW, NOW_S, World, body, code_of, eventually};

fn base64_of(text: &str) -> String {
    // base64url without padding, small and slow.
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let n = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..=chunk.len() {
            out.push(char::from(ALPHABET[(n >> (18 - 6 * i)) as usize & 63]));
        }
    }
    out
}

#[tokio::test]
async fn an_open_workspace_answers_its_token_only() {
    let w = World::new().await;
    let (a, b) = (w.workspace(1).await, w.workspace(2).await);
    let answer = w
        .get(&a.token(|_| {}), "/files/read?path=/etc/hostname")
        .await;
    assert_eq!(answer.status(), 200);
    let (target, headers) = a.seen.requests.lock().unwrap().pop().unwrap();
    assert_eq!(target, "/files/read?path=/etc/hostname");
    assert!(
        headers["authorization"]
            .to_str()
            .unwrap()
            .starts_with("Bearer ")
    );
    assert_eq!(headers["host"], api::agent::tls_name(&a.id).as_str());
    assert_eq!(
        headers["casemate-request-id"],
        answer.headers()["x-request-id"]
    );
    let before = b.seen.requests.lock().unwrap().len();
    assert_eq!(w.get(&a.token(|_| {}), "/health").await.status(), 200);
    assert_eq!(
        b.seen.requests.lock().unwrap().len(),
        before,
        "the token names the workspace"
    );
}

#[tokio::test]
async fn forged_and_stale_tokens_are_refused_before_any_packet() {
    let w = World::new().await;
    let (a, b) = (w.workspace(1).await, w.workspace(2).await);
    let good = a.token(|_| {});
    let (head, rest) = good.split_once('.').unwrap();
    let (payload, signature) = rest.split_once('.').unwrap();
    let none = b64(r#"{"alg":"none","typ":"JWT"}"#);
    let hs = b64(r#"{"alg":"HS256","typ":"JWT"}"#);
    let crit = b64(r#"{"alg":"EdDSA","typ":"JWT","crit":["b64"],"b64":false}"#);
    let other_payload = b.token(|_| {}).split('.').nth(1).unwrap().to_owned();
    let connections = a.seen.connections.load(Ordering::SeqCst);
    let served = a.seen.requests.lock().unwrap().len();
    for (what, token, code) in [
        ("empty", String::new(), "unauthorized"),
        ("word", "x".into(), "unauthorized"),
        ("none", format!("{none}.{payload}."), "unauthorized"),
        (
            "none+sig",
            format!("{none}.{payload}.{signature}"),
            "unauthorized",
        ),
        (
            "hs256",
            format!("{hs}.{payload}.{signature}"),
            "unauthorized",
        ),
        (
            "crit",
            format!("{crit}.{payload}.{signature}"),
            "unauthorized",
        ),
        (
            "swapped payload",
            format!("{head}.{other_payload}.{signature}"),
            "unauthorized",
        ),
        (
            "another key",
            jwt::sign(&SigningKey::generate(), &a.claims()),
            "unauthorized",
        ),
        (
            "mint's key",
            jwt::sign(&w.mint_key, &a.claims()),
            "unauthorized",
        ),
        (
            "expired",
            a.token(|c| (c.iat, c.exp) = (NOW_S - 900, NOW_S - 300)),
            "token_expired",
        ),
        (
            "too long a life",
            a.token(|c| c.exp = NOW_S + 90_000),
            "unauthorized",
        ),
        (
            "not yet",
            a.token(|c| (c.iat, c.exp) = (NOW_S + 900, NOW_S + 1800)),
            "unauthorized",
        ),
        (
            "no workspace",
            a.token(|c| c.aud = "x".into()),
            "unauthorized",
        ),
        (
            "unknown workspace",
            a.token(|c| c.aud = "ws_ffffffffffffffff".into()),
            "not_found",
        ),
        (
            "other account",
            a.token(|c| c.sub = b.claims().sub),
            "unauthorized",
        ),
        (
            "other issuer",
            a.token(|c| c.iss = "x".into()),
            "unauthorized",
        ),
        ("old epoch", a.token(|c| c.epoch = 0), "unauthorized"),
    ] {
        let answer = w.get(&token, "/health").await;
        assert_eq!(code_of(&answer), code, "{what}");
        assert!(answer.headers().contains_key("strict-transport-security"));
    }
    let two = Request::get("/health")
        .header("host", GW)
        .header("authorization", format!("Bearer {good}"))
        .header("authorization", format!("Bearer {good}"));
    assert_eq!(w.send(two.body(body("")).unwrap()).await.status(), 401);
    // In the query it counts for sockets and the proxy only, which this version does not have.
    let query = |path: &str| {
        let uri = format!("{path}?token={good}");
        w.send(Request::get(uri).header("host", GW).body(body("")).unwrap())
    };
    assert_eq!(query("/health").await.status(), 401);
    assert_eq!(code_of(&query("/ws").await), "not_supported");
    assert_eq!(
        code_of(&w.get(&good, "/proxy/3000/").await),
        "not_supported"
    );
    // The edge's own words to a guest are not a client's to say.
    assert_eq!(w.get(&good, "/casemate/v1/token-state").await.status(), 404);
    w.clock.set_ms((NOW_S as u64 + 3600) * 1000);
    assert_eq!(code_of(&w.get(&good, "/health").await), "token_expired");
    assert_eq!(a.seen.connections.load(Ordering::SeqCst), connections);
    assert_eq!(a.seen.requests.lock().unwrap().len(), served);
}

#[tokio::test]
async fn a_dark_workspace_gets_no_packet_whatever_the_token() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    ws.actual(|a| a.public_access = false);
    ws.becomes(&token, 403, "network_blocked").await;
    // Connections that were there are closed; no new one is made.
    eventually("idle connections close", || {
        ws.seen.open.load(Ordering::SeqCst) == 0
    })
    .await;
    let connections = ws.seen.connections.load(Ordering::SeqCst);
    ws.token_state(|_| {});
    for _ in 0..5 {
        assert_eq!(code_of(&w.get(&token, "/health").await), "network_blocked");
    }
    assert_eq!(ws.seen.connections.load(Ordering::SeqCst), connections);
    ws.actual(|a| a.public_access = true);
    ws.becomes(&token, 200, "").await;
    // Opening the firewall opened no token's layer, and the other way round.
    assert_eq!(w.get("x", "/health").await.status(), 401);
}

#[tokio::test]
async fn states_that_do_not_answer_say_so() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    for state in [
        ActualState::Stopped,
        ActualState::Starting,
        ActualState::Paused,
        ActualState::Crashed,
    ] {
        ws.actual(|a| a.state = state);
        ws.becomes(&token, 409, "vm_not_running").await;
    }
    ws.actual(|a| (a.state, a.ip) = (ActualState::Running, Some("10.0.0.1".into())));
    ws.becomes(&token, 503, "unavailable").await;
    ws.actual(|a| a.ip = Some("127.0.0.1".into()));
    ws.becomes(&token, 200, "").await;
    ws.token_state(|s| s.enabled = false);
    ws.becomes(&token, 403, "forbidden").await;
    ws.token_state(|s| s.gone = true);
    ws.becomes(&token, 404, "not_found").await;
}

#[tokio::test]
async fn a_guest_must_prove_the_identity_that_mint_names() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let other = SigningKey::generate().public().to_hex();
    ws.token_state(|s| s.identity_pub = other);
    // A new start, so that no connection to the old identity is left.
    ws.actual(|a| a.start_id = Some(model::StartId::from_bytes([9; 8])));
    ws.becomes(&token, 502, "bad_gateway").await;
    // Nor is another workspace's guest taken for it.
    let b = w.workspace(2).await;
    b.actual(|a| {
        (a.ip, a.start_id) = (
            Some("127.0.0.1".into()),
            Some(model::StartId::from_bytes([8; 8])),
        )
    });
    b.becomes(&b.token(|_| {}), 502, "bad_gateway").await;
}

#[tokio::test]
async fn a_guest_that_talks_nonsense_is_a_bad_gateway() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let nonsense = ["SSH-2.0-x\r\n\r\n", "HTTP/1.1 103 Early Hints\r\n\r\n"];
    for (start, says) in (9..).zip(nonsense) {
        *ws.seen.says.lock().unwrap() = Some(says);
        ws.actual(|a| a.start_id = Some(model::StartId::from_bytes([start; 8])));
        ws.becomes(&token, 502, "bad_gateway").await;
    }
}

#[tokio::test]
async fn who_was_told_of_a_change_finds_it_made() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    ws.actual(|a| a.public_access = false);
    ws.becomes(&ws.token(|_| {}), 403, "network_blocked").await;
    w.mint.slow.store(true, Ordering::Relaxed);
    w.host.slow.store(true, Ordering::Relaxed);
    eventually("both feeds say nothing more", || {
        let unheard = |n: &std::sync::atomic::AtomicUsize| n.load(Ordering::SeqCst) > 0;
        unheard(&w.mint.unheard) && unheard(&w.host.unheard)
    })
    .await;
    ws.actual(|a| a.public_access = true);
    assert_eq!(w.get(&ws.token(|_| {}), "/health").await.status(), 200);
}
