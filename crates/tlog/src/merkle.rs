//! The Merkle tree of RFC 6962, section 2.1: hashes, the compact frontier, proofs.
//!
//! Nodes are addressed as (level, index): level 0 holds the leaf hashes, and node (l, i) is the
//! root of the complete subtree over entries `i << l .. (i + 1) << l`. Only complete subtrees have
//! an address; a tree of any size is a right fold over them.
//!
//! Must never do IO: proofs read nodes through [`HashReader`].

use crate::limits::{HASH_BYTES, PROOF_HASHES_MAX, TREE_SIZE_MAX};
use seal::hash::sha256;

/// A SHA-256 hash: of a leaf, of a node, or a root.
pub type Hash = [u8; HASH_BYTES];

/// Gives the hash of a complete subtree's root.
pub trait HashReader {
    /// The node at `level` (0 = leaf hashes) and `index`.
    ///
    /// # Errors
    /// [`ReadError`] when the node is absent or what holds it is unreadable.
    fn node(&self, level: u8, index: u64) -> Result<Hash, ReadError>;
}

/// A part of the log that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read {subject}: {reason}")]
pub struct ReadError {
    /// What was to be read: a tile's path or a node's address.
    pub subject: String,
    /// Why that failed.
    pub reason: String,
}

/// Why a proof could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProveError {
    /// There is no such entry in a tree of that size.
    #[error("prove inclusion: entry {index} is not in a tree of {size} entries; ask for one below")]
    Index {
        /// The entry asked for.
        index: u64,
        /// The size of the tree.
        size: u64,
    },
    /// The older tree is larger than the newer one, or one of them is beyond all bounds.
    #[error(
        "prove consistency: no proof from size {old} to {new}; the old size must not be larger"
    )]
    Sizes {
        /// The older size.
        old: u64,
        /// The newer size.
        new: u64,
    },
    /// A node could not be read.
    #[error("prove: {0}")]
    Read(#[from] ReadError),
}

/// Why a proof was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// Index or sizes make no sense together.
    #[error("verify proof: index or sizes are out of range")]
    Range,
    /// Too few or too many hashes for these sizes.
    #[error("verify proof: wrong number of hashes for this index and size")]
    Length,
    /// The hashes lead to another root.
    #[error("verify proof: hashes do not lead to the checkpoint's root")]
    Root,
}

/// The hash of an entry: SHA-256(0x00 || entry).
pub fn leaf_hash(entry: &[u8]) -> Hash {
    let mut input = Vec::with_capacity(1 + entry.len());
    input.push(0x00);
    input.extend_from_slice(entry);
    sha256(&input)
}

/// The hash of an inner node: SHA-256(0x01 || left || right).
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    let mut input = [0x01; 1 + 2 * HASH_BYTES];
    input[1..1 + HASH_BYTES].copy_from_slice(left);
    input[1 + HASH_BYTES..].copy_from_slice(right);
    sha256(&input)
}

/// The root of a tree without entries: SHA-256 of nothing.
pub fn empty_root() -> Hash {
    sha256(&[])
}

/// The roots of the complete subtrees that make up a tree: all that is needed to append.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// One per bit set in `size`, largest subtree first.
    roots: Vec<Hash>,
}

impl Frontier {
    /// The frontier of a tree without entries.
    pub fn empty() -> Frontier {
        Frontier::default()
    }

    /// The frontier of the tree of `size` entries behind `nodes`.
    ///
    /// # Errors
    /// [`ReadError`] when a node is unreadable or `size` is beyond the bound.
    pub fn load(size: u64, nodes: &impl HashReader) -> Result<Frontier, ReadError> {
        if size > TREE_SIZE_MAX {
            return Err(ReadError {
                subject: format!("tree of {size} entries"),
                reason: "size is beyond the bound".into(),
            });
        }
        let roots = complete_subtrees(0, size)
            .map(|(level, index)| nodes.node(level, index))
            .collect::<Result<_, _>>()?;
        Ok(Frontier { size, roots })
    }

    /// How many entries the tree has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds one leaf hash on the right; `completed` is told every node this completes, lowest
    /// first, the leaf itself included.
    pub fn append(&mut self, leaf: Hash, mut completed: impl FnMut(u8, u64, &Hash)) {
        assert!(
            self.size < TREE_SIZE_MAX,
            "a tree never outgrows TREE_SIZE_MAX"
        );
        let (mut node, mut level, mut index) = (leaf, 0u8, self.size);
        completed(level, index, &node);
        while index & 1 == 1 {
            let left = self.roots.pop().expect("one root for each bit set in size");
            node = node_hash(&left, &node);
            (level, index) = (level + 1, index >> 1);
            completed(level, index, &node);
        }
        self.roots.push(node);
        self.size += 1;
        assert_eq!(
            self.roots.len(),
            self.size.count_ones() as usize,
            "one root per bit of size"
        );
    }

    /// The root of the tree.
    pub fn root(&self) -> Hash {
        fold_right(self.roots.iter().rev().copied()).unwrap_or_else(empty_root)
    }
}

/// All nodes of a tree, in memory: for small trees and for tests.
#[derive(Clone, Debug, Default)]
pub struct MemoryTree {
    frontier: Frontier,
    levels: Vec<Vec<Hash>>,
}

impl MemoryTree {
    /// A tree without entries.
    pub fn new() -> MemoryTree {
        MemoryTree::default()
    }

    /// Adds one leaf hash on the right.
    pub fn append(&mut self, leaf: Hash) {
        let levels = &mut self.levels;
        self.frontier.append(leaf, |level, index, hash| {
            if levels.len() <= usize::from(level) {
                levels.push(Vec::new());
            }
            assert_eq!(
                levels[usize::from(level)].len() as u64,
                index,
                "nodes complete in order"
            );
            levels[usize::from(level)].push(*hash);
        });
    }

    /// How many entries the tree has.
    pub fn size(&self) -> u64 {
        self.frontier.size()
    }

    /// The root of the tree.
    pub fn root(&self) -> Hash {
        self.frontier.root()
    }
}

impl HashReader for MemoryTree {
    fn node(&self, level: u8, index: u64) -> Result<Hash, ReadError> {
        self.levels
            .get(usize::from(level))
            .and_then(|l| l.get(usize::try_from(index).ok()?))
            .copied()
            .ok_or_else(|| ReadError {
                subject: format!("node {level}/{index}"),
                reason: "not in the tree".into(),
            })
    }
}

/// The root of the first `size` entries behind `nodes`.
///
/// # Errors
/// [`ReadError`] when a node is unreadable.
pub fn root(size: u64, nodes: &impl HashReader) -> Result<Hash, ReadError> {
    Ok(Frontier::load(size, nodes)?.root())
}

/// The audit path of entry `index` in the tree of `size` entries (RFC 6962, 2.1.1), leaf first.
///
/// # Errors
/// [`ProveError`] when there is no such entry or a node is unreadable.
pub fn inclusion_proof(
    index: u64,
    size: u64,
    nodes: &impl HashReader,
) -> Result<Vec<Hash>, ProveError> {
    if index >= size || size > TREE_SIZE_MAX {
        return Err(ProveError::Index { index, size });
    }
    let (mut begin, mut end) = (0, size);
    let mut proof = Vec::new();
    while end - begin > 1 {
        let middle = begin + split(end - begin);
        if index < middle {
            proof.push(range_root(middle, end, nodes)?);
            end = middle;
        } else {
            proof.push(range_root(begin, middle, nodes)?);
            begin = middle;
        }
    }
    proof.reverse();
    assert!(
        proof.len() <= PROOF_HASHES_MAX,
        "a path is no longer than the tree is high"
    );
    Ok(proof)
}

/// Checks that `leaf` is entry `index` of the tree with `size` entries and root `root`.
///
/// # Errors
/// [`ProofError`] when it is not, or the proof does not show it.
pub fn inclusion_verify(
    index: u64,
    size: u64,
    leaf: &Hash,
    proof: &[Hash],
    root: &Hash,
) -> Result<(), ProofError> {
    if index >= size || size > TREE_SIZE_MAX {
        return Err(ProofError::Range);
    }
    if proof.len() > PROOF_HASHES_MAX {
        return Err(ProofError::Length);
    }
    // RFC 9162, 2.1.3.2.
    let (mut at, mut last, mut hash) = (index, size - 1, *leaf);
    for sibling in proof {
        if last == 0 {
            return Err(ProofError::Length);
        }
        if at & 1 == 1 || at == last {
            hash = node_hash(sibling, &hash);
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    if last != 0 {
        return Err(ProofError::Length);
    }
    if hash == *root {
        Ok(())
    } else {
        Err(ProofError::Root)
    }
}

/// The proof that the tree of `old` entries is a prefix of the one of `new` (RFC 6962, 2.1.2).
/// Empty when `old` is 0 or equal to `new`.
///
/// # Errors
/// [`ProveError`] when `old` is larger than `new` or a node is unreadable.
pub fn consistency_proof(
    old: u64,
    new: u64,
    nodes: &impl HashReader,
) -> Result<Vec<Hash>, ProveError> {
    if old > new || new > TREE_SIZE_MAX {
        return Err(ProveError::Sizes { old, new });
    }
    if old == 0 || old == new {
        return Ok(Vec::new());
    }
    let (mut begin, mut end) = (0, new);
    let mut proof = Vec::new();
    while old != end {
        let middle = begin + split(end - begin);
        if old <= middle {
            proof.push(range_root(middle, end, nodes)?);
            end = middle;
        } else {
            proof.push(range_root(begin, middle, nodes)?);
            begin = middle;
        }
    }
    // The verifier knows the old root; it needs the last subtree only where that is not it.
    if begin != 0 {
        proof.push(range_root(begin, end, nodes)?);
    }
    proof.reverse();
    assert!(
        proof.len() <= PROOF_HASHES_MAX,
        "a proof is no longer than the tree is high, plus 1"
    );
    Ok(proof)
}

/// Checks that the tree (`old`, `old_root`) is a prefix of the tree (`new`, `new_root`).
///
/// # Errors
/// [`ProofError`] when it is not, or the proof does not show it.
pub fn consistency_verify(
    old: u64,
    new: u64,
    old_root: &Hash,
    new_root: &Hash,
    proof: &[Hash],
) -> Result<(), ProofError> {
    if old > new || new > TREE_SIZE_MAX {
        return Err(ProofError::Range);
    }
    if proof.len() > PROOF_HASHES_MAX {
        return Err(ProofError::Length);
    }
    if old == 0 || old == new {
        let expected = if old == 0 { empty_root() } else { *new_root };
        return match (proof.is_empty(), *old_root == expected) {
            (false, _) => Err(ProofError::Length),
            (true, false) => Err(ProofError::Root),
            (true, true) => Ok(()),
        };
    }
    // RFC 9162, 2.1.4.2.
    let (mut at, mut last) = (old - 1, new - 1);
    while at & 1 == 1 {
        (at, last) = (at >> 1, last >> 1);
    }
    let (seed, rest) = if old.is_power_of_two() {
        (*old_root, proof)
    } else {
        let (first, rest) = proof.split_first().ok_or(ProofError::Length)?;
        (*first, rest)
    };
    let (mut old_hash, mut new_hash) = (seed, seed);
    for sibling in rest {
        if last == 0 {
            return Err(ProofError::Length);
        }
        if at & 1 == 1 || at == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    if last != 0 {
        return Err(ProofError::Length);
    }
    if old_hash == *old_root && new_hash == *new_root {
        Ok(())
    } else {
        Err(ProofError::Root)
    }
}

/// The root of the complete subtree whose lowest nodes are `hashes`; their number is a power of 2.
pub(crate) fn subtree_root(hashes: &[Hash]) -> Hash {
    assert!(
        hashes.len().is_power_of_two(),
        "only complete subtrees have a root of their own"
    );
    let mut row = hashes.to_vec();
    while row.len() > 1 {
        row = row
            .chunks_exact(2)
            .map(|pair| node_hash(&pair[0], &pair[1]))
            .collect();
    }
    row[0]
}

/// Folds subtree roots into one, given from the right (smallest) to the left (largest).
pub(crate) fn fold_right(roots_right_to_left: impl Iterator<Item = Hash>) -> Option<Hash> {
    roots_right_to_left.reduce(|right, left| node_hash(&left, &right))
}

/// MTH of entries `begin..end`, where `begin` is aligned as RFC 6962's recursion leaves it.
fn range_root(begin: u64, end: u64, nodes: &impl HashReader) -> Result<Hash, ReadError> {
    let roots = complete_subtrees(begin, end)
        .map(|(level, index)| nodes.node(level, index))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(fold_right(roots.into_iter().rev()).expect("the recursion never asks for an empty range"))
}

/// The (level, index) of the complete subtrees that cover `begin..end`, left to right.
fn complete_subtrees(begin: u64, end: u64) -> impl Iterator<Item = (u8, u64)> {
    let length = end - begin;
    let mut at = begin;
    (0..u64::BITS as u8)
        .rev()
        .filter(move |level| length >> level & 1 == 1)
        .map(move |level| {
            assert_eq!(
                at & ((1 << level) - 1),
                0,
                "subtrees are aligned to their own size"
            );
            let index = at >> level;
            at += 1 << level;
            (level, index)
        })
}

/// The largest power of two smaller than `length`, which is at least 2.
fn split(length: u64) -> u64 {
    assert!(length >= 2, "only a range of two or more is split");
    1 << (u64::BITS - 1 - (length - 1).leading_zeros())
}

#[cfg(test)]
mod tests;
