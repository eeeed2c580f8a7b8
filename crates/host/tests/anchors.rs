//! How far disks have got, carried to the KMS: while they run, at their end, and after it.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::ErrorCode;
use api::host::ActualState::{Deleted, Running, Stopped};
use common::{World, until};
use model::{Power, WorkspaceId};

/// What the KMS has of workspace 1: (start, batch).
fn known(w: &World) -> Vec<(u64, u64)> {
    let s = w.doubles.state();
    let anchors = s.anchors.get(&WorkspaceId::from_bytes([1; 8]));
    anchors
        .into_iter()
        .flatten()
        .map(|a| (a.run, a.batch))
        .collect()
}

fn spooled(w: &World) -> usize {
    let dir = w.paths.state("host").join("anchors");
    std::fs::read_dir(dir).unwrap().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kms_hears_of_a_start_and_before_a_stop_is_done_of_its_end() {
    let mut w = World::new(0).await;
    assert_eq!(w.bring(1, Power::Running).await.state, Running);
    until("the start's", async || {
        (known(&w) == [(1, 1)]).then_some(())
    })
    .await;
    assert_eq!(w.bring(1, Power::Stopped).await.state, Stopped);
    assert_eq!(known(&w), [(1, 1), (1, 2)]);
    assert_eq!(spooled(&w), 0);
    let ended = |asked: &[String], what: &str| asked.iter().rposition(|a| a == what);
    let asked = w.doubles.state().asked.clone();
    assert!(ended(&asked, "kms.anchor") < ended(&asked, "warden.slot_close"));

    // A disk whose key is destroyed has nobody to tell.
    w.bring(1, Power::Running).await;
    until("the start's", async || {
        known(&w).contains(&(2, 1)).then_some(())
    })
    .await;
    assert_eq!(w.bring(1, Power::Deleted).await.state, Deleted);
    assert!(!known(&w).contains(&(2, 2)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_goes_through_while_the_kms_is_away_and_is_told_later_also_by_the_next_host() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    until("the start's", async || {
        (known(&w) == [(1, 1)]).then_some(())
    })
    .await;
    let away = ("kms.anchor".to_owned(), ErrorCode::KmsSealed);
    w.doubles.state().failing.insert(away.0.clone(), away.1);
    assert_eq!(w.bring(1, Power::Stopped).await.state, Stopped);
    assert_eq!((known(&w), spooled(&w)), (vec![(1, 1)], 1));
    w.kill();
    w.start().await;
    assert_eq!(spooled(&w), 1);
    w.doubles.state().failing.clear();
    until("the last word", async || {
        (known(&w).last() == Some(&(1, 2))).then_some(())
    })
    .await;
    until("nothing waits", async || (spooled(&w) == 0).then_some(())).await;

    // What the KMS refuses is not asked again for ever.
    w.bring(1, Power::Running).await;
    let refused = ErrorCode::KeyRefused;
    w.doubles.state().failing.insert(away.0, refused);
    assert_eq!(w.bring(1, Power::Stopped).await.state, Stopped);
    assert_eq!(spooled(&w), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_grant_has_the_last_word_of_the_start_before() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    until("the start's", async || {
        (known(&w) == [(1, 1)]).then_some(())
    })
    .await;
    let away = "kms.anchor".to_owned();
    w.doubles
        .state()
        .failing
        .insert(away, ErrorCode::Unavailable);
    w.bring(1, Power::Stopped).await;
    w.doubles.state().failing.clear();
    w.doubles.state().asked.clear();
    w.bring(1, Power::Running).await;
    assert!(known(&w).contains(&(1, 2)));
    let asked = w.doubles.state().asked.clone();
    let first = |what: &str| asked.iter().position(|a| a == what).unwrap();
    assert!(first("kms.anchor") < first("kms.release"), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_a_running_disk_refused_are_told() {
    let mut w = World::new(0).await;
    w.doubles.state().refused = 3;
    w.bring(1, Power::Running).await;
    let told = until("an alarm", async || {
        w.get(1).await.filter(|a| a.error.is_some())
    })
    .await;
    assert_eq!(told.state, Running);
    assert_eq!(told.error.unwrap().code, ErrorCode::DiskTampered);
}
