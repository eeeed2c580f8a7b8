//! A double of Firecracker's API server, made from its published description
//! (`firecracker.yaml` of the pinned version): fields, which of them are needed, their kinds;
//! what is taken before the start and what after; faults as `fault_message`. It runs no guest.
//!
//! `tests/firecracker.rs` puts the same questions to it and to a real one, if there is one.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The largest body that the real one takes, bytes.
const BODY_MAX_BYTES: usize = 51_200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    NotStarted,
    Running,
    Paused,
}

/// What it does instead of answering as it should.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Says this, and waits for the end.
    Say(Vec<u8>),
    /// Says this and dies.
    SayAndDie(Vec<u8>),
    /// Acts, answers, and says this on top.
    Add(Vec<u8>),
    /// Dies before it acts.
    Die,
}

/// What the double saw and is.
#[derive(Debug)]
pub struct Seen {
    /// Method, path, body.
    pub requests: Vec<(String, String, Value)>,
    /// Answers that were no success.
    pub refused: Vec<String>,
    pub state: State,
    pub version: String,
    /// Whether the files that it is told of must be there, as the real one wants them.
    pub files: bool,
    /// What a template's state says, in place of its file.
    pub template: Option<String>,
    /// At which request (from 0), what.
    pub fault: Option<(usize, Fault)>,
    boot_path: bool,
    kernel: bool,
    drives: BTreeSet<String>,
    nets: BTreeSet<String>,
}

pub struct Server {
    pub seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// A server at the other end of the socket that comes back.
    pub fn start(fault: Option<(usize, Fault)>) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let seen = Arc::new(Mutex::new(Seen {
            requests: Vec::new(),
            refused: Vec::new(),
            state: State::NotStarted,
            version: vmm::firecracker::pin::VERSION.into(),
            files: true,
            template: None,
            fault,
            boot_path: false,
            kernel: false,
            drives: BTreeSet::new(),
            nets: BTreeSet::new(),
        }));
        let mine = Arc::clone(&seen);
        let thread = std::thread::spawn(move || serve(&mine, theirs));
        let thread = Some(thread);
        (Self { seen, thread }, ours)
    }

    pub fn state(&self) -> State {
        self.seen.lock().unwrap().state
    }

    pub fn paths(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        let name = |r: &(String, String, Value)| format!("{} {}", r.0, r.1);
        seen.requests.iter().map(name).collect()
    }

    pub fn body(&self, method: &str, path: &str) -> Value {
        let seen = self.seen.lock().unwrap();
        let mut found = seen.requests.iter().rev();
        found
            .find(|r| r.0 == method && r.1 == path)
            .map(|r| r.2.clone())
            .unwrap()
    }
}

impl Drop for Server {
    /// Its connection must have been dropped before: the thread ends with it.
    fn drop(&mut self) {
        if let Some(t) = self.thread.take()
            && t.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the double failed");
        }
    }
}

fn serve(seen: &Mutex<Seen>, mut stream: UnixStream) {
    let mut buf = Vec::new();
    let mut number = 0;
    loop {
        let Some((method, path, body)) = next(&mut stream, &mut buf) else {
            return;
        };
        let fault = {
            let seen = seen.lock().unwrap();
            seen.fault.clone().filter(|(at, _)| *at == number)
        };
        number += 1;
        let mut added = Vec::new();
        match fault.map(|(_, f)| f) {
            None => {}
            Some(Fault::Add(bytes)) => added = bytes,
            Some(Fault::Die) => return,
            Some(Fault::SayAndDie(bytes)) => {
                let _ = stream.write_all(&bytes);
                return;
            }
            Some(Fault::Say(bytes)) => {
                // The client may leave before all of it is said.
                let _ = stream.write_all(&bytes);
                let _ = stream.read(&mut [0]);
                return;
            }
        }
        let (mut answer, ends) = seen.lock().unwrap().answer(&method, &path, &body);
        answer.extend_from_slice(&added);
        if stream.write_all(&answer).is_err() || ends {
            return;
        }
    }
}

/// The next request; none when the client left.
fn next(stream: &mut UnixStream, buf: &mut Vec<u8>) -> Option<(String, String, Vec<u8>)> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut head = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(n) = head.parse(buf).unwrap() {
            let length = head
                .headers
                .iter()
                .find(|h| h.name == "Content-Length")
                .map_or(0, |h| {
                    std::str::from_utf8(h.value).unwrap().parse().unwrap()
                });
            assert!(length <= BODY_MAX_BYTES, "a body that the real one refuses");
            if buf.len() >= n + length {
                let got = (head.method.unwrap().into(), head.path.unwrap().into());
                let body = buf[n..n + length].to_vec();
                buf.drain(..n + length);
                return Some((got.0, got.1, body));
            }
        }
        let mut chunk = [0u8; 4096];
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(n) => buf.extend_from_slice(&chunk[..n]),
        }
    }
}

enum Kind {
    Int(u64, u64),
    Bool,
    Text,
    OneOf(&'static [&'static str]),
    Object(&'static [Field]),
    List(&'static [Field]),
}

struct Field(&'static str, bool, Kind);

const NEEDED: bool = true;
const MAY: bool = false;

const BUCKET: &[Field] = &[
    Field("size", NEEDED, Kind::Int(0, u64::MAX)),
    Field("refill_time", NEEDED, Kind::Int(0, u64::MAX)),
    Field("one_time_burst", MAY, Kind::Int(0, u64::MAX)),
];
const LIMITER: &[Field] = &[
    Field("bandwidth", MAY, Kind::Object(BUCKET)),
    Field("ops", MAY, Kind::Object(BUCKET)),
];

/// When a request is taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    After,
}

struct Known {
    method: &'static str,
    path: &'static str,
    when: When,
    fields: &'static [Field],
}

const fn known(
    method: &'static str,
    path: &'static str,
    when: When,
    fields: &'static [Field],
) -> Known {
    Known {
        method,
        path,
        when,
        fields,
    }
}

/// What the driver may need of the description, and what it must not touch is left out: a call
/// that is not here is refused as an unknown one.
const KNOWN: &[Known] = &[
    known(
        "PUT",
        "/machine-config",
        When::Before,
        &[
            Field("vcpu_count", NEEDED, Kind::Int(1, 32)),
            Field("mem_size_mib", NEEDED, Kind::Int(1, u64::MAX)),
            Field("smt", MAY, Kind::Bool),
            Field("track_dirty_pages", MAY, Kind::Bool),
            Field("cpu_template", MAY, Kind::Text),
            Field("huge_pages", MAY, Kind::OneOf(&["None", "2M"])),
        ],
    ),
    known(
        "PUT",
        "/boot-source",
        When::Before,
        &[
            Field("kernel_image_path", NEEDED, Kind::Text),
            Field("initrd_path", MAY, Kind::Text),
            Field("boot_args", MAY, Kind::Text),
        ],
    ),
    known(
        "PUT",
        "/drives/",
        When::Before,
        &[
            Field("drive_id", NEEDED, Kind::Text),
            Field("is_root_device", NEEDED, Kind::Bool),
            Field("partuuid", MAY, Kind::Text),
            Field("cache_type", MAY, Kind::OneOf(&["Unsafe", "Writeback"])),
            Field("is_read_only", MAY, Kind::Bool),
            Field("path_on_host", MAY, Kind::Text),
            Field("rate_limiter", MAY, Kind::Object(LIMITER)),
            Field("io_engine", MAY, Kind::OneOf(&["Sync", "Async"])),
            Field("socket", MAY, Kind::Text),
        ],
    ),
    known(
        "PATCH",
        "/drives/",
        When::After,
        &[
            Field("drive_id", NEEDED, Kind::Text),
            Field("path_on_host", MAY, Kind::Text),
            Field("rate_limiter", MAY, Kind::Object(LIMITER)),
        ],
    ),
    known(
        "PUT",
        "/network-interfaces/",
        When::Before,
        &[
            Field("iface_id", NEEDED, Kind::Text),
            Field("host_dev_name", NEEDED, Kind::Text),
            Field("guest_mac", MAY, Kind::Text),
            Field("rx_rate_limiter", MAY, Kind::Object(LIMITER)),
            Field("tx_rate_limiter", MAY, Kind::Object(LIMITER)),
        ],
    ),
    known(
        "PATCH",
        "/network-interfaces/",
        When::After,
        &[
            Field("iface_id", NEEDED, Kind::Text),
            Field("rx_rate_limiter", MAY, Kind::Object(LIMITER)),
            Field("tx_rate_limiter", MAY, Kind::Object(LIMITER)),
        ],
    ),
    known(
        "PUT",
        "/vsock",
        When::Before,
        &[
            Field("guest_cid", NEEDED, Kind::Int(3, u32::MAX as u64)),
            Field("uds_path", NEEDED, Kind::Text),
            Field("vsock_id", MAY, Kind::Text),
        ],
    ),
    known(
        "PUT",
        "/entropy",
        When::Before,
        &[Field("rate_limiter", MAY, Kind::Object(LIMITER))],
    ),
    known(
        "PUT",
        "/serial",
        When::Before,
        &[Field("serial_out_path", MAY, Kind::Text)],
    ),
    known(
        "PUT",
        "/actions",
        When::Before,
        &[Field(
            "action_type",
            NEEDED,
            Kind::OneOf(&["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]),
        )],
    ),
    known(
        "PUT",
        "/snapshot/create",
        When::After,
        &[
            Field("mem_file_path", NEEDED, Kind::Text),
            Field("snapshot_path", NEEDED, Kind::Text),
            Field("snapshot_type", MAY, Kind::OneOf(&["Full", "Diff"])),
        ],
    ),
    known(
        "PUT",
        "/snapshot/load",
        When::Before,
        &[
            Field("snapshot_path", NEEDED, Kind::Text),
            Field("mem_file_path", MAY, Kind::Text),
            Field(
                "mem_backend",
                MAY,
                Kind::Object(&[
                    Field("backend_type", NEEDED, Kind::OneOf(&["File", "Uffd"])),
                    Field("backend_path", NEEDED, Kind::Text),
                ]),
            ),
            Field("enable_diff_snapshots", MAY, Kind::Bool),
            Field("track_dirty_pages", MAY, Kind::Bool),
            Field("resume_vm", MAY, Kind::Bool),
            Field(
                "network_overrides",
                MAY,
                Kind::List(&[
                    Field("iface_id", NEEDED, Kind::Text),
                    Field("host_dev_name", NEEDED, Kind::Text),
                ]),
            ),
            Field("clock_realtime", MAY, Kind::Bool),
        ],
    ),
    known(
        "PATCH",
        "/vm",
        When::After,
        &[Field("state", NEEDED, Kind::OneOf(&["Paused", "Resumed"]))],
    ),
];

/// Whether `value` has the fields that it may and must have.
fn check(value: &Value, fields: &[Field]) -> Result<(), String> {
    let object = value.as_object().ok_or("not an object")?;
    for name in object.keys() {
        if !fields.iter().any(|f| f.0 == name) {
            return Err(format!("unknown field `{name}`"));
        }
    }
    for Field(name, needed, kind) in fields {
        match object.get(*name) {
            None | Some(Value::Null) if *needed => return Err(format!("missing field `{name}`")),
            None | Some(Value::Null) => {}
            Some(v) => check_kind(v, kind).map_err(|e| format!("{name}: {e}"))?,
        }
    }
    Ok(())
}

fn check_kind(value: &Value, kind: &Kind) -> Result<(), String> {
    let fits = match kind {
        Kind::Int(min, max) => value.as_u64().is_some_and(|n| (*min..=*max).contains(&n)),
        Kind::Bool => value.is_boolean(),
        Kind::Text => value.is_string(),
        Kind::OneOf(words) => value.as_str().is_some_and(|w| words.contains(&w)),
        Kind::Object(fields) => return check(value, fields),
        Kind::List(fields) => {
            let items = value.as_array().ok_or("not a list")?;
            return items.iter().try_for_each(|v| check(v, fields));
        }
    };
    fits.then_some(())
        .ok_or_else(|| format!("invalid value {value}"))
}

impl Seen {
    /// The answer, and whether the process ends after it.
    fn answer(&mut self, method: &str, path: &str, body: &[u8]) -> (Vec<u8>, bool) {
        let value = serde_json::from_slice(body).unwrap_or(Value::Null);
        self.requests
            .push((method.into(), path.into(), value.clone()));
        if (method, path) == ("GET", "/") && body.is_empty() {
            let state = match self.state {
                State::NotStarted => "Not started",
                State::Running => "Running",
                State::Paused => "Paused",
            };
            let info = json!({
                "app_name": "Firecracker",
                "id": "vm",
                "state": state,
                "vmm_version": self.version,
            });
            return (respond(200, Some(&info)), false);
        }
        match self.act(method, path, body.is_empty(), &value) {
            Ok(()) => (respond(204, None), false),
            Err(why) => {
                self.refused.push(format!("{method} {path}: {why}"));
                // A load that failed half-way leaves nothing to go on with.
                let ends = path == "/snapshot/load" && why.starts_with("Load snapshot error");
                (respond(400, Some(&json!({"fault_message": why}))), ends)
            }
        }
    }

    fn act(&mut self, method: &str, path: &str, empty: bool, body: &Value) -> Result<(), String> {
        if empty {
            return Err(format!("Empty {method} request."));
        }
        let (known, id) = KNOWN
            .iter()
            .filter(|k| k.method == method)
            .find_map(|k| match path.strip_prefix(k.path)? {
                "" if !k.path.ends_with('/') => Some((k, "")),
                id if k.path.ends_with('/') && !id.is_empty() => Some((k, id)),
                _ => None,
            })
            .ok_or_else(|| format!("Invalid request method and/or path: {method} {path}."))?;
        check(body, known.fields)
            .map_err(|e| format!("An error occurred when deserializing the json body: {e}."))?;
        let text = |name: &str| body[name].as_str().unwrap_or_default();
        if !id.is_empty() && id != text("drive_id") && id != text("iface_id") {
            return Err("The id from the path does not match the id from the body!".into());
        }
        match (known.when, self.state) {
            (When::Before, State::Running | State::Paused) => {
                return Err(
                    "The requested operation is not supported after starting the microVM.".into(),
                );
            }
            (When::After, State::NotStarted) => {
                return Err(
                    "The requested operation is not supported before starting the microVM.".into(),
                );
            }
            _ => {}
        }
        let loads = known.path == "/snapshot/load";
        self.boot_path |= known.when == When::Before && !loads && known.path != "/serial";
        match (method, known.path) {
            ("PUT", "/boot-source") => {
                self.open(text("kernel_image_path"), false)?;
                self.open(text("initrd_path"), false)?;
                self.kernel = true;
            }
            ("PUT", "/drives/") => {
                let read_only = body["is_read_only"] == json!(true);
                self.open(text("path_on_host"), !read_only)?;
                self.drives.insert(id.into());
            }
            ("PATCH", "/drives/") => {
                if !self.drives.contains(id) {
                    return Err("Unable to patch the block device".into());
                }
                if body.get("path_on_host").is_some() {
                    self.open(text("path_on_host"), true)?;
                }
            }
            ("PUT", "/network-interfaces/") => {
                self.nets.insert(id.into());
            }
            ("PATCH", "/network-interfaces/") if !self.nets.contains(id) => {
                return Err("Unable to update the net device".into());
            }
            ("PUT", "/actions") => {
                if text("action_type") != "InstanceStart" || !self.kernel {
                    return Err("Start microvm error: Cannot start microvm without kernel".into());
                }
                self.state = State::Running;
            }
            ("PATCH", "/vm") => {
                self.state = if text("state") == "Paused" {
                    State::Paused
                } else {
                    State::Running
                };
            }
            ("PUT", "/snapshot/create") => {
                if self.state != State::Paused {
                    return Err(
                        "Create snapshot error: save/restore unavailable while running".into(),
                    );
                }
                let devices = json!({"drives": self.drives, "nets": self.nets}).to_string();
                std::fs::write(text("snapshot_path"), devices).map_err(|e| e.to_string())?;
                std::fs::write(text("mem_file_path"), "memory").map_err(|e| e.to_string())?;
            }
            ("PUT", "/snapshot/load") => {
                let lost = |e: String| format!("Load snapshot error: {e}");
                if self.boot_path {
                    return Err("Loading a microVM snapshot not allowed after configuring \
                        boot-specific resources."
                        .into());
                }
                let path = body["mem_backend"]["backend_path"].as_str().unwrap_or("");
                self.open(path, false).map_err(lost)?;
                let text = match &self.template {
                    Some(t) => t.clone(),
                    None => std::fs::read_to_string(text("snapshot_path"))
                        .map_err(|e| lost(e.to_string()))?,
                };
                let devices: Value =
                    serde_json::from_str(&text).map_err(|e| lost(e.to_string()))?;
                let names = |kind: &str| {
                    let all = devices[kind].as_array().into_iter().flatten();
                    all.filter_map(|n| n.as_str().map(String::from)).collect()
                };
                (self.drives, self.nets) = (names("drives"), names("nets"));
                self.state = if body["resume_vm"] == json!(true) {
                    State::Running
                } else {
                    State::Paused
                };
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&self, path: &str, write: bool) -> Result<(), String> {
        if !self.files {
            return Ok(());
        }
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .write(write)
            .open(path);
        opened.map(drop).map_err(|e| format!("{path}: {e}"))
    }
}

fn respond(status: u16, body: Option<&Value>) -> Vec<u8> {
    let mut out =
        format!("HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n");
    if let Some(body) = body {
        let body = body.to_string();
        out.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
    } else {
        out.push_str("\r\n");
    }
    out.into_bytes()
}
