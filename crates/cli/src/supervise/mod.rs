//! `casemate up`, `down` and `status`: a supervisor that only forks, drops privileges, executes
//! and restarts. It has no socket and decides nothing for a tenant.
//!
//! ```text
//!  up ──▶ install ──▶ supervise (own session) ──▶ audit → kms → mint → warden → host → control → edge
//!                          │ a child died: start it again, at most RESTARTS_MAX times a minute
//!                          ▼ SIGTERM: stop them in the opposite order
//! ```
//! Must never hold a key, open a network socket of its own but the edge's listeners (which it
//! hands over), or pass a secret on a command line.

pub mod install;
pub mod processes;

use anyhow::{Context as _, bail};
use install::Accounts;
use processes::{ALL, Process};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use service::config::Config;
use service::paths::Paths;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, OpenOptions};
use std::io::IoSlice;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Restarts of one process within a minute before the supervisor gives up on all.
const RESTARTS_MAX: usize = 10;
/// How long a process may take until it answers.
const READY_MAX: Duration = Duration::from_secs(30);
/// How long a process may take to stop before it is killed.
const STOP_MAX: Duration = Duration::from_secs(12);

/// A running child, as recorded for the next supervisor and for `status`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Child {
    /// Its pid.
    pub pid: u32,
    /// Its start time, clock ticks since boot: a pid alone may be somebody else's by now.
    pub start_ticks: u64,
}

/// Starts the platform in the background and waits until all of it answers.
///
/// # Errors
/// The step or process that failed, with the end of its log.
pub fn up(
    paths: &Paths,
    config: &Config,
    passphrase: Option<&str>,
    mut progress: impl FnMut(&str),
) -> anyhow::Result<()> {
    if let Some(pid) = supervisor_pid(paths) {
        bail!(
            "it is up already (pid {}); `casemate status` shows it",
            pid.as_raw_nonzero()
        );
    }
    progress("users, directories, keys");
    install::install(paths, config, passphrase)?;
    let log = open_log(paths, "supervisor")?;
    let mut command = Command::new(std::env::current_exe().context("find this executable")?);
    command
        .arg("--root")
        .arg(paths.root())
        .arg("supervise")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // `setsid` takes it out of the caller's terminal and process group.
    let mut detached = Command::new("setsid");
    detached
        .arg("--fork")
        .arg(command.get_program())
        .args(command.get_args());
    detached
        .stdin(Stdio::null())
        .stdout(open_log(paths, "supervisor")?);
    detached.stderr(open_log(paths, "supervisor")?);
    let status = detached.status().context("run setsid")?;
    if !status.success() {
        bail!("the supervisor did not start: {status}");
    }
    let deadline = Instant::now() + READY_MAX * 2;
    let mut waiting = String::new();
    loop {
        let state = status_of(paths);
        match state.iter().find(|s| !s.ready) {
            None => return Ok(()),
            Some(s) if s.name != waiting => {
                waiting = s.name.to_owned();
                progress(&waiting);
            }
            Some(s) if Instant::now() > deadline => {
                bail!(
                    "{} did not become ready:\n{}",
                    s.name,
                    log_tail(paths, s.name)
                );
            }
            Some(s) => {
                if fs::exists(failed_mark(paths)).unwrap_or(false) {
                    bail!("it did not start:\n{}", log_tail(paths, s.name));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Stops the platform; with `keep_workspaces` VMs go on (for an upgrade).
///
/// # Errors
/// When it does not stop in time.
pub fn down(paths: &Paths, keep_workspaces: bool) -> anyhow::Result<bool> {
    let Some(pid) = supervisor_pid(paths) else {
        return Ok(false);
    };
    let drain = paths.run().join("warden/drain");
    if keep_workspaces {
        remove_if_there(&drain)?;
    } else {
        fs::write(&drain, b"").with_context(|| format!("write {}", drain.display()))?;
    }
    kill_process(pid, Signal::TERM).context("stop the supervisor")?;
    let deadline = Instant::now() + STOP_MAX * 4;
    while test_kill_process(pid).is_ok() && supervisor_pid(paths).is_some() {
        if Instant::now() > deadline {
            bail!(
                "the supervisor (pid {}) does not stop",
                pid.as_raw_nonzero()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    remove_if_there(&drain)?;
    Ok(true)
}

/// What of the installation is on the machine although it is down: processes, mounts, the
/// network namespace with its taps, control groups. Empty is as it should be.
#[must_use]
pub fn leftovers(paths: &Paths, config: &Config) -> Vec<String> {
    // Warden's name of the installation, in the control groups of what it confines.
    let lib = seal::hash::sha256(paths.state_dir().as_os_str().as_encoded_bytes());
    let instance = hex::encode(&lib[..4]);
    let mut left = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        let in_group = fs::read_to_string(process.path().join("cgroup"))
            .is_ok_and(|groups| groups.contains(&instance));
        let exe = fs::read_link(process.path().join("exe")).unwrap_or_default();
        let is_daemon = exe
            .file_name()
            .is_some_and(|n| ALL.iter().any(|p| n.as_encoded_bytes() == p.exe.as_bytes()));
        let of_root = fs::read(process.path().join("cmdline"))
            .is_ok_and(|line| runs_below(&line, paths.root()));
        if in_group || (is_daemon && of_root) {
            left.push(format!("process {pid} ({})", exe.display()));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let state = paths.state_dir().to_string_lossy().into_owned();
    let run = paths.run().to_string_lossy().into_owned();
    let ours = |m: &&str| m.contains(&state) || m.contains(&run);
    left.extend(mounts.lines().filter(ours).map(|m| format!("mount {m}")));
    let fabric = processes::fabric_name(paths, config);
    if fs::exists(format!("/run/netns/{fabric}")).unwrap_or(false) {
        left.push(format!("network namespace {fabric}"));
    }
    for base in [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/pids",
    ] {
        for group in fs::read_dir(base).into_iter().flatten().flatten() {
            if group.file_name().to_string_lossy().contains(&instance) {
                left.extend(children_of(&group.path()));
            }
        }
    }
    left
}

/// Whether a command line (NUL-separated) names this root, or none and it is the machine's own.
fn runs_below(line: &[u8], root: &std::path::Path) -> bool {
    let mut words = line.split(|b| *b == 0);
    match words.find(|w| *w == b"--root").and_then(|_| words.next()) {
        Some(named) => named == root.as_os_str().as_encoded_bytes(),
        None => root == std::path::Path::new("/"),
    }
}

/// Control groups below one that stays.
fn children_of(group: &std::path::Path) -> Vec<String> {
    fs::read_dir(group)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().is_dir())
        .map(|e| format!("control group {}", e.path().display()))
        .collect()
}

/// One process, as `status` shows it.
#[derive(Debug, serde::Serialize)]
pub struct Status {
    /// Its name.
    pub name: &'static str,
    /// Its pid, while it runs.
    pub pid: Option<u32>,
    /// It runs and answers.
    pub ready: bool,
}

/// The state of each process.
#[must_use]
pub fn status_of(paths: &Paths) -> Vec<Status> {
    let children = read_children(paths);
    ALL.iter()
        .map(|p| {
            let alive = children.get(p.name).filter(|c| is_alive(c));
            let answers = match p.ready_socket(paths) {
                Some(socket) => UnixStream::connect(socket).is_ok(),
                // The edge accepts on listeners that exist before it does: it says so itself.
                None => paths.run().join(p.name).join("ready").exists(),
            };
            Status {
                name: p.name,
                pid: alive.map(|c| c.pid),
                ready: alive.is_some() && answers,
            }
        })
        .collect()
}

/// The supervisor itself: runs until SIGTERM.
///
/// # Errors
/// What kept it from starting, or from keeping the platform up.
pub fn supervise(paths: &Paths, config: &Config) -> anyhow::Result<()> {
    remove_if_there(&failed_mark(paths))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = Supervisor::new(paths, config).and_then(|s| runtime.block_on(s.run()));
    remove_if_there(&pid_file(paths))?;
    if result.is_err() {
        fs::write(failed_mark(paths), b"")?;
    }
    result
}

struct Supervisor<'a> {
    paths: &'a Paths,
    accounts: Accounts,
    listeners: Vec<TcpListener>,
    fabric: String,
    running: BTreeMap<&'static str, tokio::process::Child>,
    recorded: BTreeMap<String, Child>,
    restarts: BTreeMap<&'static str, VecDeque<Instant>>,
}

impl<'a> Supervisor<'a> {
    fn new(paths: &'a Paths, config: &'a Config) -> anyhow::Result<Self> {
        let me = Child {
            pid: std::process::id(),
            start_ticks: start_ticks(std::process::id()).context("read own start time")?,
        };
        service::files::write_atomic(&pid_file(paths), &serde_json::to_vec(&me)?, 0o644)?;
        end_leftovers(paths);
        Ok(Self {
            paths,
            accounts: install::users()?,
            listeners: config
                .edge
                .listen
                .iter()
                .map(|a| TcpListener::bind(a).with_context(|| format!("listen on {a}")))
                .collect::<anyhow::Result<_>>()?,
            fabric: make_fabric(paths, config)?,
            running: BTreeMap::new(),
            recorded: BTreeMap::new(),
            restarts: BTreeMap::new(),
        })
    }

    async fn run(mut self) -> anyhow::Result<()> {
        let mut stop = std::pin::pin!(service::stop_requested());
        let started = tokio::select! {
            r = self.start_all() => r,
            () = &mut stop => Ok(()),
        };
        let result = match started {
            Ok(()) => tokio::select! {
                r = self.keep_up() => r,
                () = &mut stop => Ok(()),
            },
            e => e,
        };
        if let Err(e) = &result {
            eprintln!("casemate: {e:#}");
        }
        self.stop_all().await;
        result
    }

    async fn start_all(&mut self) -> anyhow::Result<()> {
        for process in ALL {
            self.start(process)?;
            self.until_ready(process).await?;
        }
        Ok(())
    }

    /// Waits for any child to end, and starts it again.
    async fn keep_up(&mut self) -> anyhow::Result<()> {
        let mut sigchld = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child())?;
        loop {
            for process in ALL {
                let ended = match self.running.get_mut(process.name) {
                    Some(child) => child.try_wait()?,
                    None => continue,
                };
                let Some(status) = ended else { continue };
                eprintln!(
                    "casemate: {} ended ({status}); starting it again",
                    process.name
                );
                let recent = self.restarts.entry(process.name).or_default();
                recent.push_back(Instant::now());
                recent.retain(|t| t.elapsed() < Duration::from_secs(60));
                if recent.len() > RESTARTS_MAX {
                    bail!(
                        "{} ended {RESTARTS_MAX} times within a minute",
                        process.name
                    );
                }
                self.start(process)?;
                self.until_ready(process).await?;
            }
            // A child that ended while another was being started has sent its signal already;
            // the time-out only bounds what a lost signal could cost.
            let _ = tokio::time::timeout(Duration::from_secs(1), sigchld.recv()).await;
        }
    }

    fn start(&mut self, process: &'static Process) -> anyhow::Result<()> {
        let plain = install::as_user(self.paths, &self.accounts, process)?;
        let mut command = if process.fabric {
            let mut c = Command::new("nsenter");
            c.arg(format!("--net=/run/netns/{}", self.fabric)).arg("--");
            c.arg(plain.get_program()).args(plain.get_args());
            c.env_clear();
            c.envs(plain.get_envs().filter_map(|(k, v)| Some((k, v?))));
            c
        } else {
            plain
        };
        command.arg("run");
        let log = open_log(self.paths, process.name)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut handover = None;
        if process.name == "edge" {
            remove_if_there(&self.paths.run().join("edge/ready"))?;
            let (ours, theirs) = UnixStream::pair()?;
            command.stdin(Stdio::from(OwnedFd::from(theirs)));
            handover = Some(ours);
        }
        let child = tokio::process::Command::from(command)
            .kill_on_drop(false)
            .spawn()
            .with_context(|| format!("start {}", process.name))?;
        if let Some(socket) = handover {
            hand_over(&socket, &self.listeners)?;
        }
        if let Some(pid) = child.id() {
            let start_ticks = start_ticks(pid).unwrap_or(0);
            self.recorded
                .insert(process.name.into(), Child { pid, start_ticks });
        }
        self.running.insert(process.name, child);
        service::files::write_atomic(
            &children_file(self.paths),
            &serde_json::to_vec(&self.recorded)?,
            0o644,
        )?;
        Ok(())
    }

    async fn until_ready(&mut self, process: &'static Process) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_MAX;
        loop {
            if status_of(self.paths)
                .iter()
                .any(|s| s.name == process.name && s.ready)
            {
                return Ok(());
            }
            if let Some(child) = self.running.get_mut(process.name)
                && let Some(status) = child.try_wait()?
            {
                bail!("{} ended while starting: {status}", process.name);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not answer within {} s",
                    process.name,
                    READY_MAX.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop_all(&mut self) {
        for process in ALL.iter().rev() {
            let Some(mut child) = self.running.remove(process.name) else {
                continue;
            };
            if let Some(pid) = child
                .id()
                .and_then(|p| i32::try_from(p).ok())
                .and_then(Pid::from_raw)
            {
                // It may have ended by itself.
                let _ = kill_process(pid, Signal::TERM);
            }
            if tokio::time::timeout(STOP_MAX, child.wait()).await.is_err() {
                eprintln!("casemate: {} does not stop; killing it", process.name);
                let _ = child.kill().await;
            }
        }
        let _ = fs::remove_file(children_file(self.paths));
        // Only when nothing is left in it: kept workspaces hold taps there.
        if fs::exists(self.paths.run().join("warden/drain")).unwrap_or(false) {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.fabric])
                .status();
        }
    }
}

/// Sends the listeners to the edge, over its standard input.
fn hand_over(socket: &UnixStream, listeners: &[TcpListener]) -> anyhow::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut buffer = SendAncillaryBuffer::new(&mut space);
    if !buffer.push(SendAncillaryMessage::ScmRights(&fds)) {
        bail!("edge.listen names more than 16 addresses");
    }
    sendmsg(
        socket,
        &[IoSlice::new(b"listeners")],
        &mut buffer,
        SendFlags::NOSIGNAL,
    )
    .context("hand the listeners to the edge")?;
    Ok(())
}

/// The network namespace that holds the taps; kept if it is there.
fn make_fabric(paths: &Paths, config: &Config) -> anyhow::Result<String> {
    let name = processes::fabric_name(paths, config);
    if !fs::exists(format!("/run/netns/{name}")).unwrap_or(false) {
        let out = Command::new("ip")
            .args(["netns", "add", &name])
            .output()
            .context("run ip")?;
        if !out.status.success() {
            bail!(
                "ip netns add {name}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
    }
    Ok(name)
}

/// Ends children of a supervisor that was killed.
fn end_leftovers(paths: &Paths) {
    for child in read_children(paths).values().filter(|c| is_alive(c)) {
        let Some(pid) = i32::try_from(child.pid).ok().and_then(Pid::from_raw) else {
            continue;
        };
        let _ = kill_process(pid, Signal::TERM);
        let deadline = Instant::now() + STOP_MAX;
        while is_alive(child) {
            if Instant::now() > deadline {
                let _ = kill_process(pid, Signal::KILL);
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn supervisor_pid(paths: &Paths) -> Option<Pid> {
    let child: Child = serde_json::from_slice(&fs::read(pid_file(paths)).ok()?).ok()?;
    if !is_alive(&child) {
        return None;
    }
    Pid::from_raw(i32::try_from(child.pid).ok()?)
}

fn is_alive(child: &Child) -> bool {
    start_ticks(child.pid) == Some(child.start_ticks)
}

/// Field 22 of `/proc/PID/stat`, unless the process is a zombie.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn read_children(paths: &Paths) -> BTreeMap<String, Child> {
    fs::read(children_file(paths))
        .ok()
        .and_then(|b| serde_json::from_slice(&b).ok())
        .unwrap_or_default()
}

fn pid_file(paths: &Paths) -> PathBuf {
    paths.run().join("supervisor/pid.json")
}

fn children_file(paths: &Paths) -> PathBuf {
    paths.run().join("supervisor/children.json")
}

fn failed_mark(paths: &Paths) -> PathBuf {
    paths.run().join("supervisor/failed")
}

fn open_log(paths: &Paths, name: &str) -> anyhow::Result<fs::File> {
    let path = paths.state("log").join(format!("{name}.log"));
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))
}

/// The last lines of a process's log and of the supervisor's, for an error message.
fn log_tail(paths: &Paths, name: &str) -> String {
    [name, "supervisor"]
        .iter()
        .filter_map(|n| fs::read_to_string(paths.state("log").join(format!("{n}.log"))).ok())
        .flat_map(|t| {
            t.lines()
                .rev()
                .take(5)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn remove_if_there(path: &std::path::Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
