//! A hostile program in the VMM's place, in the jail as it ships: every system call, and every named
//! escape. Prints both tables. Needs root.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use api::warden::Start;
use jail::seccomp::{ABSENT, ALLOWED};
use std::collections::BTreeMap;
use std::time::Duration;
use world::{End, World};

/// The numbers of this kernel's table end before this.
const NUMBERS: i64 = 470;
/// Allowed or not by their arguments.
const BY_ARGUMENT: [i64; 5] = [
    libc::SYS_clone,
    libc::SYS_execveat,
    libc::SYS_ioctl,
    libc::SYS_prctl,
    libc::SYS_socket,
];
const CLASSES: [&str; 4] = ["zeros", "ones", "pointers", "descriptor"];

/// `uretprobe` and `uprobe`: the kernel asks no filter about them, and refuses them (or kills)
/// from anywhere but the trampoline of a probe of its own.
const OF_PROBES: [i64; 2] = [335, 336];

#[test]
fn no_system_call_but_the_listed_ones() {
    let world = World::new();
    let x32 = 0x4000_0000;
    let numbers: Vec<i64> = (0..=NUMBERS)
        .chain([x32, x32 + 1, x32 + 59, x32 + 101, x32 + 520])
        .chain([1000, 4096, i64::from(i32::MAX), 0x8000_0000, 0xffff_ffff])
        .collect();
    let mut jail = None;
    let mut ends: BTreeMap<i64, Vec<End>> = BTreeMap::new();
    for nr in &numbers {
        for class in 0..CLASSES.len() {
            let mut now = jail
                .take()
                .unwrap_or_else(|| world.jail(1, Start::Template, &[]));
            let end = now.call(&format!("sys {nr} {class}"));
            if matches!(end, End::Returned(_)) {
                jail = Some(now);
            }
            ends.entry(*nr).or_default().push(end);
        }
    }
    let mut count = [0; 4];
    for (nr, ends) in &ends {
        let killed = ends.iter().filter(|e| e.killed()).count();
        if BY_ARGUMENT.contains(nr) {
            count[0] += 1;
            assert!(killed > 0, "{nr}: {ends:?}");
        } else if ALLOWED.iter().any(|(n, _)| n == nr) {
            count[1] += 1;
            assert_eq!(killed, 0, "{nr} is on the list: {ends:?}");
        } else if ABSENT.iter().any(|(n, _)| n == nr) {
            count[2] += 1;
            let absent = End::Returned(-i64::from(libc::ENOSYS));
            assert!(ends.iter().all(|e| *e == absent), "{nr}: {ends:?}");
        } else if OF_PROBES.contains(nr) && killed == 0 {
            count[3] += 1;
            let refused = |e: &End| e.stopped();
            assert!(ends.iter().all(refused), "{nr}: {ends:?}");
        } else {
            count[3] += 1;
            assert_eq!(killed, CLASSES.len(), "{nr} is not on the list: {ends:?}");
        }
    }
    let [argument, allowed, absent, killed] = count;
    println!(
        "{} numbers in {} classes of arguments: {killed} kill, {absent} are absent, {argument} go \
         by argument, {allowed} are allowed",
        numbers.len(),
        CLASSES.len()
    );
    // All that is allowed was tried.
    assert_eq!(
        (allowed, absent, argument),
        (ALLOWED.len(), ABSENT.len(), BY_ARGUMENT.len())
    );
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
