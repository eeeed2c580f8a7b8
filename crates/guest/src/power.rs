//! The end: every process, then every file system, then the machine.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Signal, WaitId, WaitIdOptions};
use rustix::system::RebootCommand;

use crate::attach::DISK;
use crate::channel::{self, VIRTIO_DEVICES};
use crate::limits::{SHUTDOWN_GRACE, UNMOUNT_WAIT};

const POLL: Duration = Duration::from_millis(5);

/// Ends every process but this one: SIGTERM, a grace, SIGKILL. Only for PID 1.
pub fn processes_end() {
    let deadline = Instant::now() + SHUTDOWN_GRACE;
    // SAFETY: kill takes no memory; as PID 1, -1 means all but this process and kernel threads.
    unsafe { libc::kill(-1, Signal::TERM.as_raw()) };
    while others() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    // SAFETY: as above.
    unsafe { libc::kill(-1, Signal::KILL.as_raw()) };
    let deadline = Instant::now() + SHUTDOWN_GRACE;
    while others() && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
}

/// Whether a process of the workspace is left: each descends from a child of PID 1.
fn others() -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    !matches!(
        rustix::process::waitid(WaitId::All, look),
        Err(rustix::io::Errno::CHILD)
    )
}

/// Syncs the disk and lets it go: clean on the medium when this returns, even if something still
/// holds it.
pub fn disk_release() {
    rustix::fs::sync();
    let deadline = Instant::now() + UNMOUNT_WAIT;
    while rustix::mount::unmount(DISK, UnmountFlags::empty()).is_err() {
        if !Path::new(DISK).join("upper").exists() {
            return; // Not mounted.
        }
        if Instant::now() > deadline {
            // Read-only makes ext4 write its journal out as an unmount does.
            let flags = MountFlags::RDONLY;
            let _ = rustix::mount::mount_remount(DISK, flags, c"");
            if let Ok(fd) = rustix::fs::open(DISK, OFlags::RDONLY, Mode::empty()) {
                let _ = rustix::fs::syncfs(fd);
            }
            return;
        }
        std::thread::sleep(POLL);
    }
}

/// Turns the machine off; does not return.
pub fn off() -> ! {
    // Without ACPI "off" only halts, and so it does with Firecracker's, which has no power-off (and
    // a vsock, by which it is known); a reset ends either VMM.
    let acpi = Path::new("/sys/firmware/acpi").exists();
    let first = if acpi && !channel::vsock(Path::new(VIRTIO_DEVICES)) {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    loop {
        let _ = rustix::system::reboot(first);
        let _ = rustix::system::reboot(RebootCommand::Restart);
        std::thread::sleep(Duration::from_secs(1));
    }
}
