#![allow(clippy::unwrap_used)]
use super::*;
use crate::merkle::{MemoryTree, leaf_hash};
use proptest::prelude::*;

fn tile(kind: Kind, index: u64, width: u16) -> Tile {
    Tile::new(kind, index, width).unwrap()
}

#[test]
fn paths_are_those_of_tlog_tiles() {
    let check = |tile: Tile, path: &str| {
        assert_eq!(tile.path(), path);
        assert_eq!(Tile::parse(path).unwrap(), tile);
    };
    check(tile(Kind::Hashes(0), 0, 256), "tile/0/000");
    check(
        tile(Kind::Hashes(0), 1_234_067, 256),
        "tile/0/x001/x234/067",
    );
    check(tile(Kind::Hashes(1), 1_000, 1), "tile/1/x001/000.p/1");
    check(tile(Kind::Entries, 273, 112), "tile/entries/273.p/112");
}

#[test]
fn other_spellings_are_refused() {
    for path in [
        "",
        "tile",
        "tile/",
        "tile/0",
        "tile/0/",
        "tile/0/0",
        "tile/0/00",
        "tile/0/0000",
        "tile/0/x000/001",
        "tile/0/001/002",
        "tile/0/x001",
        "tile/0/x001/",
        "/tile/0/001",
        "tile/00/001",
        "tile/+0/001",
        "tile/0/+01",
        "tile/8/000",
        "tile/64/000",
        "tile/-1/000",
        "tile/0/001.p/0",
        "tile/0/001.p/256",
        "tile/0/001.p/01",
        "tile/0/001.p/+1",
        "tile/0/001.p/",
        "tile/0/001.p",
        "tile/0/001.p/1/",
        "tile/0/../000",
        "tile/data/000",
        "tile/entries/x1/000",
        "tile/0/x999/x999/x999/x999/x999/x999/999",
        "tile/0/00\u{661}",
        "tile/7/001",
    ] {
        assert!(Tile::parse(path).is_err(), "{path:?}");
    }
}

#[test]
fn a_tree_has_the_tiles_the_specification_counts() {
    // The example of tlog-tiles: 70,000 entries.
    let of = |kind| {
        tiles_of(70_000, 0)
            .filter(|t| t.kind() == kind)
            .collect::<Vec<_>>()
    };
    assert_eq!(of(Kind::Hashes(0)).len(), 274);
    assert_eq!(of(Kind::Hashes(0))[273].width(), 112);
    assert_eq!(of(Kind::Entries).len(), 274);
    let widths = |kind| of(kind).iter().map(|t| t.width()).collect::<Vec<_>>();
    assert_eq!(widths(Kind::Hashes(1)), [256, 17]);
    assert_eq!(widths(Kind::Hashes(2)), [1]);
    assert_eq!(widths(Kind::Hashes(3)), [] as [u16; 0]);
    // And: a tree of 256 is one full tile and one of width 1 above it.
    let paths: Vec<String> = tiles_of(256, 0).map(|t| t.path()).collect();
    assert_eq!(paths, ["tile/entries/000", "tile/0/000", "tile/1/000.p/1"]);
}

#[test]
fn pruning_takes_exactly_what_ends_below_the_minimum() {
    for (old_min, new_min, size) in [
        (0, 0, 70_000),
        (0, 255, 70_000),
        (0, 256, 300),
        (300, 66_000, 70_000),
        (0, 70_000, 70_000),
    ] {
        let all: Vec<Tile> = tiles_of(size, 0).collect();
        let kept: Vec<Tile> = tiles_of(size, new_min).collect();
        let expected: Vec<Tile> = all
            .iter()
            .copied()
            .filter(|t| t.end_index() <= new_min)
            .collect();
        let pruned: Vec<Tile> = tiles_prunable(0, old_min, size)
            .chain(tiles_prunable(old_min, new_min, size))
            .collect();
        let mut sorted = pruned.clone();
        sorted.sort();
        let mut expected = expected;
        expected.sort();
        assert_eq!(sorted, expected, "{old_min} {new_min} {size}");
        assert!(kept.iter().all(|t| t.end_index() > new_min));
        assert_eq!(kept.len() + pruned.len(), all.len());
    }
}

#[test]
fn bundles_round_trip_and_nothing_may_follow() {
    let entries: Vec<Vec<u8>> = vec![vec![], vec![1], vec![2; 65_535]];
    let mut bytes = vec![];
    for entry in &entries {
        bundle_push(&mut bytes, entry).unwrap();
    }
    let bundle = tile(Kind::Entries, 0, 3);
    assert_eq!(bundle.bundle_decode(&bytes).unwrap(), entries);
    assert!(tile(Kind::Entries, 0, 2).bundle_decode(&bytes).is_err());
    assert!(tile(Kind::Entries, 0, 4).bundle_decode(&bytes).is_err());
    bytes.push(0);
    assert!(bundle.bundle_decode(&bytes).is_err());
    assert_eq!(
        bundle_push(&mut bytes, &[0; 65_536]),
        Err(TileError::EntryTooLong(65_536))
    );
}

#[test]
fn nodes_above_a_tile_come_from_the_tile_above() {
    struct Source(MemoryTree);
    impl TileSource for Source {
        fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError> {
            let Kind::Hashes(level) = tile.kind() else {
                return Ok(None);
            };
            let first = tile.index() * 256;
            let hashes = (first..first + u64::from(tile.width()))
                .map(|i| self.0.node(level * 8, i))
                .collect::<Result<Vec<_>, _>>();
            Ok(hashes.ok().map(|h| hashes_encode(&h)))
        }
    }
    let mut tree = MemoryTree::new();
    for i in 0..1_100u64 {
        tree.append(leaf_hash(&i.to_be_bytes()));
    }
    let source = Source(tree.clone());
    let nodes = TileHashes::new(&source, 1_100);
    for level in 0..=11 {
        for index in 0..(1_100 >> level) + 2 {
            assert_eq!(nodes.node(level, index).ok(), tree.node(level, index).ok());
        }
    }
    assert!(nodes.node(255, u64::MAX).is_err());
}

fn any_tile() -> impl Strategy<Value = Tile> {
    (0u8..9, any::<u64>(), 1u16..=256, 0u32..64).prop_filter_map("bounds", |(k, i, w, shift)| {
        let kind = if k == 8 {
            Kind::Entries
        } else {
            Kind::Hashes(k)
        };
        Tile::new(kind, i >> shift, w).ok()
    })
}

proptest! {
    #[test]
    fn paths_round_trip(tile in any_tile()) {
        prop_assert_eq!(Tile::parse(&tile.path()).unwrap(), tile);
    }

    #[test]
    fn what_parses_is_spelt_canonically(
        path in "tile/(entries|[0-9]{1,2})/(x[0-9]{3}/){0,3}[0-9]{3}(\\.p/[0-9]{1,3})?",
    ) {
        if let Ok(tile) = Tile::parse(&path) {
            prop_assert_eq!(tile.path(), path);
        }
    }

    #[test]
    fn any_text_parses_or_fails(path in ".{0,80}") {
        let _ = Tile::parse(&path);
    }

    #[test]
    fn any_bytes_decode_or_fail(
        bytes in proptest::collection::vec(any::<u8>(), 0..2_000), width in 1u16..=256,
    ) {
        let bundle = Tile::new(Kind::Entries, 0, width).unwrap();
        if let Ok(entries) = bundle.bundle_decode(&bytes) {
            let mut again = vec![];
            for entry in entries {
                bundle_push(&mut again, entry).unwrap();
            }
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn growth_in_two_steps_writes_what_one_step_writes(
        a in 0u64..70_000, b in 0u64..70_000, c in 0u64..70_000,
    ) {
        let mut sizes = [a, b, c];
        sizes.sort();
        let [a, b, c] = sizes;
        let mut direct: Vec<Tile> = tiles_changed(a, c).collect();
        let mut stepped: Vec<Tile> = tiles_changed(a, b)
            .filter(|t| Tile::at(t.kind(), t.index(), c) == Some(*t))
            .chain(tiles_changed(b, c))
            .collect();
        direct.sort();
        stepped.sort();
        stepped.dedup();
        prop_assert_eq!(direct, stepped);
    }
}
