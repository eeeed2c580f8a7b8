//! CVE-2026-1386's class: something lies in the launcher's way while it sets a jail up, a link
//! above all. It refuses, and what the link leads to stays as it was. Needs root.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use jail::{ARTIFACTS, CLOSURE, SCRATCH};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use world::World;

/// Somebody's directory, for links to lead to.
fn victim(world: &World) -> PathBuf {
    let victim = world.dir.join("victim");
    std::fs::create_dir(&victim).unwrap();
    std::fs::write(victim.join("file"), "theirs").unwrap();
    victim
}

/// Names, owners, modes, bytes, and whether anything is mounted there.
fn look(dir: &Path) -> String {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut all: Vec<String> = mounts
        .lines()
        .filter(|l| l.contains(dir.to_str().unwrap()))
        .map(String::from)
        .collect();
    for path in std::iter::once(dir.to_owned()).chain(
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path()),
    ) {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        all.push(format!(
            "{} {:o} {} {} {}",
            path.display(),
            meta.mode(),
            meta.uid(),
            meta.nlink(),
            std::fs::read_to_string(&path).unwrap_or_default()
        ));
    }
    all.sort();
    all.join("\n")
}

/// Puts a link in the way, or something like it, and starts a jail.
fn refused(what: &str, plant: impl FnOnce(&World, &Path), why: &str) {
    let world = World::new();
    let victim = victim(&world);
    plant(&world, &victim);
    let before = look(&victim);
    let started = catch_unwind(AssertUnwindSafe(|| world.start(1)));
    let panic = started.map(drop).expect_err(what);
    let said = panic.downcast_ref::<String>().unwrap();
    assert!(said.contains(why), "{what}: {said}");
    assert_eq!(before, look(&victim), "{what}");
}

fn replace_with_link(path: &Path, to: &Path) {
    let old = path.with_extension("old");
    std::fs::rename(path, &old).unwrap();
    symlink(to, path).unwrap();
}

#[test]
fn no_link_is_followed_while_a_jail_is_made() {
    const LINK: &str = "Too many levels of symbolic links";
    // Where the root is built.
    for up in [0, 1, 2] {
        refused(
            "a link on the way to the scratch directory",
            |w, victim| {
                let scratch = w.dir.join(SCRATCH);
                let at = scratch.ancestors().nth(up).unwrap();
                replace_with_link(at, victim);
            },
            LINK,
        );
    }
    // What goes into it.
    refused(
        "a link in place of the closure",
        |w, victim| replace_with_link(&w.dir.join(CLOSURE), victim),
        LINK,
    );
    // A link of the closure's own goes along as a link: what is placed below its name must not
    // follow it, neither by a whole path, which would lead out of the half-made root, nor by `..`.
    for to in ["victim", "../../../../../../../../../../victim"] {
        for name in ["image", "template", "dev"] {
            refused(
                "a link in the closure by the name of a directory of the plan's",
                |w, victim| {
                    let to = to.replace("victim", victim.to_str().unwrap());
                    symlink(to, w.dir.join(CLOSURE).join(name)).unwrap();
                },
                LINK,
            );
        }
    }
}

#[test]
fn nothing_is_taken_from_a_directory_that_others_write() {
    refused(
        "artifacts that everybody may write",
        |w, _| {
            let open = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(w.dir.join(ARTIFACTS), open).unwrap();
        },
        "must be root's and writable by root alone",
    );
    refused(
        "artifacts of somebody else",
        |w, _| std::os::unix::fs::chown(w.dir.join(ARTIFACTS), Some(65_533), None).unwrap(),
        "must be root's and writable by root alone",
    );
}

/// What is there already is not taken for what was to be made.
#[test]
fn what_a_name_stands_for_already_is_not_used() {
    refused(
        "a directory of the closure's by the name of one of the plan's",
        |w, victim| {
            let at = w.dir.join(CLOSURE).join("image");
            std::fs::create_dir(&at).unwrap();
            std::fs::hard_link(victim.join("file"), at.join("base.erofs")).unwrap();
        },
        "place Bind",
    );
}
