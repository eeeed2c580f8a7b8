//! Processes by pidfd, and by (pid, start time) across a restart of warden.

use crate::ask::{Ask, Kind, OpenFor, Said};
use crate::channel;
use crate::fault::{At, Result};
use crate::limits::{ASK_MAX_BYTES, JAIL_WAIT, STDERR_MAX_BYTES};
use api::Error;
use api::vmctl::WardenOp;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd};
use rustix::net::SendFlags;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vmm::driver::Driver;

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

    /// Bounds the processes and threads of its user, in its user namespace.
    ///
    /// # Errors
    /// When it is gone, or the kernel refuses.
    pub fn nproc(&self, max: u64) -> Result {
        // A pid says nothing by itself: it is this process's as long as nobody reaped it.
        let pid = Pid::from_raw(self.proc.pid.cast_signed());
        let pid = pid.filter(|_| Proc::of(self.proc.pid) == Some(self.proc));
        let pid = pid.ok_or_else(|| Error::internal("the process is gone"))?;
        let limit = Rlimit {
            current: Some(max),
            maximum: Some(max),
        };
        match rustix::process::prlimit(Some(pid), Resource::Nproc, limit) {
            // Needs CAP_SYS_RESOURCE, which a container may lack: its control group bounds it.
            Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
            Err(e) => Err(e).at("bound the threads of process", self.proc.pid),
        }
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
    name: &'static str,
}

impl Waiting {
    /// Lets it become the program.
    ///
    /// # Errors
    /// Why it could not; it is dead then.
    pub fn go(self) -> Result<Handle> {
        let name = self.name;
        rustix::net::send(&self.sock, b"g", SendFlags::NOSIGNAL).at("release", name)?;
        let refused = |why: &str| Error::internal(format!("start {name}: {why}"));
        if !readable(self.sock.as_fd(), JAIL_WAIT) {
            return Err(refused("no answer in time"));
        }
        let (bytes, _) = channel::recv(self.sock.as_fd(), ASK_MAX_BYTES).at("start", name)?;
        if bytes.is_empty() {
            return Ok(self.handle);
        }
        match serde_json::from_slice(&bytes) {
            Ok(Said::Failed(why)) => Err(refused(&why)),
            _ => Err(refused("an answer out of turn")),
        }
    }
}

/// The launcher of an installation.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// `casemate-jail`.
    pub program: PathBuf,
    /// The installation's root.
    pub root: PathBuf,
}

impl Launcher {
    /// Starts a process of this kind, which joins `groups` and gets `fds`; it waits.
    ///
    /// # Errors
    /// The launcher's step that failed.
    pub fn spawn(&self, kind: Kind, groups: &[OwnedFd], fds: &[OwnedFd]) -> Result<Waiting> {
        let name = kind.name();
        let (sock, pid, pidfd) = self.launch(kind, groups, fds)?;
        let proc =
            Proc::of(pid).ok_or_else(|| Error::internal(format!("jail {name}: died at once")))?;
        Ok(Waiting {
            handle: Handle { proc, pidfd },
            sock,
            name,
        })
    }

    /// Opens the mount's one file as the slot's VMM, the only user that may.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open_mount(&self, slot: u16, access: OpenFor, mount: OwnedFd) -> Result<OwnedFd> {
        let (_, _, file) = self.launch(Kind::OpenMount { slot, access }, &[], &[mount])?;
        Ok(file)
    }

    /// Gives the VMM the mount's one file, the way its driver takes it: what vmctl is to be told,
    /// and with what.
    ///
    /// # Errors
    /// The step that failed.
    pub fn give_mount(
        &self,
        driver: Driver,
        slot: u16,
        vmm: &Handle,
        mount: OwnedFd,
    ) -> Result<(WardenOp, Option<OwnedFd>)> {
        if driver == Driver::Qemu {
            return Ok((
                WardenOp::DiskFd,
                Some(self.open_mount(slot, OpenFor::Disk, mount)?),
            ));
        }
        let vmm = vmm.try_clone().at("name the VMM of slot", slot)?.pidfd;
        self.launch(Kind::GiveMount { slot }, &[], &[vmm, mount])?;
        Ok((WardenOp::DiskMounted, None))
    }

    /// Moves the tap that a prepared VMM has opened by name to this network namespace, and its disk to
    /// where it opens it next.
    ///
    /// # Errors
    /// The step that failed; the VMM is not prepared.
    pub fn settle(&self, slot: u16, vmm: &Handle) -> Result {
        let vmm = vmm.try_clone().at("name the VMM of slot", slot)?.pidfd;
        self.launch(Kind::Settle { slot }, &[], &[vmm]).map(drop)
    }

    fn launch(
        &self,
        kind: Kind,
        groups: &[OwnedFd],
        fds: &[OwnedFd],
    ) -> Result<(OwnedFd, u32, OwnedFd)> {
        let name = kind.name();
        let (ours, theirs) = channel::pair().at("make a channel for", name)?;
        let mut launcher = Command::new(&self.program)
            .arg("--root")
            .arg(&self.root)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .at("run the launcher for", name)?;
        let ask = Ask {
            groups: groups.len(),
            kind,
        };
        let all: Vec<BorrowedFd<'_>> = groups.iter().chain(fds).map(AsFd::as_fd).collect();
        let answer = channel::send(&ours, &ask, &all).and_then(|()| {
            if readable(ours.as_fd(), JAIL_WAIT) {
                channel::recv(ours.as_fd(), ASK_MAX_BYTES)
            } else {
                Err(std::io::ErrorKind::TimedOut.into())
            }
        });
        if answer.is_err() {
            // It may hang; its child, if any, sees the channel end and exits.
            let _ = launcher.kill();
        }
        let _ = launcher.wait();
        let (bytes, mut sent) = answer.at("jail", name)?;
        let failed = |why: String| Error::internal(format!("jail {name}: {why}"));
        match (serde_json::from_slice(&bytes), sent.pop()) {
            (Ok(Said::Ready { pid }), Some(fd)) => Ok((ours, pid, fd)),
            (Ok(Said::Ready { .. }), None) => Err(failed("no descriptor came".into())),
            (Ok(Said::Failed(why)), _) => Err(failed(why)),
            (Err(e), _) => Err(failed(format!("launcher died ({e})"))),
        }
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

/// Turns SIGTERM and SIGINT into a descriptor; to be called before any thread is made.
///
/// # Errors
/// The descriptor's.
pub fn signals() -> Result<OwnedFd> {
    // SAFETY: an empty set is made before it is used; both calls get a pointer to it.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).at("make", "a signal descriptor");
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pipe that neither end waits on, for what a jailed process says: what does not fit is lost, so
/// it can fill nothing.
///
/// # Errors
/// When descriptors run out.
pub fn words() -> Result<(OwnedFd, OwnedFd)> {
    use rustix::pipe::PipeFlags;
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).at("make", "a pipe")
}

/// What is in the pipe, as text that can't harm a terminal.
#[must_use]
pub fn last_words(pipe: &OwnedFd) -> String {
    let mut buffer = vec![0u8; STDERR_MAX_BYTES];
    let n = rustix::io::read(pipe, &mut buffer).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..n])
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
