//! The whole life of a workspace's VM with the real VMM, vmctl and disk, in warden's own jails.
//!
//! Needs artifacts (`cargo xtask image`) in `target/artifacts`, where `CASEMATE_ARTIFACTS` says, or
//! on the machine; says so and passes where there are none.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use vmm::driver::Driver;
use world::life::{artifacts, lives};
use world::*;

#[test]
fn a_workspace_from_template_to_teardown() {
    let Some(artifacts) = artifacts() else {
        return;
    };
    in_netns(move || {
        let world = World::with_artifacts(&artifacts);
        lives(&world, Driver::Qemu, || world.open(None));
    });
}
