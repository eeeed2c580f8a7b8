//! Every system call that a VMM is allowed is made by one: whole lives of VMs, watched from outside
//! (`strace`), held against the list. A rule that nobody needs says why it stays.

use crate::world::{Platform, artifacts};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The list as it stands in the source: names and reasons.
const LIST: &str = include_str!("../../../jail/src/seccomp.rs");

#[test]
fn every_system_call_of_the_list_is_needed() {
    let dir = tempfile::Builder::new()
        .prefix("rules-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap();
    let traces = dir.path().join("traces");
    std::fs::create_dir(&traces).unwrap();
    let programs = watched(dir.path(), &traces);
    let p = Platform::start_of(programs, &artifacts(), "[host]\npool_size = 1\n", None);
    let account = p.account("rules");
    let run = |args: &[&str]| {
        let out = p.as_user(&account, args);
        p.expect_ok(args[1], &out);
        String::from_utf8(out.stdout).unwrap()
    };
    // Boot and build of the template lie behind; now restore, attach, disk, network, pauses, ends.
    let made = run(&["--json", "ws", "create", "--public-access"]);
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    let id = made["id"].as_str().unwrap();
    let work = "head -c 20000000 /dev/urandom > /a; sync; echo 3 > /proc/sys/vm/drop_caches; \
                cat /a | wc -c; rm /a; sync; fstrim -v / || true";
    run(&["ws", "exec", id, "--", "sh", "-c", work]);
    run(&["ws", "pause", id]);
    run(&["ws", "resume", id]);
    run(&["ws", "stop", id]);
    run(&["ws", "start", id]);
    run(&["ws", "exec", id, "--", "true"]);
    run(&["ws", "rm", id]);
    drop(p);

    let used = calls(&traces);
    assert!(used.contains("ppoll"), "the watch is blind");
    let from = LIST.find("pub const ALLOWED").unwrap();
    let to = LIST.find("pub const IOCTLS").unwrap();
    let mut needless = Vec::new();
    let mut spare = 0;
    let rows: Vec<&str> = LIST[from..to].split("libc::SYS_").skip(1).collect();
    for row in &rows {
        let name = row.split(',').next().unwrap();
        let reason = row.split('"').nth(1).unwrap();
        if used.contains(name) {
            continue;
        }
        if reason.starts_with("spare: ") {
            spare += 1;
        } else {
            needless.push(name);
        }
    }
    println!(
        "{} rules; {} calls seen; {spare} rules are spare",
        rows.len(),
        used.len()
    );
    assert!(
        needless.is_empty(),
        "allowed, but no run made it: {needless:?}"
    );
}

/// The platform's programs, with the launcher under `strace`; `casemate` among them.
fn watched(dir: &Path, traces: &Path) -> std::path::PathBuf {
    let programs = dir.join("programs");
    std::fs::create_dir(&programs).unwrap();
    let built = Path::new(env!("CARGO_BIN_EXE_casemate")).parent().unwrap();
    for entry in std::fs::read_dir(built).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("casemate") && !name.ends_with(".d") {
            std::fs::hard_link(entry.path(), programs.join(name)).unwrap();
        }
    }
    let launcher = programs.join("casemate-jail");
    let real = programs.join("launcher");
    std::fs::rename(&launcher, &real).unwrap();
    // As a grandchild: the launcher stays warden's child, and its child too.
    let script = format!(
        "#!/bin/sh\nexec strace -DD -f -qq -o {}/$$ {} \"$@\"\n",
        traces.display(),
        real.display()
    );
    std::fs::write(&launcher, script).unwrap();
    for path in [dir, programs.as_path(), launcher.as_path()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    programs.join("casemate")
}

/// The calls that VMMs made, from their exec on.
fn calls(traces: &Path) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for entry in std::fs::read_dir(traces).unwrap() {
        let text = std::fs::read(entry.unwrap().path()).unwrap();
        let text = String::from_utf8_lossy(&text);
        let started = |l: &&str| !(l.contains("execveat(") && l.contains("qemu-system"));
        for line in text.lines().skip_while(started) {
            // `PID name(…` or `PID <... name resumed>…`.
            let rest = line.split_once(' ').map_or("", |(_, r)| r.trim_start());
            let rest = rest.strip_prefix("<... ").unwrap_or(rest);
            let name = rest.split(['(', ' ']).next().unwrap_or_default();
            all.insert(name.to_owned());
        }
    }
    all
}
