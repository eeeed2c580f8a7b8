//! Small files and directories of root's: read whole, replaced in one step, removed.

use crate::fault::{At as _, Result};
use crate::limits::SMALL_FILE_MAX_BYTES;
use rustix::fs::Mode;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Makes a directory (and its parents, 0755), whatever the umask; one that is there stays.
///
/// # Errors
/// The kernel's.
pub fn make_dir(dir: &Path, mode: u32) -> Result {
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
///
/// # Errors
/// A symbolic link; a file above 64 KiB.
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
///
/// # Errors
/// The file's.
pub fn write_small(path: &Path, text: &str, mode: u32, durable: bool) -> Result {
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
///
/// # Errors
/// The directory's.
pub fn sync_dir_of(path: &Path) -> std::io::Result<()> {
    std::fs::File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Removes a file or a directory tree; none is as good.
///
/// # Errors
/// The kernel's.
pub fn remove(path: &Path) -> Result {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_small_file_is_not_read_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        assert!(read_small(&dir.path().join("file")).unwrap().is_some());
        assert!(read_small(&dir.path().join("link")).is_err());
        assert_eq!(read_small(&dir.path().join("none")).unwrap(), None);
    }
}
