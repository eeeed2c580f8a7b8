//! Mint: what it answers, in which order it checks, logs and acts.
//!
//! | operation | who | proof it takes |
//! |---|---|---|
//! | assert | edge | the client's credential itself |
//! | register, tokens, runtime, policy | control | mint's own assertion, by the owner |
//! | forget | control | an assertion or a standing policy, by the owner |
//! | token state; changes | control, host, edge, root; edge | nothing: it tells no secret |
//! | accounts and keys | root | the peer's uid |
//!
//! Mutating acts are in the log before they happen. Closing ones (forget, revoke, disable) go
//! ahead without it: their entry stands in the outbox, in the same transaction.
//!
//! Must never: take anybody's word for who is asking, tell an unknown key from a wrong secret, or
//! tell another account's workspace from one that does not exist.

mod operator;

use crate::book::Book;
use crate::error::MintError;
use crate::keys::Keys;
use crate::limits::*;
use crate::metrics::Metrics;
use crate::refusals::Refusals;
use crate::store::{Store, Workspace};
use api::audit::{Class, Entry, Phase};
use api::limits::{ASSERTION_MAX_MS, GATEWAY_TOKEN_MAX_S};
use api::mint::{
    Assertion, Changes, Credential, Gateway, GatewayClaims, Op, Policy, PolicyAct, Raw, TokenState,
};
use api::{Error, ErrorCode, context};
use model::{AccountId, KeyId, WorkspaceId};
use seal::hash::ct_eq;
use seal::sign::{Signed, VerifyingKey};
use serde_json::{Map, Value, json};
use service::audit::Log;
use service::clock::Clock;
use service::rpc::{Peer, ok};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// What mint is made of.
pub struct Setup {
    /// `mint/`: state and keys.
    pub dir: PathBuf,
    /// The KMS's key, for identity statements.
    pub kms: VerifyingKey,
    /// The log.
    pub log: Log,
    /// The clock.
    pub clock: Clock,
}

/// Mint. Cheap to clone.
#[derive(Clone)]
pub struct Mint(Arc<Inner>);

struct Inner {
    keys: Keys,
    kms: VerifyingKey,
    log: Log,
    clock: Clock,
    store: Store,
    book: RwLock<Book>,
    /// Held while a change is written: changes are numbered in the order they become visible.
    writer: tokio::sync::Mutex<()>,
    /// The number of the last change; closed when mint stops.
    seq: watch::Sender<u64>,
    refusals: Refusals,
    refused: mpsc::Sender<Entry>,
    metrics: Metrics,
}

/// One request: who and which.
struct Call {
    peer: Peer,
    request_id: String,
}

/// A change to a workspace, and whether it closes something.
struct Change {
    event: &'static str,
    /// Goes ahead when the log is down.
    closing: bool,
}

impl Mint {
    /// Opens the state.
    ///
    /// # Errors
    /// [`MintError::NoState`] before `init`; the store's and the file system's.
    pub async fn open(setup: Setup) -> Result<Self, MintError> {
        let store = Store::open(&setup.dir.join("state.db"), false).await?;
        let book = Book::of(store.load().await?);
        let (refused, queue) = mpsc::channel(REFUSALS_QUEUED_MAX);
        tokio::spawn(refusals_log(setup.log.clone(), queue));
        Ok(Self(Arc::new(Inner {
            keys: Keys::open(&setup.dir)?,
            kms: setup.kms,
            log: setup.log,
            clock: setup.clock,
            store,
            seq: watch::channel(book.seq()).0,
            book: RwLock::new(book),
            writer: tokio::sync::Mutex::default(),
            refusals: Refusals::default(),
            refused,
            metrics: Metrics::default(),
        })))
    }

    /// Its metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Lets followers that wait go, so that a drain need not wait for them.
    pub fn stop(&self) {
        self.0.seq.send_replace(u64::MAX);
    }

    /// Ends the store's connections.
    pub async fn close(&self) {
        self.0.store.close().await;
    }

    /// Appends what waited for the log. A crash between the two steps writes an entry twice,
    /// never not at all.
    ///
    /// # Errors
    /// The log's and the store's; the next round tries again.
    pub async fn outbox_drain(&self) -> api::Result<()> {
        let m = &self.0;
        while let Some((id, text)) = m.store.outbox_first().await? {
            match serde_json::from_str::<Entry>(&text) {
                Ok(entry) => drop(m.log.append(Class::Host, entry).await?),
                Err(_) => tracing::error!(id, "outbox entry is damaged and dropped"),
            }
            m.store.outbox_remove(id).await?;
        }
        Ok(())
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The refusal or failure, as the caller may know it.
    pub async fn handle(&self, peer: Peer, request_id: String, op: Op) -> api::Result<Value> {
        let m = &self.0;
        let call = Call { peer, request_id };
        let allowed: &[&str] = match &op {
            Op::Assert { .. } | Op::Changes { .. } => &["edge"],
            Op::WorkspaceRegister { .. }
            | Op::WorkspaceForget { .. }
            | Op::GatewayToken { .. }
            | Op::RuntimeEnable { .. }
            | Op::RawToken { .. }
            | Op::PolicySign { .. } => &["control"],
            Op::TokenState { .. } => &["control", "host", "edge", "root"],
            Op::AccountCreate { .. } | Op::KeyCreate { .. } | Op::KeyRevoke { .. } => &["root"],
        };
        if !allowed.contains(&call.peer.process.as_str()) {
            m.refuse(&call, "peer", None);
            return Err(Error::new(
                ErrorCode::Forbidden,
                "this process may not ask for this",
            ));
        }
        match op {
            Op::Assert {
                credential,
                binding,
            } => ok(&m.assert(&call, &credential, binding)?),
            Op::WorkspaceRegister {
                assertion,
                identity,
            } => ok(&m.register(&call, &assertion, &identity).await?),
            Op::WorkspaceForget {
                authority,
                workspace,
            } => ok(&m.forget(&call, &authority, &workspace).await?),
            Op::GatewayToken {
                assertion,
                workspace,
                rotate,
            } => ok(&m
                .gateway_token(&call, &assertion, &workspace, rotate)
                .await?),
            Op::RuntimeEnable {
                assertion,
                workspace,
                enabled,
            } => ok(&m
                .runtime_enable(&call, &assertion, &workspace, enabled)
                .await?),
            Op::RawToken {
                assertion,
                workspace,
                rotate,
            } => ok(&m.raw_token(&call, &assertion, &workspace, rotate).await?),
            Op::TokenState { workspace } => {
                let book = m.book();
                let w = book.workspace(&workspace).ok_or_else(not_found)?;
                ok(&signed(m.token_state(w)))
            }
            Op::Changes { since, wait_ms } => ok(&m.changes(since, wait_ms).await),
            Op::PolicySign {
                assertion,
                workspace,
                acts,
            } => ok(&m.policy_sign(&call, &assertion, &workspace, acts).await?),
            Op::AccountCreate { name } => ok(&m.account_create(&call, &name).await?),
            Op::KeyCreate { account, name } => ok(&m.key_create(&call, &account, &name).await?),
            Op::KeyRevoke { key } => ok(&m.key_revoke(&call, &key).await?),
        }
    }
}

impl Inner {
    /// Checks a client's credential and asserts who it is, for the request of this binding.
    ///
    /// An unknown id, a revoked key and a wrong secret take the same path and get the same answer.
    fn assert(
        &self,
        call: &Call,
        credential: &Credential,
        binding: String,
    ) -> api::Result<api::mint::Signed> {
        if !is_hex_64(&binding) {
            return Err(Error::new(
                ErrorCode::ValidationError,
                "binding must be 64 lowercase hexadecimal digits",
            ));
        }
        let (client_id, secret) = match credential {
            Credential::ApiKey {
                client_id,
                client_secret,
            } => (client_id, client_secret),
            Credential::Bearer { .. } => {
                self.refuse(call, "bearer", None);
                return Err(Error::new(
                    ErrorCode::Unauthorized,
                    "bearer tokens are not accepted here; send X-Client-ID and X-Client-Secret",
                ));
            }
        };
        let parsed = client_id.parse::<KeyId>().ok();
        let well_formed = parsed.is_some() && secret.len() <= SECRET_MAX_BYTES;
        let id = parsed.unwrap_or_else(|| KeyId::from_bytes([0; 8]));
        let bounded = secret
            .get(..SECRET_MAX_BYTES.min(secret.len()))
            .unwrap_or_default();
        let mac = self.keys.api_key_mac(&id, bounded);
        let book = self.book();
        let row = book.key(&id);
        let stored = row.map_or([0; 32], |key| key.mac);
        let same = ct_eq(&mac, &stored) && well_formed;
        let Some(key) = row.filter(|key| same && !key.revoked) else {
            self.refuse(call, "credential", row.map(|key| &key.id));
            return Err(Error::new(
                ErrorCode::Unauthorized,
                "unknown X-Client-ID or wrong X-Client-Secret",
            ));
        };
        let iat_ms = self.clock.now_ms();
        let assertion = Assertion {
            account: key.account.clone(),
            key: key.id.clone(),
            binding,
            iat_ms,
            exp_ms: iat_ms.saturating_add(ASSERTION_MAX_MS),
            jti: hex::encode(seal::random::bytes::<16>()),
        };
        self.metrics.asserted();
        Ok(signed(
            Signed::new(&self.keys.sign, context::ASSERTION, &assertion).to_string(),
        ))
    }

    async fn register(
        &self,
        call: &Call,
        assertion: &str,
        identity: &str,
    ) -> api::Result<api::mint::Signed> {
        let by = self.assertion(call, assertion)?;
        let statement = Signed::parse(identity)
            .and_then(|s| s.verify::<api::kms::Identity>(&self.kms, context::IDENTITY));
        let Ok(statement) = statement else {
            self.refuse(call, "identity", Some(&by.key));
            return Err(refused("the identity is not a statement of the KMS"));
        };
        if statement.account != by.account {
            self.refuse(call, "account", Some(&by.key));
            return Err(not_found());
        }
        let ws = statement.workspace.clone();
        let same = |w: &Workspace| {
            !w.gone && w.account == by.account && w.identity_pub == statement.identity_pub
        };
        if let Some(w) = self.book().workspace(&ws)
            && same(w)
        {
            return Ok(signed(self.token_state(w)));
        }
        let e = entry(
            call,
            "mint.workspace_register",
            by.key.as_str(),
            &by.account,
            Some(&ws),
        );
        self.log.append(Class::Host, e).await?;
        let _writer = self.writer.lock().await;
        let taken = self
            .book()
            .workspace(&ws)
            .map(|w| (same(w), self.token_state(w)));
        match taken {
            Some((true, state)) => return Ok(signed(state)),
            Some((false, _)) => {
                self.refuse(call, "identity", Some(&by.key));
                return Err(Error::new(
                    ErrorCode::Conflict,
                    "this workspace id was used already; create another workspace",
                ));
            }
            None => {}
        }
        let fresh = Workspace {
            id: ws,
            account: by.account,
            identity_pub: statement.identity_pub,
            epoch: 1,
            raw_version: 1,
            enabled: false,
            gone: false,
            seq: 0,
        };
        self.workspace_write(fresh, None)
            .await
            .map(|w| signed(self.token_state(&w)))
    }

    async fn forget(
        &self,
        call: &Call,
        authority: &str,
        workspace: &WorkspaceId,
    ) -> api::Result<bool> {
        let (account, key) = self.forget_authority(call, authority, workspace)?;
        let gone = self.owned(call, workspace, &account, &key, true)?.gone;
        if gone {
            return Ok(true);
        }
        let change = Change {
            event: "mint.workspace_forget",
            closing: true,
        };
        self.workspace_change(call, change, workspace, &account, &key, |w| {
            w.gone = true;
            w.enabled = false;
            w.epoch += 1;
            // What followers still hold as the raw token's hash becomes wrong, too.
            w.raw_version += 1;
        })
        .await?;
        Ok(true)
    }

    async fn gateway_token(
        &self,
        call: &Call,
        assertion: &str,
        workspace: &WorkspaceId,
        rotate: bool,
    ) -> api::Result<Gateway> {
        let by = self.assertion(call, assertion)?;
        let mut w = self.owned(call, workspace, &by.account, &by.key, false)?;
        if rotate {
            let change = Change {
                event: "mint.gateway_rotate",
                closing: false,
            };
            w = self
                .workspace_change(call, change, workspace, &by.account, &by.key, |w| {
                    w.epoch += 1
                })
                .await?;
        }
        let iat = self.clock.now_s();
        let claims = GatewayClaims {
            iss: "casemate".into(),
            sub: by.account.to_string(),
            aud: workspace.to_string(),
            iat,
            exp: iat.saturating_add(GATEWAY_TOKEN_MAX_S),
            jti: hex::encode(seal::random::bytes::<16>()),
            epoch: w.epoch,
        };
        let event = "mint.gateway_token";
        let mut e = entry(call, event, by.key.as_str(), &by.account, Some(workspace));
        e.data = object(json!({ "jti": claims.jti, "exp": claims.exp, "epoch": w.epoch }));
        self.log.append(Class::Host, e).await?;
        self.metrics.issued();
        Ok(Gateway {
            token: seal::jwt::sign(&self.keys.gateway, &claims),
            exp: claims.exp,
            state: self.token_state(&w),
        })
    }

    async fn runtime_enable(
        &self,
        call: &Call,
        assertion: &str,
        workspace: &WorkspaceId,
        enabled: bool,
    ) -> api::Result<api::mint::Signed> {
        let by = self.assertion(call, assertion)?;
        let w = self.owned(call, workspace, &by.account, &by.key, false)?;
        if w.enabled == enabled {
            return Ok(signed(self.token_state(&w)));
        }
        let change = match enabled {
            true => Change {
                event: "mint.runtime_enable",
                closing: false,
            },
            false => Change {
                event: "mint.runtime_disable",
                closing: true,
            },
        };
        let w = self
            .workspace_change(call, change, workspace, &by.account, &by.key, |w| {
                w.enabled = enabled;
                if !enabled {
                    w.epoch += 1;
                }
            })
            .await?;
        Ok(signed(self.token_state(&w)))
    }

    async fn raw_token(
        &self,
        call: &Call,
        assertion: &str,
        workspace: &WorkspaceId,
        rotate: bool,
    ) -> api::Result<Raw> {
        let by = self.assertion(call, assertion)?;
        let mut w = self.owned(call, workspace, &by.account, &by.key, false)?;
        if rotate {
            let change = Change {
                event: "mint.raw_rotate",
                closing: false,
            };
            w = self
                .workspace_change(call, change, workspace, &by.account, &by.key, |w| {
                    w.raw_version += 1;
                })
                .await?;
        } else {
            // Each reading of a raw token stands in the log: it is a lasting credential.
            let event = "mint.raw_read";
            let e = entry(call, event, by.key.as_str(), &by.account, Some(workspace));
            self.log.append(Class::Host, e).await?;
        }
        let token = self.keys.raw_token(workspace, w.raw_version);
        Ok(Raw {
            token: token.to_string(),
            state: self.token_state(&w),
        })
    }

    async fn changes(&self, since: u64, wait_ms: u64) -> Changes {
        // A number from the future: mint's state was put back to an older copy. Start over.
        let since = if since > self.book().seq() { 0 } else { since };
        let mut seq = self.seq.subscribe();
        let wait = Duration::from_millis(wait_ms.min(CHANGES_WAIT_MAX_MS));
        // A time-out is an answer like any other: nothing changed.
        let _ = tokio::time::timeout(wait, seq.wait_for(|now| *now > since)).await;
        let book = self.book();
        let mut last = since;
        let states = book
            .changed(since, CHANGES_MAX)
            .map(|w| {
                last = w.seq;
                self.token_state(w)
            })
            .collect();
        Changes { seq: last, states }
    }

    async fn policy_sign(
        &self,
        call: &Call,
        assertion: &str,
        workspace: &WorkspaceId,
        mut acts: Vec<PolicyAct>,
    ) -> api::Result<api::mint::Signed> {
        let by = self.assertion(call, assertion)?;
        self.owned(call, workspace, &by.account, &by.key, false)?;
        if acts.is_empty() || acts.len() > POLICY_ACTS_MAX {
            return Err(Error::new(
                ErrorCode::ValidationError,
                "acts must name 1 to 8 acts",
            ));
        }
        let mut seen = Vec::new();
        acts.retain(|a| {
            !seen.contains(a) && {
                seen.push(*a);
                true
            }
        });
        let event = "mint.policy_sign";
        let mut e = entry(call, event, by.key.as_str(), &by.account, Some(workspace));
        e.data = object(json!({ "acts": acts }));
        self.log.append(Class::Host, e).await?;
        let policy = Policy {
            account: by.account,
            key: by.key,
            workspace: workspace.clone(),
            acts,
            iat_ms: self.clock.now_ms(),
        };
        Ok(signed(
            Signed::new(&self.keys.sign, context::POLICY, &policy).to_string(),
        ))
    }

    /// Logs a change to one's own workspace, then makes it.
    async fn workspace_change(
        &self,
        call: &Call,
        change: Change,
        workspace: &WorkspaceId,
        account: &AccountId,
        key: &KeyId,
        apply: impl FnOnce(&mut Workspace),
    ) -> api::Result<Workspace> {
        let e = entry(call, change.event, key.as_str(), account, Some(workspace));
        let waiting = if change.closing {
            self.log_closing(&e).await?
        } else {
            self.log.append(Class::Host, e).await?;
            None
        };
        let _writer = self.writer.lock().await;
        // As it is now, not as it was before the log answered.
        let mut w = self.owned(call, workspace, account, key, false)?;
        apply(&mut w);
        self.workspace_write(w, waiting.as_deref()).await
    }

    /// Numbers and writes a workspace; the caller holds the writer's lock.
    async fn workspace_write(
        &self,
        mut w: Workspace,
        waiting: Option<&str>,
    ) -> api::Result<Workspace> {
        w.seq = self.book().seq() + 1;
        self.store.workspace_put(&w, waiting).await?;
        self.book_mut().workspace_put(w.clone());
        // Never past u64::MAX, which says that mint stops.
        self.seq.send_if_modified(|seq| {
            let grows = *seq < w.seq;
            *seq = w.seq.max(*seq);
            grows
        });
        Ok(w)
    }

    /// The caller's own living workspace (or a deleted one, for closing acts).
    fn owned(
        &self,
        call: &Call,
        id: &WorkspaceId,
        account: &AccountId,
        key: &KeyId,
        or_gone: bool,
    ) -> api::Result<Workspace> {
        let found = self.book().workspace(id).cloned();
        match found {
            Some(w) if w.account != *account => {
                self.refuse(call, "account", Some(key));
                Err(not_found())
            }
            Some(w) if !w.gone || or_gone => Ok(w),
            _ => Err(not_found()),
        }
    }

    /// An assertion of ours that is in force.
    fn assertion(&self, call: &Call, text: &str) -> api::Result<Assertion> {
        let now = self.clock.now_ms();
        let checked = Signed::parse(text)
            .and_then(|s| s.verify::<Assertion>(&self.keys.sign.public(), context::ASSERTION));
        let Ok(a) = checked else {
            self.refuse(call, "assertion", None);
            return Err(refused("the assertion is not mint's"));
        };
        let revoked = self.book().key(&a.key).is_none_or(|key| key.revoked);
        if revoked {
            self.refuse(call, "revoked", Some(&a.key));
            return Err(Error::new(
                ErrorCode::Unauthorized,
                "the API key was revoked",
            ));
        }
        if a.exp_ms <= now || a.iat_ms > now.saturating_add(SKEW_MS) {
            self.refuse(call, "assertion_time", Some(&a.key));
            return Err(Error::new(
                ErrorCode::Unavailable,
                "the request took longer than its credential's assertion lives; try again",
            ));
        }
        Ok(a)
    }

    /// What allows forgetting: an assertion of the last day, or a policy that says so. A revoked
    /// key does not matter: the act closes, and it was authorised when it was asked for.
    fn forget_authority(
        &self,
        call: &Call,
        text: &str,
        workspace: &WorkspaceId,
    ) -> api::Result<(AccountId, KeyId)> {
        let now = self.clock.now_ms();
        let public = self.keys.sign.public();
        let document = Signed::parse(text).ok();
        let verified = document.and_then(|d| {
            if let Ok(a) = d.verify::<Assertion>(&public, context::ASSERTION) {
                let fresh = a.iat_ms <= now.saturating_add(SKEW_MS)
                    && now <= a.iat_ms.saturating_add(FORGET_AUTHORITY_MAX_MS);
                return fresh.then_some((a.account, a.key));
            }
            let p = d.verify::<Policy>(&public, context::POLICY).ok()?;
            let allows = p.workspace == *workspace && p.acts.contains(&PolicyAct::Expire);
            allows.then_some((p.account, p.key))
        });
        verified.ok_or_else(|| {
            self.refuse(call, "authority", None);
            refused("neither an assertion nor a policy of mint's allows this")
        })
    }

    fn token_state(&self, w: &Workspace) -> String {
        let state = TokenState {
            workspace: w.id.clone(),
            account: w.account.clone(),
            epoch: w.epoch,
            raw_hash: self.keys.raw_hash(&w.id, w.raw_version),
            enabled: w.enabled,
            gone: w.gone,
            identity_pub: w.identity_pub.clone(),
            seq: w.seq,
        };
        Signed::new(&self.keys.sign, context::TOKEN_STATE, &state).to_string()
    }

    /// Logs for a closing act; what the log can't take is answered, to wait in the outbox.
    async fn log_closing(&self, e: &Entry) -> api::Result<Option<String>> {
        let append = self.log.append(Class::Host, e.clone());
        match tokio::time::timeout(CLOSING_LOG_WAIT, append).await {
            Ok(Ok(_)) => Ok(None),
            _ => serde_json::to_string(e).map(Some).map_err(Error::internal),
        }
    }

    /// Flags a refusal, and logs it within bounds; the answer does not wait for that.
    fn refuse(&self, call: &Call, why: &'static str, source: Option<&KeyId>) {
        self.metrics.refused(why);
        let Some(suppressed) = self.refusals.admit(source, self.clock.now_ms()) else {
            return;
        };
        let mut e = blank(call, "mint.refused", Phase::Fact, "internal:mint");
        e.subject = source.map(ToString::to_string);
        e.result = Some(why.into());
        e.data = object(json!({ "peer": call.peer.process, "unlogged_before": suppressed }));
        if self.refused.try_send(e).is_err() {
            self.metrics.refusal_unlogged();
        }
    }

    fn book(&self) -> RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn book_mut(&self) -> std::sync::RwLockWriteGuard<'_, Book> {
        self.book.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings refusals into the log, one after the other, dropping what it can't take.
async fn refusals_log(log: Log, mut queue: mpsc::Receiver<Entry>) {
    while let Some(e) = queue.recv().await {
        if let Err(e) = log.append(Class::Security, e).await {
            tracing::warn!(error = %e, "a refusal is not in the log");
        }
    }
}

fn entry(
    call: &Call,
    event: &str,
    actor: &str,
    account: &AccountId,
    workspace: Option<&WorkspaceId>,
) -> Entry {
    let mut e = blank(call, event, Phase::Intent, actor);
    e.account = Some(account.clone());
    e.subject = workspace.map(ToString::to_string);
    e
}

fn blank(call: &Call, event: &str, phase: Phase, actor: &str) -> Entry {
    Entry {
        event: event.into(),
        phase,
        request_id: call.request_id.clone(),
        account: None,
        actor: actor.into(),
        subject: None,
        authority: None,
        lease: None,
        result: None,
        data: Map::new(),
    }
}

fn signed(text: String) -> api::mint::Signed {
    api::mint::Signed { signed: text }
}

fn not_found() -> Error {
    Error::new(ErrorCode::NotFound, "there is no such workspace")
}

fn refused(why: &str) -> Error {
    Error::new(ErrorCode::KeyRefused, why)
}

fn is_hex_64(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
