//! Warden: root behind a closed enum of requests.
//!
//! It makes what only root can make (taps, firewall rules, jails, mounts, control groups), and
//! hands each to the one process it is for. Requests carry ids and numbers (`api::warden`); what
//! they name is looked up beneath directories that only root writes. It is synchronous, has no
//! runtime, runs in the fabric's network namespace and opens no network socket.
//!
//! Must never: hold a workspace key (grants pass sealed), take a string that becomes a path, a
//! command or a firewall rule, leave a half-made jail that runs, or keep a descriptor of a guest's
//! disk, memory or control channel once it is handed over.
#![allow(unsafe_code)]

pub mod attest;
pub mod cgroup;
pub mod diskproc;
mod fault;
pub mod jail;
pub mod journal;
pub mod layout;
pub mod limits;
pub mod net;
pub mod nft;
pub mod plans;
pub mod process;
pub mod seccomp;
pub mod server;
pub mod slots;
pub mod templates;
pub mod vm;
pub mod watch;

pub use attest::Machine;
pub use fault::Result;
pub use layout::Layout;
pub use net::{Network, network_of};
pub use slots::{Config, Warden};
pub use vm::Vmm;

use fault::At as _;
use rustix::fd::{FromRawFd as _, OwnedFd};

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
