//! Opening beneath a directory of root's: no symbolic link, no way up.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::path::Path;

/// Opens `name` beneath `dir`, closed on exec.
///
/// # Errors
/// The kernel's; a symbolic link, `..` or an absolute path in `name`.
pub fn open_beneath(dir: &Path, name: &str, flags: OFlags, mode: u32) -> std::io::Result<OwnedFd> {
    let base = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    beneath(base, name, flags, mode)
}

/// The same, beneath an open directory.
pub(crate) fn beneath(
    dir: impl AsFd,
    name: &str,
    flags: OFlags,
    mode: u32,
) -> std::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(
        dir,
        name,
        flags | OFlags::CLOEXEC,
        Mode::from_raw_mode(mode),
        resolve,
    )?)
}

/// Opens a directory that nobody but root can change what is in. Links that lead to it are root's
/// own and are followed: an operator may keep it on another disk.
///
/// # Errors
/// The kernel's; a directory of somebody else's, or that somebody else may write.
pub(crate) fn open_of_root(dir: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    if stat.st_uid != 0 || stat.st_mode & 0o022 != 0 {
        let why = format!(
            "{} must be root's and writable by root alone",
            dir.display()
        );
        return Err(std::io::Error::other(why));
    }
    Ok(fd)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nothing_is_opened_through_a_link_or_upwards() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        std::fs::write(inside.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", inside.join("link")).unwrap();
        std::os::unix::fs::symlink("..", inside.join("up")).unwrap();
        assert!(open_beneath(&inside, "file", OFlags::RDONLY, 0).is_ok());
        for name in [
            "link",
            "up/secret",
            "../secret",
            "/etc/passwd",
            "./../secret",
            "",
        ] {
            assert!(
                open_beneath(&inside, name, OFlags::RDONLY, 0).is_err(),
                "{name:?}"
            );
        }
    }
}
