//! The gateway: a token names a workspace, and leads to its guest if both layers allow it.
//!
//! Nothing of the route comes from the token but the workspace's name, and that only after its
//! signature held (contract C2).

use std::sync::Arc;

use api::mint::GatewayClaims;
use api::{Error, ErrorCode};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Response};
use hyper::body::Incoming;
use model::WorkspaceId;
use seal::jwt::{self, JwtError};
use seal::sign::VerifyingKey;
use service::clock::Clock;

use crate::answer::Refusal;
use crate::body::{AtEnd, Payload, Relay};
use crate::control::bearer;
use crate::feeds::Feeds;
use crate::guest::{Guests, Key};
use crate::headers;
use crate::limits::{PUSH_MAX, WAKE_ASK_EVERY};
use crate::server::Seen;
use crate::state::{Live, Route, Table};
use crate::upstream::Lease;
use crate::wake::{Wakes, slow};

/// The way to workspaces.
pub struct Gateway {
    /// The key of gateway tokens.
    pub key: VerifyingKey,
    /// Who may pass.
    pub table: Arc<Table>,
    /// What is new about that.
    pub feeds: Arc<Feeds>,
    /// Whom requests wait for.
    pub wakes: Wakes,
    /// Where to.
    pub guests: Arc<Guests>,
    /// When.
    pub clock: Clock,
}

/// What an answer on its way holds: its connection first, then its place in the table.
struct Held {
    lease: Lease<Key>,
    _live: Arc<Live>,
}

impl AtEnd for Held {
    fn at_end(&mut self) {
        self.lease.at_end();
    }
}

/// A request body's share in its request's place.
struct Upload(#[allow(dead_code)] Arc<Live>);

impl AtEnd for Upload {
    fn at_end(&mut self) {}
}

impl Gateway {
    /// Serves one request.
    ///
    /// # Errors
    /// What refuses it, or what is wrong with the guest.
    pub async fn serve(
        &self,
        seen: &Arc<Seen>,
        request: Request<Incoming>,
    ) -> Result<Response<Payload>, Refusal> {
        let (parts, body) = request.into_parts();
        let (workspace, claims) = self.claims(&parts)?;
        let (route, live) = self.admitted(&workspace, &claims).await?;
        if is_platforms(parts.uri.path()) {
            return Err(Refusal::new(ErrorCode::NotFound, "no such call"));
        }
        if is_reserved(parts.uri.path()) {
            return Err(Refusal::new(
                ErrorCode::NotSupported,
                "this version of the gateway does not have this call",
            ));
        }
        // A guest that does not listen is asked all the same, and judges for itself.
        let _ = tokio::time::timeout(PUSH_MAX, self.guest_told(&workspace)).await;
        let live = Arc::new(live);
        let cut = live.cut();
        let upload = Relay::payload(
            body,
            Some(cut.clone()),
            seen.bytes(),
            Upload(Arc::clone(&live)),
        );
        let onward = onward(&parts, upload, &seen.request_id)?;
        let answered = tokio::select! {
            biased;
            () = cut.cancelled() => Err(self.why_cut(&workspace, &claims)),
            answered = self.guests.send(&route, onward, |link| live.on(link.closer())) => answered,
        };
        let (mut answer, lease) = answered.map_err(|e| {
            // A cut closes the connection, and either may be noticed first.
            if cut.is_cancelled() {
                self.why_cut(&workspace, &claims)
            } else {
                e
            }
        })?;
        live.answered();
        let head = parts.method == Method::HEAD;
        *answer.headers_mut() = headers::to_client(answer.headers(), true, head);
        let held = Held { lease, _live: live };
        Ok(answer.map(|body| Relay::payload(body, Some(cut), seen.bytes(), held)))
    }

    /// Admits a request; one that only the workspace's rest keeps out waits until it is awake.
    async fn admitted(
        &self,
        workspace: &WorkspaceId,
        claims: &GatewayClaims,
    ) -> Result<(Route, Live), Refusal> {
        match self.table.admit(workspace, claims) {
            // It may have changed a moment ago: who waited for a start or an opening finds it so.
            Err(e) if may_have_changed(e.code) => self.feeds.refresh().await,
            judged => return Ok(judged?),
        }
        match self.table.admit(workspace, claims) {
            // The table judges rest last: token and gateway would let it pass.
            Err(e) if e.code == ErrorCode::VmNotRunning && self.waits_for(workspace) => {}
            judged => return Ok(judged?),
        }
        let turn = self.wakes.enter(workspace)?;
        let woken = async {
            loop {
                let mut moved = std::pin::pin!(self.table.moved.notified());
                moved.as_mut().enable();
                match self.table.admit(workspace, claims) {
                    Err(e)
                        if e.code == ErrorCode::VmNotRunning
                            && self.table.may_come_up(workspace) => {}
                    judged => return judged.map_err(Refusal::from),
                }
                turn.ask().await;
                let _ = tokio::time::timeout(WAKE_ASK_EVERY, moved).await;
            }
        };
        let woken = tokio::time::timeout(self.wakes.wake_max, woken).await;
        woken.unwrap_or_else(|_| Err(slow()))
    }

    /// Whether a request waits for this workspace: it may wake it, or others wait already.
    fn waits_for(&self, workspace: &WorkspaceId) -> bool {
        self.table.may_wake(workspace)
            || self.wakes.is_awaited(workspace) && self.table.may_come_up(workspace)
    }

    /// Returns when the workspace's guest was told its token state.
    async fn guest_told(&self, workspace: &WorkspaceId) {
        loop {
            let mut settled = std::pin::pin!(self.table.settled.notified());
            settled.as_mut().enable();
            match self.table.untold(workspace) {
                None => return,
                // One handshake is enough.
                Some((_, true)) => settled.await,
                Some((push, false)) => {
                    let (push, taken) = self.guests.tell(&self.table, push).await;
                    return self.table.told(&push, taken);
                }
            }
        }
    }

    /// The workspace and claims of a request's token, if the token is good.
    fn claims(&self, parts: &Parts) -> Result<(WorkspaceId, GatewayClaims), Refusal> {
        let wrong = || {
            Refusal::new(
                ErrorCode::Unauthorized,
                "a gateway token of this workspace is needed: Authorization: Bearer",
            )
        };
        let token = match bearer(&parts.headers)? {
            Some(token) => token,
            None if is_reserved(parts.uri.path()) => query_token(parts).ok_or_else(wrong)?,
            None => return Err(wrong()),
        };
        let aud = jwt::peek_aud(&token).ok_or_else(wrong)?;
        let workspace: WorkspaceId = aud.parse().map_err(|_| wrong())?;
        let now_s = self.clock.now_s();
        let claims: GatewayClaims = jwt::verify(&token, &[self.key], workspace.as_str(), now_s)
            .map_err(|e| match e {
                JwtError::Expired => Refusal::new(
                    ErrorCode::TokenExpired,
                    "the token has expired; get a new one",
                ),
                JwtError::Invalid(_) => wrong(),
            })?;
        if claims.iss != "casemate" {
            return Err(wrong());
        }
        Ok((workspace, claims))
    }

    /// What refuses now a request that was admitted before.
    fn why_cut(&self, workspace: &WorkspaceId, claims: &GatewayClaims) -> Error {
        match self.table.admit(workspace, claims) {
            Err(e) => e,
            Ok(_) => Error::new(
                ErrorCode::Unavailable,
                "the workspace was restarted; try again",
            ),
        }
    }
}

fn may_have_changed(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::NotFound
            | ErrorCode::NetworkBlocked
            | ErrorCode::VmNotRunning
            | ErrorCode::Forbidden
    )
}

/// Paths whose clients can't set headers.
fn is_reserved(path: &str) -> bool {
    let path = match path.strip_prefix("/runtimes/") {
        Some(rest) => &rest[rest.find('/').unwrap_or(rest.len())..],
        None => path,
    };
    path == "/ws" || path == "/proxy" || path.starts_with("/proxy/")
}

/// Paths by which the edge itself speaks to a guest: a client's words must not pass for the
/// edge's.
fn is_platforms(path: &str) -> bool {
    path.trim_start_matches('/')
        .to_ascii_lowercase()
        .starts_with("casemate")
}

/// `?token=`; a JWT needs no percent sign.
fn query_token(parts: &Parts) -> Option<String> {
    let mut all = parts
        .uri
        .query()?
        .split('&')
        .filter_map(|p| p.strip_prefix("token="));
    let token = all
        .next()
        .filter(|t| !t.is_empty() && t.len() <= seal::limits::JWT_MAX_BYTES)?;
    all.next().is_none().then(|| token.to_owned())
}

fn onward(parts: &Parts, body: Payload, request_id: &str) -> Result<Request<Payload>, Error> {
    let target = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    let mut onward = Request::new(body);
    *onward.method_mut() = parts.method.clone();
    *onward.uri_mut() = target.parse().map_err(Error::internal)?;
    *onward.headers_mut() = headers::to_guest(&parts.headers);
    let id = HeaderValue::from_str(request_id).map_err(Error::internal)?;
    onward
        .headers_mut()
        .insert(HeaderName::from_static("casemate-request-id"), id);
    Ok(onward)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn query_tokens_are_for_sockets_and_the_proxy_only() {
        for yes in ["/ws", "/proxy", "/proxy/3000/x", "/runtimes/default/ws"] {
            assert!(is_reserved(yes), "{yes}");
        }
        for no in [
            "/",
            "/wsx",
            "/exec",
            "/proxyx",
            "/x/ws",
            "/runtimes/ws",
            "/runtimes/",
        ] {
            assert!(!is_reserved(no), "{no}");
        }
        assert!(is_platforms("/casemate/v1/token-state") && is_platforms("//Casemate"));
        assert!(!is_platforms("/files/casemate"));
        let token = |query: &str| {
            let uri = format!("/ws?{query}");
            query_token(&Request::get(uri).body(()).unwrap().into_parts().0)
        };
        assert_eq!(token("a=b&token=x.y.z"), Some("x.y.z".into()));
        assert_eq!(token("token="), None);
        assert_eq!(token("token=a&token=b"), None);
        assert_eq!(token("xtoken=a"), None);
    }
}
