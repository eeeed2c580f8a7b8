//! Puncture slots: where an epoch's secret lives, and the only place where it ever lived.
//!
//! `slots/<epoch>` holds 32 random bytes, 0600. A slot is never copied, logged or backed up; once
//! it is overwritten and unlinked, no backup of the state can be opened again, whoever holds the
//! unseal secret. On media that copy on write an overwrite may leave the old block behind until
//! it is reused; a slot in a TPM or HSM has no such residue.
//!
//! Must never destroy the slot that the state names.

use crate::error::KmsError;
use crate::keyring::Key;
use crate::limits::SLOT_FILES_MAX;
use service::files::{read_bounded, sync_dir, write_atomic};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The directory of slots.
pub struct Slots {
    dir: PathBuf,
}

impl Slots {
    /// The slots in `dir`, which is made if missing.
    ///
    /// # Errors
    /// The file system's.
    pub fn open(dir: PathBuf) -> Result<Self, KmsError> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&dir).map_err(KmsError::io("make", &dir))?;
        Ok(Self { dir })
    }

    /// Makes the secret of a new epoch, durably; one that a crash left there is replaced.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(&self, epoch: u64) -> Result<Key, KmsError> {
        let path = self.path(epoch);
        let secret = Key::random();
        write_atomic(&path, secret.expose(), 0o600).map_err(KmsError::io("write slot", &path))?;
        Ok(secret)
    }

    /// The secret of an epoch, unless it is destroyed.
    ///
    /// # Errors
    /// The file system's, or a slot that is not 32 bytes.
    pub fn read(&self, epoch: u64) -> Result<Option<Key>, KmsError> {
        let path = self.path(epoch);
        let bytes = match read_bounded(&path, 32) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(KmsError::io("read slot", &path))?,
        };
        let bytes = seal::Zeroizing::new(bytes);
        match Key::from_slice(&bytes) {
            Some(secret) => Ok(Some(secret)),
            None => Err(KmsError::Damaged {
                operation: "read slot",
                subject: path.display().to_string(),
            }),
        }
    }

    /// Overwrites and unlinks every slot but `keep`'s; returns how many.
    ///
    /// # Errors
    /// The file system's; whatever is left is destroyed by the next call.
    pub fn destroy_others(&self, keep: u64) -> Result<usize, KmsError> {
        let keep = self.path(keep);
        assert!(
            keep.is_file(),
            "the epoch in force has its slot before others go"
        );
        let mut gone = 0;
        let list = std::fs::read_dir(&self.dir).map_err(KmsError::io("list", &self.dir))?;
        for (n, entry) in list.enumerate() {
            let path = entry.map_err(KmsError::io("list", &self.dir))?.path();
            if n >= SLOT_FILES_MAX {
                return Err(KmsError::Unseal(
                    "the slot directory holds files that are not ours",
                ));
            }
            if path != keep {
                overwrite_and_unlink(&path).map_err(KmsError::io("destroy slot", &path))?;
                gone += 1;
            }
        }
        if gone > 0 {
            sync_dir(&self.dir).map_err(KmsError::io("sync", &self.dir))?;
        }
        Ok(gone)
    }

    fn path(&self, epoch: u64) -> PathBuf {
        self.dir.join(epoch.to_string())
    }
}

fn overwrite_and_unlink(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    let len = file.metadata()?.len().min(4_096);
    let mut noise = vec![0; usize::try_from(len).unwrap_or(4_096)];
    seal::random::fill(&mut noise);
    file.write_all(&noise)?;
    file.sync_all()?;
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_slot_lives_until_it_is_destroyed() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open(dir.path().join("slots")).unwrap();
        let one = slots.create(1).unwrap();
        assert_eq!(slots.read(1).unwrap().unwrap(), one);
        let mode = slots.path(1).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let two = slots.create(2).unwrap();
        std::fs::write(slots.dir.join(".3.tmp"), b"torn").unwrap();
        assert_eq!(slots.destroy_others(2).unwrap(), 2);
        assert!(slots.read(1).unwrap().is_none());
        assert_eq!(slots.read(2).unwrap().unwrap(), two);
        assert_eq!(slots.destroy_others(2).unwrap(), 0);
    }

    #[test]
    fn the_old_bytes_are_overwritten_before_the_name_goes() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open(dir.path().to_owned()).unwrap();
        let one = slots.create(1).unwrap();
        // A second name keeps the inode, as an undelete would.
        let outside = tempfile::tempdir_in(dir.path().parent().unwrap()).unwrap();
        let kept = outside.path().join("kept");
        std::fs::hard_link(slots.path(1), &kept).unwrap();
        slots.create(2).unwrap();
        slots.destroy_others(2).unwrap();
        assert_ne!(std::fs::read(kept).unwrap(), one.expose());
    }

    #[test]
    fn a_torn_slot_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open(dir.path().to_owned()).unwrap();
        std::fs::write(slots.path(1), [1; 31]).unwrap();
        assert!(slots.read(1).is_err());
    }
}
