//! From the kernel's hand-over to "booted": file systems, modules, the agent's channel, the base
//! image. Everything here runs before the template is saved, so it must never read a clock into
//! state, draw a random byte, or open the workspace's disk.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Instant;

use rustix::fs::Mode;
use rustix::mount::MountFlags;

use crate::channel::{self, Receiver, Sender};
use crate::limits::DEVICE_WAIT;
use crate::net;

/// Where the base image is mounted in the agent's namespace.
pub const BASE: &str = "/base";
/// The base image's device.
pub(crate) const BASE_DEVICE: &str = "/dev/vda";
const MODULES: &str = "/lib/modules/casemate";
/// Descriptors that the agent and each process of the workspace may have open.
const DESCRIPTORS_MAX: u64 = 65_536;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct BootError {
    /// Which.
    pub step: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Names the step that an error comes from.
pub(crate) fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> BootError {
    let step = step.into();
    move |source| BootError { step, source }
}

/// Mounts what the agent needs and loads the modules. First of all: nothing is there yet.
///
/// # Errors
/// Which step failed.
pub fn prepare() -> Result<(), BootError> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, kind, Path::new(at), MountFlags::empty(), None)
            // The first moments of PID 1, or the kernel itself, may have mounted it.
            .or_else(|e| {
                if e.raw_os_error() == Some(libc::EBUSY) {
                    Ok(())
                } else {
                    Err(e)
                }
            })
            .map_err(step(format!("mounting {at}")))?;
    }
    modules_load("order")?;
    // Only a machine that has one pays for it.
    if channel::vsock(Path::new(channel::VIRTIO_DEVICES)) {
        modules_load("order.vsock")?;
    }
    // Best effort: a kernel without IPv6 has no such file, and needs none.
    for which in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
    let limit = rustix::process::Rlimit {
        current: Some(DESCRIPTORS_MAX),
        maximum: Some(DESCRIPTORS_MAX),
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)
        .map_err(|e| step("raising the descriptor limit")(e.into()))?;
    net::loopback_up().map_err(step("bringing lo up"))?;
    net::link_up().map_err(step("bringing eth0 up"))
}

/// Opens the channel; from here on failures can be told.
///
/// # Errors
/// If there is none.
pub fn channel_open() -> Result<(Sender, Receiver), BootError> {
    channel::open().map_err(step("opening the agent's channel"))
}

/// Mounts the base image.
///
/// # Errors
/// Which step failed.
pub fn base_mount() -> Result<(), BootError> {
    let deadline = Instant::now() + DEVICE_WAIT;
    while !Path::new(BASE_DEVICE).exists() {
        if Instant::now() > deadline {
            return Err(step(format!("waiting for {BASE_DEVICE}"))(
                io::ErrorKind::TimedOut.into(),
            ));
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(BASE_DEVICE, "erofs", Path::new(BASE), flags, None)
        .map_err(step(format!("mounting {BASE_DEVICE} (erofs)")))
}

/// Mounts, making the directory if it is missing.
pub(crate) fn mount(
    source: &str,
    kind: &str,
    at: &Path,
    flags: MountFlags,
    data: Option<&CStr>,
) -> io::Result<()> {
    fs::create_dir_all(at)?;
    rustix::mount::mount(source, at, kind, flags, data)?;
    Ok(())
}

/// Loads kernel modules in the order that the image's file `list` names them.
fn modules_load(list: &str) -> Result<(), BootError> {
    let order = match fs::read_to_string(Path::new(MODULES).join(list)) {
        Ok(order) => order,
        // A kernel with everything built in.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(step("reading the modules' order")(e)),
    };
    for name in order.split_whitespace() {
        let failed = || step(format!("loading the module {name}"));
        if name.contains('/') {
            return Err(failed()(io::ErrorKind::InvalidInput.into()));
        }
        let file = File::open(Path::new(MODULES).join(name)).map_err(failed())?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(failed()(e.into())),
        }
    }
    Ok(())
}
