//! One loop that reaps every child, as PID 1 must, and hands each exit to whoever spawned it.
//!
//! Nobody else in the process may wait for a child. A spawn and a reap exclude each other: so an
//! exit is never seen before its child is registered, `std`'s own wait for a child whose exec
//! failed is never robbed, and a registered pid is never one that was used again.

use std::collections::HashMap;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It returned this.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Exit {
    /// As a shell says it: 128 + the signal's number.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// The reaper. There is one: [`reaper`].
pub struct Reaper {
    children: Mutex<Children>,
    spawned: Condvar,
}

#[derive(Default)]
struct Children {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Counts spawns, so that the loop can't sleep through one.
    generation: u64,
}

/// The process's reaper; the first call starts its thread.
///
/// # Panics
/// If the thread can't be started.
pub fn reaper() -> &'static Reaper {
    static REAPER: OnceLock<&'static Reaper> = OnceLock::new();
    REAPER.get_or_init(|| {
        let reaper: &'static Reaper = Box::leak(Box::new(Reaper {
            children: Mutex::default(),
            spawned: Condvar::new(),
        }));
        std::thread::Builder::new()
            .name("reaper".into())
            .stack_size(64 << 10)
            .spawn(move || reaper.run())
            .expect("without its reaper the agent can't run a process");
        reaper
    })
}

impl Reaper {
    /// Runs `spawn`, which makes one child and returns its pid, and gives its exit in time.
    ///
    /// # Errors
    /// `spawn`'s.
    pub fn spawn<T>(
        &self,
        spawn: impl FnOnce() -> io::Result<(i32, T)>,
    ) -> io::Result<(T, oneshot::Receiver<Exit>)> {
        let mut children = self.lock();
        let (pid, made) = spawn()?;
        let (sender, receiver) = oneshot::channel();
        children.waiting.insert(pid, sender);
        children.generation += 1;
        self.spawned.notify_all();
        Ok((made, receiver))
    }

    /// Sends `signal` to the process group that `pid` leads, if `pid` was spawned here and is not
    /// reaped yet. Says whether.
    pub fn kill_group(&self, pid: i32, signal: Signal) -> bool {
        let children = self.lock();
        match Pid::from_raw(pid) {
            Some(group) if children.waiting.contains_key(&pid) => {
                rustix::process::kill_process_group(group, signal).is_ok()
            }
            _ => false,
        }
    }

    fn run(&self) {
        loop {
            let seen = self.lock().generation;
            let peek = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match rustix::process::waitid(WaitId::All, peek) {
                Ok(Some(_)) => {
                    self.reap_one();
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(_no_child) => {
                    let children = self.lock();
                    let wait = self.spawned.wait_while(children, |c| c.generation == seen);
                    drop(wait.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    fn reap_one(&self) {
        let mut children = self.lock();
        if let Ok(Some((pid, status))) = rustix::process::wait(rustix::process::WaitOptions::NOHANG)
        {
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or(0)),
            };
            if let Some(waiting) = children.waiting.remove(&pid.as_raw_nonzero().get()) {
                let _nobody_asks = waiting.send(exit);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
