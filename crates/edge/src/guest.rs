//! The way to a guest: TCP from the fabric, TLS 1.3 that ends inside the VM, both sides pinned
//! (EDGE-5): the guest to the identity that mint signed, the edge to its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::agent::{TOKEN_STATE_PATH, tls_name};
use api::{Error, ErrorCode};
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use model::{StartId, WorkspaceId};
use seal::tls::rustls_pki_types::ServerName;
use seal::tls::tokio_rustls::TlsConnector;
use seal::tls::{HTTP1, Identity, Leaf, client_config};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::body::{AtEnd, Payload, full};
use crate::limits::{
    CLIENT_CERT_TTL, GUEST_ANSWER_MAX, GUEST_DIAL_MAX, GUEST_IDLE_MAX, TOLD_MAX_BYTES,
};
use crate::metrics::Metrics;
use crate::state::{Push, Route, Table};
use crate::upstream::{Lease, Link, Pool, broken};

/// The name in the edge's client certificate.
const EDGE_NAME: &str = "edge.casemate.internal";

/// One start of a workspace: connections of another are never used for it.
pub type Key = (WorkspaceId, StartId);

/// Connections to guests.
pub struct Guests {
    identity: Identity,
    leaf: Mutex<Option<(Leaf, Instant)>>,
    pool: Pool<Key>,
    metrics: Arc<Metrics>,
}

impl Guests {
    /// None yet.
    #[must_use]
    pub fn new(identity: Identity, metrics: Arc<Metrics>) -> Self {
        Self {
            identity,
            leaf: Mutex::new(None),
            pool: Pool::new(GUEST_IDLE_MAX),
            metrics,
        }
    }

    /// Sends a request to a guest. `opened` is told of each connection before it is used.
    ///
    /// # Errors
    /// [`ErrorCode::BadGateway`] if the guest is not there, proves another identity, or gives no
    /// proper answer.
    pub async fn send(
        &self,
        route: &Route,
        mut request: Request<Payload>,
        opened: impl Fn(&Link),
    ) -> Result<(Response<Incoming>, Lease<Key>), Error> {
        let key = (route.workspace.clone(), route.start.clone());
        let host = HeaderValue::from_str(&tls_name(&route.workspace)).map_err(Error::internal)?;
        request.headers_mut().insert(header::HOST, host);
        loop {
            let (link, pooled) = match self.pool.take(&key) {
                Some(link) => (link, true),
                None => (self.dial(route).await?, false),
            };
            opened(&link);
            let sent = self.pool.send(key.clone(), link, request);
            match tokio::time::timeout(GUEST_ANSWER_MAX, sent).await {
                Ok(Ok((response, lease))) => {
                    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                        return Err(Error::new(
                            ErrorCode::BadGateway,
                            "the workspace changed the protocol unasked",
                        ));
                    }
                    return Ok((response, lease));
                }
                // The guest closed an idle connection before it saw the request.
                Ok(Err((_, Some(unsent)))) if pooled => request = unsent,
                Ok(Err((e, _))) => return Err(broken("the workspace", &e)),
                Err(_) => {
                    return Err(Error::new(
                        ErrorCode::Timeout,
                        "the workspace's answer did not begin in time",
                    ));
                }
            }
        }
    }

    /// Hands a guest its token state: the newest that the table has once there is a connection,
    /// for a handshake takes longer than its owner to ask for a token. Returns what was told, and
    /// whether the guest took it.
    pub async fn tell(&self, table: &Table, push: Push) -> (Push, bool) {
        let dialled = self.warm(&push.route).await;
        let newest = table
            .untold(&push.route.workspace)
            .map(|(newest, _)| newest);
        let push = newest.filter(|n| n.route == push.route).unwrap_or(push);
        let taken = dialled.is_ok() && self.tell_one(&push).await.is_ok();
        (push, taken)
    }

    /// Sees to it that a connection to a guest is there.
    async fn warm(&self, route: &Route) -> Result<(), Error> {
        let key = (route.workspace.clone(), route.start.clone());
        let link = match self.pool.take(&key) {
            Some(link) => link,
            None => self.dial(route).await?,
        };
        self.pool.put(key, link);
        Ok(())
    }

    async fn tell_one(&self, push: &Push) -> Result<(), Error> {
        let body = serde_json::json!({ "signed": push.signed }).to_string();
        let mut request = Request::post(Uri::from_static(TOKEN_STATE_PATH))
            .body(full(body))
            .map_err(Error::internal)?;
        let json = HeaderValue::from_static("application/json");
        request.headers_mut().insert(header::CONTENT_TYPE, json);
        let (response, mut lease) = self.send(&push.route, request, |_| {}).await?;
        let status = response.status();
        // Read to its end, the connection can carry the workspace's first request.
        let rest = Limited::new(response.into_body(), TOLD_MAX_BYTES);
        if rest.collect().await.is_ok() {
            lease.at_end();
        }
        // 409: it holds a newer one, from host.
        if status.is_success() || status == StatusCode::CONFLICT {
            return Ok(());
        }
        Err(Error::new(ErrorCode::BadGateway, "the guest refused its token state").detail(status))
    }

    /// Closes idle connections that are old or may no longer be used.
    pub fn sweep(&self, table: &Table) {
        self.pool
            .sweep(|(workspace, start)| table.is_current(workspace, start));
    }

    async fn dial(&self, route: &Route) -> Result<Link, Error> {
        let dialled = tokio::time::timeout(GUEST_DIAL_MAX, self.dial_unbounded(route)).await;
        let link = dialled.unwrap_or_else(|_| Err(unreachable("no answer in time")));
        match &link {
            Ok(_) => self.metrics.guest_dials.inc(),
            Err(_) => self.metrics.guest_dials_failed.inc(),
        };
        link
    }

    async fn dial_unbounded(&self, route: &Route) -> Result<Link, Error> {
        let config =
            client_config(&route.identity, Some(self.leaf()?), HTTP1).map_err(Error::internal)?;
        let name = ServerName::try_from(tls_name(&route.workspace)).map_err(Error::internal)?;
        let tcp = TcpStream::connect(route.agent).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let tls = TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .map_err(unreachable)?;
        Link::new(tls).await.map_err(unreachable)
    }

    /// The edge's client certificate, made anew at half its life.
    fn leaf(&self) -> Result<Leaf, Error> {
        let mut held = self.leaf.lock().unwrap_or_else(PoisonError::into_inner);
        let young = |made: &Instant| made.elapsed() < CLIENT_CERT_TTL / 2;
        if let Some((leaf, _)) = held.as_ref().filter(|(_, made)| young(made)) {
            return Ok((leaf.0.clone(), leaf.1.clone_key()));
        }
        let leaf = self
            .identity
            .leaf(EDGE_NAME, CLIENT_CERT_TTL + Duration::from_secs(300))
            .map_err(Error::internal)?;
        let copy = (leaf.0.clone(), leaf.1.clone_key());
        *held = Some((leaf, Instant::now()));
        Ok(copy)
    }
}

/// The reason is counted, not kept: rustls names the workspace in it.
fn unreachable<E>(_: E) -> Error {
    Error::new(
        ErrorCode::BadGateway,
        "the workspace does not answer; try again",
    )
}
