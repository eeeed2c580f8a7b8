//! Which plane a request is for: by its host name, exactly as configured, and nothing else.
//!
//! Must never guess: two names in one request, or a name that is not listed, is refused.

use std::collections::HashMap;

use anyhow::bail;
use http::header::HOST;
use http::request::Parts;
use http::{Method, Version};

use crate::limits::PATH_MAX_BYTES;

/// What a host name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// The control API.
    Control,
    /// The gateway to workspaces.
    Gateway,
}

/// Why a request has no plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoPlane {
    /// It is not well formed, for this reason.
    Malformed(&'static str),
    /// It names a host that is not served here, or two that differ.
    Misdirected,
    /// A method that no plane has.
    Method,
}

/// The host names that are served.
#[derive(Debug, Clone)]
pub struct Hosts(HashMap<String, Plane>);

impl Hosts {
    /// The names of both planes.
    ///
    /// # Errors
    /// A name that is no host name, or that stands in both lists.
    pub fn new(control: &[String], gateway: &[String]) -> anyhow::Result<Self> {
        let mut map = HashMap::new();
        for (field, names, plane) in [
            ("edge.control_hosts", control, Plane::Control),
            ("edge.gateway_hosts", gateway, Plane::Gateway),
        ] {
            for name in names {
                let Some(host) = configured(name) else {
                    bail!("{field}: {name:?} must be a host name or an address, without a port");
                };
                if map.insert(host, plane).is_some_and(|p| p != plane) {
                    bail!("{name:?} stands in edge.control_hosts and in edge.gateway_hosts");
                }
            }
        }
        Ok(Self(map))
    }

    /// The plane of a request, after its target and host were found well formed.
    ///
    /// # Errors
    /// Why there is none.
    pub fn plane(&self, parts: &Parts) -> Result<Plane, NoPlane> {
        if matches!(parts.method, Method::CONNECT | Method::TRACE) {
            return Err(NoPlane::Method);
        }
        let target = parts.uri.path_and_query().map_or("", |p| p.as_str());
        if !target_is_sound(target) {
            return Err(NoPlane::Malformed(
                "the path holds a character that it must not",
            ));
        }
        let named = host_of(parts)?;
        self.0.get(&named).copied().ok_or(NoPlane::Misdirected)
    }
}

/// The one host that a request names.
fn host_of(parts: &Parts) -> Result<String, NoPlane> {
    let mut lines = parts.headers.get_all(HOST).iter();
    let line = lines.next();
    if lines.next().is_some() {
        return Err(NoPlane::Malformed("more than one Host"));
    }
    let line = match line {
        None => None,
        Some(value) => Some(
            value
                .to_str()
                .ok()
                .and_then(authority_host)
                .ok_or(NoPlane::Malformed("the Host is no host name"))?,
        ),
    };
    if parts.version < Version::HTTP_2 && line.is_none() {
        return Err(NoPlane::Malformed("the Host is missing"));
    }
    // HTTP/2's `:authority`, or HTTP/1.1's absolute form.
    let target = match parts.uri.authority() {
        None => None,
        Some(authority) => Some(
            authority_host(authority.as_str())
                .ok_or(NoPlane::Malformed("the authority is no host name"))?,
        ),
    };
    if parts.uri.scheme_str().is_some_and(|s| s != "https") {
        return Err(NoPlane::Misdirected);
    }
    match (target, line) {
        (Some(a), Some(b)) if a != b => Err(NoPlane::Misdirected),
        (Some(host), _) | (None, Some(host)) => Ok(host),
        (None, None) => Err(NoPlane::Malformed("the Host is missing")),
    }
}

/// The host of `host[:port]`, in lower case; `None` unless it is one in its plainest form.
fn authority_host(authority: &str) -> Option<String> {
    let (host, port) = if authority.starts_with('[') {
        let end = authority.find(']')? + 1;
        authority.split_at(end)
    } else {
        authority.split_at(authority.find(':').unwrap_or(authority.len()))
    };
    let port_ok = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|p| p.len() <= 5 && p.bytes().all(|b| b.is_ascii_digit()));
    if !port_ok || host.is_empty() || host.len() > 255 {
        return None;
    }
    if let Some(v6) = host.strip_prefix('[') {
        let v6: std::net::Ipv6Addr = v6.strip_suffix(']')?.parse().ok()?;
        return Some(format!("[{v6}]"));
    }
    host.bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        .then(|| host.to_ascii_lowercase())
}

/// A configured name: an IPv6 address may stand without its brackets.
fn configured(name: &str) -> Option<String> {
    match name.parse::<std::net::Ipv6Addr>() {
        Ok(v6) => Some(format!("[{v6}]")),
        Err(_) if name.contains(':') && !name.starts_with('[') => None,
        Err(_) => authority_host(name),
    }
}

/// Whether a request's target can be passed on: origin form, visible ASCII, no control character
/// behind a percent sign in its path.
#[must_use]
pub fn target_is_sound(target: &str) -> bool {
    let bytes = target.as_bytes();
    if bytes.first() != Some(&b'/') || bytes.len() > PATH_MAX_BYTES {
        return false;
    }
    if !bytes
        .iter()
        .all(|b| (0x21..=0x7e).contains(b) && !matches!(b, b'\\' | b'#'))
    {
        return false;
    }
    let path = target.split('?').next().unwrap_or_default().as_bytes();
    let mut rest = path;
    while let Some(at) = rest.iter().position(|b| *b == b'%') {
        let code = rest
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(0x20..=0x7e | 0x80..) => rest = &rest[at + 3..],
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn hosts() -> Hosts {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        Hosts::new(
            &list(&["API.test", "::1"]),
            &list(&["gw.test", "127.0.0.1"]),
        )
        .unwrap()
    }

    fn plane(version: Version, uri: &str, host: &[&str]) -> Result<Plane, NoPlane> {
        let mut request = http::Request::builder().version(version).uri(uri);
        for h in host {
            request = request.header("host", *h);
        }
        hosts().plane(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn one_exact_name_decides() {
        use NoPlane::{Malformed, Misdirected};
        let (h1, h2) = (Version::HTTP_11, Version::HTTP_2);
        let check = |version, uri: &str, host: &[&str], want: Result<Plane, NoPlane>| {
            let got = plane(version, uri, host);
            let same = match (got, want) {
                (Err(Malformed(_)), Err(Malformed(_))) => true,
                (a, b) => a == b,
            };
            assert!(same, "{uri} {host:?}: {got:?}, not {want:?}");
        };
        let bad = Err(Malformed(""));
        check(h1, "/", &["api.test"], Ok(Plane::Control));
        check(h1, "/", &["aPi.TEST:8443"], Ok(Plane::Control));
        check(h1, "/", &["[::1]:443"], Ok(Plane::Control));
        check(h1, "/", &["[0:0::1]"], Ok(Plane::Control));
        check(h1, "/", &["127.0.0.1:7443"], Ok(Plane::Gateway));
        check(h1, "https://gw.test/x", &["gw.test"], Ok(Plane::Gateway));
        check(h2, "https://gw.test/x", &[], Ok(Plane::Gateway));
        check(h2, "https://gw.test/x", &["gw.test:1"], Ok(Plane::Gateway));
        check(h1, "/", &["other.test"], Err(Misdirected));
        check(h1, "/", &["api.test."], Err(Misdirected));
        check(h1, "/", &["xapi.test"], Err(Misdirected));
        check(h1, "https://gw.test/x", &["api.test"], Err(Misdirected));
        check(h1, "http://gw.test/x", &["gw.test"], Err(Misdirected));
        check(h2, "https://gw.test/x", &["api.test"], Err(Misdirected));
        check(h1, "/", &[], bad);
        check(h1, "/", &["api.test", "api.test"], bad);
        check(h1, "/", &["user@api.test"], bad);
        check(h1, "/", &["api.test:99999999"], bad);
        check(h1, "/", &["api.test/.."], bad);
        check(h1, "/", &["gw.test,api.test"], bad);
        check(h1, "https://gw.test/x", &[], bad);
    }

    #[test]
    fn targets_hold_no_control_character() {
        for good in [
            "/",
            "/a?b=%00%0a",
            "/%20%7e%e2%82%ac",
            "/files/read?path=/etc/x&y=\"<>",
        ] {
            assert!(target_is_sound(good), "{good}");
        }
        for bad in [
            "",
            "*",
            "a",
            "/\r",
            "/ ",
            "/%0d%0aX:y",
            "/%00",
            "/%7F",
            "/%",
            "/%2",
            "/%zz",
            "/%+1",
            "/a\\b",
            "/a#b",
            "/\u{e9}",
        ] {
            assert!(!target_is_sound(bad), "{bad:?}");
        }
        assert!(!target_is_sound(&format!(
            "/{}",
            "a".repeat(PATH_MAX_BYTES)
        )));
    }

    #[test]
    fn a_name_can_not_serve_two_planes() {
        let name = ["x.test".to_owned()];
        assert!(Hosts::new(&name, &name).is_err());
        assert!(Hosts::new(&["a b".to_owned()], &[]).is_err());
        assert!(Hosts::new(&["a:1:2".to_owned()], &[]).is_err());
    }

    proptest! {
        #[test]
        fn sound_targets_stay_on_their_line(s in ".{0,200}") {
            if target_is_sound(&s) {
                prop_assert!(s.bytes().all(|b| b.is_ascii_graphic()));
            }
        }

        #[test]
        fn hosts_are_plain(s in ".{0,80}") {
            if let Some(host) = authority_host(&s) {
                prop_assert!(host.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'@'));
                prop_assert_eq!(authority_host(&host), Some(host.clone()));
            }
        }
    }
}
