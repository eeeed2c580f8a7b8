//! casemate-volumes in its jail. Needs root.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use api::ErrorCode;
use jail::process::{Launcher, Proc};
use volumes::{Client, How, Name};
use world::*;

#[test]
fn a_casemate_volumes_that_dies_is_replaced_and_knows_what_is_there() {
    let world = World::new();
    let programs = world.dir.join("programs");
    let launcher = Launcher {
        program: programs.join("casemate-jail"),
        root: world.dir.clone(),
    };
    let mut volumes = Client::new(launcher, programs.join("casemate-volumes"));
    let disk = Name::disk(&WORKSPACE.parse().unwrap());
    let begun = volumes.open(disk.clone(), How::Write).unwrap();
    assert!(begun.fresh);

    let pid = volumes.pid().unwrap();
    let facts = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for fact in [
        "Uid:\t929997\t929997\t929997\t929997",
        "Gid:\t929997\t929997\t929997\t929997",
        "Groups:\t \n",
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(facts.contains(fact), "{fact:?} in {facts}");
    }
    for ns in ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{ns}");
    }
    let root = std::fs::read_dir(format!("/proc/{pid}/root")).unwrap();
    let mut root: Vec<_> = root
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    root.sort();
    assert_eq!(root, ["dev", "lib", "lib64", "usr", "volumes"]);

    // The lock is the descriptor's: it stands whoever dies, and the next one sees it.
    assert!(Proc::of(pid).unwrap().handle().unwrap().kill(SOON));
    let busy = volumes.open(disk.clone(), How::Write).unwrap_err();
    assert_eq!(busy.code, ErrorCode::Conflict);
    assert_ne!(volumes.pid().unwrap(), pid);
    volumes.keep(disk.clone(), &begun.volume).unwrap();
    let pid = volumes.pid().unwrap();
    assert!(Proc::of(pid).unwrap().handle().unwrap().kill(SOON));
    volumes.keep(disk.clone(), &begun.volume).unwrap();
    drop(begun);
    assert!(!volumes.open(disk, How::Read).unwrap().fresh);

    // With its warden it ends.
    let last = Proc::of(volumes.pid().unwrap()).unwrap();
    drop(volumes);
    assert!(last.handle().is_none());
}
