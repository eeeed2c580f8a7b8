//! Cross-checks against an independent implementation, Cloudflare's `tlog_tiles`: its tree, its
//! proofs, its tile coordinates and its reading of our tiles and checkpoints.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use std::collections::BTreeMap;
use tlog::checkpoint::Checkpoint;
use tlog::grow::Grower;
use tlog::merkle::{
    Hash, MemoryTree, consistency_proof, consistency_verify, inclusion_proof, inclusion_verify,
    leaf_hash,
};
use tlog::tile::{Kind, Tile, tiles_changed};
use tlog_tiles as oracle;

/// The oracle's stored hashes for a growing tree.
#[derive(Default)]
struct Stored(Vec<oracle::Hash>);

impl oracle::HashReader for Stored {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<oracle::Hash>, oracle::Error> {
        Ok(indexes.iter().map(|i| self.0[*i as usize]).collect())
    }
}

impl Stored {
    fn of(size: u64) -> Stored {
        let mut stored = Stored::default();
        for i in 0..size {
            let new = oracle::stored_hashes(i, &entry(i), &stored).unwrap();
            stored.0.extend(new);
        }
        stored
    }
}

fn entry(i: u64) -> Vec<u8> {
    format!("entry {i}").into_bytes()
}

fn tree_of(size: u64) -> MemoryTree {
    let mut tree = MemoryTree::new();
    for i in 0..size {
        tree.append(leaf_hash(&entry(i)));
    }
    tree
}

fn ours(hashes: &[oracle::Hash]) -> Vec<Hash> {
    hashes.iter().map(|h| h.0).collect()
}

fn theirs(hashes: &[Hash]) -> Vec<oracle::Hash> {
    hashes.iter().map(|h| oracle::Hash(*h)).collect()
}

/// The oracle names tiles with their height, and bundles `data`.
fn oracle_path(tile: &Tile) -> String {
    let path = tile.path();
    match tile.kind() {
        Kind::Entries => path.replacen("tile/entries/", "tile/8/data/", 1),
        Kind::Hashes(_) => path.replacen("tile/", "tile/8/", 1),
    }
}

#[test]
fn roots_and_proofs_are_the_oracles() {
    const SIZE: u64 = 130;
    let (tree, stored) = (tree_of(SIZE), Stored::of(SIZE));
    for size in 1..=SIZE {
        let root = tlog::merkle::root(size, &tree).unwrap();
        assert_eq!(root, oracle::tree_hash(size, &stored).unwrap().0);
        for index in 0..size {
            let proof = inclusion_proof(index, size, &tree).unwrap();
            assert_eq!(
                proof,
                ours(&oracle::prove_record(size, index, &stored).unwrap())
            );
            let leaf = oracle::record_hash(&entry(index));
            oracle::check_record(&theirs(&proof), size, oracle::Hash(root), index, leaf).unwrap();
        }
        for old in 1..=size {
            let old_root = tlog::merkle::root(old, &tree).unwrap();
            let proof = consistency_proof(old, size, &tree).unwrap();
            assert_eq!(
                proof,
                ours(&oracle::prove_tree(size, old, &stored).unwrap())
            );
            let (new, old_hash) = (oracle::Hash(root), oracle::Hash(old_root));
            oracle::check_tree(&theirs(&proof), size, new, old, old_hash).unwrap();
        }
    }
}

#[test]
fn the_oracle_reads_our_tiles() {
    /// Our log's files, under the oracle's names.
    struct Files(BTreeMap<String, Vec<u8>>);

    impl oracle::TileReader for Files {
        fn height(&self) -> u8 {
            8
        }
        fn read_tiles(&self, tiles: &[oracle::Tile]) -> Result<Vec<Vec<u8>>, oracle::Error> {
            Ok(tiles.iter().map(|t| self.0[&t.path()].clone()).collect())
        }
        fn save_tiles(&self, _: &[oracle::Tile], _: &[Vec<u8>]) {}
    }

    const SIZE: u64 = 66_000;
    let mut grower = Grower::empty();
    for i in 0..SIZE {
        grower.append(&entry(i)).unwrap();
    }
    let root = grower.root();
    let files = Files(
        grower
            .take()
            .into_iter()
            .map(|f| (oracle_path(&f.tile), f.bytes))
            .collect(),
    );
    let reader = oracle::TileHashReader::new(SIZE, oracle::Hash(root), &files);
    for index in [0, 255, 256, 65_535, 65_536, SIZE - 1] {
        let proof = ours(&oracle::prove_record(SIZE, index, &reader).unwrap());
        inclusion_verify(index, SIZE, &leaf_hash(&entry(index)), &proof, &root).unwrap();
    }
    for old in [1, 256, 300, 65_536, SIZE - 1] {
        let old_root = oracle::tree_hash(old, &reader).unwrap().0;
        let proof = ours(&oracle::prove_tree(SIZE, old, &reader).unwrap());
        consistency_verify(old, SIZE, &old_root, &root, &proof).unwrap();
    }
}

#[test]
fn the_oracle_reads_our_checkpoints() {
    let mut checkpoint = Checkpoint::new("casemate.local/lab/api", 70_000, leaf_hash(b"x"));
    checkpoint.min_index = 256;
    checkpoint.extensions = vec!["more".into()];
    let body = checkpoint.body().unwrap();
    // The oracle wants the empty line that a note puts after its text.
    let read = oracle::Checkpoint::from_bytes(body.as_bytes())
        .or_else(|_| oracle::Checkpoint::from_bytes(format!("{body}\n").as_bytes()))
        .map_err(|e| e.to_string())
        .unwrap();
    assert_eq!(read.origin(), checkpoint.origin);
    assert_eq!((read.size(), read.hash().0), (70_000, checkpoint.root));
    assert_eq!(read.extension(), "min-index 256\nmore\n");
}

proptest! {
    #[test]
    fn tiles_that_change_are_the_oracles(old in 0u64..200_000, more in 0u64..200_000, up in 0u32..20) {
        let (old, new) = (old << up, (old << up) + more);
        let mut mine: Vec<String> = tiles_changed(old, new)
            .filter(|t| t.kind() != Kind::Entries)
            .map(|t| oracle_path(&t))
            .collect();
        let mut theirs: Vec<String> =
            oracle::Tile::new_tiles(8, old, new).iter().map(oracle::Tile::path).collect();
        mine.sort();
        theirs.sort();
        prop_assert_eq!(mine, theirs);
    }

    #[test]
    fn paths_are_read_alike(path in "tile/[0-9]{1,2}/(x[0-9]{3}/){0,2}[0-9]{3}(\\.p/[0-9]{1,3})?") {
        if let Ok(tile) = Tile::parse(&path) {
            let read = oracle::Tile::from_path(&oracle_path(&tile)).map_err(|e| e.to_string());
            prop_assert_eq!(read.unwrap().path(), oracle_path(&tile));
        }
    }
}
