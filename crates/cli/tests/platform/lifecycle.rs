//! What happens to a workspace by itself, with real VMs: pauses, ends of time, restarts, sizes.

use crate::world::{Account, Platform};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
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

    /// The TLS key that the workspace's guest shows the edge, in PEM.
    fn tls_key(&self, id: &str) -> String {
        let ip = self.slot(id).unwrap()["net"]["ip"].clone();
        let to = format!("{}:9991", ip.as_str().unwrap());
        let name = api::agent::tls_name(&id.parse().unwrap());
        let shown = std::process::Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.p.fabric()))
            .args(["--", "setpriv", "--reuid", "casemate-edge"])
            .args(["--regid", "casemate-edge", "--clear-groups", "--"])
            .args(["openssl", "s_client", "-connect", &to, "-servername", &name])
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        // It asks for a certificate, of which there is none: by then it has shown its own.
        let shown = String::from_utf8(shown.stdout).unwrap();
        let mut x509 = std::process::Command::new("openssl")
            .args(["x509", "-noout", "-pubkey"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut certificate = x509.stdin.take().unwrap();
        certificate.write_all(shown.as_bytes()).unwrap();
        drop(certificate);
        let key = x509.wait_with_output().unwrap();
        assert!(key.status.success(), "no certificate: {shown}");
        String::from_utf8(key.stdout).unwrap()
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
    let place = |id: &str| u.slot(id).map(|s| (s["slot"].clone(), s["ip"].clone()));
    let before = place(&id);
    u.ok(&["ws", "sleep", &id]);
    let stranger = p.account("stranger");
    let refused = p.as_user(&stranger, &["ws", "exec", &id, "--", "true"]);
    assert!(!refused.status.success() && asleep(&id));
    assert!(count(&id) >= now, "woken by the request");
    assert!(before.is_some());
    assert_eq!(place(&id), before, "it keeps a slot that is free");

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
    assert_eq!((ours.lines().count(), its.lines().count()), (5, 5));
    for (a, b) in ours.lines().zip(its.lines()) {
        assert_ne!(a, b, "a fork shares an identity");
    }
    assert_ne!(
        u.tls_key(&id),
        u.tls_key(&fork),
        "a fork shares its TLS key"
    );
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

#[test]
fn archives_are_ciphertext_and_go_with_what_they_are_of() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("archives");
    let u = User { p: &p, account };
    let id = u.create();
    // 8 MiB of a text that would show at rest.
    u.exec(
        &id,
        "mkdir -p /root/in/not && echo 'an archived marker' > /root/in/a && yes 'an archived marker' | head -c 8388608 > /root/in/b && touch /root/in/not/c && ln -s /etc/passwd /root/in/d",
    );
    let make = |args: &[&str]| {
        let mut all = vec!["ws", "archive", "create", &id];
        all.extend(args);
        u.ok(&all)
    };
    let first = make(&["--path", "/root/in", "--exclude", "/root/in/not"]);
    assert_eq!(
        (&first["version"], &first["entries"]),
        (&"1".into(), &4.into())
    );
    let size = first["size"].as_u64().unwrap();
    assert!(size > 8 << 20 && size < 9 << 20, "{size}");
    make(&["--version", "etc", "--path", "/etc"]);
    let listed = |u: &User<'_>| {
        u.ok(&["ws", "archive", "ls", &id])
            .as_array()
            .unwrap()
            .len()
    };
    let at_rest = || {
        let files = p.disk_files().into_iter();
        let of = files.filter(|f| f.starts_with(&format!("{id}.archive")));
        of.collect::<Vec<_>>()
    };
    assert_eq!((listed(&u), at_rest().len()), (2, 2));
    for name in at_rest() {
        // The rest of it is one hole.
        let file = std::fs::File::open(p.state("volumes").join(&name).join("volume")).unwrap();
        let mut volume = Vec::new();
        file.take(32 << 20).read_to_end(&mut volume).unwrap();
        let shows = |text: &str| volume.windows(text.len()).any(|w| w == text.as_bytes());
        assert!(volume.starts_with(b"LUKS") && !shows("archived marker") && !shows("root:x:0:0"));
    }

    // Put back, what was changed is as it was, and the rest stays.
    u.exec(
        &id,
        "echo changed > /root/in/a; rm /root/in/b /root/in/d; echo x > /root/in/new",
    );
    let back = u.ok(&["ws", "archive", "restore", &id, "1"]);
    assert_eq!(
        (&back["restored"]["entries"], &back["restored"]["skipped"]),
        (&4.into(), &0.into())
    );
    let all =
        "cat /root/in/a /root/in/new; readlink /root/in/d; wc -c < /root/in/b; ls /root/in/not";
    let want = "an archived marker\nx\n/etc/passwd\n8388608\nc";
    assert_eq!(u.exec(&id, all), want);

    // The workspace runs on, and what it wanted that can't be is an error that says so.
    assert_eq!(u.exec(&id, "head -n 1 /root/in/b"), "an archived marker");
    let refused = |args: &[&str], word: &str| {
        let out = p.as_user(&u.account, args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(word), "{said}");
    };
    let create = ["ws", "archive", "create", &id];
    refused(&[&create[..], &["--version", "etc"]].concat(), "version: ");
    refused(
        &[&create[..], &["--path", "/none"]].concat(),
        "vm_paths[0]: ",
    );
    refused(
        &[&create[..], &["--path", "/proc/self"]].concat(),
        "vm_paths[0]: ",
    );
    assert_eq!((listed(&u), at_rest().len()), (2, 2));

    // They outlast sleep and stop, and a kill of what remembers; each goes by itself.
    u.ok(&["ws", "sleep", &id]);
    refused(&create, "vm_not_running");
    u.ok(&["ws", "wake", &id]);
    make(&["--version", "woken", "--path", "/root"]);
    u.ok(&["ws", "stop", &id]);
    for name in ["host", "warden", "control"] {
        let pid = p.daemon_pid(name).unwrap();
        let _ = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
        until(name, || {
            let new = p.daemon_pid(name).filter(|n| *n != pid);
            new.filter(|_| p.casemate(&["status"]).status.success())
        });
    }
    assert_eq!((listed(&u), at_rest().len()), (3, 3));
    // One that was changed at rest is refused, by the tag of the sector that was; the others are not.
    u.ok(&["ws", "start", &id]);
    let volume = |f: &String| p.state("volumes").join(f).join("volume");
    let size = |f: &String| volume(f).metadata().unwrap().blocks();
    let largest = at_rest().into_iter().max_by_key(size).unwrap();
    let options = std::fs::File::options().read(true).write(true).clone();
    let file = options.open(volume(&largest)).unwrap();
    // In the middle of its 8 MiB: the ciphertext begins at 16 MiB, the tar 1 MiB behind.
    let (at, mut byte) = (21 << 20, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let restore = ["ws", "archive", "restore", &id];
    // `woken` holds /root, so the same 8 MiB: one of the two was changed.
    for version in ["1", "woken"] {
        u.exec(&id, "echo mine > /root/in/b");
        let out = p.as_user(&u.account, &[&restore[..], &[version]].concat());
        if out.status.success() {
            assert_eq!(u.exec(&id, "head -n 1 /root/in/b"), "an archived marker");
            continue;
        }
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("disk_tampered"), "{said}");
        assert_eq!(u.exec(&id, "cat /root/in/b"), "mine", "{version}");
        u.ok(&["ws", "archive", "rm", &id, version]);
    }
    assert_eq!(listed(&u), 2, "one of them was refused");
    u.ok(&["ws", "archive", "rm", &id, "etc"]);
    assert_eq!(listed(&u), 1);
    until("its file is gone", || (at_rest().len() == 1).then_some(()));
    u.ok(&["ws", "rm", &id]);
    until("no file at rest", || {
        p.disk_files().is_empty().then_some(())
    });
}

/// Whoever has the host's disk and ends what they like brings the files of a sleep back, after it was
/// woken: its memory is not woken twice.
#[test]
fn i29_memory_that_was_woken_is_not_woken_again_from_a_copy() {
    let p = Platform::start("[host]\npool_size = 0\n", None);
    let account = p.account("replay");
    let u = User { p: &p, account };
    let id = u.create();
    // What fails to wake is left for us to see.
    u.ok(&["ws", "lifecycle", &id, "--restart-policy", "no"]);
    u.exec(
        &id,
        "echo kept > /root/kept; echo once > /dev/shm/once; sync",
    );
    u.ok(&["ws", "sleep", &id]);
    let volumes = p.root().join("var/lib/casemate/volumes");
    let memory = volumes.join(format!("{id}.memory"));
    let copy = p.root().join("copy");
    let cp = |from: &std::path::Path, to: &std::path::Path| {
        let mut cp = std::process::Command::new("cp");
        cp.args(["-a", "--sparse=always"]).arg(from).arg(to);
        assert!(cp.status().unwrap().success());
    };
    cp(&memory, &copy);
    u.ok(&["ws", "wake", &id]);
    assert_eq!(u.exec(&id, "cat /dev/shm/once"), "once");
    assert!(!memory.exists(), "it is used up");

    // Before host looks again what there is: the next one finds a workspace with memory at rest.
    cp(&copy, &memory);
    let host = p.daemon_pid("host").unwrap();
    let vmm = u.slot(&id).unwrap()["vmm_pid"].as_u64().unwrap();
    let signal = |signal: &str, pid: u64| {
        let kill = std::process::Command::new("kill")
            .args([signal, &pid.to_string()])
            .status();
        assert!(kill.unwrap().success());
    };
    signal("-STOP", host);
    signal("-9", vmm);
    until("the VM's end", || {
        let is_dead = |slot: &Value| slot["state"] == "dead";
        u.slot(&id).filter(is_dead)
    });
    signal("-9", host);
    until("host", || p.daemon_pid("host").filter(|n| *n != host));
    let show = || {
        let shown = p.as_user(&u.account, &["--json", "ws", "show", &id]);
        serde_json::from_slice::<Value>(&shown.stdout).ok()
    };
    until("it is taken for asleep", || {
        (show()?["info"]["asleep"] == true).then_some(())
    });
    let refused = p.as_user(&u.account, &["ws", "wake", &id]);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("woken already"), "{said}");
    assert!(said.contains("key_refused"), "{said}");
    // What its owner can do: from the disk, without that memory.
    u.ok(&["ws", "start", &id, "--force"]);
    assert_eq!(u.exec(&id, "cat /root/kept; ls /dev/shm"), "kept");
    u.ok(&["ws", "rm", &id]);
}
