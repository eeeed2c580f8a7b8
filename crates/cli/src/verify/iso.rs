//! ISO: isolation.

use super::Finding;
use super::acc::is_silence;
use super::world::World;
use anyhow::{Context as _, bail, ensure};
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
        "two workspaces, two VMM processes ({}, {}) of {}; guest kernel {guest}, host {host}; a kernel setting changed in one is not in the other; {} processes visible inside; accelerator: {}",
        sa.vmm_pid,
        sb.vmm_pid,
        driver(&sa)?,
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
        "every thread of {}: Seccomp 2 (filter), NoNewPrivs 1; the VMM is {}",
        seen.join(", "),
        driver(&slot)?
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
        "{}: uids {ua} and {ub}, no capabilities, own user/pid/net/mnt/ipc/uts namespaces, own cgroup; root holds only: {}",
        driver(&sa)?,
        top.join(" ")
    ))
}

/// Which VMM runs on the slot, by its process's executable: what is installed or chosen says less.
fn driver(slot: &api::warden::Slot) -> anyhow::Result<&'static str> {
    let program = fs::read_link(format!("/proc/{}/exe", slot.vmm_pid))?;
    match program.file_name().and_then(|n| n.to_str()) {
        Some("qemu-system-x86_64") => Ok("QEMU"),
        Some("firecracker") => Ok("Firecracker"),
        _ => bail!("the VMM runs {}, which is no driver", program.display()),
    }
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

/// Requests that a host side with a view into its guests would know.
const LOOKS_INSIDE: &[&str] = &[
    "read_memory",
    "memory_read",
    "dump",
    "dump_guest_memory",
    "pmemsave",
    "memsave",
    "human_monitor_command",
    "qmp",
    "hmp",
    "migrate",
    "screendump",
    "exec",
    "processes",
    "files",
    "read_file",
    "console",
    "attach_debugger",
    "gdbserver",
];

pub(super) async fn iso_6(w: &mut World<'_>) -> anyhow::Result<Finding> {
    let id = w.shared().await?;
    let slot = w.slot(&id)?;
    let paths = w.probe.paths;
    let vmctl = format!("{}.sock", slot.slot);
    let sockets = [
        ("host", paths.socket("host", "host")),
        ("warden", paths.socket("warden", "warden")),
        ("vmctl", paths.run().join("vmctl").join(vmctl)),
    ];
    for (name, socket) in &sockets {
        ensure!(socket.exists(), "{} is not there", socket.display());
        for op in LOOKS_INSIDE {
            for body in [
                json!({ "op": op }),
                json!({ "op": op, "slot": slot.slot, "workspace": id, "address": 0, "bytes": 4096 }),
            ] {
                let wait = std::time::Duration::from_secs(10);
                let answer: api::Result<serde_json::Value> =
                    api::rpc::blocking::call(socket, "verify", &body, wait);
                ensure!(answer.is_err(), "{name} answers {op}");
            }
        }
    }
    // What the kernel shows of the VMM to the users that the host side runs as.
    let users = ["host", "control", "edge", "kms", "mint", "audit-read"];
    let mut refused = 0;
    for user in users {
        for (program, file) in [
            ("head", format!("/proc/{}/mem", slot.vmm_pid)),
            ("ls", format!("/proc/{}/root/", slot.vmm_pid)),
            ("ls", format!("/proc/{}/fd/", slot.vmm_pid)),
            ("ls", format!("/proc/{}/map_files/", slot.vmm_pid)),
            ("head", paths.state("volumes").display().to_string()),
        ] {
            let out = std::process::Command::new("setpriv")
                .args(["--reuid", &format!("casemate-{user}")])
                .args(["--regid", &format!("casemate-{user}")])
                .args(["--clear-groups", "--", program, &file])
                .output()
                .context("run setpriv (util-linux)")?;
            let said = String::from_utf8_lossy(&out.stderr);
            ensure!(
                !out.status.success() && said.contains("ermission denied"),
                "casemate-{user} may read {file}: {}",
                said.trim()
            );
            refused += 1;
        }
    }
    Finding::pass(format!(
        "host, warden and vmctl refuse {} requests that look inside; {refused} reads of the VMM's memory, root, descriptors and disks by {} are refused by the kernel",
        LOOKS_INSIDE.len(),
        users.map(|u| format!("casemate-{u}")).join(", ")
    ))
}

/// Frames with addresses that are not the workspace's own, as its root would send them.
const SPOOF: &str = r"
import socket, struct, sys
own_ip, own_mac, gateway, victim, victim_mac, port = sys.argv[1:]
own, other = (bytes.fromhex(m.replace(':', '')) for m in (own_mac, victim_mac))
router = bytes([2, 0]) + socket.inet_aton(gateway)
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind(('eth0', 0))
def sum16(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def packet(source, to):
    body = struct.pack('!HHHH', 40000, int(port), 16, 0) + b'casemate'
    head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 36, 1, 0x4000, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(to))
    return head[:10] + struct.pack('!H', sum16(head)) + head[12:] + body
sent = 0
def send(to, mac, kind, payload):
    global sent
    raw.send((to + mac + struct.pack('!H', kind) + payload).ljust(60, b'\0'))
    sent += 1
for _ in range(8):
    for to in (gateway, victim):
        send(router, own, 0x0800, packet(victim, to))
        send(router, own, 0x0800, packet('192.0.2.1', to))
        send(router, other, 0x0800, packet(own_ip, to))
counted = sent
everyone = b'\xff' * 6
for op in (1, 2):
    for mac, ip in ((own, gateway), (own, victim), (other, victim), (other, own_ip)):
        send(everyone, mac, 0x0806, struct.pack('!HHBBH', 1, 0x0800, 6, 4, op) + mac + socket.inet_aton(ip) + router + socket.inet_aton(gateway))
link = socket.inet_pton(socket.AF_INET6, 'fe80::1')
every = socket.inet_pton(socket.AF_INET6, 'ff02::1')
for kind in (134, 136, 135):
    body = bytes([kind, 0, 0, 0, 0xe0, 0, 0, 0]) + link + b'\2\1' + own
    pseudo = link + every + struct.pack('!II', len(body), 58) + body
    body = body[:2] + struct.pack('!H', sum16(pseudo)) + body[4:]
    send(bytes.fromhex('333300000001'), own, 0x86dd, struct.pack('!IHBB', 6 << 28, len(body), 58, 255) + link + every + body)
print(counted, sent)
";

pub(super) async fn iso_7(w: &mut World<'_>) -> anyhow::Result<Finding> {
    const PORT: &str = "5300";
    let a = w.shared().await?;
    let b = w.make(json!({})).await?;
    w.public(&a, true).await?;
    let (from, to) = (w.slot(&a)?, w.slot(&b)?);
    // Pooled VMs come and go meanwhile: those of these two taps.
    let taps = [from.slot, to.slot].map(|slot| format!("cm{slot}"));
    let neighbours = || -> anyhow::Result<BTreeSet<String>> {
        let table = w.in_fabric(&["cat", "/proc/net/arp"])?;
        let ours = |line: &&str| {
            let device = line.split_whitespace().last();
            device.is_some_and(|d| taps.iter().any(|t| t == d))
        };
        Ok(table.lines().filter(ours).map(str::to_owned).collect())
    };
    let listener = w.listen(PORT)?;
    let arp_before = neighbours()?;
    let before = (w.probe.counters(from.slot)?, w.probe.counters(to.slot)?);
    let sent = w
        .inside(
            &a,
            &[
                "python3",
                "-c",
                SPOOF,
                &from.net.ip,
                &from.net.mac,
                &from.net.gateway,
                &to.net.ip,
                &to.net.mac,
                PORT,
            ],
        )
        .await?;
    let after = (w.probe.counters(from.slot)?, w.probe.counters(to.slot)?);
    let arp_after = neighbours()?;
    let delivered = listener.count()?;
    w.public(&a, false).await?;
    w.delete(&b).await?;
    let (counted, all) = sent
        .trim()
        .split_once(' ')
        .context("unexpected output of the sender")?;
    let counted: u64 = counted.parse()?;
    ensure!(
        delivered == 0,
        "{delivered} spoofed datagrams were delivered on the host's side"
    );
    ensure!(
        arp_before == arp_after,
        "the neighbours changed from {arp_before:?} to {arp_after:?}"
    );
    let reached = after.1.in_packets - before.1.in_packets;
    ensure!(
        reached == 0,
        "{reached} packets reached the other workspace"
    );
    let dropped = after.0.out_dropped_packets - before.0.out_dropped_packets;
    ensure!(
        dropped >= counted,
        "of {counted} spoofed packets {dropped} were counted as dropped"
    );
    Finding::pass(format!(
        "{all} frames with another's IP, MAC, ARP and ND: {dropped} IP packets dropped, 0 delivered, 0 reached the other workspace, neighbours unchanged"
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
