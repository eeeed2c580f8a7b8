//! The three real processes under users of their own: `kill -9` while callers append, and what each
//! user can and can't do. Needs root; uids without accounts, from a range that nothing else uses.
#![allow(clippy::unwrap_used)]

use api::audit::{Appended, Class, DayKey, Entry, Op, Phase};
use api::rpc::blocking::call;
use seal::hpke::SecretKey;
use seal::sign::VerifyingKey;
use serde_json::{Value, json};
use service::paths::Paths;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tlog::receipt::Receipt;

const EXE: &str = env!("CARGO_BIN_EXE_casemate-audit");
const WAIT: Duration = Duration::from_secs(20);
const LOG_GID: u32 = 964_100;
/// Process, uid, member of the log's group.
const USERS: &[(&str, u32, bool)] = &[
    ("audit-append", 964_101, true),
    ("audit-integrate", 964_102, true),
    ("audit-read", 964_103, true),
    ("kms", 964_104, false),
    ("control", 964_105, false),
];
const STRANGER: u32 = 964_109;

struct World {
    root: tempfile::TempDir,
    paths: Paths,
    exe: PathBuf,
    running: Vec<(&'static str, Child)>,
    key: VerifyingKey,
}

impl Drop for World {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl World {
    /// Directories and keys as `casemate up` makes them.
    fn new() -> World {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(root.path(), 0o755);
        // Where the executable was built, other users may not go.
        let exe = root.path().join("casemate-audit");
        std::fs::copy(EXE, &exe).unwrap();
        mode(&exe, 0o755);
        let paths = Paths::new(root.path());
        std::fs::create_dir_all(paths.trust()).unwrap();
        for (process, uid, member) in USERS {
            let gid = if *member { LOG_GID } else { *uid };
            let (run, state) = (paths.run().join(process), paths.state(process));
            for dir in [&run, &state] {
                std::fs::create_dir_all(dir).unwrap();
                chown(dir, Some(*uid), Some(gid)).unwrap();
            }
            mode(&run, 0o755);
            mode(&state, if *member { 0o2750 } else { 0o700 });
        }
        let uids: serde_json::Map<String, Value> = USERS
            .iter()
            .map(|(process, uid, _)| ((*process).to_owned(), (*uid).into()))
            .collect();
        std::fs::write(paths.uids(), serde_json::to_vec(&uids).unwrap()).unwrap();
        let mut w = World {
            root,
            paths,
            exe,
            running: Vec::new(),
            key: seal::sign::SigningKey::generate().public(),
        };
        w.init("audit-append");
        let printed = w.init("audit-integrate");
        let hex = printed["trust"]["audit.pub"].as_str().unwrap();
        w.key = VerifyingKey::from_hex(hex).unwrap();
        std::fs::write(w.paths.trust().join("audit.pub"), hex).unwrap();
        w
    }

    fn init(&self, process: &str) -> Value {
        let out = self.daemon(process).arg("init").output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        serde_json::from_slice(&out.stdout).unwrap()
    }

    fn daemon(&self, process: &str) -> Command {
        let mut c = as_user(process);
        c.arg(&self.exe)
            .arg(process.strip_prefix("audit-").unwrap())
            .arg("--root")
            .arg(self.root.path());
        c
    }

    fn start(&mut self, process: &'static str) {
        let child = self
            .daemon(process)
            .arg("run")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.running.push((process, child));
        let socket = self
            .paths
            .socket(process, process.strip_prefix("audit-").unwrap());
        let deadline = Instant::now() + WAIT;
        while UnixStream::connect(&socket).is_err() {
            let (_, child) = self.running.last_mut().unwrap();
            assert!(child.try_wait().unwrap().is_none(), "{process} ended");
            assert!(Instant::now() < deadline, "{process} does not answer");
            std::thread::yield_now();
        }
    }

    /// `setpriv` execs, so that the child is the daemon itself.
    fn kill(&mut self, process: &str) {
        let at = self
            .running
            .iter()
            .position(|(p, _)| *p == process)
            .unwrap();
        let (_, mut child) = self.running.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn terminate(&mut self, process: &str) -> std::process::ExitStatus {
        let at = self
            .running
            .iter()
            .position(|(p, _)| *p == process)
            .unwrap();
        let (_, mut child) = self.running.remove(at);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap()
    }

    fn start_with_keys(&mut self) {
        self.start("audit-integrate");
        self.start("audit-append");
        let today = tlog::leaf::day_of(service::clock::Clock::system().now_ms());
        let public = SecretKey::generate().public().to_hex();
        let keys = (today..today + 3)
            .flat_map(|day| {
                let public = public.clone();
                Class::ALL.map(|class| DayKey {
                    class,
                    day,
                    public: public.clone(),
                })
            })
            .collect();
        let answer = ask_as("kms", &self.append_socket(), &Op::DayKeys { keys });
        assert_eq!(answer, json!({ "ok": true }));
    }

    fn append_socket(&self) -> PathBuf {
        self.paths.socket("audit-append", "append")
    }

    fn verify(&self, class: tlog::class::Class) -> tlog::verify::Report {
        let expected = tlog::verify::Expected {
            origin: &class.origin("local").unwrap(),
            class,
            log_key: &self.key,
            witnesses: &[],
            witnesses_min: 0,
            known: &[],
        };
        let dir = self.paths.state("audit-integrate").join(class.name());
        tlog::verify::verify(&Directory(dir), &expected)
    }
}

/// A command as the user of a process.
fn as_user(process: &str) -> Command {
    let (_, uid, member) = USERS.iter().find(|(p, ..)| *p == process).unwrap();
    let mut c = as_uid(*uid);
    if *member {
        c.args(["--groups", &LOG_GID.to_string()]);
    } else {
        c.arg("--clear-groups");
    }
    c.args([
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
        "--",
    ]);
    c
}

fn as_uid(uid: u32) -> Command {
    let mut c = Command::new("setpriv");
    c.args(["--reuid", &uid.to_string(), "--regid", &uid.to_string()]);
    c
}

/// Asks a socket as the user of a process: this test, run again under that uid.
fn ask_as(process: &str, socket: &Path, op: &impl serde::Serialize) -> Value {
    let (_, uid, _) = USERS.iter().find(|(p, ..)| *p == process).unwrap();
    ask_as_uid(*uid, socket, op)
}

fn ask_as_uid(uid: u32, socket: &Path, op: &impl serde::Serialize) -> Value {
    // The test's executable may be where that user may not go.
    let dir = tempfile::tempdir().unwrap();
    let exe = dir.path().join("asker");
    std::fs::copy(std::env::current_exe().unwrap(), &exe).unwrap();
    for path in [dir.path(), &exe] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let out = as_uid(uid)
        .arg("--clear-groups")
        .arg("--")
        .arg(&exe)
        .args(["--exact", "asker", "--ignored", "--nocapture"])
        .env("ASK_SOCKET", socket)
        .env("ASK_OP", serde_json::to_string(op).unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let line = text
        .lines()
        .find_map(|l| l.split_once("ANSWER "))
        .unwrap_or_else(|| panic!("no answer: {text} {}", String::from_utf8_lossy(&out.stderr)));
    serde_json::from_str(line.1).unwrap()
}

#[test]
#[ignore = "the part of other tests that runs under another uid"]
fn asker() {
    let (Ok(socket), Ok(op)) = (std::env::var("ASK_SOCKET"), std::env::var("ASK_OP")) else {
        return;
    };
    let op: Value = serde_json::from_str(&op).unwrap();
    let answer = match call::<_, Value>(Path::new(&socket), "r", &op, WAIT) {
        Ok(value) => json!({ "ok": value }),
        Err(e) => json!({ "err": e.code.as_str() }),
    };
    println!("ANSWER {answer}");
}

fn op(event: &str, class: Class, want_receipt: bool) -> Op {
    let entry = Box::new(Entry {
        event: event.into(),
        phase: Phase::Fact,
        request_id: "r".into(),
        account: None,
        actor: "test".into(),
        subject: None,
        authority: None,
        lease: None,
        result: None,
        data: serde_json::Map::new(),
    });
    Op::Append {
        class,
        entry,
        want_receipt,
    }
}

#[test]
fn killed_while_callers_append_no_answered_entry_is_lost() {
    let mut w = World::new();
    w.start_with_keys();
    let socket = w.append_socket();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let count = std::sync::atomic::AtomicU64::new(0);
    let told = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|n| {
                let (socket, stop, count) = (&socket, &stop, &count);
                scope.spawn(move || {
                    let mut told = Vec::new();
                    for i in 0u64.. {
                        if stop.load(std::sync::atomic::Ordering::Relaxed) {
                            break;
                        }
                        let event = format!("e.{n}.{i}");
                        let op = op(&event, Class::Host, i % 3 == 0);
                        match call::<_, Appended>(socket, "r", &op, WAIT) {
                            Ok(done) => {
                                told.push((event, done));
                                count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            }
                            Err(_) => std::thread::yield_now(),
                        }
                    }
                    told
                })
            })
            .collect();
        for round in 0..12 {
            let before = count.load(std::sync::atomic::Ordering::Relaxed);
            let deadline = Instant::now() + WAIT;
            while count.load(std::sync::atomic::Ordering::Relaxed) < before + 10 + round {
                assert!(
                    Instant::now() < deadline,
                    "round {round}: nothing is appended"
                );
                std::thread::yield_now();
            }
            match round % 3 {
                0 => {
                    w.kill("audit-append");
                    w.start("audit-append");
                }
                1 => {
                    w.kill("audit-integrate");
                    w.start("audit-integrate");
                }
                _ => {
                    w.kill("audit-integrate");
                    w.kill("audit-append");
                    w.start("audit-integrate");
                    w.start("audit-append");
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        callers
            .into_iter()
            .flat_map(|c| c.join().unwrap())
            .collect::<Vec<_>>()
    });
    let last: Appended = call(&socket, "r", &op("last", Class::Host, true), WAIT).unwrap();
    assert!(told.len() >= 120);
    let report = w.verify(tlog::class::Class::Host);
    assert!(report.is_clean(), "{:?}", report.faults);
    assert!(report.entries > last.index);
    let mut indexes: Vec<u64> = told.iter().map(|(_, done)| done.index).collect();
    indexes.sort_unstable();
    indexes.dedup();
    assert_eq!(indexes.len(), told.len(), "no index was given twice");
    for (event, done) in &told {
        assert!(done.index < last.index, "{event}");
        let Some(receipt) = &done.receipt else {
            continue;
        };
        let receipt: Receipt = serde_json::from_value(receipt.clone()).unwrap();
        let verified = receipt.verify(&w.key, "casemate.local/local/host").unwrap();
        let text = String::from_utf8(verified.payload).unwrap();
        assert!(text.contains(&format!("\"{event}\"")), "{text}");
        // The log still holds that very leaf.
        assert_eq!(w.leaf_hash(done.index), verified.leaf_sha256, "{event}");
    }
    assert!(
        w.terminate("audit-append").success(),
        "SIGTERM drains and exits with 0"
    );
    assert!(w.terminate("audit-integrate").success());
}

impl World {
    fn leaf_hash(&self, index: u64) -> [u8; 32] {
        use tlog::tile::{Kind, Tile};
        use tlog::verify::LogReader as _;
        let dir = Directory(self.paths.state("audit-integrate").join("host"));
        let size = self.verify_size();
        let tile = Tile::at(Kind::Entries, index / 256, size).unwrap();
        let bytes = dir.read(&tile.path()).unwrap();
        let entries = tile.bundle_decode(&bytes).unwrap();
        seal::hash::sha256(entries[usize::try_from(index % 256).unwrap()])
    }

    fn verify_size(&self) -> u64 {
        let path = self.paths.state("audit-integrate").join("host/checkpoint");
        let bytes = std::fs::read(path).unwrap();
        let origin = "casemate.local/local/host";
        tlog::checkpoint::Checkpoint::open(&bytes, origin, &self.key, &[])
            .unwrap()
            .checkpoint
            .size
    }
}

#[test]
fn i6_each_user_can_do_its_part_and_nothing_else() {
    let mut w = World::new();
    w.start_with_keys();
    w.start("audit-read");
    let (append, read) = (w.append_socket(), w.paths.socket("audit-read", "read"));
    // The process's name is the kernel's word.
    let answer = ask_as("control", &append, &op("a.b", Class::Host, true));
    let receipt: Receipt = serde_json::from_value(answer["ok"]["receipt"].clone()).unwrap();
    let verified = receipt.verify(&w.key, "casemate.local/local/host").unwrap();
    let stamped: Value = serde_json::from_slice(&verified.payload).unwrap();
    assert_eq!(stamped["process"], "control");
    let refused = |answer: Value, code: &str| assert_eq!(answer, json!({ "err": code }));
    let key = Op::DayKeys { keys: vec![] };
    refused(ask_as("control", &append, &key), "forbidden");
    refused(
        ask_as_uid(STRANGER, &append, &op("a", Class::Host, false)),
        "unavailable",
    );
    refused(
        ask_as_uid(STRANGER, &read, &json!({ "op": "head", "class": "host" })),
        "unavailable",
    );
    refused(
        ask_as("control", &read, &json!({ "op": "head", "class": "host" })),
        "unavailable",
    );
    let integrate = w.paths.socket("audit-integrate", "integrate");
    refused(
        ask_as("control", &integrate, &json!({ "op": "sizes" })),
        "unavailable",
    );
    refused(
        call::<_, Value>(&integrate, "r", &json!({ "op": "sizes" }), WAIT)
            .map_err(|e| json!({ "err": e.code.as_str() }))
            .unwrap_err(),
        "unavailable",
    );
    // Root reads, and the log says so.
    let page: Value = call(
        &read,
        "r",
        &json!({ "op": "entries", "class": "host", "from": 0, "count": 5, "reason": "why" }),
        WAIT,
    )
    .unwrap();
    assert_eq!(page["entries"].as_array().unwrap().len(), 1);

    let tree = w.paths.state("audit-integrate");
    let segments = w.paths.state("audit-append");
    let secrets = [
        tree.join("log.key"),
        segments.join("blinding.key"),
        segments.join("days.json"),
    ];
    let tiles = [
        tree.join("host/checkpoint"),
        tree.join("host/tile/entries/000.p/1"),
    ];
    let segment = segments.join("host/00000000000000000000.seg");
    let files: Vec<&PathBuf> = secrets.iter().chain(&tiles).chain([&segment]).collect();
    for (process, ..) in USERS {
        for path in &files {
            assert!(path.exists(), "{}", path.display());
            let owner = if path.starts_with(&tree) {
                "audit-integrate"
            } else {
                "audit-append"
            };
            let is_member = process.starts_with("audit-");
            let may_read = *process == owner || (is_member && !secrets.contains(path));
            let may_write = *process == owner;
            let path = path.display();
            assert_eq!(
                can(process, &format!("cat {path} >/dev/null")),
                may_read,
                "{process} read {path}"
            );
            assert_eq!(
                can(process, &format!(": >> {path}")),
                may_write,
                "{process} write {path}"
            );
            if !may_write {
                assert!(
                    !can(process, &format!("rm -f {path}")),
                    "{process} remove {path}"
                );
                assert!(
                    !can(process, &format!("mv {path} {path}.x")),
                    "{process} rename {path}"
                );
                assert!(
                    !can(process, &format!("chmod 777 {path}")),
                    "{process} chmod {path}"
                );
            }
        }
    }
    assert!(w.verify(tlog::class::Class::Host).is_clean());
}

/// Whether the user of a process can do what a script does.
fn can(process: &str, script: &str) -> bool {
    as_user(process)
        .args(["sh", "-c", script])
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success()
}

/// A log's directory for the verifier, which does not grow meanwhile.
struct Directory(PathBuf);

impl Directory {
    fn walk(&self, at: &Path, out: &mut Vec<String>) {
        for entry in std::fs::read_dir(self.0.join(at))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = at.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                self.walk(&path, out);
            } else {
                out.push(path.to_str().unwrap().to_owned());
            }
        }
    }
}

impl tlog::verify::LogReader for Directory {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        std::fs::read(self.0.join(path)).ok()
    }

    fn list(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.walk(Path::new("tile"), &mut out);
        out
    }
}
