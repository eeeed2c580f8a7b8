//! Ciphertext that was answered to the guest and has not reached the data file yet.

use std::collections::HashMap;
use std::io;

use super::{Tag, place};
use crate::backing::Backing;
use crate::limits::SECTOR_BYTES;

/// Sectors with their tags, in the order of their first write.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    slots: HashMap<u64, usize>,
    entries: Vec<(u64, Tag)>,
    data: Vec<u8>,
}

impl Buffer {
    /// How many sectors there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keeps a sector, in place of what was kept of it.
    pub(super) fn put(&mut self, sector: u64, tag: Tag, data: &[u8]) {
        assert_eq!(data.len(), SECTOR_BYTES);
        let next = self.entries.len();
        let slot = *self.slots.entry(sector).or_insert(next);
        if slot == next {
            self.entries.push((sector, tag));
            self.data.extend_from_slice(data);
        } else {
            self.entries[slot].1 = tag;
            self.data[slot * SECTOR_BYTES..][..SECTOR_BYTES].copy_from_slice(data);
        }
    }

    /// A sector's ciphertext, if it is here.
    pub(super) fn get(&self, sector: u64) -> Option<&[u8]> {
        let slot = *self.slots.get(&sector)?;
        Some(&self.data[slot * SECTOR_BYTES..][..SECTOR_BYTES])
    }

    /// Sectors and tags.
    pub(super) fn entries(&self) -> &[(u64, Tag)] {
        &self.entries
    }

    /// Their ciphertext, in the order of the entries.
    pub(super) fn data(&self) -> &[u8] {
        &self.data
    }

    /// Writes all of it to its place.
    ///
    /// # Errors
    /// The file's; a part is written then, and may be written again.
    pub(super) fn write_to<B: Backing>(&self, file: &B) -> io::Result<()> {
        let mut order: Vec<usize> = (0..self.entries.len()).collect();
        order.sort_unstable_by_key(|slot| self.entries[*slot].0);
        let mut rest = &order[..];
        while let Some(&first) = rest.first() {
            let sector = self.entries[first].0;
            let run = rest
                .iter()
                .enumerate()
                .take_while(|(n, slot)| {
                    **slot == first + n && self.entries[**slot].0 == sector + *n as u64
                })
                .count();
            let data = &self.data[first * SECTOR_BYTES..(first + run) * SECTOR_BYTES];
            file.write_at(place(sector), data)?;
            rest = &rest[run..];
        }
        Ok(())
    }

    /// Empties it, keeping at most `keep_bytes` of memory.
    pub(super) fn clear(&mut self, keep_bytes: usize) {
        self.slots.clear();
        self.entries.clear();
        self.data.clear();
        self.data.shrink_to(keep_bytes);
    }
}
