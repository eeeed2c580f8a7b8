//! Which intent opens what, for whom, and that no two objects share a key.
use super::*;
use api::audit::{LEASE_ALSO_MAX, Lease, Object};
use api::kms::{BACKINGS, Grant, Released, backing_of};
use model::{AccountId, ObjectId, Purpose, WorkspaceId};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use std::collections::HashSet;

pub(super) fn object(ws: &WorkspaceId, purpose: Purpose, n: u8) -> Object {
    Object {
        workspace: ws.clone(),
        purpose,
        id: (purpose != Purpose::Disk).then(|| ObjectId::from_bytes([n; 8])),
    }
}

/// A lease of `about` that opens `objects`, the first of which is its own.
pub(super) fn lease(w: &World, about: &WorkspaceId, objects: &[Object]) -> Lease {
    Lease {
        purpose: objects[0].purpose,
        object: objects[0].id.clone(),
        also: objects[1..].to_vec(),
        ..w.lease(about)
    }
}

/// Releases one object of an intent that stands in the log already.
pub(super) async fn open(
    w: &World,
    receipt: &Value,
    lease: &Lease,
    of: &Object,
) -> api::Result<Grant> {
    let key = hpke::SecretKey::generate();
    let attestation = api::kms::Attestation {
        workspace: of.workspace.clone(),
        purpose: of.purpose,
        ..w.attestation(lease, &key)
    };
    let op = Op::Release {
        receipt: receipt.clone(),
        attestation: w.attest(&attestation),
    };
    let released: Released = serde_json::from_value(w.call("host", op).await?).unwrap();
    Ok(crate::testing::open_grant(&released, &key))
}

/// Has the image that this is begun; its key.
pub(super) async fn begin(w: &World, by: &AccountId, of: &Object) -> Grant {
    let event = match of.purpose {
        Purpose::Memory => "workspace.sleep",
        _ => "workspace.snapshot",
    };
    let lease = lease(w, &of.workspace, std::slice::from_ref(of));
    let receipt = w.receipt(w.intent(event, client(w, by), &lease));
    open(w, &receipt, &lease, of).await.unwrap()
}

/// Why the first object of such an intent was refused, if it was.
async fn refusal(w: &World, event: &str, authority: String, lease: &Lease) -> Option<String> {
    let receipt = w.receipt(w.intent(event, authority, lease));
    let first = lease.objects().next().unwrap();
    let e = open(w, &receipt, lease, &first).await.err()?;
    let (_, flagged) = w.log.entries("kms.refused").pop().unwrap();
    assert_eq!(flagged.result, e.detail.clone().or(flagged.result.clone()));
    flagged.result
}

pub(super) fn client(w: &World, who: &AccountId) -> String {
    w.sign_assertion(&w.assertion(who))
}

#[tokio::test]
async fn no_two_objects_share_a_key_and_only_a_disk_has_an_identity() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let mut keys = HashSet::new();
    for (event, purposes) in [
        ("workspace.sleep", &[Purpose::Memory][..]),
        (
            "workspace.snapshot",
            &[Purpose::SnapshotDisk, Purpose::SnapshotMemory],
        ),
        ("workspace.archive", &[Purpose::Archive]),
    ] {
        for n in [1, 2] {
            let objects: Vec<_> = purposes.iter().map(|p| object(&ws, *p, n)).collect();
            let lease = lease(&w, &ws, &objects);
            let receipt = w.receipt(w.intent(event, client(&w, &me), &lease));
            for of in &objects {
                let grant = open(&w, &receipt, &lease, of).await.unwrap();
                assert_eq!((grant.purpose, &grant.workspace), (of.purpose, &ws));
                assert!(grant.identity_seed.is_empty() && grant.anchor.is_none());
                assert!(keys.insert(grant.disk_key), "{of:?}");
                // Each of them once.
                assert!(open(&w, &receipt, &lease, of).await.is_err());
            }
        }
    }
    // What fell asleep under a key wakes under it, and no other object does.
    let both = [
        object(&ws, Purpose::Disk, 0),
        object(&ws, Purpose::Memory, 2),
    ];
    let wake = lease(&w, &ws, &both);
    let receipt = w.receipt(w.intent("workspace.wake", client(&w, &me), &wake));
    let memory = open(&w, &receipt, &wake, &both[1]).await.unwrap();
    assert!(keys.contains(&memory.disk_key));
    let disk = open(&w, &receipt, &wake, &both[0]).await.unwrap();
    assert!(!disk.identity_seed.is_empty() && keys.insert(disk.disk_key.clone()));
    let again = w.release(&me, &ws).await.unwrap();
    assert_eq!(again.disk_key, disk.disk_key);
}

#[tokio::test]
async fn a_fork_opens_a_snapshot_of_the_same_account_and_nothing_else_of_it() {
    let w = World::new().await;
    let (me, stranger) = (account(1), account(2));
    let (source, fork, theirs) = (workspace(1), workspace(2), workspace(3));
    w.create(&me, &source).await.unwrap();
    w.create(&me, &fork).await.unwrap();
    w.create(&stranger, &theirs).await.unwrap();
    let of = |source: &WorkspaceId| {
        [
            object(&fork, Purpose::Disk, 0),
            object(source, Purpose::SnapshotDisk, 1),
        ]
    };
    let objects = of(&source);
    begin(&w, &me, &objects[1]).await;
    begin(&w, &stranger, &of(&theirs)[1]).await;
    let good = lease(&w, &fork, &objects);
    let authority = client(&w, &me);
    let receipt = w.receipt(w.intent("workspace.fork", authority.clone(), &good));
    let mut identities = Vec::new();
    for o in &objects {
        let grant = open(&w, &receipt, &good, o).await.unwrap();
        assert_eq!(grant.workspace, o.workspace);
        identities.push(grant.identity_seed);
    }
    assert!(identities[1].is_empty());
    assert_ne!(
        identities[0],
        w.release(&me, &source).await.unwrap().identity_seed
    );
    // The assertion stood for this fork.
    let again = lease(&w, &source, &[object(&source, Purpose::Disk, 0)]);
    let why = refusal(&w, "workspace.start", authority, &again).await;
    assert_eq!(why.as_deref(), Some("authority_used"));

    // A stranger's snapshot, into one's own; one's own, into a stranger's; by a stranger.
    for (who, about, objects, reads) in [
        (&me, &fork, of(&theirs).to_vec(), 1),
        (
            &me,
            &theirs,
            vec![object(&theirs, Purpose::Disk, 0), objects[1].clone()],
            1,
        ),
        (&stranger, &fork, objects.to_vec(), 0),
        (&stranger, &fork, objects.to_vec(), 1),
        (
            &stranger,
            &theirs,
            vec![object(&theirs, Purpose::Disk, 0), objects[1].clone()],
            1,
        ),
    ] {
        let bad = lease(&w, about, &objects);
        let receipt = w.receipt(w.intent("workspace.fork", client(&w, who), &bad));
        let e = open(&w, &receipt, &bad, &objects[reads])
            .await
            .err()
            .unwrap();
        assert_eq!(e.code, ErrorCode::NotFound, "{objects:?}");
    }
    // Nothing of the source but its snapshot, and that for a fork only.
    for (event, purpose) in [
        ("workspace.fork", Purpose::Disk),
        ("workspace.fork", Purpose::Memory),
        ("workspace.fork", Purpose::SnapshotMemory),
        ("workspace.fork", Purpose::Archive),
        ("workspace.restore", Purpose::SnapshotDisk),
        ("workspace.wake", Purpose::Memory),
        ("workspace.start", Purpose::SnapshotMemory),
    ] {
        let objects = [object(&fork, Purpose::Disk, 0), object(&source, purpose, 1)];
        let bad = lease(&w, &fork, &objects);
        let why = refusal(&w, event, client(&w, &me), &bad).await;
        assert_eq!(why.as_deref(), Some("authority_act"), "{event} {purpose:?}");
    }
    // A key that is gone opens nothing, of whichever purpose.
    w.destroy(&me, &source).await.unwrap();
    let late = lease(&w, &fork, &objects);
    let receipt = w.receipt(w.intent("workspace.fork", client(&w, &me), &late));
    let e = open(&w, &receipt, &late, &objects[1]).await.err().unwrap();
    assert_eq!(e.code, ErrorCode::Conflict);
    // The fork outlives it.
    open(&w, &receipt, &late, &objects[0]).await.unwrap();
}

#[tokio::test]
async fn leases_that_name_objects_wrongly_open_nothing() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    let disk = object(&ws, Purpose::Disk, 0);
    let memory = object(&ws, Purpose::Memory, 1);
    let bare = Object {
        id: None,
        ..memory.clone()
    };
    let named = Object {
        id: Some(ObjectId::from_bytes([1; 8])),
        ..disk.clone()
    };
    let many = vec![memory.clone(); LEASE_ALSO_MAX + 2];
    for objects in [
        vec![disk.clone(), bare],
        vec![named],
        vec![
            disk.clone(),
            memory.clone(),
            object(&ws, Purpose::Memory, 2),
        ],
        vec![disk.clone(), disk.clone()],
        many,
    ] {
        let bad = lease(&w, &ws, &objects);
        let why = refusal(&w, "workspace.wake", client(&w, &me), &bad).await;
        assert_eq!(why.as_deref(), Some("lease"), "{objects:?}");
    }
    // A good lease does not open what it does not name.
    let sleep = lease(&w, &ws, std::slice::from_ref(&memory));
    let receipt = w.receipt(w.intent("workspace.sleep", client(&w, &me), &sleep));
    for other in [
        disk,
        object(&ws, Purpose::SnapshotMemory, 1),
        object(&workspace(2), Purpose::Memory, 1),
    ] {
        assert!(open(&w, &receipt, &sleep, &other).await.is_err());
        let (_, flagged) = w.log.entries("kms.refused").pop().unwrap();
        assert_eq!(flagged.result.as_deref(), Some("attestation_lease"));
    }
    open(&w, &receipt, &sleep, &memory).await.unwrap();
}

#[tokio::test]
async fn a_policy_backs_the_act_it_names_only() {
    let w = World::new().await;
    let (me, ws) = (account(1), workspace(1));
    w.create(&me, &ws).await.unwrap();
    w.create(&me, &workspace(2)).await.unwrap();
    let acts = [
        PolicyAct::Restart,
        PolicyAct::Expire,
        PolicyAct::Stop,
        PolicyAct::Sleep,
        PolicyAct::Wake,
    ];
    for backing in BACKINGS {
        for act in acts {
            let own: Vec<_> = backing.own.iter().map(|p| object(&ws, *p, 3)).collect();
            for image in own.iter().filter(|o| o.purpose.is_image()) {
                begin(&w, &me, image).await;
            }
            let lease = lease(&w, &ws, &own);
            let why = refusal(&w, backing.event, w.policy(&me, &ws, act), &lease).await;
            assert_eq!(
                why.is_none(),
                backing.policy == Some(act),
                "{backing:?} {act:?}"
            );
            // Of another workspace, or of somebody else: never.
            for other in [
                w.policy(&me, &workspace(2), act),
                w.policy(&account(2), &ws, act),
            ] {
                let lease = Lease {
                    nonce: hex::encode(seal::random::bytes::<32>()),
                    ..lease.clone()
                };
                assert!(refusal(&w, backing.event, other, &lease).await.is_some());
            }
        }
    }
}

/// Whatever an intent names: it opens what the table says, and all of it or nothing.
#[tokio::test]
async fn only_the_table_opens() {
    const CASES: u32 = 400;
    let events: Vec<_> = BACKINGS
        .iter()
        .map(|b| b.event)
        .chain(["workspace.stop", "workspace.delete", "kms.release", ""])
        .collect();
    let w = World::new().await;
    let (me, about, source) = (account(1), workspace(1), workspace(2));
    w.create(&me, &about).await.unwrap();
    w.create(&me, &source).await.unwrap();
    let cases = (
        prop::sample::select(events),
        prop::collection::hash_set((0_usize..5, any::<bool>()), 1..=4),
        any::<bool>(),
    );
    let mut runner = TestRunner::default();
    let mut opened_in = 0;
    for _ in 0..CASES {
        let (event, named, by_policy) = cases.new_tree(&mut runner).unwrap().current();
        let mut objects: Vec<_> = named
            .iter()
            .map(|(p, own)| object(if *own { &about } else { &source }, Purpose::ALL[*p], 1))
            .collect();
        // A lease's own object is of the workspace it is about; a disk uses its memory up.
        objects.sort_by_key(|o| (o.workspace != about, o.purpose == Purpose::Disk));
        if objects[0].workspace != about {
            continue;
        }
        for image in objects.iter().filter(|o| o.purpose.is_image()) {
            begin(&w, &me, image).await;
        }
        let lease = lease(&w, &about, &objects);
        let authority = if by_policy {
            w.policy(&me, &about, PolicyAct::Wake)
        } else {
            client(&w, &me)
        };
        let receipt = w.receipt(w.intent(event, authority, &lease));
        let allowed = backing_of(event).is_some_and(|b| {
            let fits = |o: &Object| {
                let may = if o.workspace == about {
                    b.own
                } else {
                    b.source
                };
                may.contains(&o.purpose)
            };
            objects.iter().all(fits) && (!by_policy || b.policy == Some(PolicyAct::Wake))
        });
        for o in &objects {
            let opened = open(&w, &receipt, &lease, o).await.is_ok();
            assert_eq!(opened, allowed, "{event} {objects:?} {by_policy}");
        }
        opened_in += u32::from(allowed);
    }
    assert!(opened_in > 0, "nothing was ever allowed");
}
