//! `casemate verify`: every claim with a check holds, under both ways of unsealing.

use crate::world::Platform;
use std::time::{Duration, Instant};

const PASSPHRASE: &str = "correct horse battery staple";
/// A disk limit that a slow guest reaches as well: else DSK-5 is not put to the test.
const LIMITS: &str = "[limits]\ndisk_bytes_per_s = 33554432\n";

#[test]
fn every_claim_holds_under_a_passphrase() {
    let p = Platform::start(
        &format!("[kms]\nunseal = \"passphrase\"\n{LIMITS}"),
        Some(PASSPHRASE),
    );
    let unsealed = p.casemate_with(&["kms", "unseal"], PASSPHRASE);
    p.expect_ok("kms unseal", &unsealed);
    let rows = verify(&p);
    for (id, status, evidence) in &rows {
        assert_eq!(status, "pass", "{id}: {evidence}");
    }
    assert!(rows.len() >= 30, "only {} checks ran", rows.len());
}

#[test]
fn a_file_unseal_is_said_openly() {
    let p = Platform::start(&format!("[host]\npool_size = 1\n{LIMITS}"), None);
    for (id, status, evidence) in verify(&p) {
        // What a key beside its ciphertext opens.
        let wanted = match id.as_str() {
            "KMS-2" | "DSK-3" | "DSK-8" => "not_yet",
            _ => "pass",
        };
        assert_eq!(status, wanted, "{id}: {evidence}");
    }
}

/// What floods may bring its own VM down: then that is what is said, and not what is missing since.
#[test]
fn a_flood_that_ends_its_own_vm_is_told_so() {
    let p = Platform::start("[host]\npool_size = 0\n", None);
    let verify = std::thread::scope(|s| {
        let verify = s.spawn(|| rows(&p, &["--json", "verify", "ISO-8"]));
        // The second workspace is the one that floods.
        let pid = loop {
            let mut slots = p.slots();
            slots.retain(|s| s["state"] == "disk_attached");
            if let [_, second] = &slots[..] {
                break second["vmm_pid"].as_i64().unwrap();
            }
            assert!(!verify.is_finished(), "{:?}", verify.join());
            std::thread::sleep(Duration::from_millis(50));
        };
        wait_for_flood(&p, pid);
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        verify.join().unwrap()
    });
    let [(_, status, evidence)] = &verify[..] else {
        panic!("{verify:?}");
    };
    assert_eq!(status, "fail", "{evidence}");
    let told = "the VM of the workspace that floods ended";
    assert!(evidence.contains(told), "{evidence}");
    assert!(evidence.contains("went away"), "{evidence}");
}

/// Until the VM has used so much CPU time that it can't be its start alone.
fn wait_for_flood(p: &Platform, pid: i64) {
    let slots = p.slots();
    let slot = slots.iter().find(|s| s["vmm_pid"] == pid).unwrap();
    let slot = u16::try_from(slot["slot"].as_u64().unwrap()).unwrap();
    let used = || crate::hostile_guest::counters(p, slot).unwrap().cpu_ns;
    let (at_first, until) = (used(), Instant::now() + Duration::from_secs(60));
    while used() - at_first < 3_000_000_000 {
        assert!(Instant::now() < until, "it does not flood");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// (id, status, evidence) of every check.
fn verify(p: &Platform) -> Vec<(String, String, String)> {
    rows(p, &["--json", "verify"])
}

fn rows(p: &Platform, args: &[&str]) -> Vec<(String, String, String)> {
    let out = p.casemate(args);
    let text = String::from_utf8_lossy(&out.stdout);
    let Ok(rows) = serde_json::from_str::<Vec<serde_json::Value>>(&text) else {
        p.expect_ok("verify", &out);
        panic!("verify printed no JSON: {text}");
    };
    let field = |row: &serde_json::Value, name: &str| row[name].as_str().unwrap().to_owned();
    rows.iter()
        .map(|r| (field(r, "id"), field(r, "status"), field(r, "evidence")))
        .collect()
}
