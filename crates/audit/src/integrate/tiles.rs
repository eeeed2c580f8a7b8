//! A log's directory as files: tiles and bundles as they are read.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use tlog::limits::BUNDLE_BYTES_MAX;
use tlog::merkle::ReadError;
use tlog::tile::{Tile, TileSource};

/// The tiles below a log's directory; what was read once is kept.
pub struct Tiles {
    dir: PathBuf,
    seen: RefCell<HashMap<Tile, Vec<u8>>>,
}

impl Tiles {
    /// The tiles of the log in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Tiles {
        Tiles {
            dir: dir.into(),
            seen: RefCell::default(),
        }
    }
}

impl TileSource for Tiles {
    fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError> {
        if let Some(bytes) = self.seen.borrow().get(tile) {
            return Ok(Some(bytes.clone()));
        }
        let path = self.dir.join(tile.path());
        match service::files::read_bounded(&path, BUNDLE_BYTES_MAX as u64) {
            Ok(bytes) => {
                self.seen.borrow_mut().insert(*tile, bytes.clone());
                Ok(Some(bytes))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ReadError {
                subject: tile.path(),
                reason: e.to_string(),
            }),
        }
    }
}
