//! A hostile program in the VMM's place, in the jail as it ships: every system call, and every named
//! escape. Prints both tables. Needs root.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use api::warden::Start;
use jail::seccomp::{ABSENT, ALLOWED};
use std::time::Duration;
use world::World;

/// Allowed or not by their arguments.
const BY_ARGUMENT: [i64; 5] = [
    libc::SYS_clone,
    libc::SYS_execveat,
    libc::SYS_ioctl,
    libc::SYS_prctl,
    libc::SYS_socket,
];
#[test]
fn no_system_call_but_the_listed_ones() {
    world::every_call(&World::new(), ALLOWED, ABSENT, &BY_ARGUMENT);
}

#[test]
fn i14_no_escape_has_an_effect_outside() {
    let world = World::new();
    let rows = world::escapes(&world, &[]);
    world::print("the jail as it ships", &rows);
    assert!(rows.len() >= 40);
    for row in &rows {
        assert!(row.outside.is_empty(), "{row:?}");
        assert!(row.held(), "{row:?}");
    }
}

#[test]
fn i14_no_escape_of_a_woken_vmm_has_an_effect_on_what_it_was_woken_from() {
    let world = World::new();
    let rows = world::escapes_woken(&world, &[]);
    world::print("a woken VMM and its saved memory", &rows);
    assert!(rows.len() >= 30);
    for row in &rows {
        assert!(row.outside.is_empty(), "{row:?}");
        assert!(row.held(), "{row:?}");
    }
}

#[test]
fn the_vmm_holds_what_the_plan_names_and_no_more() {
    let world = World::new();
    let mut jail = world.jail(2, Start::Template, &[]);
    let wait = Duration::from_secs(5);
    assert_eq!(
        jail.ask("descriptors", wait).unwrap(),
        "0:character 1:character 2:pipe 3:socket 4:socket 5:character 6:file"
    );
    assert_eq!(
        jail.ask("self", wait).unwrap(),
        "uid=900002 gid=900002 pid=1 node=vm env=0"
    );
}
