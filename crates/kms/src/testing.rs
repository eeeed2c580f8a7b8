//! A KMS with a log of its own, and everybody whose word counts for it.
#![allow(clippy::unwrap_used)]

use crate::check::Trust;
use crate::fault::Faults;
use crate::{Kms, Setup};
use api::audit::{Appended, Class, DayKey, Entry, Lease, Phase, Stamped};
use api::context;
use api::kms::{Attestation, Op};
use api::mint::{Assertion, Policy, PolicyAct};
use model::{AccountId, HostId, KeyId, Purpose, StartId, WorkspaceId};
use seal::hpke;
use seal::sign::{Signed, SigningKey};
use serde_json::Value;
use service::clock::Clock;
use service::paths::Paths;
use service::rpc::{Peer, Uids, ok};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tlog::checkpoint::Checkpoint;
use tlog::leaf::{Leaf, Opening, day_of};
use tlog::merkle::{MemoryTree, inclusion_proof};
use tlog::receipt::Receipt;

pub(crate) const NOW_MS: u64 = 1_790_000_000_000;
pub(crate) const MEASUREMENT: &str =
    "abababababababababababababababababababababababababababababababab";

/// An append-only log in memory, with receipts.
pub(crate) struct FakeLog {
    pub(crate) key: SigningKey,
    clock: Clock,
    pub(crate) down: AtomicBool,
    /// While held, entries `kms.release` are told of through `arrived` and not answered.
    pub(crate) hold: tokio::sync::RwLock<()>,
    pub(crate) arrived: tokio::sync::Notify,
    inner: Mutex<LogInner>,
}

#[derive(Default)]
struct LogInner {
    trees: BTreeMap<&'static str, MemoryTree>,
    entries: Vec<(Class, String, Entry)>,
    days: Vec<DayKey>,
    accounts: BTreeMap<AccountId, String>,
}

impl FakeLog {
    fn new(clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            key: SigningKey::from_seed(&[0xa0; 32]),
            clock,
            down: AtomicBool::new(false),
            hold: tokio::sync::RwLock::default(),
            arrived: tokio::sync::Notify::new(),
            inner: Mutex::default(),
        })
    }

    pub(crate) fn append(&self, process: &str, class: Class, entry: Entry) -> Appended {
        let time_ms = self.clock.now_ms();
        let mut log = self.inner.lock().unwrap();
        let stamped = Stamped {
            process: process.into(),
            entry: entry.clone(),
        };
        let opening = Opening {
            salt: [7; 32],
            payload: serde_json::to_vec(&stamped).unwrap(),
        };
        let class_of: tlog::class::Class = class.name().parse().unwrap();
        let leaf = Leaf {
            class: class_of,
            time_ms,
            account_tag: [0; 32],
            account_seq: 0,
            commitment: opening.commitment(),
            day: day_of(time_ms),
            wrap_class: vec![1; 48],
            wrap_account: vec![],
            sealed: vec![0; 64 + opening.payload.len()],
        };
        let leaf = leaf.encode().unwrap();
        let tree = log.trees.entry(class.name()).or_default();
        let index = tree.size();
        tree.append(tlog::merkle::leaf_hash(&leaf));
        let proof = inclusion_proof(index, tree.size(), tree).unwrap();
        let origin = class_of.origin("test").unwrap();
        let note = Checkpoint::new(&origin, tree.size(), tree.root())
            .sign(&self.key)
            .unwrap();
        let receipt = Receipt::new(class_of, index, &leaf, &opening, &proof, &note.encode());
        log.entries.push((class, process.to_owned(), entry));
        Appended {
            index,
            time_ms,
            receipt: Some(serde_json::to_value(receipt).unwrap()),
        }
    }

    pub(crate) fn entries(&self, event: &str) -> Vec<(Class, Entry)> {
        let log = self.inner.lock().unwrap();
        let of = log
            .entries
            .iter()
            .filter(|(_, p, e)| p == "kms" && e.event == event);
        of.map(|(c, _, e)| (*c, e.clone())).collect()
    }

    pub(crate) fn day_key(&self, class: Class, day: u32) -> Option<hpke::PublicKey> {
        let log = self.inner.lock().unwrap();
        let found = log
            .days
            .iter()
            .rev()
            .find(|k| k.class == class && k.day == day)?;
        Some(hpke::PublicKey::from_hex(&found.public).unwrap())
    }

    pub(crate) fn account_key(&self, account: &AccountId) -> Option<String> {
        self.inner.lock().unwrap().accounts.get(account).cloned()
    }

    async fn handle(self: Arc<Self>, op: api::audit::Op) -> api::Result<Value> {
        if self.down.load(Ordering::Acquire) {
            return Err(api::Error::new(api::ErrorCode::AuditUnavailable, "down"));
        }
        match op {
            api::audit::Op::Append { class, entry, .. } => {
                if entry.event == "kms.release" {
                    self.arrived.notify_one();
                    drop(self.hold.read().await);
                }
                ok(&self.append("kms", class, *entry))
            }
            api::audit::Op::DayKeys { keys } => {
                self.inner.lock().unwrap().days.extend(keys);
                ok(&true)
            }
            api::audit::Op::AccountKey { account, public } => {
                self.inner.lock().unwrap().accounts.insert(account, public);
                ok(&true)
            }
        }
    }
}

/// A KMS and its surroundings.
pub(crate) struct World {
    _dir: tempfile::TempDir,
    pub(crate) paths: Paths,
    pub(crate) clock: Clock,
    pub(crate) log: Arc<FakeLog>,
    pub(crate) mint: SigningKey,
    pub(crate) machine: SigningKey,
    pub(crate) kms: Kms,
    _stop: tokio::sync::watch::Sender<bool>,
}

pub(crate) fn account(n: u8) -> AccountId {
    AccountId::from_bytes([n; 8])
}

pub(crate) fn workspace(n: u64) -> WorkspaceId {
    WorkspaceId::from_bytes(n.to_be_bytes())
}

pub(crate) fn host() -> HostId {
    HostId::from_bytes([9; 8])
}

pub(crate) fn peer(process: &str) -> Peer {
    Peer {
        uid: 1,
        process: process.into(),
    }
}

impl World {
    /// An initialised KMS, unsealed by its file.
    pub(crate) async fn new() -> World {
        let world = World::sealed(None).await;
        world.kms.unseal_by_file().await.unwrap();
        world
    }

    pub(crate) async fn sealed(passphrase: Option<&[u8]>) -> World {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let clock = Clock::manual(NOW_MS);
        let log = FakeLog::new(clock.clone());
        let socket = paths.socket("audit-append", "append");
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = service::rpc::bind(&socket).unwrap();
        let me = std::os::unix::fs::MetadataExt::uid(&dir.path().metadata().unwrap());
        let uids = Arc::new(Uids::from_map([("kms".to_owned(), me)].into()));
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let server = Arc::clone(&log);
        tokio::spawn(service::rpc::serve(
            listener,
            uids,
            &["kms"],
            stopped,
            move |_, _, op| Arc::clone(&server).handle(op),
        ));
        crate::init::init(&paths.state("kms"), passphrase, NOW_MS)
            .await
            .unwrap();
        let mint = SigningKey::from_seed(&[0xb0; 32]);
        let machine = SigningKey::from_seed(&[0xc0; 32]);
        let setup = setup(&paths, &log, &clock, &mint, &machine, Faults::default());
        let kms = Kms::open(setup).await.unwrap();
        World {
            _dir: dir,
            paths,
            clock,
            log,
            mint,
            machine,
            kms,
            _stop: stop,
        }
    }

    /// The same KMS after a `kill -9` and a new start; sealed.
    pub(crate) async fn restarted(self, faults: Faults) -> World {
        let setup = setup(
            &self.paths,
            &self.log,
            &self.clock,
            &self.mint,
            &self.machine,
            faults,
        );
        // No close(): nothing of the old process gets to tidy up.
        let kms = Kms::open(setup).await.unwrap();
        World { kms, ..self }
    }

    pub(crate) async fn unsealed(self, faults: Faults) -> World {
        let world = self.restarted(faults).await;
        world.kms.unseal_by_file().await.unwrap();
        world
    }

    pub(crate) async fn call(&self, process: &str, op: Op) -> api::Result<Value> {
        self.kms.handle(peer(process), "req_test".into(), op).await
    }

    pub(crate) fn assertion(&self, account: &AccountId) -> Assertion {
        let now = self.clock.now_ms();
        Assertion {
            account: account.clone(),
            key: KeyId::from_bytes([1; 8]),
            binding: "00".repeat(32),
            iat_ms: now,
            exp_ms: now + 30_000,
            jti: hex::encode(seal::random::bytes::<16>()),
        }
    }

    pub(crate) fn sign_assertion(&self, a: &Assertion) -> String {
        Signed::new(&self.mint, context::ASSERTION, a).to_string()
    }

    pub(crate) fn policy(&self, account: &AccountId, ws: &WorkspaceId, act: PolicyAct) -> String {
        let policy = Policy {
            account: account.clone(),
            key: KeyId::from_bytes([1; 8]),
            workspace: ws.clone(),
            acts: vec![act],
            iat_ms: self.clock.now_ms(),
        };
        Signed::new(&self.mint, context::POLICY, &policy).to_string()
    }

    pub(crate) fn lease(&self, ws: &WorkspaceId) -> Lease {
        Lease {
            workspace: ws.clone(),
            host: host(),
            start_id: StartId::from_bytes(seal::random::bytes()),
            purpose: Purpose::Disk,
            nonce: hex::encode(seal::random::bytes::<32>()),
            exp_ms: self.clock.now_ms() + 60_000,
            config_digest: "cd".repeat(32),
            object: None,
            also: vec![],
        }
    }

    pub(crate) fn intent(&self, event: &str, authority: String, lease: &Lease) -> Entry {
        let mut e = crate::kms::entry(event, Phase::Intent, "req_test", "key_0101010101010101");
        e.subject = Some(lease.workspace.to_string());
        e.authority = Some(authority);
        e.lease = Some(lease.clone());
        e
    }

    /// What control does: the entry, and the receipt for it.
    pub(crate) fn receipt(&self, entry: Entry) -> Value {
        self.log
            .append("control", Class::Host, entry)
            .receipt
            .unwrap()
    }

    pub(crate) fn attestation(&self, lease: &Lease, key: &hpke::SecretKey) -> Attestation {
        Attestation {
            host: lease.host.clone(),
            workspace: lease.workspace.clone(),
            start_id: lease.start_id.clone(),
            purpose: lease.purpose,
            nonce: lease.nonce.clone(),
            hpke_pub: key.public().to_hex(),
            measurement: MEASUREMENT.into(),
            time_ms: self.clock.now_ms(),
        }
    }

    pub(crate) fn attest(&self, a: &Attestation) -> String {
        Signed::new(&self.machine, context::ATTESTATION, a).to_string()
    }

    pub(crate) async fn create(&self, who: &AccountId, ws: &WorkspaceId) -> api::Result<String> {
        let authority = self.sign_assertion(&self.assertion(who));
        let receipt = self.receipt(self.intent("workspace.create", authority, &self.lease(ws)));
        let answer = self
            .call("control", Op::WorkspaceKeyCreate { receipt })
            .await?;
        let made: api::kms::KeyCreated = serde_json::from_value(answer).unwrap();
        Ok(made.identity)
    }

    /// A whole release: answers the grant as the disk process would open it.
    pub(crate) async fn release(
        &self,
        who: &AccountId,
        ws: &WorkspaceId,
    ) -> api::Result<api::kms::Grant> {
        let authority = self.sign_assertion(&self.assertion(who));
        let lease = self.lease(ws);
        let receipt = self.receipt(self.intent("workspace.start", authority, &lease));
        let key = hpke::SecretKey::generate();
        let attestation = self.attest(&self.attestation(&lease, &key));
        let answer = self
            .call(
                "host",
                Op::Release {
                    receipt,
                    attestation,
                },
            )
            .await?;
        let released: api::kms::Released = serde_json::from_value(answer).unwrap();
        Ok(open_grant(&released, &key))
    }

    pub(crate) async fn destroy(&self, who: &AccountId, ws: &WorkspaceId) -> api::Result<String> {
        let authority = self.sign_assertion(&self.assertion(who));
        let op = Op::Destroy {
            workspace: ws.clone(),
            authority,
        };
        let done: api::kms::Destroyed =
            serde_json::from_value(self.call("control", op).await?).unwrap();
        Ok(done.receipt)
    }

    pub(crate) async fn status(&self) -> api::kms::Status {
        serde_json::from_value(self.call("root", Op::Status).await.unwrap()).unwrap()
    }
}

pub(crate) fn open_grant(r: &api::kms::Released, key: &hpke::SecretKey) -> api::kms::Grant {
    use base64::Engine as _;
    let sealed = base64::engine::general_purpose::STANDARD
        .decode(&r.sealed)
        .unwrap();
    let aad = hex::decode(&r.aad).unwrap();
    let clear = hpke::open(key, context::RELEASE.as_bytes(), &aad, &sealed).unwrap();
    serde_json::from_slice(&clear).unwrap()
}

fn setup(
    paths: &Paths,
    log: &FakeLog,
    clock: &Clock,
    mint: &SigningKey,
    machine: &SigningKey,
    faults: Faults,
) -> Setup {
    Setup {
        dir: paths.state("kms"),
        trust: Trust {
            audit: log.key.public(),
            origin: "casemate.local/test/host".into(),
            mint: mint.public(),
            gateway: SigningKey::from_seed(&[0xd0; 32]).public(),
            edge: SigningKey::from_seed(&[0xe0; 32]).public(),
            hosts: [(host(), machine.public())].into(),
            disk_measurements: vec![MEASUREMENT.into()],
        },
        log: service::audit::Log::new(paths),
        clock: clock.clone(),
        faults,
    }
}
