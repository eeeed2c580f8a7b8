//! Where warden's things are, and the only ways it opens and writes them: beneath directories of
//! root's, never through a symbolic link.

use crate::fault::{At as _, Result, invalid};
use jail::limits::VOLUMES_UID;
pub(crate) use jail::open_beneath;
pub use jail::small::{make_dir, read_small, remove, sync_dir_of, write_small};
use rustix::fs::{Gid, OFlags, Uid};
use std::path::{Path, PathBuf};
use vmm::driver::Found;
pub use volumes::digests::Digests;
use volumes::serving::EXT4;

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
            (self.state().join(EXT4), 0o700),
        ] {
            make_dir(&dir, mode)?;
        }
        let (volumes, uid) = (self.root.join(jail::VOLUMES), VOLUMES_UID);
        make_dir(&volumes, 0o700)?;
        rustix::fs::chown(&volumes, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))
            .at("own", volumes.display())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

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
