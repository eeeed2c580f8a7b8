//! A workspace whose root takes all that there is of one thing, beside one that has work to do:
//! the work is done, calls are answered all through, nothing of the machine changes, and its owner
//! can stop, start and delete it as ever.
//!
//! The bombs run inside a real VM (`hostile_guest/bombs.py`) until that is stopped. Must never say
//! how fast anything was: what a neighbour loses is measured by `cargo xtask bench neighbour`.

use crate::hostile_guest::{Guest, counters, in_fabric};
use crate::world::{Account, Platform};
use api::warden::Counters;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const BOMBS: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/platform/hostile_guest/bombs.py"
);
/// Of the hostile workspace's disk, MiB.
const DISK_MB: u64 = 256;
/// Headers, tags and the journal of a disk's file, MiB.
const DISK_OVERHEAD_MB: u64 = 32;
/// What the platform's own processes may grow by beside a bomb, bytes.
const GROWTH_MAX_BYTES: u64 = 64 << 20;
/// The same of their logs.
const LOGS_MAX_BYTES: u64 = 1 << 20;
/// Within this a bomb must be seen to go off.
const BITES_WITHIN: Duration = Duration::from_secs(60);

/// Within this all that the platform does by itself is done.
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
/// Within this nothing is left of a workspace that was deleted.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// What the victim has to do: hash, write through, read back. Prints what came out.
const WORK: &str = r"
import hashlib, mmap, os
block = mmap.mmap(-1, 1 << 20)
fd = os.open('/root/work', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
for n in range(8):
    for _ in range(8): digest = hashlib.sha256(block).digest()
    block[:32] = digest
    os.pwrite(fd, block, n << 20); os.fsync(fd)
    os.preadv(fd, [block], n << 20)
print(hashlib.sha256(block).hexdigest())
";

/// A bomb by its name, and how it is seen from outside that it goes off.
type Bomb = (&'static str, fn(&Seen) -> bool);

const ALL: &[Bomb] = &[
    ("forks", |s| s.cpu_s > 1.0),
    ("memory", |s| s.memory_bytes > 100 << 20),
    ("cpu", |s| s.cpu_s > 1.0),
    ("disk", |s| s.disk_bytes > (DISK_MB / 2) << 20),
    ("console", |s| s.cpu_s > 1.0),
];

/// The hostile workspace from outside, since its bomb was thrown.
#[derive(Default)]
struct Seen {
    cpu_s: f64,
    /// What its VM grew by.
    memory_bytes: u64,
    disk_bytes: u64,
}

#[test]
fn a_hostile_guest_harms_nobody_else() {
    let p = Platform::start("[host]\npool_size = 0\n", None);
    let (account, other) = (p.account("bombs"), p.account("victim"));
    let victim = Guest::make(&p, &other, &["--public-access"]);
    let result = victim.run(&["python3", "-c", WORK]);
    settled(&p);
    println!("bomb       seconds  victim: work, calls  the hostile VM");
    for (name, goes_off) in ALL {
        let began = Instant::now();
        let before = Outside::of(&p);
        let disk_mb = DISK_MB.to_string();
        let bomb = Guest::make(&p, &account, &["--public-access", "--disk-mb", &disk_mb]);
        bomb.copy_in(BOMBS);
        // What is flushed is there afterwards, however its VM ends.
        bomb.run(&["sync"]);
        let (vmm, at_rest) = (vmm_of(&p, &bomb), bomb.counters(&p));
        let line = format!("setsid python3 /root/bombs.py {name} </dev/null >/dev/null 2>&1 &");
        bomb.run(&["sh", "-c", &line]);

        let until = Instant::now() + BITES_WITHIN;
        let mut seen = Seen::default();
        // One that ended its own VM has gone off too.
        while vmm_of(&p, &bomb) == vmm && !goes_off(&seen) {
            assert!(Instant::now() < until, "{name} is a dud");
            std::thread::sleep(Duration::from_millis(50));
            seen = Seen::of(&p, &bomb, &at_rest).unwrap_or(seen);
        }
        let (worked, calls) = work(&p, &other, &victim, &result);
        before.bounds(name, &Outside::of(&p));
        let (disk, most) = (disk_bytes(&p, &bomb), (DISK_MB + DISK_OVERHEAD_MB) << 20);
        assert!(disk <= most, "{name}: {disk} bytes of disk");
        let ended = vmm_of(&p, &bomb) != vmm;

        operated(&p, &account, &bomb);
        before.again(name, &p);
        println!(
            "{name:10} {:>7.1}  {:>6.1} s, {calls:>3} calls   {:.1} s of CPU, {} MiB more memory, {} MiB of disk{}",
            began.elapsed().as_secs_f64(),
            worked.as_secs_f64(),
            seen.cpu_s,
            seen.memory_bytes >> 20,
            disk >> 20,
            if ended { "; it ended by itself" } else { "" }
        );
    }
}

/// The victim's work, and calls that it answers meanwhile.
fn work(p: &Platform, account: &Account, victim: &Guest<'_>, result: &str) -> (Duration, u32) {
    let began = Instant::now();
    let args = ["ws", "exec", &victim.id, "--", "python3", "-c", WORK];
    let mut working = p.user_command(account, &args).spawn().unwrap();
    let mut calls = 0;
    while working.try_wait().unwrap().is_none() {
        victim.run(&["true"]);
        calls += 1;
    }
    let out = working.wait_with_output().unwrap();
    p.expect_ok("the victim's work", &out);
    assert_eq!(String::from_utf8_lossy(&out.stdout), result);
    assert!(calls > 0, "it answered nothing meanwhile");
    (began.elapsed(), calls)
}

/// Waits until the template is made, which is a VM like any while it is being made.
fn settled(p: &Platform) {
    let until = Instant::now() + SETTLED_WITHIN;
    loop {
        let now = p.warden();
        if now
            .as_ref()
            .is_some_and(|s| !s.templates.is_empty() && s.slots.len() == 1)
        {
            return;
        }
        assert!(Instant::now() < until, "no template: {now:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What its owner does then goes as ever, and whatever is on its disk, it comes up.
fn operated(p: &Platform, account: &Account, bomb: &Guest<'_>) {
    for act in ["stop", "start"] {
        p.expect_ok(act, &p.as_user(account, &["ws", act, &bomb.id]));
    }
    bomb.run(&["test", "-f", "/root/bombs.py"]);
    p.expect_ok("rm", &p.as_user(account, &["ws", "rm", &bomb.id]));
    assert!(!p.workspaces_on_host().contains(&bomb.id));
}

/// The process that runs it now.
fn vmm_of(p: &Platform, guest: &Guest<'_>) -> Option<u64> {
    let slots = p.slots();
    let slot = slots.iter().find(|s| s["workspace"] == guest.id.as_str());
    slot.and_then(|s| s["vmm_pid"].as_u64())
}

fn disk_bytes(p: &Platform, guest: &Guest<'_>) -> u64 {
    let file = p.state("volumes").join(format!("{}.disk/volume", guest.id));
    std::fs::metadata(file).unwrap().blocks() * 512
}

impl Seen {
    /// None once it is gone.
    fn of(p: &Platform, bomb: &Guest<'_>, at_rest: &Counters) -> Option<Self> {
        let now = counters(p, bomb.slot).ok()?;
        let cpu_ns = now.cpu_ns.saturating_sub(at_rest.cpu_ns);
        Some(Self {
            cpu_s: Duration::from_nanos(cpu_ns).as_secs_f64(),
            memory_bytes: now.memory_bytes.saturating_sub(at_rest.memory_bytes),
            disk_bytes: disk_bytes(p, bomb),
        })
    }
}

/// The platform on its machine.
struct Outside {
    /// Its processes, mounts and control groups, taps and rules, and files of workspaces.
    things: BTreeSet<String>,
    /// What its own processes hold.
    memory_bytes: u64,
    log_bytes: u64,
}

impl Outside {
    fn of(p: &Platform) -> Self {
        let rules = in_fabric(p, &["nft", "-s", "list", "ruleset"]);
        let rules = rules.split(['\n', ',', '{', '}']).map(|r| r.trim().into());
        let links = in_fabric(p, &["cat", "/proc/self/net/dev"]);
        let links = links
            .lines()
            .filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned()));
        let things = p.leftovers().into_iter().chain(p.disk_files());
        let logs = std::fs::read_dir(p.state("log")).unwrap();
        let daemons = crate::hostile_guest::daemons(p);
        Self {
            things: things.chain(rules).chain(links).collect(),
            memory_bytes: daemons.values().map(|pid| pss_bytes(*pid)).sum(),
            log_bytes: logs.map(|e| e.unwrap().metadata().unwrap().len()).sum(),
        }
    }

    /// That nothing but the hostile workspace's own is there beside a bomb, and nothing is gone.
    fn bounds(&self, name: &str, beside: &Self) {
        let gone: Vec<_> = self.things.difference(&beside.things).collect();
        assert!(gone.is_empty(), "{name}: gone is {gone:?}");
        let memory = beside.memory_bytes.saturating_sub(self.memory_bytes);
        assert!(memory < GROWTH_MAX_BYTES, "{name}: grew by {memory} bytes");
        let logs = beside.log_bytes - self.log_bytes;
        assert!(logs < LOGS_MAX_BYTES, "{name}: logs grew by {logs} bytes");
    }

    /// That all is as it was.
    fn again(&self, name: &str, p: &Platform) {
        let until = Instant::now() + GONE_WITHIN;
        let mut now = Self::of(p).things;
        while now != self.things && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(50));
            now = Self::of(p).things;
        }
        assert_eq!(self.things, now, "{name}");
    }
}

/// What a process holds for itself, and its share of what it holds with others.
pub(crate) fn pss_bytes(pid: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:")).unwrap();
    let kib = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    kib << 10
}
