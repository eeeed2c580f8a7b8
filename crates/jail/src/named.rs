//! What a VMM needs that takes names and no descriptors: Firecracker.
//!
//! ```text
//! child, root of its own namespaces   tap0, persistent, its user's
//!   │ drops all                       /vmm/vsock_1024, listening
//!   ├─ helper, the same user in the same jail: waits for /vmm/api.sock, connects to it,
//!   │    sends (connection, listener) to vmctl, ends
//!   ▼ exec
//! asked by warden, as it runs         the disk's mount comes to /held/disk, which it can't open
//! asked by warden, prepared           the mount is moved onto the placeholder, /disk/volume;
//!                                     the tap, which it has opened, into the fabric
//! ```
//!
//! The disk answers its first open only, and a VMM opens the placeholder when it is prepared: hence
//! the two steps. In between the mount is the jail's, so that it outlives a warden.
//!
//! Nothing with rights follows a path that the VMM can change: the helper has none, `/disk` and
//! `/held` are root's, and the tap is taken from among the VMM's own descriptors.

use crate::channel::send_bytes;
use crate::files::beneath;
use crate::launch::{Step, at, attach};
use crate::limits::{API_POLL, API_WAIT, NOFILE_MAX};
use crate::plan::HELD;
use crate::tap;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, OFlags};
use rustix::process::PidfdGetfdFlags;
use rustix::thread::ThreadNameSpaceType;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;
use vmm::firecracker::Paths;
use vmm::firecracker::api::TAP;

/// What is made for a VMM in its jail, under which names.
#[derive(Debug)]
pub struct Named {
    /// Its tap, in its network namespace.
    pub tap: &'static str,
    /// Where its guest's connection to vmctl comes out.
    pub agent: String,
    /// The socket of its API, which it makes.
    pub control: String,
}

/// Makes the tap, for `id` to open; the caller is root of the network namespace that it is in.
pub(crate) fn tap_make(named: &Named, id: u32) -> Step {
    let flags = OFlags::RDWR | OFlags::NONBLOCK;
    let file = beneath(CWD, "dev/net/tun", flags, 0).map_err(at("open /dev/net/tun"))?;
    tap::make(&file, named.tap).map_err(at("make the tap"))?;
    tap::give(&file, id).map_err(at("give the tap away"))
}

/// Starts the helper, which is not this process any more. `to` leads to vmctl; `keep` is what the
/// helper must not hold.
pub(crate) fn helper(
    named: &Named,
    agent: UnixListener,
    to: BorrowedFd<'_>,
    keep: &[BorrowedFd<'_>],
) -> Step {
    // Whoever is to be the VMM reaps nobody.
    // SAFETY: a disposition that the kernel knows; no handler is involved.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // SAFETY: this process has one thread, so the child may go on in Rust.
    match unsafe { libc::fork() } {
        -1 => Err(format!(
            "start the helper: {}",
            std::io::Error::last_os_error()
        )),
        0 => {
            for fd in keep {
                // SAFETY: plain numbers; this process ends below and uses none of them.
                unsafe { libc::close(fd.as_raw_fd()) };
            }
            let told = connect(&named.control)
                .is_some_and(|api| send_bytes(to, b"vmm", &[api.as_fd(), agent.as_fd()]).is_ok());
            // SAFETY: _exit takes a number and does not return.
            unsafe { libc::_exit(i32::from(!told)) }
        }
        _ => Ok(()),
    }
}

/// The API's connection, once the VMM listens; none if it does not in time, or somebody else does.
fn connect(control: &str) -> Option<UnixStream> {
    let end = Instant::now() + API_WAIT;
    while Instant::now() < end {
        if let Ok(api) = UnixStream::connect(control) {
            // The VMM is the first process of the namespace that both are in.
            let peer = rustix::net::sockopt::socket_peercred(&api).ok()?;
            return (peer.pid == rustix::process::Pid::INIT).then_some(api);
        }
        std::thread::sleep(API_POLL);
    }
    None
}

/// Puts the disk's mount into the VMM's mount namespace, where the VMM can't open it.
pub(crate) fn hold(vmm: &OwnedFd, mount: &OwnedFd) -> Step {
    enter(vmm, ThreadNameSpaceType::MOUNT)?;
    let held = place(HELD).map_err(at("open the place of the disk's mount"))?;
    attach(mount, &held).map_err(at("hold the disk's mount"))
}

/// What follows once the VMM was prepared, and holds its tap and the placeholder of its disk: the
/// disk's mount goes where it opens its disk next, the tap to the network namespace that this process
/// is in, under the slot's name. From then on the tap goes when the VMM goes.
pub(crate) fn settle(slot: u16, vmm: &OwnedFd) -> Step {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let here = rustix::fs::open("/proc/self/ns/net", flags, rustix::fs::Mode::empty())
        .map_err(at("open the fabric"))?;
    let file = (0..NOFILE_MAX as i32)
        .filter_map(|n| rustix::process::pidfd_getfd(vmm, n, PidfdGetfdFlags::empty()).ok())
        .find(|fd| tap::is(fd, TAP))
        .ok_or("the VMM has not opened its tap; prepare it first")?;
    enter(vmm, ThreadNameSpaceType::MOUNT)?;
    let held = place(HELD).map_err(at("open the disk's mount"))?;
    let disk = place(&Paths::jail().disk).map_err(at("open the disk's place"))?;
    attach(&held, &disk).map_err(at("move the disk to its place"))?;
    tap::transient(&file).map_err(at("let the tap go with its VMM"))?;
    enter(vmm, ThreadNameSpaceType::NETWORK)?;
    tap::move_to(TAP, &here, &tap::name(slot)).map_err(at("move the tap"))
}

/// What is at that name of the root.
fn place(name: &str) -> std::io::Result<OwnedFd> {
    beneath(CWD, name.trim_start_matches('/'), OFlags::PATH, 0)
}

fn enter(of: &OwnedFd, which: ThreadNameSpaceType) -> Step {
    rustix::thread::move_into_thread_name_spaces(of.as_fd(), which)
        .map_err(at("enter the VMM's namespace"))
}
