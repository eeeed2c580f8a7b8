//! The bytes of the sidecar: superblock, journal batches, where nodes lie. No IO.
//!
//! Numbers are little-endian. `docs/formats/disk.md` has the tables.

use super::{Chain, Keys, Tag};
use crate::limits::{
    BATCH_ENTRIES_MAX, CARRIED_SECTORS_MAX, JOURNAL_BYTES, NODE_BYTES, NODE_FANOUT, SECTOR_BYTES,
    TOP_NODES,
};

/// Bytes of a superblock slot.
pub const SUPERBLOCK_BYTES: usize = 4096;
/// Where the journal begins, bytes.
pub const JOURNAL_AT: u64 = 64 << 10;
/// Unit of the journal: a batch begins and ends at one, so that no write touches another batch.
pub const JOURNAL_UNIT: usize = 512;
/// Bytes of a batch before its entries.
pub const BATCH_HEAD_BYTES: usize = 80;
/// Largest batch, bytes.
pub const BATCH_MAX_BYTES: usize =
    (BATCH_HEAD_BYTES + BATCH_ENTRIES_MAX * ENTRY_BYTES + CARRIED_SECTORS_MAX * SECTOR_BYTES)
        .next_multiple_of(JOURNAL_UNIT);

const ENTRY_BYTES: usize = 24;
const SUPERBLOCK_MAGIC: [u8; 8] = *b"CMTAGS\0\x01";
const BATCH_MAGIC: [u8; 8] = *b"CMBATCH\x01";
/// Nodes begin here: 8 MiB, then each level behind the one above it.
const NODES_AT: u64 = 8 << 20;
const SLOTS_BYTES: u64 = 2 * NODE_BYTES as u64;
const MAC_AT: usize = SUPERBLOCK_BYTES - 32;

const _: () = assert!(JOURNAL_AT + JOURNAL_BYTES <= NODES_AT);
const _: () = assert!(BATCH_MAX_BYTES as u64 <= JOURNAL_BYTES / 4);
const _: () = assert!(TOP_NODES * 16 + 112 <= MAC_AT);

/// A point in a disk's life: the start that wrote it, then the batches so far. Ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Generation {
    /// The start, as the KMS numbers starts: it grows with each.
    pub run: u64,
    /// Batches that were made durable in the disk's life.
    pub batch: u64,
}

/// The root of a state that is whole: what a checkpoint leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Checkpoints so far; of two sound superblocks the higher counts.
    pub seq: u64,
    /// Sectors of the volume.
    pub sectors: u64,
    /// When.
    pub generation: Generation,
    /// The chain over all batches so far.
    pub chain: Chain,
    /// The tag of the LUKS2 header and keyslot.
    pub header: Tag,
    /// The nodes of the top level.
    pub top: [Tag; TOP_NODES],
}

impl Superblock {
    /// As it rests.
    pub fn encode(&self, keys: &Keys) -> [u8; SUPERBLOCK_BYTES] {
        let mut out = [0; SUPERBLOCK_BYTES];
        out[..8].copy_from_slice(&SUPERBLOCK_MAGIC);
        for (at, number) in [
            (8, self.seq),
            (16, self.sectors),
            (24, self.generation.run),
            (32, self.generation.batch),
        ] {
            out[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        out[40..72].copy_from_slice(&self.chain);
        out[72..88].copy_from_slice(&self.header);
        for (tag, out) in self.top.iter().zip(out[96..].chunks_exact_mut(16)) {
            out.copy_from_slice(tag);
        }
        let mac = keys.superblock(&out[..MAC_AT]);
        out[MAC_AT..].copy_from_slice(&mac);
        out
    }

    /// Reads one back; `None` if it is not what `encode` makes under these keys.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES], keys: &Keys) -> Option<Self> {
        if !seal::hash::ct_eq(&keys.superblock(&bytes[..MAC_AT]), &bytes[MAC_AT..]) {
            return None;
        }
        let mut top = [[0; 16]; TOP_NODES];
        for (tag, bytes) in top.iter_mut().zip(bytes[96..].chunks_exact(16)) {
            tag.copy_from_slice(bytes);
        }
        (bytes[..8] == SUPERBLOCK_MAGIC).then(|| Self {
            seq: number(bytes, 8),
            sectors: number(bytes, 16),
            generation: Generation {
                run: number(bytes, 24),
                batch: number(bytes, 32),
            },
            chain: array(bytes, 40),
            header: array(bytes, 72),
            top,
        })
    }
}

/// What a batch says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Sectors get these tags; their ciphertext is written after the batch is durable.
    Tags(Vec<(u64, Tag)>),
    /// The same, with the ciphertext in the batch: a small flush costs one sync.
    Carried(Vec<(u64, Tag)>, Vec<u8>),
    /// `count` sectors from `first` become holes.
    Holes {
        /// The first.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// One step of a disk: the unit of what is durable in the sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// When.
    pub generation: Generation,
    /// The last batch whose sectors were known to be durable when this one was written.
    pub confirmed: u64,
    /// What.
    pub body: Body,
}

impl Batch {
    /// As it rests, and the chain with it.
    pub fn encode(&self, keys: &Keys, before: &Chain) -> (Vec<u8>, Chain) {
        let (kind, entries, data): (u32, &[(u64, Tag)], &[u8]) = match &self.body {
            Body::Tags(entries) => (0, entries, &[]),
            Body::Carried(entries, data) => (1, entries, data),
            Body::Holes { .. } => (2, &[], &[]),
        };
        assert!(entries.len() <= BATCH_ENTRIES_MAX);
        assert!(kind != 1 || data.len() == entries.len() * SECTOR_BYTES);
        let mut out = vec![0; BATCH_HEAD_BYTES];
        out[..8].copy_from_slice(&BATCH_MAGIC);
        out[8..12].copy_from_slice(&kind.to_le_bytes());
        let count = u32::try_from(entries.len()).expect("bounded");
        out[12..16].copy_from_slice(&count.to_le_bytes());
        for (at, number) in [
            (16, self.generation.run),
            (24, self.generation.batch),
            (32, self.confirmed),
        ] {
            out[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        for (sector, tag) in entries {
            out.extend_from_slice(&sector.to_le_bytes());
            out.extend_from_slice(tag);
        }
        if let Body::Holes { first, count } = self.body {
            out.extend_from_slice(&first.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
        }
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(JOURNAL_UNIT), 0);
        let chain = keys.chain(before, &out);
        out[40..72].copy_from_slice(&chain);
        (out, chain)
    }

    /// How long the batch is whose first unit this is, bytes; `None` if it is none. Not to be
    /// trusted before [`Batch::decode`].
    pub fn length(unit: &[u8; JOURNAL_UNIT]) -> Option<usize> {
        let entries = short(unit, 12) as usize;
        let body = match short(unit, 8) {
            0 if entries <= BATCH_ENTRIES_MAX => entries * ENTRY_BYTES,
            1 if entries <= CARRIED_SECTORS_MAX => entries * (ENTRY_BYTES + SECTOR_BYTES),
            2 if entries == 0 => 16,
            _ => return None,
        };
        (unit[..8] == BATCH_MAGIC).then(|| (BATCH_HEAD_BYTES + body).next_multiple_of(JOURNAL_UNIT))
    }

    /// Reads the batch that follows `before` in the chain of a volume of `sectors`.
    pub fn decode(
        bytes: &[u8],
        keys: &Keys,
        before: &Chain,
        sectors: u64,
    ) -> Option<(Self, Chain)> {
        if Self::length(bytes.first_chunk()?)? != bytes.len() {
            return None;
        }
        let mut unsigned = bytes.to_vec();
        unsigned[40..72].fill(0);
        let chain = keys.chain(before, &unsigned);
        if !seal::hash::ct_eq(&chain, &bytes[40..72]) {
            return None;
        }
        // From here on it is what this program wrote under this key.
        let count = short(bytes, 12) as usize;
        let body = &bytes[BATCH_HEAD_BYTES..];
        let within =
            |first: u64, count: u64| first.checked_add(count).is_some_and(|end| end <= sectors);
        let body = if short(bytes, 8) == 2 {
            let (first, count) = (number(body, 0), number(body, 8));
            within(first, count).then_some(Body::Holes { first, count })?
        } else {
            let (entries, rest) = body.split_at(count * ENTRY_BYTES);
            let entries: Vec<(u64, Tag)> = entries
                .chunks_exact(ENTRY_BYTES)
                .map(|entry| (number(entry, 0), array(entry, 8)))
                .collect();
            if !entries.iter().all(|(sector, _)| within(*sector, 1)) {
                return None;
            }
            if short(bytes, 8) == 0 {
                Body::Tags(entries)
            } else {
                Body::Carried(entries, rest[..count * SECTOR_BYTES].to_vec())
            }
        };
        let batch = Self {
            generation: Generation {
                run: number(bytes, 16),
                batch: number(bytes, 24),
            },
            confirmed: number(bytes, 32),
            body,
        };
        Some((batch, chain))
    }
}

/// A node of the tree. Level 0 has the tags of sectors, a higher one those of nodes below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId {
    /// 0 to 2.
    pub level: u8,
    /// Which of its level.
    pub index: u64,
}

impl NodeId {
    /// The leaf that has a sector's tag.
    pub fn of(sector: u64) -> Self {
        Self {
            level: 0,
            index: sector / NODE_FANOUT as u64,
        }
    }

    /// The node above, and where in it; `None` above it is the superblock's array.
    pub fn parent(self) -> Option<Self> {
        (self.level < 2).then(|| Self {
            level: self.level + 1,
            index: self.index / NODE_FANOUT as u64,
        })
    }

    /// Where in the node above (or in the superblock's array) its tag is.
    pub fn place(self) -> usize {
        let fanout = if self.level < 2 {
            NODE_FANOUT
        } else {
            TOP_NODES
        };
        usize::try_from(self.index % fanout as u64).expect("below the fan-out")
    }

    /// How many sectors it covers.
    pub fn sectors(self) -> u64 {
        (NODE_FANOUT as u64).pow(u32::from(self.level) + 1)
    }

    /// Where one of its two slots lies, bytes.
    pub fn offset(self, slot: bool) -> u64 {
        const FANOUT: u64 = NODE_FANOUT as u64;
        const TOP: u64 = TOP_NODES as u64 * SLOTS_BYTES;
        let level = match self.level {
            2 => 0,
            1 => TOP,
            _ => TOP + TOP * FANOUT,
        };
        NODES_AT + level + self.index * SLOTS_BYTES + u64::from(slot) * NODE_BYTES as u64
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn short(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("of that length")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const SECTORS: u64 = 1 << 20;

    fn superblock() -> impl Strategy<Value = Superblock> {
        (
            any::<[u64; 4]>(),
            any::<[u8; 32]>(),
            any::<Tag>(),
            any::<[Tag; TOP_NODES]>(),
        )
            .prop_map(
                |([seq, sectors, run, batch], chain, header, top)| Superblock {
                    seq,
                    sectors,
                    generation: Generation { run, batch },
                    chain,
                    header,
                    top,
                },
            )
    }

    fn batch() -> impl Strategy<Value = Batch> {
        let entries = |max| proptest::collection::vec((0..SECTORS, any::<Tag>()), 0..max);
        let body = prop_oneof![
            entries(60).prop_map(Body::Tags),
            (entries(CARRIED_SECTORS_MAX), any::<u8>()).prop_map(|(entries, byte)| {
                let data = vec![byte; entries.len() * SECTOR_BYTES];
                Body::Carried(entries, data)
            }),
            (0..SECTORS, 0..9u64).prop_map(|(first, count)| Body::Holes {
                first,
                count: count.min(SECTORS - first)
            }),
        ];
        (any::<[u64; 3]>(), body).prop_map(|([run, batch, confirmed], body)| Batch {
            generation: Generation { run, batch },
            confirmed,
            body,
        })
    }

    proptest! {
        #[test]
        fn a_superblock_round_trips_and_no_bit_of_it_may_change(
            superblock in superblock(), at in 0..SUPERBLOCK_BYTES, flip in 1u8..,
        ) {
            let keys = Keys::derive(&[1; 32]).unwrap();
            let mut bytes = superblock.encode(&keys);
            let back = Superblock::decode(&bytes, &keys);
            prop_assert_eq!(back, Some(superblock));
            prop_assert!(Superblock::decode(&bytes, &Keys::derive(&[2; 32]).unwrap()).is_none());
            bytes[at] ^= flip;
            prop_assert!(Superblock::decode(&bytes, &keys).is_none());
        }

        #[test]
        fn a_batch_round_trips_at_its_place_and_no_bit_of_it_may_change(
            batch in batch(), at: prop::sample::Index, flip in 1u8.., before: [u8; 32],
        ) {
            let keys = Keys::derive(&[1; 32]).unwrap();
            let (mut bytes, chain) = batch.encode(&keys, &before);
            prop_assert!(bytes.len() <= BATCH_MAX_BYTES);
            prop_assert_eq!(Batch::length(bytes.first_chunk().unwrap()), Some(bytes.len()));
            let back = Batch::decode(&bytes, &keys, &before, SECTORS);
            prop_assert_eq!(back, Some((batch, chain)));
            let mut other = before;
            other[0] ^= 1;
            prop_assert!(Batch::decode(&bytes, &keys, &other, SECTORS).is_none());
            prop_assert!(Batch::decode(&bytes[..bytes.len() - 512], &keys, &before, SECTORS).is_none());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(Batch::decode(&bytes, &keys, &before, SECTORS).is_none());
        }

        #[test]
        fn survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let keys = Keys::derive(&[1; 32]).unwrap();
            prop_assert!(Batch::decode(&bytes, &keys, &[0; 32], SECTORS).is_none());
        }

        #[test]
        fn no_two_node_slots_overlap(a in node(), b in node(), s: bool, t: bool) {
            if (a, s) != (b, t) {
                prop_assert!(a.offset(s).abs_diff(b.offset(t)) >= NODE_BYTES as u64);
            }
            if let Some(parent) = a.parent() {
                prop_assert_eq!(parent.sectors(), a.sectors() * NODE_FANOUT as u64);
                prop_assert_eq!(parent.index * NODE_FANOUT as u64 + a.place() as u64, a.index);
            }
        }
    }

    fn node() -> impl Strategy<Value = NodeId> {
        (0..3u8, any::<prop::sample::Index>()).prop_map(|(level, index)| {
            let count = TOP_NODES * NODE_FANOUT.pow(2 - u32::from(level));
            let index = index.index(count) as u64;
            NodeId { level, index }
        })
    }
}
