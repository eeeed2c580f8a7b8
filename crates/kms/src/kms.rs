//! The KMS: what it answers, in which order it checks, logs and acts.
//!
//! | operation | who | before the answer |
//! |---|---|---|
//! | snapshot keep | host | durable in the store, with its entry in the outbox: it opens nothing, and forgets what stood before |
//! | anchor | host | the statement's MAC, durable in the store |
//! | key create, release | control; host | checks ([`crate::check`]), entry durable in the log |
//! | destroy | control | entry in the log, or in the outbox while the log is down |
//! | log open | audit-read | entry durable in the log |
//! | unseal, rotate | root | entry durable in the log |
//! | status | all | nothing: it tells no secret |
//!
//! Must never: answer a key in clear, answer before the entry is durable, or let an error say why
//! a secret did not open.

use crate::check::{self, Authority, Cleared, Refusal, Trust};
use crate::error::KmsError;
use crate::fault::{Faults, Step};
use crate::keyring::{Key, Place, account_log_key, epoch_root, identity_seed, purpose_key};
use crate::limits::{CLOSING_LOG_WAIT, GRANT_BYTES_MAX, LOG_OPEN_MAX, REASON_MAX_BYTES};
use crate::metrics::Metrics;
use crate::once::Once;
use crate::ring::{Ring, account_unwrap, account_wrap};
use crate::rotate::{Rotor, blocking};
use crate::slots::Slots;
use crate::store::{self, Store};
use crate::unseal::Means;
use api::audit::{Class, Entry, Object, Phase};
use api::kms::{Anchor, Grant, Identity, KeyCreated, Op, Released, Status, Unseal};
use api::{Error, ErrorCode, context};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use model::{Purpose, WorkspaceId};
use seal::sign::{Signed, SigningKey};
use serde_json::{Map, Value, json};
use service::audit::Log;
use service::clock::Clock;
use service::rpc::{Peer, ok};
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// What a KMS is made of.
pub struct Setup {
    /// `kms/`: state, slots, unseal material.
    pub dir: PathBuf,
    /// Whose word counts.
    pub trust: Trust,
    /// The log.
    pub log: Log,
    /// The clock.
    pub clock: Clock,
    /// Where a test stops it.
    pub faults: Faults,
}

/// The KMS. Cheap to clone.
#[derive(Clone)]
pub struct Kms(Arc<Inner>);

pub(crate) struct Inner {
    dir: PathBuf,
    pub(crate) trust: Trust,
    pub(crate) log: Log,
    clock: Clock,
    pub(crate) faults: Faults,
    means: Means,
    pub(crate) store: Arc<Store>,
    slots: Arc<Slots>,
    pub(crate) rotor: Rotor,
    ring: RwLock<Option<Arc<Ring>>>,
    /// One unsealing at a time; each costs 64 MiB.
    unsealing: tokio::sync::Mutex<()>,
    once: Once,
    /// Workspaces whose key is being destroyed: nothing of them is released any more.
    doomed: Mutex<HashSet<WorkspaceId>>,
    latest_ms: AtomicU64,
    pub(crate) metrics: Metrics,
}

impl Kms {
    /// Opens the state; sealed until one of the unseal calls.
    ///
    /// # Errors
    /// [`KmsError::NoState`] before `init`; the store's and the file system's.
    pub async fn open(setup: Setup) -> Result<Self, KmsError> {
        let store = Arc::new(Store::open(&setup.dir.join("state.db"), false).await?);
        if store.state().await?.is_none() {
            return Err(KmsError::NoState(setup.dir.join("state.db")));
        }
        let slots = Arc::new(Slots::open(setup.dir.join("slots"))?);
        let rotor = Rotor::new(Arc::clone(&store), Arc::clone(&slots), setup.faults.clone());
        Ok(Self(Arc::new(Inner {
            means: Means::load(&setup.dir)?,
            dir: setup.dir,
            trust: setup.trust,
            log: setup.log,
            clock: setup.clock,
            faults: setup.faults,
            store,
            slots,
            rotor,
            ring: RwLock::default(),
            unsealing: tokio::sync::Mutex::default(),
            once: Once::default(),
            doomed: Mutex::default(),
            latest_ms: AtomicU64::new(0),
            metrics: Metrics::default(),
        })))
    }

    /// How it is unsealed.
    #[must_use]
    pub fn means(&self) -> Unseal {
        self.0.means.kind
    }

    /// Its metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Ends the store's connections.
    pub async fn close(&self) {
        self.0.store.close().await;
    }

    /// Unseals by the file; sealed still if the log can't take the entry about it.
    ///
    /// # Errors
    /// The file's, the state's, or the log's.
    pub async fn unseal_by_file(&self) -> api::Result<()> {
        let _one = self.0.unsealing.lock().await;
        if self.0.ring().is_ok() {
            return Ok(());
        }
        let secret = self.0.means.from_file(&self.0.dir)?;
        self.0.unseal("internal:kms", "kms.start", secret).await
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The refusal or failure, as the caller may know it.
    pub async fn handle(&self, peer: Peer, request_id: String, op: Op) -> api::Result<Value> {
        let k = &self.0;
        let call = Call {
            peer,
            request_id,
            op: op.name(),
        };
        let allowed: &[&str] = match &op {
            Op::Status => &["control", "host", "audit-read", "root"],
            Op::WorkspaceKeyCreate { .. } | Op::Destroy { .. } => &["control"],
            Op::Release { .. } | Op::Anchor { .. } | Op::SnapshotKeep { .. } => &["host"],
            Op::Unseal { .. } | Op::Rotate => &["root"],
            Op::LogOpen { .. } => &["audit-read"],
        };
        if !allowed.contains(&call.peer.process.as_str()) {
            return Err(k.refuse(&call, Refusal::Peer, None).await);
        }
        match op {
            Op::Status => ok(&k.status().await?),
            Op::WorkspaceKeyCreate { receipt } => ok(&k.key_create(&call, &receipt).await?),
            Op::Release {
                receipt,
                attestation,
            } => ok(&k.release(&call, &receipt, &attestation).await?),
            Op::SnapshotKeep { workspace, object } => {
                ok(&k.snapshot_keep(&call, &workspace, &object).await?)
            }
            Op::Anchor { statement } => ok(&k.anchor(&call, &statement).await?),
            Op::Destroy {
                workspace,
                authority,
            } => ok(&k.destroy(&call, &workspace, &authority).await?),
            Op::Unseal { passphrase } => ok(&k
                .unseal_by_passphrase(&call, seal::Zeroizing::new(passphrase))
                .await?),
            Op::Rotate => ok(&k.rotate(&call).await?),
            Op::LogOpen {
                class,
                day,
                wraps,
                reason,
            } => ok(&k.log_open(&call, class, day, &wraps, &reason).await?),
        }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }
}

/// One request: who, which, what.
pub(crate) struct Call {
    peer: Peer,
    pub(crate) request_id: String,
    op: &'static str,
}

impl Inner {
    /// The keys, or that it is sealed.
    pub(crate) fn ring(&self) -> api::Result<Arc<Ring>> {
        self.ring
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::KmsSealed,
                    "keys are sealed until the operator unseals them; workspaces wait",
                )
            })
    }

    /// Now, never earlier than before: a clock set back must not revive a lease.
    pub(crate) fn now_ms(&self) -> u64 {
        let now = self.clock.now_ms();
        self.latest_ms.fetch_max(now, Ordering::AcqRel).max(now)
    }

    async fn status(&self) -> api::Result<Status> {
        let state = self
            .store
            .state()
            .await?
            .ok_or(KmsError::Unseal("no state"))?;
        Ok(Status {
            sealed: self.ring().is_err(),
            unseal: self.means.kind,
            epoch: state.epoch,
            workspace_keys: self.store.workspaces_living().await?,
            releases: self.metrics.releases(),
            refusals: self.metrics.refusals(),
        })
    }

    async fn unseal_by_passphrase(
        &self,
        call: &Call,
        passphrase: seal::Zeroizing<String>,
    ) -> api::Result<Status> {
        let _one = self.unsealing.lock().await;
        if self.ring().is_err() {
            let means = self.means.clone();
            let secret = blocking(move || means.from_passphrase(passphrase.as_bytes())).await;
            let secret = match secret {
                Ok(secret) => secret,
                Err(e @ KmsError::Unseal(_)) => {
                    self.refuse(call, Refusal::Passphrase, None).await;
                    return Err(e.into());
                }
                Err(e) => return Err(e.into()),
            };
            self.unseal("operator", &call.request_id, secret).await?;
        }
        self.status().await
    }

    /// Opens the state, gives the log its keys, logs the unsealing, and only then answers keys.
    async fn unseal(&self, actor: &str, request_id: &str, secret: Key) -> api::Result<()> {
        let state = self
            .store
            .state()
            .await?
            .ok_or(KmsError::Unseal("no state"))?;
        let slot = self.slots.read(state.epoch)?;
        // Before anything else is touched: an old state must not cost the newest slot.
        let slot = slot.ok_or(KmsError::Rollback { epoch: state.epoch })?;
        let root = epoch_root(&secret, &slot, state.epoch);
        let place = Place::Sign { epoch: state.epoch };
        let seed: Key = place.unwrap_bytes(&root, &state.sign_wrapped)?;
        let sign = SigningKey::from_seed(seed.expose());
        if sign.public().to_hex() != state.sign_pub {
            return Err(KmsError::Wrapped {
                subject: place.to_string(),
            }
            .into());
        }
        let (slots, epoch) = (Arc::clone(&self.slots), state.epoch);
        blocking(move || slots.destroy_others(epoch)).await?;
        let mut ring = Ring::new(secret, sign, state.epoch, root);
        self.log_keys_publish(&ring, request_id).await?;
        let mut entry = entry("kms.unseal", Phase::Fact, request_id, actor);
        entry.data.insert("epoch".into(), state.epoch.into());
        entry.data.insert("kms_pub".into(), state.sign_pub.into());
        ring.floor = self.log.append(Class::Host, entry).await?.index;
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(ring));
        self.metrics.epoch_is(epoch);
        tracing::info!(epoch, "unsealed");
        Ok(())
    }

    async fn key_create(&self, call: &Call, receipt: &Value) -> api::Result<KeyCreated> {
        let ring = self.ring()?;
        let (workspace, authority, intent) =
            match check::create(&self.trust, receipt, self.now_ms()) {
                Ok(checked) => checked,
                Err(r) => return Err(self.refuse(call, r, None).await),
            };
        let account = authority.account();
        let mut e = entry(
            "kms.key_create",
            Phase::Intent,
            &call.request_id,
            authority.key().as_str(),
        );
        e.account = Some(account.clone());
        e.subject = Some(workspace.to_string());
        e.data.insert("intent_index".into(), intent.index.into());
        self.log.append(Class::Host, e).await?;
        self.faults.at(Step::KeyStore)?;
        let mut tx = self.store.begin().await?;
        let epoch = store::state(&mut tx)
            .await?
            .ok_or(KmsError::Unseal("no state"))?
            .epoch;
        let root = ring
            .root(epoch)
            .ok_or(KmsError::Unseal("the epoch in force is not held"))?;
        let (row, is_new) = match store::account(&mut tx, account).await? {
            Some(row) => (row, false),
            None => {
                let (key, seed) = (Key::random(), Key::random());
                let row = store::Account {
                    id: account.clone(),
                    version: 1,
                    epoch,
                    wrapped: account_wrap(account, 1, epoch, &root, &key, &seed),
                    log_pub: account_log_key(&seed).public().to_hex(),
                };
                store::account_put(&mut tx, &row).await?;
                (row, true)
            }
        };
        let (account_key, _) = account_unwrap(&row, &root)?;
        let place = Place::Workspace {
            workspace: &workspace,
            account,
            version: 1,
            account_version: row.version,
            epoch,
        };
        let fresh = store::Workspace {
            id: workspace.clone(),
            account: account.clone(),
            version: 1,
            account_version: row.version,
            epoch,
            wrapped: Some(place.wrap(&account_key, Key::random().expose())),
            destroyed_ms: None,
            record_digest: None,
            receipt: None,
        };
        store::workspace_insert(&mut tx, &fresh, self.now_ms()).await?;
        tx.commit()
            .await
            .map_err(KmsError::store("store workspace key"))?;
        self.faults.at(Step::KeyAnswer)?;
        // The log seals entries to the account from now on; if it can't hear it now, later.
        if is_new && let Err(e) = self.accounts_publish(&call.request_id).await {
            tracing::warn!(error = %e, "account's log key not published yet");
        }
        let (key, w) = match self.workspace_key(&ring, &workspace, None).await? {
            Ok((key, w)) if w.account == *account => (key, w),
            Ok(_) => return Err(self.refuse(call, Refusal::Account, Some(&workspace)).await),
            Err(r) => return Err(self.refuse(call, r, Some(&workspace)).await),
        };
        let identity = SigningKey::from_seed(identity_seed(&key, &workspace).expose());
        let statement = Identity {
            workspace,
            account: w.account,
            identity_pub: identity.public().to_hex(),
            key_version: w.version,
        };
        let signed = Signed::new(&ring.sign, context::IDENTITY, &statement);
        Ok(KeyCreated {
            identity: signed.to_string(),
        })
    }

    async fn release(
        &self,
        call: &Call,
        receipt: &Value,
        attestation: &str,
    ) -> api::Result<Released> {
        let ring = self.ring()?;
        let now_ms = self.now_ms();
        let cleared = match check::release(&self.trust, receipt, attestation, ring.floor, now_ms) {
            Ok(cleared) => cleared,
            Err(r) => return Err(self.refuse(call, r, None).await),
        };
        // The owner before the nonce: a stranger's intent must not use anything up. Whose act it
        // is must own both, where a fork reads another workspace's snapshot.
        let workspace = &cleared.object.workspace;
        if *workspace != cleared.lease.workspace
            && let Err(why) = self.owned(&cleared.lease.workspace, &cleared).await?
        {
            return Err(self.refuse(call, why, Some(workspace)).await);
        }
        let row = match self.owned(workspace, &cleared).await? {
            Ok(row) => Some(row),
            Err(why) => return Err(self.refuse(call, why, Some(workspace)).await),
        };
        let name = match self.object_named(&cleared).await? {
            Ok(name) => name,
            Err(why) => return Err(self.refuse(call, why, Some(workspace)).await),
        };
        let jti = match &cleared.authority {
            Authority::Assertion(a) => Some(a.jti.as_str()),
            Authority::Policy(_) => None,
        };
        // An assertion can back leases until it ends and a lease more.
        let until_ms = cleared.lease.exp_ms.max(
            cleared
                .intent
                .time_ms
                .saturating_add(2 * api::limits::LEASE_MAX_MS),
        );
        // Each object of a lease once; an assertion stands for one act, a fork's included.
        let Object { purpose, .. } = &cleared.object;
        let once = format!("{}|{workspace}|{}", cleared.lease.nonce, purpose.label());
        let about = &cleared.lease.workspace;
        if let Err(r) = self.once.take(&once, jti, about, until_ms, now_ms) {
            return Err(self.refuse(call, r, Some(workspace)).await);
        }
        self.log
            .append(Class::Host, release_entry(call, &cleared))
            .await?;
        let (key, w) = match self.workspace_key(&ring, workspace, row).await? {
            Ok(found) => found,
            Err(r) => return Err(self.refuse(call, r, Some(workspace)).await),
        };
        if let Err(why) = self.images_note(&cleared).await? {
            return Err(self.refuse(call, why, Some(workspace)).await);
        }
        let anchor = match cleared.object.purpose {
            Purpose::Disk => self.store.anchor(workspace).await?,
            _ => None,
        };
        let object_key = purpose_key(&key, cleared.object.purpose, &name, w.version);
        let released = self.seal_grant(&cleared, &key, object_key, anchor)?;
        if self.doomed().contains(workspace) {
            return Err(self.refuse(call, Refusal::Destroyed, Some(workspace)).await);
        }
        self.metrics.released();
        Ok(released)
    }

    /// The row of a workspace that the act's account owns.
    async fn owned(
        &self,
        workspace: &WorkspaceId,
        c: &Cleared,
    ) -> api::Result<Result<(store::Workspace, store::Account), Refusal>> {
        Ok(match self.store.workspace(workspace).await? {
            None => Err(Refusal::Unknown),
            Some((w, _)) if w.account != *c.authority.account() => Err(Refusal::Account),
            Some((w, _)) if w.wrapped.is_none() => Err(Refusal::Destroyed),
            Some(row) => Ok(row),
        })
    }

    fn seal_grant(
        &self,
        c: &Cleared,
        key: &Key,
        object_key: Key,
        anchor: Option<Anchor>,
    ) -> api::Result<Released> {
        let hex_of = |key: Key| seal::Zeroizing::new(hex::encode(key.expose()));
        let Object {
            workspace, purpose, ..
        } = &c.object;
        let disk_key = hex_of(object_key);
        // What is at rest beside a disk is nobody's identity.
        let seed = match purpose {
            Purpose::Disk => hex_of(identity_seed(key, workspace)),
            _ => seal::Zeroizing::default(),
        };
        let mut grant = Grant {
            workspace: workspace.clone(),
            start_id: c.lease.start_id.clone(),
            run: c.run(),
            anchor,
            purpose: *purpose,
            disk_key: disk_key.to_string(),
            identity_seed: seed.to_string(),
            config_digest: c.lease.config_digest.clone(),
            mint_key: self.trust.mint.to_hex(),
            gateway_key: self.trust.gateway.to_hex(),
            edge_key: self.trust.edge.to_hex(),
        };
        // Sized beforehand: growing would leave copies behind.
        let mut clear = seal::Zeroizing::new(Vec::with_capacity(GRANT_BYTES_MAX));
        let written = serde_json::to_writer(&mut *clear, &grant);
        seal::Zeroize::zeroize(&mut grant.disk_key);
        seal::Zeroize::zeroize(&mut grant.identity_seed);
        written.map_err(|_| Error::internal("a grant that is no JSON"))?;
        assert!(
            clear.len() <= GRANT_BYTES_MAX,
            "a grant's fields are bounded"
        );
        let aad = c.intent.leaf_digest;
        let sealed = seal::hpke::seal(&c.hpke_pub, context::RELEASE.as_bytes(), &aad, &clear);
        Ok(Released {
            sealed: STANDARD.encode(sealed),
            aad: hex::encode(aad),
        })
    }

    /// A living workspace's key, whatever epoch a rotation has reached meanwhile.
    ///
    /// `row` may have been read before: once a key is destroyed, its row's epoch is held no more,
    /// and it is read again.
    pub(crate) async fn workspace_key(
        &self,
        ring: &Ring,
        id: &WorkspaceId,
        mut row: Option<(store::Workspace, store::Account)>,
    ) -> api::Result<Result<(Key, store::Workspace), Refusal>> {
        for _ in 0..4 {
            let found = match row.take() {
                None => self.store.workspace(id).await?,
                known => known,
            };
            let Some((w, a)) = found else {
                return Ok(Err(Refusal::Unknown));
            };
            if w.wrapped.is_none() {
                return Ok(Err(Refusal::Destroyed));
            }
            if let Some(key) = ring.workspace_key(&w, &a)? {
                return Ok(Ok((key, w)));
            }
        }
        Err(Error::internal(
            "the epoch changed three times while one key was read",
        ))
    }

    async fn rotate(&self, call: &Call) -> api::Result<Status> {
        let ring = self.ring()?;
        let e = entry("kms.rotate", Phase::Intent, &call.request_id, "operator");
        self.log.append(Class::Host, e).await?;
        self.epoch_new(&ring, &call.request_id).await?;
        self.status().await
    }

    /// Rotates and logs how it ended.
    pub(crate) async fn epoch_new(&self, ring: &Ring, request_id: &str) -> api::Result<()> {
        let result = self.rotor.rotate(ring, None, self.now_ms()).await;
        let mut e = entry("kms.rotate", Phase::Outcome, request_id, "internal:kms");
        e.result = Some(if result.is_ok() { "ok" } else { "failed" }.into());
        if let Ok(epoch) = &result {
            self.metrics.epoch_is(*epoch);
            e.data.insert("epoch".into(), (*epoch).into());
        }
        if self.log_closing(&e).await.is_err() {
            self.store
                .outbox_add(Class::Host.name(), &entry_text(&e)?)
                .await?;
        }
        result.map(drop).map_err(Error::from)
    }

    async fn log_open(
        &self,
        call: &Call,
        class: Class,
        day: u32,
        wraps: &[String],
        reason: &str,
    ) -> api::Result<Vec<String>> {
        let ring = self.ring()?;
        if wraps.len() > LOG_OPEN_MAX || reason.is_empty() || reason.len() > REASON_MAX_BYTES {
            return Err(self.refuse(call, Refusal::Bounds, None).await);
        }
        let Some(key) = ring.days(class).and_then(|days| days.key(day)) else {
            return Err(self.refuse(call, Refusal::Unknown, None).await);
        };
        let mut e = entry(
            "kms.log_open",
            Phase::Intent,
            &call.request_id,
            "internal:audit-read",
        );
        e.data = object(json!({
            "class": class.name(), "day": day, "batches": wraps.len(), "reason": reason,
        }));
        self.log.append(Class::Security, e).await?;
        let mut out = Vec::with_capacity(wraps.len());
        for wrap in wraps {
            let opened = STANDARD.decode(wrap).ok().and_then(|bytes| {
                seal::hpke::open_secret::<32>(&key, context::LOG_CLASS.as_bytes(), b"", &bytes).ok()
            });
            let Some(batch) = opened else {
                return Err(self.refuse(call, Refusal::Bounds, None).await);
            };
            out.push(hex::encode(batch.expose()));
        }
        Ok(out)
    }

    /// Logs and flags a refusal; answers what the caller may know.
    pub(crate) async fn refuse(
        &self,
        call: &Call,
        why: Refusal,
        subject: Option<&WorkspaceId>,
    ) -> Error {
        self.metrics.refused(why);
        let mut e = entry("kms.refused", Phase::Fact, &call.request_id, "internal:kms");
        e.subject = subject.map(ToString::to_string);
        e.result = Some(why.code().into());
        e.data = object(json!({ "op": call.op, "peer": call.peer.process }));
        let logged = tokio::time::timeout(CLOSING_LOG_WAIT, self.log.append(Class::Security, e));
        if !matches!(logged.await, Ok(Ok(_))) {
            self.metrics.refusal_unlogged();
        }
        tracing::warn!(
            request_id = %call.request_id, op = call.op, peer = %call.peer.process,
            reason = why.code(), "refused"
        );
        let code = match why {
            Refusal::Unknown | Refusal::Account => {
                // The same for both: another account's id does not show.
                return Error::new(ErrorCode::NotFound, Refusal::Unknown.sentence());
            }
            Refusal::Peer => ErrorCode::Forbidden,
            Refusal::Busy => ErrorCode::RateLimited,
            Refusal::Bounds => ErrorCode::ValidationError,
            Refusal::Destroyed => ErrorCode::Conflict,
            _ => ErrorCode::KeyRefused,
        };
        Error::new(code, why.sentence()).detail(why.code())
    }

    /// Logs for a closing act, which does not wait long for a log that is down.
    pub(crate) async fn log_closing(&self, entry: &Entry) -> Result<(), ()> {
        let append = self.log.append(Class::Host, entry.clone());
        match tokio::time::timeout(CLOSING_LOG_WAIT, append).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(()),
        }
    }

    pub(crate) fn doomed(&self) -> std::sync::MutexGuard<'_, HashSet<WorkspaceId>> {
        self.doomed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entry with no more than its head.
pub(crate) fn entry(event: &str, phase: Phase, request_id: &str, actor: &str) -> Entry {
    Entry {
        event: event.into(),
        phase,
        request_id: request_id.into(),
        account: None,
        actor: actor.into(),
        subject: None,
        authority: None,
        lease: None,
        result: None,
        data: Map::new(),
    }
}

pub(crate) fn entry_text(e: &Entry) -> Result<String, KmsError> {
    serde_json::to_string(e).map_err(|_| KmsError::Unseal("an entry that is no JSON"))
}

fn release_entry(call: &Call, c: &Cleared) -> Entry {
    let mut e = entry(
        "kms.release",
        Phase::Intent,
        &call.request_id,
        c.authority.key().as_str(),
    );
    e.account = Some(c.authority.account().clone());
    e.subject = Some(c.object.workspace.to_string());
    e.lease = Some(c.lease.clone());
    e.data = object(json!({
        "purpose": c.object.purpose,
        "object": c.object.id,
        "intent_index": c.intent.index,
        "intent_leaf": hex::encode(c.intent.leaf_digest),
        "hpke_pub": c.attestation.hpke_pub,
        "measurement": c.attestation.measurement,
    }));
    e
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
