//! Which plane, what it is told, and what every answer carries.

use std::sync::Arc;
use std::time::Duration;

use api::context;
use api::mint::Assertion;
use http::{Request, Response};
use http_body_util::BodyExt;
use seal::sign::Signed;
use seal::tls::rustls::{ClientConfig, RootCertStore, crypto, version};
use seal::tls::rustls_pki_types::ServerName;
use seal::tls::tokio_rustls::TlsConnector;
use seal::tls::{HTTP1, HTTP2_AND_1};
use tokio::net::TcpStream;

use crate::world::{API, GW, World, body, code_of, within};

const HSTS: &str = "max-age=31536000";

fn key(request: http::request::Builder) -> http::request::Builder {
    request
        .header("host", API)
        .header("x-client-id", "key_1")
        .header("x-client-secret", "sesame")
}

fn ours<B>(answer: &Response<B>) {
    assert_eq!(answer.headers()["strict-transport-security"], HSTS);
    assert_eq!(answer.headers()["cache-control"], "no-store");
    assert!(
        answer.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .starts_with("req_")
    );
    for gone in [
        "etag",
        "server",
        "set-cookie",
        "casemate-internal",
        "casemate-x",
        "x-hop",
    ] {
        assert!(!answer.headers().contains_key(gone), "{gone}");
    }
}

#[tokio::test]
async fn i20_control_gets_an_assertion_for_this_request_and_no_secret() {
    let w = World::new().await;
    let answer = w
        .send(
            key(Request::post("/workspace?a=b%20c"))
                .header("content-type", "application/json")
                .header("authorization", "Bearer t0ken")
                .header("cookie", "c00kie")
                .header("x-forwarded-for", "1.2.3.4")
                .header("forwarded", "for=1.2.3.4")
                .header("casemate-assertion", "forged")
                .header("casemate-source-ip", "1.2.3.4")
                .header("connection", "x-mine")
                .header("x-mine", "1")
                .body(body(r#"{"name":"x"}"#))
                .unwrap(),
        )
        .await;
    assert_eq!(answer.status(), 200);
    ours(&answer);
    let sent = w.control_seen().pop().unwrap();
    assert_eq!(
        (sent.method.as_str(), sent.target.as_str()),
        ("POST", "/workspace?a=b%20c")
    );
    assert_eq!(sent.body, r#"{"name":"x"}"#);
    assert_eq!(sent.headers["casemate-source-ip"], "127.0.0.1");
    assert_eq!(
        sent.headers["casemate-request-id"],
        answer.headers()["x-request-id"]
    );
    assert_eq!(sent.headers["content-type"], "application/json");
    let signed = sent.headers["casemate-assertion"].to_str().unwrap();
    let assertion: Assertion = Signed::parse(signed)
        .unwrap()
        .verify(&w.mint_key.public(), context::ASSERTION)
        .unwrap();
    let hash = service::binding::request_hash("POST", "/workspace?a=b%20c", &sent.body);
    assert_eq!(assertion.binding, hash.map(|b| format!("{b:02x}")).concat());
    let text = format!("{:?}", sent.headers);
    for secret in [
        "sesame", "key_1", "t0ken", "c00kie", "1.2.3.4", "forged", "x-mine",
    ] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[tokio::test]
async fn who_shows_no_good_credential_does_not_reach_control() {
    let w = World::new().await;
    let get = |r: http::request::Builder| r.body(body("")).unwrap();
    for request in [
        get(Request::get("/workspace").header("host", API)),
        get(Request::get("/workspace")
            .header("host", API)
            .header("x-client-id", "key_1")),
        get(key(Request::get("/workspace")).header("x-client-secret", "again")),
        get(Request::get("/workspace")
            .header("host", API)
            .header("authorization", "Bearer no")),
        get(Request::post("/health").header("host", API)),
        get(Request::get("/health/").header("host", API)),
        get(Request::get("/openapi.json/../workspace").header("host", API)),
    ] {
        let answer = w.send(request).await;
        assert_eq!(answer.status(), 401);
        assert_eq!(code_of(&answer), "unauthorized");
        ours(&answer);
    }
    assert!(w.control_seen().is_empty());
    let bearer = Request::get("/workspace").header("host", API);
    let answer = w
        .send(get(bearer.header("authorization", "Bearer bearer-token")))
        .await;
    assert_eq!(answer.status(), 200);
    for open in ["/health", "/openapi.json"] {
        let answer = w.send(get(Request::get(open).header("host", API))).await;
        assert_eq!(answer.status(), 200);
        assert!(
            !w.control_seen()
                .pop()
                .unwrap()
                .headers
                .contains_key("casemate-assertion")
        );
    }
}

#[tokio::test]
async fn bodies_for_control_are_bounded() {
    let w = World::new().await;
    let max = api::limits::CONTROL_BODY_MAX_BYTES;
    let post = |len| {
        key(Request::post("/workspace"))
            .body(body(vec![b' '; len]))
            .unwrap()
    };
    assert_eq!(w.send(post(max)).await.status(), 200);
    let answer = w.send(post(max + 1)).await;
    assert_eq!(
        (answer.status().as_u16(), code_of(&answer).as_str()),
        (413, "payload_too_large")
    );
    ours(&answer);
    // Chunked: no length to believe.
    let head = format!(
        "POST /workspace HTTP/1.1\r\nhost: {API}\r\nx-client-id: key_1\r\n\
         x-client-secret: sesame\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000)).repeat(5) + "0\r\n\r\n";
    let answer = w.raw((head + &chunk).as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 413 ") && answer.contains(HSTS),
        "{answer}"
    );
    assert_eq!(w.control_seen().len(), 1);
}

#[tokio::test]
async fn an_unknown_host_is_misdirected() {
    let w = World::new().await;
    for host in ["other.test", "127.0.0.1", "gw.test.", "xgw.test"] {
        let request = Request::get("/health")
            .header("host", host)
            .body(body(""))
            .unwrap();
        let answer = w.send(request).await;
        assert_eq!(
            (answer.status().as_u16(), code_of(&answer).as_str()),
            (421, "misdirected_request")
        );
        ours(&answer);
    }
    let two = Request::get(format!("https://{GW}/health")).header("host", API);
    let answer = w.send_h2(two.body(body("")).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 421);
    ours(&answer);
}

#[tokio::test]
async fn http_2_is_served_alike() {
    let w = World::new().await;
    let request = Request::get(format!("https://{API}/workspace"))
        .header("x-client-id", "key_1")
        .header("x-client-secret", "sesame");
    let answer = w.send_h2(request.body(body("")).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    ours(&answer);
    let large = Request::get(format!("https://{API}/workspace")).header("x-a", "a".repeat(40_000));
    let answer = w.send_h2(large.body(body("")).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 431);
    ours(&answer);
    let ws = w.workspace(1).await;
    let request = Request::post(format!("https://{GW}/echo"))
        .header("authorization", format!("Bearer {}", ws.token(|_| {})));
    let answer = w
        .send_h2(request.body(body("hello")).unwrap())
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    ours(&answer);
    assert_eq!(within(answer.collect()).await.unwrap().to_bytes(), "hello");
}

#[tokio::test]
async fn a_guests_headers_stay_its_own() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let answer = w.get(&ws.token(|_| {}), "/hostile").await;
    assert_eq!(answer.status(), 200);
    ours(&answer);
    assert!(answer.headers().contains_key("content-security-policy"));
}

#[tokio::test]
async fn tls_1_3_or_nothing() {
    let w = World::new().await;
    let tls = w.tls(HTTP2_AND_1).await;
    let group = tls
        .get_ref()
        .1
        .negotiated_key_exchange_group()
        .unwrap()
        .name();
    assert_eq!(format!("{group:?}"), "X25519MLKEM768");
    drop(tls);
    let old = ClientConfig::builder_with_provider(Arc::new(crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let tcp = TcpStream::connect(w.address).await.unwrap();
    let name = ServerName::try_from(API).unwrap();
    let refused = within(TlsConnector::from(Arc::new(old)).connect(name, tcp)).await;
    assert!(format!("{:?}", refused.unwrap_err()).contains("ProtocolVersion"));
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_takes_no_new_ones() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let request = Request::get("/source?200")
        .header("host", GW)
        .header("authorization", format!("Bearer {token}"));
    let answer = w.send_streaming(request.body(body("")).unwrap()).await;
    let idle = w.tls(HTTP1).await;
    w.stop.send(true).unwrap();
    let refused = async {
        while TcpStream::connect(w.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(refused).await;
    let bytes = within(answer.collect()).await.unwrap().to_bytes();
    assert_eq!(bytes.len(), 200 * (64 << 10));
    drop(idle);
    crate::world::eventually("the drain ends", || w.served.is_finished()).await;
}
