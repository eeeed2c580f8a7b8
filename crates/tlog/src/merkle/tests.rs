#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;
use std::sync::LazyLock;

/// The reference inputs of Certificate Transparency's own test suites.
const INPUTS: [&str; 8] = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
];

/// Their roots for sizes 0 to 8.
const ROOTS: [&str; 9] = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];

const SIZE_MAX: u64 = 300;

struct Grown {
    tree: MemoryTree,
    leaves: Vec<Hash>,
    /// Root at every size from 0 on.
    roots: Vec<Hash>,
}

static GROWN: LazyLock<Grown> = LazyLock::new(|| {
    let mut grown = Grown {
        tree: MemoryTree::new(),
        leaves: vec![],
        roots: vec![empty_root()],
    };
    for i in 0..SIZE_MAX {
        let leaf = leaf_hash(&i.to_be_bytes());
        grown.tree.append(leaf);
        grown.leaves.push(leaf);
        grown.roots.push(grown.tree.root());
    }
    grown
});

/// MTH as RFC 6962 writes it down.
fn mth(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => sha256(&[]),
        [one] => *one,
        many => {
            let k = many.len().next_power_of_two() / 2;
            node_hash(&mth(&many[..k]), &mth(&many[k..]))
        }
    }
}

fn hex32(s: &str) -> Hash {
    hex::decode(s).unwrap().try_into().unwrap()
}

#[test]
fn roots_match_the_rfc_6962_vectors() {
    let mut tree = MemoryTree::new();
    assert_eq!(tree.root(), hex32(ROOTS[0]));
    for (i, input) in INPUTS.iter().enumerate() {
        tree.append(leaf_hash(&hex::decode(input).unwrap()));
        assert_eq!(tree.root(), hex32(ROOTS[i + 1]), "size {}", i + 1);
        assert_eq!(root(tree.size(), &tree).unwrap(), tree.root());
    }
}

#[test]
fn proofs_match_the_rfc_6962_vectors() {
    let mut tree = MemoryTree::new();
    for input in INPUTS {
        tree.append(leaf_hash(&hex::decode(input).unwrap()));
    }
    let check = |proof: Vec<Hash>, expected: &[&str]| {
        assert_eq!(proof.iter().map(hex::encode).collect::<Vec<_>>(), expected);
    };
    check(
        inclusion_proof(0, 8, &tree).unwrap(),
        &[
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    );
    check(
        inclusion_proof(5, 8, &tree).unwrap(),
        &[
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    );
    check(
        consistency_proof(1, 8, &tree).unwrap(),
        &[
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    );
    check(
        consistency_proof(6, 8, &tree).unwrap(),
        &[
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    );
}

#[test]
fn the_frontier_follows_the_definition() {
    for size in 0..=SIZE_MAX {
        let leaves = &GROWN.leaves[..size as usize];
        assert_eq!(GROWN.roots[size as usize], mth(leaves), "size {size}");
        let frontier = Frontier::load(size, &GROWN.tree).unwrap();
        assert_eq!(frontier.root(), GROWN.roots[size as usize]);
    }
}

#[test]
fn every_inclusion_proof_up_to_the_size_verifies() {
    for size in 1..=SIZE_MAX {
        let root = &GROWN.roots[size as usize];
        for index in 0..size {
            let proof = inclusion_proof(index, size, &GROWN.tree).unwrap();
            let leaf = &GROWN.leaves[index as usize];
            assert_eq!(
                inclusion_verify(index, size, leaf, &proof, root),
                Ok(()),
                "{index}/{size}"
            );
        }
        assert!(inclusion_proof(size, size, &GROWN.tree).is_err());
    }
}

#[test]
fn every_consistency_proof_up_to_the_size_verifies() {
    for new in 0..=SIZE_MAX {
        for old in 0..=new {
            let proof = consistency_proof(old, new, &GROWN.tree).unwrap();
            let (a, b) = (&GROWN.roots[old as usize], &GROWN.roots[new as usize]);
            assert_eq!(
                consistency_verify(old, new, a, b, &proof),
                Ok(()),
                "{old} to {new}"
            );
        }
        assert!(consistency_proof(new + 1, new, &GROWN.tree).is_err());
    }
}

/// One change to a proof; false when it would change nothing.
fn mutate(proof: &mut Vec<Hash>, kind: u8, at: usize, byte: usize, bit: u8) -> bool {
    let len = proof.len();
    match kind {
        0 if len > 0 => proof[at % len][byte % 32] ^= 1 << (bit % 8),
        1 if len > 0 => drop(proof.remove(at % len)),
        2 => proof.insert(at % (len + 1), leaf_hash(&[bit])),
        3 if len > 1 && at % len != byte % len => proof.swap(at % len, byte % len),
        4 if len > 0 => proof.push(proof[at % len]),
        _ => return false,
    }
    true
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_changed_inclusion_proof_fails(
        size in 1..=SIZE_MAX, pick in any::<u64>(),
        kind in 0u8..5, at in any::<usize>(), byte in any::<usize>(), bit in any::<u8>(),
    ) {
        let index = pick % size;
        let mut proof = inclusion_proof(index, size, &GROWN.tree).unwrap();
        prop_assume!(mutate(&mut proof, kind, at, byte, bit));
        let (leaf, root) = (&GROWN.leaves[index as usize], &GROWN.roots[size as usize]);
        prop_assert!(inclusion_verify(index, size, leaf, &proof, root).is_err());
    }

    #[test]
    fn a_proof_shows_neither_another_place_nor_another_leaf(
        size in 2..=SIZE_MAX, a in any::<u64>(), b in any::<u64>(),
    ) {
        let (a, b) = (a % size, b % size);
        prop_assume!(a != b);
        let proof = inclusion_proof(a, size, &GROWN.tree).unwrap();
        let root = &GROWN.roots[size as usize];
        prop_assert!(inclusion_verify(b, size, &GROWN.leaves[a as usize], &proof, root).is_err());
        prop_assert!(inclusion_verify(a, size, &GROWN.leaves[b as usize], &proof, root).is_err());
    }

    #[test]
    fn a_changed_consistency_proof_fails(
        new in 2..=SIZE_MAX, pick in any::<u64>(),
        kind in 0u8..5, at in any::<usize>(), byte in any::<usize>(), bit in any::<u8>(),
    ) {
        let old = pick % (new + 1);
        let mut proof = consistency_proof(old, new, &GROWN.tree).unwrap();
        prop_assume!(mutate(&mut proof, kind, at, byte, bit));
        let (a, b) = (&GROWN.roots[old as usize], &GROWN.roots[new as usize]);
        prop_assert!(consistency_verify(old, new, a, b, &proof).is_err());
    }

    #[test]
    fn a_rewritten_past_is_inconsistent(
        new in 2..=SIZE_MAX, pick in any::<u64>(), flip in any::<u64>(),
    ) {
        let old = 1 + pick % (new - 1);
        let mut forged = MemoryTree::new();
        for (i, leaf) in GROWN.leaves[..new as usize].iter().enumerate() {
            let mut leaf = *leaf;
            if i as u64 == flip % old {
                leaf[0] ^= 1;
            }
            forged.append(leaf);
        }
        let proof = consistency_proof(old, new, &forged).unwrap();
        let honest = &GROWN.roots[old as usize];
        prop_assert!(consistency_verify(old, new, honest, &forged.root(), &proof).is_err());
    }

    #[test]
    fn hostile_numbers_and_proofs_never_panic(
        a in any::<u64>(), b in any::<u64>(),
        proof in proptest::collection::vec(any::<[u8; 32]>(), 0..70),
        root in any::<[u8; 32]>(),
    ) {
        let _ = inclusion_verify(a, b, &root, &proof, &root);
        prop_assert!(consistency_verify(a, b, &root, &empty_root(), &proof).is_err() || a == b);
    }
}
