//! Growing a log: from entries to the tiles and bundles that must be written.
//!
//! [`Edge`] is the right edge of the tree: the hashes of every partial tile. It is all that a log
//! must remember to grow, and it can be loaded from the tiles at any time. [`Grower`] adds the
//! partial entry bundle and collects the files that each batch changes.
//!
//! Must never do IO, and never says in which order to make files durable: the daemon writes the
//! files, syncs them, and only then publishes a checkpoint over them.

use crate::limits::{TILE_LEVEL_MAX, TILE_WIDTH, TREE_SIZE_MAX};
use crate::merkle::{Hash, ReadError, empty_root, fold_right, leaf_hash, subtree_root};
use crate::tile::{
    Kind, Tile, TileError, TileSource, bundle_push, hashes_encode, hashes_read, tiles_changed,
};

/// The right edge of a tree: what its partial tiles hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edge {
    size: u64,
    /// Hashes of the partial tile at each tile level; each has fewer than 256.
    levels: Vec<Vec<Hash>>,
}

/// A file to write, relative to the log's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TileFile {
    /// Which tile or bundle; [`Tile::path`] is its path.
    pub tile: Tile,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Edge {
    /// The edge of a tree without entries.
    pub fn empty() -> Edge {
        Edge::default()
    }

    /// The edge of the first `at` entries of the tree of `size` entries stored in `source`.
    ///
    /// # Errors
    /// [`ReadError`] when a tile on the edge is absent or damaged, or `at` is beyond `size`.
    pub fn load(at: u64, size: u64, source: &impl TileSource) -> Result<Edge, ReadError> {
        let beyond = || ReadError {
            subject: format!("edge of the first {at} of {size} entries"),
            reason: "sizes are out of range".into(),
        };
        if at > size || size > TREE_SIZE_MAX {
            return Err(beyond());
        }
        let mut levels = Vec::new();
        for level in 0..=TILE_LEVEL_MAX {
            let kind = Kind::Hashes(level);
            let width = (kind.items(at) % u64::from(TILE_WIDTH)) as usize;
            let mut hashes = Vec::new();
            if width > 0 {
                let index = kind.items(at) / u64::from(TILE_WIDTH);
                let tile = Tile::at(kind, index, size).ok_or_else(beyond)?;
                hashes = hashes_read(source, &tile)?;
                hashes.truncate(width);
                assert_eq!(
                    hashes.len(),
                    width,
                    "a larger tree's tile holds a smaller tree's"
                );
            }
            levels.push(hashes);
        }
        Ok(Edge { size: at, levels })
    }

    /// How many entries the tree has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds one leaf hash on the right; `full` is told every tile this fills, lowest level first.
    pub fn append(&mut self, leaf: Hash, mut full: impl FnMut(Tile, &[Hash])) {
        assert!(
            self.size < TREE_SIZE_MAX,
            "a tree never outgrows TREE_SIZE_MAX"
        );
        self.size += 1;
        let mut carry = leaf;
        for level in 0..=TILE_LEVEL_MAX {
            let depth = usize::from(level);
            if self.levels.len() <= depth {
                self.levels.push(Vec::new());
            }
            let hashes = &mut self.levels[depth];
            hashes.push(carry);
            if hashes.len() < usize::from(TILE_WIDTH) {
                return;
            }
            let kind = Kind::Hashes(level);
            let index = kind.items(self.size) / u64::from(TILE_WIDTH) - 1;
            let tile = Tile::new(kind, index, TILE_WIDTH).expect("a tile of a tree in bounds");
            full(tile, hashes);
            carry = subtree_root(hashes);
            hashes.clear();
        }
    }

    /// The partial tile of this level as the tree stands; `None` when there is none.
    pub fn partial(&self, level: u8) -> Option<(Tile, &[Hash])> {
        let hashes = self
            .levels
            .get(usize::from(level))
            .filter(|h| !h.is_empty())?;
        let index = Kind::Hashes(level).items(self.size) / u64::from(TILE_WIDTH);
        let width = u16::try_from(hashes.len()).expect("a partial tile has fewer than 256");
        let tile =
            Tile::new(Kind::Hashes(level), index, width).expect("a tile of a tree in bounds");
        Some((tile, hashes))
    }

    /// The root of the tree.
    pub fn root(&self) -> Hash {
        // Right to left: from the lowest level up, and within a level from the last hash back.
        let mut roots = Vec::new();
        for hashes in &self.levels {
            let mut end = hashes.len();
            for bit in 0..u32::from(crate::limits::TILE_HEIGHT) {
                let count = 1usize << bit;
                if hashes.len() & count != 0 {
                    roots.push(subtree_root(&hashes[end - count..end]));
                    end -= count;
                }
            }
        }
        fold_right(roots.into_iter()).unwrap_or_else(empty_root)
    }
}

/// Turns appended entries into the files that a log directory needs.
#[derive(Clone, Debug, Default)]
pub struct Grower {
    edge: Edge,
    /// Bytes of the partial entry bundle.
    bundle: Vec<u8>,
    /// The size at the last [`Grower::take`].
    taken: u64,
    /// Full tiles and bundles since then.
    full: Vec<TileFile>,
}

impl Grower {
    /// A grower for a log without entries.
    pub fn empty() -> Grower {
        Grower::default()
    }

    /// A grower for the log of `size` entries stored in `source`.
    ///
    /// # Errors
    /// [`ReadError`] when a partial tile or the partial bundle is absent or damaged, or when the
    /// bundle's entries are not those that the tile above them hashes.
    pub fn load(size: u64, source: &impl TileSource) -> Result<Grower, ReadError> {
        let edge = Edge::load(size, size, source)?;
        let mut bundle = Vec::new();
        if let Some((tile, hashes)) = edge.partial(0) {
            let tile = Tile::new(Kind::Entries, tile.index(), tile.width())
                .expect("a bundle has the coordinates of the tile over it");
            let fail = |reason: String| ReadError {
                subject: tile.path(),
                reason,
            };
            bundle = source
                .tile(&tile)?
                .ok_or_else(|| fail("not there".into()))?;
            let entries = tile
                .bundle_decode(&bundle)
                .map_err(|e| fail(e.to_string()))?;
            if entries
                .iter()
                .zip(hashes)
                .any(|(entry, hash)| leaf_hash(entry) != *hash)
            {
                return Err(fail("its entries are not those of the tile above".into()));
            }
        }
        Ok(Grower {
            edge,
            bundle,
            taken: size,
            full: Vec::new(),
        })
    }

    /// How many entries the log has, with those appended since the last [`Grower::take`].
    pub fn size(&self) -> u64 {
        self.edge.size()
    }

    /// The root over all of them.
    pub fn root(&self) -> Hash {
        self.edge.root()
    }

    /// Appends an entry; returns its index.
    ///
    /// # Errors
    /// [`TileError::EntryTooLong`] beyond 65,535 bytes; the log is then unchanged.
    pub fn append(&mut self, entry: &[u8]) -> Result<u64, TileError> {
        let index = self.edge.size();
        bundle_push(&mut self.bundle, entry)?;
        let full = &mut self.full;
        self.edge.append(leaf_hash(entry), |tile, hashes| {
            full.push(TileFile {
                tile,
                bytes: hashes_encode(hashes),
            });
        });
        if self.edge.size().is_multiple_of(u64::from(TILE_WIDTH)) {
            let tile = Tile::new(Kind::Entries, index / u64::from(TILE_WIDTH), TILE_WIDTH)
                .expect("a bundle of a tree in bounds");
            self.full.push(TileFile {
                tile,
                bytes: std::mem::take(&mut self.bundle),
            });
        }
        Ok(index)
    }

    /// The files that appends since the last call have changed, bundles and low levels first.
    /// Every partial one has a new width and so a new path; no file is ever rewritten.
    pub fn take(&mut self) -> Vec<TileFile> {
        let mut files = std::mem::take(&mut self.full);
        let size = self.edge.size();
        for tile in tiles_changed(self.taken, size).filter(Tile::is_partial) {
            let bytes = match tile.kind() {
                Kind::Entries => self.bundle.clone(),
                Kind::Hashes(level) => {
                    let (edge, hashes) = self
                        .edge
                        .partial(level)
                        .expect("a changed partial tile is on the edge");
                    assert_eq!(edge, tile, "the edge and the tree's size agree");
                    hashes_encode(hashes)
                }
            };
            files.push(TileFile { tile, bytes });
        }
        files.sort_by_key(|file| file.tile);
        self.taken = size;
        files
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::merkle::{MemoryTree, inclusion_proof, inclusion_verify};
    use crate::tile::{TileHashes, tiles_of};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Files(BTreeMap<String, Vec<u8>>);

    impl TileSource for Files {
        fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError> {
            Ok(self.0.get(&tile.path()).cloned())
        }
    }

    fn entry(i: u64) -> Vec<u8> {
        format!("entry {i}").into_bytes()
    }

    /// Grows a log in batches, from scratch or reloading before each batch.
    fn grow(batches: &[u64], reload: bool) -> (Files, Grower) {
        let mut files = Files::default();
        let mut grower = Grower::empty();
        for batch in batches {
            if reload {
                grower = Grower::load(grower.size(), &files).unwrap();
            }
            for _ in 0..*batch {
                grower.append(&entry(grower.size())).unwrap();
            }
            let expected: Vec<Tile> = {
                let mut all: Vec<Tile> =
                    tiles_changed(grower.size() - batch, grower.size()).collect();
                all.sort();
                all
            };
            let new = grower.take();
            assert_eq!(new.iter().map(|f| f.tile).collect::<Vec<_>>(), expected);
            for file in new {
                let before = files.0.insert(file.tile.path(), file.bytes);
                assert_eq!(before, None, "no file is ever rewritten");
            }
        }
        (files, grower)
    }

    #[test]
    fn the_root_is_that_of_the_plain_tree_and_proofs_come_from_tiles() {
        let (files, grower) = grow(&[1, 254, 1, 1, 255, 700, 66_000], true);
        let mut tree = MemoryTree::new();
        for i in 0..grower.size() {
            tree.append(leaf_hash(&entry(i)));
        }
        assert_eq!(grower.root(), tree.root());
        let size = grower.size();
        let nodes = TileHashes::new(&files, size);
        for index in [0, 1, 255, 256, 65_535, 65_536, size - 2, size - 1] {
            let proof = inclusion_proof(index, size, &nodes).unwrap();
            let leaf = leaf_hash(&entry(index));
            inclusion_verify(index, size, &leaf, &proof, &tree.root()).unwrap();
        }
        for tile in tiles_of(size, 0) {
            assert!(files.0.contains_key(&tile.path()), "{tile}");
        }
    }

    #[test]
    fn the_edge_of_a_prefix_loads_from_a_larger_tree() {
        let (files, grower) = grow(&[1_500], false);
        let mut edge = Edge::empty();
        for at in 0..=1_500 {
            assert_eq!(
                Edge::load(at, 1_500, &files).unwrap().root(),
                edge.root(),
                "{at}"
            );
            edge.append(leaf_hash(&entry(at)), |_, _| {});
        }
        assert!(Edge::load(1_501, grower.size(), &files).is_err());
    }

    #[test]
    fn a_damaged_edge_is_not_grown() {
        let (mut files, grower) = grow(&[300], false);
        let path = "tile/entries/001.p/44";
        files.0.get_mut(path).unwrap()[5] ^= 1;
        assert!(Grower::load(grower.size(), &files).is_err());
        files.0.remove(path);
        assert!(Grower::load(grower.size(), &files).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn batching_and_restarts_change_nothing(
            batches in proptest::collection::vec(0u64..400, 1..6),
        ) {
            let (a, grower) = grow(&batches, false);
            let (b, reloaded) = grow(&batches, true);
            prop_assert_eq!(a.0, b.0);
            prop_assert_eq!(grower.root(), reloaded.root());
        }
    }
}
