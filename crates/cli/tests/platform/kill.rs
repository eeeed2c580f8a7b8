//! `kill -9` of any process at any moment: the operation finishes or unwinds, and nothing is left.
//!
//! The steps of each journal are tested one by one in the crates that own them; here the whole
//! runs, and what is looked at is the machine. The moments come from a seed that is printed.

use crate::world::Platform;
use std::process::Command;
use std::time::{Duration, Instant};

/// Processes that are killed, by their name in the supervisor's table, or on the slot.
const VICTIMS: &[&str] = &[
    "audit-append",
    "audit-integrate",
    "kms",
    "mint",
    "warden",
    "host",
    "control",
    "edge",
    "vmm",
    "disk",
    "vmctl",
];

/// Random moments beyond one for each process.
const RANDOM_MOMENTS: usize = 20;
/// Within this everything must be as it should after a kill.
pub(crate) const RECOVERED_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn a_killed_process_leaves_nothing_behind() {
    let mut seed = seed();
    println!("seed={seed}");
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("kill");
    let ws = |args: &[&str]| p.as_user(&account, args);
    for round in 0..VICTIMS.len() + RANDOM_MOMENTS {
        let victim = VICTIMS
            .get(round)
            .copied()
            .unwrap_or_else(|| VICTIMS[next(&mut seed) as usize % VICTIMS.len()]);
        let act = ["create", "stop", "start", "rm"][next(&mut seed) as usize % 4];
        let delay = Duration::from_millis(next(&mut seed) % 250);
        println!("round {round}: {act}, {victim} killed after {delay:?}");
        // What the act needs. A KMS that was killed may still be sealed for a moment.
        let id = (act != "create").then(|| {
            until(|| {
                let out = ws(&["--json", "ws", "create"]);
                out.status.success().then(|| created(&out))
            })
        });
        if act == "start" {
            p.expect_ok("stop", &ws(&["ws", "stop", id.as_deref().unwrap()]));
        }
        let mut command = p.user_command(&account, &["--json", "ws", act]);
        command.args(id.as_deref());
        let child = command.spawn().unwrap();
        std::thread::sleep(delay);
        kill(&p, victim);
        // The act may fail: it must not hang, and not lie.
        let out = child.wait_with_output().unwrap();
        settled(&p);
        let list = until(|| {
            let out = ws(&["--json", "ws", "ls"]);
            serde_json::from_slice::<serde_json::Value>(&out.stdout).ok()
        });
        if act == "create" && out.status.success() {
            let id = created(&out);
            assert!(
                list.to_string().contains(&id),
                "{id} was created and is gone"
            );
        }
        // Whatever is there can be deleted, by its owner, now.
        for w in list.as_array().unwrap() {
            let id = w["id"].as_str().unwrap();
            until(|| {
                let gone = ws(&["ws", "rm", id]);
                let missing = gone.status.code() == Some(5);
                (gone.status.success() || missing).then_some(())
            });
        }
        until(|| p.workspaces_on_host().is_empty().then_some(()));
        assert_eq!(p.disk_files(), Vec::<String>::new(), "after round {round}");
    }
    p.expect_ok("audit verify", &p.casemate(&["audit", "verify"]));
    p.expect_ok("down", &p.casemate(&["down"]));
    assert_eq!(p.leftovers(), Vec::<String>::new());
}

pub(crate) fn created(out: &std::process::Output) -> String {
    let w: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!(
            "create: {e}: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        )
    });
    w["id"].as_str().unwrap().to_owned()
}

/// Kills a process of the platform, or of the first slot in use; nothing if there is none now.
fn kill(p: &Platform, victim: &str) {
    let pid = match victim {
        "vmm" | "disk" | "vmctl" => p
            .slots()
            .first()
            .and_then(|s| s[format!("{victim}_pid")].as_u64()),
        daemon => p.daemon_pid(daemon),
    };
    if let Some(pid) = pid {
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    }
}

/// Waits until every process answers again.
pub(crate) fn settled(p: &Platform) {
    until(|| p.casemate(&["status"]).status.success().then_some(()));
}

/// Tries until it gives something.
pub(crate) fn until<T>(mut f: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + RECOVERED_WITHIN;
    loop {
        if let Some(v) = f() {
            return v;
        }
        assert!(
            Instant::now() < deadline,
            "it did not come right within {RECOVERED_WITHIN:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn seed() -> u64 {
    std::env::var("CASEMATE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap();
            now.as_secs() | 1
        })
}

/// xorshift64 (Marsaglia 2003).
pub(crate) fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
