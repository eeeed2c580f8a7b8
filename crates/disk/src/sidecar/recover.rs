//! Opening a sidecar: is this the disk's last state, and what did a crash leave open?
//!
//! Nothing is written before the state is accepted. Then, if there is a journal:
//!
//! - what its last batch calls confirmed stands, and what is anchored;
//! - a sector of a later batch is what that batch says, or what it was before: its bytes tell.
//!   If a batch carried its ciphertext, it is at least that;
//! - holes that may be unfinished are finished;
//! - a checkpoint under this start's number settles it, so that no other choice is left to anyone.

use std::collections::BTreeMap;

use super::layout::{
    BATCH_MAX_BYTES, Batch, Body, Generation, JOURNAL_AT, JOURNAL_UNIT, SUPERBLOCK_BYTES,
    Superblock,
};
use super::{Chain, Commit, Keys, Sidecar, Tag, fits, header_tag, place};
use crate::DiskError;
use crate::backing::Backing;
use crate::limits::{DATA_OFFSET_BYTES, JOURNAL_AHEAD_BYTES, JOURNAL_BYTES, SECTOR_BYTES};

/// The least state that may be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// Its generation.
    pub generation: Generation,
    /// The chain up to it.
    pub root: Chain,
}

/// A batch, and the chain up to it.
type Chained = (Batch, Chain);

impl<B: Backing> Sidecar<B> {
    /// How many sectors the volume has whose sidecar is in `file`.
    ///
    /// # Errors
    /// [`DiskError::Tampered`] if that says nobody who had the key; the file's.
    pub fn sectors_at_rest(file: &B, keys: &Keys) -> Result<u64, DiskError> {
        superblock(file, keys).map(|found| found.sectors)
    }

    /// Opens the sidecar in `file` of the volume in `data`, which is to have `sectors`, for the
    /// start `run`.
    ///
    /// # Errors
    /// [`DiskError::Tampered`] for anything that is not a state of this disk since `anchor`;
    /// [`DiskError::Size`] for a volume that was larger; [`DiskError::Grant`] if a later start has
    /// had the disk; the files'.
    pub fn open(
        file: B,
        data: &B,
        keys: Keys,
        sectors: u64,
        run: u64,
        anchor: Option<&Anchor>,
    ) -> Result<Self, DiskError> {
        let reading = || DiskError::io("reading the sidecar");
        let superblock = superblock(&file, &keys)?;
        if superblock.sectors > sectors {
            return Err(DiskError::Size {
                why: "it is larger than the size asked for: disks don't shrink",
            });
        }
        let length = data.length().map_err(reading())?;
        if length < DATA_OFFSET_BYTES + superblock.sectors * SECTOR_BYTES as u64 {
            return Err(tampered("the disk's file was cut off"));
        }
        let header = header_tag(&keys.tagger, data).map_err(reading())?;
        if !seal::hash::ct_eq(&header, &superblock.header) {
            return Err(tampered("the disk's header was changed"));
        }
        let journal = journal(&file, &keys, &superblock, sectors)?;
        let states = std::iter::once((superblock.generation, superblock.chain)).chain(
            journal
                .iter()
                .map(|(batch, chain)| (batch.generation, *chain)),
        );
        check_anchor(states, anchor)?;
        let end = journal
            .last()
            .map_or(superblock.generation, |(batch, _)| batch.generation);
        if end.run >= run {
            return Err(DiskError::Grant {
                why: "a later start has had this disk: start the workspace again",
            });
        }

        // Accepted. From here on it may be written.
        let commit = Commit {
            run,
            generation: end,
            chain: journal.last().map_or(superblock.chain, |(_, chain)| *chain),
            confirmed: end.batch,
            journal_at: 0,
            // All that is sure of a sidecar of any age.
            journal_ahead: JOURNAL_AHEAD_BYTES,
            seq: superblock.seq,
            header: superblock.header,
            appended: false,
            unsynced: false,
            uncarried: false,
        };
        let sidecar = Self::with(file, keys, sectors, commit, superblock.top);
        if !journal.is_empty() {
            // What is anchored was durable as a whole.
            let anchored = anchor.map_or(Generation::default(), |anchor| anchor.generation);
            sidecar
                .settle(data, journal, anchored)
                .map_err(DiskError::io("recovering the volume"))?;
        }
        Ok(sidecar)
    }

    /// Decides what the crash left open, durably.
    fn settle(&self, data: &B, journal: Vec<Chained>, anchored: Generation) -> std::io::Result<()> {
        let confirmed = journal.last().map_or(0, |(batch, _)| batch.confirmed);
        let mut open = BTreeMap::new();
        for (batch, _) in journal {
            let settled = batch.generation.batch <= confirmed || batch.generation <= anchored;
            match batch.body {
                Body::Tags(entries) if settled => self.note(&entries),
                Body::Carried(entries, _) if settled => self.note(&entries),
                Body::Holes { first, count } => {
                    self.view_mut().changes.punch(first..first + count);
                    if !settled {
                        data.punch(place(first), count * SECTOR_BYTES as u64)?;
                    }
                }
                Body::Tags(entries) => {
                    for (sector, tag) in entries {
                        open.entry(sector)
                            .or_insert_with(Vec::new)
                            .push((tag, None));
                    }
                }
                Body::Carried(entries, bytes) => {
                    let sectors = bytes.as_chunks::<SECTOR_BYTES>().0;
                    for ((sector, tag), bytes) in entries.into_iter().zip(sectors) {
                        let versions = open.entry(sector).or_insert_with(Vec::new);
                        versions.push((tag, Some(Box::new(*bytes))));
                    }
                }
            }
        }
        for (sector, versions) in open {
            let tag = self.settle_sector(data, sector, versions)?;
            self.note(&[(sector, tag)]);
        }
        let mut commit = self.committer();
        commit.chain = self.keys.chain(&commit.chain, &commit.run.to_le_bytes());
        commit.generation = Generation {
            run: commit.run,
            batch: commit.generation.batch + 1,
        };
        commit.unsynced = true;
        self.checkpoint(&mut commit, data)
    }

    /// Which of its versions a sector is.
    fn settle_sector(
        &self,
        data: &B,
        sector: u64,
        versions: Vec<(Tag, Option<Box<[u8; SECTOR_BYTES]>>)>,
    ) -> std::io::Result<Tag> {
        let mut bytes = [0; SECTOR_BYTES];
        data.read_at(place(sector), &mut bytes)?;
        let carried = versions.iter().rposition(|(_, bytes)| bytes.is_some());
        let from = carried.unwrap_or(0);
        let is = |tag: &&Tag| fits(&self.keys.tagger, sector, &bytes, tag);
        if let Some(tag) = versions[from..].iter().map(|(tag, _)| tag).find(is) {
            return Ok(*tag);
        }
        if let (tag, Some(bytes)) = &versions[from] {
            data.write_at(place(sector), &bytes[..])?;
            return Ok(*tag);
        }
        let mut before = [[0; 16]];
        self.tags(sector, &mut before)?;
        if is(&&before[0]) {
            return Ok(before[0]);
        }
        // Torn inside, or changed. It can't be read until it is written again.
        let _ = self.refuse(sector);
        Ok(versions[versions.len() - 1].0)
    }

    fn note(&self, entries: &[(u64, Tag)]) {
        let mut view = self.view_mut();
        for (sector, tag) in entries {
            view.changes.set(*sector, *tag);
        }
    }
}

fn tampered(what: &'static str) -> DiskError {
    DiskError::Tampered { what }
}

/// The newest sound superblock.
fn superblock<B: Backing>(file: &B, keys: &Keys) -> Result<Superblock, DiskError> {
    let mut newest = None;
    for slot in 0..2 {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        file.read_at(slot * SUPERBLOCK_BYTES as u64, &mut bytes)
            .map_err(DiskError::io("reading the sidecar"))?;
        // Each in its own slot: a copy in the other's place is none.
        let found = Superblock::decode(&bytes, keys).filter(|found| found.seq & 1 == slot);
        newest = newest
            .into_iter()
            .chain(found)
            .max_by_key(|known| known.seq);
    }
    newest.ok_or(tampered(
        "its sidecar is missing, overwritten or another disk's",
    ))
}

/// The batches behind the superblock, up to the first that does not continue them.
fn journal<B: Backing>(
    file: &B,
    keys: &Keys,
    superblock: &Superblock,
    sectors: u64,
) -> Result<Vec<Chained>, DiskError> {
    let mut found = Vec::new();
    let (mut at, mut before) = (0, (superblock.generation, superblock.chain));
    let mut confirmed = superblock.generation.batch;
    while at + JOURNAL_UNIT as u64 <= JOURNAL_BYTES {
        let mut unit = [0; JOURNAL_UNIT];
        file.read_at(JOURNAL_AT + at, &mut unit)
            .map_err(DiskError::io("reading the journal"))?;
        let Some(length) = Batch::length(&unit) else {
            break;
        };
        if length > BATCH_MAX_BYTES || at + length as u64 > JOURNAL_BYTES {
            break;
        }
        let mut bytes = vec![0; length];
        file.read_at(JOURNAL_AT + at, &mut bytes)
            .map_err(DiskError::io("reading the journal"))?;
        let Some((batch, chain)) = Batch::decode(&bytes, keys, &before.1, sectors) else {
            break;
        };
        assert!(batch.generation > before.0 && batch.generation.batch == before.0.batch + 1);
        assert!(batch.confirmed >= confirmed && batch.confirmed < batch.generation.batch);
        confirmed = batch.confirmed;
        before = (batch.generation, chain);
        at += length as u64;
        found.push((batch, chain));
    }
    Ok(found)
}

/// Whether the last state is not older than the anchor, and has it in its past.
fn check_anchor(
    states: impl Iterator<Item = (Generation, Chain)>,
    anchor: Option<&Anchor>,
) -> Result<(), DiskError> {
    let Some(anchor) = anchor else { return Ok(()) };
    let mut last = Generation::default();
    for (generation, chain) in states {
        if generation == anchor.generation && chain != anchor.root {
            return Err(tampered("its history is not the one that was anchored"));
        }
        last = generation;
    }
    if last < anchor.generation {
        return Err(tampered(
            "it was rolled back: its state is older than the last one anchored at the KMS",
        ));
    }
    Ok(())
}
