//! Firecracker's jail: what it holds, every system call and every named escape with the hostile
//! program in its place; and, where `CASEMATE_FIRECRACKER` names a real one of the pinned version,
//! that it made each call of its list, or the row says `spare:`. Needs root and `/dev/kvm`.
#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use api::warden::Start;
use jail::seccomp::firecracker::{ABSENT, ALLOWED};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vmm::firecracker::{Firecracker, Limits, Paths, Spec};
use vmm::qemu::How;
use vmm::{DiskFile, Vmm};
use world::{End, World};

/// Allowed or not by their arguments.
const BY_ARGUMENT: [i64; 6] = [
    libc::SYS_clone,
    libc::SYS_execveat,
    libc::SYS_ioctl,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_socket,
];

/// What this VMM may do and QEMU may not, in a jail where none of it reaches outside.
const ITS_OWN: [&str; 6] = [
    "open /dev/kvm",
    "open /dev/net/tun",
    "bind an abstract name",
    "memfd_create",
    // A machine of its own, in memory of its own, which its group bounds.
    "a second VM of KVM",
    "fill the disk's place",
];

/// The hostile program as Firecracker is, static: of the same source, with what its dynamic twin was
/// built with.
fn hostile() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/hostile/main.rs");
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile-static");
    let new = built.with_extension(std::process::id().to_string());
    let deps = Path::new(world::LAUNCHER).with_file_name("deps");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let libcs = std::fs::read_dir(&deps).unwrap().map(|e| e.unwrap().path());
    let libcs = libcs.filter(|p| {
        let name = p.file_name().unwrap().to_str().unwrap();
        name.starts_with("liblibc-") && name.ends_with(".rlib")
    });
    // There may be several, of other compilers too; any that fits will do.
    let built_with = |libc: PathBuf| {
        let output = Command::new(&rustc)
            .args(["--edition", "2024", "-C", "target-feature=+crt-static"])
            .arg("--extern")
            .arg(format!("libc={}", libc.display()))
            .arg("-o")
            .args([&new, &source])
            .output();
        let output = output.unwrap();
        if output.status.success() {
            return true;
        }
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        false
    };
    assert!(libcs.into_iter().any(built_with), "it does not compile");
    std::fs::rename(&new, &built).unwrap();
    built
}

/// Without `/dev/kvm` there is no such jail.
fn kvm() -> bool {
    let there = std::fs::File::open("/dev/kvm").is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm does not open");
    }
    there
}

#[test]
fn no_system_call_but_the_listed_ones() {
    if kvm() {
        world::every_call(
            &World::firecracker(&hostile()),
            ALLOWED,
            ABSENT,
            &BY_ARGUMENT,
        );
    }
}

#[test]
fn no_escape_has_an_effect_outside() {
    if !kvm() {
        return;
    }
    let rows = world::escapes(&World::firecracker(&hostile()), &[]);
    world::print("Firecracker's jail as it ships", &rows);
    for row in &rows {
        assert!(row.outside.is_empty(), "{row:?}");
        let own = ITS_OWN.contains(&row.escape.as_str());
        assert!(row.held() || own, "{row:?}");
        // The placeholder holds a page.
        if row.escape == "fill the disk's place" {
            assert!(matches!(row.end, End::Returned(0..=4096)), "{row:?}");
        }
    }
}

#[test]
fn it_holds_what_the_plan_names_and_no_more() {
    if !kvm() {
        return;
    }
    let world = World::firecracker(&hostile());
    let mut jail = world.jail(2, Start::Template, &[]);
    let wait = Duration::from_secs(5);
    // Its socket, and who connected to it.
    assert_eq!(
        jail.ask("descriptors", wait).unwrap(),
        "0:character 1:character 2:pipe 3:socket 4:socket"
    );
    // It has no call that would tell it.
    let status = std::fs::read_to_string(format!("/proc/{}/status", jail.handle.proc.pid)).unwrap();
    let field = |name: &str| -> Vec<String> {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace().map(String::from).collect()
    };
    assert_eq!(field("Uid:"), ["900002"; 4]);
    assert_eq!(field("Gid:"), ["900002"; 4]);
    assert_eq!(field("NSpid:").last().unwrap(), "1");
    let environment = format!("/proc/{}/environ", jail.handle.proc.pid);
    assert!(std::fs::read(environment).unwrap().is_empty());
    let root = format!("/proc/{}/root", jail.handle.proc.pid);
    let names = |dir: &str| -> Vec<String> {
        let entries = std::fs::read_dir(format!("{root}/{dir}")).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let top = [
        "dev",
        "disk",
        "firecracker",
        "held",
        "image",
        "template",
        "vmm",
    ];
    assert_eq!(names(""), top);
    assert_eq!(names("dev"), ["kvm", "net", "null"]);
    assert_eq!(names("vmm"), ["api.sock", "vsock_1024"]);
    assert_eq!(names("disk"), ["volume"]);
    assert_eq!(names("held"), ["disk"]);
}

/// A life that builds a template and one that goes on from it, watched from outside.
#[test]
fn every_system_call_of_the_list_is_needed() {
    let Some(program) = std::env::var_os("CASEMATE_FIRECRACKER").filter(|_| kvm()) else {
        eprintln!("SKIPPED: CASEMATE_FIRECRACKER is not set");
        return;
    };
    let artifacts = std::env::var_os("CASEMATE_ARTIFACTS").map_or_else(
        || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("artifacts"),
        PathBuf::from,
    );
    let mut world = World::firecracker(program.as_ref());
    for (name, file) in [("kernel", "vmlinux"), ("initramfs", "initramfs.cpio")] {
        std::fs::copy(artifacts.join("kernel").join(file), world.dir.join(name)).unwrap();
    }
    let traces = world.dir.join("traces");
    std::fs::create_dir(&traces).unwrap();
    world.launcher = watched(&world.dir, &traces);
    let spec = |how| Spec {
        how,
        memory_mib: 128,
        cpus: 1,
        tap: true,
        limits: Limits::default(),
        paths: Paths::jail(),
    };
    for (how, start) in [(How::Build, Start::Build), (How::Template, Start::Template)] {
        let jail = world.jail(1, start, &[]);
        let api = jail.ctl.get_ref().try_clone().unwrap();
        let mut vmm = Firecracker::new(api, spec(how)).unwrap();
        if how == How::Template {
            vmm.restore().unwrap();
        }
        vmm.cont().unwrap();
        vmm.stop().unwrap();
        vmm.disk_attach(&DiskFile::Mounted, 64 << 20).unwrap();
        vmm.limit(&Limits::default()).unwrap();
        if how == How::Build {
            vmm.save().unwrap();
            for (built, sealed) in [("built", "memory"), ("built-state", "state")] {
                std::fs::rename(world.dir.join(built), world.dir.join(sealed)).unwrap();
            }
        }
        vmm.cont().unwrap();
        vmm.quit().unwrap();
    }

    let used = calls(&traces);
    assert!(used.contains("epoll_ctl"), "the watch is blind: {used:?}");
    let list = include_str!("../src/seccomp/firecracker.rs");
    let from = list.find("pub const ALLOWED").unwrap();
    let to = list.find("pub const IOCTLS").unwrap();
    let rows: Vec<&str> = list[from..to].split("libc::SYS_").skip(1).collect();
    let unused: Vec<(&str, bool)> = rows
        .iter()
        .map(|row| {
            let spare = row.split('"').nth(1).unwrap().starts_with("spare: ");
            (row.split(',').next().unwrap(), spare)
        })
        .filter(|(name, _)| !used.contains(*name))
        .collect();
    let needless: Vec<_> = unused.iter().filter(|(_, spare)| !spare).collect();
    println!(
        "{} rules; {} calls seen; {} rules are spare",
        rows.len(),
        used.len(),
        unused.len()
    );
    assert!(
        needless.is_empty(),
        "allowed, but no run made it: {needless:?}"
    );
}

/// The launcher under `strace`, as its grandchild: the launcher stays this process's child.
fn watched(dir: &Path, traces: &Path) -> PathBuf {
    let script = dir.join("launcher");
    let text = format!(
        "#!/bin/sh\nexec strace -DD -f -qq -o {}/$$ {} \"$@\"\n",
        traces.display(),
        world::LAUNCHER
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    script
}

/// The calls that the VMMs made, from their exec on; the helper's, which connects, are not theirs.
fn calls(traces: &Path) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(traces).unwrap() {
        let text = std::fs::read(entry.unwrap().path()).unwrap();
        let text = String::from_utf8_lossy(&text);
        let lines = text.lines().filter_map(|l| l.split_once(' '));
        let helpers: BTreeSet<_> = lines
            .clone()
            .filter(|(_, call)| call.trim_start().starts_with("connect("))
            .map(|(pid, _)| pid)
            .collect();
        let started =
            |l: &(&str, &str)| !(l.1.contains("execveat(") && l.1.contains("firecracker"));
        for (pid, call) in lines.skip_while(started) {
            if helpers.contains(pid) {
                continue;
            }
            // `name(…` or `<... name resumed>…`.
            let call = call.trim_start();
            let call = call.strip_prefix("<... ").unwrap_or(call);
            all.insert(call.split(['(', ' ']).next().unwrap_or_default().to_owned());
        }
    }
    all
}
