//! A workspace whose root has put itself in the agent's place. Whatever it answers, its callers get
//! an error or what HTTP says that it is, within a bound; the edge is none the larger, others are
//! answered meanwhile, nothing of one connection reaches another, and the owner can do as ever.
//!
//! The answers come from inside a real VM (`hostile_guest/agent.py`), under the workspace's real
//! identity: root owns its guest, so it has the key. Must never take the hostile side's word for
//! what came of a row.

mod caller;

use crate::hostile_bombs::pss_bytes;
use crate::hostile_guest::{Guest, daemons};
use crate::world::{Account, Platform};
use api::agent::{IdentityBlock, tls_name};
use base64::Engine as _;
use caller::Want::{self, Cut, Endless, Long, Refused, Whole};
use caller::{Answer, Caller, WITHIN};
use seal::sign::SigningKey;
use seal::tls::Identity;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::process::Output;
use std::time::{Duration, Instant};

const AGENT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/platform/hostile_guest/agent.py"
);
/// What the hostile agent says where it is asked for nothing.
const PLAIN: &str = r#"{"success":true,"by":"the replaced agent"}"#;
/// What a real one says of its health.
const HEALTHY: Want = Whole(200, r#"{"status":"ok","success":true}"#);
/// What the edge may grow by meanwhile, bytes: buffers of a few connections.
const GROWTH_MAX_BYTES: u64 = 16 << 20;
/// Its open files: connections to both workspaces that wait for the next request.
const FILES_MAX: usize = 8;
/// Within this what waits so is closed.
const IDLE_WITHIN: Duration = Duration::from_secs(15);
/// What comes while a connection waits for its next request, and when it has come.
const LATE: &str = "a second answer later";
const LATE_BY: Duration = Duration::from_millis(500);

/// How a connection is met.
const ARMS: &[&str] = &[
    "no TLS",
    "no records",
    "silence",
    "a hang-up",
    "change_cipher_spec without end",
    "a record of 64 KiB",
    "another's certificate",
    "TLS 1.2",
    "plain text after the handshake",
    "a hello request after the handshake",
    "half-closed without a farewell",
    "a farewell in the head",
];

const SHORT: Want = Whole(200, "short");

/// What a request is answered with.
const ROWS: &[(&str, Want)] = &[
    ("garbage before the head", Refused),
    ("no status line", Refused),
    ("a status that is none", Refused),
    ("a status below 100", Refused),
    ("HTTP/2.0 in the status line", Refused),
    ("the preface of HTTP/2", Refused),
    ("half a head", Refused),
    ("a head of 101 lines", Refused),
    ("a head of 40 KiB", Refused),
    ("two lengths", Refused),
    ("a list of lengths", Refused),
    ("a negative length", Refused),
    ("a length above 64 bits", Refused),
    ("a blank before the colon", Refused),
    ("a CR in a value", Refused),
    ("a NUL in a value", Refused),
    ("a folded line", Refused),
    ("a line without a colon", Refused),
    ("another protocol", Refused),
    ("a body that is too short", Cut),
    ("a chunk of no size", Cut),
    ("a chunk above 64 bits", Cut),
    ("a chunk that is too long", Cut),
    ("chunks without an end", Cut),
    ("length and chunks", SHORT),
    ("chunks and length", SHORT),
    ("chunks twice", SHORT),
    ("informational answers first", SHORT),
    ("the platform's headers", SHORT),
    // 32 MiB, were it unpacked.
    ("a gzip bomb", Long(1..256 << 10)),
    ("JSON nested without end", Long(100_000..100_001)),
    (
        "an error for a terminal",
        Whole(
            500,
            r#"{"success":false,"code":"x","message":"\u001b[2J\u0007\r a lie"}"#,
        ),
    ),
    ("a body that is too long", SHORT),
    ("a second answer at once", SHORT),
    ("no content, with content", Whole(204, "")),
    ("an early end of chunks", SHORT),
    ("a head without end", Refused),
    ("a line without end", Refused),
    ("a status line without end", Refused),
    ("blank lines without end", Refused),
    ("informational answers without end", Refused),
    ("a chunk's extension without end", Cut),
    ("trailers without end", Cut),
    ("a body without end", Endless(4 << 20)),
    ("a body of 2^64 bytes", Endless(4 << 20)),
    ("a chunk of 2^64 bytes", Endless(4 << 20)),
    (LATE, SHORT),
    ("a reset in the head", Refused),
    ("a reset in the body", Cut),
];

/// The same of rows that take their time: all at once.
const SLOW: &[(&str, Want)] = &[
    ("a head, slowly", Refused),
    ("informational answers, slowly", Refused),
    ("a body, slowly", Endless(12)),
];

/// Of these, what the command-line client is answered with, and its exit code.
const API: &[(&str, i32)] = &[
    ("garbage before the head", 3),
    ("informational answers without end", 3),
    ("a body that is too short", 1),
    ("a chunk above 64 bits", 1),
    ("no content, with content", 1),
    ("JSON nested without end", 1),
    ("an error for a terminal", 1),
];

/// What vmctl is told unasked.
const CHANNEL: &[&str] = &[
    "messages out of turn",
    "what is no message",
    "nesting without end",
    "numbers that are none",
    "archives of nobody",
    "a line of 4 MiB",
    "a flood",
];

/// What it is told in the middle of an archive, and the exit code of who asked for it.
const ARCHIVES: &[(&str, i32)] = &[
    ("pieces of another archive", 3),
    ("a piece that is none", 3),
    ("a piece that is too large", 3),
    ("a failure for a terminal", 3),
    ("nesting before a failure", 3),
    // They are the guest's word, and of no use to anybody else.
    ("numbers beyond all", 0),
];

/// The same of a wake.
const WAKES: &[(&str, i32)] = &[("it could not", 3), ("up, for a terminal", 0)];

#[test]
fn a_replaced_agent_harms_its_own_callers_only() {
    let p = Platform::start("[host]\npool_size = 1\n", None);
    let (account, other) = (p.account("replaced"), p.account("victim"));
    let attacker = Guest::make(&p, &account, &["--public-access"]);
    let victim = Guest::make(&p, &other, &["--public-access"]);
    keys(&attacker);
    let names = attacker.run(&["python3", "/root/agent.py", "names"]);
    let here: [BTreeSet<&str>; 4] = [
        ARMS.iter().copied().collect(),
        ROWS.iter().chain(SLOW).map(|r| r.0).collect(),
        CHANNEL.iter().copied().collect(),
        ARCHIVES.iter().chain(WAKES).map(|r| r.0).collect(),
    ];
    let there: Vec<BTreeSet<&str>> = names.lines().map(|l| l.split('|').collect()).collect();
    assert_eq!(there, here);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let world = World {
        caller: Caller::new(&p, &runtime, &account, &attacker),
        victim: Caller::new(&p, &runtime, &other, &victim),
        daemons: daemons(&p),
        attacker: &attacker,
        account: &account,
        runtime,
        faults: RefCell::default(),
        p: &p,
    };
    world.replace();
    world.caller("/plain").is("before", &Whole(200, PLAIN));
    let before = world.edge();

    println!(
        "{:36} {:>5} {:>9} {:>6}  its caller",
        "row", "ms", "edge KiB", "calls"
    );
    for name in ARMS {
        assert_eq!(world.caller(&path("arm", name)).body, PLAIN.as_bytes());
        world.rows(&[(name, Refused)], |_| "/plain".into());
    }
    for row in ROWS {
        world.rows(std::slice::from_ref(row), |name| path("row", name));
    }
    world.rows(SLOW, |name| path("row", name));
    assert_eq!(*world.faults.borrow(), Vec::<String>::new());
    world.command_line();
    let until = Instant::now() + IDLE_WITHIN;
    while world.edge().files > before.files && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
    }
    let after = world.edge();
    assert!(
        after.files <= before.files,
        "{} files of the edge are left",
        after.files
    );
    assert!(after.memory_bytes < before.memory_bytes + GROWTH_MAX_BYTES);

    world.archives();
    world.channel();
    world.again();
    world.wakes();
    let id = &attacker.id;
    world.owner(&["ws", "rm", id]);
    assert!(!p.workspaces_on_host().contains(id));
    assert_eq!(daemons(&p), world.daemons);
}

/// The keys of the attacker's identity, which its root can read, and of another.
fn keys(attacker: &Guest<'_>) {
    attacker.copy_in(AGENT);
    let block = attacker.run(&["python3", "/root/agent.py", "identity"]);
    let block: IdentityBlock = serde_json::from_str(&block).unwrap();
    let mut seed = [0; 32];
    hex::decode_to_slice(&block.identity_seed, &mut seed).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (whose, identity) in [
        ("own", Identity::from_seed(&seed)),
        ("other", Identity::new(SigningKey::generate())),
    ] {
        let name = tls_name(&block.workspace);
        let (chain, key) = identity.leaf(&name, Duration::from_secs(3600)).unwrap();
        let pem = pem("CERTIFICATE", &chain[0]) + &pem("PRIVATE KEY", key.secret_der());
        let file = dir.path().join(format!("{whose}.pem"));
        std::fs::write(&file, pem).unwrap();
        attacker.copy_in(file.to_str().unwrap());
    }
    // It is needed again after a stop that is none of the guest's doing.
    attacker.run(&["sync"]);
}

fn pem(what: &str, der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN {what}-----\n{text}\n-----END {what}-----\n")
}

/// Percent signs for all that is no letter or digit.
fn path(verb: &str, name: &str) -> String {
    let mut path = format!("/{verb}/");
    for b in name.bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => path.push(b.into()),
            _ => path += &format!("%{b:02X}"),
        }
    }
    path
}

struct World<'a> {
    p: &'a Platform,
    runtime: tokio::runtime::Runtime,
    account: &'a Account,
    attacker: &'a Guest<'a>,
    /// Of the attacker's workspace: each call is another client's.
    caller: Caller,
    victim: Caller,
    daemons: std::collections::BTreeMap<&'static str, u64>,
    /// Rows that were not as they should be.
    faults: RefCell<Vec<String>>,
}

/// What the edge holds.
struct Edge {
    files: usize,
    memory_bytes: u64,
}

impl World<'_> {
    /// Puts the hostile program in the agent's place.
    fn replace(&self) {
        let line = "setsid python3 /root/agent.py replace /root </dev/null >/root/log 2>&1 &";
        self.attacker.run(&["sh", "-c", line]);
        let until = Instant::now() + WITHIN;
        while self.caller("/plain").body != PLAIN.as_bytes() {
            if Instant::now() > until {
                panic!(
                    "the agent is there: {}",
                    self.attacker.run(&["cat", "/root/log"])
                );
            }
        }
    }

    fn caller(&self, path: &str) -> Answer {
        self.runtime.block_on(self.caller.get(path, usize::MAX))
    }

    fn edge(&self) -> Edge {
        let pid = self.daemons["edge"];
        Edge {
            files: std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count(),
            memory_bytes: pss_bytes(pid),
        }
    }

    /// Rows at once: what their callers get, what the edge comes to, what the victim's callers get
    /// meanwhile, and the attacker's next ones.
    fn rows(&self, rows: &[(&str, Want)], path: impl Fn(&str) -> String) {
        let (pid, before) = (self.daemons["edge"], self.edge());
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        let held = peak_bytes(pid);
        let began = Instant::now();
        let (answers, calls, mut faults) = self.runtime.block_on(async {
            let answers = rows.iter().map(|(name, want)| {
                let leave = match want {
                    Endless(bytes) => *bytes,
                    _ => usize::MAX,
                };
                let path = path(name);
                async move { (self.caller.get(&path, leave).await, began.elapsed()) }
            });
            let answers = futures_util::future::join_all(answers);
            tokio::pin!(answers);
            let (mut calls, mut faults) = (0, Vec::new());
            loop {
                tokio::select! {
                    answers = &mut answers => break (answers, calls, faults),
                    other = self.victim.get("/health", usize::MAX) => {
                        faults.extend(other.fault(&HEALTHY));
                        calls += 1;
                    }
                }
            }
        });
        let grown = peak_bytes(pid).saturating_sub(held);
        for ((name, want), (answer, took)) in rows.iter().zip(&answers) {
            let (ms, kib) = (took.as_millis(), grown >> 10);
            let (status, end) = (answer.status, &answer.end);
            println!("{name:36} {ms:>5} {kib:>9} {calls:>6}  {status} {end:?}");
            faults.extend(answer.fault(want));
        }
        let name = rows[0].0;
        if name == LATE {
            std::thread::sleep(LATE_BY);
        }
        // The next callers, at once: of the other workspace, and of this one.
        let victim = self.victim.get("/health", usize::MAX);
        faults.extend(self.runtime.block_on(victim).fault(&HEALTHY));
        for _ in 0..3 {
            faults.extend(self.caller("/plain").fault(&Whole(200, PLAIN)));
        }
        if grown > GROWTH_MAX_BYTES {
            faults.push(format!("the edge grew by {grown} bytes"));
        }
        let files = self.edge().files;
        if files > before.files + FILES_MAX {
            faults.push(format!("the edge holds {files} files"));
        }
        let named = faults.into_iter().map(|f| format!("{name}: {f}"));
        self.faults.borrow_mut().extend(named);
    }

    /// What `casemate` makes of some of them.
    fn command_line(&self) {
        let id = &self.attacker.id;
        let to = tempfile::tempdir().unwrap();
        let (from, to) = (format!("{id}:/etc/hostname"), to.path().join("x"));
        let copy = ["ws", "cp", &from, to.to_str().unwrap()];
        for (name, code) in API {
            self.tell("api", name);
            for args in [&["ws", "exec", id, "--", "true"][..], &copy] {
                self.ends(name, args, *code);
            }
        }
    }

    /// A command of the owner's that ends in time, with this code and words fit for a terminal.
    fn ends(&self, name: &str, args: &[&str], code: i32) {
        let began = Instant::now();
        let out = self.p.as_user(self.account, args);
        let said = String::from_utf8(out.stderr.clone()).unwrap();
        println!(
            "{name:36} {:>5}  {}: {}",
            began.elapsed().as_millis(),
            args[1],
            said.trim()
        );
        assert_eq!(out.status.code(), Some(code), "{name}: {args:?}: {said}");
        assert_eq!(said.is_empty(), code == 0, "{name}: {args:?} says {said}");
        let fit = |c: char| c == '\n' || !c.is_control();
        assert!(said.chars().all(fit), "{name}: {said:?}");
        assert!(began.elapsed() < WITHIN, "{name}: {args:?}");
    }

    /// What the owner asks for, and must get.
    fn owner(&self, args: &[&str]) -> Output {
        let out = self.p.as_user(self.account, args);
        self.p.expect_ok(&args.join(" "), &out);
        out
    }

    /// Has the hostile agent do so; a call of its own that goes well.
    fn tell(&self, verb: &str, name: &str) {
        self.caller(&path(verb, name)).is(name, &Whole(200, PLAIN));
    }

    fn archives(&self) {
        let id = &self.attacker.id;
        for (name, code) in ARCHIVES {
            self.tell("reply", name);
            let create = ["ws", "archive", "create", id, "--path", "/etc/hostname"];
            self.ends(name, &create, *code);
            self.holds(name);
        }
        // What was made of it is listed and deleted like any.
        self.owner(&["ws", "archive", "ls", id]);
        self.owner(&["ws", "archive", "rm", id, "--all"]);
    }

    fn channel(&self) {
        for name in CHANNEL {
            self.tell("channel", name);
            self.holds(name);
        }
    }

    /// The hostile program sleeps with its workspace, and is the one that is woken.
    fn wakes(&self) {
        let id = &self.attacker.id;
        for (name, code) in WAKES {
            self.replace();
            self.tell("reply", name);
            self.owner(&["ws", "sleep", id]);
            self.ends(name, &["ws", "wake", id], *code);
            if *code == 0 {
                self.holds(name);
            }
            self.again();
        }
    }

    /// Its owner starts it anew, from its disk: with the real agent.
    fn again(&self) {
        for act in ["stop", "start"] {
            self.owner(&["ws", act, &self.attacker.id]);
        }
        self.attacker.run(&["true"]);
    }

    /// The workspace runs, and nothing of the platform ended or grew.
    fn holds(&self, name: &str) {
        let shown = self.owner(&["--json", "ws", "show", &self.attacker.id]);
        let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!(shown["status"], "running", "{name}");
        let slots = self.p.slots();
        let slot = slots
            .iter()
            .find(|s| s["workspace"] == self.attacker.id.as_str());
        let vmctl = pss_bytes(slot.unwrap()["vmctl_pid"].as_u64().unwrap());
        assert!(
            vmctl < GROWTH_MAX_BYTES,
            "{name}: vmctl holds {vmctl} bytes"
        );
        assert_eq!(daemons(self.p), self.daemons, "{name}");
        println!(
            "{name:36}  the workspace runs, vmctl holds {} KiB",
            vmctl >> 10
        );
    }
}

/// Most that a process held since that was last asked for.
fn peak_bytes(pid: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let kib = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    kib << 10
}
