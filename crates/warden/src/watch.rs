//! Watches every process of every slot by pidfd, and reaps it.

use crate::fault::{At, Result};
use crate::slots::{Warden, lock};
use jail::process::{Handle, Proc};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

/// What is watched.
pub struct Watch {
    list: Mutex<Vec<(u16, Handle)>>,
    /// Wakes the watcher when the list grows.
    wake: OwnedFd,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// The event descriptor's.
    pub fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).at("make", "an event descriptor")?;
        Ok(Self {
            list: Mutex::default(),
            wake,
        })
    }

    /// Watches a process of `slot` until it ends.
    ///
    /// # Errors
    /// The descriptor's.
    pub fn add(&self, slot: u16, handle: &Handle) -> Result {
        lock(&self.list).push((slot, handle.try_clone().at("watch", handle.proc.pid)?));
        self.wake();
        Ok(())
    }

    /// Wakes the watcher.
    pub fn wake(&self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for an event; the processes that ended.
    fn wait(&self) -> Vec<(u16, Proc, Option<i32>)> {
        // Copies, so that nobody waits for a lock that a poll holds.
        let watched: Vec<(u16, Handle)> = lock(&self.list)
            .iter()
            .filter_map(|(slot, h)| Some((*slot, h.try_clone().ok()?)))
            .collect();
        let mut polls: Vec<PollFd<'_>> = watched
            .iter()
            .map(|(_, h)| h.pidfd())
            .chain([self.wake.as_fd()])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        // An interrupted poll has no events; the next one will.
        let _ = rustix::event::poll(&mut polls, None);
        let mut counter = [0u8; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        let mut ended = Vec::new();
        for ((slot, handle), poll) in watched.iter().zip(&polls) {
            if !poll.revents().is_empty() {
                ended.push((*slot, handle.proc, handle.reap()));
            }
        }
        lock(&self.list).retain(|(_, h)| !ended.iter().any(|(_, p, _)| *p == h.proc));
        ended
    }
}

/// Starts the watcher.
///
/// # Errors
/// The thread's.
pub(crate) fn run(warden: &Arc<Warden>) -> Result {
    let weak: Weak<Warden> = Arc::downgrade(warden);
    let list = Arc::clone(warden.watch());
    let watch = move || {
        loop {
            for (slot, proc, status) in list.wait() {
                let Some(warden) = weak.upgrade() else { return };
                // A slot may be locked for long; the others' deaths must not wait for it.
                let _ = std::thread::Builder::new()
                    .name(format!("gone-{slot}"))
                    .spawn(move || warden.process_gone(slot, proc, status));
            }
        }
    };
    std::thread::Builder::new()
        .name("watch".into())
        .spawn(watch)
        .map(drop)
        .at("start", "the watcher")
}
