//! The workspace's root: overlay of the base image and its disk, in a mount namespace of its own.
//!
//! The agent stays outside: its initramfs, `/disk` and `/base` are no part of what the workspace
//! sees. The namespace is kept by a descriptor, so it ends with the last process in it.
//!
//! ```text
//! agent's namespace          workspace's namespace
//! /       initramfs          /      overlay(/base, /disk/upper)
//! /base   erofs, ro          /proc /sys /dev /dev/pts /dev/shm /run
//! /disk   ext4
//! ```

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_move, mount_remount,
};
use rustix::thread::UnshareFlags;

use crate::boot::{BootError, mount, step};
use crate::fsroot::FsRoot;

/// A workspace's root.
pub struct Root {
    /// Its mount namespace.
    pub namespace: OwnedFd,
    /// Its root directory.
    pub files: FsRoot,
}

/// What a root is made of.
pub struct Parts<'a> {
    /// Where the base image is mounted.
    pub base: &'a Path,
    /// Where the writable file system is mounted.
    pub disk: &'a Path,
    /// A file to show as the kernel's boot id.
    pub boot_id: &'a Path,
    /// A place to put the root together.
    pub at: &'a Path,
}

/// Assembles the root.
///
/// # Errors
/// Which step failed.
pub fn assemble(parts: &Parts<'_>) -> Result<Root, BootError> {
    let (upper, work) = (parts.disk.join("upper"), parts.disk.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir_all(directory).map_err(step("making the overlay's directories"))?;
    }
    fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))
        .map_err(step("setting the root directory's mode"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        parts.base.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options)
        .map_err(|e| step("naming the overlay's directories")(io::Error::other(e)))?;
    // A thread of its own leaves the agent's namespace; the others stay.
    let (at, boot_id) = (parts.at.to_owned(), parts.boot_id.to_owned());
    let made = std::thread::spawn(move || assemble_here(&options, &at, &boot_id)).join();
    made.unwrap_or_else(|_| Err(step("assembling the root")(io::Error::other("panicked"))))
}

/// Runs in a thread that goes away.
fn assemble_here(options: &CString, at: &Path, boot_id: &Path) -> Result<Root, BootError> {
    let os = |what: &'static str| move |e: rustix::io::Errno| step(what)(e.into());
    // SAFETY: unsharing FS and NEWNS changes what paths mean for this thread alone, and this
    // thread ends after it has made the namespace; no memory or descriptor table is split.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
        .map_err(os("making a mount namespace"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(os("making mounts private"))?;
    let none = MountFlags::empty();
    mount("overlay", "overlay", at, none, Some(options)).map_err(step("mounting the overlay"))?;
    let nosuid = MountFlags::NOSUID;
    let closed = nosuid | MountFlags::NODEV | MountFlags::NOEXEC;
    for (kind, name, flags, data) in [
        ("proc", "proc", closed, None),
        ("sysfs", "sys", closed, None),
        ("devtmpfs", "dev", nosuid, None),
        (
            "devpts",
            "dev/pts",
            nosuid | MountFlags::NOEXEC,
            Some(c"ptmxmode=0666,mode=0620,gid=5"),
        ),
        (
            "tmpfs",
            "dev/shm",
            nosuid | MountFlags::NODEV,
            Some(c"mode=1777"),
        ),
        (
            "tmpfs",
            "run",
            nosuid | MountFlags::NODEV,
            Some(c"mode=0755"),
        ),
    ] {
        mount(kind, kind, &at.join(name), flags, data)
            .map_err(step(format!("mounting the workspace's /{name}")))?;
    }
    let shown = at.join("proc/sys/kernel/random/boot_id");
    mount_bind(boot_id, &shown).map_err(os("showing the boot id"))?;
    mount_remount(&shown, MountFlags::BIND | MountFlags::RDONLY | closed, c"")
        .map_err(os("closing the boot id"))?;
    // What switch_root does; so the root is the namespace's own, and not a chroot, in which the
    // kernel would refuse user namespaces.
    rustix::process::chdir(at).map_err(os("entering the new root"))?;
    mount_move(".", "/").map_err(os("moving the new root"))?;
    rustix::process::chroot(".").map_err(os("changing the root"))?;
    rustix::process::chdir("/").map_err(os("entering the root"))?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let files = rustix::fs::open("/", directory, Mode::empty()).map_err(os("opening the root"))?;
    let read = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::open("/proc/thread-self/ns/mnt", read, Mode::empty())
        .map_err(os("opening the mount namespace"))?;
    Ok(Root {
        namespace,
        files: FsRoot::new(files),
    })
}
