//! Warden's side of the channel.

use crate::wire::{Ask, How, MESSAGE_MAX_BYTES, Name, Said};
use api::Error;
use api::warden::Object;
use jail::ask::Kind;
use jail::channel;
use jail::fault::{At, Result, log};
use jail::limits::KILL_WAIT;
use jail::process::{Handle, Launcher, readable};
use model::WorkspaceId;
use rustix::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::path::PathBuf;
use std::time::Duration;

/// It answers within this: a rename may wait for a slow disk.
const ANSWER_WAIT: Duration = Duration::from_secs(60);

/// casemate-volumes, whichever process it is just now.
pub struct Client {
    launcher: Launcher,
    program: PathBuf,
    live: Option<Live>,
}

struct Live {
    handle: Handle,
    channel: OwnedFd,
}

/// An open object.
#[derive(Debug)]
pub struct Opened {
    /// Its volume, locked; the lock is the open file's, so it holds as long as any process has it.
    pub volume: OwnedFd,
    /// Its sidecar.
    pub sidecar: OwnedFd,
    /// Both are empty.
    pub fresh: bool,
}

impl Opened {
    /// The volume once more, to be written past the host's page cache; where its file system has no
    /// such way, by the same.
    ///
    /// # Errors
    /// The kernel's.
    pub fn direct(&self) -> Result<OwnedFd> {
        // The kernel's link to the open file: no name of its directory is looked at.
        let path = format!("/proc/self/fd/{}", self.volume.as_raw_fd());
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let open = |flags| rustix::fs::open(&path, flags, Mode::empty());
        match open(flags | OFlags::DIRECT) {
            Err(rustix::io::Errno::INVAL) => open(flags),
            opened => opened,
        }
        .at("open once more", "the volume")
    }
}

impl Client {
    /// `program` is started by the first request.
    #[must_use]
    pub fn new(launcher: Launcher, program: PathBuf) -> Self {
        Self {
            launcher,
            program,
            live: None,
        }
    }

    /// Opens the object's files.
    ///
    /// # Errors
    /// [`api::ErrorCode::Conflict`] while another process has it; `NotFound` when there is none to
    /// read; `DiskTampered` when a part of it is missing.
    pub fn open(&mut self, of: Name, how: How) -> Result<Opened> {
        let (said, fds) = self.ask(&Ask::Open { of, how })?;
        match (said, <[OwnedFd; 2]>::try_from(fds)) {
            (Said::Opened { fresh }, Ok([volume, sidecar])) => Ok(Opened {
                volume,
                sidecar,
                fresh,
            }),
            _ => Err(out_of_turn()),
        }
    }

    /// Makes what was begun the object, durably: that whose volume is `volume`, no other.
    ///
    /// # Errors
    /// [`api::ErrorCode::Conflict`] when it was not begun; the files'.
    pub fn keep(&mut self, of: Name, volume: &OwnedFd) -> Result {
        let inode = rustix::fs::fstat(volume).at("look at", &of)?.st_ino;
        self.ask(&Ask::Keep { of, inode }).map(drop)
    }

    /// Removes what was begun.
    ///
    /// # Errors
    /// The files'.
    pub fn forget_new(&mut self, of: Name) -> Result {
        self.ask(&Ask::ForgetNew { of }).map(drop)
    }

    /// Removes the object, durably; a process that has it keeps it to itself.
    ///
    /// # Errors
    /// The files'.
    pub fn spend(&mut self, of: Name) -> Result {
        self.ask(&Ask::Spend { of }).map(drop)
    }

    /// Removes all that was begun and that no process holds.
    ///
    /// # Errors
    /// The directory's.
    pub fn sweep_new(&mut self) -> Result {
        self.ask(&Ask::SweepNew).map(drop)
    }

    /// Removes one object of the workspace, or all, durably. None is as good.
    ///
    /// # Errors
    /// [`api::ErrorCode::Conflict`] while a process has one of them.
    pub fn erase(&mut self, workspace: WorkspaceId, of: Option<Name>) -> Result {
        self.ask(&Ask::Erase { workspace, of }).map(drop)
    }

    /// Bytes that the object takes up; 0 when there is none.
    ///
    /// # Errors
    /// The process's start's.
    pub fn bytes(&mut self, of: Name) -> Result<u64> {
        match self.ask(&Ask::Bytes { of })?.0 {
            Said::Bytes(bytes) => Ok(bytes),
            _ => Err(out_of_turn()),
        }
    }

    /// The objects that there are of the workspace.
    ///
    /// # Errors
    /// The process's start's.
    pub fn list(&mut self, workspace: WorkspaceId) -> Result<Vec<Object>> {
        match self.ask(&Ask::List { workspace })?.0 {
            Said::Objects(objects) => Ok(objects),
            _ => Err(out_of_turn()),
        }
    }

    /// Its process, for tests and for the operator.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.live.as_ref().map(|l| l.handle.proc.pid)
    }

    fn ask(&mut self, ask: &Ask) -> Result<(Said, Vec<OwnedFd>)> {
        if let Some(answer) = self.try_ask(ask) {
            return answer;
        }
        self.restart()?;
        self.try_ask(ask)
            .unwrap_or_else(|| Err(Error::internal("casemate-volumes died twice")))
    }

    /// `None`: the process is gone, or may as well be.
    fn try_ask(&self, ask: &Ask) -> Option<Result<(Said, Vec<OwnedFd>)>> {
        let live = self.live.as_ref()?;
        channel::send(&live.channel, ask, &[]).ok()?;
        if !readable(live.channel.as_fd(), ANSWER_WAIT) {
            return None;
        }
        let (bytes, fds) = channel::recv(live.channel.as_fd(), MESSAGE_MAX_BYTES).ok()?;
        match serde_json::from_slice(&bytes).ok()? {
            Said::Failed(why) => Some(Err(why)),
            said => Some(Ok((said, fds))),
        }
    }

    fn restart(&mut self) -> Result {
        if let Some(live) = self.live.take() {
            log(
                "volumes.gone",
                serde_json::json!({"pid": live.handle.proc.pid}),
            );
            let _ = live.handle.kill(KILL_WAIT);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let exe = rustix::fs::open(&self.program, flags, Mode::empty())
            .at("open", self.program.display())?;
        let (channel, theirs) = channel::pair().at("make a channel for", "casemate-volumes")?;
        let given = [exe, theirs];
        let handle = self.launcher.spawn(Kind::Volumes, &[], &given)?.go()?;
        self.live = Some(Live { handle, channel });
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            drop(live.channel);
            if !live.handle.wait_gone(KILL_WAIT) {
                let _ = live.handle.kill(KILL_WAIT);
            }
        }
    }
}

fn out_of_turn() -> Error {
    Error::internal("casemate-volumes spoke out of turn")
}
