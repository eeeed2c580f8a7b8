//! A log's directory as files: tiles and bundles as they are read.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tlog::limits::{BUNDLE_BYTES_MAX, NOTE_BYTES_MAX};
use tlog::merkle::ReadError;
use tlog::tile::{Kind, Tile, TileSource};
use tlog::verify::{CHECKPOINT_PATH, LogReader};

/// Deepest nesting below `tile/`: level, seven groups of a number, `.p`.
const DEPTH_MAX: usize = 12;

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

/// A log's directory, or a copy of one, for the offline verifier. A partial tile that has made way
/// for the full one is read from that, as tlog-tiles asks of readers: the log may be growing.
pub struct Directory {
    dir: PathBuf,
}

impl Directory {
    /// The log in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Directory {
        Directory { dir: dir.into() }
    }
}

impl LogReader for Directory {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        let read = |path: &str, max: usize| {
            service::files::read_bounded(&self.dir.join(path), max as u64).ok()
        };
        if path == CHECKPOINT_PATH {
            return read(path, NOTE_BYTES_MAX);
        }
        if let Some(bytes) = read(path, BUNDLE_BYTES_MAX) {
            return Some(bytes);
        }
        let tile = Tile::parse(path).ok().filter(Tile::is_partial)?;
        let full = read(&tile.full().path(), BUNDLE_BYTES_MAX)?;
        beginning(&tile, full)
    }

    fn list(&self) -> Vec<String> {
        let mut out = Vec::new();
        walk(&self.dir, Path::new("tile"), DEPTH_MAX, &mut out);
        out.sort();
        out
    }
}

/// The bytes of the partial `tile` from those of the full one.
fn beginning(tile: &Tile, mut full: Vec<u8>) -> Option<Vec<u8>> {
    let len = match tile.kind() {
        Kind::Hashes(_) => usize::from(tile.width()) * tlog::limits::HASH_BYTES,
        Kind::Entries => tile
            .full()
            .bundle_decode(&full)
            .ok()?
            .iter()
            .take(usize::from(tile.width()))
            .map(|entry| 2 + entry.len())
            .sum(),
    };
    full.truncate(len);
    Some(full)
}

/// All files below `dir/at`, as paths relative to `dir`.
fn walk(dir: &Path, at: &Path, depth: usize, out: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(dir.join(at)) else {
        return;
    };
    for entry in entries.flatten() {
        let path = at.join(entry.file_name());
        if depth > 0 && entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(dir, &path, depth - 1, out);
        } else {
            out.push(path.to_string_lossy().into_owned());
        }
    }
}
