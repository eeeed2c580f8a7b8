//! `kill -9` of each process while a workspace sleeps, wakes, is kept, goes back, is forked or grows: it
//! is as before or as asked for afterwards, its files are there, and nothing else is left.
//!
//! Each process dies once a run and each act is in it at least twice; which meet, and when in the
//! act, comes from a seed that is printed. `CASEMATE_SEED` replays it. About a minute on two cores.

use crate::kill::{RECOVERED_WITHIN, next, seed, settled, until};
use crate::world::{Account, Platform};
use serde_json::Value;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Daemons by their name in the supervisor's table; of the workspace's slot; warden's own two.
const VICTIMS: [&str; 13] = [
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
    "volumes",
    "net",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Sleep,
    Wake,
    Snapshot,
    Restore,
    Fork,
    Resize,
}

const ACTS: [Act; 6] = [
    Act::Sleep,
    Act::Wake,
    Act::Snapshot,
    Act::Restore,
    Act::Fork,
    Act::Resize,
];
/// Each process once: the pauses before restarts double with each VM that dies, and are forgotten only
/// after ten minutes.
const ROUNDS: usize = VICTIMS.len();

impl Act {
    /// A kill comes within this, ms: about what the act takes.
    fn moment_ms(self) -> u64 {
        match self {
            Self::Sleep | Self::Wake | Self::Snapshot => 1_000,
            Self::Restore | Self::Fork | Self::Resize => 2_500,
        }
    }

    /// The states that it may leave. A VM that died is started again by the workspace's policy.
    fn leaves(self, done: bool) -> &'static [&'static str] {
        match (self, done) {
            (Self::Sleep, true) => &["asleep"],
            (Self::Sleep | Self::Wake, false) => &["running", "asleep"],
            // Both end what runs first.
            (Self::Restore | Self::Resize, false) => &["running", "stopped"],
            _ => &["running"],
        }
    }
}

struct World {
    p: Platform,
    account: Account,
    /// The workspace.
    id: String,
    /// Its disk, MiB.
    disk_mb: u64,
}

impl World {
    fn run(&self, args: &[&str]) -> Output {
        let all = [&["--json"], args].concat();
        self.p.as_user(&self.account, &all)
    }

    fn show(&self) -> Option<Value> {
        let shown = self.run(&["ws", "show", &self.id]);
        serde_json::from_slice(&shown.stdout).ok()
    }

    /// Does it, once what was killed is there again.
    fn soon(&self, args: &[&str]) {
        let end = Instant::now() + RECOVERED_WITHIN;
        loop {
            let out = self.run(args);
            if out.status.success() {
                return;
            }
            if Instant::now() > end {
                self.p.expect_ok(&args.join(" "), &out);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The workspace's or a fork's file.
    fn file(&self, id: &str) -> String {
        let args = ["ws", "exec", id, "--", "cat", "/root/kept"];
        // Whatever was killed may be on its way up yet, and what the act left on its way there.
        let read = until(|| {
            let out = self.p.as_user(&self.account, &args);
            if !out.status.success() && id == self.id {
                self.up();
            }
            out.status.success().then_some(out.stdout)
        });
        String::from_utf8(read).unwrap().trim().to_owned()
    }

    fn write(&self, text: &str) {
        let script = format!("echo {text} > /root/kept; sync");
        self.soon(&["ws", "exec", &self.id, "--", "sh", "-c", &script]);
    }

    /// How it is: `running`, `asleep`, `stopped`, or on its way.
    fn state(&self) -> Option<String> {
        let shown = self.show()?;
        let state = match shown["status"].as_str()? {
            "stopped" if shown["info"]["asleep"] == true => "asleep",
            state => state,
        };
        Some(state.to_owned())
    }

    /// Has it run, from memory or, if that was used up on the way, from its disk; to be asked again.
    fn up(&self) {
        if !matches!(self.state().as_deref(), Some("asleep" | "stopped")) {
            return;
        }
        let woken = self.run(&["ws", "start", &self.id]);
        let said = String::from_utf8_lossy(&woken.stderr).into_owned();
        if said.contains("key_refused") || said.contains("memory_stale") {
            let _ = self.run(&["ws", "start", &self.id, "--force"]);
        }
    }

    /// Names of the workspace's files at rest beside its disk.
    fn at_rest(&self) -> Vec<String> {
        let disk = format!("{}.disk", self.id);
        let files = self.p.disk_files();
        assert!(files.contains(&disk), "its disk is gone: {files:?}");
        files.into_iter().filter(|f| *f != disk).collect()
    }

    /// One snapshot at most, whole, and nothing else: no memory of what runs, nothing begun, no other
    /// workspace.
    fn nothing_is_left(&self) {
        let own = |files: &[String]| {
            let shown = self.run(&["ws", "lifecycle", &self.id]);
            let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
            let kept = &shown["snapshot"];
            let id = kept["id"].as_str().map(str::to_owned);
            let mut want: Vec<String> = id.map_or(vec![], |id| {
                let part = |kind: &str| format!("{}.snapshot-{kind}-{id}", self.id);
                let memory = (kept["memory"] == true).then(|| part("memory"));
                std::iter::once(part("disk")).chain(memory).collect()
            });
            let mut files = files.to_vec();
            want.sort();
            files.sort();
            Some(want == files)
        };
        until(|| own(&self.at_rest()).filter(|own| *own));
        until(|| (self.p.workspaces_on_host() == [self.id.as_str()]).then_some(()));
    }

    /// Kills a process, or nothing if there is none now.
    fn kill(&self, victim: &str) {
        let slot = || {
            let of = |s: &Value| s["workspace"] == self.id.as_str();
            self.p.slots().into_iter().find(of)
        };
        let pid = match victim {
            "vmm" | "disk" | "vmctl" => slot().and_then(|s| s[format!("{victim}_pid")].as_u64()),
            "volumes" => self.volumes(),
            "net" => self.net(),
            daemon => self.p.daemon_pid(daemon),
        };
        if let Some(pid) = pid.filter(|pid| *pid != 0) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }

    /// casemate-volumes: it alone has the files at rest in its root.
    fn volumes(&self) -> Option<u64> {
        let ours = self.p.state("volumes").metadata().unwrap();
        pids().find(|pid| {
            let at = std::fs::metadata(format!("/proc/{pid}/root/volumes"));
            at.is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()))
        })
    }

    /// casemate-net: it alone of warden's children is in the network of the taps.
    fn net(&self) -> Option<u64> {
        let fabric = std::fs::metadata(format!("/run/netns/{}", self.p.fabric())).ok()?;
        let warden = self.p.daemon_pid("warden")?;
        pids().find(|pid| {
            let in_fabric = std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|m| (m.dev(), m.ino()) == (fabric.dev(), fabric.ino()));
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
            let child = format!("PPid:\t{warden}\n");
            in_fabric && *pid != warden && status.is_ok_and(|s| s.contains(&child))
        })
    }
}

fn pids() -> impl Iterator<Item = u64> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

#[test]
fn a_killed_process_loses_no_file_and_leaves_what_was_or_what_was_asked_for() {
    let (mut seed, mut victims) = (seed(), VICTIMS);
    println!("seed={seed}");
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("kill-saved");
    let made = p.as_user(&account, &["--json", "ws", "create", "--public-access"]);
    p.expect_ok("create", &made);
    let id = crate::kill::created(&made);
    let mut w = World {
        disk_mb: 0,
        p,
        account,
        id,
    };
    w.disk_mb = w.show().unwrap()["resources"]["disk_size_mb"]
        .as_u64()
        .unwrap();
    let first = next(&mut seed) as usize;
    for round in 0..ROUNDS {
        if round % VICTIMS.len() == 0 {
            for i in (1..victims.len()).rev() {
                victims.swap(i, next(&mut seed) as usize % (i + 1));
            }
        }
        let (act, victim) = (
            ACTS[(first + round) % ACTS.len()],
            victims[round % victims.len()],
        );
        let moment = Duration::from_millis(next(&mut seed) % act.moment_ms());
        println!("round {round}: {act:?}, {victim} killed after {moment:?}");
        one(&mut w, act, victim, moment, round);
    }
    w.soon(&["ws", "rm", &w.id]);
    until(|| w.p.disk_files().is_empty().then_some(()));
    w.p.expect_ok("audit verify", &w.p.casemate(&["audit", "verify"]));
    w.p.expect_ok("down", &w.p.casemate(&["down"]));
    assert_eq!(w.p.leftovers(), Vec::<String>::new());
}

fn one(w: &mut World, act: Act, victim: &str, moment: Duration, round: usize) {
    let (before, after) = (format!("before-{round}"), format!("after-{round}"));
    let id = w.id.clone();
    let larger = (w.disk_mb + 64).to_string();
    // What the act needs. Of a snapshot that is taken, one stands before it.
    w.write(&before);
    match act {
        Act::Wake => w.soon(&["ws", "sleep", &id]),
        Act::Snapshot | Act::Restore => {
            w.soon(&["ws", "snapshot", &id]);
            w.write(&after);
        }
        _ => {}
    }
    let args: &[&str] = match act {
        Act::Sleep => &["ws", "sleep", &id],
        Act::Wake => &["ws", "wake", &id],
        Act::Snapshot => &["ws", "snapshot", &id],
        Act::Restore => &["ws", "restore", &id],
        Act::Fork => &["ws", "fork", &id],
        Act::Resize => &["ws", "resize", &id, "--disk-mb", &larger, "--apply"],
    };
    let all = [&["--json"], args].concat();
    let child = w.p.user_command(&w.account, &all).spawn().unwrap();
    std::thread::sleep(moment);
    w.kill(victim);
    // The act may fail: it must not hang, and not lie.
    let out = child.wait_with_output().unwrap();
    let done = out.status.success();
    settled(&w.p);
    let legal = act.leaves(done);
    println!("  {}: {legal:?}", if done { "done" } else { "failed" });
    until(|| w.state().filter(|s| legal.contains(&s.as_str())));
    let file = w.file(&id);
    match act {
        Act::Snapshot => {
            assert_eq!(file, after);
            // The one before, or, if it was said to be there, the new one.
            w.soon(&["ws", "restore", &id]);
            let back = w.file(&id);
            assert!(back == after || !done && back == before, "{back}");
        }
        Act::Restore => assert!(file == before || !done && file == after, "{file}"),
        _ => assert_eq!(file, before),
    }
    forks_go(w, &before);
    if act == Act::Resize {
        let is = w.show().unwrap()["resources"]["disk_size_mb"].as_u64();
        let is = is.unwrap();
        assert!(is == w.disk_mb + 64 || !done && is == w.disk_mb, "{is}");
        w.disk_mb = is;
    }
    w.nothing_is_left();
}

/// A fork that was made has the file, and goes with all that it has.
fn forks_go(w: &World, file: &str) {
    let list = until(|| {
        let out = w.run(&["ws", "ls"]);
        serde_json::from_slice::<Value>(&out.stdout).ok()
    });
    for other in list.as_array().unwrap() {
        let id = other["id"].as_str().unwrap();
        if id == w.id {
            continue;
        }
        // One that a kill interrupted is taken back by the platform.
        let gone_or_up = until(|| {
            let shown = w.run(&["ws", "show", id]);
            if shown.status.code() == Some(5) {
                return Some(false);
            }
            let shown: Value = serde_json::from_slice(&shown.stdout).ok()?;
            (shown["status"] == "running").then_some(true)
        });
        if !gone_or_up {
            continue;
        }
        w.soon(&["ws", "access", id, "on"]);
        assert_eq!(w.file(id), file, "the fork's");
        w.soon(&["ws", "rm", id]);
    }
}
