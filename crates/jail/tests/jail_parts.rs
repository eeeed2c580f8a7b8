//! The jail's parts taken away one by one: each is needed, and what stands behind it is shown.
//! Prints what changes. Needs root.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use std::collections::HashMap;
use world::tracer::Part::{self, *};
use world::{Row, World};

/// A part, and the layers that would hide that it is gone: those are away on both sides of the
/// second comparison.
const PARTS: &[(Part, &[Part])] = &[
    (Seccomp, &[Landlock]),
    (Landlock, &[Seccomp, Net]),
    (User, &[Seccomp, Landlock, Uid, Capabilities]),
    (Pid, &[Seccomp, Landlock]),
    (Net, &[Seccomp, Landlock]),
    (Ipc, &[Seccomp, Landlock]),
    (Uts, &[Seccomp, Landlock, Uid, User, Capabilities]),
    (Root, &[Seccomp, Landlock]),
    (ReadOnly, &[Seccomp, Landlock, Uid]),
    (Uid, &[Seccomp, Landlock]),
    (Capabilities, &[Seccomp, Landlock, Uid, User]),
    (NoNewPrivs, &[Seccomp, Landlock]),
    (Nproc, &[Cgroup]),
    (Nofile, &[]),
    (Fsize, &[]),
    (Memlock, &[]),
    (Core, &[]),
    (Cgroup, &[]),
];

/// The same of those that stand before the memory that a VMM was woken from. The uid does too:
/// without it there is nothing to try, see below.
const WOKEN: &[(Part, &[Part])] = &[
    (Seccomp, &[]),
    (Landlock, &[]),
    (Root, &[Seccomp, Landlock]),
    (ReadOnly, &[Seccomp, Landlock]),
];

#[test]
fn every_part_is_needed() {
    let useless = useless(PARTS, world::escapes);
    assert!(useless.is_empty(), "nothing changes without {useless:?}");
}

/// And whatever is gone, the memory stays as it was: the last to refuse is the process that serves it.
#[test]
fn every_part_before_saved_memory_is_needed() {
    let useless = useless(WOKEN, |world, parts| {
        let rows = world::escapes_woken(world, parts);
        assert!(rows.len() >= 30);
        for row in &rows {
            assert!(row.outside.is_empty(), "without {parts:?}: {row:?}");
        }
        rows
    });
    assert!(useless.is_empty(), "nothing changes without {useless:?}");
}

/// Those of `parts` whose absence changes nothing of what `escapes` come to; prints what changes.
fn useless(parts: &[(Part, &[Part])], escapes: impl Fn(&World, &[Part]) -> Vec<Row>) -> Vec<Part> {
    let mut tables: HashMap<String, Vec<Row>> = HashMap::new();
    let mut table = |parts: &[Part]| -> Vec<Row> {
        let mut parts = parts.to_vec();
        parts.sort_by_key(|p| format!("{p:?}"));
        let all = tables.entry(format!("{parts:?}"));
        all.or_insert_with(|| escapes(&World::new(), &parts))
            .clone()
    };
    let full = table(&[]);
    let mut useless = Vec::new();
    for (part, behind) in parts {
        // Without these alone the jail does not come up: see the other tests.
        let alone = if matches!(part, NoNewPrivs | Root) {
            vec![]
        } else {
            changes(&full, &table(&[*part]))
        };
        let without = [&[*part], *behind].concat();
        let deep = if behind.is_empty() {
            vec![]
        } else {
            changes(&table(behind), &table(&without))
        };
        println!("\nwithout {part:?}: {} results change", alone.len());
        alone.iter().for_each(|c| println!("  {c}"));
        if !behind.is_empty() {
            println!(
                "without {part:?}, with {behind:?} gone on both sides: {}",
                deep.len()
            );
            deep.iter().for_each(|c| println!("  {c}"));
        }
        if alone.is_empty() && deep.is_empty() {
            useless.push(*part);
        }
    }
    useless
}

/// Without it the jail does not come up: unprivileged processes may not filter themselves.
#[test]
#[should_panic(expected = "landlock")]
fn no_filters_without_no_new_privs() {
    let world = World::new();
    world.jail(1, api::warden::Start::Template, &[NoNewPrivs]);
}

/// Without it the VMM is another user, whom the file system with the saved memory does not let in.
#[test]
#[should_panic(expected = "Permission denied")]
fn nobody_but_its_user_is_woken_from_saved_memory() {
    let world = World::new();
    world.jail(1, api::warden::Start::Wake, &[Uid]);
}

/// Without it Landlock, whose rules are of the jail's own root, lets nothing be run.
#[test]
#[should_panic(expected = "Permission denied")]
fn nothing_runs_in_the_hosts_root() {
    let world = World::new();
    world.jail(1, api::warden::Start::Template, &[Root]);
}

/// The rows that differ, as `escape: before -> after (effect outside)`.
fn changes(before: &[Row], after: &[Row]) -> Vec<String> {
    let pairs = before.iter().zip(after);
    pairs
        .filter(|(b, a)| b.outside != a.outside || !b.end.like(&a.end))
        .map(|(b, a)| {
            let outside = if a.outside.is_empty() {
                String::new()
            } else {
                format!("  OUTSIDE: {}", a.outside.join("; "))
            };
            format!("{}: {} -> {}{outside}", b.escape, b.ending(), a.ending())
        })
        .collect()
}
