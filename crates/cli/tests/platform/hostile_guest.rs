//! A workspace whose root is hostile: what it sends has no effect outside of it.
//!
//! The attacks run inside a real VM (`hostile_guest/frames.py`). What is looked at is outside: what
//! the kernel delivers in the network namespace of the taps, its neighbours, addresses and
//! ruleset, what reaches another workspace, the platform's processes.

use crate::world::{Account, Platform};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, ipproto};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

const FRAMES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/platform/hostile_guest/frames.py"
);
/// The agent's port for the edge: the one path that is open while these tests run.
const AGENT_PORT: u16 = model::limits::PORT_AGENT_TLS;

#[test]
fn no_frame_of_a_hostile_guest_has_an_effect() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let account = p.account("frames");
    let attacker = Guest::make(&p, &account, &["--public-access"]);
    let victim = Guest::make(&p, &account, &[]);
    attacker.copy_in(FRAMES);
    let names = attacker.frames("names", &attacker, &victim);
    let names: Vec<&str> = names.split_whitespace().collect();
    assert!(names.len() >= 20, "only {} attacks", names.len());

    let watch = Watch::new(&p, attacker.ip);
    let mut failures = Vec::new();
    println!(
        "{:28} {:>7} {:>8}  effects outside",
        "attack", "sent", "dropped"
    );
    for name in &names {
        let before = Outside::of(&p, &watch, [&attacker, &victim]);
        let dropped = attacker.counters(&p).out_dropped_packets;
        let said = attacker.frames(name, &attacker, &victim);
        let sent = said
            .rsplit_once("sent ")
            .and_then(|(_, n)| n.trim().parse::<u64>().ok())
            .unwrap_or(0);
        assert!(sent > 0, "{name} sent nothing: {said}");
        let mut effects = before.changes(&Outside::of(&p, &watch, [&attacker, &victim]));
        if said.contains("connected") {
            effects.push(said.clone());
        }
        let dropped = attacker.counters(&p).out_dropped_packets - dropped;
        println!("{name:28} {sent:>7} {dropped:>8}  {}", effects.len());
        failures.extend(effects.into_iter().map(|e| format!("{name}: {e}")));
    }
    assert_eq!(failures, Vec::<String>::new());
    p.expect_ok(
        "the victim answers",
        &victim.opened().exec(&["true"], &p, &account),
    );

    // The watch sees: without the ruleset the same frames are delivered.
    for family in ["inet", "arp"] {
        in_fabric(&p, &["nft", "delete", "table", family, "casemate"]);
    }
    attacker.send_only("host_addresses", &attacker, &victim);
    let seen = watch.look().delivered;
    assert!(!seen.is_empty(), "the watch is blind");
}

/// One workspace of these tests.
pub(crate) struct Guest<'a> {
    pub(crate) id: String,
    pub(crate) slot: u16,
    ip: std::net::Ipv4Addr,
    mac: String,
    gateway: String,
    p: &'a Platform,
    account: &'a Account,
}

impl<'a> Guest<'a> {
    pub(crate) fn make(p: &'a Platform, account: &'a Account, args: &[&str]) -> Self {
        let mut all = vec!["--json", "ws", "create"];
        all.extend(args);
        let out = p.as_user(account, &all);
        p.expect_ok("create", &out);
        let w: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        let id = w["id"].as_str().unwrap().to_owned();
        let slot = p
            .slots()
            .into_iter()
            .find(|s| s["workspace"] == id.as_str())
            .unwrap();
        let net = |key: &str| slot["net"][key].as_str().unwrap().to_owned();
        Self {
            id,
            slot: u16::try_from(slot["slot"].as_u64().unwrap()).unwrap(),
            ip: net("ip").parse().unwrap(),
            mac: net("mac"),
            gateway: net("gateway"),
            p,
            account,
        }
    }

    fn opened(&self) -> &Self {
        let on = self
            .p
            .as_user(self.account, &["ws", "access", &self.id, "on"]);
        self.p.expect_ok("open", &on);
        self
    }

    pub(crate) fn copy_in(&self, file: &str) {
        let name = file.rsplit('/').next().unwrap();
        let to = format!("{}:/root/{name}", self.id);
        self.p.expect_ok(
            "cp",
            &self.p.as_user(self.account, &["ws", "cp", file, &to]),
        );
    }

    pub(crate) fn exec(
        &self,
        command: &[&str],
        p: &Platform,
        account: &Account,
    ) -> std::process::Output {
        let mut args = vec!["ws", "exec", &self.id, "--"];
        args.extend(command);
        p.as_user(account, &args)
    }

    /// What a command that must go well says.
    pub(crate) fn run(&self, command: &[&str]) -> String {
        let out = self.exec(command, self.p, self.account);
        self.p.expect_ok(&format!("{command:?}"), &out);
        String::from_utf8(out.stdout).unwrap()
    }

    fn frames(&self, name: &str, own: &Guest<'_>, victim: &Guest<'_>) -> String {
        let out = self.attack(name, own, victim);
        self.p.expect_ok(name, &out);
        String::from_utf8(out.stdout).unwrap()
    }

    /// The same where the answer may be lost with the firewall.
    fn send_only(&self, name: &str, own: &Guest<'_>, victim: &Guest<'_>) {
        let _ = self.attack(name, own, victim);
    }

    fn attack(&self, name: &str, own: &Guest<'_>, victim: &Guest<'_>) -> std::process::Output {
        let (own_ip, victim_ip) = (own.ip.to_string(), victim.ip.to_string());
        self.exec(
            &[
                "python3",
                "/root/frames.py",
                name,
                &own_ip,
                &own.mac,
                &own.gateway,
                &victim_ip,
                &victim.mac,
            ],
            self.p,
            self.account,
        )
    }

    pub(crate) fn counters(&self, p: &Platform) -> api::warden::Counters {
        counters(p, self.slot).unwrap()
    }
}

/// The kernel's accounts of a slot.
pub(crate) fn counters(p: &Platform, slot: u16) -> api::Result<api::warden::Counters> {
    let socket = p.root().join("run/casemate/warden/warden.sock");
    let op = api::warden::Op::Counters { slot };
    api::rpc::blocking::call(&socket, "test", &op, Duration::from_secs(10))
}

pub(crate) fn daemons(p: &Platform) -> BTreeMap<&'static str, u64> {
    let names = [
        "audit-append",
        "audit-integrate",
        "kms",
        "mint",
        "warden",
        "host",
        "control",
        "edge",
    ];
    names
        .into_iter()
        .map(|n| (n, p.daemon_pid(n).unwrap()))
        .collect()
}

pub(crate) fn in_fabric(p: &Platform, command: &[&str]) -> String {
    let out = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", p.fabric()))
        .arg("--")
        .args(command)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

/// All that a frame could change.
#[derive(Debug)]
struct Outside {
    delivered: Vec<String>,
    neighbours: BTreeSet<String>,
    routes: BTreeSet<String>,
    rules: BTreeSet<String>,
    to_victim: u64,
    daemons: BTreeMap<&'static str, u64>,
}

impl Outside {
    fn of(p: &Platform, watch: &Watch, [attacker, victim]: [&Guest<'_>; 2]) -> Self {
        let seen = watch.look();
        let taps = [attacker, victim].map(|g| format!("cm{}", g.slot));
        // Pooled VMs come and go meanwhile.
        let ours = |text: &str, split: &[char]| -> BTreeSet<String> {
            text.split(split)
                .map(|item| item.trim().to_owned())
                .filter(|item| {
                    let mut words = item.split(|c: char| !c.is_ascii_alphanumeric());
                    words.all(|w| {
                        let number = w.strip_prefix("cm").and_then(|n| n.parse::<u16>().ok());
                        number.is_none() || taps.iter().any(|t| t == w)
                    })
                })
                .collect()
        };
        Self {
            delivered: seen.delivered,
            neighbours: ours(&seen.neighbours, &['\n']),
            routes: ours(&seen.routes, &['\n']),
            rules: ours(
                &in_fabric(p, &["nft", "-s", "list", "ruleset"]),
                &['\n', ',', '{', '}'],
            ),
            to_victim: victim.counters(p).in_packets,
            daemons: daemons(p),
        }
    }

    /// One line for each difference; what was delivered is new by itself.
    fn changes(&self, after: &Self) -> Vec<String> {
        let mut all: Vec<String> = after
            .delivered
            .iter()
            .take(8)
            .map(|d| format!("delivered {d}"))
            .collect();
        for (what, a, b) in [
            ("neighbours", &self.neighbours, &after.neighbours),
            ("routes", &self.routes, &after.routes),
            ("rules", &self.rules, &after.rules),
        ] {
            if a != b {
                let changed: Vec<_> = a.symmetric_difference(b).collect();
                all.push(format!("{what} changed: {changed:?}"));
            }
        }
        if self.to_victim != after.to_victim {
            let packets = after.to_victim - self.to_victim;
            all.push(format!("{packets} packets reached the victim's tap"));
        }
        if self.daemons != after.daemons {
            all.push(format!("processes: {:?} {:?}", self.daemons, after.daemons));
        }
        all
    }
}

#[derive(Debug)]
struct Seen {
    delivered: Vec<String>,
    neighbours: String,
    routes: String,
}

/// A thread in the network namespace of the taps, with raw sockets: they get what passed the
/// firewall's input, whether somebody listens or not.
struct Watch {
    ask: mpsc::Sender<mpsc::Sender<Seen>>,
}

impl Watch {
    fn new(p: &Platform, attacker: std::net::Ipv4Addr) -> Self {
        let (ask, asked) = mpsc::channel::<mpsc::Sender<Seen>>();
        let netns = std::fs::File::open(format!("/run/netns/{}", p.fabric())).unwrap();
        std::thread::spawn(move || {
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), kind)
                .unwrap();
            let raw = |protocol: Protocol| {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                rustix::net::socket_with(
                    AddressFamily::INET,
                    SocketType::RAW,
                    flags,
                    Some(protocol),
                )
                .unwrap()
            };
            let sockets = [
                raw(ipproto::TCP),
                raw(ipproto::UDP),
                raw(ipproto::ICMP),
                raw(ipproto::IGMP),
                raw(ipproto::SCTP),
            ];
            while let Ok(reply) = asked.recv() {
                let read = |name: &str| {
                    std::fs::read_to_string(format!("/proc/thread-self/net/{name}"))
                        .unwrap_or_default()
                };
                let seen = Seen {
                    delivered: sockets.iter().flat_map(|s| drain(s, attacker)).collect(),
                    neighbours: read("arp"),
                    routes: read("if_inet6") + &read("route"),
                };
                let _ = reply.send(seen);
            }
        });
        Self { ask }
    }

    fn look(&self) -> Seen {
        let (reply, answer) = mpsc::channel();
        self.ask.send(reply).unwrap();
        answer.recv().unwrap()
    }
}

/// What a raw socket holds, but for answers of the attacker's own agent to the edge.
fn drain(socket: &OwnedFd, attacker: std::net::Ipv4Addr) -> Vec<String> {
    let mut all = Vec::new();
    let mut buffer = [0u8; 2048];
    while let Ok((_, n)) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
        let packet = &buffer[..n.min(2048)];
        let (Some(head), Some(words)) = (packet.get(..20), packet.first().map(|b| b & 15)) else {
            continue;
        };
        let from = std::net::Ipv4Addr::new(head[12], head[13], head[14], head[15]);
        let to = std::net::Ipv4Addr::new(head[16], head[17], head[18], head[19]);
        let at = usize::from(words) * 4;
        let port = packet
            .get(at..at + 2)
            .map_or(0, |p| u16::from_be_bytes([p[0], p[1]]));
        if head[9] == 6 && from == attacker && port == AGENT_PORT {
            continue;
        }
        all.push(format!("protocol {} from {from}:{port} to {to}", head[9]));
    }
    all
}
