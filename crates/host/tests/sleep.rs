//! Sleep, wake, snapshot, restore and fork, against doubles of warden, the KMS and vmctl.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::ErrorCode;
use api::host::ActualState::{Asleep, Crashed, Deleted, Failed, Paused, Running, Stopped};
use api::host::{Actual, ActualState, Desired};
use common::{World, until};
use model::{ObjectId, Power, Purpose, WorkspaceId};

const SLEEP: [&str; 6] = [
    "vmctl.pause",
    "warden.memory_open",
    "kms.release",
    "warden.memory_grant",
    "vmctl.memory_save",
    "warden.memory_end",
];
/// What a wake asks until its memory is used up.
const WAKE: [&str; 5] = [
    "warden.memory_open",
    "kms.release",
    "warden.memory_grant",
    "warden.disk_open",
    "warden.disk_grant",
];
/// And after it.
const WOKEN: [&str; 2] = ["vmctl.wake", "warden.net_set"];
const SNAPSHOT: [&str; 8] = [
    "vmctl.pause",
    "warden.snapshot_disk_open",
    "kms.release",
    "warden.snapshot_disk_grant",
    "warden.memory_open",
    "warden.memory_grant",
    "vmctl.memory_save",
    "warden.memory_end",
];

fn ws(n: u8) -> WorkspaceId {
    WorkspaceId::from_bytes([n; 8])
}

fn has_memory(w: &World, n: u8) -> bool {
    w.doubles.state().memory.contains_key(&ws(n))
}

/// The parts of snapshots that are at rest: which, of which.
fn snapshots(w: &World, n: u8) -> Vec<(&'static str, ObjectId)> {
    let s = w.doubles.state();
    let of = s.objects.iter().filter(|(w, ..)| *w == ws(n));
    of.map(|(_, label, id)| (*label, id.clone())).collect()
}

/// Both parts of one.
fn pair(object: u8) -> Vec<(&'static str, ObjectId)> {
    let kinds = [Purpose::SnapshotDisk, Purpose::SnapshotMemory];
    kinds.map(|p| (p.label(), id(object))).into()
}

/// The object's number goes into its key: another one does not open it.
async fn sleep(w: &mut World, n: u8, object: u8) -> Actual {
    let opens = [(n, Purpose::Memory, object)];
    w.act(n, Power::Asleep, &opens).await
}

async fn wake(w: &mut World, n: u8, object: u8) -> Actual {
    let opens = [(n, Purpose::Disk, 0), (n, Purpose::Memory, object)];
    w.act(n, Power::Running, &opens).await
}

/// What a snapshot opens, with memory or without.
fn opens(n: u8, object: u8, memory: bool) -> Vec<(u8, Purpose, u8)> {
    let disk = (n, Purpose::SnapshotDisk, object);
    let memory = memory.then_some((n, Purpose::SnapshotMemory, object));
    std::iter::once(disk).chain(memory).collect()
}

fn snapshot_wish(w: &mut World, n: u8, object: u8, after: Power, memory: bool) -> Desired {
    let mut wish = w.wish(n, after);
    wish.snapshot_next = Some(id(object));
    w.with_lease(wish, &opens(n, object, memory))
}

/// Takes one; if host says so, it is the one that stands in each later wish.
async fn snapshot_with(w: &mut World, n: u8, wish: Desired) -> Actual {
    let next = wish.snapshot_next.clone();
    let actual = w.apply(wish).await.unwrap();
    if actual.snapshot == next {
        w.snapshots.extend(next.map(|id| (n, id)));
    }
    actual
}

async fn snapshot(w: &mut World, n: u8, object: u8, after: Power) -> Actual {
    let wish = snapshot_wish(w, n, object, after, true);
    snapshot_with(w, n, wish).await
}

async fn restore(w: &mut World, n: u8, object: u8) -> Actual {
    let opens = [
        (n, Purpose::Disk, 0),
        (n, Purpose::SnapshotDisk, object),
        (n, Purpose::SnapshotMemory, object),
    ];
    w.act(n, Power::Running, &opens).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_sleeps_and_wakes_with_its_memory_once() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    let before = w.doubles.state().asked.len();
    let asleep = sleep(&mut w, 1, 1).await;
    assert_eq!(
        (asleep.state, asleep.memory, asleep.ip),
        (Asleep, true, None)
    );
    let asked = w.doubles.state().asked[before..].to_vec();
    let asked = asked.iter().filter(|a| SLEEP.contains(&a.as_str()));
    assert_eq!(asked.collect::<Vec<_>>(), SLEEP);
    assert!(w.slots_of(1).is_empty() && has_memory(&w, 1));

    let before = w.doubles.state().asked.len();
    let up = wake(&mut w, 1, 1).await;
    assert_eq!((up.state, up.memory), (Running, false));
    let asked = w.doubles.state().asked[before..].to_vec();
    let asked = asked.iter().filter(|a| WOKEN.contains(&a.as_str()));
    assert_eq!(asked.collect::<Vec<_>>(), WOKEN, "its network opens last");
    assert_eq!(up.started_from.as_deref(), Some("wake"));
    assert!(up.ip.is_some() && !has_memory(&w, 1));

    // A stop of what sleeps, and a start from the disk, take the memory away first.
    sleep(&mut w, 1, 2).await;
    let stopped = w.bring(1, Power::Stopped).await;
    assert_eq!((stopped.state, stopped.memory), (Stopped, false));
    assert!(!has_memory(&w, 1));
    w.bring(1, Power::Running).await;
    sleep(&mut w, 1, 3).await;
    let plain = w.bring(1, Power::Running).await;
    assert_ne!(plain.started_from.as_deref(), Some("wake"));
    assert!(!has_memory(&w, 1));

    sleep(&mut w, 1, 4).await;
    assert_eq!(w.bring(1, Power::Deleted).await.state, Deleted);
    let s = w.doubles.state();
    assert!(s.memory.is_empty() && s.disks.is_empty());
    assert!(s.slots.values().all(|x| x.at.workspace.is_none()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sleep_that_fails_at_any_step_leaves_it_running() {
    let mut w = World::new(0).await;
    for (n, step) in SLEEP.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        let failing = (step.to_string(), ErrorCode::Timeout);
        w.doubles.state().failing.extend([failing]);
        let actual = sleep(&mut w, n, 1).await;
        assert_eq!((actual.state, actual.memory), (Running, false), "{step}");
        assert_eq!(actual.error.unwrap().code, ErrorCode::Timeout, "{step}");
        w.doubles.state().failing.clear();
        assert_eq!(sleep(&mut w, n, 2).await.state, Asleep, "{step}");
        w.bring(n, Power::Deleted).await;
    }
}

/// Warden died with what was being saved: there is nothing to drop by then, and the next sleep goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_warden_took_with_it_keeps_no_other_from_going_on() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    for step in ["vmctl.memory_save", "warden.memory_end"] {
        let away = (step.to_owned(), ErrorCode::Unavailable);
        w.doubles.state().failing.extend([away]);
    }
    assert_eq!(sleep(&mut w, 1, 1).await.state, Running);
    {
        let mut s = w.doubles.state();
        s.failing.clear();
        s.slots.values_mut().for_each(|x| x.memory = None);
    }
    assert_eq!(sleep(&mut w, 1, 2).await.state, Asleep);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_that_fails_before_its_disk_is_granted_leaves_it_asleep() {
    let mut w = World::new(0).await;
    for (n, step) in WAKE.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        sleep(&mut w, n, 1).await;
        let failing = (step.to_string(), ErrorCode::MemoryStale);
        w.doubles.state().failing.extend([failing]);
        let failed = wake(&mut w, n, 1).await;
        assert_eq!((failed.state, failed.memory), (Failed, true), "{step}");
        assert_eq!(failed.error.unwrap().code, ErrorCode::MemoryStale, "{step}");
        assert!(w.slots_of(n).is_empty() && has_memory(&w, n));
        w.doubles.state().failing.clear();
        // Asked to be asleep, it is; with another object's key, it does not wake.
        assert_eq!(w.bring(n, Power::Asleep).await.state, Asleep);
        let wrong = wake(&mut w, n, 9).await;
        assert_eq!(wrong.error.unwrap().code, ErrorCode::KeyRefused);
        assert_eq!(wake(&mut w, n, 1).await.state, Running, "{step}");
        w.bring(n, Power::Deleted).await;
    }
    // After it, the memory is gone, and that is said.
    w.bring(9, Power::Running).await;
    sleep(&mut w, 9, 1).await;
    let failing = ("vmctl.wake".to_owned(), ErrorCode::Timeout);
    w.doubles.state().failing.extend([failing]);
    let failed = wake(&mut w, 9, 1).await;
    assert_eq!((failed.state, failed.memory), (Failed, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_restored_and_forked_and_stays() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    let before = w.doubles.state().asked.len();
    let kept = snapshot(&mut w, 1, 1, Power::Running).await;
    assert_eq!(
        (kept.state, kept.snapshot),
        (Running, Some(ObjectId::from_bytes([1; 8])))
    );
    let asked: Vec<_> = w.doubles.state().asked[before..]
        .iter()
        .filter(|a| SNAPSHOT.contains(&a.as_str()))
        .cloned()
        .collect();
    assert_eq!(asked.iter().filter(|a| *a == "kms.release").count(), 2);
    assert_eq!(asked.len(), SNAPSHOT.len() + 1);
    let paused = snapshot(&mut w, 1, 2, Power::Paused).await;
    assert_eq!((paused.state, paused.snapshot.is_some()), (Paused, true));

    w.bring(1, Power::Stopped).await;
    for _ in 0..2 {
        let up = restore(&mut w, 1, 2).await;
        assert_eq!(
            (up.state, up.started_from.as_deref()),
            (Running, Some("restore"))
        );
        assert_eq!(snapshots(&w, 1), pair(2));
        w.bring(1, Power::Stopped).await;
    }
    // Of the disk only: no memory is saved, and that of the one before goes with it, once the next wish
    // says that the new one stands.
    w.bring(1, Power::Running).await;
    let before = w.doubles.state().asked.len();
    let wish = snapshot_wish(&mut w, 1, 3, Power::Running, false);
    let kept = snapshot_with(&mut w, 1, wish).await;
    assert_eq!((kept.state, kept.snapshot), (Running, Some(id(3))));
    let asked = w.doubles.state().asked[before..].to_vec();
    assert!(!asked.iter().any(|a| a.contains("memory")), "{asked:?}");
    assert_eq!(snapshots(&w, 1).len(), 3);
    w.bring(1, Power::Running).await;
    assert_eq!(snapshots(&w, 1), pair(3)[..1]);
    let last = w.doubles.state().kept.last().cloned();
    assert_eq!(last, Some((ws(1), id(3))), "the KMS knows");
    let opens = [(2, Purpose::Disk, 0), (1, Purpose::SnapshotDisk, 3)];
    let fork = w.act(2, Power::Running, &opens).await;
    assert_eq!(fork.state, Running);
    w.bring(1, Power::Deleted).await;
    assert!(w.doubles.state().objects.is_empty());
    assert_eq!(w.get(2).await.unwrap().state, Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_fails_at_any_step_leaves_it_running() {
    let mut w = World::new(0).await;
    for (n, step) in SNAPSHOT.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        let failing = (step.to_string(), ErrorCode::StorageFull);
        w.doubles.state().failing.extend([failing]);
        let actual = snapshot(&mut w, n, 1, Power::Running).await;
        assert_eq!((actual.state, actual.snapshot), (Running, None), "{step}");
        assert_eq!(actual.error.unwrap().code, ErrorCode::StorageFull, "{step}");
        w.doubles.state().failing.clear();
        let kept = snapshot(&mut w, n, 2, Power::Running).await;
        assert!(kept.snapshot.is_some() && kept.error.is_none(), "{step}");
        w.bring(n, Power::Deleted).await;
    }
}

/// Kills host after it asked for `step` and before it heard of it, and starts it again.
async fn kill_at(w: &mut World, n: u8, power: Power, opens: &[(u8, Purpose, u8)], step: &str) {
    let wish = w.wish(n, power);
    let wish = w.with_lease(wish, opens);
    kill_with(w, wish, step).await;
}

async fn kill_with(w: &mut World, wish: api::host::Desired, step: &str) {
    w.doubles.state().silent = Some(step.to_owned());
    let before = w.doubles.state().asked.len();
    let reached = until(step, async || {
        let s = w.doubles.state();
        s.asked[before..].iter().any(|a| a == step).then_some(())
    });
    tokio::select! {
        got = w.apply(wish) => panic!("{step}: {got:?}"),
        () = reached => {}
    }
    w.kill();
    w.doubles.state().silent = None;
    w.start().await;
}

/// The state that a workspace comes to rest in.
async fn rests(w: &World, n: u8) -> (ActualState, bool) {
    let rests = [Running, Paused, Asleep, Stopped, Failed, Crashed];
    let actual = until("rest", async || {
        w.get(n).await.filter(|a| rests.contains(&a.state))
    })
    .await;
    (actual.state, actual.memory)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_each_step_of_a_sleep_leaves_it_running_or_asleep() {
    let mut w = World::new(0).await;
    for (n, step) in SLEEP.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        kill_at(&mut w, n, Power::Asleep, &[(n, Purpose::Memory, 1)], step).await;
        let ends = *step == "warden.memory_end";
        let want = if ends {
            (Asleep, true)
        } else {
            (Running, false)
        };
        assert_eq!(rests(&w, n).await, want, "{step}");
        assert_eq!(w.slots_of(n).len(), usize::from(!ends), "{step}");
        if !ends {
            assert_eq!(sleep(&mut w, n, 2).await.state, Asleep, "{step}");
        }
        assert_eq!(
            wake(&mut w, n, if ends { 1 } else { 2 }).await.state,
            Running
        );
        w.bring(n, Power::Deleted).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_each_step_of_a_wake_loses_no_memory_in_silence() {
    let mut w = World::new(0).await;
    for (n, step) in WAKE.iter().chain(&WOKEN).enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        sleep(&mut w, n, 1).await;
        let opens = [(n, Purpose::Disk, 0), (n, Purpose::Memory, 1)];
        kill_at(&mut w, n, Power::Running, &opens, step).await;
        match *step {
            "vmctl.wake" | "warden.net_set" => {
                assert_eq!(rests(&w, n).await, (Running, false));
                let slots = w.slots_of(n);
                let open = w.doubles.state().slots[&slots[0]].open.clone();
                assert!(open.is_some(), "{step}: its network is as it should be");
            }
            "warden.disk_grant" => {
                assert_eq!(rests(&w, n).await, (Crashed, false), "{step}");
                assert_eq!(w.bring(n, Power::Running).await.state, Running);
            }
            _ => {
                assert_eq!(rests(&w, n).await, (Crashed, true), "{step}");
                assert!(w.slots_of(n).is_empty(), "{step}");
                assert_eq!(wake(&mut w, n, 1).await.state, Running, "{step}");
            }
        }
        w.bring(n, Power::Deleted).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_each_step_of_a_snapshot_or_restore_leaves_nothing_half_done() {
    let mut w = World::new(0).await;
    for (n, step) in SNAPSHOT.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        snapshot(&mut w, n, 1, Power::Running).await;
        let wish = snapshot_wish(&mut w, n, 9, Power::Running, true);
        kill_with(&mut w, wish, step).await;
        assert_eq!(rests(&w, n).await, (Running, false), "{step}");
        // Given up, it has cost the one before nothing, and nothing of it is left.
        w.bring(n, Power::Stopped).await;
        assert_eq!(snapshots(&w, n), pair(1), "{step}");
        assert_eq!(restore(&mut w, n, 1).await.state, Running, "{step}");
        let kept = snapshot(&mut w, n, 2, Power::Running).await;
        assert!(kept.snapshot.is_some(), "{step}");
        w.bring(n, Power::Stopped).await;
        assert_eq!(snapshots(&w, n), pair(2), "{step}");
        let opens = [
            (n, Purpose::Disk, 0),
            (n, Purpose::SnapshotDisk, 2),
            (n, Purpose::SnapshotMemory, 2),
        ];
        let step = WAKE[usize::from(n - 1) % WAKE.len()];
        kill_at(&mut w, n, Power::Running, &opens, step).await;
        assert_eq!(rests(&w, n).await, (Crashed, false), "{step}");
        assert_eq!(restore(&mut w, n, 2).await.state, Running, "{step}");
        w.bring(n, Power::Deleted).await;
    }
}

const ARCHIVE: [&str; 5] = [
    "warden.memory_open",
    "kms.release",
    "warden.memory_grant",
    "vmctl.archive",
    "warden.memory_end",
];

fn id(object: u8) -> ObjectId {
    ObjectId::from_bytes([object; 8])
}

/// A wish for archive `object` beside those that are there.
fn archive_wish(w: &mut World, n: u8, object: u8, beside: &[u8]) -> api::host::Desired {
    let mut wish = w.wish(n, Power::Running);
    wish.archive = Some(api::host::Archive {
        paths: vec!["/root".into()],
        exclude: vec![],
        max_mb: 64,
    });
    wish.archives = beside.iter().chain([&object]).map(|o| id(*o)).collect();
    w.with_lease(wish, &[(n, Purpose::Archive, object)])
}

fn archives(w: &World, n: u8) -> Vec<ObjectId> {
    let s = w.doubles.state();
    let of = s.objects.iter().filter(|(w, ..)| *w == ws(n));
    of.map(|(.., id)| id.clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_is_made_while_it_runs_on_and_goes_when_it_is_not_wanted() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    for (object, beside) in [(1, &[][..]), (2, &[1])] {
        let before = w.doubles.state().asked.len();
        let wish = archive_wish(&mut w, 1, object, beside);
        let actual = w.apply(wish).await.unwrap();
        let archived = actual.archived.unwrap();
        assert_eq!((actual.state, archived.id), (Running, id(object)));
        assert_eq!(archived.tar.bytes, 10_240);
        let asked = w.doubles.state().asked[before..].to_vec();
        let asked = asked.iter().filter(|a| ARCHIVE.contains(&a.as_str()));
        assert_eq!(asked.collect::<Vec<_>>(), ARCHIVE);
    }
    assert_eq!(archives(&w, 1), [id(1), id(2)]);
    // They stay while it sleeps and stands still, and one goes in either.
    sleep(&mut w, 1, 9).await;
    assert!(archives(&w, 1).is_empty(), "none is wanted");

    wake(&mut w, 1, 9).await;
    for object in [3, 4, 5] {
        let beside: Vec<u8> = (3..object).collect();
        let wish = archive_wish(&mut w, 1, object, &beside);
        w.apply(wish).await.unwrap();
    }
    let mut wish = w.wish(1, Power::Stopped);
    wish.archives = vec![id(3), id(5)];
    w.apply(wish).await.unwrap();
    assert_eq!(archives(&w, 1), [id(3), id(5)]);
    // Also of a host that remembers nothing of them.
    w.kill();
    w.start().await;
    let mut wish = w.wish(1, Power::Stopped);
    wish.archives = vec![id(5)];
    w.apply(wish).await.unwrap();
    assert_eq!(archives(&w, 1), [id(5)]);
    assert_eq!(w.bring(1, Power::Deleted).await.state, Deleted);
    assert!(archives(&w, 1).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_fails_or_is_killed_at_any_step_is_none_and_the_guest_runs_on() {
    let mut w = World::new(0).await;
    for (n, step) in ARCHIVE.iter().enumerate() {
        let n = u8::try_from(n).unwrap() + 1;
        w.bring(n, Power::Running).await;
        w.doubles
            .state()
            .failing
            .extend([(step.to_string(), ErrorCode::Timeout)]);
        let wish = archive_wish(&mut w, n, 1, &[]);
        let actual = w.apply(wish).await.unwrap();
        assert_eq!((actual.state, &actual.archived), (Running, &None), "{step}");
        assert_eq!(actual.error.unwrap().code, ErrorCode::Timeout, "{step}");
        w.doubles.state().failing.clear();

        let wish = archive_wish(&mut w, n, 2, &[]);
        kill_with(&mut w, wish, step).await;
        assert_eq!(rests(&w, n).await, (Running, false), "{step}");
        let saved = |x: &common::Slot| x.memory.is_some();
        assert!(!w.doubles.state().slots.values().any(saved), "{step}");
        // What was kept before the kill is removed with the next wish, which does not have it.
        let wish = archive_wish(&mut w, n, 3, &[]);
        let actual = w.apply(wish).await.unwrap();
        assert_eq!(actual.archived.unwrap().id, id(3), "{step}");
        assert_eq!(archives(&w, n), [id(3)], "{step}");
        w.bring(n, Power::Deleted).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_wish_ends_an_archive_that_hangs() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    w.doubles.state().silent = Some("vmctl.archive".into());
    let wish = archive_wish(&mut w, 1, 1, &[]);
    let newer = w.wish(1, Power::Stopped);
    let asked = until("the archive", async || {
        let s = w.doubles.state();
        s.asked.iter().any(|a| a == "vmctl.archive").then_some(())
    });
    let stop = async {
        asked.await;
        w.apply(newer).await.unwrap()
    };
    let (_, stopped) = tokio::join!(w.apply(wish), stop);
    assert_eq!(stopped.state, Stopped);
    assert!(archives(&w, 1).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_is_put_back_as_often_as_wanted_and_a_kill_at_any_step_leaves_it() {
    let mut w = World::new(0).await;
    w.bring(1, Power::Running).await;
    let wish = archive_wish(&mut w, 1, 1, &[]);
    w.apply(wish).await.unwrap();
    let steps = [&ARCHIVE[..3], &["vmctl.unarchive", "warden.memory_end"]].concat();
    let restore = |w: &mut World| {
        let mut wish = archive_wish(w, 1, 1, &[]);
        wish.archive = None;
        wish
    };
    for step in &steps {
        let wish = restore(&mut w);
        let start = wish.start.as_ref().unwrap().start_id.clone();
        let actual = w.apply(wish).await.unwrap();
        let archived = actual.archived.unwrap();
        assert_eq!((archived.id, archived.start_id), (id(1), start), "{step}");
        let failing = (step.to_string(), ErrorCode::DiskTampered);
        w.doubles.state().failing.extend([failing]);
        let wish = restore(&mut w);
        let actual = w.apply(wish).await.unwrap();
        let code = actual.error.map(|e| e.code);
        assert_eq!(
            (actual.state, code),
            (Running, Some(ErrorCode::DiskTampered)),
            "{step}"
        );
        w.doubles.state().failing.clear();
        let wish = restore(&mut w);
        kill_with(&mut w, wish, step).await;
        assert_eq!(rests(&w, 1).await, (Running, false), "{step}");
        let saved = |x: &common::Slot| x.memory.is_some();
        assert!(!w.doubles.state().slots.values().any(saved), "{step}");
        assert_eq!(archives(&w, 1), [id(1)], "{step}");
    }
    // One that is not there is an error, and the workspace runs on.
    let mut wish = archive_wish(&mut w, 1, 7, &[1]);
    wish.archive = None;
    let actual = w.apply(wish).await.unwrap();
    assert_eq!(
        (actual.state, actual.error.unwrap().code),
        (Running, ErrorCode::NotFound)
    );
}
