//! Anchors go forward, are the disk's own, and die with the key.
use super::*;
use crate::anchor::anchor_key;
use crate::keyring::Key;

fn at(run: u64, batch: u64) -> Anchor {
    Anchor {
        run,
        batch,
        root: hex::encode(seal::hash::sha256(format!("{run} {batch}").as_bytes())),
    }
}

/// What the disk process that has this grant would say.
fn statement(grant: &api::kms::Grant, anchor: Anchor) -> AnchorStatement {
    let mut disk_key = [0; 32];
    hex::decode_to_slice(&grant.disk_key, &mut disk_key).unwrap();
    let key = anchor_key(&Key::take(&mut disk_key));
    let covered = AnchorStatement::covered(&grant.workspace, &anchor);
    AnchorStatement {
        workspace: grant.workspace.clone(),
        mac: hex::encode(seal::hash::hmac_sha256(key.expose(), &covered)),
        anchor,
    }
}

async fn say(w: &World, statement: AnchorStatement) -> api::Result<Anchor> {
    let answer = w.call("host", Op::Anchor { statement }).await?;
    Ok(serde_json::from_value(answer).unwrap())
}

#[tokio::test]
async fn i26_an_anchor_goes_forward_only_and_comes_with_the_next_grant() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let first = w.release(&me, &ws).await.unwrap();
    assert_eq!(first.anchor, None);
    for (said, stands) in [
        (at(first.run, 5), at(first.run, 5)),
        (at(first.run, 5), at(first.run, 5)),
        (at(first.run, 4), at(first.run, 5)),
        (at(first.run, 6), at(first.run, 6)),
        (at(first.run - 1, 900), at(first.run, 6)),
        (at(first.run + 1, 1), at(first.run + 1, 1)),
        (at(first.run, 7), at(first.run + 1, 1)),
    ] {
        assert_eq!(say(&w, statement(&first, said)).await.unwrap(), stands);
    }
    let next = w.release(&me, &ws).await.unwrap();
    assert_eq!(next.anchor, Some(at(first.run + 1, 1)));
    assert!(next.run > first.run, "a later start has a higher number");
    // It survives a restart and a new epoch.
    let w = w.unsealed(Faults::default()).await;
    w.call("root", Op::Rotate).await.unwrap();
    assert_eq!(w.release(&me, &ws).await.unwrap().anchor, next.anchor);
}

#[tokio::test]
async fn i26_an_anchor_is_the_disks_own_and_has_one_past() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let grant = w.release(&me, &ws).await.unwrap();
    let other = w.release(&me, &workspace(2)).await.unwrap();
    let good = statement(&grant, at(grant.run, 5));
    say(&w, good.clone()).await.unwrap();
    let changed = |change: fn(&mut AnchorStatement)| {
        let mut bad = good.clone();
        change(&mut bad);
        bad
    };
    let mut twice = at(grant.run, 5);
    twice.root = "00".repeat(32);
    let mut beyond = at(grant.run, 5);
    beyond.batch = u64::MAX;
    for bad in [
        changed(|s| s.anchor.batch += 1),
        changed(|s| s.anchor.run += 1),
        changed(|s| s.anchor.root = s.anchor.root.replace('a', "b")),
        changed(|s| s.anchor.root = String::new()),
        changed(|s| s.mac = "00".repeat(32)),
        changed(|s| s.mac.clear()),
        changed(|s| s.workspace = workspace(2)),
        changed(|s| s.workspace = workspace(3)),
        AnchorStatement {
            workspace: ws.clone(),
            ..statement(&other, at(9, 9))
        },
        statement(&grant, twice),
        statement(&grant, beyond),
    ] {
        assert!(say(&w, bad.clone()).await.is_err(), "{bad:?}");
        assert_eq!(
            w.release(&me, &ws).await.unwrap().anchor,
            Some(good.anchor.clone())
        );
    }
    let flagged = w.log.entries("kms.refused");
    assert!(
        flagged.iter().any(|(class, e)| {
            *class == Class::Security && e.result.as_deref() == Some("anchor")
        })
    );
}

#[tokio::test]
async fn a_destroyed_key_takes_its_anchor_with_it() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let grant = w.release(&me, &ws).await.unwrap();
    say(&w, statement(&grant, at(grant.run, 5))).await.unwrap();
    w.destroy(&me, &ws).await.unwrap();
    let store = crate::store::Store::open(&w.paths.state("kms").join("state.db"), false)
        .await
        .unwrap();
    assert_eq!(store.anchor(&ws).await.unwrap(), None);
    store.close().await;
    let late = say(&w, statement(&grant, at(grant.run, 6)))
        .await
        .unwrap_err();
    assert_eq!(late.code, ErrorCode::Conflict);
}
