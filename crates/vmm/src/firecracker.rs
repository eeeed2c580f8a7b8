//! The Firecracker driver: its API over one connected socket.
//!
//! ```text
//!          cont: machine(), InstanceStart
//!  Fresh ─────────────────────────────────▶ Running ◀──cont── Stopped ──save──▶ (ended by vmctl)
//!    │ restore: snapshot/load                   └────stop────▶  ▲  disk_attach, limit
//!    └──────────────────────────────────────────────────────────┘
//! ```
//!
//! What differs from QEMU, and why:
//!
//! - Firecracker takes no descriptors, only paths; so what QEMU inherits lies in its jail's root
//!   under the names of [`Paths::jail`]. The workspace's disk is a FUSE file that warden moves onto
//!   [`Paths::disk`] in the jail's mount namespace before the attach; reopening the drive's path
//!   then finds it. The disk answers its first open alone, and that is this one.
//! - The agent's channel is vsock: the guest connects to port
//!   [`AGENT_PORT`], which Firecracker forwards to the socket `<vsock>_<port>` that listens
//!   for vmctl ([`Paths::agent`]). A restore resets vsock, so the agent connects again.
//! - There are no events: a guest that powers off, reboots or panics ends Firecracker, and all that
//!   is seen here is [`Event::Gone`]. Nor is there a command that ends it: [`Vmm::quit`] stops the
//!   virtual CPUs and lets the connection go; warden ends the process when the slot is closed.
//!
//! Must never send what is not in [`api`], configure MMDS, or run another version than
//! [`pin::VERSION`].

pub mod api;
pub mod http;
pub mod pin;

use crate::limits::API_CONNECT_MAX;
use crate::qemu::How;
use crate::qemu::qmp::readable;
use crate::{DiskFile, Error, Event, Vmm};
use http::Http;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

/// The vsock port that vmctl hears the guest's agent on.
pub const AGENT_PORT: u32 = ::api::agent::VSOCK_PORT;

/// Where Firecracker finds its files. It opens nothing else by name but its devices
/// (`/dev/kvm`, `/dev/net/tun`, `/dev/null`, `/dev/urandom`).
#[derive(Debug, Clone)]
pub struct Paths {
    /// Its API; it makes the socket.
    pub control: String,
    /// The base image.
    pub image: String,
    /// The workspace's disk: a placeholder of [`crate::limits::DISK_MAX_BYTES`] until the attach.
    /// In a directory of its own, since Landlock judges what is mounted there by the directory.
    pub disk: String,
    /// The kernel, an uncompressed ELF file.
    pub kernel: String,
    /// Its first file system, with the agent.
    pub initramfs: String,
    /// The template's memory: 0444 to restore, writable to build.
    pub memory: String,
    /// The template's device state, the same.
    pub state: String,
    /// The vsock device's socket; Firecracker makes it, nobody connects to it.
    pub vsock: String,
}

impl Paths {
    /// As warden lays the jail out.
    #[must_use]
    pub fn jail() -> Self {
        let s = String::from;
        Self {
            control: s("/vmm/api.sock"),
            image: s("/image/base.erofs"),
            disk: s("/disk/volume"),
            kernel: s("/kernel/vmlinux"),
            initramfs: s("/kernel/initramfs.cpio"),
            memory: s("/template/memory"),
            state: s("/template/state"),
            vsock: s("/vmm/vsock"),
        }
    }

    /// Where the guest's connection to [`AGENT_PORT`] comes out.
    #[must_use]
    pub fn agent(&self) -> String {
        format!("{}_{AGENT_PORT}", self.vsock)
    }
}

/// What a workspace may move; `None` is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Disk, bytes/s, reads and writes together.
    pub disk_bytes_per_s: Option<NonZeroU64>,
    /// Disk, requests/s.
    pub disk_ops_per_s: Option<NonZeroU64>,
    /// Network, bytes/s each way.
    pub net_bytes_per_s: Option<NonZeroU64>,
    /// Network, packets/s each way.
    pub net_packets_per_s: Option<NonZeroU64>,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct Spec {
    /// How it comes up.
    pub how: How,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs, at most [`crate::limits::CPUS_MAX_FIRECRACKER`].
    pub cpus: u32,
    /// Whether it has a link, [`api::TAP`]. A VM without is for tests.
    pub tap: bool,
    /// What it may move.
    pub limits: Limits,
    /// Its files.
    pub paths: Paths,
}

/// Firecracker's arguments, without the program's name: the same for every VM. Its own filter of
/// system calls stays on.
#[must_use]
pub fn argv(paths: &Paths) -> Vec<String> {
    // Its log repeats requests and goes to stdout; faults come back as answers.
    ["--id", "vm", "--level", "Off", "--api-sock", &paths.control]
        .map(String::from)
        .into()
}

/// Receives the API's connection and the agent's listener from the helper in the VMM's jail.
///
/// # Errors
/// They did not come in time: the VMM is gone, or never listened.
pub fn connected(from: &OwnedFd) -> std::io::Result<(UnixStream, UnixListener)> {
    if !readable(from, Instant::now() + API_CONNECT_MAX)? {
        return Err(std::io::ErrorKind::TimedOut.into());
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0u8; 8];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(from, &mut [IoSliceMut::new(&mut word)], &mut control, flags)?;
    let mut came = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            came.extend(fds);
        }
    }
    match <[OwnedFd; 2]>::try_from(came) {
        Ok([api, agent]) => Ok((api.into(), agent.into())),
        Err(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Names the machine that a template is a state of: the version and all that is said before the
/// start.
#[must_use]
pub fn machine(spec: &Spec) -> String {
    let mut text = format!("firecracker {}\n", pin::VERSION);
    for call in api::machine(spec) {
        text.push_str(&format!("{} {:?}\n", call.path, call.body));
    }
    text
}

/// One Firecracker, through its API.
pub struct Firecracker {
    http: Http,
    spec: Spec,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Fresh,
    Stopped,
    Running,
}

/// What it says of itself.
#[derive(Deserialize)]
struct InstanceInfo {
    vmm_version: String,
    state: String,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

impl Firecracker {
    /// Greets the Firecracker at the other end of `control`.
    ///
    /// # Errors
    /// It does not answer as [`pin::VERSION`] does before a start, in time.
    pub fn new(control: UnixStream, spec: Spec) -> Result<Self, Error> {
        let mut vmm = Self {
            http: Http::new(control)?,
            spec,
            state: State::Fresh,
        };
        let call = api::instance();
        let command = call.command;
        let body = vmm.call(&call)?;
        let info: InstanceInfo = parse(command, &body)?;
        if info.vmm_version != pin::VERSION {
            return Err(Error::Malformed {
                command,
                why: format!(
                    "version {} is not {}",
                    crate::log::clean(&info.vmm_version),
                    pin::VERSION
                ),
            });
        }
        if info.state != "Not started" {
            return Err(Error::Malformed {
                command,
                why: format!("it is {:?} already", crate::log::clean(&info.state)),
            });
        }
        Ok(vmm)
    }

    /// Sets what the workspace may move, from now on. The VM must have been started or restored.
    ///
    /// # Errors
    /// The VMM's.
    pub fn limit(&mut self, limits: &Limits) -> Result<(), Error> {
        self.act(&api::disk_limit(limits))?;
        if self.spec.tap {
            self.act(&api::net_limit(limits))?;
        }
        Ok(())
    }

    /// One request that changes something.
    fn act(&mut self, call: &api::Call) -> Result<(), Error> {
        let body = self.call(call)?;
        if !body.is_empty() {
            self.http.close();
            return Err(Error::Malformed {
                command: call.command,
                why: "an answer with a body".into(),
            });
        }
        Ok(())
    }

    /// One request; its answer's body. A fault is [`Error::Refused`].
    fn call(&mut self, call: &api::Call) -> Result<Vec<u8>, Error> {
        let command = call.command;
        let text = call.body.as_ref().map(ToString::to_string);
        let body = text.as_ref().map(String::as_bytes);
        let answer = self
            .http
            .exchange(command, call.method, call.path, body, call.limit)?;
        match answer.status {
            200 | 204 => Ok(answer.body),
            status => {
                let fault = parse::<Fault>(command, &answer.body);
                let why = fault.map_or_else(|_| format!("status {status}"), |f| f.fault_message);
                Err(Error::Refused {
                    command,
                    why: crate::log::clean(&why),
                })
            }
        }
    }

    /// Refuses what the VM's state does not allow; a VMM that is gone allows nothing.
    fn expect(&mut self, command: &'static str, state: State) -> Result<(), Error> {
        if self.http.ended() {
            return Err(Error::Gone { command });
        }
        if self.state == state {
            return Ok(());
        }
        Err(Error::Refused {
            command,
            why: format!("the VM is {:?}, not {state:?}", self.state),
        })
    }
}

/// No measured way to put its memory behind `casemate-disk` yet.
fn no_sleep(command: &'static str) -> Error {
    Error::Refused {
        command,
        why: "this driver saves no memory of workspaces".into(),
    }
}

impl Vmm for Firecracker {
    fn restore(&mut self) -> Result<(), Error> {
        self.expect("restore", State::Fresh)?;
        self.act(&api::snapshot_load(&self.spec))?;
        self.state = State::Stopped;
        Ok(())
    }

    fn save(&mut self) -> Result<(), Error> {
        self.expect("save", State::Stopped)?;
        self.act(&api::snapshot_create(&self.spec))
    }

    fn cont(&mut self) -> Result<(), Error> {
        match self.state {
            State::Running => return self.expect("resume", State::Running),
            State::Stopped => self.act(&api::resume())?,
            State::Fresh if self.spec.how == How::Template => {
                return Err(Error::Refused {
                    command: "start",
                    why: "it was to be restored first".into(),
                });
            }
            State::Fresh => {
                for call in api::machine(&self.spec) {
                    self.act(&call)?;
                }
                self.act(&api::start())?;
            }
        }
        self.state = State::Running;
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        if self.state == State::Stopped {
            return self.expect("pause", State::Stopped);
        }
        self.expect("pause", State::Running)?;
        self.act(&api::pause())?;
        self.state = State::Stopped;
        Ok(())
    }

    fn disk_attach(&mut self, disk: &DiskFile, _: u64) -> Result<(), Error> {
        self.expect("drives/disk", State::Stopped)?;
        if let DiskFile::Descriptor(_) = disk {
            return Err(Error::Refused {
                command: "drives/disk",
                why: "Firecracker takes no descriptors".into(),
            });
        }
        self.act(&api::disk_reopen(&self.spec))
    }

    fn memory_save(&mut self, _: BorrowedFd<'_>) -> Result<(), Error> {
        Err(no_sleep("memory_save"))
    }

    fn wake(&mut self) -> Result<(), Error> {
        Err(no_sleep("wake"))
    }

    fn quit(&mut self) -> Result<(), Error> {
        let stopped = match self.state {
            State::Running => self.stop(),
            State::Fresh | State::Stopped => Ok(()),
        };
        self.http.close();
        match stopped {
            Err(Error::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    fn event(&mut self) -> Option<Event> {
        self.http.ended().then_some(Event::Gone)
    }

    fn control_fd(&self) -> BorrowedFd<'_> {
        self.http.fd()
    }
}

fn parse<T: serde::de::DeserializeOwned>(command: &'static str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| Error::Malformed {
        command,
        why: crate::log::clean(&e.to_string()),
    })
}
