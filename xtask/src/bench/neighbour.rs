//! What is left to a workspace beside one that floods: rounds of work (hashing, a direct write, a
//! flush, a direct read) in a window of time, alone and beside each kind of flood. One CPU each.
//!
//! The floods by the agent's API come from this program, as a client's would; they are told to be
//! the nicest there are, since no client runs on the machine that it floods.

use super::platform::{Platform, create, delete, exec};
use super::{Args, median, runtime, say};
use anyhow::{Context as _, Result, ensure};
use cli::client::Client;
use std::time::{Duration, Instant};

/// How long the victim's work is counted, seconds.
const WINDOW_S: u64 = 4;
/// How long a flood lasts: it begins before the window and ends after it, seconds.
const FLOOD_S: u64 = WINDOW_S + 4;
/// Calls at once of a flood by the API.
const CALLS_AT_ONCE: usize = 16;

/// Prints the rounds of work that were done in the window.
const VICTIM: &str = r"
import hashlib, mmap, os, sys, time
block = mmap.mmap(-1, 1 << 20)
fd = os.open('/root/victim', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
def round():
    for _ in range(8): hashlib.sha256(block).digest()
    os.lseek(fd, 0, 0); os.write(fd, block); os.fsync(fd)
    os.lseek(fd, 0, 0); os.readv(fd, [block])
round()
time.sleep(2)
rounds, end = 0, time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    round(); rounds += 1
print(rounds)
";

/// Floods for a while, in the way that is asked for.
const FLOOD: &str = r"
import os, socket, subprocess, sys, time
kind, seconds, gateway = sys.argv[1], float(sys.argv[2]), sys.argv[3]
end = time.monotonic() + seconds
lines = [line.split() for line in open('/proc/meminfo')]
free = next(int(line[1]) << 10 for line in lines if line[0] == 'MemAvailable:') * 3 // 4 // 4
def cpu():
    while time.monotonic() < end: pass
def memory():
    # Of its own VM's memory what is free, and not more: one that thrashes floods with reads.
    while time.monotonic() < end:
        kept = []
        while len(kept) << 22 < free and time.monotonic() < end: kept.append(b'x' * (4 << 20))
def forks():
    while time.monotonic() < end:
        for _ in range(200):
            try:
                if os.fork() == 0:
                    time.sleep(0.5); os._exit(0)
            except OSError: break
        while True:
            try: os.wait()
            except ChildProcessError: break
def disk():
    name = '/root/flood%d' % os.getpid()
    while time.monotonic() < end:
        subprocess.call(['dd', 'if=/dev/zero', 'of=' + name, 'bs=1M', 'count=32', 'oflag=direct', 'conv=fsync'], stderr=subprocess.DEVNULL)
    os.unlink(name)
def flush():
    fd = os.open('/root/flush%d' % os.getpid(), os.O_RDWR | os.O_CREAT)
    while time.monotonic() < end:
        os.write(fd, b'x'); os.fsync(fd)
def network():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while time.monotonic() < end:
        try: s.sendto(b'x' * 1000, (gateway, 9))
        except OSError: pass
def console():
    while time.monotonic() < end:
        for path in ('/dev/console', '/dev/kmsg', '/dev/hvc0', '/dev/ttyS0'):
            try:
                with open(path, 'wb', buffering=0) as f: f.write(b'x' * 900 + b'\n')
            except OSError: pass
for _ in range(4):
    if os.fork() == 0:
        try:
            open('/proc/self/oom_score_adj', 'w').write('1000')
            globals()[kind]()
        finally:
            os._exit(0)
while True:
    try: os.wait()
    except ChildProcessError: break
";

/// The kinds; `api` comes from outside.
const KINDS: &[&str] = &[
    "cpu", "memory", "forks", "disk", "flush", "network", "console", "api",
];

pub(super) fn run(args: &Args) -> Result<()> {
    let unknown = args.kinds.iter().find(|k| !KINDS.contains(&k.as_str()));
    ensure!(unknown.is_none(), "floods are {}", KINDS.join(", "));
    let runtime = runtime()?;
    let platform = Platform::up_limited(&args.artifacts, 2)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let [victim, attacker] = [(); 2].map(|()| runtime.block_on(create(&client, memory_mb)));
    let (victim, attacker) = (victim?, attacker?);
    platform.pool_wait()?;
    let slot = platform.probe().slot(&attacker)?;
    let mut worst = f64::INFINITY;
    let asked = |kind: &&str| args.kinds.is_empty() || args.kinds.iter().any(|k| k == kind);
    for kind in KINDS.iter().copied().filter(asked) {
        let (mut alone, mut beside, mut used) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..args.runs.div_ceil(5) {
            let token = runtime.block_on(client.runtime_token(&victim))?;
            alone.push(runtime.block_on(rounds(&client, &token))?);
            let other = runtime.block_on(client.runtime_token(&attacker))?;
            let (before, began) = (platform.probe().counters(slot.slot)?, Instant::now());
            let both = async {
                let flood = flood(&client, &other, kind, &slot.net.gateway);
                tokio::join!(rounds(&client, &token), flood).0
            };
            beside.push(runtime.block_on(both)?);
            let cpu_ns = platform.probe().counters(slot.slot)?.cpu_ns - before.cpu_ns;
            used.push(cpu_ns as f64 / 1e9 / began.elapsed().as_secs_f64());
        }
        let (alone, beside) = (median(alone), median(beside));
        println!(
            "# {kind}: {alone:.1} rounds/s alone, {beside:.1} beside a flood that used {:.2} CPUs",
            median(used)
        );
        let ratio = beside / alone;
        say(
            "neighbour",
            &format!("ratio_victim_throughput_{kind}"),
            ratio,
            "x",
        );
        worst = worst.min(ratio);
    }
    say("neighbour", "ratio_victim_throughput", worst, "x");
    runtime.block_on(delete(&client, &attacker))?;
    runtime.block_on(delete(&client, &victim))
}

/// The victim's rounds of work a second.
async fn rounds(client: &Client, token: &str) -> Result<f64> {
    let window = WINDOW_S.to_string();
    let task = exec(client, token, &["python3", "-c", VICTIM, &window]).await?;
    let said = task["stdout"].as_str().unwrap_or_default();
    let rounds: f64 = said
        .trim()
        .parse()
        .with_context(|| format!("it said {said:?}"))?;
    Ok(rounds / WINDOW_S as f64)
}

/// What becomes of the attacker's calls is its own affair.
async fn flood(client: &Client, token: &str, kind: &str, gateway: &str) {
    if kind != "api" {
        let seconds = FLOOD_S.to_string();
        let command = ["python3", "-c", FLOOD, kind, &seconds, gateway];
        let _ = exec(client, token, &command).await;
        return;
    }
    let end = Instant::now() + Duration::from_secs(FLOOD_S);
    let calls = (0..CALLS_AT_ONCE).map(|_| async {
        while Instant::now() < end {
            let _ = exec(client, token, &["true"]).await;
        }
    });
    futures_util::future::join_all(calls).await;
}
