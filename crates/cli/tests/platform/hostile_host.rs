//! A hostile host agent: with its user, its sockets and its files it tries to get guest memory, a
//! disk's plaintext, a key, a template written, or another workspace's identity.

use crate::kill::until;
use crate::world::{Account, Platform};
use rustix::process::{Gid, Pid, PidfdFlags, PidfdGetfdFlags, Signal, Uid};
use serde_json::{Value, json};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A slot that the fleet does not use.
const FREE: u16 = 77;
const CANARY: &str = "canary-of-a-hostile-host";

#[test]
fn a_hostile_host_agent_gets_nothing() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let (owner, other) = (p.account("owner"), p.account("other"));
    let a = Workspace::make(&p, &owner);
    let b = Workspace::make(&p, &other);
    let write = format!("echo {CANARY} > /root/canary; sync");
    p.expect_ok("write", &a.exec(&p, &owner, &["sh", "-c", &write]));
    // B's disk is attached to nothing, and its last lease is used.
    p.expect_ok("stop", &p.as_user(&other, &["ws", "stop", &b.id]));
    // The pool's template is made meanwhile.
    until(|| p.warden().filter(|s| !s.templates.is_empty()).map(drop));
    let before = outside(&p);

    let host = Host::of(&p);
    let mut rows = processes(&p, &host, &a);
    rows.extend(files(&p, &host, &a, &b));
    rows.extend(sockets(&p, &host));
    rows.extend(warden(&p, &host, &a, &b));
    rows.extend(vmctl(&p, &host, &a, &b));
    rows.extend(kms(&p, &host, &a, &b));

    println!("{:58} | stopped by", "attempt");
    for (name, result) in &rows {
        let text = match result {
            Ok(why) => why.clone(),
            Err(got) => format!("NOT: {got}"),
        };
        println!("{name:58} | {}", text.replace('\n', " "));
    }
    assert!(rows.len() >= 40, "only {} attempts", rows.len());
    let through: Vec<_> = rows.iter().filter(|r| r.1.is_err()).collect();
    assert!(through.is_empty(), "{through:?}");
    assert_eq!(before, outside(&p), "keys, templates, images");
    let read = a.exec(&p, &owner, &["cat", "/root/canary"]);
    p.expect_ok("A still runs", &read);
    assert!(String::from_utf8_lossy(&read.stdout).contains(CANARY));
    p.expect_ok(
        "B still starts",
        &p.as_user(&other, &["ws", "start", &b.id]),
    );
}

/// What stopped an attempt, or what it got.
type Row = (String, Result<String, String>);

struct Workspace {
    id: String,
    slot: u16,
    vmm: i32,
    vmctl: i32,
    disk: i32,
}

impl Workspace {
    fn make(p: &Platform, account: &Account) -> Self {
        let out = p.as_user(account, &["--json", "ws", "create", "--public-access"]);
        p.expect_ok("create", &out);
        let made: Value = serde_json::from_slice(&out.stdout).unwrap();
        let id = made["id"].as_str().unwrap().to_owned();
        let slots = p.slots();
        let slot = slots
            .iter()
            .find(|s| s["workspace"] == id.as_str())
            .unwrap();
        let pid = |key: &str| i32::try_from(slot[key].as_i64().unwrap()).unwrap();
        Self {
            slot: u16::try_from(slot["slot"].as_u64().unwrap()).unwrap(),
            vmm: pid("vmm_pid"),
            vmctl: pid("vmctl_pid"),
            disk: pid("disk_pid"),
            id,
        }
    }

    fn exec(&self, p: &Platform, account: &Account, args: &[&str]) -> std::process::Output {
        let all: Vec<&str> = ["ws", "exec", &self.id, "--"]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        p.as_user(account, &all)
    }

    /// What host keeps about it on its disk.
    fn desired(&self, p: &Platform) -> Value {
        let file = p
            .state("host")
            .join("desired")
            .join(format!("{}.json", self.id));
        let stored: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        stored["desired"].clone()
    }
}

/// Host's identity on this machine.
struct Host {
    uid: u32,
    gid: u32,
}

impl Host {
    fn of(p: &Platform) -> Self {
        let pid = p.daemon_pid("host").unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let id = |key: &str| {
            let line = status.lines().find(|l| l.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Self {
            uid: id("Uid:"),
            gid: id("Gid:"),
        }
    }

    /// Runs `attempt` on a thread that is host's user, with host's groups and no capability.
    fn act<T: Send>(&self, attempt: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|s| {
            let done = s.spawn(|| {
                let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
                rustix::thread::set_thread_groups(&[]).unwrap();
                rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
                attempt()
            });
            done.join().unwrap()
        })
    }

    /// One call over a socket; its success is the attempt's.
    fn call(&self, socket: &Path, op: &Value) -> Result<String, String> {
        let wait = Duration::from_secs(20);
        let said = self.act(|| api::rpc::blocking::call::<_, Value>(socket, "hostile", op, wait));
        match said {
            Err(e) => Ok(format!("{:?}: {}", e.code, e.message)),
            Ok(answer) => Err(answer.to_string()),
        }
    }
}

fn stopped<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<String, String> {
    match result {
        Err(e) => Ok(e.to_string()),
        Ok(_) => Err("it worked".into()),
    }
}

/// Memory, descriptors, namespaces and signals of what is not its own.
fn processes(p: &Platform, host: &Host, a: &Workspace) -> Vec<Row> {
    let mut rows = Vec::new();
    let daemon = |name: &str| i32::try_from(p.daemon_pid(name).unwrap()).unwrap();
    for (name, pid) in [
        ("the VMM", a.vmm),
        ("vmctl", a.vmctl),
        ("the disk process", a.disk),
        ("warden", daemon("warden")),
        ("the kms", daemon("kms")),
        ("mint", daemon("mint")),
    ] {
        let id = Pid::from_raw(pid).unwrap();
        for what in ["mem", "environ", "maps", "root/", "fd/3"] {
            let path = format!("/proc/{pid}/{what}");
            let open = host.act(|| std::fs::metadata(&path).and(std::fs::File::open(&path)));
            // A file that opens may still give nothing.
            let read = open.and_then(|mut f| std::io::Read::read(&mut f, &mut [0u8; 64]));
            rows.push((format!("read {what} of {name}"), stopped(read)));
        }
        let fd = host.act(|| {
            let pidfd = rustix::process::pidfd_open(id, PidfdFlags::empty())?;
            rustix::process::pidfd_getfd(&pidfd, 3, PidfdGetfdFlags::empty())
        });
        rows.push((format!("take descriptor 3 of {name}"), stopped(fd)));
        // A signal that is ignored unless somebody asks for it.
        let signal = host.act(|| rustix::process::kill_process(id, Signal::URG));
        rows.push((format!("signal {name}"), stopped(signal)));
        let path = format!("/proc/{pid}/ns/net");
        let ns = host.act(|| std::fs::File::open(&path));
        rows.push((format!("namespace of {name}"), stopped(ns)));
    }
    rows
}

/// Disks, templates, images, keys, others' state.
fn files(p: &Platform, host: &Host, a: &Workspace, b: &Workspace) -> Vec<Row> {
    let mut rows = Vec::new();
    let warden = p.state("warden");
    let artifacts = p.state("artifacts");
    let open = |write: bool, path: PathBuf| {
        host.act(|| {
            std::fs::OpenOptions::new()
                .read(!write)
                .write(write)
                .open(path)
        })
    };
    for w in [a, b] {
        let disk = p.state("volumes").join(format!("{}.disk/volume", w.id));
        rows.push((
            format!("read the disk of {}", w.id),
            stopped(open(false, disk.clone())),
        ));
        rows.push((
            format!("write the disk of {}", w.id),
            stopped(open(true, disk)),
        ));
    }
    for path in files_below(&warden.join("templates")) {
        let name = format!("write {}", path.file_name().unwrap().to_string_lossy());
        rows.push((format!("template: {name}"), stopped(open(true, path))));
    }
    for file in [
        "kernel/vmlinux",
        "kernel/initramfs.cpio",
        "closure/usr/bin/qemu-system-x86_64",
    ] {
        rows.push((
            format!("write {file}"),
            stopped(open(true, artifacts.join(file))),
        ));
    }
    for dir in [
        "warden",
        "kms",
        "mint",
        "control",
        "audit-append",
        "audit-integrate",
    ] {
        let dir = p.state(dir);
        let made = host.act(|| std::fs::write(dir.join("hostile"), "x"));
        rows.push((format!("make a file in {}", dir.display()), stopped(made)));
        for path in files_below(&dir).into_iter().take(2) {
            let name = path.strip_prefix(&dir).unwrap().display().to_string();
            let shown = dir.file_name().unwrap().to_string_lossy();
            rows.push((format!("read {shown}/{name}"), stopped(open(false, path))));
        }
    }
    rows
}

/// Sockets of those that do not serve it.
fn sockets(p: &Platform, host: &Host) -> Vec<Row> {
    let run = p.root().join("run/casemate");
    let mut rows = Vec::new();
    for path in files_below(&run) {
        let name = path.strip_prefix(&run).unwrap().display().to_string();
        let its_own = [
            "warden/warden",
            "kms/kms",
            "audit-append/",
            "vmctl/",
            "host/",
        ];
        if !name.ends_with(".sock") || its_own.iter().any(|o| name.starts_with(o)) {
            continue;
        }
        rows.push((
            format!("ask {name}"),
            host.call(&path, &json!({"op": "status"})),
        ));
    }
    rows
}

/// Warden's operations with forged fields.
fn warden(p: &Platform, host: &Host, a: &Workspace, b: &Workspace) -> Vec<Row> {
    let socket = p.root().join("run/casemate/warden/warden.sock");
    let slots = p.slots();
    let image = slots[0]["image"].as_str().unwrap().to_owned();
    let vm = |slot: Value, image: &str, memory: Value, cpus: Value| json!({"op": "vm_open", "slot": slot, "how": "cold", "image": image, "memory_mb": memory, "cpus": cpus});
    let disk = |slot: u16, workspace: &str, disk_mb: Value| {
        json!({"op": "disk_open", "slot": slot, "workspace": workspace, "start_id": "st_00000000000000ff",
            "purpose": "disk", "nonce": "00".repeat(32), "disk_mb": disk_mb, "bytes_per_s": 0, "ops_per_s": 0})
    };
    let (sa, m, c) = (json!(a.slot), json!(256), json!(1));
    let slot = |slot: u16, op: &str| json!({"op": op, "slot": slot});
    let mut more = slot(a.slot, "template_seal");
    more["path"] = json!("/etc/passwd");
    let mut odd = disk(a.slot, &b.id, json!(256));
    odd["purpose"] = json!("memory");
    let attempts = [
        (
            "a VM on a slot that is taken",
            vm(sa.clone(), &image, m.clone(), c.clone()),
        ),
        (
            "a VM on slot 65535",
            vm(json!(65535), &image, m.clone(), c.clone()),
        ),
        (
            "a VM on slot -1",
            vm(json!(-1), &image, m.clone(), c.clone()),
        ),
        (
            "a VM on slot \"../1\"",
            vm(json!("../1"), &image, m.clone(), c.clone()),
        ),
        (
            "an image that is a path",
            vm(json!(FREE), "../../../../etc/passwd", m.clone(), c.clone()),
        ),
        (
            "an image that is not there",
            vm(json!(FREE), &"0".repeat(64), m.clone(), c.clone()),
        ),
        (
            "a VM of no memory",
            vm(json!(FREE), &image, json!(0), c.clone()),
        ),
        (
            "a VM of 4 PiB",
            vm(json!(FREE), &image, json!(u32::MAX), c.clone()),
        ),
        (
            "a VM of no CPU",
            vm(json!(FREE), &image, m.clone(), json!(0)),
        ),
        (
            "a VM of 4 G CPUs",
            vm(json!(FREE), &image, m.clone(), json!(u32::MAX)),
        ),
        (
            "seal a running VM as template",
            slot(a.slot, "template_seal"),
        ),
        ("seal a slot that is not there", slot(FREE, "template_seal")),
        ("seal with a path", more),
        ("B's disk on A's VM", disk(a.slot, &b.id, json!(256))),
        ("A's disk again on A's VM", disk(a.slot, &a.id, json!(256))),
        ("a disk on no VM", disk(FREE, &b.id, json!(256))),
        (
            "a workspace that is a path",
            disk(a.slot, "ws_../../etc/shadow", json!(256)),
        ),
        ("another purpose", odd),
        ("a disk of -1 MiB", disk(a.slot, &b.id, json!(-1))),
        (
            "a forged grant for A",
            json!({"op": "disk_grant", "slot": a.slot, "sealed": "AAAA", "aad": "00"}),
        ),
        (
            "a grant of 4 MiB",
            json!({"op": "disk_grant", "slot": a.slot, "sealed": "A".repeat(4 << 20), "aad": "00"}),
        ),
        (
            "erase A's disk while it runs",
            json!({"op": "disk_erase", "workspace": a.id}),
        ),
        (
            "rules for a source that is no slot",
            json!({"op": "net_set", "slot": a.slot, "open": [{"source": {"slot": 65535}, "port": 80}]}),
        ),
        (
            "rules for no port",
            json!({"op": "net_set", "slot": a.slot, "open": [{"source": "edge", "port": 0}]}),
        ),
        (
            "an operation that is not there",
            json!({"op": "exec", "argv": ["sh"]}),
        ),
    ];
    let rows = attempts.into_iter();
    rows.map(|(name, op)| (format!("warden: {name}"), host.call(&socket, &op)))
        .collect()
}

/// vmctl's, on a VM that runs for somebody.
fn vmctl(p: &Platform, host: &Host, a: &Workspace, b: &Workspace) -> Vec<Row> {
    let socket = p.root().join(format!("run/casemate/vmctl/{}.sock", a.slot));
    let state = b.desired(p)["token_state"].clone();
    let attach = json!({"op": "attach", "wait_ms": 2000, "attach": {
        "time_unix_ns": 0, "config": "{}", "token_state": state,
        "ip": "10.117.0.9", "prefix": 16, "gateway": "10.117.0.1"}});
    [
        ("save a running guest's memory", json!({"op": "save"})),
        ("make it a template's again", json!({"op": "prepare"})),
        ("give A another identity", attach),
        (
            "ask the VMM itself",
            json!({"op": "qmp", "execute": "dump-guest-memory"}),
        ),
        ("warden's own operation", json!({"op": "disk_fd"})),
    ]
    .into_iter()
    .map(|(name, op)| (format!("vmctl: {name}"), host.call(&socket, &op)))
    .collect()
}

/// Keys without a lease, with a real attestation for B's disk.
fn kms(p: &Platform, host: &Host, a: &Workspace, b: &Workspace) -> Vec<Row> {
    let kms = p.root().join("run/casemate/kms/kms.sock");
    let warden = p.root().join("run/casemate/warden/warden.sock");
    let lb = b.desired(p);
    let image = p.slots()[0]["image"].clone();
    let wait = Duration::from_secs(30);
    let made = host.act(|| {
        let open = json!({"op": "vm_open", "slot": FREE, "how": "cold", "image": image, "memory_mb": 256, "cpus": 1});
        api::rpc::blocking::call::<_, Value>(&warden, "hostile", &open, wait)?;
        let disk = json!({"op": "disk_open", "slot": FREE, "workspace": b.id,
            "start_id": "st_00000000000000ff", "purpose": "disk", "nonce": "00".repeat(32),
            "disk_mb": lb["resources"]["disk_size_mb"], "bytes_per_s": 0, "ops_per_s": 0});
        api::rpc::blocking::call::<_, Value>(&warden, "hostile", &disk, wait)
    });
    // Host may open VMs and disk processes: without a key they are of no use.
    let attestation = made.unwrap_or_else(|e| panic!("{e:?}"))["attestation"].clone();
    let release = |receipt: &Value, attestation: &Value| json!({"op": "release", "receipt": receipt, "attestation": attestation});
    // Host holds a lease for the seconds of a start and writes it nowhere, so a thief of its files
    // has none; what becomes of real leases, used twice or crossed, is KMS-4's and I-4's.
    let forged = json!({"entry": {"workspace": b.id}, "index": 1, "proof": [], "checkpoint": ""});
    let none = Value::Null;
    let attempts = [
        (
            "no lease, with a real attestation",
            release(&none, &attestation),
        ),
        (
            "a lease of its own, a real attestation",
            release(&forged, &attestation),
        ),
        (
            "the attestation as the lease",
            release(&attestation, &attestation),
        ),
        (
            "a lease of its own, no attestation",
            release(&forged, &json!("")),
        ),
        (
            "a lease and an attestation of its own",
            release(&forged, &json!("e30.e30")),
        ),
        (
            "make a key for A anew",
            json!({"op": "workspace_key_create", "receipt": forged}),
        ),
        (
            "destroy B without authority",
            json!({"op": "destroy", "workspace": b.id, "authority": ""}),
        ),
        ("unseal", json!({"op": "unseal", "passphrase": "x"})),
        ("rotate", json!({"op": "rotate"})),
        (
            "open the log",
            json!({"op": "log_open", "class": "host", "day": 0, "wraps": [], "reason": "x"}),
        ),
        ("export", json!({"op": "export", "workspace": a.id})),
    ];
    let mut rows: Vec<Row> = attempts
        .into_iter()
        .map(|(name, op)| (format!("kms: {name}"), host.call(&kms, &op)))
        .collect();
    let grant =
        json!({"op": "disk_grant", "slot": FREE, "sealed": "AAAAAAAA", "aad": "00".repeat(32)});
    rows.push((
        "warden: a forged grant for B's disk".into(),
        host.call(&warden, &grant),
    ));
    // Tidied up by whoever opened it.
    let close = json!({"op": "slot_close", "slot": FREE});
    let _ = host.act(|| api::rpc::blocking::call::<_, Value>(&warden, "hostile", &close, wait));
    rows
}

/// What must be as it was: templates, images, the kms's counters of keys and releases.
fn outside(p: &Platform) -> Vec<String> {
    let mut all = Vec::new();
    for dir in [p.state("warden").join("templates"), p.state("artifacts")] {
        for path in files_below(&dir) {
            let meta = std::fs::symlink_metadata(&path).unwrap();
            all.push(format!(
                "{} {} {}",
                path.display(),
                meta.len(),
                meta.mtime_nsec()
            ));
        }
    }
    let kms = p.root().join("run/casemate/kms/kms.sock");
    let wait = Duration::from_secs(10);
    let status: Result<api::kms::Status, _> =
        api::rpc::blocking::call(&kms, "test", &api::kms::Op::Status, wait);
    let status = status.unwrap();
    all.push(format!(
        "keys {} releases {}",
        status.workspace_keys, status.releases
    ));
    all
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            all.extend(files_below(&path));
        } else {
            all.push(path);
        }
    }
    all.sort();
    all
}
