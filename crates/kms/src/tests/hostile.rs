//! 10,000 mutated, replayed and reordered requests: no release, each one flagged.
use super::*;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// A good release request and its parts.
struct Good {
    receipt: Value,
    attestation: String,
}

fn good(w: &World, who: &model::AccountId, ws: &model::WorkspaceId) -> Good {
    let lease = w.lease(ws);
    let authority = w.sign_assertion(&w.assertion(who));
    let receipt = w.receipt(w.intent("workspace.start", authority, &lease));
    let attestation = w.attest(&w.attestation(&lease, &hpke::SecretKey::generate()));
    Good {
        receipt,
        attestation,
    }
}

/// What a hostile caller may do with good requests.
#[derive(Debug, Clone)]
enum Mutation {
    /// Flip a character of a field of the receipt.
    Receipt(usize, prop::sample::Index, u8),
    /// Another index.
    Index(u64),
    /// Flip a character of the attestation.
    Attestation(prop::sample::Index, u8),
    /// Cut the attestation.
    Cut(prop::sample::Index),
    /// A good receipt with another good request's attestation.
    Swap,
    /// A field gone or another type.
    Shape(usize, bool),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (0usize..5, any::<prop::sample::Index>(), 1u8..95)
            .prop_map(|(f, at, by)| Mutation::Receipt(f, at, by)),
        1 => any::<u64>().prop_map(Mutation::Index),
        4 => (any::<prop::sample::Index>(), 1u8..95)
            .prop_map(|(at, by)| Mutation::Attestation(at, by)),
        1 => any::<prop::sample::Index>().prop_map(Mutation::Cut),
        1 => Just(Mutation::Swap),
        1 => (0usize..6, any::<bool>()).prop_map(|(f, gone)| Mutation::Shape(f, gone)),
    ]
}

/// Another printable ASCII character at `at`.
fn flip(text: &str, at: prop::sample::Index, by: u8) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let n = at.index(bytes.len());
    bytes[n] = (bytes[n].wrapping_sub(32).wrapping_add(by)) % 95 + 32;
    String::from_utf8(bytes).unwrap_or_default()
}

impl Mutation {
    fn apply(&self, a: &Good, b: &Good) -> (Value, String) {
        const FIELDS: [&str; 6] = ["log", "leaf", "checkpoint", "opening", "proof", "index"];
        let (mut receipt, mut attestation) = (a.receipt.clone(), a.attestation.clone());
        let edit = |v: &mut Value, at, by| {
            let new = flip(v.as_str().unwrap(), at, by);
            *v = Value::String(new);
        };
        match self {
            Self::Receipt(3, at, by) => edit(&mut receipt["opening"]["payload"], *at, *by),
            Self::Receipt(4, at, by) => {
                let proof = receipt["proof"].as_array_mut().unwrap();
                let n = at.index(proof.len());
                edit(&mut proof[n], *at, *by);
            }
            Self::Receipt(f, at, by) => edit(&mut receipt[FIELDS[*f]], *at, *by),
            Self::Index(n) => receipt["index"] = (*n).into(),
            Self::Attestation(at, by) => attestation = flip(&attestation, *at, *by),
            Self::Cut(at) => attestation.truncate(at.index(attestation.len())),
            Self::Swap => attestation.clone_from(&b.attestation),
            Self::Shape(f, true) => {
                receipt.as_object_mut().unwrap().remove(FIELDS[*f]);
            }
            Self::Shape(f, false) => receipt[FIELDS[*f]] = Value::Bool(true),
        }
        (receipt, attestation)
    }
}

#[tokio::test]
async fn i4_ten_thousand_hostile_requests_release_nothing() {
    const MUTATED: u32 = 9_000;
    const REPLAYED: u64 = 1_000;
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let (a, b) = (good(&w, &me, &ws), good(&w, &me, &ws));
    let mut runner = TestRunner::default();
    let mut sent = 0;
    while sent < MUTATED {
        let m = mutation().new_tree(&mut runner).unwrap().current();
        let (receipt, attestation) = m.apply(&a, &b);
        if (&receipt, &attestation) == (&a.receipt, &a.attestation) {
            continue;
        }
        sent += 1;
        let op = Op::Release {
            receipt,
            attestation,
        };
        assert!(w.call("host", op).await.is_err(), "{m:?}");
    }
    assert_eq!(w.status().await.releases, 0);
    assert_eq!(w.status().await.refusals, u64::from(MUTATED));
    // Untouched, the same requests are good: the mutations above were not refused for nothing.
    for g in [&a, &b] {
        let op = Op::Release {
            receipt: g.receipt.clone(),
            attestation: g.attestation.clone(),
        };
        w.call("host", op).await.unwrap();
    }
    // And used up: again, and crossed over.
    for n in 0..REPLAYED {
        let (r, t) = [(&a, &a), (&b, &b), (&a, &b), (&b, &a)][usize::try_from(n % 4).unwrap()];
        let op = Op::Release {
            receipt: r.receipt.clone(),
            attestation: t.attestation.clone(),
        };
        assert!(w.call("host", op).await.is_err());
    }
    let status = w.status().await;
    assert_eq!(
        (status.releases, status.refusals),
        (2, u64::from(MUTATED) + REPLAYED)
    );
    let flagged = w.log.entries("kms.refused");
    assert_eq!(flagged.len() as u64, status.refusals);
    assert!(flagged.iter().all(|(class, _)| *class == Class::Security));
}

/// Each single thing that can be wrong in a request all of whose signatures are good.
#[tokio::test]
async fn well_signed_lies_are_refused_by_name() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&account(2), &workspace(2)).await.unwrap();
    let now = w.clock.now_ms();
    type Change<'a> = Box<dyn Fn(&mut Parts) + 'a>;
    struct Parts {
        process: &'static str,
        class: Class,
        entry: api::audit::Entry,
        assertion: api::mint::Assertion,
        lease: api::audit::Lease,
        attestation: api::kms::Attestation,
        machine: seal::sign::SigningKey,
        mint: seal::sign::SigningKey,
        bare: bool,
    }
    let other = seal::sign::SigningKey::generate();
    let cases: Vec<(Refusal, Change<'_>)> = vec![
        (Refusal::Writer, Box::new(|p| p.process = "host")),
        (Refusal::Writer, Box::new(|p| p.process = "kms")),
        (Refusal::Receipt, Box::new(|p| p.class = Class::Api)),
        (
            Refusal::Intent,
            Box::new(|p| p.entry.phase = Phase::Outcome),
        ),
        (
            Refusal::AuthorityAct,
            Box::new(|p| p.entry.event = "workspace.delete".into()),
        ),
        (
            Refusal::AuthorityAct,
            Box::new(|p| p.entry.event = "workspace.stop".into()),
        ),
        (Refusal::Lease, Box::new(|p| p.bare = true)),
        (
            Refusal::Lease,
            Box::new(|p| p.entry.subject = Some(workspace(2).to_string())),
        ),
        (
            Refusal::Lease,
            Box::new(|p| p.lease.nonce = "AB".repeat(32)),
        ),
        (
            Refusal::Lease,
            Box::new(|p| p.lease.config_digest = "../x".into()),
        ),
        (Refusal::LeaseTime, Box::new(|p| p.lease.exp_ms = now)),
        (
            Refusal::LeaseTime,
            Box::new(|p| p.lease.exp_ms = now + 60_001),
        ),
        (Refusal::LeaseTime, Box::new(|p| p.lease.exp_ms = u64::MAX)),
        (Refusal::Authority, Box::new(|p| p.mint = other.clone())),
        (
            Refusal::Authority,
            Box::new(|p| p.assertion.exp_ms = p.assertion.iat_ms + 30_001),
        ),
        (
            Refusal::Authority,
            Box::new(|p| p.assertion.exp_ms = p.assertion.iat_ms - 1),
        ),
        (
            Refusal::Authority,
            Box::new(|p| p.assertion.binding = "0".into()),
        ),
        (
            Refusal::AuthorityTime,
            Box::new(|p| {
                p.assertion.iat_ms -= 60_000;
                p.assertion.exp_ms -= 60_000;
            }),
        ),
        (
            Refusal::AuthorityTime,
            Box::new(|p| {
                p.assertion.iat_ms += 60_000;
                p.assertion.exp_ms += 60_000;
            }),
        ),
        (
            Refusal::Account,
            Box::new(|p| p.entry.account = Some(account(2))),
        ),
        (
            Refusal::Account,
            Box::new(|p| p.assertion.account = account(2)),
        ),
        (
            Refusal::Attestation,
            Box::new(|p| p.machine = other.clone()),
        ),
        (
            Refusal::Attestation,
            Box::new(|p| {
                p.lease.host = model::HostId::from_bytes([8; 8]);
                p.attestation.host = p.lease.host.clone();
            }),
        ),
        (
            Refusal::Attestation,
            Box::new(|p| p.attestation.hpke_pub = "00".repeat(32)),
        ),
        (
            Refusal::AttestationLease,
            Box::new(|p| p.attestation.workspace = workspace(2)),
        ),
        (
            Refusal::AttestationLease,
            Box::new(|p| {
                p.attestation.start_id = model::StartId::from_bytes([1; 8]);
            }),
        ),
        (
            Refusal::AttestationLease,
            Box::new(|p| p.attestation.nonce = "ab".repeat(32)),
        ),
        (
            Refusal::AttestationLease,
            Box::new(|p| {
                p.attestation.host = model::HostId::from_bytes([8; 8]);
            }),
        ),
        (
            Refusal::AttestationTime,
            Box::new(|p| p.attestation.time_ms = now - 6_000),
        ),
        (
            Refusal::AttestationTime,
            Box::new(|p| p.attestation.time_ms = now + 6_000),
        ),
        (
            Refusal::Measurement,
            Box::new(|p| p.attestation.measurement = "00".repeat(32)),
        ),
        (
            Refusal::Unknown,
            Box::new(|p| {
                p.lease.workspace = workspace(7);
                p.attestation.workspace = workspace(7);
                p.entry.subject = None;
            }),
        ),
    ];
    for (n, (why, change)) in cases.iter().enumerate() {
        let lease = w.lease(&ws);
        let mut p = Parts {
            process: "control",
            class: Class::Host,
            entry: w.intent("workspace.start", String::new(), &lease),
            assertion: w.assertion(&me),
            attestation: w.attestation(&lease, &hpke::SecretKey::generate()),
            lease,
            machine: w.machine.clone(),
            mint: w.mint.clone(),
            bare: false,
        };
        change(&mut p);
        let signed = Signed::new(&p.mint, context::ASSERTION, &p.assertion);
        p.entry.authority = Some(signed.to_string());
        p.entry.lease = (!p.bare).then_some(p.lease);
        let receipt = w.log.append(p.process, p.class, p.entry).receipt.unwrap();
        let attestation = Signed::new(&p.machine, context::ATTESTATION, &p.attestation).to_string();
        assert!(
            w.call(
                "host",
                Op::Release {
                    receipt,
                    attestation
                }
            )
            .await
            .is_err(),
            "case {n}"
        );
        let (_, flagged) = w.log.entries("kms.refused").pop().unwrap();
        assert_eq!(flagged.result.as_deref(), Some(why.code()), "case {n}");
    }
    assert_eq!(w.status().await.releases, 0);
    assert_eq!(w.log.entries("kms.refused").len(), cases.len());
}

#[tokio::test]
async fn one_assertion_opens_one_workspace() {
    let w = World::new().await;
    let me = account(1);
    w.create(&me, &workspace(1)).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let authority = w.sign_assertion(&w.assertion(&me));
    let attempt = async |n: u64| {
        let lease = w.lease(&workspace(n));
        let receipt = w.receipt(w.intent("workspace.start", authority.clone(), &lease));
        let attestation = w.attest(&w.attestation(&lease, &hpke::SecretKey::generate()));
        w.call(
            "host",
            Op::Release {
                receipt,
                attestation,
            },
        )
        .await
    };
    attempt(1).await.unwrap();
    attempt(1).await.unwrap();
    let e = attempt(2).await.unwrap_err();
    assert_eq!(e.detail.as_deref(), Some(Refusal::AuthorityUsed.code()));
}

#[test]
fn wire_requests_are_closed() {
    for bad in [
        r#"{"op":"release"}"#,
        r#"{"op":"release","receipt":{},"attestation":1}"#,
        r#"{"op":"key_export","workspace":"ws_0000000000000001"}"#,
        r#"{"op":"destroy","workspace":"ws_../../../../etc","authority":""}"#,
        r#"{"op":"log_open","class":"root","day":1,"wraps":[],"reason":""}"#,
        r#"{"op":"log_open","class":"api","day":-1,"wraps":[],"reason":""}"#,
        r#"{"op":"rotate","op":"status"}"#,
    ] {
        assert!(serde_json::from_str::<Op>(bad).is_err(), "{bad}");
    }
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        "[ -~]{0,40}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let key = prop_oneof![
            Just("log"),
            Just("index"),
            Just("leaf"),
            Just("opening"),
            Just("salt"),
            Just("payload"),
            Just("proof"),
            Just("checkpoint"),
            Just("x"),
        ];
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::vec((key, inner), 0..8)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
        ]
    })
}

proptest! {
    /// Whatever arrives is refused or no request at all; nothing panics.
    #[test]
    fn garbage_is_refused(receipt in json(), attestation in "[ -~]{0,80}", op in json()) {
        let key = |n| seal::sign::SigningKey::from_seed(&[n; 32]).public();
        let trust = crate::check::Trust {
            audit: key(1),
            origin: "casemate.local/test/host".into(),
            mint: key(2),
            gateway: key(3),
            edge: key(4),
            hosts: [].into(),
            disk_measurements: vec![],
        };
        let ws = workspace(1);
        prop_assert!(crate::check::release(&trust, &receipt, &attestation, 0, 1).is_err());
        prop_assert!(crate::check::create(&trust, &receipt, 1).is_err());
        prop_assert!(crate::check::destroy(&trust, &ws, &attestation, 1).is_err());
        prop_assert!(serde_json::from_value::<Op>(op).is_err());
    }
}
