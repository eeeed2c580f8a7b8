//! The mount that a disk process serves: one file, attached nowhere.

use crate::fault::{At, Result};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// A FUSE mount of one file that is attached nowhere.
pub struct Mount {
    /// The mount; closed, no path to the file is left.
    pub mount: OwnedFd,
    /// The server's connection.
    pub server: OwnedFd,
    /// Another, for the server to join to the same mount: a second queue.
    pub second: OwnedFd,
}

/// Makes a mount whose file only `uid` (real, effective and saved) may open.
///
/// # Errors
/// The step that failed.
pub fn of(uid: u32) -> Result<Mount> {
    let open = || {
        rustix::fs::open(
            "/dev/fuse",
            OFlags::RDWR | OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
    };
    let server = open().at("open", "/dev/fuse")?;
    let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).at("open", "fuse")?;
    let id = uid.to_string();
    for (key, value) in [
        ("source", "casemate"),
        ("fd", server.as_raw_fd().to_string().as_str()),
        ("rootmode", "100000"),
        ("user_id", &id),
        ("group_id", &id),
    ] {
        rustix::mount::fsconfig_set_string(&fs, key, value).at("configure fuse", key)?;
    }
    rustix::mount::fsconfig_create(&fs).at("create", "a fuse mount")?;
    let attrs = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attrs)
        .at("make", "a fuse mount")?;
    let second = open().at("open", "/dev/fuse")?;
    Ok(Mount {
        mount,
        server,
        second,
    })
}
