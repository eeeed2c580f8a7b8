//! The table of exec tasks.
//!
//! ```text
//! create ──▶ running ──exit──▶ exited ──ttl──▶ forgotten
//!                └─timeout, kill─▶ failed ──ttl──▶ forgotten
//! ```
//!
//! One tokio task per exec reads both pipes; each chunk is kept (up to a bound) and handed to
//! every subscriber, waiting for the slowest: a slow reader slows its process down, and fills no
//! memory. After the exit what is left in the pipes is read, subscribers get `Exit`, and the
//! pipes are emptied further so that a daemon left behind does not die of a closed pipe.
//!
//! Must never hand output to anyone but the caller: not to a log, not to the channel (SEE-1).

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustix::process::Signal;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock;
use crate::launch::{Launcher, Process};
use crate::limits::{
    STREAM_QUEUE_CHUNKS, TASK_DRAIN_MAX_BYTES, TASK_OUTPUT_MAX_BYTES, TASK_READ_BYTES,
    TASK_SUBSCRIBERS_MAX, TASK_TTL_DEFAULT_S, TASKS_EXITED_MAX, TASKS_OUTPUT_MAX_BYTES,
    TASKS_RUNNING_MAX,
};
use crate::reap::{Exit, reaper};

/// What to run.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The command as the caller gave it.
    pub command: Vec<String>,
    /// What is executed.
    pub argv: Vec<String>,
    /// Killed after this long.
    pub timeout: Option<Duration>,
    /// Remembered this long after the exit.
    pub ttl: Ttl,
}

/// How long an exited task is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    /// Until it is deleted.
    Never,
    /// This many seconds.
    Seconds(u64),
}

impl Ttl {
    /// By the contract: 0 (or nothing) means 300 s, -1 means never.
    ///
    /// # Errors
    /// If it is below -1 or over 30 days.
    pub fn from_wire(seconds: Option<i64>) -> Result<Self, &'static str> {
        match seconds.unwrap_or(0) {
            -1 => Ok(Self::Never),
            0 => Ok(Self::Seconds(TASK_TTL_DEFAULT_S)),
            s => match u64::try_from(s) {
                Ok(s) if s <= crate::limits::TASK_SECONDS_MAX => Ok(Self::Seconds(s)),
                _ => Err("ttl_seconds must be -1, 0 or at most 2592000"),
            },
        }
    }

    fn wire(self) -> i64 {
        match self {
            Self::Never => -1,
            Self::Seconds(s) => i64::try_from(s).unwrap_or(i64::MAX),
        }
    }
}

/// What a subscriber hears, in order; `Exit` is the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A chunk of standard output.
    Stdout(Bytes),
    /// A chunk of standard error.
    Stderr(Bytes),
    /// The end.
    Exit {
        /// As a shell would say it.
        code: i32,
        /// The process's id in the guest.
        pid: i32,
        /// `exited` or `failed`.
        status: Status,
    },
}

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It runs.
    Running,
    /// It ended by itself.
    Exited,
    /// It was ended by its timeout or a kill.
    Failed,
}

/// A task as the contract shows it (§3.4).
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "the contract's own names")]
pub struct View {
    pub id: String,
    pub command: Vec<String>,
    pub status: Status,
    pub guest_pid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    pub created_at: String,
    pub started_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exited_at: Option<String>,
    pub ttl_seconds: i64,
}

/// Why a task does not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// 50 run already.
    #[error("{TASKS_RUNNING_MAX} commands run already; wait for one or delete one")]
    TooMany,
    /// The kernel refuses.
    #[error("can't start {program:?}: {source}")]
    Spawn {
        /// The first word.
        program: String,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// The table.
pub struct Tasks {
    launcher: Launcher,
    table: Mutex<Table>,
    kept_bytes: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Table {
    last_id: u64,
    tasks: BTreeMap<u64, Arc<Task>>,
}

/// One task.
pub struct Task {
    id: u64,
    spec: Spec,
    pid: i32,
    created_ms: u64,
    state: Mutex<State>,
    stdin: tokio::sync::Mutex<Option<pipe::Sender>>,
    /// Set once when it ends.
    done: watch::Sender<bool>,
    /// Set once when somebody wants it gone.
    killed: watch::Sender<Option<&'static str>>,
    kept_bytes: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
    subscribers: Vec<mpsc::Sender<Event>>,
    end: Option<End>,
}

#[derive(Clone, Copy)]
struct End {
    code: i32,
    status: Status,
    error: Option<&'static str>,
    exited_ms: u64,
}

#[derive(Clone, Copy)]
enum Stream {
    Out,
    Err,
}

impl Tasks {
    /// An empty table that starts processes with `launcher`.
    #[must_use]
    pub fn new(launcher: Launcher) -> Self {
        Self {
            launcher,
            table: Mutex::default(),
            kept_bytes: Arc::default(),
        }
    }

    /// Starts a task; with `subscribe`, also hears it from its first byte on.
    ///
    /// # Errors
    /// If too many run, or it can't be started.
    pub fn create(
        &self,
        spec: Spec,
        subscribe: bool,
    ) -> Result<(Arc<Task>, Option<mpsc::Receiver<Event>>), SpawnError> {
        let mut table = self.lock();
        table.purge(clock::now_ms(), &self.kept_bytes);
        let running = table.tasks.values().filter(|task| !task.is_done()).count();
        if running >= TASKS_RUNNING_MAX {
            return Err(SpawnError::TooMany);
        }
        let spawned = self.launcher.spawn(&spec.argv);
        let (process, exit) = spawned.map_err(|source| SpawnError::Spawn {
            program: spec.argv.first().cloned().unwrap_or_default(),
            source,
        })?;
        let Process {
            pid,
            stdin,
            stdout,
            stderr,
        } = process;
        table.last_id += 1;
        let mut state = State::default();
        let receiver = subscribe.then(|| {
            let (sender, receiver) = mpsc::channel(STREAM_QUEUE_CHUNKS);
            state.subscribers.push(sender);
            receiver
        });
        let task = Arc::new(Task {
            id: table.last_id,
            spec,
            pid,
            created_ms: clock::now_ms(),
            state: Mutex::new(state),
            stdin: tokio::sync::Mutex::new(Some(stdin)),
            done: watch::Sender::new(false),
            killed: watch::Sender::new(None),
            kept_bytes: Arc::clone(&self.kept_bytes),
        });
        table.tasks.insert(task.id, Arc::clone(&task));
        drop(table);
        tokio::spawn(Arc::clone(&task).run(stdout, stderr, exit));
        if let Some(timeout) = task.spec.timeout {
            tokio::spawn(Arc::clone(&task).kill_after(timeout));
        }
        Ok((task, receiver))
    }

    /// The task with this id.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<Arc<Task>> {
        let mut table = self.lock();
        table.purge(clock::now_ms(), &self.kept_bytes);
        table.tasks.get(&parse_id(id)?).cloned()
    }

    /// All tasks, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Task>> {
        let mut table = self.lock();
        table.purge(clock::now_ms(), &self.kept_bytes);
        table.tasks.values().cloned().collect()
    }

    /// Kills a task's process group if it runs, and forgets the task. Says whether there was one.
    pub fn delete(&self, id: &str) -> bool {
        let removed = parse_id(id).and_then(|id| self.lock().tasks.remove(&id));
        removed.map(|task| task.kill("killed")).is_some()
    }

    /// Deletes all tasks; says how many.
    pub fn delete_all(&self) -> usize {
        let removed = std::mem::take(&mut self.lock().tasks);
        removed.values().for_each(|task| task.kill("killed"));
        removed.len()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Forgets what is over its time, and the oldest exited tasks beyond the bounds.
    fn purge(&mut self, now_ms: u64, kept_bytes: &AtomicUsize) {
        self.tasks
            .retain(|_, task| match (task.end(), task.spec.ttl) {
                (Some(end), Ttl::Seconds(s)) => now_ms < end.exited_ms.saturating_add(s * 1000),
                _ => true,
            });
        let exited: Vec<u64> = self
            .tasks
            .values()
            .filter(|task| task.is_done())
            .map(|task| task.id)
            .collect();
        let surplus = exited.len().saturating_sub(TASKS_EXITED_MAX);
        for (n, id) in exited.iter().enumerate() {
            if n < surplus || kept_bytes.load(Relaxed) > TASKS_OUTPUT_MAX_BYTES / 2 {
                self.tasks.remove(id);
            }
        }
    }
}

impl Task {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> String {
        self.id.to_string()
    }

    /// The task as the contract shows it.
    #[must_use]
    pub fn view(&self, with_output: bool) -> View {
        let state = self.lock();
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        View {
            id: self.id(),
            command: self.spec.command.clone(),
            status: state.end.map_or(Status::Running, |end| end.status),
            guest_pid: self.pid,
            exit_code: state.end.map(|end| end.code),
            stdout: with_output.then(|| text(&state.stdout)),
            stderr: with_output.then(|| text(&state.stderr)),
            truncated: state.truncated,
            error: state.end.and_then(|end| end.error),
            created_at: clock::iso(self.created_ms),
            started_at: clock::iso(self.created_ms),
            exited_at: state.end.map(|end| clock::iso(end.exited_ms)),
            ttl_seconds: self.spec.ttl.wire(),
        }
    }

    /// Waits until it has ended and its output is complete.
    pub async fn wait(&self) {
        // An error can't be: the sender is in self.
        let _ = self.done.subscribe().wait_for(|done| *done).await;
    }

    /// Its output so far and what comes; `None` for the receiver if it has ended.
    ///
    /// # Errors
    /// If too many listen already.
    pub fn subscribe(&self) -> Result<(Bytes, Bytes, Option<mpsc::Receiver<Event>>), &'static str> {
        let mut state = self.lock();
        let receiver = if state.end.is_some() {
            None
        } else {
            state.subscribers.retain(|s| !s.is_closed());
            if state.subscribers.len() >= TASK_SUBSCRIBERS_MAX {
                return Err("too many streams of this task are open; close one");
            }
            let (sender, receiver) = mpsc::channel(STREAM_QUEUE_CHUNKS);
            state.subscribers.push(sender);
            Some(receiver)
        };
        let so_far = |bytes: &Vec<u8>| Bytes::copy_from_slice(bytes);
        Ok((so_far(&state.stdout), so_far(&state.stderr), receiver))
    }

    /// The `Exit` event, if it has ended.
    #[must_use]
    pub fn exit_event(&self) -> Option<Event> {
        self.end().map(|end| Event::Exit {
            code: end.code,
            pid: self.pid,
            status: end.status,
        })
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// If it has ended or closed its input.
    pub async fn input(&self, data: &[u8]) -> io::Result<()> {
        let mut killed = self.killed.subscribe();
        let mut done = self.done.subscribe();
        tokio::select! {
            result = async {
                match self.stdin.lock().await.as_mut() {
                    Some(stdin) => stdin.write_all(data).await,
                    None => Err(io::ErrorKind::BrokenPipe.into()),
                }
            } => result,
            _ = killed.wait_for(Option::is_some) => Err(io::ErrorKind::BrokenPipe.into()),
            _ = done.wait_for(|done| *done) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Ends its standard input.
    pub async fn input_close(&self) {
        self.stdin.lock().await.take();
    }

    /// Kills its process group, if it has not ended.
    pub fn kill(&self, why: &'static str) {
        if reaper().kill_group(self.pid, Signal::KILL) {
            self.killed.send_if_modified(|reason| {
                let first = reason.is_none();
                *reason = reason.or(Some(why));
                first
            });
        }
    }

    async fn kill_after(self: Arc<Self>, timeout: Duration) {
        let ended = tokio::time::timeout(timeout, self.wait()).await;
        if ended.is_err() {
            self.kill("timeout");
        }
    }

    async fn run(
        self: Arc<Self>,
        mut stdout: pipe::Receiver,
        mut stderr: pipe::Receiver,
        mut exit: oneshot::Receiver<Exit>,
    ) {
        let (mut out_open, mut err_open) = (true, true);
        let (mut out, mut err) = (BytesMut::new(), BytesMut::new());
        let exit = loop {
            out.reserve(TASK_READ_BYTES);
            err.reserve(TASK_READ_BYTES);
            tokio::select! {
                read = stdout.read_buf(&mut out), if out_open => {
                    out_open = matches!(read, Ok(n) if n > 0);
                    self.hand_on(Stream::Out, out.split().freeze()).await;
                }
                read = stderr.read_buf(&mut err), if err_open => {
                    err_open = matches!(read, Ok(n) if n > 0);
                    self.hand_on(Stream::Err, err.split().freeze()).await;
                }
                exit = &mut exit => break exit.unwrap_or(Exit::Signal(0)),
            }
        };
        // All that the process wrote is in the pipes; what its children still write is not
        // waited for.
        self.drain(Stream::Out, &stdout).await;
        self.drain(Stream::Err, &stderr).await;
        self.finish(exit).await;
        let discard = async |pipe: &mut pipe::Receiver, open: bool| {
            let mut sink = [0; 4096];
            while open && matches!(pipe.read(&mut sink).await, Ok(n) if n > 0) {}
        };
        tokio::join!(
            discard(&mut stdout, out_open),
            discard(&mut stderr, err_open)
        );
    }

    async fn drain(&self, stream: Stream, pipe: &pipe::Receiver) {
        let mut drained_bytes = 0;
        while drained_bytes < TASK_DRAIN_MAX_BYTES {
            let mut chunk = BytesMut::zeroed(TASK_READ_BYTES);
            // Not try_read: its cached readiness may say "would block" of bytes it has not seen.
            let read = rustix::io::read(pipe, &mut chunk[..]);
            let Ok(len @ 1..) = read else { break };
            chunk.truncate(len);
            drained_bytes += len;
            self.hand_on(stream, chunk.freeze()).await;
        }
    }

    /// Keeps a chunk and hands it to every subscriber, waiting for each.
    async fn hand_on(&self, stream: Stream, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        let subscribers = {
            let mut state = self.lock();
            let budget_bytes = TASKS_OUTPUT_MAX_BYTES.saturating_sub(self.kept_bytes.load(Relaxed));
            let kept = match stream {
                Stream::Out => &mut state.stdout,
                Stream::Err => &mut state.stderr,
            };
            let room = (TASK_OUTPUT_MAX_BYTES - kept.len()).min(budget_bytes);
            let take = chunk.len().min(room);
            kept.extend_from_slice(&chunk[..take]);
            self.kept_bytes.fetch_add(take, Relaxed);
            state.truncated |= take < chunk.len();
            state.subscribers.retain(|s| !s.is_closed());
            state.subscribers.clone()
        };
        let event = match stream {
            Stream::Out => Event::Stdout(chunk),
            Stream::Err => Event::Stderr(chunk),
        };
        self.tell(subscribers, &event).await;
    }

    /// Gives up on who does not read once the task was killed.
    async fn tell(&self, subscribers: Vec<mpsc::Sender<Event>>, event: &Event) {
        let mut killed = self.killed.subscribe();
        for subscriber in subscribers {
            tokio::select! {
                biased;
                _ = subscriber.send(event.clone()) => {}
                _ = killed.wait_for(Option::is_some) => {}
            }
        }
    }

    async fn finish(&self, exit: Exit) {
        let error = *self.killed.borrow();
        let end = End {
            code: exit.code(),
            status: match error {
                Some(_) => Status::Failed,
                None => Status::Exited,
            },
            error,
            exited_ms: clock::now_ms(),
        };
        let subscribers = {
            let mut state = self.lock();
            state.end = Some(end);
            std::mem::take(&mut state.subscribers)
        };
        self.done.send_replace(true);
        // Whoever waits for room in the pipe lets go of it by `done`.
        self.input_close().await;
        if let Some(event) = self.exit_event() {
            self.tell(subscribers, &event).await;
        }
    }

    fn end(&self) -> Option<End> {
        self.lock().end
    }

    fn is_done(&self) -> bool {
        self.end().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let state = self.lock();
        let kept_bytes = state.stdout.len() + state.stderr.len();
        self.kept_bytes.fetch_sub(kept_bytes, Relaxed);
    }
}

/// Only the one text of an id: decimal digits without leading zeros.
fn parse_id(text: &str) -> Option<u64> {
    let id: u64 = text.parse().ok()?;
    (id.to_string() == text).then_some(id)
}
