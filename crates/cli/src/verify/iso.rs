//! ISO: isolation.

use super::Finding;
use super::acc::is_silence;
use super::world::World;
use anyhow::{Context as _, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;

pub(super) async fn iso_1(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let a = w.shared().await?;
    let b = w.make(json!({})).await?;
    for id in [&a, &b] {
        w.public(id, true).await?;
    }
    let (sa, sb) = (w.slot(&a)?, w.slot(&b)?);
    ensure!(
        sa.vmm_pid != sb.vmm_pid,
        "two workspaces share VMM process {}",
        sa.vmm_pid
    );
    let guest = w.inside(&a, &["uname", "-r"]).await?.trim().to_owned();
    let host = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    // A setting of the whole kernel, in no namespace: changed in one, it must stay in the others.
    // (Boot ids are no witness: VMs of one template share them.)
    const SETTING: &str = "/proc/sys/kernel/printk_ratelimit_burst";
    let host_before = fs::read_to_string(SETTING)?;
    let mark = (u16::from_be_bytes(seal::random::bytes::<2>()) | 0x4000).to_string();
    let set = format!("echo {mark} > {SETTING} && cat {SETTING}");
    let in_a = w.inside(&a, &["sh", "-c", &set]).await?;
    let in_b = w.inside(&b, &["cat", SETTING]).await?;
    let host_after = fs::read_to_string(SETTING)?;
    let processes = w
        .inside(&a, &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"])
        .await?;
    w.delete(&b).await?;
    ensure!(
        !guest.is_empty() && guest != host,
        "the guest's kernel is {guest}, the host's {host}"
    );
    ensure!(in_a.trim() == mark, "the setting could not be changed");
    ensure!(
        in_b.trim() != mark && host_after == host_before,
        "a kernel's setting changed to {mark} in one workspace is {} in another, {} on the host",
        in_b.trim(),
        host_after.trim()
    );
    let info: api::host::Info = api::rpc::blocking::call(
        &w.probe.paths.socket("host", "host"),
        "verify",
        &api::host::Op::Info,
        std::time::Duration::from_secs(10),
    )?;
    Finding::pass(format!(
        "two workspaces, two VMM processes ({}, {}); guest kernel {guest}, host {host}; a kernel setting changed in one is not in the other; {} processes visible inside; accelerator: {}",
        sa.vmm_pid,
        sb.vmm_pid,
        processes.trim(),
        info.accel
    ))
}

pub(super) async fn iso_2(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let mut seen = Vec::new();
    for (name, pid) in processes(&slot) {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let status = fs::read_to_string(thread?.path().join("status"))?;
            let (seccomp, nnp) = (field(&status, "Seccomp")?, field(&status, "NoNewPrivs")?);
            ensure!(
                (seccomp, nnp) == ("2", "1"),
                "{name} (pid {pid}) has a thread with Seccomp {seccomp}, NoNewPrivs {nnp}"
            );
        }
        seen.push(format!("{name} {pid}"));
    }
    Finding::pass(format!(
        "every thread of {}: Seccomp 2 (filter), NoNewPrivs 1",
        seen.join(", ")
    ))
}

pub(super) async fn iso_3(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let a = w.shared().await?;
    let b = w.make(json!({})).await?;
    let (sa, sb) = (w.slot(&a)?, w.slot(&b)?);
    let uid = |pid: u32| -> anyhow::Result<String> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let ids = field(&status, "Uid")?;
        let set: BTreeSet<_> = ids.split_whitespace().collect();
        ensure!(set.len() == 1, "pid {pid} has several uids: {ids}");
        Ok(ids.split_whitespace().next().unwrap_or_default().to_owned())
    };
    let (ua, ub) = (uid(sa.vmm_pid)?, uid(sb.vmm_pid)?);
    ensure!(
        ua != ub && ua != "0" && ub != "0",
        "VMM uids are {ua} and {ub}"
    );
    let status = fs::read_to_string(format!("/proc/{}/status", sa.vmm_pid))?;
    for caps in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        let value = field(&status, caps)?;
        ensure!(
            value.bytes().all(|b| b == b'0'),
            "{caps} of the VMM is {value}"
        );
    }
    for kind in ["user", "pid", "net", "mnt", "ipc", "uts"] {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        let own = link(&sa.vmm_pid.to_string())?;
        ensure!(
            own != link("self")?,
            "the VMM shares the host's {kind} namespace"
        );
        ensure!(
            own != link(&sb.vmm_pid.to_string())?,
            "two VMMs share a {kind} namespace"
        );
    }
    let root = format!("/proc/{}/root", sa.vmm_pid);
    let mut top: Vec<String> = fs::read_dir(&root)
        .with_context(|| format!("read {root}"))?
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    top.sort();
    for host_thing in [
        "etc", "home", "proc", "root", "run", "sys", "var", "tmp", "boot",
    ] {
        ensure!(
            !top.iter().any(|t| t == host_thing),
            "the VMM's root holds /{host_thing}"
        );
    }
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", sa.vmm_pid))?;
    ensure!(
        cgroup.lines().any(|l| l.contains("casemate")),
        "the VMM is in no cgroup of its own: {cgroup}"
    );
    w.delete(&b).await?;
    Finding::pass(format!(
        "uids {ua} and {ub}, no capabilities, own user/pid/net/mnt/ipc/uts namespaces, own cgroup; root holds only: {}",
        top.join(" ")
    ))
}

pub(super) async fn iso_4(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let a = w.shared().await?;
    let b = w.make(json!({})).await?;
    w.public(&a, true).await?;
    let target = w.slot(&b)?;
    let before = w.probe.counters(target.slot)?;
    let met = dial_inside(w, &a, &target.net.ip, &[9991, 9990, 22]).await?;
    let after = w.probe.counters(target.slot)?;
    w.delete(&b).await?;
    for line in &met {
        ensure!(
            // `unreachable`: by the guest's own kernel, as nobody answered its ARP.
            matches!(line.1.as_str(), "silence" | "unreachable"),
            "from one workspace to another's port {}: {}",
            line.0,
            line.1
        );
    }
    ensure!(
        before.in_packets == after.in_packets,
        "{} packets reached the other VM",
        after.in_packets - before.in_packets
    );
    Finding::pass(format!(
        "from inside one workspace to another of the same account, ports 9991, 9990, 22: {}; 0 packets reached it",
        met[0].1
    ))
}

pub(super) async fn iso_5(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    w.public(&id, true).await?;
    let slot = w.slot(&id)?;
    let port = w
        .probe
        .config
        .edge
        .listen
        .first()
        .map_or(443, std::net::SocketAddr::port);
    let mut targets = vec![slot.net.gateway.clone(), "169.254.169.254".to_owned()];
    targets.extend(host_addresses());
    for address in &targets {
        for (port, answer) in dial_inside(w, &id, address, &[port, 22, 80]).await? {
            ensure!(
                is_silence(&answer) || answer == "unreachable",
                "from inside, {address}:{port} answered: {answer}"
            );
        }
    }
    w.public(&id, false).await?;
    Finding::pass(format!(
        "from inside, ports {port}, 22 and 80 of {}: no answer of any kind",
        targets.join(", ")
    ))
}

/// What dials from inside a workspace meet: `open`, `refused`, `silence` or `unreachable`.
async fn dial_inside(
    w: &World<'_>,
    id: &str,
    address: &str,
    ports: &[u16],
) -> anyhow::Result<Vec<(u16, String)>> {
    const DIAL: &str = r"
import socket, sys
for p in sys.argv[2:]:
    s = socket.socket()
    s.settimeout(1.0)
    try:
        s.connect((sys.argv[1], int(p)))
        r = 'open'
    except ConnectionRefusedError:
        r = 'refused'
    except TimeoutError:
        r = 'silence'
    except OSError:
        r = 'unreachable'
    print(p, r)
";
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let mut command = vec!["python3", "-c", DIAL, address];
    command.extend(ports.iter().map(String::as_str));
    let out = w.inside(id, &command).await?;
    out.lines()
        .map(|l| {
            let (port, word) = l.split_once(' ').context("unexpected output of the dial")?;
            Ok((port.parse()?, word.to_owned()))
        })
        .collect()
}

/// IPv4 addresses of this machine, without loopback.
fn host_addresses() -> Vec<String> {
    let Ok(out) = std::process::Command::new("ip")
        .args(["-4", "-o", "addr"])
        .output()
    else {
        return Vec::new();
    };
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|l| {
            l.split_whitespace()
                .nth(3)?
                .split('/')
                .next()
                .map(str::to_owned)
        })
        .filter(|a| !a.starts_with("127."))
        .take(4)
        .collect()
}

/// The confined processes of a slot.
fn processes(slot: &api::warden::Slot) -> Vec<(&'static str, u32)> {
    let mut all = vec![("VMM", slot.vmm_pid), ("vmctl", slot.vmctl_pid)];
    all.extend(slot.disk_pid.map(|p| ("disk", p)));
    all
}

/// A field of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> anyhow::Result<&'a str> {
    status
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
        .with_context(|| format!("no {name} in /proc/PID/status"))
}
