//! `kill -9` before each step: what was answered holds, what was not is finished or undone.
use super::*;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Stops once at `step`, when armed.
fn stop_at(step: Step) -> (Faults, Arc<AtomicBool>) {
    let armed = Arc::new(AtomicBool::new(false));
    let trigger = Arc::clone(&armed);
    (
        Faults::new(move |s| s == step && trigger.load(Ordering::Acquire)),
        armed,
    )
}

async fn armed_world(step: Step) -> (World, String) {
    let (faults, armed) = stop_at(step);
    let w = World::new().await.unsealed(faults).await;
    w.create(&account(1), &workspace(1)).await.unwrap();
    w.create(&account(2), &workspace(2)).await.unwrap();
    let before = w
        .release(&account(1), &workspace(1))
        .await
        .unwrap()
        .disk_key;
    armed.store(true, Ordering::Release);
    (w, before)
}

fn slot_count(w: &World) -> usize {
    std::fs::read_dir(w.paths.state("kms").join("slots"))
        .unwrap()
        .count()
}

#[tokio::test]
async fn rotation_survives_a_kill_at_each_step() {
    for step in Step::ROTATE {
        let (w, before) = armed_world(step).await;
        assert!(w.call("root", Op::Rotate).await.is_err(), "{step:?}");
        let w = w.unsealed(Faults::default()).await;
        let epoch = w.status().await.epoch;
        let committed = matches!(step, Step::SlotDestroy | Step::EpochSwitch);
        assert_eq!(epoch, if committed { 2 } else { 1 }, "{step:?}");
        assert_eq!(slot_count(&w), 1, "{step:?}");
        let after = w
            .release(&account(1), &workspace(1))
            .await
            .unwrap()
            .disk_key;
        assert_eq!(after, before, "{step:?}");
        w.call("root", Op::Rotate).await.unwrap();
        assert_eq!(w.status().await.epoch, epoch + 1);
        w.release(&account(2), &workspace(2)).await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_rotation_is_repeated_without_a_restart() {
    for step in Step::ROTATE {
        let (faults, armed) = stop_at(step);
        let w = World::new().await.unsealed(faults).await;
        w.create(&account(1), &workspace(1)).await.unwrap();
        armed.store(true, Ordering::Release);
        assert!(w.call("root", Op::Rotate).await.is_err(), "{step:?}");
        w.release(&account(1), &workspace(1)).await.unwrap();
        armed.store(false, Ordering::Release);
        w.call("root", Op::Rotate).await.unwrap();
        w.release(&account(1), &workspace(1)).await.unwrap();
        assert_eq!(slot_count(&w), 1, "{step:?}");
    }
}

#[tokio::test]
async fn destruction_survives_a_kill_at_each_step() {
    for step in Step::DESTROY.into_iter().chain(Step::ROTATE) {
        let (w, _) = armed_world(step).await;
        assert!(
            w.destroy(&account(1), &workspace(1)).await.is_err(),
            "{step:?}"
        );
        let w = w.unsealed(Faults::default()).await;
        if step == Step::Erase {
            // Nothing had happened; the key lives.
            w.release(&account(1), &workspace(1)).await.unwrap();
        } else {
            // Finished without being asked.
            assert!(
                w.release(&account(1), &workspace(1)).await.is_err(),
                "{step:?}"
            );
            w.kms.converge().await.unwrap();
            assert!(
                w.kms
                    .inner()
                    .store
                    .workspaces_pending()
                    .await
                    .unwrap()
                    .is_empty()
            );
        }
        let receipt = w.destroy(&account(1), &workspace(1)).await.unwrap();
        let erasure: Erasure = Signed::parse(receipt)
            .unwrap()
            .verify(&kms_pub(&w).await, context::ERASURE)
            .unwrap();
        erasure.check().unwrap();
        assert_eq!(slot_count(&w), 1, "{step:?}");
        w.release(&account(2), &workspace(2)).await.unwrap();
    }
}

#[tokio::test]
async fn creation_survives_a_kill_at_each_step() {
    for step in Step::CREATE {
        let (faults, armed) = stop_at(step);
        let w = World::new().await.unsealed(faults).await;
        armed.store(true, Ordering::Release);
        assert!(
            w.create(&account(1), &workspace(1)).await.is_err(),
            "{step:?}"
        );
        let w = w.unsealed(Faults::default()).await;
        w.create(&account(1), &workspace(1)).await.unwrap();
        w.release(&account(1), &workspace(1)).await.unwrap();
        w.kms.converge().await.unwrap();
        assert!(w.log.account_key(&account(1)).is_some());
    }
}

#[tokio::test]
async fn an_interrupted_init_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("slots")).unwrap();
    std::fs::write(dir.path().join("slots/1"), b"torn").unwrap();
    std::fs::write(dir.path().join("unseal.key"), b"torn").unwrap();
    let public = crate::init::init(dir.path(), None, 1).await.unwrap();
    assert_eq!(
        crate::init::init(dir.path(), None, 2).await.unwrap(),
        public
    );
    assert_eq!(std::fs::read(dir.path().join("slots/1")).unwrap().len(), 32);
}

#[tokio::test]
async fn a_lease_from_before_a_restart_releases_nothing() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let lease = w.lease(&ws);
    let authority = w.sign_assertion(&w.assertion(&me));
    let receipt = w.receipt(w.intent("workspace.start", authority, &lease));
    let key = hpke::SecretKey::generate();
    let attestation = w.attest(&w.attestation(&lease, &key));
    let op = || Op::Release {
        receipt: receipt.clone(),
        attestation: attestation.clone(),
    };
    w.call("host", op()).await.unwrap();
    let w = w.unsealed(Faults::default()).await;
    let e = w.call("host", op()).await.unwrap_err();
    assert_eq!(e.detail.as_deref(), Some(Refusal::LeaseRestart.code()));
    // Nor does a clock that is set back revive one within a run.
    let lease = w.lease(&ws);
    let authority = w.sign_assertion(&w.assertion(&me));
    let receipt = w.receipt(w.intent("workspace.start", authority, &lease));
    let attestation = w.attest(&w.attestation(&lease, &key));
    let op = || Op::Release {
        receipt: receipt.clone(),
        attestation: attestation.clone(),
    };
    w.call("host", op()).await.unwrap();
    w.clock.set_ms(lease.exp_ms + 120_000);
    assert!(w.release(&me, &ws).await.is_ok());
    w.clock.set_ms(lease.exp_ms - 30_000);
    assert!(w.call("host", op()).await.is_err());
}
