//! One VM's life, as host drives it.
//!
//! ```text
//!           Prepare            booted              rehearsed
//! Created ───────────▶ Booting ──────▶ Rehearsing ──────────▶ Pooled ──Save──▶ Exited(saved)
//!    │     (template: straight to Rehearsing)                   │
//!    │                                                          │ Attach
//!    │                                                          ▼
//!    │                  Paused ◀──Pause──┐                  Attaching
//!    │                     └────Resume──▶ Running ◀────up───────┘
//!    │                                     │ Shutdown
//!    ▼                                     ▼        down, power-off, or the grace is over
//! Exited(shutdown) ◀─────────────────── Stopping
//! ```
//!
//! - Archive, Unarchive: Running, and nothing changes: the guest's files come or go by its channel, piece by piece, and
//!   whatever goes wrong with them ends the archive and not the VM. `MemoryDrop` ends it too.
//! - MemorySave: Running → Paused, Paused → Paused; what fails to be saved is paused as well.
//! - Wake, of a VM that was opened on saved memory, in the place of Prepare and Attach: Created →
//!   Waking ──up──▶ Running. What else its guest says was said before it slept, and is passed over.
//! - PrepareNow leaves the rehearsal out: a template is Pooled once it is restored, a cold boot
//!   once it booted.
//! - Any state but Stopping: the VMM is gone → Exited(lost); the guest powers off, reboots or
//!   panics → Exited(shutdown, reset, panic).
//! - Booting, Rehearsing, Attaching, Waking: `failed`, a message out of turn, no message at all, or the
//!   deadline → the VMM is ended, Exited(failed). A VM serves one workspace, once: nothing leads
//!   back.
//! - Running, Paused, Stopping: what else the guest says is passed over; the workspace may write
//!   to its own channel as it likes.
//! - Shutdown is taken in every state and ends whatever waits; Status is answered in every state;
//!   another request while one waits is a conflict.
//!
//! The cost: one request at a time. Waiting is done by the caller's poll, never here, but for
//! commands to the VMM, which are bounded.

mod archive;

use crate::agent::Channel;
use crate::limits::{
    ATTACH_WAIT_MAX_MS, PREPARE_COLD_MAX, PREPARE_TEMPLATE_MAX, SHUTDOWN_GRACE_MAX_MS,
};
use crate::qemu::How;
use crate::{DiskFile, Event, Vmm, log};
use api::agent::{FromGuest, STEPS_MAX, ToGuest, Up};
use api::vmctl::{Op, Status, VmState};
use api::{Error, ErrorCode};
use archive::{Archive, Way};
use serde_json::{Value, json};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// One VM: its VMM, its guest's channel, and where it is. `T` says whom to answer.
pub struct Vm<V, T> {
    slot: u16,
    how: How,
    vmm: V,
    agent: Channel,
    state: State,
    rehearses: bool,
    waiting: Option<Waiting<T>>,
    disk: Option<Disk>,
    /// Where memory is saved to: open for writing only.
    memory: Option<OwnedFd>,
    /// The same once it was used: its process ends with its last descriptor, and has still to be
    /// told what becomes of it.
    saved: Option<OwnedFd>,
    /// The archive that is being written to that file.
    archive: Option<Archive>,
    /// The last archive's number.
    archives: u64,
    /// How long the VMM took to take saved memory, the disk, and to continue, µs.
    disk_us: u128,
    answers: Vec<(T, Result<Value, Error>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Booting,
    Rehearsing,
    Pooled,
    Attaching,
    Waking,
    Running,
    Paused,
    Stopping,
    Exited(Reason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Shutdown,
    Panic,
    Reset,
    Lost,
    Failed,
    Saved,
}

struct Waiting<T> {
    reply: T,
    deadline: Instant,
    after: Duration,
}

struct Disk {
    file: DiskFile,
    /// Once a volume is behind it.
    size_bytes: Option<u64>,
}

impl<V: Vmm, T> Vm<V, T> {
    /// A VM that has not run yet.
    pub fn new(slot: u16, how: How, vmm: V, agent: Channel) -> Self {
        Self {
            slot,
            how,
            vmm,
            agent,
            state: State::Created,
            rehearses: true,
            waiting: None,
            disk: None,
            memory: None,
            saved: None,
            archive: None,
            archives: 0,
            disk_us: 0,
            answers: Vec::new(),
        }
    }

    /// Takes a request of host's; the answer comes by [`Self::take_answers`], now or later.
    pub fn request(&mut self, reply: T, op: Op, now: Instant) {
        let answer = match op {
            Op::Status => Ok(json!(self.status())),
            Op::Shutdown { grace_ms } => return self.shutdown(reply, grace_ms, now),
            _ if self.waiting.is_some() => {
                Err(self.conflict("another request waits for the guest"))
            }
            Op::Prepare => return self.prepare(reply, true, now),
            Op::PrepareNow => return self.prepare(reply, false, now),
            Op::Attach { attach, wait_ms } => return self.attach(reply, *attach, wait_ms, now),
            Op::Save => self.save(),
            Op::MemorySave => self.memory_save(),
            Op::Archive {
                paths,
                exclude,
                max_bytes,
                wait_ms,
            } => {
                let told = |number| ToGuest::Archive {
                    number,
                    paths,
                    exclude,
                };
                return self.archive(reply, told, Way::Make(max_bytes), wait_ms, now);
            }
            Op::Unarchive { wait_ms } => {
                let told = |number| ToGuest::Unarchive { number };
                return self.archive(reply, told, Way::PutBack, wait_ms, now);
            }
            Op::Wake { wake, wait_ms } => return self.wake(reply, *wake, wait_ms, now),
            Op::Pause => self.pause(),
            Op::Resume => self.resume(),
        };
        self.answers.push((reply, answer));
    }

    /// Keeps the disk's file that warden hands over, for the attach.
    ///
    /// # Errors
    /// There is one already, or the guest is past its attach.
    pub fn disk_keep(&mut self, file: DiskFile) -> Result<(), Error> {
        if !matches!(
            self.state,
            State::Created | State::Booting | State::Rehearsing | State::Pooled
        ) {
            return Err(self.conflict("a disk can be handed over before the attach only"));
        }
        if self.disk.is_some() {
            return Err(self.conflict("it has a disk already"));
        }
        self.disk = Some(Disk {
            file,
            size_bytes: None,
        });
        Ok(())
    }

    /// A volume of that size is behind the file now.
    ///
    /// # Errors
    /// There is no file, or it has a volume already.
    pub fn disk_ready(&mut self, size_bytes: u64) -> Result<(), Error> {
        match &mut self.disk {
            Some(Disk {
                size_bytes: size @ None,
                ..
            }) => {
                *size = Some(size_bytes);
                Ok(())
            }
            _ => Err(self.conflict("no file waits for a volume")),
        }
    }

    /// Keeps the file that warden hands over for [`Op::MemorySave`] or [`Op::Archive`].
    ///
    /// # Errors
    /// There is no workspace, or a file already.
    pub fn memory_keep(&mut self, file: OwnedFd) -> Result<(), Error> {
        let has_one = self.memory.is_some() || self.saved.is_some() || self.archive.is_some();
        if !matches!(self.state, State::Running | State::Paused) || has_one {
            return Err(self.conflict("only a workspace's memory can be saved, to one file"));
        }
        self.memory = Some(file);
        Ok(())
    }

    /// Lets go of that file.
    pub fn memory_drop(&mut self) {
        if self.archive.is_some() {
            let why = "the archive was given up; make it again";
            self.archive_end(Err(Error::new(ErrorCode::Conflict, why)));
        }
        (self.memory, self.saved) = (None, None);
    }

    /// Takes in what the guest said.
    pub fn on_agent(&mut self) {
        self.agent.fill();
        while let Some(message) = self.agent.message() {
            self.on_message(message);
        }
    }

    /// Takes in what the VMM told.
    pub fn on_vmm(&mut self) {
        while let Some(event) = self.vmm.event() {
            if event == Event::DiskError {
                log::line(
                    "error",
                    self.slot,
                    "the disk gave the guest an I/O error",
                    None,
                );
                continue;
            }
            self.on_end(event);
            if self.exited() {
                return;
            }
        }
    }

    /// Acts on the deadline, if it passed.
    pub fn on_time(&mut self, now: Instant) {
        let Some(after) = self
            .waiting
            .as_ref()
            .filter(|w| now >= w.deadline)
            .map(|w| w.after)
        else {
            return;
        };
        if self.state == State::Stopping {
            log::line(
                "warn",
                self.slot,
                "the guest did not shut down in time",
                None,
            );
            return self.end(Reason::Shutdown);
        }
        if self.archive.is_some() {
            let why = "the archive was not made in time; leave more out, or make several";
            return self.archive_end(Err(Error::new(ErrorCode::Timeout, why)));
        }
        let phase = match self.state {
            State::Booting => "did not boot",
            State::Rehearsing => "did not finish its rehearsal",
            _ => "did not come up",
        };
        self.fail(Error::new(
            ErrorCode::Timeout,
            format!(
                "the guest {phase} in {} ms; start it again, and if that fails too, with more memory \
                 or a longer wait",
                after.as_millis()
            ),
        ));
    }

    /// When [`Self::on_time`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.as_ref().map(|w| w.deadline)
    }

    /// The guest's channel, when it is worth waiting on: a stopped guest says nothing, and what
    /// lies there is read when it is its turn.
    #[must_use]
    pub fn agent(&self) -> Option<&Channel> {
        let stopped = matches!(
            self.state,
            State::Created | State::Pooled | State::Paused | State::Exited(_)
        );
        (!stopped && self.agent.listens()).then_some(&self.agent)
    }

    /// The VMM, until it is gone.
    #[must_use]
    pub fn vmm(&self) -> Option<&V> {
        (!self.exited()).then_some(&self.vmm)
    }

    /// The answers that are ready.
    pub fn take_answers(&mut self) -> Vec<(T, Result<Value, Error>)> {
        std::mem::take(&mut self.answers)
    }

    /// How far the VM is.
    #[must_use]
    pub fn status(&self) -> Status {
        let vm = match self.state {
            State::Created | State::Booting | State::Rehearsing => VmState::Created,
            State::Pooled | State::Attaching | State::Waking => VmState::Pooled,
            State::Running | State::Stopping => VmState::Running,
            State::Paused => VmState::Paused,
            State::Exited(_) => VmState::Exited,
        };
        let reason = match self.state {
            State::Exited(r) => Some(
                match r {
                    Reason::Shutdown => "shutdown",
                    Reason::Panic => "panic",
                    Reason::Reset => "reset",
                    Reason::Lost => "lost",
                    Reason::Failed => "failed",
                    Reason::Saved => "saved",
                }
                .to_owned(),
            ),
            _ => None,
        };
        Status { vm, reason }
    }

    fn prepare(&mut self, reply: T, rehearse: bool, now: Instant) {
        match self.state {
            State::Pooled => {
                let status = json!(self.status());
                return self.answers.push((reply, Ok(status)));
            }
            State::Created if self.how == How::Wake => {
                let e = self.conflict("it has a workspace in it; wake it");
                return self.answers.push((reply, Err(e)));
            }
            State::Created => {}
            _ => {
                let e = self.conflict("only a VM that did not run yet can be prepared");
                return self.answers.push((reply, Err(e)));
            }
        }
        let after = match self.how {
            How::Template | How::Wake => PREPARE_TEMPLATE_MAX,
            How::Cold | How::Build => PREPARE_COLD_MAX,
        };
        self.wait(reply, now, after);
        self.rehearses = rehearse || self.how == How::Build;
        let begun = match self.how {
            How::Template => self.vmm.restore().and_then(|()| self.vmm.cont()),
            How::Cold | How::Build | How::Wake => self.vmm.cont(),
        };
        if let Err(e) = begun {
            return self.fail(vmm_error(&e));
        }
        match self.how {
            How::Template if self.rehearses => self.rehearse(),
            // It had to run for a moment: a restored VMM's disks are inactive until then.
            How::Template => self.halt(),
            How::Cold | How::Build | How::Wake => self.state = State::Booting,
        }
    }

    /// The virtual CPUs stand still and the guest waits for its disk.
    fn prepared(&mut self) {
        self.state = State::Pooled;
        let status = json!(self.status());
        self.answer(Ok(status));
    }

    fn halt(&mut self) {
        match self.vmm.stop() {
            Ok(()) => self.prepared(),
            Err(e) => self.fail(vmm_error(&e)),
        }
    }

    fn rehearse(&mut self) {
        self.state = State::Rehearsing;
        if let Err(e) = self.agent.send(&ToGuest::Rehearse) {
            self.fail(agent_error(&e));
        }
    }

    fn attach(&mut self, reply: T, attach: api::agent::Attach, wait_ms: u64, now: Instant) {
        let refused = if self.state != State::Pooled {
            Some(self.conflict("only a prepared VM can be attached"))
        } else if self.how == How::Build {
            Some(self.conflict("a template's VM must never see a workspace"))
        } else {
            None
        };
        match refused.map_or_else(|| self.disk_take(wait_ms), Err) {
            Ok(disk) => {
                self.wait(reply, now, Duration::from_millis(wait_ms));
                self.state = State::Attaching;
                self.begin(Instant::now(), &disk, &ToGuest::Attach(attach));
            }
            Err(e) => self.answers.push((reply, Err(e))),
        }
    }

    fn wake(&mut self, reply: T, wake: api::agent::Wake, wait_ms: u64, now: Instant) {
        let refused = (self.state != State::Created || self.how != How::Wake)
            .then(|| self.conflict("only a VM that was opened on saved memory can be woken, once"));
        match refused.map_or_else(|| self.disk_take(wait_ms), Err) {
            Ok(disk) => {
                self.wait(reply, now, Duration::from_millis(wait_ms));
                self.state = State::Waking;
                let begun = Instant::now();
                if let Err(e) = self.vmm.wake() {
                    return self.fail(vmm_error(&e));
                }
                self.begin(begun, &disk, &ToGuest::Wake(wake));
            }
            Err(e) => self.answers.push((reply, Err(e))),
        }
    }

    /// The disk that is ready, for a guest that is given so long.
    fn disk_take(&mut self, wait_ms: u64) -> Result<(DiskFile, u64), Error> {
        if wait_ms == 0 || wait_ms > ATTACH_WAIT_MAX_MS {
            return Err(Error::new(
                ErrorCode::ValidationError,
                format!("wait_ms must be 1 to {ATTACH_WAIT_MAX_MS}"),
            ));
        }
        let ready = self.disk.take_if(|d| d.size_bytes.is_some());
        ready
            .and_then(|d| Some((d.file, d.size_bytes?)))
            .ok_or_else(|| self.conflict("no disk is ready; open and grant the slot's disk first"))
    }

    /// Continues the guest on its disk, and tells its agent.
    fn begin(&mut self, begun: Instant, (disk, size_bytes): &(DiskFile, u64), told: &ToGuest) {
        if let Err(e) = self
            .vmm
            .disk_attach(disk, *size_bytes)
            .and_then(|()| self.vmm.cont())
        {
            return self.fail(vmm_error(&e));
        }
        self.disk_us = begun.elapsed().as_micros();
        if let Err(e) = self.agent.send(told) {
            self.fail(agent_error(&e));
        }
    }

    fn memory_save(&mut self) -> Result<Value, Error> {
        if !matches!(self.state, State::Running | State::Paused) {
            return Err(self.conflict("only a workspace's memory can be saved"));
        }
        let file = self
            .memory
            .take()
            .ok_or_else(|| self.conflict("no file waits for its memory"))?;
        self.pause()?;
        let saved = match self.vmm.memory_save(file.as_fd()) {
            Ok(()) => rustix::fs::fdatasync(&file).map_err(|source| crate::Error::Io {
                command: "sync saved memory",
                source: source.into(),
            }),
            Err(e) => Err(e),
        };
        self.saved = Some(file);
        match saved {
            Ok(()) => Ok(json!(self.status())),
            // It said no, or the file did: the workspace is none the worse.
            Err(e @ (crate::Error::Refused { .. } | crate::Error::Io { .. })) => Err(vmm_error(&e)),
            Err(e) => {
                self.end(Reason::Failed);
                Err(vmm_error(&e))
            }
        }
    }

    fn save(&mut self) -> Result<Value, Error> {
        if self.state != State::Pooled || self.how != How::Build {
            return Err(self.conflict("only a prepared build VM can be saved"));
        }
        let saved = self.vmm.save().map_err(|e| vmm_error(&e));
        self.end(if saved.is_ok() {
            Reason::Saved
        } else {
            Reason::Failed
        });
        saved.map(|()| Value::Bool(true))
    }

    fn pause(&mut self) -> Result<Value, Error> {
        match self.state {
            State::Running => {
                self.act(Vmm::stop)?;
                self.state = State::Paused;
            }
            State::Paused => {}
            _ => return Err(self.conflict("only a running workspace can be paused")),
        }
        Ok(json!(self.status()))
    }

    fn resume(&mut self) -> Result<Value, Error> {
        match self.state {
            State::Paused => {
                self.act(Vmm::cont)?;
                self.state = State::Running;
                let clock = ToGuest::Clock {
                    time_unix_ns: unix_ns(),
                };
                if let Err(e) = self.agent.send(&clock) {
                    // The workspace may close its own channel; it keeps a late clock.
                    let e = e.to_string();
                    log::line(
                        "warn",
                        self.slot,
                        "the guest did not take the time",
                        Some(&e),
                    );
                }
            }
            State::Running => {}
            _ => return Err(self.conflict("only a paused workspace can be resumed")),
        }
        Ok(json!(self.status()))
    }

    fn shutdown(&mut self, reply: T, grace_ms: u64, now: Instant) {
        let meanwhile = || Error::new(ErrorCode::Conflict, "the workspace was shut down meanwhile");
        self.archive_end(Err(meanwhile()));
        if let Some(w) = self.waiting.take() {
            self.answers.push((w.reply, Err(meanwhile())));
        }
        let grace = Duration::from_millis(grace_ms.min(SHUTDOWN_GRACE_MAX_MS));
        if self.exited() {
            let status = json!(self.status());
            return self.answers.push((reply, Ok(status)));
        }
        self.wait(reply, now, grace);
        let asked = match self.state {
            _ if grace.is_zero() => false,
            State::Running | State::Stopping => self.agent.send(&ToGuest::Shutdown).is_ok(),
            State::Paused => self.vmm.cont().is_ok() && self.agent.send(&ToGuest::Shutdown).is_ok(),
            _ => false,
        };
        self.state = State::Stopping;
        if !asked {
            self.end(Reason::Shutdown);
        }
    }

    fn on_message(&mut self, message: Result<FromGuest, crate::agent::Error>) {
        match (self.state, message) {
            (State::Booting, Ok(FromGuest::Booted { version })) => {
                log::line("info", self.slot, "the guest's agent runs", Some(&version));
                if self.rehearses {
                    return self.rehearse();
                }
                self.halt();
            }
            (State::Rehearsing, Ok(FromGuest::Rehearsed)) => self.halt(),
            (State::Attaching | State::Waking, Ok(FromGuest::Up(up))) => self.up(&up),
            (State::Stopping, Ok(FromGuest::Down)) => self.end(Reason::Shutdown),
            (State::Running, Ok(said)) => self.on_archive(&said),
            (
                State::Booting | State::Rehearsing | State::Attaching | State::Waking,
                Ok(FromGuest::Failed { code, message }),
            ) => {
                let code: String = code
                    .chars()
                    .filter(|c| c.is_ascii_alphanumeric() || *c == '_')
                    .take(32)
                    .collect();
                self.fail(
                    Error::new(
                        ErrorCode::BadGateway,
                        format!("the workspace's guest could not start ({code})"),
                    )
                    .detail(log::clean(&message)),
                );
            }
            (State::Booting | State::Rehearsing | State::Attaching, Ok(m)) => {
                // Debug text of a message of a hostile guest: cut.
                self.fail(out_of_turn(&log::clean(&format!(
                    "{m:?} in {:?}",
                    self.state
                ))));
            }
            (State::Booting | State::Rehearsing | State::Attaching, Err(e)) => {
                self.fail(agent_error(&e));
            }
            _ => {}
        }
    }

    fn up(&mut self, up: &Up) {
        self.state = State::Running;
        let steps = || up.steps.iter().take(STEPS_MAX);
        let told: Vec<String> = steps().map(|s| format!("{} {}", s.name, s.us)).collect();
        let told = format!(
            "{} µs to the VMM, in the guest: {}",
            self.disk_us,
            told.join(", ")
        );
        log::line("info", self.slot, "the workspace is up", Some(&told));
        self.answer(Ok(json!(Up {
            kernel: log::clean(&up.kernel),
            steps: Vec::new(),
        })));
    }

    fn on_end(&mut self, event: Event) {
        let (reason, what) = match event {
            Event::Shutdown => (Reason::Shutdown, "powered off"),
            Event::Reset => (Reason::Reset, "rebooted or panicked"),
            Event::Panic => (Reason::Panic, "panicked"),
            Event::Gone => (Reason::Lost, "lost its VMM"),
            Event::DiskError => return,
        };
        match self.state {
            State::Exited(_) => {}
            State::Stopping => self.end(Reason::Shutdown),
            State::Booting | State::Rehearsing | State::Attaching | State::Waking => {
                self.fail(Error::new(
                    ErrorCode::BadGateway,
                    format!("the guest {what} before it was up; start it again"),
                ))
            }
            _ => self.end(reason),
        }
    }

    /// One act on the VMM of a workspace; a VMM that fails it is ended.
    fn act(&mut self, act: impl FnOnce(&mut V) -> Result<(), crate::Error>) -> Result<(), Error> {
        let done = act(&mut self.vmm).map_err(|e| vmm_error(&e));
        if done.is_err() {
            self.end(Reason::Failed);
        }
        done
    }

    fn fail(&mut self, error: Error) {
        let text = format!("{error}: {}", error.detail.as_deref().unwrap_or("-"));
        log::line("error", self.slot, "the VM failed", Some(&text));
        self.answer(Err(error));
        self.end(Reason::Failed);
    }

    /// Ends the VMM; whoever waits learns how the VM is.
    fn end(&mut self, reason: Reason) {
        if self.archive.is_some() {
            self.archive_end(Err(Error::new(
                ErrorCode::VmUnavailable,
                "the workspace's VM went away; start it again",
            )));
        }
        if let Err(e) = self.vmm.quit() {
            let e = e.to_string();
            log::line(
                "error",
                self.slot,
                "the VMM did not end by itself",
                Some(&e),
            );
        }
        self.disk = None;
        self.memory_drop();
        self.state = State::Exited(reason);
        let status = json!(self.status());
        self.answer(Ok(status));
    }

    fn wait(&mut self, reply: T, now: Instant, after: Duration) {
        self.waiting = Some(Waiting {
            reply,
            deadline: now + after,
            after,
        });
    }

    fn answer(&mut self, answer: Result<Value, Error>) {
        if let Some(w) = self.waiting.take() {
            self.answers.push((w.reply, answer));
        }
    }

    fn exited(&self) -> bool {
        matches!(self.state, State::Exited(_))
    }

    fn conflict(&self, why: &str) -> Error {
        Error::new(ErrorCode::Conflict, format!("slot {}: {why}", self.slot))
            .detail(format!("state {:?}", self.state))
    }
}

fn vmm_error(e: &crate::Error) -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "the virtual machine failed; start the workspace again",
    )
    .detail(e)
}

fn agent_error(e: &crate::agent::Error) -> Error {
    match e {
        crate::agent::Error::TooLarge => Error::new(ErrorCode::TooLarge, e.to_string()),
        _ => out_of_turn(&e.to_string()),
    }
}

fn out_of_turn(detail: &str) -> Error {
    Error::new(
        ErrorCode::BadGateway,
        "the workspace's guest did not answer as an agent does; start it again",
    )
    .detail(detail)
}

fn unix_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[path = "vmctl_tests.rs"]
mod tests;
