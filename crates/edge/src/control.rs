//! The control plane: a credential becomes an assertion for this very request, and the request
//! goes on without it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::limits::CONTROL_BODY_MAX_BYTES;
use api::mint::{self, Credential};
use api::rpc::Client;
use api::{Error, ErrorCode};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use service::binding::request_hash;
use tokio::net::UnixStream;

use crate::answer::Refusal;
use crate::body::{Payload, Relay, full};
use crate::crowd::{Crowd, Place};
use crate::headers;
use crate::limits::{
    CLIENT_ID_MAX_BYTES, CLIENT_SECRET_MAX_BYTES, CONTROL_ANSWER_MAX, CONTROL_BODIES_MAX_KIB,
    CONTROL_BODIES_PER_SOURCE_MAX_KIB, CONTROL_BODY_READ_MAX, CONTROL_IDLE_MAX,
};
use crate::server::Seen;
use crate::upstream::{Link, Pool, broken};

/// The way to control.
pub struct Control {
    mint: Client,
    socket: PathBuf,
    pool: Pool<()>,
    room: Arc<Crowd>,
}

impl Control {
    /// Over control's HTTP socket, with mint's client.
    #[must_use]
    pub fn new(mint: Client, socket: PathBuf) -> Self {
        let room = Crowd::new(CONTROL_BODIES_MAX_KIB, CONTROL_BODIES_PER_SOURCE_MAX_KIB);
        Self {
            mint,
            socket,
            pool: Pool::new(CONTROL_IDLE_MAX),
            room,
        }
    }

    /// Serves one request.
    ///
    /// # Errors
    /// What the client did wrong, or what does not answer.
    pub async fn serve(
        &self,
        seen: &Arc<Seen>,
        request: Request<Incoming>,
    ) -> Result<Response<Payload>, Refusal> {
        let (parts, body) = request.into_parts();
        let target = parts
            .uri
            .path_and_query()
            .map_or("/", |p| p.as_str())
            .to_owned();
        let open =
            parts.method == Method::GET && matches!(parts.uri.path(), "/openapi.json" | "/health");
        // Before the body: who shows nothing gets nothing.
        let credential = if open {
            None
        } else {
            Some(credential(&parts.headers)?)
        };
        // Held until the answer begins: the body is on its way until then.
        let _place = self.place(seen, &body)?;
        let body = collect(seen, body).await?;
        let mut onward = Request::new(full(body.clone()));
        *onward.method_mut() = parts.method.clone();
        *onward.uri_mut() = target.parse().map_err(Error::internal)?;
        *onward.headers_mut() = headers::to_control(&parts.headers);
        let ours = onward.headers_mut();
        ours.insert(header::HOST, HeaderValue::from_static("control"));
        set(ours, "casemate-request-id", &seen.request_id)?;
        set(ours, "casemate-source-ip", &seen.source.to_string())?;
        if let Some(credential) = credential {
            let hash = request_hash(parts.method.as_str(), &target, &body);
            let op = mint::Op::Assert {
                credential,
                binding: hex(&hash),
            };
            let asserted: mint::Signed = self.mint.call(&seen.request_id, &op).await?;
            set(ours, "casemate-assertion", &asserted.signed)?;
        }
        let head = parts.method == Method::HEAD;
        let (mut answer, lease) = self.send(onward).await?;
        *answer.headers_mut() = headers::to_client(answer.headers(), false, head);
        Ok(answer.map(|body| Relay::payload(body, None, seen.bytes(), lease)))
    }

    /// Closes idle connections that are old.
    pub fn sweep(&self) {
        self.pool.sweep(|()| true);
    }

    /// Room for a body.
    fn place(&self, seen: &Seen, body: &Incoming) -> Result<Option<Place>, Refusal> {
        if body.is_end_stream() {
            return Ok(None);
        }
        let max = CONTROL_BODY_MAX_BYTES as u64;
        let size = body.size_hint().upper().unwrap_or(max).min(max);
        let units = u32::try_from(size.div_ceil(1024).max(1)).unwrap_or(u32::MAX);
        let place = self.room.enter(seen.source, units).ok_or_else(|| {
            Refusal::new(
                ErrorCode::RateLimited,
                "too many request bodies at once; try again",
            )
        })?;
        Ok(Some(place))
    }

    async fn send(
        &self,
        mut request: Request<Payload>,
    ) -> Result<(Response<Incoming>, crate::upstream::Lease<()>), Error> {
        loop {
            let (link, pooled) = match self.pool.take(&()) {
                Some(link) => (link, true),
                None => (self.dial().await?, false),
            };
            let sent = self.pool.send((), link, request);
            match tokio::time::timeout(CONTROL_ANSWER_MAX, sent).await {
                Ok(Ok(answered)) => return Ok(answered),
                Ok(Err((_, Some(unsent)))) if pooled => request = unsent,
                Ok(Err((e, _))) => return Err(broken("the control plane", &e)),
                Err(_) => return Err(gone("no answer in time")),
            }
        }
    }

    async fn dial(&self) -> Result<Link, Error> {
        let connect = UnixStream::connect(&self.socket);
        let stream = tokio::time::timeout(Duration::from_secs(5), connect)
            .await
            .map_err(gone)?
            .map_err(gone)?;
        Link::new(stream).await.map_err(gone)
    }
}

/// The one credential of a request.
fn credential(headers: &HeaderMap) -> Result<Credential, Refusal> {
    let missing = || {
        Refusal::new(
            ErrorCode::Unauthorized,
            "a credential is needed: X-Client-ID with X-Client-Secret, or Authorization: Bearer",
        )
    };
    let id = only(headers, "x-client-id", CLIENT_ID_MAX_BYTES)?;
    let secret = only(headers, "x-client-secret", CLIENT_SECRET_MAX_BYTES)?;
    match (id, secret) {
        (Some(client_id), Some(client_secret)) => Ok(Credential::ApiKey {
            client_id,
            client_secret,
        }),
        (None, None) => Ok(Credential::Bearer {
            token: bearer(headers)?.ok_or_else(missing)?,
        }),
        _ => Err(missing()),
    }
}

/// The token of `Authorization: Bearer`.
///
/// # Errors
/// If the header stands twice or is too long.
pub fn bearer(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let bound = seal::limits::JWT_MAX_BYTES + "Bearer ".len();
    let Some(value) = only(headers, "authorization", bound)? else {
        return Ok(None);
    };
    let token = value
        .split_once(' ')
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .filter(|token| !token.is_empty());
    Ok(token.map(str::to_owned))
}

fn only(headers: &HeaderMap, name: &'static str, max: usize) -> Result<Option<String>, Refusal> {
    let wrong = |why: &str| Refusal::new(ErrorCode::Unauthorized, format!("{name} {why}"));
    let mut all = headers.get_all(name).iter();
    let Some(value) = all.next() else {
        return Ok(None);
    };
    if all.next().is_some() {
        return Err(wrong("stands twice"));
    }
    let text = value.to_str().map_err(|_| wrong("is not visible ASCII"))?;
    if text.is_empty() || text.len() > max {
        return Err(wrong(&format!("must be 1 to {max} characters")));
    }
    Ok(Some(text.to_owned()))
}

/// The whole body: it is bound to the assertion, so it must be there first.
async fn collect(seen: &Seen, body: Incoming) -> Result<Bytes, Refusal> {
    let too_large = || {
        Refusal::new(
            ErrorCode::TooLarge,
            format!(
                "the body must be at most {} KiB",
                CONTROL_BODY_MAX_BYTES >> 10
            ),
        )
    };
    if body.size_hint().lower() > CONTROL_BODY_MAX_BYTES as u64 {
        return Err(too_large());
    }
    let read = Limited::new(body, CONTROL_BODY_MAX_BYTES).collect();
    match tokio::time::timeout(CONTROL_BODY_READ_MAX, read).await {
        Ok(Ok(body)) => {
            let bytes = body.to_bytes();
            seen.add_bytes(bytes.len());
            Ok(bytes)
        }
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Refusal::new(ErrorCode::BadRequest, "the body broke off")),
        Err(_) => Err(Refusal::new(
            ErrorCode::BadRequest,
            "the body took longer than 30 s",
        )),
    }
}

fn set(headers: &mut HeaderMap, name: &'static str, value: &str) -> Result<(), Error> {
    let value = HeaderValue::from_str(value).map_err(Error::internal)?;
    headers.insert(HeaderName::from_static(name), value);
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn gone(why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::Unavailable,
        "the control plane does not answer; try again, and see `casemate status`",
    )
    .detail(format!("control: {why}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn check(lines: &[(&'static str, &str)]) -> Result<Credential, u16> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, value.parse().unwrap());
        }
        credential(&headers).map_err(|r| r.status.as_u16())
    }

    #[test]
    fn one_credential_or_none() {
        let key = ("x-client-id", "key_1");
        let secret = ("x-client-secret", "s");
        assert!(matches!(
            check(&[key, secret]),
            Ok(Credential::ApiKey { .. })
        ));
        let token = ("authorization", "bearer  t ");
        assert!(matches!(check(&[token]), Ok(Credential::Bearer { token }) if token == "t"));
        assert!(matches!(
            check(&[key, secret, token]),
            Ok(Credential::ApiKey { .. })
        ));
        let long = "a".repeat(5_000);
        for bad in [
            &[][..],
            &[key],
            &[secret],
            &[key, token],
            &[key, key, secret],
            &[key, ("x-client-secret", "")],
            &[token, token],
            &[("authorization", "Basic x")],
            &[("authorization", "Bearer")],
            &[("authorization", &long)],
        ] {
            assert_eq!(check(bad).map(|_| ()), Err(401), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn hostile_credentials_never_panic(bytes: Vec<u8>, twice: bool) {
            let Ok(value) = HeaderValue::from_bytes(&bytes) else { return Ok(()) };
            for name in ["authorization", "x-client-id", "x-client-secret"] {
                let mut headers = HeaderMap::new();
                headers.append(name, value.clone());
                if twice {
                    headers.append(name, value.clone());
                }
                if let Ok(Credential::Bearer { token }) = credential(&headers) {
                    proptest::prop_assert!(!token.is_empty() && !twice);
                }
            }
        }
    }
}
