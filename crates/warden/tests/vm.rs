//! The whole life of a workspace's VM with the real VMM, vmctl and disk, in warden's own jails.
//!
//! Needs artifacts (`cargo xtask image`) in `target/artifacts` or on the machine; says so and
//! passes where there are none.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::vmctl;
use api::warden::{Op, SlotState, Start, VmOpened};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;
use world::life::{artifacts, ask, start};
use world::*;

const MEMORY_MB: u32 = 256;

#[test]
fn a_workspace_from_template_to_teardown() {
    let Some(artifacts) = artifacts() else {
        eprintln!("SKIPPED: no artifacts; run `cargo xtask image`");
        return;
    };
    in_netns(move || {
        let world = World::with_artifacts(&artifacts);
        let mut w = world.open(None);
        // Build.
        w.answer(vm_open(&world, 0, Start::Build)).unwrap();
        ask::<vmctl::Status>(&world, 0, &vmctl::Op::Prepare);
        ask::<bool>(&world, 0, &vmctl::Op::Save);
        w.answer(Op::TemplateSeal { slot: 0 })
            .unwrap_or_else(|e| panic!("{e:?}"));
        assert_eq!(status(&w).templates.len(), 1);
        // Restored and cold, the same workspace after one another: its data stays.
        let mut run = 0;
        for (slot, how) in [(1, Start::Template), (2, Start::Cold), (1, Start::Template)] {
            let net: VmOpened =
                serde_json::from_value(w.answer(vm_open(&world, slot, how)).unwrap()).unwrap();
            ask::<vmctl::Status>(&world, slot, &vmctl::Op::Prepare);
            run += 1;
            let attach = start(&world, &w, slot, &net, run);
            ask::<api::agent::Up>(
                &world,
                slot,
                &vmctl::Op::Attach {
                    attach: Box::new(attach),
                    wait_ms: 60_000,
                },
            );
            let to = |port| SocketAddr::new(net.ip.parse().unwrap(), port);
            assert!(!dial(EDGE_UID, to(9991)), "closed until opened");
            w.answer(Op::NetSet {
                slot,
                open: vec![edge(9991)],
                rates: api::warden::NetRates::default(),
            })
            .unwrap();
            assert!(dial(EDGE_UID, to(9991)), "{how:?}");
            // Another warden takes over a workspace that runs.
            drop(w);
            w = world.open(None);
            let slots = status(&w).slots;
            assert_eq!((slots.len(), slots[0].state), (1, SlotState::DiskAttached));
            assert!(dial(EDGE_UID, to(9991)), "{how:?}");
            assert!(!dial(EDGE_UID, to(9990)));
            assert!(!dial(0, to(9991)), "root is not the edge");
            w.answer(Op::NetSet {
                slot,
                open: vec![],
                rates: api::warden::NetRates::default(),
            })
            .unwrap();
            assert!(!dial(EDGE_UID, to(9991)));
            ask::<vmctl::Status>(&world, slot, &vmctl::Op::Pause);
            ask::<vmctl::Status>(&world, slot, &vmctl::Op::Resume);
            ask::<vmctl::Status>(&world, slot, &vmctl::Op::Shutdown { grace_ms: 30_000 });
            let disk = slots[0].disk_pid.unwrap();
            until("the disk ends with its VMM", || {
                jail::process::Proc::of(disk).is_none()
            });
            w.answer(Op::SlotClose { slot }).unwrap();
            world.assert_clean();
        }
    });
}

fn vm_open(world: &World, slot: u16, how: Start) -> Op {
    Op::VmOpen {
        slot,
        how,
        image: world.image.clone(),
        memory_mb: MEMORY_MB,
        cpus: 1,
    }
}

/// Whether `uid` gets a connection; a dropped packet is no answer, so there is a limit.
fn dial(uid: u32, to: SocketAddr) -> bool {
    as_uid(uid, move || {
        TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok()
    })
}
