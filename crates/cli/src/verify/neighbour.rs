//! ISO-8: a workspace that takes all that it can get, beside one that must not notice.
//!
//! What it got is read from the kernel's own accounts (control groups, the firewall's sets and
//! counters, the tap's), and compared with what its bounds allow for the time that passed: a slow
//! machine or a busy one is no failure.

use super::Finding;
use super::world::World;
use anyhow::{Context as _, bail, ensure};
use api::host;
use api::warden::{Slot, SlotState};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a bucket or a quota lets pass at once, besides its rate: seconds' worth.
const BURST_S: f64 = 1.0;
/// CPU time that the kernel may hand out before it sees that the quota is used up, seconds.
const QUOTA_SLACK_S: f64 = 0.2;
/// Most that a VMM may have besides its guest's memory, bytes.
const VMM_MAX_BYTES: u64 = 2 << 30;
/// What the disk process writes besides the guest's data: headers, tags, replies, bytes.
const DISK_OVERHEAD_BYTES: u64 = 32 << 20;
/// Within this host has noticed that a VM is gone.
const NOTICED_WITHIN: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// As root of the workspace, for a while: spinning, forking, writing, flushing and sending at once;
/// then filling memory, which would starve the rest of itself.
const FLOOD: &str = r"
import os, socket, subprocess, sys, time
end = time.monotonic() + 5
last = end + 2
def child(work):
    if os.fork() == 0:
        try:
            open('/proc/self/oom_score_adj', 'w').write('1000')
            work()
        finally:
            os._exit(0)
def spin():
    while time.monotonic() < end: pass
def write():
    while time.monotonic() < end:
        subprocess.call(['dd', 'if=/dev/zero', 'of=/root/flood', 'bs=1M', 'count=64', 'oflag=direct', 'conv=fsync'], stderr=subprocess.DEVNULL)
def send():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while time.monotonic() < end:
        try: s.sendto(b'x' * 1000, (sys.argv[1], 9))
        except OSError: pass
def fill():
    kept = []
    while time.monotonic() < last:
        try: kept.append(b'x' * (4 << 20))
        except MemoryError: kept.clear()
def wait():
    time.sleep(max(0, end - time.monotonic()))
for works in ([spin, write, send, send] + [wait] * 50, [fill]):
    for work in works:
        try: child(work)
        except OSError: pass
    while True:
        try: os.wait()
        except ChildProcessError: break
os.unlink('/root/flood') if os.path.exists('/root/flood') else None
";

pub(super) async fn iso_8(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let a = w.shared().await?;
    // If it ends, it stays ended, and host remembers why.
    let b = w
        .make(json!({ "config": { "restart_policy": "no" } }))
        .await?;
    for id in [&a, &b] {
        w.public(id, true).await?;
    }
    let victim = w.slot(&a)?;
    let hostile = Hostile::of(w, &b)?;
    hostile.bounded(w)?;

    let before = hostile.account(w)?;
    let gateway = hostile.slot.net.gateway.clone();
    let mut answers = 0;
    let command = ["python3", "-c", FLOOD, &gateway];
    let flooded = {
        let flood = w.inside(&b, &command);
        tokio::pin!(flood);
        loop {
            tokio::select! {
                done = &mut flood => break done,
                answer = w.inside(&a, &["true"]) => {
                    answer.context("the other workspace, meanwhile")?;
                    answers += 1;
                }
            }
        }
    };
    let after = hostile.account(w);
    // What it did to itself is its own affair.
    let ended = flooded.map_or_else(|e| format!(" (it ended with {e:#})"), |_| String::new());
    w.inside(&a, &["true"])
        .await
        .context("the other workspace, afterwards")?;
    let still = w.slot(&a)?;
    ensure!(
        still.vmm_pid == victim.vmm_pid && answers > 0,
        "the other workspace answered {answers} times, and its VMM was {} and is {}",
        victim.vmm_pid,
        still.vmm_pid
    );
    let evidence = after.and_then(|after| hostile.within(w, &before, &after));
    if let Some(why) = hostile.ended(w).await? {
        bail!("the VM of the workspace that floods ended, and its accounts with it: {why}");
    }
    let evidence = evidence?;
    w.public(&a, false).await?;
    w.delete(&b).await?;
    Finding::pass(format!(
        "a workspace spun, forked, filled its memory, wrote, flushed and sent at once{ended}: {evidence}; another answered {answers} calls meanwhile"
    ))
}

/// A workspace that is up to no good.
struct Hostile {
    slot: Slot,
    /// Of all that runs for it.
    outer: Group,
    /// Of its VMM.
    vmm: Group,
}

/// What it has used so far.
struct Account {
    at: Instant,
    cpu_ns: u64,
    disk_bytes: u64,
    packets: u64,
    limited: u64,
}

impl Hostile {
    fn of(w: &World<'_>, id: &str) -> anyhow::Result<Self> {
        let slot = w.slot(id)?;
        let vmm = Group::of(slot.vmm_pid)?;
        let outer = vmm.parent()?;
        let disk = slot.disk_pid.context("it has no disk process")?;
        for pid in [slot.vmctl_pid, disk] {
            ensure!(
                Group::of(pid)?.path.starts_with(&outer.path),
                "process {pid} of the slot is outside of its group {}",
                outer.path
            );
        }
        Ok(Self { slot, outer, vmm })
    }

    /// The kernel has a bound for each thing, as large as was configured.
    fn bounded(&self, w: &World<'_>) -> anyhow::Result<()> {
        let limits = &w.probe.config.limits;
        let (cpus, asked) = (self.outer.cpus()?, f64::from(self.slot.cpus));
        ensure!(
            cpus <= asked,
            "the kernel lets a workspace of {asked} CPUs have {cpus}"
        );
        let pids = self.vmm.number("pids", "pids.max")?;
        ensure!(
            pids <= limits.pids.into(),
            "the kernel lets the VMM have {pids} threads, not {}",
            limits.pids
        );
        let memory = self.vmm.memory_max()?;
        let most = (u64::from(self.slot.memory_mb) << 20) + VMM_MAX_BYTES;
        ensure!(
            memory <= most,
            "the kernel lets the VMM have {memory} bytes"
        );
        for (set, rate) in [
            ("bytes_in", limits.network_bytes_per_s),
            ("bytes_out", limits.network_bytes_per_s),
            ("packets_in", limits.network_packets_per_s),
            ("packets_out", limits.network_packets_per_s),
        ] {
            let element = format!("{{ \"cm{}\" }}", self.slot.slot);
            let command = ["nft", "get", "element", "inet", "casemate", set, &element];
            let text = w.in_fabric(&command);
            let text = text.with_context(|| format!("the firewall has no rate {set} for it"))?;
            let held = rate_of(&text).with_context(|| format!("{set}: {text}"))?;
            ensure!(held <= rate, "the firewall lets {set} {held}, not {rate}");
        }
        Ok(())
    }

    /// Why its VM is there no more, in host's words.
    async fn ended(&self, w: &World<'_>) -> anyhow::Result<Option<String>> {
        let workspace = self.slot.workspace.clone().context("no workspace")?;
        let slots = w.probe.warden()?.slots;
        let still = |s: &Slot| s.vmm_pid == self.slot.vmm_pid && s.state != SlotState::Dead;
        if slots.iter().any(still) {
            return Ok(None);
        }
        let socket = w.probe.paths.socket("host", "host");
        let until = Instant::now() + NOTICED_WITHIN;
        loop {
            let op = host::Op::Get {
                workspace: workspace.clone(),
            };
            let now: host::Actual =
                api::rpc::blocking::call(&socket, "verify", &op, NOTICED_WITHIN)?;
            match (now.state, now.error) {
                // Host has not looked yet.
                (host::ActualState::Running, _) if Instant::now() < until => {}
                (_, Some(e)) => return Ok(Some(e.to_string())),
                (state, None) => return Ok(Some(format!("it is {state:?}, without an error"))),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn account(&self, w: &World<'_>) -> anyhow::Result<Account> {
        let counters = w.probe.counters(self.slot.slot)?;
        let disk = self.slot.disk_pid.unwrap_or_default();
        let io = fs::read_to_string(format!("/proc/{disk}/io"))?;
        let written = io.lines().find_map(|l| l.strip_prefix("wchar: "));
        Ok(Account {
            at: Instant::now(),
            cpu_ns: self.outer.cpu_ns()?,
            disk_bytes: written.context("no wchar")?.trim().parse()?,
            packets: counters.out_packets,
            limited: counters.out_limited_packets,
        })
    }

    /// That it got no more than its bounds; in words.
    #[allow(clippy::cast_precision_loss)]
    fn within(&self, w: &World<'_>, before: &Account, after: &Account) -> anyhow::Result<String> {
        let limits = &w.probe.config.limits;
        let seconds = (after.at - before.at).as_secs_f64();
        let cpu = (after.cpu_ns - before.cpu_ns) as f64 / 1e9;
        let cpus = f64::from(self.slot.cpus);
        ensure!(
            cpu <= cpus * (seconds + QUOTA_SLACK_S) * 1.05,
            "it used {cpu:.2} s of CPU time in {seconds:.2} s with {cpus} CPUs"
        );
        let disk = after.disk_bytes - before.disk_bytes;
        let most = limits.disk_bytes_per_s as f64 * (seconds + BURST_S);
        ensure!(
            (disk.saturating_sub(DISK_OVERHEAD_BYTES) as f64) <= most,
            "its disk wrote {disk} bytes in {seconds:.2} s"
        );
        let limited = after.limited - before.limited;
        let passed = (after.packets - before.packets).saturating_sub(limited);
        let most = limits.network_packets_per_s as f64 * (seconds + BURST_S);
        ensure!(
            passed as f64 <= most,
            "{passed} packets passed in {seconds:.2} s"
        );
        let (peak, max) = (self.vmm.memory_peak()?, self.vmm.memory_max()?);
        ensure!(peak <= max, "its VMM had {peak} bytes of {max}");
        let (pids, pids_max) = (
            self.vmm.number("pids", "pids.current")?,
            self.vmm.number("pids", "pids.max")?,
        );
        ensure!(pids <= pids_max, "its VMM has {pids} threads of {pids_max}");
        Ok(format!(
            "{cpu:.1} s of CPU time in {seconds:.1} s (bound: {cpus} CPU for VMM, vmctl and disk), at most {} MiB of {} MiB, {pids} threads of {pids_max}, {} MiB through its disk, {passed} packets passed and {limited} above its rate were dropped",
            peak >> 20,
            max >> 20,
            disk >> 20
        ))
    }
}

/// A control group, as the kernel names it.
struct Group {
    v2: bool,
    path: String,
}

impl Group {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let of = |wanted: &str| {
            text.lines().find_map(|l| {
                let (controllers, path) = l.split_once(':')?.1.split_once(':')?;
                let ours = path.contains("/casemate-") && controllers == wanted;
                ours.then(|| path.to_owned())
            })
        };
        match (of(""), of("memory")) {
            (_, Some(path)) => Ok(Self { v2: false, path }),
            (Some(path), None) => Ok(Self { v2: true, path }),
            (None, None) => anyhow::bail!("process {pid} is in no control group of ours: {text}"),
        }
    }

    fn parent(&self) -> anyhow::Result<Self> {
        let path = Path::new(&self.path).parent().context("no parent")?;
        Ok(Self {
            v2: self.v2,
            path: path.display().to_string(),
        })
    }

    fn file(&self, controller: &str, name: &str) -> PathBuf {
        let root = Path::new("/sys/fs/cgroup");
        let top = if self.v2 {
            root.into()
        } else {
            root.join(controller)
        };
        top.join(self.path.trim_start_matches('/')).join(name)
    }

    fn text(&self, controller: &str, name: &str) -> anyhow::Result<String> {
        let file = self.file(controller, name);
        fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
    }

    /// A number; `max` and what is less than 0 is none.
    fn number(&self, controller: &str, name: &str) -> anyhow::Result<u64> {
        let text = self.text(controller, name)?;
        Ok(text.trim().parse().unwrap_or(u64::MAX))
    }

    /// How many CPUs' time the kernel lets it have.
    #[allow(clippy::cast_precision_loss)]
    fn cpus(&self) -> anyhow::Result<f64> {
        let (quota, period) = if self.v2 {
            let text = self.text("cpu", "cpu.max")?;
            let (quota, period) = text.trim().split_once(' ').context("cpu.max")?;
            (quota.parse().unwrap_or(u64::MAX), period.parse()?)
        } else {
            (
                self.number("cpu", "cpu.cfs_quota_us")?,
                self.number("cpu", "cpu.cfs_period_us")?,
            )
        };
        Ok(quota as f64 / period as f64)
    }

    fn cpu_ns(&self) -> anyhow::Result<u64> {
        if !self.v2 {
            return self.number("cpuacct", "cpuacct.usage");
        }
        let stat = self.text("cpu", "cpu.stat")?;
        let us = stat.lines().find_map(|l| l.strip_prefix("usage_usec "));
        Ok(us.context("no usage_usec")?.parse::<u64>()? * 1000)
    }

    fn memory_max(&self) -> anyhow::Result<u64> {
        let name = ["memory.limit_in_bytes", "memory.max"][usize::from(self.v2)];
        self.number("memory", name)
    }

    fn memory_peak(&self) -> anyhow::Result<u64> {
        let name = ["memory.max_usage_in_bytes", "memory.peak"][usize::from(self.v2)];
        self.number("memory", name)
    }
}

/// The rate of an element that `nft` prints, in units/s.
fn rate_of(text: &str) -> Option<u64> {
    let rate = text.split_once("limit rate over ")?.1;
    let (number, rest) = rate.split_at(rate.find(|c: char| !c.is_ascii_digit())?);
    let unit = rest.trim_start().split('/').next()?;
    let scale = match unit {
        "kbytes" => 1 << 10,
        "mbytes" => 1 << 20,
        _ => 1,
    };
    Some(number.parse::<u64>().ok()? * scale)
}

#[cfg(test)]
mod tests {
    use super::rate_of;

    #[test]
    fn a_rate_is_read_in_any_unit() {
        for (text, rate) in [
            ("limit rate over 100000/second burst 5 packets", 100_000),
            (
                "{ \"cm1\" limit rate over 125000000 bytes/second }",
                125_000_000,
            ),
            ("limit rate over 3 mbytes/second burst 128 kbytes", 3 << 20),
            ("limit rate over 64 kbytes/second", 64 << 10),
        ] {
            assert_eq!(rate_of(text), Some(rate), "{text}");
        }
        assert_eq!(rate_of("counter packets 0"), None);
    }
}
