//! The KMS as its callers see it.
#![allow(clippy::unwrap_used)]

use crate::check::Refusal;
use crate::fault::{Faults, Step};
use crate::keyring::{Key, Place, epoch_root};
use crate::testing::{World, account, workspace};
use api::audit::{Class, Phase};
use api::kms::{Anchor, AnchorStatement, Erasure, Identity, Op};
use api::mint::PolicyAct;
use api::{ErrorCode, context};
use seal::hpke;
use seal::sign::{Signed, VerifyingKey};
use serde_json::Value;
use std::sync::atomic::Ordering;

mod anchor;
mod crash;
mod erase;
mod hostile;
mod image;
mod purposes;

async fn kms_pub(world: &World) -> VerifyingKey {
    let state = world.kms.inner().store.state().await.unwrap().unwrap();
    VerifyingKey::from_hex(&state.sign_pub).unwrap()
}

#[tokio::test]
async fn a_key_is_made_released_and_stays_the_same() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    let statement = w.create(&me, &ws).await.unwrap();
    let identity: Identity = Signed::parse(statement)
        .unwrap()
        .verify(&kms_pub(&w).await, context::IDENTITY)
        .unwrap();
    assert_eq!((&identity.workspace, &identity.account), (&ws, &me));
    let first = w.release(&me, &ws).await.unwrap();
    let seed: [u8; 32] = hex::decode(&first.identity_seed)
        .unwrap()
        .try_into()
        .unwrap();
    let guest = seal::sign::SigningKey::from_seed(&seed);
    assert_eq!(guest.public().to_hex(), identity.identity_pub);
    assert_ne!(first.disk_key, first.identity_seed);
    // Created again: the same key. Rotated: the same key. Restarted: the same key.
    w.create(&me, &ws).await.unwrap();
    w.call("root", Op::Rotate).await.unwrap();
    assert_eq!(w.status().await.epoch, 2);
    let w = w.unsealed(Faults::default()).await;
    let again = w.release(&me, &ws).await.unwrap();
    assert_eq!(again.disk_key, first.disk_key);
    assert_eq!(again.identity_seed, first.identity_seed);
    // Another workspace of the same account: another key.
    w.create(&me, &workspace(2)).await.unwrap();
    assert_ne!(
        w.release(&me, &workspace(2)).await.unwrap().disk_key,
        first.disk_key
    );
}

#[tokio::test]
async fn every_answer_has_its_entry() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.release(&me, &ws).await.unwrap();
    w.call("root", Op::Rotate).await.unwrap();
    w.destroy(&me, &ws).await.unwrap();
    for (event, n) in [
        ("kms.unseal", 1),
        ("kms.key_create", 1),
        ("kms.release", 1),
        ("kms.rotate", 2),
        ("kms.destroy", 2),
        ("kms.refused", 0),
    ] {
        let entries = w.log.entries(event);
        assert_eq!(entries.len(), n, "{event}");
        assert!(entries.iter().all(|(class, _)| *class == Class::Host));
    }
    let (_, release) = w.log.entries("kms.release").pop().unwrap();
    assert_eq!(release.phase, Phase::Intent);
    assert_eq!(release.account, Some(me.clone()));
    assert!(w.log.account_key(&me).is_some());
}

#[tokio::test]
async fn i3_without_the_log_nothing_is_released_and_deletion_goes_on() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.log.down.store(true, Ordering::Release);
    let e = w.release(&me, &ws).await.err().unwrap();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    let e = w.create(&me, &workspace(2)).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    let e = w.call("root", Op::Rotate).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::AuditUnavailable);
    assert_eq!(w.status().await.releases, 0);
    // A closing act goes ahead, also over a restart of the KMS, and is told later.
    w.destroy(&me, &ws).await.unwrap();
    assert!(w.log.entries("kms.destroy").is_empty());
    assert!(w.kms.converge().await.is_err());
    let w = w.restarted(Faults::default()).await;
    w.log.down.store(false, Ordering::Release);
    w.kms.converge().await.unwrap();
    let told = w.log.entries("kms.destroy");
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].1.phase, Phase::Intent);
    assert!(told[0].1.authority.is_some());
    assert_eq!(told[1].1.result.as_deref(), Some("ok"));
}

#[tokio::test]
async fn sealed_means_nothing_but_status() {
    let w = World::sealed(Some(b"correct horse battery")).await;
    let (me, ws) = (account(1), workspace(1));
    let receipt = w.receipt(w.intent(
        "workspace.create",
        w.sign_assertion(&w.assertion(&me)),
        &w.lease(&ws),
    ));
    for (who, op) in [
        (
            "control",
            Op::WorkspaceKeyCreate {
                receipt: receipt.clone(),
            },
        ),
        (
            "host",
            Op::Release {
                receipt,
                attestation: "x".into(),
            },
        ),
        (
            "control",
            Op::Destroy {
                workspace: ws.clone(),
                authority: "x".into(),
            },
        ),
        ("root", Op::Rotate),
        (
            "audit-read",
            Op::LogOpen {
                class: Class::Host,
                day: 1,
                wraps: vec![],
                reason: "x".into(),
            },
        ),
    ] {
        assert_eq!(
            w.call(who, op).await.unwrap_err().code,
            ErrorCode::KmsSealed
        );
    }
    assert!(w.status().await.sealed);
    assert!(w.kms.unseal_by_file().await.is_err());
    // A wrong passphrase is refused, flagged, and says nothing.
    let wrong = Op::Unseal {
        passphrase: "correct horse batterz".into(),
    };
    assert!(!format!("{wrong:?}").contains("horse"));
    let e = w.call("root", wrong).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::Forbidden);
    assert!(!format!("{e:?}").contains("horse"));
    let (class, refused) = w.log.entries("kms.refused").pop().unwrap();
    assert_eq!(
        (class, refused.result.as_deref()),
        (Class::Security, Some("passphrase"))
    );
    // Unlogged, it stays sealed.
    w.log.down.store(true, Ordering::Release);
    let right = || Op::Unseal {
        passphrase: "correct horse battery".into(),
    };
    assert_eq!(
        w.call("root", right()).await.unwrap_err().code,
        ErrorCode::AuditUnavailable
    );
    assert!(w.status().await.sealed);
    w.log.down.store(false, Ordering::Release);
    w.call("root", right()).await.unwrap();
    assert!(!w.status().await.sealed);
    w.create(&me, &ws).await.unwrap();
    w.release(&me, &ws).await.unwrap();
}

#[tokio::test]
async fn each_operation_has_its_caller() {
    let w = World::new().await;
    let ops = || {
        vec![
            (
                Op::WorkspaceKeyCreate {
                    receipt: Value::Null,
                },
                &["control"][..],
            ),
            (
                Op::Release {
                    receipt: Value::Null,
                    attestation: String::new(),
                },
                &["host"],
            ),
            (
                Op::Anchor {
                    statement: AnchorStatement {
                        workspace: workspace(1),
                        anchor: Anchor {
                            run: 0,
                            batch: 0,
                            root: String::new(),
                        },
                        mac: String::new(),
                    },
                },
                &["host"],
            ),
            (
                Op::SnapshotKeep {
                    workspace: workspace(1),
                    object: model::ObjectId::from_bytes([1; 8]),
                },
                &["host"],
            ),
            (
                Op::Destroy {
                    workspace: workspace(1),
                    authority: String::new(),
                },
                &["control"],
            ),
            (
                Op::Unseal {
                    passphrase: String::new(),
                },
                &["root"],
            ),
            (Op::Rotate, &["root"]),
            (
                Op::LogOpen {
                    class: Class::Api,
                    day: 1,
                    wraps: vec![],
                    reason: String::new(),
                },
                &["audit-read"],
            ),
        ]
    };
    for who in ["control", "host", "audit-read", "root", "edge", "mint", ""] {
        for (op, allowed) in ops() {
            let name = op.name();
            let result = w.call(who, op).await;
            let forbidden = result.is_err_and(|e| e.code == ErrorCode::Forbidden);
            assert_eq!(forbidden, !allowed.contains(&who), "{who} {name}");
        }
    }
    let flagged = w.log.entries("kms.refused");
    let by_peer = flagged
        .iter()
        .filter(|(_, e)| e.result.as_deref() == Some("peer"))
        .count();
    assert_eq!(by_peer, 7 * 8 - 8);
}

#[tokio::test]
async fn policies_restart_and_expire_only_what_they_name() {
    let w = World::new().await;
    let (me, ws, other) = (account(1), workspace(1), workspace(2));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &other).await.unwrap();
    let attempt = async |event: &str, authority: String, ws: &model::WorkspaceId| {
        let lease = w.lease(ws);
        let receipt = w.receipt(w.intent(event, authority, &lease));
        let key = hpke::SecretKey::generate();
        let attestation = w.attest(&w.attestation(&lease, &key));
        w.call(
            "host",
            Op::Release {
                receipt,
                attestation,
            },
        )
        .await
    };
    let restart = || w.policy(&me, &ws, PolicyAct::Restart);
    attempt("workspace.restart", restart(), &ws).await.unwrap();
    for (event, authority, ws) in [
        ("workspace.restart", restart(), &other),
        ("workspace.create", restart(), &ws),
        ("workspace.delete", restart(), &ws),
        (
            "workspace.restart",
            w.policy(&me, &ws, PolicyAct::Expire),
            &ws,
        ),
        (
            "workspace.restart",
            w.policy(&account(2), &ws, PolicyAct::Restart),
            &ws,
        ),
    ] {
        assert!(attempt(event, authority, ws).await.is_err(), "{event}");
    }
    let expire = |authority| Op::Destroy {
        workspace: ws.clone(),
        authority,
    };
    assert!(w.call("control", expire(restart())).await.is_err());
    let wrong = w.policy(&me, &other, PolicyAct::Expire);
    assert!(w.call("control", expire(wrong)).await.is_err());
    let right = w.policy(&me, &ws, PolicyAct::Expire);
    w.call("control", expire(right)).await.unwrap();
}

#[tokio::test]
async fn the_logs_keys_are_published_and_open_for_the_reader_only() {
    use base64::Engine as _;
    let w = World::new().await;
    let today = u32::try_from(crate::testing::NOW_MS / 86_400_000).unwrap();
    for class in Class::ALL {
        assert!(w.log.day_key(class, today).is_some());
        assert!(w.log.day_key(class, today + 399).is_some());
    }
    let public = w.log.day_key(Class::Api, today + 7).unwrap();
    assert_ne!(w.log.day_key(Class::Host, today + 7).unwrap(), public);
    let batch = [0x42; 32];
    let wrap = hpke::seal(&public, context::LOG_CLASS.as_bytes(), b"", &batch);
    let wrap = base64::engine::general_purpose::STANDARD.encode(wrap);
    let op = |class, day, wraps| Op::LogOpen {
        class,
        day,
        wraps,
        reason: "case 7".into(),
    };
    // Over a rotation, a restart and time going by, the day's key is the same.
    w.call("root", Op::Rotate).await.unwrap();
    w.clock.set_ms(crate::testing::NOW_MS + 5 * 86_400_000);
    let w = w.unsealed(Faults::default()).await;
    w.kms.converge().await.unwrap();
    assert!(w.log.day_key(Class::Flow, today + 404).is_some());
    let got = w
        .call("audit-read", op(Class::Api, today + 7, vec![wrap.clone()]))
        .await
        .unwrap();
    assert_eq!(got, serde_json::json!([hex::encode(batch)]));
    let (class, entry) = w.log.entries("kms.log_open").pop().unwrap();
    assert_eq!(
        (class, entry.data["reason"].as_str()),
        (Class::Security, Some("case 7"))
    );
    for (class, day, wraps) in [
        (Class::Host, today + 7, vec![wrap.clone()]),
        (Class::Api, today + 8, vec![wrap.clone()]),
        (Class::Api, today - 1, vec![wrap.clone()]),
        (Class::Api, u32::MAX, vec![wrap.clone()]),
        (Class::Api, today + 7, vec![wrap.clone(); 65]),
        (Class::Api, today + 7, vec!["?".into()]),
    ] {
        assert!(w.call("audit-read", op(class, day, wraps)).await.is_err());
    }
}

#[tokio::test]
async fn releases_go_on_while_the_epoch_changes() {
    let w = World::new().await;
    let me = account(1);
    for n in 0..20 {
        w.create(&me, &workspace(n)).await.unwrap();
    }
    let rotations = async {
        for _ in 0..5 {
            w.call("root", Op::Rotate).await.unwrap();
        }
    };
    let releases = async {
        for n in 0..100 {
            w.release(&me, &workspace(n % 20)).await.unwrap();
        }
    };
    tokio::join!(rotations, releases);
    assert_eq!(w.status().await.releases, 100);
    assert_eq!(w.status().await.epoch, 6);
}

#[tokio::test]
async fn the_epoch_changes_each_day_if_the_log_hears_of_it() {
    let w = World::new().await;
    w.create(&account(1), &workspace(1)).await.unwrap();
    w.kms.converge().await.unwrap();
    assert_eq!(w.status().await.epoch, 1);
    w.clock
        .set_ms(crate::testing::NOW_MS + crate::limits::EPOCH_MAX_AGE_MS);
    w.log.down.store(true, Ordering::Release);
    assert!(w.kms.converge().await.is_err());
    assert_eq!(w.status().await.epoch, 1);
    w.log.down.store(false, Ordering::Release);
    w.kms.converge().await.unwrap();
    w.kms.converge().await.unwrap();
    assert_eq!(w.status().await.epoch, 2);
    w.release(&account(1), &workspace(1)).await.unwrap();
}

#[tokio::test]
async fn a_full_outbox_makes_closing_acts_wait() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.log.down.store(true, Ordering::Release);
    let mut tx = w.kms.inner().store.begin().await.unwrap();
    sqlx::query(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)
         INSERT INTO outbox (class, entry) SELECT 'host', '{}' FROM n",
    )
    .execute(&mut *tx)
    .await
    .unwrap();
    tx.commit().await.unwrap();
    assert!(w.destroy(&me, &ws).await.is_err());
    // Nothing was erased, and nothing is left half done.
    w.log.down.store(false, Ordering::Release);
    w.release(&me, &ws).await.unwrap();
    w.kms.converge().await.unwrap();
    w.destroy(&me, &ws).await.unwrap();
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let w = World::new().await;
    let mut tx = w.kms.inner().store.begin().await.unwrap();
    sqlx::query("UPDATE state SET format = 2")
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    assert!(w.kms.inner().store.state().await.is_err());
}

/// Prints the rate of audited releases, the log's own work included:
/// `cargo test --release -p casemate-kms -- --ignored --nocapture rate`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn rate_of_audited_releases() {
    const RELEASES: u64 = 4_000;
    const AT_ONCE: usize = 128;
    let w = std::sync::Arc::new(World::new().await);
    for n in 0..100 {
        w.create(&account((n % 10) as u8), &workspace(n))
            .await
            .unwrap();
    }
    let ready: Vec<Op> = (0..RELEASES)
        .map(|n| {
            let lease = w.lease(&workspace(n % 100));
            let authority = w.sign_assertion(&w.assertion(&account((n % 10) as u8)));
            let receipt = w.receipt(w.intent("workspace.start", authority, &lease));
            let attestation = w.attest(&w.attestation(&lease, &hpke::SecretKey::generate()));
            Op::Release {
                receipt,
                attestation,
            }
        })
        .collect();
    let gate = std::sync::Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let begun = std::time::Instant::now();
    let calls: Vec<_> = ready
        .into_iter()
        .map(|op| {
            let (w, gate) = (std::sync::Arc::clone(&w), std::sync::Arc::clone(&gate));
            tokio::spawn(async move {
                let _one = gate.acquire().await.unwrap();
                w.call("host", op).await.unwrap();
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let took = begun.elapsed();
    println!(
        "{RELEASES} releases in {took:?}: {:.0}/s",
        RELEASES as f64 / took.as_secs_f64()
    );
}
