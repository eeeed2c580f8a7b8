//! Doubles of audit, KMS, mint and host: their answers to control, without their work.

use api::audit::{Appended, Class, Entry, Phase};
use api::host::{Actual, ActualState, Changes, Desired, Image, Info};
use api::mint::{Assertion, Policy, PolicyAct, TokenState};
use api::{Error, ErrorCode, audit, context, host, kms, mint};
use model::{AccountId, HostId, ObjectId, Power, Purpose, WorkspaceId};
use seal::sign::{Signed, SigningKey};
use serde_json::{Value, json};
use service::paths::Paths;
use service::rpc::{Peer, Uids, bind, ok, serve};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;

/// What the doubles know.
#[derive(Default)]
pub struct State {
    pub entries: Vec<(Class, Entry)>,
    /// Workspaces with a key: their account; none once destroyed.
    pub keys: BTreeMap<WorkspaceId, Option<AccountId>>,
    pub tokens: BTreeMap<WorkspaceId, TokenState>,
    pub desired: BTreeMap<WorkspaceId, Desired>,
    pub actual: BTreeMap<WorkspaceId, (u64, Actual)>,
    pub kms_sealed: bool,
    /// The time that host gives a VM that comes up.
    pub now_ms: u64,
    /// For how long workspaces were not used.
    pub idle_ms: BTreeMap<WorkspaceId, u64>,
    /// Operations that fail, by `process.op`.
    pub failing: HashMap<&'static str, ErrorCode>,
    /// Operations after which no answer comes, by `process.op`.
    pub silent: Option<String>,
    /// What sleeps, and the object that its memory is.
    pub memory: BTreeMap<WorkspaceId, ObjectId>,
    /// Snapshots.
    pub snapshots: BTreeMap<WorkspaceId, Vec<ObjectId>>,
    /// Starts, sleeps and snapshots that fail at host.
    pub starts_fail: Option<Error>,
    /// VMs end while their memory is saved.
    pub dies_asleep: bool,
    pub starts: u32,
    /// Size of every archive, bytes, or as much as it may have.
    pub archive_bytes: u64,
    /// Every operation asked, by `process.op`.
    pub asked: Vec<String>,
}

pub struct Doubles {
    pub mint_key: SigningKey,
    pub kms_key: SigningKey,
    state: Mutex<State>,
    seq: watch::Sender<u64>,
    stop: watch::Sender<bool>,
}

impl Doubles {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            mint_key: super::key(),
            kms_key: super::key(),
            state: Mutex::default(),
            seq: watch::Sender::new(1),
            stop: watch::Sender::new(false),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Serves all of them until the runtime ends.
    pub fn serve(self: &Arc<Self>, paths: &Paths) {
        let me = rustix::process::getuid().as_raw();
        let uids = Arc::new(Uids::from_map([("control".to_owned(), me)].into()));
        macro_rules! double {
            ($process:literal, $socket:literal, $answer:ident) => {
                let listener = bind(&paths.socket($process, $socket)).unwrap();
                let me = Arc::clone(self);
                let handler = move |_: Peer, _: String, op: Value| {
                    let me = Arc::clone(&me);
                    async move { me.gate($process, op, Self::$answer).await }
                };
                let stopped = self.stop.subscribe();
                tokio::spawn(serve(
                    listener,
                    Arc::clone(&uids),
                    &["control"],
                    stopped,
                    handler,
                ));
            };
        }
        double!("audit-append", "append", audit);
        double!("kms", "kms", kms);
        double!("mint", "mint", mint);
        double!("host", "host", host);
    }

    /// Does the operation, unless it is to fail; answers, unless it is to be silent.
    async fn gate<F: Future<Output = api::Result<Value>>>(
        self: Arc<Self>,
        process: &str,
        op: Value,
        answer: impl FnOnce(Arc<Self>, Value) -> F,
    ) -> api::Result<Value> {
        let name = format!("{process}.{}", op["op"].as_str().unwrap());
        let failing = {
            let mut s = self.state();
            s.asked.push(name.clone());
            s.failing.get(name.as_str()).copied()
        };
        if let Some(code) = failing {
            return Err(Error::new(code, "the test wants it so"));
        }
        let answered = answer(Arc::clone(&self), op).await;
        let silent = self.state().silent.as_deref() == Some(&name);
        if silent {
            std::future::pending::<()>().await;
        }
        answered
    }

    async fn audit(self: Arc<Self>, op: Value) -> api::Result<Value> {
        let audit::Op::Append {
            class,
            entry,
            want_receipt,
        } = parse(op)
        else {
            panic!("control appends only");
        };
        let mut s = self.state();
        let receipt = want_receipt.then(|| json!({ "entry": *entry }));
        s.entries.push((class, *entry));
        ok(&Appended {
            index: s.entries.len() as u64,
            time_ms: 0,
            receipt,
        })
    }

    async fn kms(self: Arc<Self>, op: Value) -> api::Result<Value> {
        let mut s = self.state();
        let sealed = s.kms_sealed;
        let op: kms::Op = parse(op);
        if sealed && !matches!(op, kms::Op::Status) {
            return Err(Error::new(ErrorCode::KmsSealed, "sealed"));
        }
        match op {
            kms::Op::WorkspaceKeyCreate { receipt } => {
                let entry: Entry = serde_json::from_value(receipt["entry"].clone()).unwrap();
                assert_eq!(
                    (entry.event.as_str(), entry.phase),
                    (kms::CREATE_EVENT, Phase::Intent)
                );
                let a = self.assertion(entry.authority.as_deref().unwrap())?;
                assert_eq!(Some(&a.account), entry.account.as_ref());
                let workspace = entry.lease.unwrap().workspace;
                s.keys.insert(workspace.clone(), Some(a.account.clone()));
                let identity = kms::Identity {
                    workspace,
                    account: a.account,
                    identity_pub: "ab".repeat(32),
                    key_version: 1,
                };
                let identity = Signed::new(&self.kms_key, context::IDENTITY, &identity);
                ok(&kms::KeyCreated {
                    identity: identity.to_string(),
                })
            }
            kms::Op::Destroy {
                workspace,
                authority,
            } => {
                let by = self.authority(&workspace, &authority)?;
                let key = s.keys.get_mut(&workspace).ok_or_else(not_found)?;
                if key.as_ref().is_some_and(|a| *a != by) {
                    return Err(not_found());
                }
                *key = None;
                let erasure = kms::Erasure {
                    workspace,
                    key_versions: 1,
                    record_digest: "00".repeat(32),
                    epoch_destroyed: 1,
                    epoch_now: 2,
                    time_ms: 1,
                };
                let receipt = Signed::new(&self.kms_key, context::ERASURE, &erasure).to_string();
                ok(&kms::Destroyed { receipt })
            }
            kms::Op::Status => ok(&kms::Status {
                sealed,
                unseal: kms::Unseal::File,
                epoch: 1,
                workspace_keys: 0,
                releases: 0,
                refusals: 0,
            }),
            _ => panic!("control does not ask that of the KMS"),
        }
    }

    async fn mint(self: Arc<Self>, op: Value) -> api::Result<Value> {
        let mut s = self.state();
        let signed = |t: &TokenState| mint::Signed {
            signed: Signed::new(&self.mint_key, context::TOKEN_STATE, t).to_string(),
        };
        match parse(op) {
            mint::Op::WorkspaceRegister {
                assertion,
                identity,
            } => {
                let by = self.assertion(&assertion)?;
                let i: kms::Identity = Signed::parse(identity)
                    .unwrap()
                    .verify(&self.kms_key.public(), context::IDENTITY)
                    .unwrap();
                assert_eq!(i.account, by.account);
                let state = TokenState {
                    workspace: i.workspace.clone(),
                    account: by.account,
                    epoch: 1,
                    raw_hash: "00".repeat(32),
                    enabled: false,
                    gone: false,
                    identity_pub: i.identity_pub,
                    seq: 1,
                };
                ok(&signed(s.tokens.entry(i.workspace).or_insert(state)))
            }
            mint::Op::WorkspaceForget {
                authority,
                workspace,
            } => {
                let by = self.authority(&workspace, &authority)?;
                let t = s.tokens.get_mut(&workspace).filter(|t| t.account == by);
                t.ok_or_else(not_found)?.gone = true;
                ok(&true)
            }
            mint::Op::PolicySign {
                assertion,
                workspace,
                acts,
            } => {
                let by = self.assertion(&assertion)?;
                owned(&mut s, &workspace, &by)?;
                let policy = Policy {
                    account: by.account,
                    key: by.key,
                    workspace,
                    acts,
                    iat_ms: by.iat_ms,
                };
                let signed = Signed::new(&self.mint_key, context::POLICY, &policy).to_string();
                ok(&mint::Signed { signed })
            }
            mint::Op::RuntimeEnable {
                assertion,
                workspace,
                enabled,
            } => {
                let by = self.assertion(&assertion)?;
                let t = owned(&mut s, &workspace, &by)?;
                t.enabled = enabled;
                t.seq += 1;
                ok(&signed(t))
            }
            mint::Op::GatewayToken {
                assertion,
                workspace,
                rotate,
            } => {
                let by = self.assertion(&assertion)?;
                let t = owned(&mut s, &workspace, &by)?;
                t.epoch += u64::from(rotate);
                t.seq += 1;
                let token = format!("jwt-{}-{}", workspace, t.epoch);
                ok(&mint::Gateway {
                    token,
                    exp: 1,
                    state: signed(t).signed,
                })
            }
            mint::Op::RawToken {
                assertion,
                workspace,
                ..
            } => {
                let by = self.assertion(&assertion)?;
                let t = owned(&mut s, &workspace, &by)?;
                ok(&mint::Raw {
                    token: "cd".repeat(32),
                    state: signed(t).signed,
                })
            }
            mint::Op::TokenState { workspace } => {
                ok(&signed(s.tokens.get(&workspace).ok_or_else(not_found)?))
            }
            _ => panic!("control does not ask that of mint"),
        }
    }

    async fn host(self: Arc<Self>, op: Value) -> api::Result<Value> {
        match parse(op) {
            host::Op::Apply { desired, .. } => ok(&self.apply(*desired)?),
            host::Op::Get { workspace } => {
                ok(&self.state().actual.get(&workspace).ok_or_else(not_found)?.1)
            }
            host::Op::Changes { since, wait_ms } => {
                let mut seq = self.seq.subscribe();
                let wait = Duration::from_millis(wait_ms);
                let _ = tokio::time::timeout(wait, seq.wait_for(|s| *s > since)).await;
                let s = self.state();
                let states = s.actual.values().filter(|(n, _)| *n > since);
                let states = states.map(|(_, a)| a.clone()).collect();
                ok(&Changes {
                    seq: *self.seq.borrow(),
                    states,
                })
            }
            host::Op::Counters { .. } => ok(&api::warden::Counters {
                cpu_ns: 7,
                disk_bytes: 5 << 20,
                ..Default::default()
            }),
            host::Op::Info => ok(&Info {
                host: HostId::from_bytes([9; 8]),
                images: vec![Image {
                    name: "python-3".into(),
                    id: "0a".repeat(32),
                    description: "Debian with Python".into(),
                }],
                accel: "tcg".into(),
                pool_ready: 0,
                pool_wanted: 0,
                weakened: vec![],
            }),
            host::Op::Active { workspaces } => {
                let mut s = self.state();
                for w in workspaces {
                    s.idle_ms.insert(w, 0);
                }
                ok(&true)
            }
            host::Op::Idle { workspaces } => {
                let s = self.state();
                let known = workspaces.into_iter().filter_map(|workspace| {
                    let idle_ms = *s.idle_ms.get(&workspace)?;
                    Some(host::Idle { workspace, idle_ms })
                });
                ok(&known.collect::<Vec<_>>())
            }
            host::Op::Want { .. } => panic!("only the edge asks for that"),
            host::Op::List => panic!("control follows changes"),
        }
    }

    fn apply(&self, d: Desired) -> api::Result<Actual> {
        let mut s = self.state();
        if s.desired
            .get(&d.workspace)
            .is_some_and(|old| old.generation > d.generation)
        {
            return Err(Error::new(ErrorCode::Conflict, "older"));
        }
        let before = s.actual.get(&d.workspace).map(|(_, a)| a.state);
        let since_ms = s.actual.get(&d.workspace).and_then(|(_, a)| a.since_ms);
        let up = matches!(before, Some(ActualState::Running | ActualState::Paused));
        let fails = s.starts_fail.clone();
        let mut memory = s.memory.get(&d.workspace).cloned();
        let mut snapshot = None;
        let mut archived = None;
        let mut archive_fails = None;
        // What the wish does not name goes.
        let mut kept = s.snapshots.remove(&d.workspace).unwrap_or_default();
        kept.retain(|id| [&d.snapshot, &d.snapshot_next].contains(&&Some(id.clone())));
        if let (true, Some(receipt), Some(lease)) = (up, &d.lease, &d.start) {
            let entry: Entry = serde_json::from_value(receipt["entry"].clone()).unwrap();
            assert_eq!(entry.lease.as_ref(), Some(lease));
            match lease.purpose {
                Purpose::SnapshotDisk => {
                    self.lease_authority(&entry)?;
                    snapshot = lease.object.clone().filter(|_| fails.is_none());
                    assert_eq!(d.snapshot_next, lease.object);
                    kept.extend(snapshot.clone());
                }
                Purpose::Archive => {
                    self.lease_authority(&entry)?;
                    assert_eq!(d.power, Power::Running);
                    let id = lease.object.clone().unwrap();
                    assert!(d.archives.contains(&id));
                    // Of one that is put back: nothing is to be made.
                    let archive = d.archive.as_ref();
                    let most = archive.map_or(u64::MAX, |a| u64::from(a.max_mb) << 20);
                    archived = fails.is_none().then(|| api::host::Archived {
                        id,
                        start_id: lease.start_id.clone(),
                        tar: api::vmctl::Archived {
                            bytes: s.archive_bytes.min(most),
                            entries: archive.map_or(3, |a| a.paths.len() as u64),
                            skipped: 0,
                        },
                    });
                    archive_fails = fails.clone();
                }
                Purpose::Memory => {
                    self.lease_authority(&entry)?;
                    assert_eq!(d.power, Power::Asleep);
                    let kept = fails.is_none() && !s.dies_asleep;
                    memory = lease.object.clone().filter(|_| kept);
                }
                _ => {}
            }
        }
        let (state, error) = match d.power {
            Power::Deleted => (ActualState::Deleted, None),
            Power::Stopped => {
                memory = None;
                (ActualState::Stopped, None)
            }
            Power::Asleep if memory.is_some() => (ActualState::Asleep, None),
            Power::Asleep if up && s.dies_asleep => (ActualState::Crashed, None),
            Power::Asleep if up => (ActualState::Running, fails),
            Power::Asleep => (ActualState::Failed, None),
            Power::Paused if up => (ActualState::Paused, None),
            Power::Running if up => (ActualState::Running, archive_fails),
            _ if d.token_state.is_empty() => (ActualState::Starting, None),
            Power::Paused | Power::Running => match (&d.lease, &d.start) {
                (Some(receipt), Some(lease)) => {
                    s.starts += 1;
                    let entry: Entry = serde_json::from_value(receipt["entry"].clone()).unwrap();
                    assert_eq!(entry.lease.as_ref(), Some(lease));
                    assert_eq!(entry.phase, Phase::Intent);
                    let digest = hex::encode(seal::hash::sha256(d.config.as_bytes()));
                    assert_eq!(lease.config_digest, digest);
                    self.lease_authority(&entry)?;
                    for o in &lease.also {
                        let there = match o.purpose {
                            Purpose::Memory => memory == o.id,
                            _ if o.workspace == d.workspace => {
                                o.id.as_ref().is_some_and(|id| kept.contains(id))
                            }
                            _ => {
                                let of = s.snapshots.get(&o.workspace);
                                of.zip(o.id.as_ref())
                                    .is_some_and(|(all, id)| all.contains(id))
                            }
                        };
                        assert!(there, "{o:?} is not there");
                    }
                    if fails.is_none() {
                        memory = None;
                    }
                    match fails {
                        Some(e) => (ActualState::Failed, Some(e)),
                        None => (ActualState::Running, None),
                    }
                }
                _ => {
                    let e = s
                        .actual
                        .get(&d.workspace)
                        .and_then(|(_, a)| a.error.clone());
                    (before.unwrap_or(ActualState::Failed), e)
                }
            },
        };
        let running = matches!(state, ActualState::Running | ActualState::Paused);
        let actual = Actual {
            workspace: d.workspace.clone(),
            generation: d.generation,
            state,
            start_id: d
                .start
                .as_ref()
                .map(|l| l.start_id.clone())
                .filter(|_| running),
            ip: running.then(|| "10.117.0.9".into()),
            public_access: d.public_access,
            since_ms: running.then(|| since_ms.filter(|_| up).unwrap_or(s.now_ms)),
            started_from: running.then(|| "pool".into()),
            memory: memory.is_some(),
            wakes: d.wakes,
            wanted: false,
            snapshot,
            archived,
            error,
        };
        s.snapshots.insert(d.workspace.clone(), kept);
        match memory {
            Some(id) => s.memory.insert(d.workspace.clone(), id),
            None => s.memory.remove(&d.workspace),
        };
        s.desired.insert(d.workspace.clone(), d);
        self.publish(&mut s, actual.clone());
        Ok(actual)
    }

    /// Somebody asks at its gateway for a workspace that rests.
    pub fn want(&self, id: &str) {
        let mut s = self.state();
        let mut actual = s.actual[&id.parse::<WorkspaceId>().unwrap()].1.clone();
        assert!(actual.wakes, "the edge asks for what may wake only");
        actual.wanted = true;
        self.publish(&mut s, actual);
    }

    /// A workspace's VM goes away by itself.
    pub fn crash(&self, id: &str, error: Option<Error>) {
        let mut s = self.state();
        let mut actual = s.actual[&id.parse::<WorkspaceId>().unwrap()].1.clone();
        actual.state = ActualState::Crashed;
        (actual.ip, actual.start_id, actual.error) = (None, None, error);
        self.publish(&mut s, actual);
    }

    /// What a workspace sleeps on is gone.
    pub fn memory_lose(&self, id: &str) {
        let (id, mut s) = (id.parse::<WorkspaceId>().unwrap(), self.state());
        s.memory.remove(&id);
        let mut actual = s.actual[&id].1.clone();
        (actual.state, actual.memory) = (ActualState::Failed, false);
        self.publish(&mut s, actual);
    }

    fn publish(&self, s: &mut State, actual: Actual) {
        let seq = *self.seq.borrow() + 1;
        s.actual.insert(actual.workspace.clone(), (seq, actual));
        self.seq.send_replace(seq);
    }

    fn assertion(&self, text: &str) -> api::Result<Assertion> {
        Signed::parse(text)
            .and_then(|s| s.verify(&self.mint_key.public(), context::ASSERTION))
            .map_err(|_| Error::new(ErrorCode::KeyRefused, "no assertion of mint's"))
    }

    fn policy(&self, workspace: &WorkspaceId, text: &str, act: PolicyAct) -> api::Result<Policy> {
        let refused = || Error::new(ErrorCode::KeyRefused, "no policy that allows it");
        let policy: Policy = Signed::parse(text)
            .and_then(|s| s.verify(&self.mint_key.public(), context::POLICY))
            .map_err(|_| refused())?;
        let allows = policy.workspace == *workspace && policy.acts.contains(&act);
        allows.then_some(policy).ok_or_else(refused)
    }

    fn authority(&self, workspace: &WorkspaceId, text: &str) -> api::Result<AccountId> {
        match self.assertion(text) {
            Ok(a) => Ok(a.account),
            Err(_) => self
                .policy(workspace, text, PolicyAct::Expire)
                .map(|p| p.account),
        }
    }

    /// What the KMS would check of a release.
    fn lease_authority(&self, entry: &Entry) -> api::Result<()> {
        let text = entry.authority.as_deref().unwrap();
        let backing = kms::backing_of(&entry.event).unwrap();
        let lease = entry.lease.as_ref().unwrap();
        for o in lease.objects() {
            let own = o.workspace == lease.workspace;
            let may = if own { backing.own } else { backing.source };
            assert!(may.contains(&o.purpose), "{entry:?}");
            assert_eq!(
                o.id.is_none(),
                o.purpose == model::Purpose::Disk,
                "{entry:?}"
            );
        }
        if self.assertion(text).is_ok() {
            return Ok(());
        }
        let act = backing.policy.unwrap();
        self.policy(&lease.workspace, text, act).map(drop)
    }
}

fn owned<'a>(
    s: &'a mut State,
    id: &WorkspaceId,
    by: &Assertion,
) -> api::Result<&'a mut TokenState> {
    let t = s
        .tokens
        .get_mut(id)
        .filter(|t| t.account == by.account && !t.gone);
    t.ok_or_else(not_found)
}

fn parse<T: serde::de::DeserializeOwned>(op: Value) -> T {
    serde_json::from_value(op).unwrap()
}

fn not_found() -> Error {
    Error::new(ErrorCode::NotFound, "unknown")
}
