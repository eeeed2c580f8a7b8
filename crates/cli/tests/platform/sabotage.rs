//! Each claim's check can fail: one change that breaks the claim, and `casemate verify` says so.
//!
//! `sabotage/` holds the changes. An `.sh` acts from outside on an installation that runs; a
//! `.patch` is in the source of a second build, and asleep there until its file is made. Both are
//! taken back; at the end every claim holds again, in the very build that has the patches.

use crate::world::Platform;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

const PASSPHRASE: &str = "correct horse battery staple";

/// A disk limit that a slow guest reaches as well.
const CONFIG: &str = "[host]\npool_size = 0\n[kms]\nunseal = \"passphrase\"\n\
                      [limits]\ndisk_bytes_per_s = 16777216\n";

/// Each sabotage, named after the claim and, where it has several, the part, and what the claim's check
/// must have seen: a fail for another reason proves nothing.
const SEEN: &[(&str, &str)] = &[
    ("ACC-1", "of a new workspace: open"),
    ("ACC-2", "closed, the edge's own dial met open"),
    ("ACC-3", "no token 200"),
    ("ACC-5", "public_access alone: 9991 open, 3000 refused"),
    ("ACC-7", "the guest itself still takes it: 200"),
    ("ISO-1", "a kernel's setting changed"),
    ("ISO-2", "has a thread with Seccomp 0"),
    ("ISO-3", "the VMM shares the host's user namespace"),
    ("ISO-4", "from one workspace to another's port"),
    ("ISO-5", ":80 answered"),
    ("ISO-6", "host answers read_memory"),
    ("ISO-7", "spoofed datagrams were delivered"),
    ("ISO-8", "the kernel lets a workspace of 1 CPUs have 64"),
    ("DSK-1", "the disk file is open in"),
    ("DSK-2", "allocated sectors of two workspaces are equal"),
    ("DSK-3", "the canary stands in"),
    ("DSK-4", "epoch secrets on disk"),
    ("DSK-5", "against a limit of 16 MiB/s"),
    // The KMS holds an anchor of the disk that was, so the empty one is not even opened.
    ("DSK-6", "and is not opened; have the operator put"),
    (
        "DSK-6-anchor",
        "it started on a disk rolled back to before its last start",
    ),
    ("DSK-6-tags", "it started on a disk with one bit changed"),
    ("DSK-7", "is still there"),
    ("DSK-8", "the canary stands in"),
    ("KMS-1", "two workspaces have the same identity key"),
    ("KMS-2", "there is an unseal.key"),
    ("KMS-4", "the epoch did not change"),
    ("KMS-5", "the KMS answers: answered"),
    ("KMS-7", "0 kms.release entries"),
    ("SEE-1", "output of a command stands in"),
    ("SEE-3", "what ran inside stands in the audit log"),
    ("EDGE-1", "without HSTS"),
    ("EDGE-5", "the agent's port answered plain HTTP"),
    ("OPS-4", "no kms.key_create"),
    ("LOG-3", "can list the log"),
];

/// The claim that a sabotage is of.
fn claim(name: &str) -> &str {
    let end = name.match_indices('-').nth(1).map(|(at, _)| at);
    &name[..end.unwrap_or(name.len())]
}

#[test]
fn every_check_has_a_sabotage() {
    let checks: Vec<&str> = cli::verify::CHECKS.iter().map(|c| c.id).collect();
    let mut seen: Vec<&str> = SEEN.iter().map(|(name, _)| claim(name)).collect();
    seen.dedup();
    assert_eq!(checks, seen);
    let (mut scripts, mut patches) = (BTreeSet::new(), BTreeSet::new());
    for entry in std::fs::read_dir(dir()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        match path.extension().and_then(|e| e.to_str()) {
            Some("sh") if name != "lib" => scripts.insert(name),
            Some("patch") => patches.insert(name),
            _ => continue,
        };
    }
    let series = std::fs::read_to_string(dir().join("series")).unwrap();
    let series: BTreeSet<String> = series.lines().map(str::to_owned).collect();
    assert_eq!(patches, series, "the patches and their order");
    patches.remove("switch");
    assert!(
        scripts.is_disjoint(&patches),
        "two sabotages of one name: {scripts:?} {patches:?}"
    );
    let both: BTreeSet<&str> = scripts.iter().chain(&patches).map(String::as_str).collect();
    assert_eq!(both, SEEN.iter().map(|(name, _)| *name).collect());
}

#[test]
fn each_sabotage_turns_its_check_to_fail() {
    let built = Command::new(dir().join("build")).output().unwrap();
    assert!(
        built.status.success(),
        "sabotage/build: {}{}",
        String::from_utf8_lossy(&built.stdout),
        String::from_utf8_lossy(&built.stderr)
    );
    let to = dir().join("../target/sabotage").canonicalize().unwrap();
    let exe = to.join("bin/casemate");
    let p = Platform::start_of(exe, &to.join("artifacts"), CONFIG, Some(PASSPHRASE));
    let unsealed = p.casemate_with(&["kms", "unseal"], PASSPHRASE);
    p.expect_ok("kms unseal", &unsealed);
    let mut wrong = Vec::new();
    for (id, seen) in SEEN {
        switch(&p, id, true);
        let rows = verify(&p, &[claim(id)]);
        switch(&p, id, false);
        let (status, evidence) = (&rows[0].1, &rows[0].2);
        println!("{id}: {status}: {evidence}");
        if status != "fail" || !evidence.contains(seen) {
            wrong.push(format!(
                "{id}: wanted a fail with {seen:?}, got {status}: {evidence}"
            ));
        }
    }
    // All is taken back: it was the one change that did it, and each check can pass here.
    for (id, status, evidence) in verify(&p, &[]) {
        if status != "pass" {
            wrong.push(format!("{id}, not sabotaged: {status}: {evidence}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    p.expect_ok("down", &p.casemate(&["down"]));
    assert_eq!(p.leftovers(), Vec::<String>::new());
}

/// Turns a sabotage on or off.
fn switch(p: &Platform, id: &str, on: bool) {
    let script = dir().join(format!("{id}.sh"));
    if script.exists() {
        let out = Command::new(&script)
            .arg(if on { "on" } else { "off" })
            .env("ROOT", p.root())
            .env("FABRIC", p.fabric())
            .output()
            .unwrap();
        p.expect_ok(&script.display().to_string(), &out);
        return;
    }
    let dir = p.root().join("run/casemate/sabotage");
    std::fs::create_dir_all(&dir).unwrap();
    if on {
        std::fs::write(dir.join(id), "").unwrap();
    } else {
        std::fs::remove_file(dir.join(id)).unwrap();
    }
}

/// (id, status, evidence) of the named checks, or of all.
fn verify(p: &Platform, ids: &[&str]) -> Vec<(String, String, String)> {
    let args: Vec<&str> = ["--json", "verify"].iter().chain(ids).copied().collect();
    let out = p.casemate(&args);
    let Ok(rows) = serde_json::from_slice::<Vec<serde_json::Value>>(&out.stdout) else {
        p.expect_ok("verify", &out);
        panic!("verify printed no JSON");
    };
    let field = |row: &serde_json::Value, name: &str| row[name].as_str().unwrap().to_owned();
    rows.iter()
        .map(|r| (field(r, "id"), field(r, "status"), field(r, "evidence")))
        .collect()
}

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sabotage")
}
