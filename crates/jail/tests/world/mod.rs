//! A jail with the hostile program in the VMM's place, and what stands outside to be harmed: all of
//! it the test's own.
#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    unsafe_code,
    missing_docs
)]

pub mod saved;
pub mod tracer;

use api::warden::Start;
use jail::ask::{Ask, Kind, Said};
use jail::cgroup::{Bounds, Cgroups};
use jail::channel;
use jail::plan;
use jail::process::{Handle, Proc, readable};
use jail::{ARTIFACTS, CLOSURE, SCRATCH, open_beneath};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tracer::{Part, Tracer};
use vmm::driver::Driver;

pub const LAUNCHER: &str = env!("CARGO_BIN_EXE_casemate-jail");
/// An answer takes no longer, unless the call waits.
const ANSWER: Duration = Duration::from_secs(20);
/// A call that has not come back after this waits for something.
const WAITS: Duration = Duration::from_millis(400);
/// What a bomb may come to: the group's memory.
pub const MEMORY_BYTES: u64 = 96 << 20;
const PIDS: u64 = 100;

/// An installation with the hostile program as its VMM.
pub struct World {
    pub dir: PathBuf,
    pub groups: Cgroups,
    pub driver: Driver,
    pub launcher: PathBuf,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cmh-")
            .tempdir()
            .unwrap()
            .keep();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        let closure = dir.join(CLOSURE);
        for d in ["usr/bin", "usr/lib/x86_64-linux-gnu", "usr/lib64"] {
            std::fs::create_dir_all(closure.join(d)).unwrap();
        }
        std::fs::create_dir_all(dir.join(SCRATCH)).unwrap();
        let program = Path::new(LAUNCHER)
            .parent()
            .unwrap()
            .join("examples/hostile");
        std::fs::copy(program, closure.join("usr/bin/qemu-system-x86_64")).unwrap();
        for lib in ["libc.so.6", "libgcc_s.so.1", "libm.so.6"] {
            let lib = Path::new("usr/lib/x86_64-linux-gnu").join(lib);
            std::fs::copy(Path::new("/").join(&lib), closure.join(&lib)).unwrap();
        }
        let ld = "lib64/ld-linux-x86-64.so.2";
        std::fs::copy(Path::new("/").join(ld), closure.join("usr").join(ld)).unwrap();
        symlink("usr/lib", closure.join("lib")).unwrap();
        symlink("usr/lib64", closure.join("lib64")).unwrap();
        for file in ["image", "kernel", "initramfs", "memory", "state"] {
            std::fs::write(dir.join(file), vec![b'v'; 64 << 10]).unwrap();
        }
        // A template that is being built is its VMM's to write.
        for file in ["built", "built-state"] {
            std::fs::write(dir.join(file), vec![b'v'; 64 << 10]).unwrap();
            let open = std::fs::Permissions::from_mode(0o666);
            std::fs::set_permissions(dir.join(file), open).unwrap();
        }
        let name = dir.file_name().unwrap().to_str().unwrap();
        let groups = Cgroups::open(name).unwrap();
        Self {
            dir,
            groups,
            driver: Driver::Qemu,
            launcher: LAUNCHER.into(),
        }
    }

    /// An installation with this program as its Firecracker.
    pub fn firecracker(program: &Path) -> Self {
        let mut world = Self::new();
        world.driver = Driver::Firecracker;
        let dir = world.dir.join(ARTIFACTS).join("firecracker");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(program, dir.join("firecracker")).unwrap();
        world
    }

    /// Whatever the launcher makes of it.
    pub fn start(&self, slot: u16) -> Jail {
        self.jail(slot, Start::Template, &[])
    }

    fn file(&self, name: &str, flags: OFlags) -> OwnedFd {
        open_beneath(&self.dir, name, flags, 0).unwrap()
    }

    /// The hostile program on `slot`, in a jail without `parts`.
    pub fn jail(&self, slot: u16, how: Start, parts: &[Part]) -> Jail {
        let (ctl, ctl_theirs) = UnixStream::pair().unwrap();
        let (agent, agent_theirs) = UnixStream::pair().unwrap();
        let (err, err_theirs) = rustix::pipe::pipe().unwrap();
        let tap =
            rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, 0o0.into()).unwrap();
        let mut fds = vec![
            self.file("image", OFlags::PATH),
            err_theirs,
            ctl_theirs.into(),
            agent_theirs.into(),
        ];
        if self.driver == Driver::Qemu {
            fds.push(tap);
        }
        if matches!(how, Start::Cold | Start::Build) {
            fds.push(self.file("kernel", OFlags::PATH));
            fds.push(self.file("initramfs", OFlags::PATH));
        }
        if how == Start::Wake {
            fds.extend(saved::served(&self.dir, slot));
        } else if how != Start::Cold {
            let memory = if how == Start::Build {
                "built"
            } else {
                "memory"
            };
            fds.push(self.file(memory, OFlags::PATH));
            fds.push(match (self.driver, how) {
                (Driver::Firecracker, Start::Build) => self.file("built-state", OFlags::PATH),
                _ => self.file("state", OFlags::RDONLY),
            });
        }
        let kind = Kind::Vmm {
            slot,
            how,
            memory_mb: 128,
            cpus: 1,
            driver: self.driver,
            kvm: self.driver == Driver::Firecracker,
        };
        let mut groups = Vec::new();
        if !parts.contains(&Part::Cgroup) {
            let bounds = Bounds {
                memory_bytes: Some(MEMORY_BYTES),
                memory_min_bytes: 0,
                pids: Some(PIDS),
                cpu_us: 100_000,
            };
            let (outer, group) = (format!("slot-{slot}"), format!("slot-{slot}/vm"));
            self.groups.create(&outer, plan::slot_bounds(1)).unwrap();
            self.groups.create(&group, bounds).unwrap();
            groups = self.groups.doors(&group).unwrap();
        }
        let handle = self.launch(kind, &groups, &fds, parts);
        drop(fds);
        let (ctl, listener) = match self.driver {
            Driver::Qemu => (ctl, None),
            Driver::Firecracker => {
                let got = vmm::firecracker::connected(&ctl.into());
                let (api, listener) = got.unwrap();
                (api, Some(listener))
            }
        };
        ctl.set_read_timeout(Some(ANSWER)).unwrap();
        Jail {
            handle,
            ctl: BufReader::new(ctl),
            listener,
            _agent: agent,
            err: err.into(),
        }
    }

    /// What `jail::process::Launcher` does, with a tracer that takes parts away.
    fn launch(&self, kind: Kind, groups: &[OwnedFd], fds: &[OwnedFd], parts: &[Part]) -> Handle {
        let (ours, theirs) = channel::pair().unwrap();
        let mut command = Command::new(&self.launcher);
        command.arg("--root").arg(&self.dir).env_clear();
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let tracer = Tracer::prepare(&mut command, parts);
        // A traced launcher is reaped by its tracer.
        #[allow(clippy::zombie_processes)]
        let mut launcher = command.spawn().unwrap();
        // It holds the other end of the channel.
        drop(command);
        let ask = Ask {
            groups: groups.len(),
            kind,
        };
        let all: Vec<BorrowedFd<'_>> = groups.iter().chain(fds).map(AsFd::as_fd).collect();
        channel::send(&ours, &ask, &all).unwrap();
        let tracer = tracer.map(|t| t.until_ready(launcher.id(), ours.as_fd()));
        assert!(readable(ours.as_fd(), ANSWER), "the launcher says nothing");
        let (bytes, mut sent) = channel::recv(ours.as_fd(), 4096).unwrap();
        if tracer.is_none() {
            launcher.wait().unwrap();
        }
        let said = serde_json::from_slice(&bytes);
        let Ok(Said::Ready { pid }) = said else {
            panic!("without {parts:?}: {said:?}");
        };
        let handle = Proc::of(pid).unwrap().handle().unwrap();
        drop(sent.pop());
        rustix::net::send(&ours, b"g", rustix::net::SendFlags::NOSIGNAL).unwrap();
        if let Some(tracer) = tracer {
            tracer.until_exec(pid);
        }
        assert!(readable(ours.as_fd(), ANSWER));
        let (bytes, _) = channel::recv(ours.as_fd(), 4096).unwrap();
        assert!(
            bytes.is_empty(),
            "without {parts:?}: {}",
            String::from_utf8_lossy(&bytes)
        );
        handle
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in self.groups.list() {
            let _ = self.groups.remove(&name);
        }
        self.groups.forget();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The call came back with this.
    Returned(i64),
    /// The call waits.
    Waits,
    /// The process was killed by this signal.
    Signal(i32),
    /// The process ended by itself.
    Exited,
}

impl End {
    /// Refused: an error, or the end of the one who tried.
    pub fn stopped(&self) -> bool {
        match self {
            Self::Returned(r) => *r < 0,
            Self::Signal(_) => true,
            Self::Waits | Self::Exited => false,
        }
    }

    /// The same, but for how far a bomb came by chance.
    pub fn like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Returned(a @ 0..), Self::Returned(b @ 0..)) => {
                // A descriptor's number or a pid says nothing; a bomb's reach does.
                (a - b).abs() < 25 || (*a.max(b)).min(1000) < 2 * *a.min(b)
            }
            _ => self == other,
        }
    }

    pub fn killed(&self) -> bool {
        *self == Self::Signal(libc::SIGSYS)
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Returned(r) if *r < 0 => {
                let errno = i32::try_from(-r).unwrap();
                let text = std::io::Error::from_raw_os_error(errno).to_string();
                f.pad(text.split(" (os").next().unwrap())
            }
            Self::Returned(r) => f.pad(&format!("NOT ({r})")),
            Self::Waits => f.pad("NOT (waits)"),
            Self::Signal(libc::SIGSYS) => f.pad("SIGSYS"),
            Self::Signal(libc::SIGXFSZ) => f.pad("SIGXFSZ"),
            Self::Signal(libc::SIGKILL) => f.pad("SIGKILL (out of memory)"),
            Self::Signal(s) => f.pad(&format!("signal {s}")),
            Self::Exited => f.pad("ended by itself"),
        }
    }
}

/// A running hostile program.
pub struct Jail {
    pub handle: Handle,
    pub ctl: BufReader<UnixStream>,
    /// Where the guest's connection would come out.
    pub listener: Option<UnixListener>,
    _agent: UnixStream,
    err: std::fs::File,
}

impl Jail {
    /// A line and its answer; `Err` is how the process ended.
    pub fn ask(&mut self, line: &str, wait: Duration) -> Result<String, End> {
        // It may be dead already, of the last one.
        let _ = writeln!(self.ctl.get_mut(), "{line}");
        if !readable(self.ctl.get_ref().as_fd(), wait) {
            let _ = self.handle.kill(ANSWER);
            return Err(End::Waits);
        }
        let mut answer = String::new();
        if self.ctl.read_line(&mut answer).is_ok() && !answer.is_empty() {
            return Ok(answer.trim_end().into());
        }
        assert!(readable(self.handle.pidfd(), ANSWER), "a silent process");
        match self.handle.reap() {
            Some(status) if status > 128 => Err(End::Signal(status - 128)),
            _ => {
                let mut said = [0u8; 2048];
                let n = self.err.read(&mut said).unwrap();
                eprintln!("ended by itself: {}", String::from_utf8_lossy(&said[..n]));
                Err(End::Exited)
            }
        }
    }

    pub fn call(&mut self, line: &str) -> End {
        match self.ask(
            line,
            if line.starts_with("sys") {
                WAITS
            } else {
                ANSWER
            },
        ) {
            Ok(answer) => End::Returned(answer.parse().unwrap()),
            Err(end) => end,
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        let _ = self.handle.kill(ANSWER);
    }
}

/// What stands outside.
pub struct Outside {
    victim: Child,
    dir: PathBuf,
    stream: UnixListener,
    datagram: UnixDatagram,
    abstract_stream: UnixListener,
    abstract_datagram: UnixDatagram,
    tcp: std::net::TcpListener,
    name: String,
}

impl Outside {
    pub fn new(world: &World) -> Self {
        let dir = world.dir.join("outside");
        std::fs::create_dir(&dir).unwrap();
        for file in ["file", "saved"] {
            std::fs::write(dir.join(file), "a secret").unwrap();
        }
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&dir, open.clone()).unwrap();
        let name = world.dir.file_name().unwrap().to_str().unwrap().to_owned();
        let mut sleep = Command::new("sleep");
        sleep.arg("3600").uid(65_533).gid(65_533);
        // SAFETY: only async-signal-safe calls between fork and exec.
        unsafe {
            sleep.pre_exec(|| {
                // A signal that comes stays pending, for everybody to see in its `status`.
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGURG);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let victim = sleep.spawn().unwrap();
        let stream = UnixListener::bind(dir.join("socket")).unwrap();
        let datagram = UnixDatagram::bind(dir.join("datagram")).unwrap();
        for socket in ["socket", "datagram", "file", "saved"] {
            std::fs::set_permissions(dir.join(socket), open.clone()).unwrap();
        }
        let address = SocketAddr::from_abstract_name(format!("{name}-s")).unwrap();
        let abstract_stream = UnixListener::bind_addr(&address).unwrap();
        let address = SocketAddr::from_abstract_name(format!("{name}-d")).unwrap();
        let abstract_datagram = UnixDatagram::bind_addr(&address).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for result in [
            stream.set_nonblocking(true),
            datagram.set_nonblocking(true),
            abstract_stream.set_nonblocking(true),
            abstract_datagram.set_nonblocking(true),
            tcp.set_nonblocking(true),
        ] {
            result.unwrap();
        }
        Self {
            victim,
            dir,
            stream,
            datagram,
            abstract_stream,
            abstract_datagram,
            tcp,
            name,
        }
    }

    /// What an escape is told about the outside.
    pub fn args(&self, peer: &Jail) -> String {
        let d = self.dir.display();
        let n = &self.name;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.victim.id())).unwrap();
        let address = u64::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap();
        format!(
            "victim={} peer={} address={address} file={d}/file socket={d}/socket datagram={d}/datagram \
             saved={d}/saved abstract=@{n}-s abstract_datagram=@{n}-d port={} large={}",
            self.victim.id(),
            peer.handle.proc.pid,
            self.tcp.local_addr().unwrap().port(),
            (u64::from(*model::limits::DISK_MB.end()) + 65) << 20,
        )
    }

    /// All of it that could be changed, as text: compared before and after.
    pub fn look(&self, world: &World, peer: &Jail) -> String {
        let mut all = String::new();
        for (who, pid) in [
            ("victim", self.victim.id()),
            ("another jail", peer.handle.proc.pid),
        ] {
            let read =
                |f: &str| std::fs::read_to_string(format!("/proc/{pid}/{f}")).unwrap_or_default();
            for line in read("status").lines() {
                let keys = [
                    "SigPnd",
                    "ShdPnd",
                    "Cpus_allowed:",
                    "TracerPid",
                    "State:",
                    "Uid",
                ];
                if keys.iter().any(|k| line.starts_with(k)) {
                    writeln!(all, "{who}: {line}").unwrap();
                }
            }
            for line in read("limits").lines() {
                writeln!(all, "{who}: {line}").unwrap();
            }
            let stat = read("stat");
            let nice = stat
                .rsplit_once(") ")
                .map(|s| s.1.split(' ').nth(16).map(String::from));
            writeln!(all, "{who}: nice {nice:?}").unwrap();
        }
        for dir in [&self.dir, &world.dir] {
            let mut names: Vec<_> = std::fs::read_dir(dir)
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            names.sort();
            for path in names {
                let meta = std::fs::symlink_metadata(&path).unwrap();
                let mut text = Vec::new();
                if meta.is_file() {
                    let file = std::fs::File::open(&path).unwrap();
                    file.take(1 << 20).read_to_end(&mut text).unwrap();
                }
                let sum = text
                    .iter()
                    .fold(0u64, |s, b| s.wrapping_mul(31) + u64::from(*b));
                let len = if meta.is_file() { meta.len() } else { 0 };
                let (mode, uid) = (meta.mode(), meta.uid());
                writeln!(all, "file {}: {mode:o} {uid} {len} {sum}", path.display()).unwrap();
                if saved::is_at_rest(&path) {
                    // Larger than what is read of it.
                    let written = (meta.mtime(), meta.mtime_nsec(), meta.blocks());
                    writeln!(all, "saved memory: {written:?}").unwrap();
                }
            }
        }
        let program = world.dir.join(CLOSURE).join("usr/bin/qemu-system-x86_64");
        let meta = std::fs::metadata(program).unwrap();
        writeln!(
            all,
            "program: {:o} {} {}",
            meta.mode(),
            meta.len(),
            meta.mtime()
        )
        .unwrap();
        let mut byte = [0u8; 8];
        writeln!(
            all,
            "sockets: {} {} {} {} {}",
            self.stream.accept().is_ok(),
            self.abstract_stream.accept().is_ok(),
            self.datagram.recv(&mut byte).is_ok(),
            self.abstract_datagram.recv(&mut byte).is_ok(),
            self.tcp.accept().is_ok(),
        )
        .unwrap();
        let read = |f: &str| std::fs::read_to_string(f).unwrap_or_default();
        writeln!(
            all,
            "host name: {}",
            read("/proc/sys/kernel/hostname").trim()
        )
        .unwrap();
        let ours = |text: String, what: &str| -> String {
            text.lines()
                .filter(|l| l.contains(what))
                .collect::<Vec<_>>()
                .join("\n")
        };
        writeln!(
            all,
            "mounts: {}",
            ours(read("/proc/self/mountinfo"), &self.name)
        )
        .unwrap();
        if !ours(read("/proc/keys"), "casemate-hostile").is_empty() {
            writeln!(all, "a key among root's").unwrap();
        }
        let shm = ours(read("/proc/sysvipc/shm"), &0x0ca5_e3a7.to_string());
        writeln!(all, "shared memory: {}", !shm.is_empty()).unwrap();
        if !ours(read("/proc/net/unix"), "@casemate-hostile").is_empty() {
            writeln!(all, "an abstract name").unwrap();
        }
        all.replace(&self.name, "TEST")
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.victim.kill();
        let _ = self.victim.wait();
    }
}

/// The lines that are not in both.
pub fn difference(before: &str, after: &str) -> Vec<String> {
    after
        .lines()
        .filter(|l| !before.lines().any(|b| b == *l))
        .map(String::from)
        .collect()
}

/// One row of the table.
#[derive(Debug, Clone)]
pub struct Row {
    pub escape: String,
    pub end: End,
    pub outside: Vec<String>,
}

impl Row {
    /// Refused, or bounded where there is no refusing.
    pub fn held(&self) -> bool {
        match (&self.end, bound(&self.escape)) {
            (End::Returned(n), Some(max)) => *n <= max,
            (end, _) => end.stopped(),
        }
    }

    /// For a table.
    pub fn ending(&self) -> String {
        match self.end {
            End::Returned(n) if n >= 0 && self.held() => format!("its bound ({n})"),
            _ => self.end.to_string(),
        }
    }
}

/// How far the attempts may come that are bounded, not refused.
fn bound(escape: &str) -> Option<i64> {
    match escape {
        "descriptor bomb" => Some(jail::limits::NOFILE_MAX.cast_signed()),
        "thread bomb" => Some(PIDS.cast_signed()),
        "flood of stderr" => Some(64 << 10),
        _ => None,
    }
}

/// Which start gives the escape something to try on.
fn start_of(escape: &str) -> Start {
    match escape {
        "file above its size" => Start::Build,
        _ if escape.contains("saved ") => Start::Wake,
        _ => Start::Template,
    }
}

/// Takes back what an attempt could leave on the machine itself.
fn undo(world: &World, row: &Row) {
    if row.escape == "SysV shared memory" && matches!(row.end, End::Returned(0..)) {
        // SAFETY: numbers only; the key is this test's own.
        unsafe {
            libc::shmctl(
                libc::shmget(0x0ca5_e3a7, 0, 0),
                libc::IPC_RMID,
                std::ptr::null_mut(),
            )
        };
    }
    if row.escape == "file above its size" {
        let built = std::fs::OpenOptions::new()
            .write(true)
            .open(world.dir.join("built"));
        built.unwrap().set_len(64 << 10).unwrap();
    }
}

/// Every escape but of a woken VMM, in a jail without `parts`.
pub fn escapes(world: &World, parts: &[Part]) -> Vec<Row> {
    attempts(world, parts, false)
}

/// Every escape that is of a woken VMM only, in a jail without `parts`.
pub fn escapes_woken(world: &World, parts: &[Part]) -> Vec<Row> {
    attempts(world, parts, true)
}

fn attempts(world: &World, parts: &[Part], woken: bool) -> Vec<Row> {
    // Whatever the jail does not keep in is kept in by this: the machine's name is nobody's toy.
    // SAFETY: this thread's namespaces only.
    let done = unsafe { libc::unshare(libc::CLONE_NEWUTS | libc::CLONE_NEWIPC) };
    assert_eq!(done, 0);
    let outside = Outside::new(world);
    let peers = if woken { Start::Wake } else { Start::Template };
    let mut peer = world.jail(7, peers, &[]);
    let args = outside.args(&peer);
    let mut jail: Option<(Start, Jail)> = None;
    let names = peer.ask("list", ANSWER).unwrap();
    // Their names hold blanks: on the wire they go by number.
    let names: Vec<&str> = names.split('|').collect();
    let mut rows = Vec::new();
    for (number, escape) in names.iter().enumerate() {
        let how = start_of(escape);
        if woken != (how == Start::Wake) {
            continue;
        }
        let mut now = match jail.take() {
            // Saved memory is opened for one attempt.
            Some((had, jail)) if had == how && how != Start::Wake => jail,
            before => {
                drop(before);
                world.jail(3, how, parts)
            }
        };
        let before = outside.look(world, &peer);
        let end = now.call(&format!("try {number} {args}"));
        let outside = difference(&before, &outside.look(world, &peer));
        // Whoever came through anywhere is another program from then on.
        if matches!(end, End::Returned(..0)) {
            jail = Some((how, now));
        }
        let row = Row {
            escape: (*escape).into(),
            end,
            outside,
        };
        undo(world, &row);
        rows.push(row);
    }
    let _ = std::fs::remove_dir_all(world.dir.join("outside"));
    rows
}

/// The numbers of this kernel's table end before this.
const NUMBERS: i64 = 470;
const CLASSES: [&str; 4] = ["zeros", "ones", "pointers", "descriptor"];
/// `uretprobe` and `uprobe`: the kernel asks no filter about them, and refuses them (or kills)
/// from anywhere but the trampoline of a probe of its own.
const OF_PROBES: [i64; 2] = [335, 336];
type Rules = [(libc::c_long, &'static str)];

/// Every system call, with every class of arguments: exactly those of the list get through.
pub fn every_call(world: &World, allowed: &Rules, absent: &Rules, by_argument: &[i64]) {
    let x32 = 0x4000_0000;
    let numbers: Vec<i64> = (0..=NUMBERS)
        .chain([x32, x32 + 1, x32 + 59, x32 + 101, x32 + 520])
        .chain([1000, 4096, i64::from(i32::MAX), 0x8000_0000, 0xffff_ffff])
        .collect();
    let mut jail = None;
    let mut ends: BTreeMap<i64, Vec<End>> = BTreeMap::new();
    for nr in &numbers {
        for class in 0..CLASSES.len() {
            let mut now = jail
                .take()
                .unwrap_or_else(|| world.jail(1, Start::Template, &[]));
            let end = now.call(&format!("sys {nr} {class}"));
            if matches!(end, End::Returned(_)) {
                jail = Some(now);
            }
            ends.entry(*nr).or_default().push(end);
        }
    }
    let mut count = [0; 4];
    for (nr, ends) in &ends {
        let killed = ends.iter().filter(|e| e.killed()).count();
        if by_argument.contains(nr) {
            count[0] += 1;
            assert!(killed > 0, "{nr}: {ends:?}");
        } else if allowed.iter().any(|(n, _)| n == nr) {
            count[1] += 1;
            assert_eq!(killed, 0, "{nr} is on the list: {ends:?}");
        } else if absent.iter().any(|(n, _)| n == nr) {
            count[2] += 1;
            let absent = End::Returned(-i64::from(libc::ENOSYS));
            assert!(ends.iter().all(|e| *e == absent), "{nr}: {ends:?}");
        } else if OF_PROBES.contains(nr) && killed == 0 {
            count[3] += 1;
            let refused = |e: &End| e.stopped();
            assert!(ends.iter().all(refused), "{nr}: {ends:?}");
        } else {
            count[3] += 1;
            assert_eq!(killed, CLASSES.len(), "{nr} is not on the list: {ends:?}");
        }
    }
    let [argument, let_through, not_there, killed] = count;
    println!(
        "{} numbers in {} classes of arguments: {killed} kill, {not_there} are absent, {argument} go \
         by argument, {let_through} are allowed",
        numbers.len(),
        CLASSES.len()
    );
    // All that is allowed was tried.
    assert_eq!(
        (let_through, not_there, argument),
        (allowed.len(), absent.len(), by_argument.len())
    );
}

pub fn print(title: &str, rows: &[Row]) {
    println!(
        "\n{title}\n{:<34} | {:<34} | effect outside",
        "escape", "stopped by"
    );
    for row in rows {
        let outside = if row.outside.is_empty() {
            "none".into()
        } else {
            row.outside.join("; ")
        };
        println!("{:<34} | {:<34} | {outside}", row.escape, row.ending());
    }
}
