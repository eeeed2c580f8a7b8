//! VMM drivers, and the heart of vmctl.
//!
//! ```text
//! warden ── argv ──▶ the VMM in its jail ◀── QMP or API ── vmctl::Vm ◀── server ◀── host
//!                               │ virtio-serial or vsock               ▲
//!                               └──────────── agent channel ───────────┘
//! ```
//!
//! [`Vmm`] is the closed set of acts on a running VMM; [`qemu::Qemu`] does them over QMP,
//! [`firecracker::Firecracker`] over its API. [`driver`] says which one runs here and why.
//! [`vmctl::Vm`] is the state machine of one VM above it, [`server`] its two sockets.
//!
//! Must never: read guest memory, pass a caller's text to the VMM, hold a key, trust what the
//! guest or the VMM says, or wait without a bound.

#![forbid(unsafe_code)]

pub mod agent;
pub mod driver;
pub mod firecracker;
pub mod kvm;
pub mod limits;
pub mod log;
pub mod qemu;
pub mod sandbox;
pub mod server;
pub mod tsc;
pub mod vmctl;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// What can be done to a VMM: nothing else of its control socket is reachable.
pub trait Vmm {
    /// Loads the template's device state; the virtual CPUs stay stopped.
    ///
    /// # Errors
    /// The VMM's.
    fn restore(&mut self) -> Result<(), Error>;

    /// Writes the device state next to the template's memory. The virtual CPUs must be stopped.
    ///
    /// # Errors
    /// The VMM's.
    fn save(&mut self) -> Result<(), Error>;

    /// Lets the virtual CPUs run.
    ///
    /// # Errors
    /// The VMM's.
    fn cont(&mut self) -> Result<(), Error>;

    /// Stops the virtual CPUs.
    ///
    /// # Errors
    /// The VMM's.
    fn stop(&mut self) -> Result<(), Error>;

    /// Puts `disk` where the placeholder was: the guest's second disk. The virtual CPUs must be
    /// stopped. The VMM keeps the file open.
    ///
    /// # Errors
    /// The VMM's; a file that comes as this VMM takes none.
    fn disk_attach(&mut self, disk: &DiskFile, size_bytes: u64) -> Result<(), Error>;

    /// Writes memory and the devices' state to `file`, open for writing only and empty. The virtual CPUs must be stopped, and can go on afterwards.
    ///
    /// # Errors
    /// The VMM's; after [`Error::Refused`] it can go on as well.
    fn memory_save(&mut self, file: BorrowedFd<'_>) -> Result<(), Error>;

    /// Loads the devices' state beside the memory that it was started on; the virtual CPUs stay
    /// stopped, and want their disk.
    ///
    /// # Errors
    /// The VMM's.
    fn wake(&mut self) -> Result<(), Error>;

    /// Ends the VMM; gone already is good.
    ///
    /// # Errors
    /// It did not end in time.
    fn quit(&mut self) -> Result<(), Error>;

    /// Takes in what the control socket holds, without blocking, and gives the next event.
    fn event(&mut self) -> Option<Event>;

    /// The control socket, to wait on.
    fn control_fd(&self) -> BorrowedFd<'_>;
}

/// How the workspace's disk comes.
#[derive(Debug)]
pub enum DiskFile {
    /// As a descriptor: QEMU's way.
    Descriptor(OwnedFd),
    /// It lies in the jail where the VMM opens it by name: Firecracker's way.
    Mounted,
}

/// What a VMM tells unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The guest powered off.
    Shutdown,
    /// The guest rebooted, as it does after a kernel panic; the VMM ends instead.
    Reset,
    /// The guest said that it panicked.
    Panic,
    /// The disk answered the guest with an error.
    DiskError,
    /// The VMM is gone, or says things that are no control protocol.
    Gone,
}

/// Why an act on a VMM failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It did not answer in time.
    #[error(
        "VMM `{command}`: no answer in {} ms; close the slot and open another",
        after.as_millis()
    )]
    Timeout {
        /// The act.
        command: &'static str,
        /// The bound.
        after: Duration,
    },
    /// Its control socket closed.
    #[error("VMM `{command}`: it is gone; see its slot in warden's log")]
    Gone {
        /// The act.
        command: &'static str,
    },
    /// It refused.
    #[error("VMM `{command}` refused: {why}")]
    Refused {
        /// The act.
        command: &'static str,
        /// Its words, cut.
        why: String,
    },
    /// It sent what is no answer.
    #[error(
        "VMM `{command}`: malformed answer ({why}); close the slot, its VMM is not to be trusted"
    )]
    Malformed {
        /// The act.
        command: &'static str,
        /// What does not fit.
        why: String,
    },
    /// The system's.
    #[error("VMM `{command}`")]
    Io {
        /// The act.
        command: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
