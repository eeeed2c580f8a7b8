//! The host daemon, against doubles of warden, the KMS and vmctl.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod common;

use api::host::ActualState::{Crashed, Deleted, Failed, Paused, Running, Stopped};
use api::host::{Info, Op};
use api::vmctl::VmState;
use api::warden::{Open, SlotState, Source};
use api::{Error, ErrorCode};
use common::{World, image, until};
use model::{Power, WorkspaceId};

/// Everything a start asks, in order, from a pooled VM on.
const START: [&str; 5] = [
    "warden.disk_open",
    "warden.net_set",
    "kms.release",
    "warden.disk_grant",
    "vmctl.attach",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workspace_lives_from_start_to_erasure() {
    let mut w = World::new(0).await;
    let up = w.bring(1, Power::Running).await;
    assert_eq!(
        (up.state, up.started_from.as_deref()),
        (Running, Some("cold"))
    );
    assert!(up.ip.is_some() && up.start_id.is_some() && up.error.is_none());
    let asked = w.doubles.state().asked.clone();
    let start: Vec<_> = asked
        .iter()
        .filter(|a| START.contains(&a.as_str()))
        .collect();
    assert_eq!(start, START.iter().collect::<Vec<_>>());

    assert_eq!(w.bring(1, Power::Paused).await.state, Paused);
    assert_eq!(w.bring(1, Power::Running).await.start_id, up.start_id);
    let down = w.bring(1, Power::Stopped).await;
    assert_eq!((down.state, down.ip), (Stopped, None));
    assert!(
        w.doubles
            .state()
            .asked
            .contains(&"vmctl.shutdown".to_owned())
    );
    assert!(w.slots_of(1).is_empty());

    let again = w.bring(1, Power::Running).await;
    assert_ne!(again.start_id, up.start_id);
    assert_eq!(w.bring(1, Power::Deleted).await.state, Deleted);
    let s = w.doubles.state();
    assert!(s.disks.is_empty() && s.slots.values().all(|x| x.at.workspace.is_none()));
    let left = std::fs::read_dir(w.paths.state("host").join("desired")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_start_is_cold_and_those_after_it_come_from_the_pool() {
    let mut w = World::new(2).await;
    let pooled = |w: &World| {
        let s = w.doubles.state();
        let spare = s
            .slots
            .values()
            .filter(|x| x.vm == VmState::Pooled && x.at.workspace.is_none());
        spare.count()
    };
    until("a full pool", async || (pooled(&w) == 2).then_some(())).await;
    assert!(w.doubles.state().templates.contains(&(image(), 256, 1)));
    for n in 1..=3 {
        let up = w.bring(n, Power::Running).await;
        assert_eq!(up.started_from.as_deref(), Some("pool"), "{n}");
        until("a refill", async || (pooled(&w) == 2).then_some(())).await;
    }
    // A shape that the pool does not hold: cold, then by its template.
    let mut other = w.wish(4, Power::Running);
    other.resources.memory_mb = 512;
    assert_eq!(
        w.apply(other.clone())
            .await
            .unwrap()
            .started_from
            .as_deref(),
        Some("cold")
    );
    until("its template", async || {
        w.doubles
            .state()
            .templates
            .contains(&(image(), 512, 1))
            .then_some(())
    })
    .await;
    let full = w.bring(5, Power::Running).await;
    assert_eq!(
        full.error.map(|e| e.code),
        Some(ErrorCode::VmUnavailable),
        "four may run"
    );
    w.bring(4, Power::Stopped).await;
    let mut again = w.wish(4, Power::Running);
    again.resources.memory_mb = 512;
    // The watcher may have to see the template first.
    let up = w.apply(again).await.unwrap();
    assert_eq!(up.started_from.as_deref(), Some("template"));
    let info: Info = w.client.call("t", &Op::Info).await.unwrap();
    assert_eq!(
        (info.images[0].name.as_str(), info.pool_wanted),
        ("python-3", 2)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_follow_the_wish_and_are_there_before_the_guest() {
    let mut w = World::new(0).await;
    let mut wish = w.wish(1, Power::Running);
    wish.ingress_ports = vec![80];
    w.apply(wish).await.unwrap();
    let slot = w.slots_of(1)[0];
    assert_eq!(
        w.doubles.state().slots[&slot].open,
        Some(vec![]),
        "no source, no rule"
    );
    let mut wish = w.wish(1, Power::Running);
    (wish.public_access, wish.ingress_ports) = (true, vec![80, 22]);
    let actual = w.apply(wish).await.unwrap();
    assert!(actual.public_access && actual.state == Running);
    let edge = |port| Open {
        source: Source::Edge,
        port,
    };
    assert_eq!(
        w.doubles.state().slots[&slot].open,
        Some(vec![edge(22), edge(80), edge(9991)])
    );
    let closed = w.wish(1, Power::Running);
    assert!(!w.apply(closed).await.unwrap().public_access);
    assert_eq!(w.doubles.state().slots[&slot].open, Some(vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i23_a_start_that_fails_at_any_step_leaves_nothing_and_the_next_one_works() {
    let mut w = World::new(0).await;
    for (n, step) in ["warden.vm_open", "vmctl.prepare_now"]
        .iter()
        .chain(&START)
        .enumerate()
    {
        let n = u8::try_from(n).unwrap() + 1;
        w.doubles
            .state()
            .failing
            .insert((*step).into(), ErrorCode::KmsSealed);
        let failed = w.bring(n, Power::Running).await;
        assert_eq!(failed.state, Failed, "{step}");
        assert_eq!(failed.error.unwrap().code, ErrorCode::KmsSealed, "{step}");
        assert!(w.slots_of(n).is_empty(), "{step}");
        // The same lease is not tried again.
        let before = w.doubles.state().asked.len();
        let mut same = w.wish(n, Power::Running);
        (same.lease, same.start) = (None, None);
        assert_eq!(w.apply(same).await.unwrap().state, Failed);
        let asked = w.doubles.state().asked[before..].to_vec();
        assert!(
            !asked.iter().any(|a| START.contains(&a.as_str())),
            "{step}: {asked:?}"
        );
        w.doubles.state().failing.clear();
        assert_eq!(w.bring(n, Power::Running).await.state, Running, "{step}");
        w.bring(n, Power::Deleted).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_each_step_twice_leaves_nothing_half_done() {
    let mut w = World::new(0).await;
    for (n, step) in ["warden.vm_open", "vmctl.prepare_now"]
        .iter()
        .chain(&START)
        .enumerate()
    {
        let n = u8::try_from(n).unwrap() + 1;
        for _ in 0..2 {
            w.doubles.state().silent = Some((*step).into());
            let before = w.doubles.state().asked.len();
            let wish = w.wish(n, Power::Running);
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
            // A guest that came up just before the kill is taken over.
            let (state, slots) = if *step == "vmctl.attach" {
                (Running, 1)
            } else {
                (Crashed, 0)
            };
            w.becomes(n, state).await;
            assert_eq!(w.slots_of(n).len(), slots, "{step}");
            if state == Running {
                w.bring(n, Power::Stopped).await;
            }
        }
        assert_eq!(w.bring(n, Power::Running).await.state, Running, "{step}");
        for step in ["vmctl.shutdown", "warden.slot_close"] {
            w.doubles.state().silent = Some(step.into());
            let before = w.doubles.state().asked.len();
            let wish = w.wish(n, Power::Stopped);
            tokio::select! {
                got = w.apply(wish) => panic!("{step}: {got:?}"),
                () = until(step, async || {
                    let s = w.doubles.state();
                    s.asked[before..].iter().any(|a| a == step).then_some(())
                }) => {}
            }
            w.kill();
            w.doubles.state().silent = None;
            w.start().await;
            w.becomes(n, Stopped).await;
            w.bring(n, Power::Running).await;
        }
        w.doubles.state().silent = Some("warden.disk_erase".into());
        let wish = w.wish(n, Power::Deleted);
        let id = wish.workspace.clone();
        tokio::select! {
            got = w.apply(wish) => panic!("{got:?}"),
            () = until("erase", async || (!w.doubles.state().disks.contains(&id)).then_some(())) => {}
        }
        w.kill();
        w.doubles.state().silent = None;
        w.start().await;
        w.becomes(n, Deleted).await;
        assert!(w.slots_of(n).is_empty() && w.doubles.state().disks.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_workspaces_and_the_pool_survive_a_kill_of_host() {
    let mut w = World::new(1).await;
    let (one, two) = (
        w.bring(1, Power::Running).await,
        w.bring(2, Power::Running).await,
    );
    w.bring(2, Power::Paused).await;
    until("a pool", async || {
        let s = w.doubles.state();
        s.slots
            .values()
            .any(|x| x.vm == VmState::Pooled && x.at.workspace.is_none())
            .then_some(())
    })
    .await;
    let seq = w.changes(0).await.seq;
    w.kill();
    let before = w.doubles.state().asked.len();
    w.start().await;
    assert_eq!(w.becomes(1, Running).await.start_id, one.start_id);
    assert_eq!(w.becomes(2, Paused).await.start_id, two.start_id);
    assert_eq!(
        w.changes(seq).await.states.len(),
        2,
        "a reader from before hears of both"
    );
    let closed = w.doubles.state().asked[before..]
        .iter()
        .any(|a| a == "warden.slot_close");
    assert!(!closed);
    assert_eq!(
        w.bring(3, Power::Running).await.started_from.as_deref(),
        Some("pool")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_goes_away_is_noticed_closed_and_not_started_by_itself() {
    let mut w = World::new(0).await;
    for (n, reason) in [(1, Some("panic")), (2, Some("shutdown")), (3, None)] {
        w.bring(n, Power::Running).await;
        let slot = w.slots_of(n)[0];
        {
            let mut s = w.doubles.state();
            let x = s.slots.get_mut(&slot).unwrap();
            match reason {
                Some(r) => (x.vm, x.reason) = (VmState::Exited, Some(r.into())),
                None => x.at.state = SlotState::Dead,
            }
        }
        let crashed = w.becomes(n, Crashed).await;
        assert_eq!(
            crashed.error.is_none(),
            reason == Some("shutdown"),
            "{reason:?}"
        );
        assert!(crashed.ip.is_none() && w.slots_of(n).is_empty());
        assert_eq!(w.bring(n, Power::Running).await.state, Running);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_calls_a_start_off() {
    let mut w = World::new(0).await;
    w.doubles.state().silent = Some("vmctl.attach".into());
    let start = w.wish(1, Power::Running);
    let stop = w.wish(1, Power::Stopped);
    let client = w.client.clone();
    let begin = Op::Apply {
        desired: Box::new(start),
        wait_ms: 0,
    };
    let _: serde_json::Value = client.call("t", &begin).await.unwrap_or_default();
    until("attach", async || {
        w.doubles
            .state()
            .asked
            .contains(&"vmctl.attach".to_owned())
            .then_some(())
    })
    .await;
    assert_eq!(w.apply(stop).await.unwrap().state, Stopped);
    assert!(w.slots_of(1).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_in_the_middle_of_a_start_does_not_take_its_lease() {
    let mut w = World::new(0).await;
    let start = w.wish(1, Power::Running);
    let mut change = w.wish(1, Power::Running);
    (change.lease, change.start) = (None, None);
    change.public_access = true;
    let begin = Op::Apply {
        desired: Box::new(start),
        wait_ms: 0,
    };
    let _ = w.client.call::<_, serde_json::Value>("t", &begin).await;
    let up = w.apply(change).await.unwrap();
    assert_eq!((up.state, up.public_access), (Running, true));
}

/// While key and tokens are being made, a start goes as far as an attested disk, and no further.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_waits_for_its_key_with_an_attested_disk() {
    let mut w = World::new(0).await;
    let begin = async |w: &World, mut wish: api::host::Desired| {
        wish.token_state.clear();
        let ask = Op::Apply {
            desired: Box::new(wish),
            wait_ms: 0,
        };
        let _ = w.client.call::<_, serde_json::Value>("t", &ask).await;
    };
    let attested = async |w: &World, n| {
        until("an attested disk behind its rules", async || {
            let slot = *w.slots_of(n).first()?;
            let s = w.doubles.state();
            let x = &s.slots[&slot];
            (x.at.state == SlotState::DiskWaits && x.open.is_some()).then_some(())
        })
        .await;
    };
    let wish = w.wish(1, Power::Running);
    begin(&w, wish.clone()).await;
    attested(&w, 1).await;
    assert!(w.doubles.state().nonces.is_empty(), "no key is asked for");
    let up = w.apply(wish).await.unwrap();
    assert_eq!(up.state, Running);
    let opened = |a: &&String| *a == "warden.disk_open";
    assert_eq!(w.doubles.state().asked.iter().filter(opened).count(), 1);

    // One that is taken back leaves nothing.
    let wish = w.wish(2, Power::Running);
    begin(&w, wish).await;
    attested(&w, 2).await;
    assert_eq!(w.bring(2, Power::Deleted).await.state, Deleted);
    assert!(w.slots_of(2).is_empty());
    assert_eq!(w.doubles.state().disks.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_states_and_leases_that_are_over_are_refused() {
    let mut w = World::new(0).await;
    let old = w.wish(1, Power::Running);
    w.bring(1, Power::Stopped).await;
    let e: Error = w.apply(old).await.unwrap_err();
    assert_eq!(e.code, ErrorCode::Conflict);
    let late = w.wish(1, Power::Running);
    w.clock.set_ms(w.clock.now_ms() + 50_000);
    let failed = w.apply(late).await.unwrap();
    assert_eq!(failed.state, Failed);
    assert!(
        !w.doubles
            .state()
            .asked
            .contains(&"warden.disk_open".to_owned())
    );
    // Another workspace's lease is none.
    let mut wrong = w.wish(1, Power::Running);
    if let Some(lease) = &mut wrong.start {
        lease.workspace = WorkspaceId::from_bytes([7; 8]);
    }
    assert_eq!(w.apply(wrong).await.unwrap().state, Failed);
    assert!(w.doubles.state().nonces.is_empty());
}
