//! Segments: where entries are durable first, and from where they are integrated.
//!
//! A class's segments are the files `<first index, 20 digits>.seg`. Each starts with what numbering
//! needs to go on, so that a restart reads nothing but the last one, and holds batches after it.
//!
//! | bytes | start | | bytes | batch |
//! |---|---|---|---|---|
//! | 8 | `CMSEG001` | | 4 | `CMB1` |
//! | 1 | class | | 4 | bytes of the entries |
//! | 8 | index of the first entry | | 4 | how many, from 1 |
//! | 8 | time of the entry before it, ms | | 8 | index of the first |
//! | 4 | how many accounts | | n | entries: `u16` length, bytes |
//! | 40 each | tag, next sequence number | | 32 | SHA-256 of label, class and all the above |
//! | 32 | SHA-256 of all the above | | | |
//!
//! All numbers are big-endian. A batch is written in one piece and synced before the next one, so
//! only the last one can be torn; anything else that does not fit is damage, and refused.
//!
//! Must never do more IO than to read a segment whole.

use crate::limits::{
    BATCH_BYTES_MAX, BATCH_ENTRIES_MAX, SEGMENT_BYTES_MAX, SEGMENT_TAGS_MAX, SEGMENTS_MAX,
};
use seal::hash::sha256;
use std::collections::BTreeMap;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use tlog::class::Class;

const START_MAGIC: &[u8; 8] = b"CMSEG001";
const BATCH_MAGIC: &[u8; 4] = b"CMB1";
const BATCH_LABEL: &[u8] = b"casemate/segment/batch/v1\0";
const BATCH_HEAD: usize = 4 + 4 + 4 + 8;
const HASH: usize = 32;
/// What a batch has besides its entries.
pub const BATCH_OVERHEAD: usize = BATCH_HEAD + HASH;

/// What stands at the start of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The log.
    pub class: Class,
    /// Index of the first entry that this segment may hold.
    pub first_index: u64,
    /// Time of the entry before it, ms since the epoch.
    pub time_ms: u64,
    /// The next sequence number of each account tag.
    pub seqs: BTreeMap<[u8; 32], u64>,
}

/// Entries that became durable together.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch<'a> {
    /// Index of the first.
    pub first_index: u64,
    /// Each entry's bytes.
    pub leaves: Vec<&'a [u8]>,
    /// Bytes that the batch takes in the segment.
    pub bytes: usize,
}

/// What comes next in a segment.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// A whole batch.
    Batch(Batch<'a>),
    /// Nothing.
    End,
    /// The beginning of a batch that was never synced.
    Torn,
}

/// Why a segment was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The start is no start, or of another class.
    #[error("read segment: its start is damaged ({0}); restore the segment from a backup")]
    Start(&'static str),
    /// Something in the middle does not fit.
    #[error(
        "read segment: damaged before entry {index}, and whole entries follow the damage; restore \
         the segment from a backup, or check what was published with `casemate audit verify`"
    )]
    Damaged {
        /// The first entry that can't be read.
        index: u64,
    },
    /// Entries are missing or there twice.
    #[error(
        "read segment: entry {expected} should follow, {got} does; restore the segment from a \
         backup, or check what was published with `casemate audit verify`"
    )]
    Index {
        /// The index that should come.
        expected: u64,
        /// The one that is there.
        got: u64,
    },
}

impl Start {
    /// The bytes at the start of a segment.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(29 + self.seqs.len() * 40 + HASH);
        out.extend_from_slice(START_MAGIC);
        out.push(self.class.code());
        out.extend_from_slice(&self.first_index.to_be_bytes());
        out.extend_from_slice(&self.time_ms.to_be_bytes());
        let count = u32::try_from(self.seqs.len()).expect("accounts are bounded far below 2^32");
        out.extend_from_slice(&count.to_be_bytes());
        for (tag, next) in &self.seqs {
            out.extend_from_slice(tag);
            out.extend_from_slice(&next.to_be_bytes());
        }
        out.extend_from_slice(&sha256(&out));
        out
    }

    /// Reads the start of a segment of `class`; also says how many bytes it takes.
    ///
    /// # Errors
    /// [`SegmentError::Start`] unless it is one, whole and of this class.
    pub fn decode(class: Class, bytes: &[u8]) -> Result<(Start, usize), SegmentError> {
        let short = || SegmentError::Start("too short");
        let mut rest = bytes;
        if &take::<8>(&mut rest).ok_or_else(short)? != START_MAGIC {
            return Err(SegmentError::Start("it does not begin with CMSEG001"));
        }
        let [code] = take(&mut rest).ok_or_else(short)?;
        if code != class.code() {
            return Err(SegmentError::Start("it is of another class"));
        }
        let first_index = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let time_ms = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let count = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?) as usize;
        if count > SEGMENT_TAGS_MAX || count * 40 + HASH > rest.len() {
            return Err(short());
        }
        let mut seqs = BTreeMap::new();
        for _ in 0..count {
            let tag: [u8; 32] = take(&mut rest).ok_or_else(short)?;
            let next = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
            if seqs.last_key_value().is_some_and(|(last, _)| *last >= tag) {
                return Err(SegmentError::Start("tags are not in order"));
            }
            seqs.insert(tag, next);
        }
        let body = bytes.len() - rest.len();
        if take::<HASH>(&mut rest).ok_or_else(short)? != sha256(&bytes[..body]) {
            return Err(SegmentError::Start("its hash is wrong"));
        }
        let start = Start {
            class,
            first_index,
            time_ms,
            seqs,
        };
        Ok((start, body + HASH))
    }
}

/// The bytes of a batch.
///
/// # Panics
/// Without an entry, or beyond the bounds: the writer's fault.
#[must_use]
pub fn batch_encode(class: Class, first_index: u64, leaves: &[Vec<u8>]) -> Vec<u8> {
    let body: usize = leaves.iter().map(|leaf| 2 + leaf.len()).sum();
    assert!(!leaves.is_empty() && leaves.len() <= BATCH_ENTRIES_MAX && body <= BATCH_BYTES_MAX);
    let mut out = Vec::with_capacity(body + BATCH_OVERHEAD);
    out.extend_from_slice(BATCH_MAGIC);
    out.extend_from_slice(&u32::try_from(body).expect("asserted above").to_be_bytes());
    let count = u32::try_from(leaves.len()).expect("asserted above");
    out.extend_from_slice(&count.to_be_bytes());
    out.extend_from_slice(&first_index.to_be_bytes());
    for leaf in leaves {
        let len = u16::try_from(leaf.len()).expect("a leaf has at most 65,535 bytes");
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(leaf);
    }
    out.extend_from_slice(&batch_hash(class, &out));
    out
}

/// What follows in the segment at `bytes`, where entry `index` must come next.
///
/// # Errors
/// [`SegmentError`] when it is damaged other than by a torn last batch.
pub fn next(class: Class, index: u64, bytes: &[u8]) -> Result<Next<'_>, SegmentError> {
    if bytes.is_empty() {
        return Ok(Next::End);
    }
    match batch_decode(class, bytes) {
        Some(batch) if batch.first_index == index => Ok(Next::Batch(batch)),
        Some(batch) => Err(SegmentError::Index {
            expected: index,
            got: batch.first_index,
        }),
        // One write at a time: whole batches after it, or more bytes than one has, are no tear.
        None if bytes.len() > BATCH_BYTES_MAX + BATCH_OVERHEAD || batch_follows(class, bytes) => {
            Err(SegmentError::Damaged { index })
        }
        None => Ok(Next::Torn),
    }
}

/// The segment's file name.
#[must_use]
pub fn name(first_index: u64) -> String {
    format!("{first_index:020}.seg")
}

/// The segments in a directory, in order.
///
/// # Errors
/// The file system's, or too many files.
pub fn list(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let Some(first) = file
            .strip_suffix(".seg")
            .and_then(|n| n.parse::<u64>().ok())
            .filter(|n| name(*n) == file)
        else {
            continue;
        };
        if out.len() == SEGMENTS_MAX {
            return Err(io::Error::other(format!(
                "more than {SEGMENTS_MAX} segments in {}",
                dir.display()
            )));
        }
        out.push((first, path));
    }
    out.sort();
    Ok(out)
}

/// The bytes of a segment from `offset` on.
///
/// # Errors
/// The file system's, or a file beyond the bound.
pub fn read_from(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    let mut out = Vec::new();
    file.take(SEGMENT_BYTES_MAX + 1).read_to_end(&mut out)?;
    if out.len() as u64 > SEGMENT_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} is larger than any segment", path.display()),
        ));
    }
    Ok(out)
}

fn batch_hash(class: Class, bytes: &[u8]) -> [u8; HASH] {
    let mut hash = seal::hash::Sha256::new();
    hash.update(BATCH_LABEL);
    hash.update(&[class.code()]);
    hash.update(bytes);
    hash.finish()
}

/// The batch at the start of `bytes`, if there is a whole one.
fn batch_decode(class: Class, bytes: &[u8]) -> Option<Batch<'_>> {
    let mut rest = bytes;
    if &take::<4>(&mut rest)? != BATCH_MAGIC {
        return None;
    }
    let body = u32::from_be_bytes(take(&mut rest)?) as usize;
    let count = u32::from_be_bytes(take(&mut rest)?) as usize;
    let first_index = u64::from_be_bytes(take(&mut rest)?);
    if body > BATCH_BYTES_MAX || count == 0 || count > BATCH_ENTRIES_MAX {
        return None;
    }
    let (mut entries, mut rest) = rest.split_at_checked(body)?;
    if take::<HASH>(&mut rest)? != batch_hash(class, &bytes[..BATCH_HEAD + body]) {
        return None;
    }
    let mut leaves = Vec::with_capacity(count);
    for _ in 0..count {
        let len = u16::from_be_bytes(take(&mut entries)?);
        let (leaf, after) = entries.split_at_checked(usize::from(len))?;
        leaves.push(leaf);
        entries = after;
    }
    entries.is_empty().then_some(Batch {
        first_index,
        leaves,
        bytes: body + BATCH_OVERHEAD,
    })
}

/// Whether a whole batch is anywhere after the first byte.
fn batch_follows(class: Class, bytes: &[u8]) -> bool {
    (1..bytes.len().saturating_sub(BATCH_OVERHEAD))
        .filter(|at| bytes[*at..].starts_with(BATCH_MAGIC))
        .any(|at| batch_decode(class, &bytes[at..]).is_some())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const CLASS: Class = Class::Host;

    fn start() -> Start {
        Start {
            class: CLASS,
            first_index: 7,
            time_ms: 9,
            seqs: [([1; 32], 3), ([2; 32], 4)].into(),
        }
    }

    #[test]
    fn the_bytes_are_frozen() {
        let hash = hex::encode(sha256(&start().encode()));
        expect_test::expect!["ecf895acc9dc1f94fe6ba3f1bb896e2311809e61fb17937930b94987ebfa34c0"]
            .assert_eq(&hash);
        let batch = batch_encode(CLASS, 7, &[b"ab".to_vec(), vec![]]);
        expect_test::expect!["434d423100000006000000020000000000000007000261620000743acc0ebd88a99e9141b8eb0d9a7265d5e0c28472e75f6b5191148161831f9d"].assert_eq(&hex::encode(batch));
    }

    #[test]
    fn a_damaged_middle_is_not_a_torn_end() {
        let one = batch_encode(CLASS, 0, &[vec![1; 100]]);
        let two = batch_encode(CLASS, 1, &[vec![2; 100]]);
        let both = [one.clone(), two.clone()].concat();
        for at in 0..one.len() {
            let mut bad = both.clone();
            bad[at] ^= 1;
            assert_eq!(
                next(CLASS, 0, &bad),
                Err(SegmentError::Damaged { index: 0 }),
                "{at}"
            );
        }
        for len in 1..one.len() {
            assert_eq!(next(CLASS, 0, &one[..len]), Ok(Next::Torn));
        }
        assert_eq!(
            next(CLASS, 0, &two),
            Err(SegmentError::Index {
                expected: 0,
                got: 1
            })
        );
        assert!(next(Class::Api, 0, &one).is_ok_and(|n| n == Next::Torn));
        let endless = vec![0; BATCH_BYTES_MAX + BATCH_OVERHEAD + 1];
        assert!(next(CLASS, 0, &endless).is_err());
    }

    proptest! {
        #[test]
        fn starts_and_batches_round_trip(
            seqs in proptest::collection::btree_map(any::<[u8; 32]>(), any::<u64>(), 0..20),
            first_index: u64,
            leaves in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..20),
        ) {
            let start = Start { class: CLASS, first_index, time_ms: 3, seqs };
            let mut bytes = start.encode();
            let len = bytes.len();
            bytes.extend_from_slice(&batch_encode(CLASS, first_index, &leaves));
            prop_assert_eq!(Start::decode(CLASS, &bytes).unwrap(), (start, len));
            let Next::Batch(batch) = next(CLASS, first_index, &bytes[len..]).unwrap() else {
                panic!("no batch");
            };
            prop_assert_eq!(batch.leaves, leaves);
            prop_assert_eq!(len + batch.bytes, bytes.len());
        }

        #[test]
        fn hostile_bytes_are_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            magic: bool,
        ) {
            let bytes = if magic { [BATCH_MAGIC.as_slice(), &bytes].concat() } else { bytes };
            prop_assert!(Start::decode(CLASS, &bytes).is_err());
            prop_assert!(!matches!(next(CLASS, 0, &bytes), Ok(Next::Batch(_))));
        }
    }
}
