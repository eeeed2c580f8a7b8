//! Tiles and entry bundles of C2SP tlog-tiles: which there are, their paths, their bytes.
//!
//! A tree of `n` entries is stored as files of 256 hashes (`tile/<level>/<N>`) or 256 entries
//! (`tile/entries/<N>`); the rightmost one of each kind may be partial (`….p/<width>`). A hash at
//! tile level `l` is the root of a complete subtree of `256^l` entries.
//!
//! Must never do IO: files are read through [`TileSource`].

use crate::limits::{
    BUNDLE_BYTES_MAX, HASH_BYTES, LEAF_BYTES_MAX, TILE_HEIGHT, TILE_LEVEL_MAX, TILE_WIDTH,
    TREE_SIZE_MAX,
};
use crate::merkle::{Hash, HashReader, ReadError, subtree_root};
use std::fmt;

/// What a tile holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The log entries themselves: an entry bundle.
    Entries,
    /// Hashes of this tile level, 0 to [`TILE_LEVEL_MAX`].
    Hashes(u8),
}

/// The coordinates of one tile or entry bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tile {
    kind: Kind,
    index: u64,
    width: u16,
}

/// Gives the bytes of tiles and bundles.
pub trait TileSource {
    /// The bytes at exactly these coordinates; `None` when there is no such file.
    ///
    /// # Errors
    /// [`ReadError`] when there is one but it can't be read.
    fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError>;
}

/// Why coordinates, a path or a tile's bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TileError {
    /// Not a path of tlog-tiles in its one canonical spelling.
    #[error("parse tile path: not a canonical tile/<level|entries>/<N>[.p/<width>] path")]
    Path,
    /// A level, index or width that no tree has.
    #[error("tile: no tree within the bounds has a tile of this level, index and width")]
    Coordinates,
    /// A tile of hashes with the wrong number of bytes.
    #[error("parse {tile}: {got} bytes where {expected} belong; the file is damaged")]
    Length {
        /// Path of the tile.
        tile: String,
        /// Bytes that a tile of this width has.
        expected: usize,
        /// Bytes found.
        got: usize,
    },
    /// A bundle that ends early, or goes on after its last entry.
    #[error("parse {tile}: entry {entry} of the bundle {problem}; the file is damaged")]
    Bundle {
        /// Path of the bundle.
        tile: String,
        /// Which entry of the bundle, from 0.
        entry: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An entry longer than its `u16` prefix can say.
    #[error("encode bundle: an entry has {0} bytes, more than 65535; shorten its payload")]
    EntryTooLong(usize),
}

impl Kind {
    /// All kinds, bundles first and then the levels from the leaves up.
    pub fn all() -> impl Iterator<Item = Kind> {
        std::iter::once(Kind::Entries).chain((0..=TILE_LEVEL_MAX).map(Kind::Hashes))
    }

    /// How many entries one item of this kind stands for, as a power of two.
    fn shift(self) -> u32 {
        match self {
            Kind::Entries => 0,
            Kind::Hashes(level) => u32::from(level) * u32::from(TILE_HEIGHT),
        }
    }

    /// How many items of this kind a tree of `size` entries has.
    pub fn items(self, size: u64) -> u64 {
        size >> self.shift()
    }
}

impl Tile {
    /// The tile of these coordinates.
    ///
    /// # Errors
    /// [`TileError::Coordinates`] when no tree within the bounds has it.
    pub fn new(kind: Kind, index: u64, width: u16) -> Result<Tile, TileError> {
        let level_ok = !matches!(kind, Kind::Hashes(level) if level > TILE_LEVEL_MAX);
        if !level_ok || width == 0 || width > TILE_WIDTH {
            return Err(TileError::Coordinates);
        }
        let items = u128::from(index) * u128::from(TILE_WIDTH) + u128::from(width);
        if items << kind.shift() > u128::from(TREE_SIZE_MAX) {
            return Err(TileError::Coordinates);
        }
        Ok(Tile { kind, index, width })
    }

    /// The tile of this kind and index as a tree of `size` entries has it; `None` if it has none.
    pub fn at(kind: Kind, index: u64, size: u64) -> Option<Tile> {
        let first = index.checked_mul(u64::from(TILE_WIDTH))?;
        let items = kind
            .items(size)
            .checked_sub(first)?
            .min(u64::from(TILE_WIDTH));
        Tile::new(kind, index, u16::try_from(items).ok()?).ok()
    }

    /// What it holds.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its place among the tiles of its kind, from 0.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// How many hashes or entries it holds, 1 to 256.
    pub fn width(&self) -> u16 {
        self.width
    }

    /// Whether it holds fewer than 256.
    pub fn is_partial(&self) -> bool {
        self.width < TILE_WIDTH
    }

    /// The full tile of the same kind and index, which replaces a partial one as the tree grows.
    pub fn full(&self) -> Tile {
        Tile {
            width: TILE_WIDTH,
            ..*self
        }
    }

    /// The index of the first entry below this tile.
    pub fn start_index(&self) -> u64 {
        (self.index * u64::from(TILE_WIDTH)) << self.kind.shift()
    }

    /// One past the index of the last entry below this tile once it is full. A tile whose end
    /// index is at or below the log's minimum index may be pruned.
    pub fn end_index(&self) -> u64 {
        let items = (u128::from(self.index) + 1) * u128::from(TILE_WIDTH);
        u64::try_from(items << self.kind.shift()).unwrap_or(u64::MAX)
    }

    /// The path below the log's directory, as `tile/0/x001/234.p/56`.
    pub fn path(&self) -> String {
        let mut path = match self.kind {
            Kind::Entries => "tile/entries/".to_string(),
            Kind::Hashes(level) => format!("tile/{level}/"),
        };
        let mut groups = vec![self.index % 1000];
        let mut rest = self.index / 1000;
        while rest > 0 {
            groups.push(rest % 1000);
            rest /= 1000;
        }
        for (i, group) in groups.iter().enumerate().rev() {
            let part = if i == 0 {
                format!("{group:03}")
            } else {
                format!("x{group:03}/")
            };
            path.push_str(&part);
        }
        if self.is_partial() {
            path.push_str(&format!(".p/{}", self.width));
        }
        path
    }

    /// The tile at `path`, which must be spelt as [`Tile::path`] spells it.
    ///
    /// # Errors
    /// [`TileError`] for any other text.
    pub fn parse(path: &str) -> Result<Tile, TileError> {
        const PATH_BYTES_MAX: usize = 64;
        if path.len() > PATH_BYTES_MAX || !path.is_ascii() {
            return Err(TileError::Path);
        }
        let rest = path.strip_prefix("tile/").ok_or(TileError::Path)?;
        let (kind, rest) = rest.split_once('/').ok_or(TileError::Path)?;
        let kind = match kind {
            "entries" => Kind::Entries,
            level => Kind::Hashes(level.parse().map_err(|_| TileError::Path)?),
        };
        let (number, width) = match rest.split_once(".p/") {
            Some((number, width)) => (number, width.parse().map_err(|_| TileError::Path)?),
            None => (rest, TILE_WIDTH),
        };
        let mut index = 0u64;
        for group in number.split('/') {
            let digits = group.strip_prefix('x').unwrap_or(group);
            let value: u64 = digits.parse().map_err(|_| TileError::Path)?;
            index = index
                .checked_mul(1000)
                .and_then(|i| i.checked_add(value))
                .ok_or(TileError::Coordinates)?;
        }
        let tile = Tile::new(kind, index, width)?;
        // One spelling per tile: whatever was lenient above is caught here.
        if tile.path() == path {
            Ok(tile)
        } else {
            Err(TileError::Path)
        }
    }

    /// The hashes of this tile from its bytes.
    ///
    /// # Errors
    /// [`TileError::Length`] unless there are exactly `width` hashes.
    pub fn hashes_decode(&self, bytes: &[u8]) -> Result<Vec<Hash>, TileError> {
        let expected = usize::from(self.width) * HASH_BYTES;
        if bytes.len() != expected {
            return Err(TileError::Length {
                tile: self.path(),
                expected,
                got: bytes.len(),
            });
        }
        let (hashes, rest) = bytes.as_chunks::<HASH_BYTES>();
        assert!(rest.is_empty(), "the length is a multiple of a hash's");
        Ok(hashes.to_vec())
    }

    /// The entries of this bundle from its bytes.
    ///
    /// # Errors
    /// [`TileError::Bundle`] unless there are exactly `width` entries and nothing after them.
    pub fn bundle_decode<'a>(&self, bytes: &'a [u8]) -> Result<Vec<&'a [u8]>, TileError> {
        let fault = |entry, problem| TileError::Bundle {
            tile: self.path(),
            entry,
            problem,
        };
        if bytes.len() > BUNDLE_BYTES_MAX {
            return Err(fault(0, "is in a file beyond the size of any bundle"));
        }
        let mut entries = Vec::with_capacity(usize::from(self.width));
        let mut rest = bytes;
        for i in 0..usize::from(self.width) {
            let (length, after) = rest
                .split_first_chunk::<2>()
                .ok_or_else(|| fault(i, "is missing"))?;
            let length = usize::from(u16::from_be_bytes(*length));
            let (entry, after) = after
                .split_at_checked(length)
                .ok_or_else(|| fault(i, "is cut short"))?;
            entries.push(entry);
            rest = after;
        }
        if !rest.is_empty() {
            return Err(fault(
                usize::from(self.width),
                "follows where the bundle must end",
            ));
        }
        Ok(entries)
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

/// The bytes of a tile of hashes.
pub fn hashes_encode(hashes: &[Hash]) -> Vec<u8> {
    hashes.as_flattened().to_vec()
}

/// Appends one entry to the bytes of a bundle: `u16` big-endian length, then the entry.
///
/// # Errors
/// [`TileError::EntryTooLong`] beyond 65,535 bytes.
pub fn bundle_push(bundle: &mut Vec<u8>, entry: &[u8]) -> Result<(), TileError> {
    const _: () = assert!(LEAF_BYTES_MAX == u16::MAX as usize);
    let length = u16::try_from(entry.len()).map_err(|_| TileError::EntryTooLong(entry.len()))?;
    bundle.extend_from_slice(&length.to_be_bytes());
    bundle.extend_from_slice(entry);
    Ok(())
}

/// All tiles and bundles of a tree of `size` entries that hold something at or above entry
/// `min_index`, in their widths at that size.
pub fn tiles_of(size: u64, min_index: u64) -> impl Iterator<Item = Tile> {
    Kind::all().flat_map(move |kind| {
        let first = kind.items(min_index) / u64::from(TILE_WIDTH);
        let end = kind.items(size).div_ceil(u64::from(TILE_WIDTH));
        (first..end).filter_map(move |index| Tile::at(kind, index, size))
    })
}

/// The tiles and bundles that a tree of `new` entries has and one of `old` entries has not:
/// what must be written when the tree grows.
pub fn tiles_changed(old: u64, new: u64) -> impl Iterator<Item = Tile> {
    Kind::all()
        .filter(move |kind| kind.items(old) < kind.items(new))
        .flat_map(move |kind| {
            let first = kind.items(old) / u64::from(TILE_WIDTH);
            let end = kind.items(new).div_ceil(u64::from(TILE_WIDTH));
            (first..end).filter_map(move |index| Tile::at(kind, index, new))
        })
}

/// The tiles and bundles of a tree of `size` entries that may go once nothing below `new_min`
/// need be kept, given that all below `old_min` are gone already.
pub fn tiles_prunable(old_min: u64, new_min: u64, size: u64) -> impl Iterator<Item = Tile> {
    let new_min = new_min.min(size);
    Kind::all().flat_map(move |kind| {
        let first = kind.items(old_min) / u64::from(TILE_WIDTH);
        let end = kind.items(new_min) / u64::from(TILE_WIDTH);
        (first..end).filter_map(move |index| Tile::at(kind, index, size))
    })
}

/// Reads a tile from `source`, or, if it is partial and gone, from the full tile that replaced it.
/// Returns exactly the hashes that the tile has.
///
/// # Errors
/// [`ReadError`] when neither is there, or what is there is damaged.
pub fn hashes_read(source: &impl TileSource, tile: &Tile) -> Result<Vec<Hash>, ReadError> {
    let fail = |reason: String| ReadError {
        subject: tile.path(),
        reason,
    };
    for candidate in [*tile, tile.full()] {
        if let Some(bytes) = source.tile(&candidate)? {
            let mut hashes = candidate
                .hashes_decode(&bytes)
                .map_err(|e| fail(e.to_string()))?;
            hashes.truncate(usize::from(tile.width()));
            return Ok(hashes);
        }
    }
    Err(fail("neither this tile nor its full one is there".into()))
}

/// A [`HashReader`] over tiles: the nodes of the tree of `size` entries.
///
/// It hashes up inside a tile on every call and keeps nothing; let the source cache tiles.
#[derive(Debug)]
pub struct TileHashes<'a, S> {
    source: &'a S,
    size: u64,
}

impl<'a, S: TileSource> TileHashes<'a, S> {
    /// The nodes of the tree of `size` entries stored in `source`.
    pub fn new(source: &'a S, size: u64) -> Self {
        TileHashes { source, size }
    }
}

impl<S: TileSource> HashReader for TileHashes<'_, S> {
    fn node(&self, level: u8, index: u64) -> Result<Hash, ReadError> {
        let absent = || ReadError {
            subject: format!("node {level}/{index}"),
            reason: format!("not in a tree of {} entries", self.size),
        };
        let complete = u128::from(index) + 1;
        if level >= 64 || complete << level > u128::from(self.size) {
            return Err(absent());
        }
        let kind = Kind::Hashes(level / TILE_HEIGHT);
        let count = 1u64 << (level % TILE_HEIGHT);
        let first = index * count;
        let tile = Tile::at(kind, first / u64::from(TILE_WIDTH), self.size).ok_or_else(absent)?;
        let hashes = hashes_read(self.source, &tile)?;
        let offset = (first % u64::from(TILE_WIDTH)) as usize;
        hashes
            .get(offset..offset + count as usize)
            .map(subtree_root)
            .ok_or_else(absent)
    }
}

#[cfg(test)]
mod tests;
