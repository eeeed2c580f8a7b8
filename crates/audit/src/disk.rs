//! The one door to the disk for whatever must survive a power cut.
//!
//! Every call is one step after which the process may be killed. Tests put a double behind it that
//! stops at the n-th step, and that forgets what was not synced.

use crate::limits::SYNC_LANES_MAX;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

#[cfg(test)]
pub(crate) mod double;

/// Mode of files that members of the log's group read.
pub const MODE_SHARED: u32 = 0o640;
/// Mode of directories that members of the log's group read; what is made in them is the group's.
pub const MODE_SHARED_DIR: u32 = 0o2750;

/// The disk.
#[derive(Clone, Default)]
pub struct Disk {
    #[cfg(test)]
    double: Option<std::sync::Arc<std::sync::Mutex<double::Double>>>,
}

impl Disk {
    /// Makes a directory that members of the log's group read, unless it is there.
    ///
    /// # Errors
    /// The file system's.
    pub fn dir_create(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        self.step()?;
        std::fs::create_dir(dir)?;
        std::fs::set_permissions(dir, Permissions::from_mode(MODE_SHARED_DIR))?;
        #[cfg(test)]
        self.tell(|d| d.created(dir, true));
        Ok(())
    }

    /// Writes a whole file (a leftover of the same name is replaced) and makes its content durable;
    /// its name is not, before it is renamed and the directory synced.
    ///
    /// # Errors
    /// The file system's.
    pub fn file_write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.step()?;
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE_SHARED)
            .open(path)?;
        #[cfg(test)]
        self.tell(|d| d.created(path, false));
        file.set_permissions(Permissions::from_mode(MODE_SHARED))?;
        file.write_all(bytes)?;
        self.step()?;
        file.sync_all()?;
        #[cfg(test)]
        self.tell(|d| d.synced(path));
        Ok(())
    }

    /// Does the same to each of `items`, several at a time: what is synced at once costs little more
    /// than one of them. Ends with the first error, when all have ended.
    ///
    /// # Errors
    /// What `act` says.
    pub fn each<T: Sync, E: Send>(
        &self,
        items: &[T],
        act: impl Fn(&T) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        #[cfg(test)]
        if self.double.is_some() {
            return items.iter().try_for_each(act); // In order, so that a seed replays.
        }
        let lanes = items.len().clamp(1, SYNC_LANES_MAX);
        let (first, rest) = items.split_at(items.len().div_ceil(lanes));
        std::thread::scope(|scope| {
            let act = &act;
            let others: Vec<_> = rest
                .chunks(first.len().max(1))
                .map(|lane| scope.spawn(move || lane.iter().try_for_each(act)))
                .collect();
            let mut result = first.iter().try_for_each(act);
            for other in others {
                let other = other.join().expect("no act panics");
                result = result.and(other);
            }
            result
        })
    }

    /// Gives a file its name.
    ///
    /// # Errors
    /// The file system's.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        std::fs::rename(from, to)?;
        #[cfg(test)]
        self.tell(|d| d.renamed(from, to));
        Ok(())
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// The file system's.
    pub fn dir_sync(&self, dir: &Path) -> io::Result<()> {
        self.step()?;
        service::files::sync_dir(dir)?;
        #[cfg(test)]
        self.tell(|d| d.dir_synced(dir));
        Ok(())
    }

    /// Adds bytes to the end of `file`, which was opened for nothing else.
    ///
    /// # Errors
    /// The file system's; a part of the bytes may then be there.
    pub fn append(&self, mut file: &File, bytes: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        let bytes = match self.tear(bytes) {
            Some(part) => {
                file.write_all(part)?;
                return Err(double::stopped());
            }
            None => bytes,
        };
        self.step()?;
        file.write_all(bytes)
    }

    /// Makes the bytes of `file` at `path` durable.
    ///
    /// # Errors
    /// The file system's. Nothing may be assumed of the file afterwards: whoever sees this stops.
    pub fn data_sync(&self, file: &File, path: &Path) -> io::Result<()> {
        self.step()?;
        file.sync_data()?;
        let _ = path;
        #[cfg(test)]
        self.tell(|d| d.synced(path));
        Ok(())
    }

    /// Cuts a file back to `len` bytes, durably.
    ///
    /// # Errors
    /// The file system's.
    pub fn cut(&self, path: &Path, len: u64) -> io::Result<()> {
        self.step()?;
        let file = OpenOptions::new().write(true).open(path)?;
        file.set_len(len)?;
        file.sync_all()?;
        #[cfg(test)]
        self.tell(|d| d.synced(path));
        Ok(())
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        #[cfg(test)]
        self.tell(|d| d.removed(path));
        Ok(())
    }

    /// Where the process may be killed.
    #[allow(clippy::unused_self, reason = "tests stop here")]
    fn step(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(d) = &self.double {
            return d
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .step();
        }
        Ok(())
    }
}
