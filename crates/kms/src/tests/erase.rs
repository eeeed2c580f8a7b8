//! What is destroyed stays destroyed, whoever keeps which copy.
use super::*;
use crate::store::Store;

/// Everything under `kms/` but the slots: what a backup may hold.
fn backup(w: &World, to: &std::path::Path) {
    let from = w.paths.state("kms");
    for entry in std::fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Puts a backup back over the state, as a thief or a careless restore would.
fn restore(w: &World, from: &std::path::Path) {
    let to = w.paths.state("kms");
    for name in ["state.db", "state.db-wal", "state.db-shm"] {
        let _ = std::fs::remove_file(to.join(name));
    }
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn slots(w: &World) -> Vec<String> {
    let list = std::fs::read_dir(w.paths.state("kms").join("slots")).unwrap();
    list.map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn a_receipt_is_verified_offline_and_is_the_same_each_time() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let receipt = w.destroy(&me, &ws).await.unwrap();
    let erasure: Erasure = Signed::parse(receipt.clone())
        .unwrap()
        .verify(&kms_pub(&w).await, context::ERASURE)
        .unwrap();
    erasure.check().unwrap();
    assert_eq!(
        (
            &erasure.workspace,
            erasure.epoch_destroyed,
            erasure.epoch_now
        ),
        (&ws, 1, 2)
    );
    assert_eq!(w.destroy(&me, &ws).await.unwrap(), receipt);
    assert_eq!(slots(&w), ["2"]);
    // Gone for every purpose; its id is never given out again; the neighbour lives.
    assert_eq!(
        w.release(&me, &ws).await.err().unwrap().code,
        ErrorCode::Conflict
    );
    assert_eq!(
        w.create(&me, &ws).await.unwrap_err().code,
        ErrorCode::Conflict
    );
    w.release(&me, &workspace(2)).await.unwrap();
    assert_eq!(w.status().await.workspace_keys, 1);
}

#[tokio::test]
async fn strangers_destroy_nothing() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    assert_eq!(
        w.destroy(&account(2), &ws).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    assert_eq!(
        w.destroy(&me, &workspace(9)).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    let forged = Signed::new(&w.machine, context::ASSERTION, &w.assertion(&me)).to_string();
    let other_kind = Signed::new(&w.mint, context::TOKEN_STATE, &w.assertion(&me)).to_string();
    let mut old = w.assertion(&me);
    old.iat_ms -= 25 * 3_600_000;
    old.exp_ms = old.iat_ms + 30_000;
    for authority in [forged, other_kind, w.sign_assertion(&old), String::new()] {
        let op = Op::Destroy {
            workspace: ws.clone(),
            authority,
        };
        assert_eq!(
            w.call("control", op).await.unwrap_err().code,
            ErrorCode::KeyRefused
        );
    }
    assert_eq!(w.log.entries("kms.refused").len(), 6);
    w.release(&me, &ws).await.unwrap();
}

/// DSK-4: a backup of the state, today's state, today's slots and the unseal secret together do
/// not open what was destroyed. The attack is carried out, key by key.
#[tokio::test]
async fn i5_a_backup_and_every_secret_of_today_open_nothing() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let kept = tempfile::tempdir().unwrap();
    backup(&w, kept.path());
    let old = Store::open(&kept.path().join("state.db"), false)
        .await
        .unwrap();
    let (row, acct) = old.workspace(&ws).await.unwrap().unwrap();
    let unseal_old =
        Key::from_slice(&std::fs::read(kept.path().join("unseal.key")).unwrap()).unwrap();
    let secret = |w: &World, n: u64| {
        let path = w.paths.state("kms").join("slots").join(n.to_string());
        std::fs::read(path)
            .ok()
            .map(|b| Key::from_slice(&b).unwrap())
    };
    // The attack works as long as the slot is there: this test is able to fail.
    let open = |root: &Key| {
        let (key, _) = crate::ring::account_unwrap(&acct, root)?;
        let place = Place::Workspace {
            workspace: &ws,
            account: &me,
            version: row.version,
            account_version: row.account_version,
            epoch: row.epoch,
        };
        place.unwrap_bytes::<32>(&key, row.wrapped.as_deref().unwrap())
    };
    let root = epoch_root(&unseal_old, &secret(&w, 1).unwrap(), 1);
    assert!(open(&root).is_ok());

    w.destroy(&me, &ws).await.unwrap();
    assert!(secret(&w, 1).is_none());
    for n in 1..=2 {
        for claimed in [1, 2] {
            let Some(slot) = secret(&w, n) else { continue };
            assert!(open(&epoch_root(&unseal_old, &slot, claimed)).is_err());
        }
    }
    // Nor do today's account keys open the old wrap.
    let now = &w.kms.inner().store;
    let (_, acct_now) = now.workspace(&workspace(2)).await.unwrap().unwrap();
    let root = epoch_root(&unseal_old, &secret(&w, 2).unwrap(), 2);
    let (key, _) = crate::ring::account_unwrap(&acct_now, &root).unwrap();
    for account_version in [row.account_version, acct_now.version] {
        for epoch in [1, 2] {
            let place = Place::Workspace {
                workspace: &ws,
                account: &me,
                version: row.version,
                account_version,
                epoch,
            };
            assert!(place.unwrap(&key, row.wrapped.as_deref().unwrap()).is_err());
        }
    }
    // And the wrapped bytes themselves are gone from the state's file.
    w.kms.close().await;
    let file = std::fs::read(w.paths.state("kms").join("state.db")).unwrap();
    let blob = row.wrapped.unwrap();
    assert!(!file.windows(blob.len()).any(|win| win == blob));
}

#[tokio::test]
async fn a_state_rolled_back_is_refused_and_costs_nothing() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    backup(&w, old.path());
    w.destroy(&me, &ws).await.unwrap();
    w.kms.close().await;
    backup(&w, new.path());
    restore(&w, old.path());
    let w = w.restarted(Faults::default()).await;
    let e = w.kms.unseal_by_file().await.unwrap_err();
    assert!(e.detail.unwrap().contains("old copy"));
    assert!(w.status().await.sealed);
    assert!(w.release(&me, &ws).await.is_err());
    // The newest slot survived the attempt, so the newest state still opens.
    assert_eq!(slots(&w), ["2"]);
    w.kms.close().await;
    restore(&w, new.path());
    let w = w.unsealed(Faults::default()).await;
    w.create(&me, &workspace(2)).await.unwrap();
}

#[tokio::test]
async fn a_moved_row_does_not_open() {
    let w = World::new().await;
    let (me, you) = (account(1), account(2));
    w.create(&me, &workspace(1)).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    w.create(&you, &workspace(3)).await.unwrap();
    for sql in [
        // One's wrap under another's id: the same account, another account, an account's row.
        "UPDATE workspace SET wrapped = (SELECT wrapped FROM workspace WHERE id = 'ws_0000000000000001')
            WHERE id = 'ws_0000000000000002'",
        "UPDATE workspace SET account = 'acct_0101010101010101' WHERE id = 'ws_0000000000000003'",
        "UPDATE account SET wrapped = (SELECT wrapped FROM account WHERE id = 'acct_0101010101010101')
            WHERE id = 'acct_0202020202020202'",
        "UPDATE workspace SET version = 2 WHERE id = 'ws_0000000000000001'",
    ] {
        let mut tx = w.kms.inner().store.begin().await.unwrap();
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    }
    w.kms.inner().ring().unwrap().retain(1);
    for (who, n) in [(&me, 1), (&me, 2), (&me, 3), (&you, 3)] {
        assert!(w.release(who, &workspace(n)).await.is_err(), "{n}");
    }
    assert_eq!(w.status().await.releases, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destructions_at_once_share_a_rotation() {
    let w = std::sync::Arc::new(World::new().await);
    let me = account(1);
    for n in 0..24 {
        w.create(&me, &workspace(n)).await.unwrap();
    }
    let all: Vec<_> = (0..24)
        .map(|n| {
            let (w, me) = (std::sync::Arc::clone(&w), me.clone());
            tokio::spawn(async move { w.destroy(&me, &workspace(n)).await.unwrap() })
        })
        .collect();
    let key = kms_pub(&w).await;
    for one in all {
        let erasure: Erasure = Signed::parse(one.await.unwrap())
            .unwrap()
            .verify(&key, context::ERASURE)
            .unwrap();
        erasure.check().unwrap();
    }
    let status = w.status().await;
    assert_eq!(status.workspace_keys, 0);
    assert!(
        status.epoch < 25,
        "{} epochs for 24 destructions",
        status.epoch
    );
    assert_eq!(slots(&w), [status.epoch.to_string()]);
}

/// A release that waits for the log while its key is destroyed: whoever holds the receipt may
/// rely on nothing being released any more.
#[tokio::test]
async fn a_release_under_way_is_overtaken_by_the_destruction() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.release(&me, &ws).await.unwrap();
    w.log.arrived.notified().await;
    let held = w.log.hold.write().await;
    let release = w.release(&me, &ws);
    let destroy = async {
        w.log.arrived.notified().await;
        let receipt = w.destroy(&me, &ws).await;
        drop(held);
        receipt
    };
    let (released, receipt) = tokio::join!(release, destroy);
    receipt.unwrap();
    assert_eq!(released.err().unwrap().code, ErrorCode::Conflict);
    assert_eq!(w.status().await.releases, 1);
}
