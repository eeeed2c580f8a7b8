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
    data: Vec<Sector>,
}

/// A sector's bytes, where direct I/O takes them from.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(4096))]
struct Sector([u8; SECTOR_BYTES]);

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
    pub(super) fn put(&mut self, sector: u64, tag: Tag, data: &[u8; SECTOR_BYTES]) {
        let next = self.entries.len();
        let slot = *self.slots.entry(sector).or_insert(next);
        if slot == next {
            self.entries.push((sector, tag));
            self.data.push(Sector(*data));
        } else {
            self.entries[slot].1 = tag;
            self.data[slot].0 = *data;
        }
    }

    /// A sector's ciphertext, if it is here.
    pub(super) fn get(&self, sector: u64) -> Option<&[u8; SECTOR_BYTES]> {
        let slot = *self.slots.get(&sector)?;
        Some(&self.data[slot].0)
    }

    /// Sectors and tags.
    pub(super) fn entries(&self) -> &[(u64, Tag)] {
        &self.entries
    }

    /// Their ciphertext, in the order of the entries.
    pub(super) fn data(&self) -> &[u8] {
        bytes(&self.data)
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
            file.write_at(place(sector), bytes(&self.data[first..first + run]))?;
            rest = &rest[run..];
        }
        Ok(())
    }

    /// Empties it, keeping at most `keep_bytes` of memory.
    pub(super) fn clear(&mut self, keep_bytes: usize) {
        self.slots.clear();
        self.entries.clear();
        self.data.clear();
        self.data.shrink_to(keep_bytes / SECTOR_BYTES);
    }
}

/// Sectors as what they are in the file.
fn bytes(sectors: &[Sector]) -> &[u8] {
    // SAFETY: a `Sector` is 4096 bytes and nothing between them, all of them initialised; the slice
    // lives as long as what it was made of.
    unsafe { std::slice::from_raw_parts(sectors.as_ptr().cast(), size_of_val(sectors)) }
}

const _: () = assert!(size_of::<Sector>() == SECTOR_BYTES && align_of::<Sector>() == SECTOR_BYTES);
