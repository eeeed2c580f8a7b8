//! Mint as its callers see it.
#![allow(clippy::unwrap_used)]

use crate::keys::Keys;
use crate::store::Store;
use crate::{Mint, Setup};
use api::audit::{Appended, Class, Entry, Phase};
use api::mint::{
    AccountMade, Assertion, Changes, Credential, Gateway, GatewayClaims, KeyMade, Op, Policy,
    PolicyAct, Raw, TokenState,
};
use api::{ErrorCode, context};
use model::{AccountId, WorkspaceId};
use proptest::prelude::*;
use seal::sign::{Signed, SigningKey};
use serde_json::Value;
use service::clock::Clock;
use service::paths::Paths;
use service::rpc::{Peer, Uids, ok};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const NOW_MS: u64 = 1_790_000_000_000;

#[derive(Default)]
struct FakeLog {
    entries: Mutex<Vec<(Class, Entry)>>,
    down: AtomicBool,
    heard: tokio::sync::Notify,
}

impl FakeLog {
    async fn handle(self: Arc<Self>, op: api::audit::Op) -> api::Result<Value> {
        if self.down.load(Ordering::Acquire) {
            return Err(api::Error::new(ErrorCode::AuditUnavailable, "down"));
        }
        let api::audit::Op::Append { class, entry, .. } = op else {
            return Err(api::Error::internal("mint only appends"));
        };
        let mut entries = self.entries.lock().unwrap();
        entries.push((class, *entry));
        self.heard.notify_one();
        ok(&Appended {
            index: entries.len() as u64,
            time_ms: 0,
            receipt: None,
        })
    }

    fn of(&self, event: &str) -> Vec<(Class, Entry)> {
        let all = self.entries.lock().unwrap();
        all.iter()
            .filter(|(_, e)| e.event == event)
            .cloned()
            .collect()
    }
}

struct World {
    _dir: tempfile::TempDir,
    paths: Paths,
    clock: Clock,
    log: Arc<FakeLog>,
    kms: SigningKey,
    keys: Keys,
    mint: Mint,
    _stop: tokio::sync::watch::Sender<bool>,
}

/// An account with one key.
struct Client {
    account: AccountId,
    key: KeyMade,
}

impl World {
    async fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let log = Arc::new(FakeLog::default());
        let socket = paths.socket("audit-append", "append");
        std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = service::rpc::bind(&socket).unwrap();
        let me = std::os::unix::fs::MetadataExt::uid(&dir.path().metadata().unwrap());
        let uids = Arc::new(Uids::from_map([("mint".to_owned(), me)].into()));
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let server = Arc::clone(&log);
        tokio::spawn(service::rpc::serve(
            listener,
            uids,
            &["mint"],
            stopped,
            move |_, _, op| Arc::clone(&server).handle(op),
        ));
        let state = paths.state("mint");
        std::fs::create_dir_all(&state).unwrap();
        let keys = Keys::open(&state).unwrap();
        Store::open(&state.join("state.db"), true)
            .await
            .unwrap()
            .close()
            .await;
        let (clock, kms) = (Clock::manual(NOW_MS), SigningKey::from_seed(&[7; 32]));
        let mint = open(&paths, &kms, &clock).await;
        World {
            _dir: dir,
            paths,
            clock,
            log,
            kms,
            keys,
            mint,
            _stop: stop,
        }
    }

    /// The same mint after a `kill -9` and a new start.
    async fn restarted(self) -> World {
        let mint = open(&self.paths, &self.kms, &self.clock).await;
        World { mint, ..self }
    }

    async fn call(&self, process: &str, op: Op) -> api::Result<Value> {
        let peer = Peer {
            uid: 1,
            process: process.into(),
        };
        self.mint.handle(peer, "req_test".into(), op).await
    }

    async fn client(&self) -> Client {
        let made = self
            .call("root", Op::AccountCreate { name: "Ann".into() })
            .await
            .unwrap();
        let AccountMade { account } = serde_json::from_value(made).unwrap();
        let op = Op::KeyCreate {
            account: account.clone(),
            name: "ci".into(),
        };
        let key = serde_json::from_value(self.call("root", op).await.unwrap()).unwrap();
        Client { account, key }
    }

    async fn assert_with(&self, id: &str, secret: &str) -> api::Result<String> {
        let credential = Credential::ApiKey {
            client_id: id.into(),
            client_secret: secret.into(),
        };
        let op = Op::Assert {
            credential,
            binding: "ab".repeat(32),
        };
        Ok(text(self.call("edge", op).await?))
    }

    async fn assertion(&self, c: &Client) -> String {
        self.assert_with(c.key.client_id.as_str(), &c.key.client_secret)
            .await
            .unwrap()
    }

    fn identity(&self, c: &Client, ws: &WorkspaceId) -> String {
        let statement = api::kms::Identity {
            workspace: ws.clone(),
            account: c.account.clone(),
            identity_pub: SigningKey::from_seed(&[9; 32]).public().to_hex(),
            key_version: 1,
        };
        Signed::new(&self.kms, context::IDENTITY, &statement).to_string()
    }

    async fn register(&self, c: &Client, ws: &WorkspaceId) -> api::Result<TokenState> {
        let op = Op::WorkspaceRegister {
            assertion: self.assertion(c).await,
            identity: self.identity(c, ws),
        };
        Ok(self.state(&text(self.call("control", op).await?)))
    }

    fn state(&self, signed: &str) -> TokenState {
        let public = self.keys.sign.public();
        Signed::parse(signed)
            .unwrap()
            .verify(&public, context::TOKEN_STATE)
            .unwrap()
    }

    async fn state_of(&self, ws: &WorkspaceId) -> TokenState {
        let op = Op::TokenState {
            workspace: ws.clone(),
        };
        self.state(&text(self.call("host", op).await.unwrap()))
    }

    async fn gateway(&self, c: &Client, ws: &WorkspaceId, rotate: bool) -> api::Result<Gateway> {
        let assertion = self.assertion(c).await;
        let op = Op::GatewayToken {
            assertion,
            workspace: ws.clone(),
            rotate,
        };
        Ok(serde_json::from_value(self.call("control", op).await?).unwrap())
    }

    async fn changes(&self, since: u64, wait_ms: u64) -> Changes {
        let op = Op::Changes { since, wait_ms };
        serde_json::from_value(self.call("edge", op).await.unwrap()).unwrap()
    }
}

async fn open(paths: &Paths, kms: &SigningKey, clock: &Clock) -> Mint {
    Mint::open(Setup {
        dir: paths.state("mint"),
        kms: kms.public(),
        log: service::audit::Log::new(paths),
        clock: clock.clone(),
    })
    .await
    .unwrap()
}

fn text(v: Value) -> String {
    serde_json::from_value::<api::mint::Signed>(v)
        .unwrap()
        .signed
}

fn ws(n: u64) -> WorkspaceId {
    WorkspaceId::from_bytes(n.to_be_bytes())
}

#[tokio::test]
async fn a_good_credential_is_asserted_for_its_request() {
    let w = World::new().await;
    let c = w.client().await;
    let signed = w.assertion(&c).await;
    let a: Assertion = Signed::parse(signed)
        .unwrap()
        .verify(&w.keys.sign.public(), context::ASSERTION)
        .unwrap();
    assert_eq!((&a.account, &a.key), (&c.account, &c.key.client_id));
    assert_eq!(
        (a.binding.as_str(), a.iat_ms, a.exp_ms),
        (&*"ab".repeat(32), NOW_MS, NOW_MS + 30_000)
    );
    assert_eq!(a.jti.len(), 32);
    for binding in ["", "AB", &"AB".repeat(32), &"ab".repeat(33)] {
        let credential = Credential::ApiKey {
            client_id: c.key.client_id.to_string(),
            client_secret: c.key.client_secret.clone(),
        };
        let op = Op::Assert {
            credential,
            binding: binding.into(),
        };
        assert_eq!(
            w.call("edge", op).await.unwrap_err().code,
            ErrorCode::ValidationError
        );
    }
    // Nothing at rest is of use to a thief of the disk.
    w.mint.close().await;
    let file = std::fs::read(w.paths.state("mint").join("state.db")).unwrap();
    let secret = c.key.client_secret.strip_prefix("sk_").unwrap();
    for needle in [secret.as_bytes(), &hex::decode(secret).unwrap()] {
        assert!(!file.windows(needle.len()).any(|win| win == needle));
    }
}

#[tokio::test]
async fn bad_credentials_look_alike_and_are_logged_within_bounds() {
    let w = World::new().await;
    let (c, other, gone) = (w.client().await, w.client().await, w.client().await);
    w.call(
        "root",
        Op::KeyRevoke {
            key: gone.key.client_id.clone(),
        },
    )
    .await
    .unwrap();
    let (id, secret) = (c.key.client_id.as_str(), c.key.client_secret.as_str());
    let long = "x".repeat(100_000);
    let multibyte = "é".repeat(200);
    let mut answers = Vec::new();
    for (id, secret) in [
        (id, other.key.client_secret.as_str()),
        (id, ""),
        (id, &secret[..66]),
        (id, &format!("{secret} ")),
        (id, &secret.to_uppercase()),
        (id, &long),
        (id, &multibyte),
        ("key_0123456789abcdef", secret),
        ("", secret),
        ("key_0123456789abcdef' OR 1=1 --", secret),
        (gone.key.client_id.as_str(), gone.key.client_secret.as_str()),
    ] {
        answers.push(w.assert_with(id, secret).await.unwrap_err());
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(answers[0].code, ErrorCode::Unauthorized);
    let bearer = Op::Assert {
        credential: Credential::Bearer {
            token: "eyJ".into(),
        },
        binding: "ab".repeat(32),
    };
    let e = w.call("edge", bearer).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::Unauthorized);
    assert!(e.message.contains("X-Client-ID"));
    for _ in 0..1_000 {
        assert!(w.assert_with(id, "wrong").await.is_err());
    }
    w.clock.set_ms(NOW_MS + 1_000);
    assert!(w.assert_with(id, "wrong").await.is_err());
    // Ten of this key, few of ids that do not exist, and one that tells of the rest.
    let told = async {
        loop {
            let last = w.log.of("mint.refused").pop();
            if let Some((class, e)) = last.filter(|(_, e)| e.data["unlogged_before"] != 0) {
                break (class, e);
            }
            w.log.heard.notified().await;
        }
    };
    let (class, e) = tokio::time::timeout(std::time::Duration::from_secs(10), told)
        .await
        .unwrap();
    assert_eq!((class, e.subject.as_deref()), (Class::Security, Some(id)));
    assert_eq!(e.data["unlogged_before"], 997);
    assert!(w.log.of("mint.refused").len() <= 20);
    let all = format!("{:?}", w.log.entries.lock().unwrap());
    assert!(!all.contains("sk_"));
}

#[tokio::test]
async fn a_revoked_key_ends_at_once_and_for_good() {
    let w = World::new().await;
    let c = w.client().await;
    let held = w.assertion(&c).await;
    w.register(&c, &ws(1)).await.unwrap();
    // A closing act: without the log, too.
    w.log.down.store(true, Ordering::Release);
    w.call(
        "root",
        Op::KeyRevoke {
            key: c.key.client_id.clone(),
        },
    )
    .await
    .unwrap();
    let (id, secret) = (c.key.client_id.to_string(), c.key.client_secret.clone());
    assert!(w.assert_with(&id, &secret).await.is_err());
    w.log.down.store(false, Ordering::Release);
    let op = Op::GatewayToken {
        assertion: held,
        workspace: ws(1),
        rotate: false,
    };
    assert_eq!(
        w.call("control", op).await.unwrap_err().code,
        ErrorCode::Unauthorized
    );
    let w = w.restarted().await;
    assert!(w.assert_with(&id, &secret).await.is_err());
    assert!(w.log.of("mint.key_revoke").is_empty());
    w.mint.outbox_drain().await.unwrap();
    assert_eq!(w.log.of("mint.key_revoke").len(), 1);
    w.mint.outbox_drain().await.unwrap();
    assert_eq!(w.log.of("mint.key_revoke").len(), 1);
}

#[tokio::test]
async fn i22_only_the_owner_and_only_by_a_real_assertion() {
    let w = World::new().await;
    let (c, stranger) = (w.client().await, w.client().await);
    w.register(&c, &ws(1)).await.unwrap();
    let forged = Signed::new(&w.kms, context::ASSERTION, &serde_json::json!({})).to_string();
    let payload: Assertion = Signed::parse(w.assertion(&c).await)
        .unwrap()
        .verify(&w.keys.sign.public(), context::ASSERTION)
        .unwrap();
    let other_kind = Signed::new(&w.keys.sign, context::TOKEN_STATE, &payload).to_string();
    let other_key = Signed::new(&w.kms, context::ASSERTION, &payload).to_string();
    let theirs = w.assertion(&stranger).await;
    let acts = || vec![PolicyAct::Restart];
    let ops = |a: &str, id: u64| {
        let (a, workspace) = (a.to_owned(), ws(id));
        vec![
            Op::GatewayToken {
                assertion: a.clone(),
                workspace: workspace.clone(),
                rotate: true,
            },
            Op::RuntimeEnable {
                assertion: a.clone(),
                workspace: workspace.clone(),
                enabled: true,
            },
            Op::RawToken {
                assertion: a.clone(),
                workspace: workspace.clone(),
                rotate: true,
            },
            Op::PolicySign {
                assertion: a.clone(),
                workspace: workspace.clone(),
                acts: acts(),
            },
            Op::WorkspaceForget {
                authority: a,
                workspace,
            },
        ]
    };
    for bad in ["", "x", &forged, &other_kind, &other_key] {
        for op in ops(bad, 1) {
            assert_eq!(
                w.call("control", op).await.unwrap_err().code,
                ErrorCode::KeyRefused
            );
        }
    }
    // Another's and none: the same answer.
    for (theirs, none) in ops(&theirs, 1).into_iter().zip(ops(&theirs, 2)) {
        let a = w.call("control", theirs).await.unwrap_err();
        let b = w.call("control", none).await.unwrap_err();
        assert_eq!(a, b);
        assert_eq!(a.code, ErrorCode::NotFound);
    }
    let state = w.state_of(&ws(1)).await;
    assert_eq!((state.epoch, state.enabled, state.gone), (1, false, false));
    // Its time is over.
    let late = w.assertion(&c).await;
    w.clock.set_ms(NOW_MS + 30_000);
    for op in ops(&late, 1).into_iter().take(4) {
        assert_eq!(
            w.call("control", op).await.unwrap_err().code,
            ErrorCode::Unavailable
        );
    }
}

#[tokio::test]
async fn registration_needs_the_kms_and_happens_once() {
    let w = World::new().await;
    let (c, other) = (w.client().await, w.client().await);
    let state = w.register(&c, &ws(1)).await.unwrap();
    assert_eq!((state.epoch, state.enabled, state.seq), (1, false, 1));
    assert_eq!(w.register(&c, &ws(1)).await.unwrap(), state);
    let mut forged = w.identity(&c, &ws(2));
    forged = forged.replace("v1.", "v1.0");
    let by_mint = Signed::new(&w.keys.sign, context::IDENTITY, &state).to_string();
    for (who, identity, code) in [
        (&c, forged, ErrorCode::KeyRefused),
        (&c, by_mint, ErrorCode::KeyRefused),
        (&other, w.identity(&c, &ws(2)), ErrorCode::NotFound),
        (&other, w.identity(&other, &ws(1)), ErrorCode::Conflict),
    ] {
        let op = Op::WorkspaceRegister {
            assertion: w.assertion(who).await,
            identity,
        };
        assert_eq!(w.call("control", op).await.unwrap_err().code, code);
    }
    let forget = Op::WorkspaceForget {
        authority: w.assertion(&c).await,
        workspace: ws(1),
    };
    w.call("control", forget).await.unwrap();
    assert_eq!(
        w.register(&c, &ws(1)).await.unwrap_err().code,
        ErrorCode::Conflict
    );
}

#[tokio::test]
async fn gateway_tokens_verify_and_end_with_their_epoch() {
    let w = World::new().await;
    let c = w.client().await;
    w.register(&c, &ws(1)).await.unwrap();
    let one = w.gateway(&c, &ws(1), false).await.unwrap();
    let verify = |g: &Gateway, aud: &WorkspaceId| {
        let keys = [w.keys.gateway.public()];
        seal::jwt::verify::<GatewayClaims>(&g.token, &keys, aud.as_str(), w.clock.now_s())
    };
    let claims = verify(&one, &ws(1)).unwrap();
    assert_eq!((claims.epoch, claims.exp - claims.iat), (1, 3_600));
    assert_eq!(
        (claims.iss.as_str(), claims.sub),
        ("casemate", c.account.to_string())
    );
    assert!(verify(&one, &ws(2)).is_err());
    let two = w.gateway(&c, &ws(1), true).await.unwrap();
    assert_eq!(verify(&two, &ws(1)).unwrap().epoch, 2);
    assert!(
        claims.epoch < w.state(&two.state).epoch,
        "the first one is revoked"
    );
    assert_ne!(verify(&two, &ws(1)).unwrap().jti, claims.jti);
    // Without the log no token is made, and no epoch raised.
    let assertion = w.assertion(&c).await;
    w.log.down.store(true, Ordering::Release);
    for rotate in [false, true] {
        let op = Op::GatewayToken {
            assertion: assertion.clone(),
            workspace: ws(1),
            rotate,
        };
        assert_eq!(
            w.call("control", op).await.unwrap_err().code,
            ErrorCode::AuditUnavailable
        );
    }
    assert_eq!(w.state_of(&ws(1)).await.epoch, 2);
    // Disabling is a closing act, and revokes; enabling is not one.
    let enable = |enabled| Op::RuntimeEnable {
        assertion: assertion.clone(),
        workspace: ws(1),
        enabled,
    };
    assert!(w.call("control", enable(true)).await.is_err());
    w.log.down.store(false, Ordering::Release);
    w.call("control", enable(true)).await.unwrap();
    w.log.down.store(true, Ordering::Release);
    w.call("control", enable(false)).await.unwrap();
    let state = w.state_of(&ws(1)).await;
    assert_eq!((state.epoch, state.enabled), (3, false));
    let w = w.restarted().await;
    assert_eq!(w.state_of(&ws(1)).await, state);
}

#[tokio::test]
async fn raw_tokens_rotate_and_each_reading_is_logged() {
    let w = World::new().await;
    let c = w.client().await;
    w.register(&c, &ws(1)).await.unwrap();
    let raw = async |rotate| {
        let op = Op::RawToken {
            assertion: w.assertion(&c).await,
            workspace: ws(1),
            rotate,
        };
        let raw: Raw = serde_json::from_value(w.call("control", op).await.unwrap()).unwrap();
        (w.state(&raw.state), raw.token)
    };
    let hash = |t: &str| hex::encode(seal::hash::sha256(t.as_bytes()));
    let (state, one) = raw(false).await;
    assert_eq!(state.raw_hash, hash(&one));
    assert_eq!(raw(false).await.1, one);
    let (state, two) = raw(true).await;
    assert_ne!(one, two);
    assert_eq!(state.raw_hash, hash(&two));
    assert_eq!(w.log.of("mint.raw_read").len(), 2);
    assert_eq!(w.log.of("mint.raw_rotate").len(), 1);
    w.mint.close().await;
    let file = std::fs::read(w.paths.state("mint").join("state.db")).unwrap();
    for needle in [two.as_bytes(), &hex::decode(&two).unwrap()] {
        assert!(!file.windows(needle.len()).any(|win| win == needle));
    }
}

#[tokio::test]
async fn policies_say_what_was_asked_and_let_a_workspace_expire() {
    let w = World::new().await;
    let c = w.client().await;
    w.register(&c, &ws(1)).await.unwrap();
    w.register(&c, &ws(2)).await.unwrap();
    let sign = async |acts: Vec<PolicyAct>| {
        let op = Op::PolicySign {
            assertion: w.assertion(&c).await,
            workspace: ws(1),
            acts,
        };
        w.call("control", op).await.map(text)
    };
    assert!(sign(vec![]).await.is_err());
    assert!(sign(vec![PolicyAct::Restart; 9]).await.is_err());
    let restart = sign(vec![PolicyAct::Restart, PolicyAct::Restart])
        .await
        .unwrap();
    let expire = sign(vec![PolicyAct::Expire]).await.unwrap();
    let policy: Policy = Signed::parse(restart.clone())
        .unwrap()
        .verify(&w.keys.sign.public(), context::POLICY)
        .unwrap();
    assert_eq!(
        (policy.workspace, policy.acts),
        (ws(1), vec![PolicyAct::Restart])
    );
    let forget = |authority: &str, n| Op::WorkspaceForget {
        authority: authority.to_owned(),
        workspace: ws(n),
    };
    assert!(w.call("control", forget(&restart, 1)).await.is_err());
    assert!(w.call("control", forget(&expire, 2)).await.is_err());
    w.log.down.store(true, Ordering::Release);
    w.call("control", forget(&expire, 1)).await.unwrap();
    w.call("control", forget(&expire, 1)).await.unwrap();
    let state = w.state_of(&ws(1)).await;
    assert!(state.gone && !state.enabled && state.epoch == 2);
    w.log.down.store(false, Ordering::Release);
    w.mint.outbox_drain().await.unwrap();
    assert_eq!(w.log.of("mint.workspace_forget").len(), 1);
    assert_eq!(
        w.gateway(&c, &ws(1), false).await.err().unwrap().code,
        ErrorCode::NotFound
    );
}

#[tokio::test]
async fn followers_hear_of_each_change_in_order() {
    let w = Arc::new(World::new().await);
    let c = w.client().await;
    for n in 1..=3 {
        w.register(&c, &ws(n)).await.unwrap();
    }
    let all = w.changes(0, 0).await;
    assert_eq!((all.seq, all.states.len()), (3, 3));
    assert!(w.changes(3, 0).await.states.is_empty());
    // A waiting follower is woken by the change itself.
    let waiting = {
        let w = Arc::clone(&w);
        tokio::spawn(async move { w.changes(3, u64::MAX).await })
    };
    tokio::task::yield_now().await;
    w.gateway(&c, &ws(2), true).await.unwrap();
    let news = waiting.await.unwrap();
    assert_eq!(news.seq, 4);
    let state = w.state(&news.states[0]);
    assert_eq!((state.workspace, state.epoch), (ws(2), 2));
    // One that comes from a future that was undone starts over.
    assert_eq!(w.changes(99, 0).await.states.len(), 3);
    // A stop lets waiting followers go.
    let waiting = {
        let w = Arc::clone(&w);
        tokio::spawn(async move { w.changes(4, u64::MAX).await })
    };
    tokio::task::yield_now().await;
    w.mint.stop();
    assert_eq!(waiting.await.unwrap().seq, 4);
}

#[tokio::test]
async fn each_operation_has_its_caller() {
    let w = World::new().await;
    let ops = || -> Vec<(Op, &[&str])> {
        let (a, workspace) = (String::new, || ws(1));
        let credential = Credential::Bearer { token: a() };
        vec![
            (
                Op::Assert {
                    credential,
                    binding: a(),
                },
                &["edge"],
            ),
            (
                Op::WorkspaceRegister {
                    assertion: a(),
                    identity: a(),
                },
                &["control"],
            ),
            (
                Op::WorkspaceForget {
                    authority: a(),
                    workspace: workspace(),
                },
                &["control"],
            ),
            (
                Op::GatewayToken {
                    assertion: a(),
                    workspace: workspace(),
                    rotate: false,
                },
                &["control"],
            ),
            (
                Op::RuntimeEnable {
                    assertion: a(),
                    workspace: workspace(),
                    enabled: true,
                },
                &["control"],
            ),
            (
                Op::RawToken {
                    assertion: a(),
                    workspace: workspace(),
                    rotate: true,
                },
                &["control"],
            ),
            (
                Op::TokenState {
                    workspace: workspace(),
                },
                &["control", "host", "edge", "root"],
            ),
            (
                Op::Changes {
                    since: 0,
                    wait_ms: 0,
                },
                &["edge"],
            ),
            (
                Op::PolicySign {
                    assertion: a(),
                    workspace: workspace(),
                    acts: vec![],
                },
                &["control"],
            ),
            (Op::AccountCreate { name: a() }, &["root"]),
            (
                Op::KeyCreate {
                    account: AccountId::from_bytes([1; 8]),
                    name: a(),
                },
                &["root"],
            ),
            (
                Op::KeyRevoke {
                    key: model::KeyId::from_bytes([1; 8]),
                },
                &["root"],
            ),
        ]
    };
    for who in ["edge", "control", "host", "root", "kms", "audit-read", ""] {
        for (op, allowed) in ops() {
            let name = format!("{op:?}");
            let forbidden = w
                .call(who, op)
                .await
                .is_err_and(|e| e.code == ErrorCode::Forbidden);
            assert_eq!(forbidden, !allowed.contains(&who), "{who} {name}");
        }
    }
}

#[tokio::test]
async fn every_change_has_its_intent_before_it() {
    let w = World::new().await;
    w.log.down.store(true, Ordering::Release);
    let create = || Op::AccountCreate { name: "Ann".into() };
    assert_eq!(
        w.call("root", create()).await.unwrap_err().code,
        ErrorCode::AuditUnavailable
    );
    w.log.down.store(false, Ordering::Release);
    let c = w.client().await;
    w.register(&c, &ws(1)).await.unwrap();
    w.gateway(&c, &ws(1), true).await.unwrap();
    for event in [
        "mint.account_create",
        "mint.key_create",
        "mint.workspace_register",
        "mint.gateway_rotate",
        "mint.gateway_token",
    ] {
        let found = w.log.of(event);
        assert_eq!(found.len(), 1, "{event}");
        assert_eq!((found[0].0, found[0].1.phase), (Class::Host, Phase::Intent));
        assert_eq!(found[0].1.account, Some(c.account.clone()));
    }
    for name in ["", &"n".repeat(256), "a\nb"] {
        let op = Op::AccountCreate { name: name.into() };
        assert_eq!(
            w.call("root", op).await.unwrap_err().code,
            ErrorCode::ValidationError
        );
    }
}

#[test]
fn secrets_do_not_show() {
    let op = Op::Assert {
        credential: Credential::ApiKey {
            client_id: "key_1".into(),
            client_secret: "canary".into(),
        },
        binding: String::new(),
    };
    assert!(!format!("{op:?}").contains("canary"));
}

proptest! {
    /// Whatever arrives as a request is an operation or an error, never a panic.
    #[test]
    fn requests_parse_or_not(text in r#"\{"op":"[a-z_]{0,20}"(,"[a-z_]{1,12}":("[ -~]{0,20}"|[0-9]{1,9}|true|null|\[\]|\{\})){0,4}\}"#) {
        let _ = serde_json::from_str::<Op>(&text);
    }
}
