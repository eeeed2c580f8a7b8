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

#[tokio::test]
async fn i29_only_the_last_snapshot_is_opened_as_often_as_is_asked() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let pair = |n| [Purpose::SnapshotDisk, Purpose::SnapshotMemory].map(|p| object(&ws, p, n));
    for n in [1, 2] {
        let taken = Act::new(&w, &me, "workspace.snapshot", &pair(n));
        for image in &pair(n) {
            taken.key(&w, image).await.unwrap();
        }
    }
    let restore = |n| {
        let [d, m] = pair(n);
        Act::new(&w, &me, "workspace.restore", &[disk(&ws), d, m])
    };
    let fork = |n| {
        let [d, _] = pair(n);
        Act::new(&w, &me, "workspace.fork", &[disk(&workspace(2)), d])
    };
    w.create(&me, &workspace(2)).await.unwrap();
    for image in &pair(1) {
        let old = restore(1).key(&w, image).await;
        assert_eq!(old.map(|g| g.disk_key), refused());
    }
    let old = fork(1).key(&w, &pair(1)[0]).await;
    assert_eq!(old.map(|g| g.disk_key), refused());
    for _ in 0..2 {
        let act = restore(2);
        for image in &pair(2) {
            act.key(&w, image).await.unwrap();
        }
        act.key(&w, &disk(&ws)).await.unwrap();
        fork(2).key(&w, &pair(2)[0]).await.unwrap();
    }
    // With the key its images are forgotten.
    w.destroy(&me, &ws).await.unwrap();
    let store = crate::store::Store::open(&w.paths.state("kms").join("state.db"), false)
        .await
        .unwrap();
    let left = store.image(&ws, Purpose::SnapshotDisk).await.unwrap();
    assert_eq!(left, None);
    store.close().await;
}
