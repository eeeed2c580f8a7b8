//! A world of its own for each test: directories, a network namespace, doubles for the programs
//! that warden starts, and a count of what is left at the end.
#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    unsafe_code,
    missing_docs
)]

pub mod life;
pub mod release;

use api::warden::{Op, Open, Source, Start, Status};
use net::Network;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::driver::Driver;
use warden::journal::Step;
use warden::{Config, Layout, Machine, Vmm, Warden};

pub const LAUNCHER: &str = env!("CARGO_BIN_EXE_casemate-warden");
pub const EDGE_UID: u32 = 64_001;
pub const HOST_UID: u32 = 64_002;
pub const WORKSPACE: &str = "ws_00000000000000aa";
pub const START: &str = "st_00000000000000bb";
/// Longest wait for anything here.
pub const SOON: Duration = Duration::from_secs(20);

pub struct World {
    pub dir: PathBuf,
    pub layout: Layout,
    pub image: String,
    owner: bool,
}

impl World {
    /// A fresh installation in a temporary directory.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cmt-")
            .tempdir()
            .unwrap()
            .keep();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        let layout = Layout::new(&dir);
        let artifacts = layout.artifacts();
        let closure = artifacts.join("closure");
        for d in [
            "usr/bin",
            "usr/lib/x86_64-linux-gnu",
            "usr/lib64",
            "usr/share/qemu",
        ] {
            std::fs::create_dir_all(closure.join(d)).unwrap();
        }
        let double = Path::new(LAUNCHER)
            .parent()
            .unwrap()
            .join("examples/double");
        std::fs::copy(&double, closure.join("usr/bin/qemu-system-x86_64")).unwrap();
        for lib in ["libc.so.6", "libgcc_s.so.1", "libm.so.6"] {
            let lib = Path::new("usr/lib/x86_64-linux-gnu").join(lib);
            std::fs::copy(Path::new("/").join(&lib), closure.join(&lib)).unwrap();
        }
        let ld = "lib64/ld-linux-x86-64.so.2";
        std::fs::copy(Path::new("/").join(ld), closure.join("usr").join(ld)).unwrap();
        symlink("usr/lib", closure.join("lib")).unwrap();
        symlink("usr/lib64", closure.join("lib64")).unwrap();
        std::fs::create_dir_all(artifacts.join("kernel")).unwrap();
        std::fs::write(artifacts.join("kernel/vmlinux"), "a kernel").unwrap();
        std::fs::write(artifacts.join("kernel/initramfs.cpio"), "an initramfs").unwrap();
        std::fs::create_dir_all(artifacts.join("images")).unwrap();
        let image: String = seal::hash::sha256(b"an image")
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        std::fs::write(artifacts.join(format!("images/{image}.erofs")), "an image").unwrap();
        let programs = dir.join("programs");
        std::fs::create_dir(&programs).unwrap();
        for (program, name) in [
            ("double", "casemate-vmctl"),
            ("double", "casemate-disk"),
            ("jail", "casemate-jail"),
            ("net", "casemate-net"),
            ("volumes", "casemate-volumes"),
        ] {
            std::fs::copy(double.with_file_name(program), programs.join(name)).unwrap();
        }
        layout.create().unwrap();
        Machine::init(&layout).unwrap();
        Self {
            dir,
            layout,
            image,
            owner: true,
        }
    }

    /// An installation with real programs.
    pub fn with_programs() -> Self {
        let world = Self::new();
        for name in ["casemate-vmctl", "casemate-disk"] {
            let built = Path::new(LAUNCHER).with_file_name(name);
            std::fs::copy(built, world.dir.join("programs").join(name)).unwrap();
        }
        world
    }

    /// An installation with real programs and artifacts.
    pub fn with_artifacts(artifacts: &Path) -> Self {
        let mut world = Self::with_programs();
        std::fs::remove_dir_all(world.layout.artifacts()).unwrap();
        symlink(artifacts, world.layout.artifacts()).unwrap();
        let images = std::fs::read_dir(artifacts.join("images")).unwrap();
        let names = images.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut ids = names.filter_map(|n| n.strip_suffix(".erofs").map(String::from));
        world.image = ids.next().unwrap();
        world
    }

    /// Copies a base image of those artifacts into this world's own.
    pub fn image_copy(&mut self, artifacts: &Path) {
        let images = std::fs::read_dir(artifacts.join("images")).unwrap();
        let mut names = images.map(|e| e.unwrap().file_name().into_string().unwrap());
        let name = names.find(|n| n.ends_with(".erofs")).unwrap();
        let (from, to) = (artifacts.join("images"), self.layout.artifacts());
        std::fs::copy(from.join(&name), to.join("images").join(&name)).unwrap();
        self.image = name.trim_end_matches(".erofs").into();
    }

    /// The same installation, seen from a process that a test started.
    pub fn at(dir: &Path) -> Self {
        let image = seal::hash::sha256(b"an image")
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        Self {
            dir: dir.into(),
            layout: Layout::new(dir),
            image,
            owner: false,
        }
    }

    pub fn open(&self, fail_at: Option<Step>) -> Arc<Warden> {
        self.open_with(
            Vmm {
                driver: Driver::Qemu,
                kvm: false,
                why: "a double".into(),
                pinned: None,
            },
            fail_at,
        )
    }

    pub fn open_with(&self, vmm: Vmm, fail_at: Option<Step>) -> Arc<Warden> {
        Warden::open(Config {
            layout: self.layout.clone(),
            network: network(),
            edge_uid: EDGE_UID,
            host_uid: HOST_UID,
            programs: self.dir.join("programs"),
            vmm,
            fail_at,
        })
        .unwrap_or_else(|e| panic!("{e:?}"))
    }

    pub fn vm_open(&self, slot: u16, how: Start) -> Op {
        Op::VmOpen {
            slot,
            how,
            image: self.image.clone(),
            memory_mb: 128,
            cpus: 1,
        }
    }

    /// The directory of the workspace's disk at rest.
    pub fn disk(&self) -> PathBuf {
        self.dir
            .join(jail::VOLUMES)
            .join(format!("{WORKSPACE}.disk"))
    }

    /// The VMM's double on the slot.
    pub fn probe(&self, slot: u16) -> Probe {
        let stream = UnixStream::connect(self.layout.vmctl().join(format!("{slot}.sock"))).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Probe {
            lines: BufReader::new(stream),
        }
    }

    /// All that an installation without slots must not have.
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let state = self.layout.state();
        for dir in [
            state.join("slots"),
            state.join("build"),
            self.layout.vmctl(),
        ] {
            for e in std::fs::read_dir(dir).unwrap() {
                left.push(e.unwrap().path().display().to_string());
            }
        }
        for e in std::fs::read_dir(self.dir.join(jail::VOLUMES)).unwrap() {
            let path = e.unwrap().path();
            if path.extension().is_some_and(|x| x == "new") {
                left.push(path.display().to_string());
            }
        }
        for top in ["", "memory", "cpu", "cpuacct", "pids"] {
            let top = Path::new("/sys/fs/cgroup").join(top);
            let ours = top.join(format!("casemate-{}", self.layout.instance()));
            for e in std::fs::read_dir(ours).into_iter().flatten() {
                let path = e.unwrap().path();
                if path.is_dir() {
                    left.push(path.display().to_string());
                }
            }
        }
        for line in std::fs::read_to_string("/proc/thread-self/net/dev")
            .unwrap()
            .lines()
        {
            if line.trim_start().starts_with("cm") {
                left.push(line.into());
            }
        }
        let root = self.dir.to_str().unwrap().to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        left.extend(
            mounts
                .lines()
                .filter(|l| l.contains(&root))
                .map(String::from),
        );
        left.extend(nft_elements());
        left
    }

    /// Nothing is left, now or soon: a tap goes when the kernel has closed its last descriptor.
    pub fn assert_clean(&self) {
        let end = Instant::now() + SOON;
        while !self.left().is_empty() && Instant::now() < end {
            std::thread::yield_now();
        }
        assert_eq!(self.left(), Vec::<String>::new());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.owner {
            return;
        }
        // Whatever a failed test left: by the installation's own groups.
        if let Ok(groups) = jail::cgroup::Cgroups::open(&self.layout.instance()) {
            for name in groups.list() {
                let _ = groups.remove(&name);
            }
            groups.forget();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub struct Probe {
    lines: BufReader<UnixStream>,
}

impl Probe {
    /// One command, one answer; `None` when the double died of it.
    pub fn try_ask(&mut self, line: &str) -> Option<String> {
        writeln!(self.lines.get_mut(), "{line}").ok()?;
        let mut answer = String::new();
        match self.lines.read_line(&mut answer) {
            Ok(1..) => Some(answer.trim_end().to_owned()),
            _ => None,
        }
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.try_ask(line)
            .unwrap_or_else(|| panic!("the VMM died of {line:?}"))
    }
}

pub fn network() -> Network {
    Network::new([10, 117, 0, 0].into())
}

pub fn status(w: &Arc<Warden>) -> Status {
    serde_json::from_value(w.answer(Op::Status).unwrap()).unwrap()
}

/// Waits for what the watcher or a process brings about.
pub fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !f() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

pub fn disk_open(slot: u16) -> Op {
    disk_open_bound(slot, 0)
}

pub fn disk_open_bound(slot: u16, pids: u32) -> Op {
    Op::DiskOpen {
        slot,
        workspace: WORKSPACE.parse().unwrap(),
        start_id: START.parse().unwrap(),
        purpose: model::Purpose::Disk,
        nonce: "0c".repeat(32),
        disk_mb: 64,
        bytes_per_s: 1 << 30,
        ops_per_s: 100_000,
        pids,
        from: None,
    }
}

/// What bounds the threads of a slot's VMM: its group, its own limit.
pub fn pids_max(world: &World, slot: u16) -> (u64, u64) {
    let w = jail::cgroup::Cgroups::open(&world.layout.instance()).unwrap();
    let top = if w.version() == "v1" { "pids" } else { "" };
    let group = format!("casemate-{}/slot-{slot}/vm", world.layout.instance());
    let group = Path::new("/sys/fs/cgroup").join(top).join(group);
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    let first = read(group.join("cgroup.procs"));
    // The VMM is the one of the two that runs as a VMM's user.
    let limits = first.lines().find_map(|pid| {
        let status = read(format!("/proc/{pid}/status").into());
        status
            .contains(&format!(
                "Uid:\t{}\t",
                jail::limits::VMM_UID + u32::from(slot)
            ))
            .then(|| read(format!("/proc/{pid}/limits").into()))
    });
    let limits = limits.unwrap();
    let line = limits
        .lines()
        .find(|l| l.contains("Max processes"))
        .unwrap();
    let hard = line.split_whitespace().nth(3).unwrap();
    let max = read(group.join("pids.max"));
    (max.trim().parse().unwrap(), hard.parse().unwrap())
}

/// The VMM's own limit of threads when `pids` were asked for: without CAP_SYS_RESOURCE it stays.
pub fn following(w: &Arc<Warden>, pids: u64) -> u64 {
    let weakened = status(w).weakened;
    if weakened.iter().any(|w| w.contains("SYS_RESOURCE")) {
        129
    } else {
        pids
    }
}

pub fn disk_grant(slot: u16) -> Op {
    Op::DiskGrant {
        slot,
        sealed: "c2VhbGVk".into(),
        aad: "0d".repeat(32),
        from: None,
    }
}

pub fn edge(port: u16) -> Open {
    Open {
        source: Source::Edge,
        port,
    }
}

/// Runs `f` in a thread with a network namespace of its own; what it spawns is in it too.
pub fn in_netns<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let run = move || {
        // SAFETY: unshares the network namespace of this thread alone.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "needs root");
        f()
    };
    match std::thread::spawn(run).join() {
        Ok(v) => v,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Runs `f` in a thread whose credentials are `uid`'s.
pub fn as_uid<T: Send + 'static>(uid: u32, f: impl FnOnce() -> T + Send + 'static) -> T {
    let run = move || {
        // SAFETY: the raw call changes this thread alone, which ends with `f`.
        let done = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        assert_eq!(done, 0);
        f()
    };
    std::thread::spawn(run).join().unwrap()
}

pub fn nft_elements() -> Vec<String> {
    let out = std::process::Command::new("nft")
        .args(["list", "ruleset"])
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    text.lines()
        .filter(|l| l.contains("\"cm"))
        .map(|l| format!("nft: {}", l.trim()))
        .collect()
}
