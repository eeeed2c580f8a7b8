//! Starts processes of the workspace: in its mount namespace, with its environment, each the
//! leader of its own session and process group.
//!
//! Must never give a child a descriptor of the agent's, or a secret in its environment.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::thread::LinkNameSpaceType;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;

use crate::reap::{Exit, reaper};

/// The search path of a workspace's processes.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What every process of the workspace starts with.
pub struct Launcher {
    /// The workspace's mount namespace; none on a machine where the agent's own is the
    /// workspace's (tests).
    namespace: Option<OwnedFd>,
    environment: Vec<(String, String)>,
}

/// A process and our ends of its pipes.
pub struct Process {
    /// Its pid, and the id of its process group.
    pub pid: i32,
    /// To its standard input.
    pub stdin: pipe::Sender,
    /// From its standard output.
    pub stdout: pipe::Receiver,
    /// From its standard error.
    pub stderr: pipe::Receiver,
}

impl Launcher {
    /// A launcher into `namespace`, adding `env` (`K=V`; what has no `=` is left out) to the
    /// ordinary environment.
    #[must_use]
    pub fn new(namespace: Option<OwnedFd>, env: &[String]) -> Self {
        let mut environment: Vec<(String, String)> = [
            ("HOME", "/root"),
            ("PATH", PATH),
            ("LANG", "C.UTF-8"),
            ("USER", "root"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let given = env.iter().filter_map(|entry| entry.split_once('='));
        environment.extend(given.map(|(key, value)| (key.to_owned(), value.to_owned())));
        Self {
            namespace,
            environment,
        }
    }

    /// Starts `argv` with pipes. Needs a tokio runtime.
    ///
    /// # Errors
    /// If there is no such program, or the kernel refuses.
    pub fn spawn(&self, argv: &[String]) -> io::Result<(Process, oneshot::Receiver<Exit>)> {
        let mut command = self.command(argv)?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let (mut child, exit) = reaper().spawn(|| {
            let child = command.spawn()?;
            Ok((pid_of(&child), child))
        })?;
        let pid = pid_of(&child);
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("a pipe is missing"));
        };
        let process = Process {
            pid,
            stdin: pipe::Sender::from_owned_fd(stdin.into())?,
            stdout: pipe::Receiver::from_owned_fd(stdout.into())?,
            stderr: pipe::Receiver::from_owned_fd(stderr.into())?,
        };
        Ok((process, exit))
    }

    /// Starts `argv` with nothing to read, and whose output nobody keeps (SEE-1).
    ///
    /// # Errors
    /// If there is no such program, or the kernel refuses.
    pub fn spawn_detached(&self, argv: &[String]) -> io::Result<oneshot::Receiver<Exit>> {
        let mut command = self.command(argv)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let ((), exit) = reaper().spawn(|| Ok((pid_of(&command.spawn()?), ())))?;
        Ok(exit)
    }

    fn command(&self, argv: &[String]) -> io::Result<Command> {
        let (program, args) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(self.environment.iter().map(|(key, value)| (key, value)));
        let namespace = match &self.namespace {
            Some(fd) => Some(fd.try_clone()?),
            None => None,
        };
        let directories = [c"/root", c"/"].map(CString::from);
        // SAFETY: after fork and before exec, `enter` makes system calls only: it allocates
        // nothing and takes no lock.
        unsafe {
            command.pre_exec(move || enter(namespace.as_ref().map(AsFd::as_fd), &directories));
        }
        Ok(command)
    }
}

/// In the child: a session of its own, the workspace's namespace, and the first directory there is.
fn enter(namespace: Option<BorrowedFd<'_>>, directories: &[CString]) -> io::Result<()> {
    rustix::process::setsid()?;
    if let Some(namespace) = namespace {
        let mount = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace, mount)?;
    }
    for directory in directories {
        if rustix::process::chdir(directory.as_c_str()).is_ok() {
            break;
        }
    }
    Ok(())
}

fn pid_of(child: &std::process::Child) -> i32 {
    i32::try_from(child.id()).expect("a Linux pid is at most 2^22")
}
