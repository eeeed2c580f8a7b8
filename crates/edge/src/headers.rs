//! What of a message's head is passed on: the end-to-end part, less everything that would speak
//! for the platform, for the client's credential, or for a cache.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Headers that belong to one connection (RFC 9110, 7.6.1), and those that this proxy answers
/// itself.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-authentication-info",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "expect",
    "host",
    "content-length",
];

/// Headers by which a client could claim to be a proxy.
const FORWARDED: &[&str] = &[
    "forwarded",
    "via",
    "x-real-ip",
    "true-client-ip",
    "cf-connecting-ip",
];

/// Headers of an answer that are the edge's to set, or that nobody behind it may.
const ANSWER_OURS: &[&str] = &[
    "strict-transport-security",
    "alt-svc",
    "server",
    "via",
    "age",
    "cache-control",
    "expires",
    "pragma",
    "etag",
    "last-modified",
    "x-request-id",
];

/// Headers by which one guest's answer could reach into the origin that all workspaces share.
const GUEST_FORBIDDEN: &[&str] = &[
    "set-cookie",
    "clear-site-data",
    "service-worker-allowed",
    "content-security-policy",
    "content-security-policy-report-only",
    "public-key-pins",
    "refresh",
    // A browser would ask for a password in the name of all, or report all of the origin's requests.
    "www-authenticate",
    "nel",
    "report-to",
    "reporting-endpoints",
    "accept-ch",
    "origin-agent-cluster",
];

/// The same, by how they begin: whose scripts may read the answers is no guest's to say.
const GUEST_FORBIDDEN_PREFIXES: &[&str] = &["access-control-", "cross-origin-"];

/// The request's headers for control: no credential, nothing that only the edge may say.
#[must_use]
pub fn to_control(headers: &HeaderMap) -> HeaderMap {
    passed_on(headers, |name| {
        !is_ours(name)
            && !name.starts_with("x-client-")
            && !matches!(name, "authorization" | "cookie")
    })
}

/// The request's headers for a guest: `Authorization` stays, the guest verifies the same token.
#[must_use]
pub fn to_guest(headers: &HeaderMap) -> HeaderMap {
    passed_on(headers, |name| {
        !is_ours(name) && !name.starts_with("x-client-") && name != "cookie"
    })
}

/// An answer's headers for the client. `guest` says that a tenant wrote them; `length` that the
/// `Content-Length` describes a body that is not there (HEAD).
#[must_use]
pub fn to_client(headers: &HeaderMap, guest: bool, length: bool) -> HeaderMap {
    let mut out = passed_on(headers, |name| {
        let ours = ANSWER_OURS.contains(&name) || name.starts_with("casemate-");
        let begins = |p: &&str| name.starts_with(p);
        let forbidden = guest
            && (GUEST_FORBIDDEN.contains(&name) || GUEST_FORBIDDEN_PREFIXES.iter().any(begins));
        !ours && !forbidden
    });
    if let (true, Some(value)) = (length, headers.get(header::CONTENT_LENGTH)) {
        out.insert(header::CONTENT_LENGTH, value.clone());
    }
    if guest {
        // A guest's page must not run as the gateway's origin, should a browser ever show one.
        out.insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; sandbox"),
        );
    }
    out
}

/// What every answer carries, whoever wrote it (EDGE-1, EDGE-4).
pub fn set_ours(headers: &mut HeaderMap, request_id: &str) {
    headers.insert(
        header::STRICT_TRANSPORT_SECURITY,
        HeaderValue::from_static(HSTS),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    if let Ok(id) = HeaderValue::from_str(request_id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
}

/// A year; subdomains of a control host need not be ours.
pub const HSTS: &str = "max-age=31536000";

/// Size of a head's header lines as they would stand on an HTTP/1.1 wire, bytes.
#[must_use]
pub fn size_bytes(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(n, v)| n.as_str().len() + v.len() + 4)
        .sum()
}

fn is_ours(name: &str) -> bool {
    name.starts_with("casemate-") || name.starts_with("x-forwarded") || FORWARDED.contains(&name)
}

fn passed_on(headers: &HeaderMap, keep: impl Fn(&str) -> bool) -> HeaderMap {
    let named = |name: &str| {
        headers.get_all(header::CONNECTION).iter().any(|line| {
            line.as_bytes()
                .split(|b| *b == b',')
                .any(|word| word.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
        })
    };
    headers
        .iter()
        .filter(|(name, _)| {
            let name = name.as_str();
            !HOP_BY_HOP.contains(&name) && !named(name) && keep(name)
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn map(lines: &[(&str, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(n, v)| (n.parse::<HeaderName>().unwrap(), v.parse().unwrap()))
            .collect()
    }

    #[test]
    fn a_request_loses_credentials_and_claims() {
        let hostile = map(&[
            ("host", "api.test"),
            ("connection", "close, X-Hop"),
            ("connection", "x-hop-2"),
            ("x-hop", "1"),
            ("x-hop-2", "1"),
            ("keep-alive", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("x-client-id", "key_1"),
            ("x-client-secret", "s"),
            ("x-client-other", "s"),
            ("authorization", "Bearer t"),
            ("cookie", "a=b"),
            ("casemate-assertion", "forged"),
            ("casemate-source-ip", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-real-ip", "1.2.3.4"),
            ("via", "x"),
            ("content-type", "application/json"),
            ("x-oblien-account", "a"),
        ]);
        let names = |m: HeaderMap| {
            let mut v: Vec<_> = m.keys().map(|k| k.as_str().to_owned()).collect();
            v.sort();
            v
        };
        assert_eq!(
            names(to_control(&hostile)),
            ["content-type", "x-oblien-account"]
        );
        assert_eq!(
            names(to_guest(&hostile)),
            ["authorization", "content-type", "x-oblien-account"]
        );
    }

    #[test]
    fn an_answer_keeps_no_cache_header_and_no_guest_cookie() {
        let hostile = map(&[
            ("strict-transport-security", "max-age=0"),
            ("cache-control", "public"),
            ("etag", "\"x\""),
            ("set-cookie", "a=b"),
            ("access-control-allow-origin", "*"),
            ("nel", "{}"),
            ("content-length", "3"),
            ("alt-svc", "h3"),
            ("content-type", "text/html"),
        ]);
        let mut out = to_client(&hostile, true, false);
        for gone in [
            "set-cookie",
            "access-control-allow-origin",
            "nel",
            "content-length",
        ] {
            assert!(!out.contains_key(gone), "{gone}");
        }
        assert!(out.contains_key("content-security-policy"));
        set_ours(&mut out, "req_0000000000000000");
        assert_eq!(out.get_all("strict-transport-security").iter().count(), 1);
        assert_eq!(out["strict-transport-security"], HSTS);
        assert_eq!(out["cache-control"], "no-store");
        assert!(to_client(&hostile, false, true).contains_key("set-cookie"));
        assert_eq!(to_client(&hostile, false, true)["content-length"], "3");
    }

    proptest! {
        #[test]
        fn nothing_of_ours_passes(name in "[a-zA-Z0-9-]{1,30}", connection in "[ -~]{0,60}") {
            let (Ok(n), Ok(v)) = (name.parse::<HeaderName>(), connection.parse::<HeaderValue>())
            else { return Ok(()) };
            let mut m = HeaderMap::new();
            m.insert(n, HeaderValue::from_static("x"));
            m.insert("casemate-assertion", HeaderValue::from_static("x"));
            m.insert(header::CONNECTION, v);
            let out = to_control(&m);
            prop_assert!(out.keys().all(|k| !k.as_str().starts_with("casemate-")));
            prop_assert!(!out.contains_key(header::CONNECTION));
        }
    }
}
