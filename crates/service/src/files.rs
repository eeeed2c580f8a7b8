//! Files that survive a power cut: written beside, synced, renamed, and the directory synced.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Replaces `path` by `bytes` with permission bits `mode`, durably and at once.
///
/// # Errors
/// The file system's.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::other("no file name"))?;
    let temp = dir.join(format!(".{}.tmp", name.to_string_lossy()));
    // A leftover of an earlier crash is not ours to append to.
    match std::fs::remove_file(&temp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut f = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temp)?;
    f.set_permissions(std::fs::Permissions::from_mode(mode))?;
    f.write_all(bytes)?;
    f.sync_all()?;
    std::fs::rename(&temp, path)?;
    sync_dir(dir)
}

/// Makes a directory's entries durable.
///
/// # Errors
/// The file system's.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads at most `max` bytes of a file; a larger one is an error.
///
/// # Errors
/// The file system's, or [`io::ErrorKind::InvalidData`] above the bound.
pub fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    File::open(path)?.take(max + 1).read_to_end(&mut out)?;
    if out.len() as u64 > max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is larger than {max} bytes", path.display()),
        ));
    }
    Ok(out)
}

/// The 32 bytes kept in `path` (0600), made with fresh randomness if there is no such file.
///
/// # Errors
/// The file system's, or [`io::ErrorKind::InvalidData`] if the file is not 32 bytes.
pub fn seed_or_create(path: &Path) -> io::Result<seal::secret::SecretBytes<32>> {
    match read_bounded(path, 32) {
        Ok(mut bytes) => {
            let seed = seal::secret::SecretBytes::from_slice(&bytes).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} must hold 32 bytes; restore it from a backup",
                        path.display()
                    ),
                )
            });
            seal::Zeroize::zeroize(&mut bytes);
            seed
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let seed = seal::secret::SecretBytes::<32>::random();
            write_atomic(path, seed.expose(), 0o600)?;
            Ok(seed)
        }
        Err(e) => Err(e),
    }
}
