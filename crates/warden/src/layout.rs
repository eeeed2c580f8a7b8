//! Where warden's things are, and the only ways it opens and writes them: beneath directories of
//! root's, never through a symbolic link.

use crate::fault::{At as _, Result, invalid};
use crate::limits::SMALL_FILE_MAX_BYTES;
use jail::limits::VOLUMES_UID;
pub(crate) use jail::open_beneath;
use rustix::fd::AsFd;
use rustix::fs::{Gid, Mode, OFlags, Uid};
use seal::hash::Sha256;
use std::collections::HashMap;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use vmm::driver::Found;

/// The directories of one installation.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    run: PathBuf,
    lib: PathBuf,
    etc: PathBuf,
}

impl Layout {
    /// The installation under `root` (`/` or empty: the machine's own).
    #[must_use]
    pub fn new(root: &Path) -> Self {
        let root = if root.as_os_str().is_empty() {
            Path::new("/")
        } else {
            root
        };
        Self {
            root: root.into(),
            run: root.join("run/casemate"),
            lib: root.join("var/lib/casemate"),
            etc: root.join("etc/casemate"),
        }
    }

    /// Tells this installation's control groups from another's on the same machine.
    #[must_use]
    pub fn instance(&self) -> String {
        hex::encode(&seal::hash::sha256(self.lib.as_os_str().as_encoded_bytes())[..4])
    }

    /// The root itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `/run/casemate`.
    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// `/etc/casemate/casemate.toml`.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.etc.join("casemate.toml")
    }

    /// `/run/casemate/warden`: the socket, `drain`, and the empty directory for building roots.
    #[must_use]
    pub fn own_run(&self) -> PathBuf {
        self.run.join("warden")
    }

    /// `/run/casemate/vmctl`: the sockets of vmctl processes.
    #[must_use]
    pub fn vmctl(&self) -> PathBuf {
        self.run.join("vmctl")
    }

    /// `/var/lib/casemate/warden`: keys, journal, templates, builds.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.lib.join("warden")
    }

    /// `/var/lib/casemate/artifacts`: kernel, initramfs, images, the VMM.
    #[must_use]
    pub fn artifacts(&self) -> PathBuf {
        self.lib.join("artifacts")
    }

    /// Makes warden's own directories.
    ///
    /// # Errors
    /// The directory that could not be made.
    pub fn create(&self) -> Result {
        for (dir, mode) in [
            (self.run.clone(), 0o755),
            (self.own_run(), 0o755),
            (self.root.join(jail::SCRATCH), 0o700),
            (self.vmctl(), 0o755),
            (self.lib.clone(), 0o755),
            (self.state(), 0o700),
            (self.state().join("slots"), 0o700),
            (self.state().join("templates"), 0o700),
            (self.state().join("build"), 0o700),
            (self.state().join("ext4"), 0o700),
        ] {
            make_dir(&dir, mode)?;
        }
        let (volumes, uid) = (self.root.join(jail::VOLUMES), VOLUMES_UID);
        make_dir(&volumes, 0o700)?;
        rustix::fs::chown(&volumes, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
            .at("own", volumes.display())
    }
}

/// Makes a directory (and its parents, 0755), whatever the umask; one that is there stays.
pub(crate) fn make_dir(dir: &Path, mode: u32) -> Result {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(dir)
        .at("make", dir.display())?;
    rustix::fs::chmod(dir, Mode::from_raw_mode(mode)).at("set the mode of", dir.display())
}

/// Reads a small file of root's; `None` if it is not there.
pub fn read_small(path: &Path) -> Result<Option<String>> {
    let file = match std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
    {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).at("open", path.display()),
    };
    let mut text = String::new();
    file.take(SMALL_FILE_MAX_BYTES + 1)
        .read_to_string(&mut text)
        .at("read", path.display())?;
    if text.len() as u64 > SMALL_FILE_MAX_BYTES {
        return Err(api::Error::internal(format!(
            "{} is larger than 64 KiB",
            path.display()
        )));
    }
    Ok(Some(text))
}

/// Replaces a file in one step. `durable`: it survives a power cut from here on.
pub(crate) fn write_small(path: &Path, text: &str, mode: u32, durable: bool) -> Result {
    let temp = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&temp)?;
        file.write_all(text.as_bytes())?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&temp, path)?;
        if durable { sync_dir_of(path) } else { Ok(()) }
    };
    write().at("write", path.display())
}

/// Makes the entry for `path` in its directory durable.
pub(crate) fn sync_dir_of(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Removes a file or a directory tree; none is as good.
pub(crate) fn remove(path: &Path) -> Result {
    let gone = match std::fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at("remove", path.display()),
        _ => Ok(()),
    }
}

/// SHA-256 of a lowercase hex id, checked before it names a file.
pub(crate) fn check_digest_id(what: &str, id: &str) -> Result {
    if id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(invalid(format!(
        "{what} must be 64 lowercase hexadecimal digits"
    )))
}

/// What lies where Firecracker would.
///
/// # Errors
/// The file's.
pub fn found(layout: &Layout) -> Result<Found> {
    let (dir, name) = (layout.artifacts(), vmm::firecracker::pin::ARTIFACT);
    match open_beneath(&dir, name, OFlags::RDONLY, 0) {
        Ok(file) => Ok(Found::of(Some(&Digests::default().of(file, name)?))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Found::Absent),
        Err(e) => Err(e).at("open artifact", name),
    }
}

/// Digests of files that only root can write, each taken once per version of the file.
#[derive(Debug, Default)]
pub struct Digests {
    known: Mutex<HashMap<[u64; 6], String>>,
}

impl Digests {
    /// SHA-256 of all of the open file, hex.
    ///
    /// # Errors
    /// The file's.
    pub fn of(&self, fd: impl AsFd, name: &str) -> Result<String> {
        let owned = fd.as_fd().try_clone_to_owned().at("read", name)?;
        let mut file = std::fs::File::from(owned);
        let meta = file.metadata().at("read", name)?;
        let key = [
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime().cast_unsigned(),
            meta.mtime_nsec().cast_unsigned(),
            meta.ctime().cast_unsigned() << 30 | meta.ctime_nsec().cast_unsigned(),
        ];
        if let Some(known) = self
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return Ok(known.clone());
        }
        file.rewind().at("read", name)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            match file.read(&mut buffer).at("read", name)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        file.rewind().at("read", name)?;
        let digest = hex::encode(hash.finish());
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key, digest.clone());
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_small_file_is_not_read_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        assert!(read_small(&dir.path().join("file")).unwrap().is_some());
        assert!(read_small(&dir.path().join("link")).is_err());
        assert_eq!(read_small(&dir.path().join("none")).unwrap(), None);
    }

    #[test]
    fn a_file_is_hashed_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let digests = Digests::default();
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            digests
                .of(std::fs::File::open(&path).unwrap(), "f")
                .unwrap()
        };
        assert_eq!(of("abc"), hex::encode(seal::hash::sha256(b"abc")));
        assert_eq!(of("abcd"), hex::encode(seal::hash::sha256(b"abcd")));
    }

    proptest! {
        #[test]
        fn an_image_id_is_never_a_path(id in ".{0,80}") {
            if check_digest_id("image", &id).is_ok() {
                prop_assert!(id.len() == 64 && id.bytes().all(|b| b.is_ascii_alphanumeric()));
            }
        }
    }
}
