//! Who gets in (ACC-3, ACC-7).
#![allow(clippy::unwrap_used)]

mod world;

use api::mint::{GatewayClaims, TokenState};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::{RAW, World, claims, request, state};

#[tokio::test]
async fn i15_the_direct_door_needs_the_raw_token() {
    let world = World::new().await;
    assert_eq!(
        world.call("GET", "/health", "").await.json()["status"],
        "ok"
    );
    let jwt = world.jwt(3);
    for headers in [
        String::new(),
        "authorization: Bearer\r\n".into(),
        "authorization: Bearer x\r\n".into(),
        format!("authorization: Bearer {RAW}0\r\n"),
        format!("authorization: Basic {RAW}\r\n"),
        format!("authorization: Bearer {jwt}\r\n"),
        format!("x-token: {RAW}\r\n"),
    ] {
        for path in ["/health", "/exec", "/nonsense", "/casemate/v1/token-state"] {
            let answer = world.call_with("GET", path, &headers, "").await;
            answer.failed(401, "unauthorized");
        }
    }
    let query = format!("/health?token={RAW}");
    world
        .call_with("GET", &query, "", "")
        .await
        .failed(401, "unauthorized");
    // The edge's own call is not there.
    let body = json!({"signed": world.signed_state(&state())}).to_string();
    world
        .call("POST", "/casemate/v1/token-state", &body)
        .await
        .failed(404, "not_found");
}

#[tokio::test]
async fn i15_the_edge_door_needs_both_the_edge_and_a_gateway_token() {
    let world = World::new().await;
    let good = world.call_edge("GET", "/health", &world.jwt(3), "").await;
    assert_eq!(
        (good.status, good.json()["status"].as_str()),
        (200, Some("ok"))
    );
    let sign = |claims: &GatewayClaims| seal::jwt::sign(&world.gateway, claims);
    let other = seal::sign::SigningKey::from_seed(&[9; 32]);
    let part = |value: serde_json::Value| B64.encode(value.to_string());
    let none = format!(
        "{}.{}.",
        part(json!({"alg": "none", "typ": "JWT", "kid": world.gateway.public().key_id()})),
        part(serde_json::to_value(claims(3)).unwrap())
    );
    for token in [
        String::new(),
        RAW.into(),
        none,
        sign(&claims(2)),
        sign(&GatewayClaims {
            aud: "ws_ffffffffffffffff".into(),
            ..claims(3)
        }),
        sign(&GatewayClaims {
            sub: "acct_ffffffffffffffff".into(),
            ..claims(3)
        }),
        sign(&GatewayClaims {
            iss: "else".into(),
            ..claims(3)
        }),
        sign(&GatewayClaims {
            exp: claims(3).iat + 7200,
            ..claims(3)
        }),
        seal::jwt::sign(&other, &claims(3)),
        seal::jwt::sign(&world.mint, &claims(3)),
    ] {
        let answer = world.call_edge("GET", "/health", &token, "").await;
        answer.failed(401, "unauthorized");
    }
    let (iat, exp) = (claims(3).iat - 3600, claims(3).iat - 60);
    let old = sign(&GatewayClaims {
        iat,
        exp,
        ..claims(3)
    });
    world
        .call_edge("GET", "/health", &old, "")
        .await
        .failed(401, "token_expired");
}

#[tokio::test]
async fn tls_lets_only_the_edge_in() {
    let world = World::new().await;
    let stranger = seal::tls::Identity::from_seed(&[9; 32]);
    for client in [None, Some(&stranger), Some(&world.guest_identity)] {
        // In TLS 1.3 the client may think it is in until it reads.
        let Ok(mut stream) = world.edge_connect(client).await else {
            continue;
        };
        let head = format!("authorization: Bearer {}\r\n", world.jwt(3));
        let _ = stream
            .write_all(&request("GET", "/health", &head, ""))
            .await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    }
    // Plain HTTP at the TLS port.
    let mut stream = tokio::net::TcpStream::connect(world.edge).await.unwrap();
    let head = format!("authorization: Bearer {}\r\n", world.jwt(3));
    stream
        .write_all(&request("GET", "/health", &head, ""))
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
}

#[tokio::test]
async fn raising_the_epoch_ends_streams_and_tokens_at_once() {
    let world = World::new().await;
    let mut streams = Vec::new();
    let head = format!("authorization: Bearer {}\r\n", world.jwt(3));
    let run = json!({"cmd": ["echo up; sleep 1000"]}).to_string();
    // One that streams, and one whose answer has not begun.
    for path in ["/exec/stream", "/exec"] {
        let mut stream = world
            .edge_connect(Some(&world.edge_identity))
            .await
            .unwrap();
        stream
            .write_all(&request("POST", path, &head, &run))
            .await
            .unwrap();
        streams.push(stream);
    }
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("event: stdout") {
        assert!(streams[0].read_buf(&mut seen).await.unwrap() > 0);
    }
    let raised = TokenState {
        epoch: 4,
        seq: 11,
        ..state()
    };
    let raise = |state: &TokenState| json!({"signed": world.signed_state(state)}).to_string();
    let path = "/casemate/v1/token-state";
    let answer = world.call_edge("POST", path, "", &raise(&raised)).await;
    assert_eq!(
        answer.json(),
        json!({"success": true, "epoch": 4, "seq": 11})
    );
    // The answer does not wait for the disk.
    let (kept, wanted) = (
        world.dir.path().join("state/token-state"),
        world.signed_state(&raised),
    );
    let deadline = tokio::time::Instant::now() + world::DEADLINE;
    while std::fs::read_to_string(&kept).ok().as_ref() != Some(&wanted) {
        assert!(tokio::time::Instant::now() < deadline, "it is not kept");
        tokio::task::yield_now().await;
    }
    let cut = world::answer(streams.remove(1)).await;
    cut.failed(401, "unauthorized");
    let rest = tokio::time::timeout(world::DEADLINE, streams[0].read_to_end(&mut seen)).await;
    let _ = rest.expect("the stream goes on");
    assert!(
        !seen.ends_with(b"0\r\n\r\n"),
        "a cut stream must not look complete"
    );
    let old = world.call_edge("GET", "/health", &world.jwt(3), "").await;
    old.failed(401, "unauthorized");
    assert_eq!(
        world
            .call_edge("GET", "/health", &world.jwt(4), "")
            .await
            .status,
        200
    );
    // Never back.
    for stale in [state(), TokenState { seq: 12, ..state() }] {
        let answer = world.call_edge("POST", path, "", &raise(&stale)).await;
        answer.failed(409, "conflict");
    }
    let disabled = TokenState {
        enabled: false,
        epoch: 5,
        seq: 13,
        ..state()
    };
    world.call_edge("POST", path, "", &raise(&disabled)).await;
    world
        .call("GET", "/health", "")
        .await
        .failed(403, "forbidden");
    world
        .call_edge("GET", "/health", &world.jwt(5), "")
        .await
        .failed(403, "forbidden");
}

#[tokio::test]
async fn token_states_must_be_mints() {
    let world = World::new().await;
    let path = "/casemate/v1/token-state";
    let new = TokenState {
        epoch: 9,
        seq: 99,
        ..state()
    };
    let forged = seal::sign::Signed::new(&world.gateway, api::context::TOKEN_STATE, &new);
    let other = TokenState {
        workspace: "ws_ffffffffffffffff".parse().unwrap(),
        ..new
    };
    for signed in [forged.to_string(), world.signed_state(&other), "x".into()] {
        let body = json!({"signed": signed}).to_string();
        let answer = world.call_edge("POST", path, "", &body).await;
        answer.failed(403, "forbidden");
    }
    for body in [
        "",
        "{",
        "[]",
        "{\"signed\":1}",
        "{\"signed\":\"x\",\"more\":1}",
    ] {
        world
            .call_edge("POST", path, "", body)
            .await
            .failed(400, "bad_request");
    }
    let get = world.call_edge("GET", path, "", "").await;
    get.failed(405, "method_not_allowed");
    assert_eq!(
        world
            .call_edge("GET", "/health", &world.jwt(3), "")
            .await
            .status,
        200
    );
}
