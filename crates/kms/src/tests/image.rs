//! Of each kind of image the last alone is opened, and memory once.
use super::purposes::{begin, client, lease, object, open};
use super::*;
use api::audit::{Lease, Object};
use api::kms::Grant;
use model::{AccountId, Purpose, WorkspaceId};

/// An act on a workspace, whose keys are asked for one by one.
struct Act {
    receipt: Value,
    lease: Lease,
}

impl Act {
    fn new(w: &World, by: &AccountId, event: &str, objects: &[Object]) -> Self {
        let lease = lease(w, &objects[0].workspace, objects);
        let receipt = w.receipt(w.intent(event, client(w, by), &lease));
        Self { receipt, lease }
    }

    /// The key, or the word of the refusal in the log.
    async fn key(&self, w: &World, of: &Object) -> Result<Grant, String> {
        match open(w, &self.receipt, &self.lease, of).await {
            Ok(grant) => Ok(grant),
            Err(_) => {
                let (class, said) = w.log.entries("kms.refused").pop().unwrap();
                assert_eq!(class, Class::Security, "a refusal is an alarm");
                Err(said.result.unwrap())
            }
        }
    }
}

fn disk(ws: &WorkspaceId) -> Object {
    object(ws, Purpose::Disk, 0)
}

fn refused() -> Result<String, String> {
    Err("image".into())
}

async fn wake(w: &World, by: &AccountId, memory: &Object) -> Act {
    Act::new(
        w,
        by,
        "workspace.wake",
        &[disk(&memory.workspace), memory.clone()],
    )
}

#[tokio::test]
async fn i29_memory_is_woken_once_and_only_the_last() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let [older, last] = [1, 2].map(|n| object(&ws, Purpose::Memory, n));
    begin(&w, &me, &older).await;
    let saved = begin(&w, &me, &last).await.disk_key;
    let key = |grant: Grant| grant.disk_key;

    // A wake that ends before it has the disk's key is tried again, also by another KMS.
    for _ in 0..2 {
        let tried = wake(&w, &me, &last).await;
        assert_eq!(tried.key(&w, &last).await.map(key), Ok(saved.clone()));
    }
    let w = w.unsealed(Faults::default()).await;
    w.call("root", Op::Rotate).await.unwrap();
    let stale = wake(&w, &me, &older).await;
    assert_eq!(stale.key(&w, &older).await.map(key), refused());

    // Two wakes of one memory at a time: one of them has the disk.
    let [one, two] = [wake(&w, &me, &last).await, wake(&w, &me, &last).await];
    assert_eq!(one.key(&w, &last).await.map(key), Ok(saved.clone()));
    assert_eq!(two.key(&w, &last).await.map(key), Ok(saved.clone()));
    two.key(&w, &disk(&ws)).await.unwrap();
    assert_eq!(one.key(&w, &disk(&ws)).await.map(key), refused());
    // From then on its key is released to nobody, also to another KMS.
    let w = w.unsealed(Faults::default()).await;
    let again = wake(&w, &me, &last).await;
    assert_eq!(again.key(&w, &last).await.map(key), refused());
    assert_eq!(again.key(&w, &disk(&ws)).await.map(key), refused());
    // The workspace starts from its disk.
    w.release(&me, &ws).await.unwrap();
}

#[tokio::test]
async fn i29_a_start_from_the_disk_uses_memory_up() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let memory = object(&ws, Purpose::Memory, 1);
    let others = object(&workspace(2), Purpose::Memory, 1);
    begin(&w, &me, &memory).await;
    begin(&w, &me, &others).await;
    w.release(&me, &ws).await.unwrap();
    let late = wake(&w, &me, &memory).await;
    assert_eq!(
        late.key(&w, &memory).await.map(|g| g.disk_key),
        refused(),
        "beside a disk that went on"
    );
    let theirs = wake(&w, &me, &others).await;
    theirs.key(&w, &others).await.unwrap();
    // A number that comes again is of another image: what was saved before stays closed.
    let before = begin(&w, &me, &memory).await.disk_key;
    let after = begin(&w, &me, &memory).await.disk_key;
    assert_ne!(before, after);
    let woken = wake(&w, &me, &memory).await;
    assert_eq!(woken.key(&w, &memory).await.unwrap().disk_key, after);
}

/// Takes snapshot `n`, or begins to: its disk comes first.
async fn snapshot(w: &World, by: &AccountId, ws: &WorkspaceId, n: u8, whole: bool) {
    let taken = Act::new(w, by, "workspace.snapshot", &pair(ws, n));
    let [disk, memory] = pair(ws, n);
    taken.key(w, &disk).await.unwrap();
    if whole {
        taken.key(w, &memory).await.unwrap();
    }
}

fn pair(ws: &WorkspaceId, n: u8) -> [Object; 2] {
    [Purpose::SnapshotDisk, Purpose::SnapshotMemory].map(|p| object(ws, p, n))
}

/// What a restore from snapshot `n` is given of its disk and its memory.
async fn restore(
    w: &World,
    by: &AccountId,
    ws: &WorkspaceId,
    n: u8,
) -> [Result<String, String>; 2] {
    let [d, m] = pair(ws, n);
    let act = Act::new(
        w,
        by,
        "workspace.restore",
        &[disk(ws), d.clone(), m.clone()],
    );
    [act.key(w, &d).await, act.key(w, &m).await].map(|key| key.map(|grant| grant.disk_key))
}

/// The same of a fork, which opens the disk.
async fn fork(w: &World, by: &AccountId, to: &WorkspaceId, ws: &WorkspaceId, n: u8) -> bool {
    let [d, _] = pair(ws, n);
    let act = Act::new(w, by, "workspace.fork", &[disk(to), d.clone()]);
    act.key(w, &d).await.is_ok()
}

async fn keep(w: &World, ws: &WorkspaceId, n: u8) {
    let op = Op::SnapshotKeep {
        workspace: ws.clone(),
        object: pair(ws, n)[0].id.clone().unwrap(),
    };
    w.call("host", op).await.unwrap();
}

#[tokio::test]
async fn i29_only_the_last_snapshot_is_opened_as_often_as_is_asked() {
    let w = World::new().await;
    let (me, ws, twin) = (account(1), workspace(1), workspace(2));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &twin).await.unwrap();
    for n in [1, 2] {
        snapshot(&w, &me, &ws, n, true).await;
        keep(&w, &ws, n).await;
    }
    assert_eq!(restore(&w, &me, &ws, 1).await, [refused(), refused()]);
    assert!(!fork(&w, &me, &twin, &ws, 1).await);
    for _ in 0..2 {
        assert!(restore(&w, &me, &ws, 2).await.iter().all(Result::is_ok));
        assert!(fork(&w, &me, &twin, &ws, 2).await);
        // Said again, or of what was never begun, nothing is forgotten.
        keep(&w, &ws, 2).await;
        keep(&w, &ws, 9).await;
    }
    // Each time that one took the other's place is in the log, however often it was said.
    w.kms.converge().await.unwrap();
    let kept = w.log.entries("kms.snapshot_keep");
    let objects: Vec<_> = kept.iter().map(|(_, e)| e.data["object"].clone()).collect();
    let named = |n| serde_json::json!(pair(&ws, n)[0].id);
    assert_eq!(objects, [named(1), named(2)]);
    let (class, entry) = &kept[1];
    assert_eq!((*class, entry.phase), (Class::Host, Phase::Fact));
    assert_eq!(entry.account, Some(me.clone()));
    assert_eq!(entry.subject.as_deref(), Some(ws.as_str()));
    // With the key its images are forgotten.
    w.destroy(&me, &ws).await.unwrap();
    let store = crate::store::Store::open(&w.paths.state("kms").join("state.db"), false)
        .await
        .unwrap();
    let [disk, _] = pair(&ws, 2);
    let id = disk.id.unwrap();
    let left = store.image(&ws, Purpose::SnapshotDisk, id.as_str()).await;
    assert_eq!(left.unwrap(), None);
    store.close().await;
}

#[tokio::test]
async fn i29_the_snapshot_before_stays_the_last_until_the_next_is_whole() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    snapshot(&w, &me, &ws, 1, true).await;
    keep(&w, &ws, 1).await;
    let before = restore(&w, &me, &ws, 1).await;
    // Two that were begun and not ended, also for another KMS.
    snapshot(&w, &me, &ws, 2, false).await;
    snapshot(&w, &me, &ws, 3, true).await;
    let w = w.unsealed(Faults::default()).await;
    keep(&w, &ws, 1).await;
    assert_eq!(restore(&w, &me, &ws, 1).await, before);
    assert_eq!(restore(&w, &me, &ws, 2).await, [refused(), refused()]);
    // The word of host was lost: whoever opens the new one ends the old one.
    assert!(restore(&w, &me, &ws, 3).await.iter().all(Result::is_ok));
    assert_eq!(restore(&w, &me, &ws, 1).await, [refused(), refused()]);
    // One of the disk alone leaves no memory of the one before.
    snapshot(&w, &me, &ws, 4, false).await;
    assert!(restore(&w, &me, &ws, 3).await.iter().all(Result::is_ok));
    keep(&w, &ws, 4).await;
    assert_eq!(restore(&w, &me, &ws, 3).await, [refused(), refused()]);
    let [disk, memory] = restore(&w, &me, &ws, 4).await;
    assert_eq!((disk.is_ok(), memory), (true, refused()));
}
