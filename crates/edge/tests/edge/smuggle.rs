//! Requests that two servers could read in two ways: refused, or read in one way and the
//! connection closed. Each is followed by a second request that must never be served.

use crate::world::{API, World};

const KEY: &str = "x-client-id: key_1\r\nx-client-secret: sesame\r\n";
const HSTS: &str = "strict-transport-security: max-age=";

fn corpus() -> Vec<(&'static str, String)> {
    let host = format!("host: {API}\r\n");
    let post =
        |lines: &str, body: &str| format!("POST /a HTTP/1.1\r\n{host}{KEY}{lines}\r\n{body}");
    let chunked = "1\r\nx\r\n0\r\n\r\n";
    vec![
        (
            "CL then TE",
            post(
                "content-length: 3\r\ntransfer-encoding: chunked\r\n",
                chunked,
            ),
        ),
        (
            "TE then CL",
            post(
                "transfer-encoding: chunked\r\ncontent-length: 3\r\n",
                chunked,
            ),
        ),
        (
            "TE.TE",
            post(
                "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
                chunked,
            ),
        ),
        (
            "TE xchunked",
            post("transfer-encoding: xchunked\r\n", chunked),
        ),
        (
            "TE identity",
            post("transfer-encoding: identity\r\n", chunked),
        ),
        (
            "TE chunked, gzip",
            post("transfer-encoding: chunked, gzip\r\n", chunked),
        ),
        (
            "TE with a tab before the colon",
            post("transfer-encoding\t: chunked\r\n", chunked),
        ),
        (
            "TE with a space before the colon",
            post("transfer-encoding : chunked\r\n", chunked),
        ),
        (
            "TE with a vertical tab",
            post("transfer-encoding: \x0bchunked\r\n", chunked),
        ),
        (
            "TE folded",
            post("transfer-encoding:\r\n chunked\r\n", chunked),
        ),
        ("obs-fold", post("a: b\r\n c: d\r\n", "")),
        (
            "two lengths",
            post("content-length: 1\r\ncontent-length: 2\r\n", "xx"),
        ),
        ("a list of lengths", post("content-length: 1, 2\r\n", "x")),
        ("a negative length", post("content-length: -1\r\n", "x")),
        ("a signed length", post("content-length: +1\r\n", "x")),
        ("a hex length", post("content-length: 0x1\r\n", "x")),
        ("an empty length", post("content-length: \r\n", "")),
        (
            "a huge length",
            post("content-length: 99999999999999999999999\r\n", "x"),
        ),
        (
            "a bad chunk size",
            post("transfer-encoding: chunked\r\n", "zz\r\nx\r\n0\r\n\r\n"),
        ),
        (
            "a negative chunk size",
            post("transfer-encoding: chunked\r\n", "-1\r\nx\r\n0\r\n\r\n"),
        ),
        (
            "a huge chunk size",
            post(
                "transfer-encoding: chunked\r\n",
                "ffffffffffffffff1\r\nx\r\n",
            ),
        ),
        (
            "a chunk too long",
            post("transfer-encoding: chunked\r\n", "1\r\nxy\r\n0\r\n\r\n"),
        ),
        ("a bare CR in a value", post("a: b\rc: d\r\n", "")),
        ("a NUL in a value", post("a: b\0\r\n", "")),
        ("a NUL in a name", post("a\0: b\r\n", "")),
        ("no name", post(": b\r\n", "")),
        ("no colon", post("abc\r\n", "")),
        ("two hosts", post("host: gw.test\r\n", "")),
        ("no host", format!("GET / HTTP/1.1\r\n{KEY}\r\n")),
        (
            "a space in the host",
            format!("GET / HTTP/1.1\r\nhost: {API} x\r\n{KEY}\r\n"),
        ),
        (
            "an absolute target elsewhere",
            format!("GET http://gw.test/ HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        ("asterisk", format!("OPTIONS * HTTP/1.1\r\n{host}{KEY}\r\n")),
        (
            "CONNECT",
            format!("CONNECT {API}:443 HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        ("TRACE", format!("TRACE / HTTP/1.1\r\n{host}{KEY}\r\n")),
        (
            "a space in the target",
            format!("GET /a b HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "a tab in the target",
            format!("GET /a\tb HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "an encoded CRLF",
            format!("GET /a%0d%0ab HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "an encoded NUL",
            format!("GET /a%00b HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "8-bit target",
            format!("GET /\u{e9} HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "a control character in the method",
            format!("G\x01T / HTTP/1.1\r\n{host}{KEY}\r\n"),
        ),
        (
            "HTTP/1.0 with TE",
            format!("POST /a HTTP/1.0\r\n{host}{KEY}transfer-encoding: chunked\r\n\r\n{chunked}"),
        ),
        ("HTTP/0.9", "GET /\r\n".into()),
        ("HTTP/3.0", format!("GET / HTTP/3.0\r\n{host}{KEY}\r\n")),
        ("h2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
        (
            "a long line",
            post(&format!("a: {}\r\n", "b".repeat(40_000)), ""),
        ),
        ("many lines", post(&"a: b\r\n".repeat(101), "")),
        ("garbage", "\u{16}\u{3}\u{1}garbage\r\n\r\n".into()),
    ]
}

#[tokio::test]
async fn no_second_request_is_smuggled() {
    let w = World::new().await;
    for (what, first) in corpus() {
        let second =
            format!("GET /smuggled HTTP/1.1\r\nhost: {API}\r\n{KEY}connection: close\r\n\r\n");
        let answer = w.raw((first + &second).as_bytes()).await;
        let status = answer.get(9..12).unwrap_or("");
        let refused = status.starts_with('4') || answer.is_empty();
        assert!(refused, "{what}: {answer}");
        for (i, part) in answer.split("HTTP/1.1 ").enumerate().skip(1) {
            assert!(
                part.contains(HSTS),
                "{what}: answer {i} without HSTS: {answer}"
            );
            assert!(
                part.contains("\"success\":false") || part.starts_with("200"),
                "{what}: {answer}"
            );
        }
        let seen = w.control_seen();
        assert!(seen.is_empty(), "{what}: {seen:?}");
        w.control.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn what_is_passed_on_is_framed_anew() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let token = ws.token(|_| {});
    let head = format!("host: gw.test\r\nauthorization: Bearer {token}\r\nconnection: close\r\n");
    let request = format!(
        "POST /echo HTTP/1.1\r\n{head}transfer-encoding: chunked\r\ntrailer: casemate-x\r\n\r\n\
         3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\ncasemate-x: 1\r\n\r\n"
    );
    let answer = w.raw(request.as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("abc"),
        "{answer}"
    );
    let (_, headers) = ws.seen.requests.lock().unwrap().pop().unwrap();
    assert!(!headers.contains_key("trailer") && !headers.contains_key("content-length"));
    assert_eq!(headers.get_all("host").iter().count(), 1);
    let request = format!("POST /echo HTTP/1.1\r\n{head}content-length: 5\r\n\r\nhello");
    let answer = w.raw(request.as_bytes()).await;
    assert!(answer.ends_with("hello"), "{answer}");
    let (_, headers) = ws.seen.requests.lock().unwrap().pop().unwrap();
    assert_eq!(headers["content-length"], "5");
    assert!(!headers.contains_key("transfer-encoding"));
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_and_bad_ones_with_hsts() {
    let w = World::new().await;
    let good = format!("GET /health HTTP/1.1\r\nhost: {API}\r\n\r\n");
    let answer = w.raw(format!("{good}{good}BAD\0\r\n\r\n").as_bytes()).await;
    let parts: Vec<_> = answer.split("HTTP/1.1 ").skip(1).collect();
    assert_eq!(parts.len(), 3, "{answer}");
    assert!(parts[0].starts_with("200") && parts[1].starts_with("200"));
    assert!(parts[2].starts_with("400") && parts[2].contains("\"success\":false"));
    assert!(parts.iter().all(|p| p.contains(HSTS)), "{answer}");
}

#[tokio::test]
async fn a_body_is_asked_for_only_when_it_may_come() {
    let w = World::new().await;
    let ws = w.workspace(1).await;
    let post = |token: &str, body: &str| {
        format!(
            "POST /echo HTTP/1.1\r\nhost: gw.test\r\nauthorization: Bearer {token}\r\n\
             expect: 100-continue\r\ncontent-length: 5\r\nconnection: close\r\n\r\n{body}"
        )
    };
    let good = ws.token(|_| {});
    let answer = w.raw(post(&good, "hello").as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 100 ") && answer.contains("HTTP/1.1 200 "),
        "{answer}"
    );
    for bad in ["x".to_owned(), ws.token(|c| c.epoch = 0)] {
        let answer = w.raw(post(&bad, "").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    }
}
