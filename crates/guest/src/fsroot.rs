//! The workspace's file system, reached only through a descriptor of its root.
//!
//! Every path is resolved by the kernel inside that root (`openat2`, `RESOLVE_IN_ROOT`): neither
//! `..` nor an absolute symlink nor a magic link leads to the agent's own initramfs.
//! Must never open by a path in the agent's namespace.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use crate::limits::PATH_MAX_BYTES;

/// How often a resolution that raced with a rename is tried again.
const RACE_TRIES_MAX: usize = 32;

/// The root.
#[derive(Debug)]
pub struct FsRoot(OwnedFd);

/// Why a text is no path that can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("path must be absolute, at most {PATH_MAX_BYTES} bytes, without NUL")]
pub struct BadPath;

impl FsRoot {
    /// The root is this directory.
    #[must_use]
    pub fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// Opens a directory of the agent's namespace as a root.
    ///
    /// # Errors
    /// If it can't be opened.
    pub fn open_directory(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens `path` inside the root.
    ///
    /// # Errors
    /// The kernel's answer; `InvalidInput` if it is no path.
    pub fn open(&self, path: &str, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path = check_path(path).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut tries = 0;
        loop {
            tries += 1;
            let opened =
                rustix::fs::openat2(self.0.as_fd(), path, flags | OFlags::CLOEXEC, mode, resolve);
            match opened {
                // A rename somewhere raced with a `..` of this path.
                Err(rustix::io::Errno::AGAIN) if tries < RACE_TRIES_MAX => {}
                other => return Ok(other?),
            }
        }
    }

    /// The directory that holds `path`'s last component, and that component. The component itself
    /// is not resolved. `None` for the root itself.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open_parent(&self, path: &str) -> io::Result<Option<(OwnedFd, OsString)>> {
        let Some((parent, name)) = split_parent(path) else {
            return Ok(None);
        };
        let parent = self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok(Some((
            parent,
            OsStr::from_bytes(name.as_bytes()).to_owned(),
        )))
    }

    /// Makes a directory and its parents.
    ///
    /// # Errors
    /// The kernel's answer; `NotADirectory` if something else is in the way.
    pub fn create_dir_all(&self, path: &str, mode: Mode) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match self.open(path, flags, Mode::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let Some((parent, name)) = split_parent(path) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // The depth of this recursion is bounded by the path's length, 2048 components; each
        // level holds one descriptor and a small frame.
        let parent = self.create_dir_all(parent, Mode::from_raw_mode(0o755))?;
        match rustix::fs::mkdirat(parent.as_fd(), name, mode) {
            // mkdir's mode goes through the umask; what was asked for does not.
            Ok(()) => rustix::fs::chmodat(parent.as_fd(), name, mode, AtFlags::empty())?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        self.open(path, flags, Mode::empty())
    }

    /// Puts a whole file in place at once: readers see the old one or the new one.
    ///
    /// # Errors
    /// The kernel's answer; nothing is left behind.
    pub fn replace(&self, path: &str, content: &[u8], mode: Mode) -> io::Result<()> {
        let mut staged = self.stage(path, mode)?;
        io::Write::write_all(&mut staged.file, content)?;
        staged.commit()
    }

    /// Like [`Self::replace`], unless the file has this content already.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn replace_if_changed(&self, path: &str, content: &[u8], mode: Mode) -> io::Result<()> {
        if let Ok(fd) = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            let mut held = Vec::new();
            let mut bounded = io::Read::take(File::from(fd), content.len() as u64 + 1);
            if io::Read::read_to_end(&mut bounded, &mut held).is_ok() && held == content {
                return Ok(());
            }
        }
        self.replace(path, content, mode)
    }

    /// A new file beside `path` that takes its place on [`Staged::commit`], and vanishes without.
    ///
    /// # Errors
    /// The kernel's answer; `IsADirectory` if a directory is there.
    pub fn stage(&self, path: &str, mode: Mode) -> io::Result<Staged> {
        let Some((parent, name)) = self.open_parent(path)? else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let there = rustix::fs::statat(parent.as_fd(), &name, AtFlags::SYMLINK_NOFOLLOW);
        if there.is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode).is_dir()) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let random = hex::encode(seal::random::bytes::<8>());
        let temporary = OsString::from_vec(format!(".casemate-{random}.tmp").into_bytes());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let owner = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(parent.as_fd(), &temporary, flags, owner)?;
        let staged = Staged {
            parent,
            temporary,
            name,
            file: File::from(file),
            committed: false,
        };
        rustix::fs::fchmod(staged.file.as_fd(), mode)?;
        Ok(staged)
    }
}

impl AsFd for FsRoot {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A file that is not in its place yet.
#[derive(Debug)]
pub struct Staged {
    parent: OwnedFd,
    temporary: OsString,
    name: OsString,
    /// Write the content here.
    pub file: File,
    committed: bool,
}

impl Staged {
    /// Puts it in its place.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn commit(mut self) -> io::Result<()> {
        let parent = self.parent.as_fd();
        rustix::fs::renameat(parent, &self.temporary, parent, &self.name)?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            // If even that fails, a file of ours is left, which is the least of the troubles.
            let _ = rustix::fs::unlinkat(self.parent.as_fd(), &self.temporary, AtFlags::empty());
        }
    }
}

/// Checks the form of a path: absolute, bounded, no NUL.
///
/// # Errors
/// If it is not.
pub fn check_path(path: &str) -> Result<&str, BadPath> {
    if path.starts_with('/') && path.len() <= PATH_MAX_BYTES && !path.contains('\0') {
        Ok(path)
    } else {
        Err(BadPath)
    }
}

/// `/a/b/` is (`/a`, `b`); `/` is nothing. A last component `.` or `..` names nothing that can be
/// made or removed, so it is nothing too.
fn split_parent(path: &str) -> Option<(&str, &str)> {
    let trimmed = path.trim_end_matches('/');
    let at = trimmed.rfind('/')?;
    let (parent, name) = (&trimmed[..at], &trimmed[at + 1..]);
    if name.is_empty() || name == "." || name == ".." {
        return None;
    }
    Some((if parent.is_empty() { "/" } else { parent }, name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn world() -> (tempfile::TempDir, FsRoot) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        std::fs::write(dir.path().join("root/secret"), "inside").unwrap();
        let root = FsRoot::open_directory(&dir.path().join("root")).unwrap();
        (dir, root)
    }

    fn read(root: &FsRoot, path: &str) -> io::Result<String> {
        let fd = root.open(path, OFlags::RDONLY, Mode::empty())?;
        let mut text = String::new();
        io::Read::read_to_string(&mut File::from(fd), &mut text)?;
        Ok(text)
    }

    #[test]
    fn nothing_leads_outside() {
        let (dir, root) = world();
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, dir.path().join("root").join(name)).unwrap();
        };
        link("../secret", "up");
        link("/secret", "absolute");
        link(dir.path().join("secret").to_str().unwrap(), "host");
        link("..", "dir");
        link("/proc/self/root", "magic");
        for path in [
            "/secret",
            "/../secret",
            "/up",
            "/absolute",
            "/dir/secret",
            "/dir/../secret",
        ] {
            assert_eq!(read(&root, path).unwrap(), "inside", "{path}");
        }
        assert!(read(&root, "/host").is_err());
        assert!(read(&root, "/magic/etc/hostname").is_err());
        for path in ["", "secret", "/a\0b", &format!("/{}", "a".repeat(5000))] {
            assert!(read(&root, path).is_err());
        }
    }

    #[test]
    fn a_staged_file_is_all_or_nothing() {
        let (dir, root) = world();
        let list = || std::fs::read_dir(dir.path().join("root")).unwrap().count();
        drop(root.stage("/new", Mode::from_raw_mode(0o644)).unwrap());
        assert_eq!(list(), 1);
        root.replace("/secret", b"changed", Mode::from_raw_mode(0o600))
            .unwrap();
        assert_eq!(
            (read(&root, "/secret").unwrap().as_str(), list()),
            ("changed", 1)
        );
        assert!(root.replace("/", b"", Mode::from_raw_mode(0o600)).is_err());
        root.create_dir_all("/a/b/c", Mode::from_raw_mode(0o700))
            .unwrap();
        assert!(
            root.replace("/a/b", b"", Mode::from_raw_mode(0o600))
                .is_err()
        );
        assert!(
            root.create_dir_all("/secret/x", Mode::from_raw_mode(0o700))
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn parents_hold_their_children(path in "/[a/.]{0,12}") {
            if let Some((parent, name)) = split_parent(&path) {
                prop_assert!(parent.starts_with('/'));
                prop_assert!(!name.contains('/') && !name.is_empty() && name != "..");
                prop_assert!(path.starts_with(parent));
            }
        }
    }
}
