//! What happens to a workspace by itself, with real VMs: pauses, ends of time, restarts, sizes.

use crate::world::{Account, Platform};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Within this what is due must have happened.
const SOON: Duration = Duration::from_secs(90);

struct User<'a> {
    p: &'a Platform,
    account: Account,
}

impl User<'_> {
    fn ok(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let out = self.p.as_user(&self.account, &all);
        self.p.expect_ok(&args.join(" "), &out);
        serde_json::from_slice(&out.stdout).unwrap_or(Value::Null)
    }

    fn create(&self) -> String {
        let made = self.ok(&["ws", "create", "--public-access"]);
        made["id"].as_str().unwrap().to_owned()
    }

    /// What a command inside prints.
    fn exec(&self, id: &str, script: &str) -> String {
        let args = ["ws", "exec", id, "--", "sh", "-c", script];
        let out = self.p.as_user(&self.account, &args);
        self.p.expect_ok(script, &out);
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }

    fn status(&self, id: &str) -> Option<String> {
        let args = ["--json", "ws", "show", id];
        let out = self.p.as_user(&self.account, &args);
        let shown: Value = serde_json::from_slice(&out.stdout).ok()?;
        Some(shown["status"].as_str()?.to_owned())
    }

    fn becomes(&self, id: &str, wanted: &str) {
        until(wanted, || {
            (self.status(id).as_deref() == Some(wanted)).then_some(())
        });
    }

    /// The slot of a workspace.
    fn slot(&self, id: &str) -> Option<Value> {
        let of = |s: &Value| s["workspace"] == id;
        self.p.slots().into_iter().find(of)
    }

    /// Ends a workspace's VMM; returns once it runs in another.
    fn vmm_kill(&self, id: &str) -> u64 {
        let pid = self.slot(id).unwrap()["vmm_pid"].as_u64().unwrap();
        let killed = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
        assert!(killed.unwrap().success());
        pid
    }
}

fn until<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + SOON;
    loop {
        if let Some(v) = f() {
            return v;
        }
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn workspaces_pause_end_restart_and_grow() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("lifecycle");
    let u = User { p: &p, account };

    // A process counts in memory; paused, it makes no progress, and then goes on.
    let id = u.create();
    u.exec(
        &id,
        "(i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; sleep 0.05; done) > /dev/null 2>&1 & echo ok",
    );
    let count = || u.exec(&id, "cat /dev/shm/n").parse::<u64>().unwrap_or(0);
    until("the counter", || (count() > 5).then_some(()));
    u.ok(&["ws", "pause", &id]);
    let refused = p.as_user(&u.account, &["ws", "exec", &id, "--", "true"]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("vm_not_running"), "{said}");
    // A pause outlasts host and control.
    for name in ["host", "control"] {
        let pid = p.daemon_pid(name).unwrap();
        let _ = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
        until(name, || {
            let new = p.daemon_pid(name).filter(|n| *n != pid);
            new.filter(|_| p.casemate(&["status"]).status.success())
        });
    }
    u.becomes(&id, "paused");
    u.ok(&["ws", "resume", &id]);
    let before = count();
    assert!(before > 5, "its memory was kept");
    until("the counter to go on", || (count() > before).then_some(()));

    // A larger disk keeps what is on it, and the file system fills it.
    u.exec(&id, "echo kept > /root/kept && sync");
    let blocks = || u.exec(&id, "df -k / | tail -1 | tr -s ' ' | cut -d' ' -f2");
    let small: u64 = blocks().parse().unwrap();
    let resized = u.ok(&["ws", "resize", &id, "--disk-mb", "9216", "--apply"]);
    assert_eq!(resized["relaunched"], true);
    assert_eq!(u.exec(&id, "cat /root/kept"), "kept");
    until("the larger file system", || {
        let large: u64 = blocks().parse().ok()?;
        (large > small + 900 * 1024).then_some(())
    });

    // A VMM that dies is replaced under `always`, and not under `no`.
    let pid = u.vmm_kill(&id);
    until("another VMM", || {
        let now = u.slot(&id)?["vmm_pid"].as_u64()?;
        (now != pid && u.status(&id)? == "running").then_some(())
    });
    assert_eq!(u.exec(&id, "cat /root/kept"), "kept");
    u.ok(&["ws", "lifecycle", &id, "--restart-policy", "no"]);
    u.vmm_kill(&id);
    u.becomes(&id, "stopped");

    // Ends of time: stopped, or gone with everything.
    u.ok(&["ws", "start", &id]);
    u.ok(&["ws", "lifecycle", &id, "--ttl", "2s"]);
    u.becomes(&id, "stopped");
    u.ok(&["ws", "start", &id]);
    u.ok(&["ws", "lifecycle", &id, "--ttl", "2s", "--remove-on-exit"]);
    until("gone", || {
        let gone = p.as_user(&u.account, &["ws", "show", &id]);
        (gone.status.code() == Some(5)).then_some(())
    });
    until("no disk file", || p.disk_files().is_empty().then_some(()));
}

/// What must be a workspace's own, as it sees it.
const IDENTITY: &str = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 32 /dev/urandom | od -An -tx1";

#[test]
fn workspaces_sleep_wake_go_back_and_fork() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("sleep");
    let u = User { p: &p, account };
    let id = u.create();
    u.exec(
        &id,
        "(i=0; while :; do i=$((i+1)); echo $i > /dev/shm/n; sleep 0.05; done) > /dev/null 2>&1 & echo kept > /root/kept; sync",
    );
    let count = |id: &str| u.exec(id, "cat /dev/shm/n").parse::<u64>().unwrap_or(0);
    until("the counter", || (count(&id) > 5).then_some(()));
    let asleep = |id: &str| u.ok(&["ws", "show", id])["info"]["asleep"] == true;

    // Asleep it has no VM, also after a kill of what remembers; woken it goes on where it was.
    let before = count(&id);
    u.ok(&["ws", "sleep", &id]);
    assert!(asleep(&id) && u.slot(&id).is_none());
    for name in ["host", "control", "warden"] {
        let pid = p.daemon_pid(name).unwrap();
        let _ = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
        until(name, || {
            let new = p.daemon_pid(name).filter(|n| *n != pid);
            new.filter(|_| p.casemate(&["status"]).status.success())
        });
    }
    until("it sleeps on", || asleep(&id).then_some(()));
    u.ok(&["ws", "wake", &id]);
    assert!(count(&id) >= before, "its memory was kept");
    let now = count(&id);
    until("the counter to go on", || (count(&id) > now).then_some(()));
    assert_eq!(u.exec(&id, "cat /root/kept"), "kept");

    // With an idle policy a request at the gateway wakes it; a stranger's does not.
    u.ok(&["ws", "lifecycle", &id, "--suspend-after", "10m"]);
    u.ok(&["ws", "sleep", &id]);
    let stranger = p.account("stranger");
    let refused = p.as_user(&stranger, &["ws", "exec", &id, "--", "true"]);
    assert!(!refused.status.success() && asleep(&id));
    assert!(count(&id) >= now, "woken by the request");

    // Back to a snapshot: disk and memory of then.
    u.ok(&["ws", "snapshot", &id]);
    let then = count(&id);
    u.exec(&id, "echo changed > /root/kept; sync");
    u.ok(&["ws", "restore", &id]);
    assert_eq!(u.exec(&id, "cat /root/kept"), "kept");
    until("the counter to go on from then", || {
        (count(&id) + 50 > then).then_some(())
    });

    // A fork has the disk, and an identity of its own.
    let fork = u.ok(&["ws", "fork", &id, "--name", "twin"]);
    let fork = fork["id"].as_str().unwrap().to_owned();
    u.ok(&["ws", "access", &fork, "on"]);
    assert_eq!(u.exec(&fork, "cat /root/kept"), "kept");
    let (ours, its) = (u.exec(&id, IDENTITY), u.exec(&fork, IDENTITY));
    for (a, b) in ours.lines().zip(its.lines()) {
        assert_ne!(a, b, "a fork shares an identity");
    }
    u.ok(&["ws", "rm", &id]);
    assert_eq!(
        u.exec(&fork, "cat /root/kept"),
        "kept",
        "it outlives the other"
    );
    u.ok(&["ws", "rm", &fork]);
    until("no file at rest", || {
        p.disk_files().is_empty().then_some(())
    });
}
