//! Digests of files at rest.

use jail::fault::{At as _, Result};
use rustix::fd::AsFd;
use seal::hash::Sha256;
use std::collections::HashMap;
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Mutex, PoisonError};

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
