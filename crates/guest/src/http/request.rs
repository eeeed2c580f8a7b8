//! Requests: the target prefix, methods, query parameters and bounded bodies.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::{Method, Request};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::reply::Failure;
use crate::limits::{BODY_IDLE_TIMEOUT, BODY_MAX_BYTES};

/// The request's id, if the edge gave it one that can be repeated.
pub(super) fn id(request: &Request<Incoming>) -> Option<String> {
    let id = request
        .headers()
        .get("casemate-request-id")?
        .to_str()
        .ok()?;
    let ok = id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    ok.then(|| id.to_owned())
}

/// The path without `/runtimes/<target>`; there is one target, `default`, also called `local`.
pub(super) fn strip_target(path: &str) -> Result<&str, Failure> {
    let Some(rest) = path.strip_prefix("/runtimes/") else {
        return Ok(path);
    };
    let (target, rest) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match target {
        "default" | "local" => Ok(rest),
        _ => Err(Failure::not_found(
            "no such runtime target; the only one is `default`",
        )),
    }
}

/// The method, if it is one of `allowed`.
pub(super) fn allow<'a>(method: &'a Method, allowed: &[Method]) -> Result<&'a Method, Failure> {
    if allowed.contains(method) {
        Ok(method)
    } else {
        Err(Failure::new(
            405,
            "method_not_allowed",
            "this call has other methods",
        ))
    }
}

/// Query parameters; the last of equal names counts.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let text = request.uri().query().unwrap_or_default();
        let pairs = form_urlencoded::parse(text.as_bytes());
        Self(
            pairs
                .map(|(k, v)| (k.into_owned(), v.into_owned()))
                .collect(),
        )
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().rev().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, Failure> {
        match self.text(name) {
            None | Some("") => Ok(default),
            Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(_) => Err(Failure::invalid(format!("{name} must be true or false"))),
        }
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, Failure> {
        match self.text(name) {
            None | Some("") => Ok(None),
            Some(text) => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(Failure::invalid(format!("{name} must be a whole number"))),
            },
        }
    }

    /// The comma-separated words of a parameter.
    pub(super) fn words(&self, name: &str) -> impl Iterator<Item = &str> {
        let text = self.text(name).unwrap_or_default();
        text.split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty())
    }
}

/// The whole body, at most `max_bytes`.
pub(super) async fn body(mut body: Incoming, max_bytes: usize) -> Result<Bytes, Failure> {
    let too_large = || Failure::too_large(format!("the body may have {max_bytes} bytes"));
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(too_large());
    }
    let mut whole = BytesMut::new();
    loop {
        let frame = tokio::time::timeout(BODY_IDLE_TIMEOUT, body.frame()).await;
        let frame = frame.map_err(|_| Failure::new(408, "timeout", "the body does not come"))?;
        match frame {
            None => return Ok(whole.freeze()),
            Some(Err(_)) => return Err(Failure::bad_request("the body is cut short or malformed")),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else {
                    continue;
                };
                if whole.len() + data.len() > max_bytes {
                    return Err(too_large());
                }
                if whole.is_empty() {
                    whole.reserve(body.size_hint().lower() as usize + data.len());
                }
                whole.extend_from_slice(&data);
            }
        }
    }
}

/// A small JSON body as a `T`; an empty one counts as `{}`.
pub(super) async fn body_json<T: DeserializeOwned>(
    request: Request<Incoming>,
) -> Result<T, Failure> {
    let bytes = body(request.into_body(), BODY_MAX_BYTES).await?;
    parse_json(&bytes)
}

/// Parses a body.
pub(super) fn parse_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Failure> {
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|error| {
        let what: Cow<'_, str> = match error.classify() {
            serde_json::error::Category::Data => format!("the body: {error}").into(),
            _ => "the body must be JSON".into(),
        };
        Failure::bad_request(what)
    })
}
