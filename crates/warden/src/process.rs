//! Processes by pidfd, and by (pid, start time) across a restart of warden.

use crate::fault::{At, Result};
use crate::jail::{self, Plan, Said};
use crate::limits::JAIL_WAIT;
use api::Error;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A process's name that is never used twice: pids are, start times are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proc {
    /// Its pid.
    pub pid: u32,
    /// Field 22 of its `stat`: clock ticks since boot.
    pub start: u64,
}

impl Proc {
    /// The process of that pid, as it is now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold anything; fields are counted behind it.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        let start = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, start })
    }

    /// A handle, if this very process still runs.
    #[must_use]
    pub fn handle(self) -> Option<Handle> {
        let pidfd = rustix::process::pidfd_open(
            Pid::from_raw(self.pid.cast_signed())?,
            PidfdFlags::empty(),
        );
        // Looked at after the pidfd was taken: the pid can't change hands in between unseen.
        (Self::of(self.pid)? == self).then_some(Handle {
            proc: self,
            pidfd: pidfd.ok()?,
        })
    }
}

/// A running process.
#[derive(Debug)]
pub struct Handle {
    /// Its name.
    pub proc: Proc,
    pidfd: OwnedFd,
}

impl Handle {
    /// Another handle to the same process.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            proc: self.proc,
            pidfd: self.pidfd.try_clone()?,
        })
    }

    /// For polling: readable when the process is gone.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Kills it and waits at most `wait`; whether it is gone.
    #[must_use]
    pub fn kill(&self, wait: Duration) -> bool {
        // Gone already is as good.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait_gone(wait)
    }

    /// Waits at most `wait` for its end, and reaps it; whether it is gone.
    #[must_use]
    pub fn wait_gone(&self, wait: Duration) -> bool {
        let gone = readable(self.pidfd(), wait);
        if gone {
            self.reap();
        }
        gone
    }

    /// Its end, if it was ours to be told; `None` for an adopted one.
    pub fn reap(&self) -> Option<i32> {
        let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = rustix::process::waitid(WaitId::PidFd(self.pidfd()), how).ok()??;
        status
            .exit_status()
            .or_else(|| status.terminating_signal().map(|s| 128 + s))
    }
}

/// A jailed child that waits for [`Waiting::go`]; dropped, it exits without having run.
pub struct Waiting {
    /// The child.
    pub handle: Handle,
    sock: OwnedFd,
}

impl Waiting {
    /// Lets it become the program.
    ///
    /// # Errors
    /// Why it could not; it is dead then.
    pub fn go(self, name: &str) -> Result<Handle> {
        rustix::net::send(&self.sock, b"g", SendFlags::NOSIGNAL).at("release", name)?;
        let refused = |why: &str| Error::internal(format!("start {name}: {why}"));
        if !readable(self.sock.as_fd(), JAIL_WAIT) {
            return Err(refused("no answer in time"));
        }
        let (bytes, _) = jail::recv(self.sock.as_fd(), 4096).at("start", name)?;
        if bytes.is_empty() {
            return Ok(self.handle);
        }
        match serde_json::from_slice(&bytes) {
            Ok(Said::Failed(why)) => Err(refused(&why)),
            _ => Err(refused("an answer out of turn")),
        }
    }
}

/// Runs the launcher on `plan`, and returns the child that waits.
///
/// # Errors
/// The launcher's step that failed.
pub fn spawn(launcher: &Path, name: &str, plan: &Plan, fds: &[BorrowedFd<'_>]) -> Result<Waiting> {
    let (sock, pid, mut sent) = launch(launcher, name, plan, fds)?;
    let pidfd = sent
        .pop()
        .ok_or_else(|| Error::internal(format!("jail {name}: no pidfd came")))?;
    let proc =
        Proc::of(pid).ok_or_else(|| Error::internal(format!("jail {name}: died at once")))?;
    Ok(Waiting {
        handle: Handle { proc, pidfd },
        sock,
    })
}

/// Has the launcher open a mount as `id`, and returns the file.
///
/// # Errors
/// The step that failed.
pub fn open_mount(
    launcher: &Path,
    name: &str,
    plan: &Plan,
    mount: BorrowedFd<'_>,
) -> Result<OwnedFd> {
    let (_, _, mut sent) = launch(launcher, name, plan, &[mount])?;
    sent.pop()
        .ok_or_else(|| Error::internal(format!("open {name}: no file came")))
}

fn launch(
    launcher: &Path,
    name: &str,
    plan: &Plan,
    fds: &[BorrowedFd<'_>],
) -> Result<(OwnedFd, u32, Vec<OwnedFd>)> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .at("make a channel for", name)?;
    let mut launcher = Command::new(launcher)
        .arg("jail")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .at("run the launcher for", name)?;
    let answer = jail::send(&ours, plan, fds).and_then(|()| {
        if readable(ours.as_fd(), JAIL_WAIT) {
            jail::recv(ours.as_fd(), 4096)
        } else {
            Err(std::io::ErrorKind::TimedOut.into())
        }
    });
    if answer.is_err() {
        // It may hang; its child, if any, sees the channel end and exits.
        let _ = launcher.kill();
    }
    let _ = launcher.wait();
    let (bytes, fds) = answer.at("jail", name)?;
    match serde_json::from_slice(&bytes) {
        Ok(Said::Ready { pid }) => Ok((ours, pid, fds)),
        Ok(Said::Failed(why)) => Err(Error::internal(format!("jail {name}: {why}"))),
        Err(e) => Err(Error::internal(format!("jail {name}: launcher died ({e})"))),
    }
}

/// Whether `fd` becomes readable (or its other end goes) within `wait`.
#[must_use]
pub fn readable(fd: BorrowedFd<'_>, wait: Duration) -> bool {
    let end = Instant::now() + wait;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match rustix::event::poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(n) => return n > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
