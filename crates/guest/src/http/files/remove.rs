//! Recursive removal, by descriptors: a directory that is swapped for a symlink on the way leads
//! nowhere.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::stat_at;
use crate::fsroot::FsRoot;
use crate::http::reply::Failure;
use crate::limits::DELETE_DEPTH_MAX;

/// What delete refuses (contract §3.2, R10).
const PROTECTED: &[&str] = &[
    "/", "/bin", "/sbin", "/usr", "/lib", "/lib64", "/etc", "/dev", "/proc", "/sys", "/boot",
    "/run",
];

/// Removes `path` and what is below it. A symlink is removed itself.
pub(super) fn remove(root: &FsRoot, path: &str) -> Result<(), Failure> {
    let failed = |e: &std::io::Error| Failure::file(e, path);
    let protected = || Failure::new(403, "forbidden", format!("{path} can't be deleted"));
    let parent = root.open_parent(path).map_err(|e| failed(&e))?;
    // The root itself, or a path that ends in `.` or `..`.
    let (parent, name) = parent.ok_or_else(protected)?;
    let name = CString::new(name.into_encoded_bytes()).map_err(Failure::bad_request)?;
    let target = stat_at(parent.as_fd(), &name).map_err(|e| failed(&e.into()))?;
    for one in PROTECTED {
        // By what it is and not by its name: `/x/../etc` and a link's `/link/etc` are `/etc`.
        let opened = root.open(one, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty());
        let same = opened.is_ok_and(|fd| {
            rustix::fs::fstat(&fd)
                .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (target.st_dev, target.st_ino))
        });
        if same {
            return Err(protected());
        }
    }
    remove_at(parent.as_fd(), &name, DELETE_DEPTH_MAX).map_err(|errno| match errno {
        Errno::MLINK => Failure::bad_request(format!("{path} is too deep; remove it by a command")),
        errno => failed(&errno.into()),
    })
}

/// Removes `name` in `directory`; `MLINK` if it is deeper than `depth`.
fn remove_at(directory: impl AsFd, name: &CString, depth: usize) -> Result<(), Errno> {
    let directory = directory.as_fd();
    match rustix::fs::unlinkat(directory, name.as_c_str(), AtFlags::empty()) {
        // Linux says ISDIR, POSIX PERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    if depth == 0 {
        return Err(Errno::MLINK);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner: OwnedFd = rustix::fs::openat(directory, name.as_c_str(), flags, Mode::empty())?;
    for entry in Dir::read_from(&inner)? {
        let entry = entry?;
        let child = entry.file_name();
        if child != c"." && child != c".." {
            match remove_at(&inner, &child.to_owned(), depth - 1) {
                // Somebody else was quicker.
                Err(Errno::NOENT) => {}
                other => other?,
            }
        }
    }
    rustix::fs::unlinkat(directory, name.as_c_str(), AtFlags::REMOVEDIR)
}
