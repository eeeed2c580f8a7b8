//! Integrity of a volume: a keyed tag per sector, in a file beside it.
//!
//! ```text
//! write ─▶ buffer ──full, or a flush──▶ batch of tags ─▶ journal, synced ─▶ ciphertext written
//!   (answered)                              (chained)         │                (flush: synced)
//!                                                             ▼
//!                              checkpoint: changes ─▶ nodes ─▶ superblock, journal empty
//! ```
//!
//! A sector's new tag is durable before its new ciphertext may reach the disk: so after a power
//! cut each sector is what its last confirmed batch says, or what a later one does, and nothing
//! else is accepted. Whoever cuts the power, or changes the files, gets at most a state that a
//! power cut at some moment since the last anchor could have left.
//!
//! | module | what |
//! |---|---|
//! | [`layout`] | bytes |
//! | [`tree`] | tags of the last checkpoint, read as needed |
//! | [`changes`] | tags since then |
//! | [`buffer`] | ciphertext that waits for its batch |
//! | [`recover`] | opening: the anchor, the journal, what a crash left open |
//! | [`statement`] | what the KMS is told of the state |
//!
//! Lock order: commit, then view or buffers. Must never: write ciphertext whose tag is not
//! durable, answer a sector that its tag does not fit, accept a state older than the anchor, write
//! anything before the state is accepted.

mod buffer;
mod changes;
pub mod layout;
mod recover;
mod statement;
#[cfg(test)]
mod tests;
mod tree;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

use seal::kdf::hkdf;
use seal::secret::SecretBytes;
use seal::tag::Tagger;

use self::buffer::Buffer;
use self::changes::Changes;
use self::layout::{
    BATCH_MAX_BYTES, Batch, Body, Generation, JOURNAL_AT, SUPERBLOCK_BYTES, Superblock,
};
pub use self::recover::Anchor;
pub use self::statement::Witness;
use self::tree::{Cache, Top, Tree, TreeError};
use crate::DiskError;
use crate::backing::Backing;
use crate::limits::{
    BUFFER_KEPT_BYTES, BUFFER_SECTORS, CARRIED_SECTORS_MAX, CHANGES_MAX, DATA_OFFSET_BYTES,
    HEADER_COVERED_BYTES, JOURNAL_AHEAD_BYTES, JOURNAL_BYTES, SECTOR_BYTES, WRITE_OUT_BYTES,
};

/// A keyed tag. Zeros: a hole, whose bytes must be zeros.
pub type Tag = [u8; 16];
/// The chain over all batches of a disk's life.
pub type Chain = [u8; 32];

const SECTOR_DOMAIN: u32 = 1;
const NODE_DOMAIN: u32 = 2;
const HEADER_DOMAIN: u32 = 3;
const SALT: &[u8] = b"casemate/disk/integrity/v1";
/// Sectors that are looked up at once.
const STRIDE: usize = 256;

/// The keys of a disk's integrity, all from the disk's key.
pub struct Keys {
    tagger: Tagger,
    chain: SecretBytes<32>,
    superblock: SecretBytes<32>,
}

impl Keys {
    /// Derives them.
    ///
    /// # Errors
    /// The library's.
    pub fn derive(disk_key: &[u8; 32]) -> Result<Self, DiskError> {
        let key = |label: &[u8]| {
            let mut key = SecretBytes::<32>::zeroed();
            hkdf(disk_key, SALT, &[label], key.expose_mut());
            key
        };
        Ok(Self {
            tagger: Tagger::new(key(b"tags").expose())?,
            chain: key(b"chain"),
            superblock: key(b"superblock"),
        })
    }

    fn superblock(&self, bytes: &[u8]) -> [u8; 32] {
        seal::hash::hmac_sha256(self.superblock.expose(), bytes)
    }

    fn chain(&self, before: &Chain, batch: &[u8]) -> Chain {
        let mut text = Vec::with_capacity(before.len() + batch.len());
        text.extend_from_slice(before);
        text.extend_from_slice(batch);
        seal::hash::hmac_sha256(self.chain.expose(), &text)
    }
}

/// The integrity of one volume.
pub struct Sidecar<B> {
    file: B,
    keys: Keys,
    sectors: u64,
    commit: Mutex<Commit>,
    buffers: Mutex<Buffers>,
    /// There is enough in the buffers for a batch.
    due: Condvar,
    view: RwLock<View>,
    cache: Cache,
    buffer_sectors: usize,
    changes_max: usize,
    lost: AtomicBool,
    /// A volume that is being made: nothing of it counts before its first superblock.
    making: AtomicBool,
    /// Bytes written to the data file since it was asked to write out.
    written_bytes: AtomicU64,
    refused: Refused,
}

/// What only one thread at a time goes on with.
struct Commit {
    /// This start's number.
    run: u64,
    /// The last durable batch, and the chain up to it.
    generation: Generation,
    chain: Chain,
    /// The last batch whose sectors are durable.
    confirmed: u64,
    journal_at: u64,
    /// Up to here the journal's place in the file was written before.
    journal_ahead: u64,
    seq: u64,
    header: Tag,
    /// The batch of what is being flushed is durable.
    appended: bool,
    /// Ciphertext was written that no sync of the data file covers.
    unsynced: bool,
    /// Some of that is in no batch either: a flush must sync the data file.
    uncarried: bool,
}

#[derive(Default)]
struct Buffers {
    active: Buffer,
    flushing: Option<Arc<Buffer>>,
    /// Empty: memory for the next active one.
    spare: Buffer,
}

struct View {
    top: Top,
    changes: Changes,
}

/// Sectors that did not fit their tags.
#[derive(Debug, Default)]
struct Refused {
    count: AtomicU64,
    /// The first one's number and 1; 0: none.
    first: AtomicU64,
}

/// What a process says about its disk's integrity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The last durable generation.
    pub generation: Generation,
    /// The chain up to it.
    pub root: Chain,
    /// Reads that were refused.
    pub refused: u64,
    /// The first sector that was.
    pub first_refused: Option<u64>,
}

impl<B: Backing> Sidecar<B> {
    /// Begins the sidecar of a volume that is being made. Until [`Sidecar::finish`], writes go
    /// straight to the data file and nothing is durable.
    ///
    /// # Errors
    /// The file's.
    pub fn create(file: B, keys: Keys, sectors: u64, run: u64) -> Result<Self, DiskError> {
        let making = || DiskError::io("making the sidecar");
        file.set_len(0).map_err(making())?;
        journal_ahead(&file, 0).map_err(making())?;
        let commit = Commit {
            run,
            generation: Generation { run, batch: 1 },
            chain: keys.chain(&[0; 32], &run.to_le_bytes()),
            confirmed: 1,
            journal_at: 0,
            journal_ahead: JOURNAL_AHEAD_BYTES,
            seq: 0,
            header: [0; 16],
            appended: false,
            unsynced: true,
            uncarried: true,
        };
        let sidecar = Self::with(file, keys, sectors, commit, Top::default());
        sidecar.making.store(true, Ordering::SeqCst);
        Ok(sidecar)
    }

    fn with(file: B, keys: Keys, sectors: u64, commit: Commit, top: Top) -> Self {
        Self {
            file,
            keys,
            sectors,
            commit: Mutex::new(commit),
            buffers: Mutex::default(),
            due: Condvar::new(),
            view: RwLock::new(View {
                top,
                changes: Changes::default(),
            }),
            cache: Cache::default(),
            buffer_sectors: BUFFER_SECTORS,
            changes_max: CHANGES_MAX,
            lost: AtomicBool::new(false),
            making: AtomicBool::new(false),
            written_bytes: AtomicU64::new(0),
            refused: Refused::default(),
        }
    }

    /// Ends the making: data, tags and the header's tag become durable.
    ///
    /// # Errors
    /// The files'.
    pub fn finish(&self, data: &B) -> io::Result<()> {
        let mut commit = self.committer();
        assert!(self.is_making());
        self.make(&mut commit, data)
    }

    fn make(&self, commit: &mut Commit, data: &B) -> io::Result<()> {
        commit.header = header_tag(&self.keys.tagger, data)?;
        self.checkpoint(commit, data)?;
        self.making.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Fills `out` (whole sectors) with the ciphertext of the sectors from `first` on, each one
    /// checked. The caller holds their range.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for a sector that its tag does not fit; the files'.
    pub fn read(&self, data: &B, first: u64, out: &mut [u8]) -> io::Result<()> {
        let strides = out.chunks_mut(STRIDE * SECTOR_BYTES);
        for (first, out) in (first..).step_by(STRIDE).zip(strides) {
            self.read_stride(data, first, out)?;
        }
        Ok(())
    }

    fn read_stride(&self, data: &B, first: u64, out: &mut [u8]) -> io::Result<()> {
        let (sectors, rest) = out.as_chunks_mut::<SECTOR_BYTES>();
        assert!(rest.is_empty() && sectors.len() <= STRIDE);
        let mut known = [false; STRIDE];
        let buffered = self.buffers().copy(first, sectors, &mut known);
        if buffered == sectors.len() {
            return Ok(());
        }
        // What is in no buffer by now is in the view: it gets there before it leaves the buffer.
        let mut tags = [[0; 16]; STRIDE];
        self.tags(first, &mut tags[..sectors.len()])?;
        if buffered == 0 {
            data.read_at(place(first), sectors.as_flattened_mut())?;
        }
        for (index, sector) in sectors.iter_mut().enumerate() {
            if known[index] {
                continue;
            }
            let number = first + index as u64;
            if buffered > 0 {
                data.read_at(place(number), sector)?;
            }
            if !fits(&self.keys.tagger, number, sector, &tags[index]) {
                return Err(self.refuse(number));
            }
        }
        Ok(())
    }

    /// Takes whole sectors of ciphertext over. They are readable from here on, and durable after
    /// the next [`Sidecar::sync`]. The caller holds their range.
    ///
    /// # Errors
    /// The files', about what was taken over before: `ENOSPC` may pass.
    pub fn write(&self, data: &B, first: u64, bytes: &[u8]) -> io::Result<()> {
        let (sectors, rest) = bytes.as_chunks::<SECTOR_BYTES>();
        assert!(rest.is_empty() && first + sectors.len() as u64 <= self.sectors);
        for (first, sectors) in (first..).step_by(STRIDE).zip(sectors.chunks(STRIDE)) {
            let mut tags = [[0; 16]; STRIDE];
            for (number, (sector, tag)) in (first..).zip(sectors.iter().zip(&mut tags)) {
                *tag = self.keys.tagger.tag(SECTOR_DOMAIN, number, sector);
            }
            self.write_stride(data, first, sectors, &tags[..sectors.len()])?;
        }
        Ok(())
    }

    fn write_stride(
        &self,
        data: &B,
        first: u64,
        sectors: &[[u8; SECTOR_BYTES]],
        tags: &[Tag],
    ) -> io::Result<()> {
        if self.is_making() {
            data.write_at(place(first), sectors.as_flattened())?;
            self.write_out(data, sectors.len());
            {
                let mut commit = self.committer();
                (commit.unsynced, commit.uncarried) = (true, true);
            }
            return self.note_making(first, tags);
        }
        while !self
            .buffers()
            .put(first, sectors, tags, self.buffer_sectors)
        {
            // Behind the one that drains, if there is one.
            let mut commit = self.committer();
            // Another thread may have made room meanwhile.
            if !self.buffers().has_room(sectors.len(), self.buffer_sectors) {
                self.drain(&mut commit, data, false)?;
            }
        }
        if self.buffers().is_due(self.buffer_sectors) {
            self.due.notify_one();
        }
        Ok(())
    }

    /// Brings what was written to the data file as it comes, in batches, for ever: a thread's whole
    /// work. Without one, whoever finds the buffer full does it, and all that writes waits.
    pub fn drain_as_due(&self, data: &B) -> ! {
        loop {
            let not_due = |buffers: &mut Buffers| !buffers.is_due(self.buffer_sectors);
            let waited = self.due.wait_while(self.buffers(), not_due);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            if self.drain_if_due(data).is_err() {
                // What failed is told to the next who flushes or finds no room, and may pass. Here
                // the next try comes with the next write.
                let written = self.due.wait(self.buffers());
                drop(written.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// One batch, if there is enough for it.
    fn drain_if_due(&self, data: &B) -> io::Result<()> {
        let mut commit = self.committer();
        // Another thread may have been faster.
        if self.buffers().is_due(self.buffer_sectors) {
            self.drain(&mut commit, data, false)?;
        }
        Ok(())
    }

    /// Has what was written to the data file go out, a little at a time: then neither a flush nor a
    /// neighbour's has much to wait for. Whoever brings batches out waits for it, not who writes.
    fn write_out(&self, data: &B, sectors: usize) {
        let bytes = (sectors * SECTOR_BYTES) as u64;
        if self.written_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes >= WRITE_OUT_BYTES {
            self.written_bytes.store(0, Ordering::Relaxed);
            data.write_out();
        }
    }

    fn note_making(&self, first: u64, tags: &[Tag]) -> io::Result<()> {
        let mut view = self.view_mut();
        for (number, tag) in (first..).zip(tags) {
            view.changes.set(number, *tag);
        }
        if view.changes.len() > self.changes_max {
            let tree = self.tree(&view.top);
            view.top = tree
                .apply(&view.changes)
                .map_err(|error| self.tree_error(error))?;
            view.changes = Changes::default();
        }
        Ok(())
    }

    /// Makes sectors holes, durably. The caller holds their range.
    ///
    /// # Errors
    /// The files'.
    pub fn punch(&self, data: &B, first: u64, count: u64) -> io::Result<()> {
        assert!(first + count <= self.sectors);
        let mut commit = self.committer();
        self.drain_all(&mut commit, data, false)?;
        if self.is_hole(first, count)? {
            return Ok(());
        }
        // A batch of holes is finished by whoever finds it last in the journal: so all before it
        // must be settled, and it must be settled before the next.
        self.sync_data(&mut commit, data)?;
        if !self.is_making() {
            self.append(&mut commit, data, Body::Holes { first, count })?;
        }
        commit.unsynced = true;
        commit.uncarried = true;
        self.view_mut().changes.punch(first..first + count);
        data.punch(place(first), count * SECTOR_BYTES as u64)
            .inspect_err(|_| self.lose())?;
        self.sync_data(&mut commit, data)
    }

    /// Makes all that was written durable, and remembered as such.
    ///
    /// # Errors
    /// The files'; after a failed sync everything is refused.
    pub fn sync(&self, data: &B) -> io::Result<()> {
        let mut commit = self.committer();
        let carry = !commit.uncarried;
        self.drain_all(&mut commit, data, carry)?;
        if commit.uncarried {
            self.sync_data(&mut commit, data)?;
        }
        Ok(())
    }

    /// As [`Sidecar::sync`], and leaves a state without a journal: the end of a start. One that is
    /// being made is made.
    ///
    /// # Errors
    /// As [`Sidecar::sync`].
    pub fn close(&self, data: &B) -> io::Result<()> {
        let mut commit = self.committer();
        if self.is_making() {
            return self.make(&mut commit, data);
        }
        drop(commit);
        self.sync(data)?;
        let mut commit = self.committer();
        if commit.journal_at == 0 {
            return Ok(());
        }
        self.checkpoint(&mut commit, data)
    }

    /// What may be anchored: its last durable generation, with all of its ciphertext durable too.
    /// A start that has this anchor leaves nothing of it open.
    ///
    /// # Errors
    /// The files'.
    pub fn anchor(&self, data: &B) -> io::Result<Report> {
        let mut commit = self.committer();
        if self.buffers().flushing.is_some() {
            self.drain(&mut commit, data, false)?;
        }
        if commit.confirmed < commit.generation.batch {
            self.sync_data(&mut commit, data)?;
        }
        Ok(self.report_of(&commit))
    }

    /// What can be said about it now.
    pub fn report(&self) -> Report {
        self.report_of(&self.committer())
    }

    fn report_of(&self, commit: &Commit) -> Report {
        let first = self.refused.first.load(Ordering::SeqCst);
        Report {
            generation: commit.generation,
            root: commit.chain,
            refused: self.refused.count.load(Ordering::SeqCst),
            first_refused: first.checked_sub(1),
        }
    }

    /// Brings what waits to the data file, and first what an earlier failure left.
    fn drain_all(&self, commit: &mut Commit, data: &B, carry: bool) -> io::Result<()> {
        let left = self.buffers().flushing.is_some();
        if left {
            self.drain(commit, data, false)?;
        }
        self.drain(commit, data, carry && !left)
    }

    fn drain(&self, commit: &mut Commit, data: &B, carry: bool) -> io::Result<()> {
        self.check_not_lost()?;
        let Some(buffer) = self.buffers().next(&mut commit.appended) else {
            return Ok(());
        };
        if !commit.appended {
            let carry = carry && buffer.len() <= CARRIED_SECTORS_MAX;
            let entries = buffer.entries().to_vec();
            let body = if carry {
                Body::Carried(entries, buffer.data().to_vec())
            } else {
                Body::Tags(entries)
            };
            self.append(commit, data, body)?;
            commit.appended = true;
            commit.uncarried |= !carry;
        }
        commit.unsynced = true;
        buffer.write_to(data)?;
        self.write_out(data, buffer.len());
        let full = {
            let mut view = self.view_mut();
            for (sector, tag) in buffer.entries() {
                view.changes.set(*sector, *tag);
            }
            view.changes.len() > self.changes_max
        };
        self.buffers().done(buffer);
        commit.appended = false;
        if full {
            self.checkpoint(commit, data)?;
        }
        Ok(())
    }

    /// Makes a batch durable in the journal.
    fn append(&self, commit: &mut Commit, data: &B, body: Body) -> io::Result<()> {
        if commit.journal_at + BATCH_MAX_BYTES as u64 > JOURNAL_BYTES {
            self.checkpoint(commit, data)?;
        }
        let batch = Batch {
            generation: Generation {
                run: commit.run,
                batch: commit.generation.batch + 1,
            },
            confirmed: commit.confirmed,
            body,
        };
        let (bytes, chain) = batch.encode(&self.keys, &commit.chain);
        if commit.journal_at + bytes.len() as u64 > commit.journal_ahead {
            journal_ahead(&self.file, commit.journal_ahead)?;
            commit.journal_ahead += JOURNAL_AHEAD_BYTES;
        }
        self.file.write_at(JOURNAL_AT + commit.journal_at, &bytes)?;
        self.file.sync().inspect_err(|_| self.lose())?;
        commit.journal_at += bytes.len() as u64;
        commit.generation = batch.generation;
        commit.chain = chain;
        Ok(())
    }

    /// Brings the changes into the tree, durably, and empties the journal.
    fn checkpoint(&self, commit: &mut Commit, data: &B) -> io::Result<()> {
        self.check_not_lost()?;
        self.sync_data(commit, data)?;
        let top = {
            let view = self.view();
            self.tree(&view.top)
                .apply(&view.changes)
                .map_err(|error| self.tree_error(error))?
        };
        // A volume that is being made has no older state to fall back to: one sync is enough.
        if !self.is_making() {
            self.file.sync().inspect_err(|_| self.lose())?;
        }
        let seq = commit.seq + 1;
        let superblock = Superblock {
            seq,
            sectors: self.sectors,
            generation: commit.generation,
            chain: commit.chain,
            header: commit.header,
            top,
        };
        let at = superblock_at(seq);
        self.file.write_at(at, &superblock.encode(&self.keys))?;
        self.file.sync().inspect_err(|_| self.lose())?;
        *self.view_mut() = View {
            top,
            changes: Changes::default(),
        };
        commit.seq = seq;
        commit.journal_at = 0;
        Ok(())
    }

    fn sync_data(&self, commit: &mut Commit, data: &B) -> io::Result<()> {
        self.check_not_lost()?;
        if commit.unsynced {
            data.sync().inspect_err(|_| self.lose())?;
        }
        commit.unsynced = false;
        commit.uncarried = false;
        // What waits in `flushing` has its batch, but is not in the file yet.
        if !commit.appended {
            commit.confirmed = commit.generation.batch;
        }
        Ok(())
    }

    /// Refuses sectors of which one has a tag: they are no hole, whatever their file says.
    ///
    /// # Errors
    /// As [`Sidecar::read`].
    pub fn check_hole(&self, first: u64, count: u64) -> io::Result<()> {
        if self.is_hole(first, count)? {
            return Ok(());
        }
        Err(self.refuse(first))
    }

    fn is_hole(&self, first: u64, count: u64) -> io::Result<bool> {
        let view = self.view();
        if view.changes.touch(first..first + count) {
            return Ok(false);
        }
        self.tree(&view.top)
            .is_empty(first, count)
            .map_err(|error| self.tree_error(error))
    }

    fn tags(&self, first: u64, out: &mut [Tag]) -> io::Result<()> {
        let view = self.view();
        self.tree(&view.top)
            .tags(first, out)
            .map_err(|error| self.tree_error(error))?;
        view.changes.overlay(first, out);
        Ok(())
    }

    fn tree<'a>(&'a self, top: &'a Top) -> Tree<'a, B> {
        Tree {
            file: &self.file,
            tagger: &self.keys.tagger,
            cache: &self.cache,
            top,
        }
    }

    fn tree_error(&self, error: TreeError) -> io::Error {
        match error {
            TreeError::Io(error) => error,
            TreeError::Tampered(id) => self.refuse(id.index * id.sectors()),
        }
    }

    /// Counts a sector, or the first of a node, that does not fit.
    fn refuse(&self, sector: u64) -> io::Error {
        self.refused.count.fetch_add(1, Ordering::SeqCst);
        let _ = self.refused.first.compare_exchange(
            0,
            sector.saturating_add(1),
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        io::ErrorKind::InvalidData.into() // `EIO` to the VMM.
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    fn check_not_lost(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn is_making(&self) -> bool {
        self.making.load(Ordering::SeqCst)
    }

    fn committer(&self) -> MutexGuard<'_, Commit> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn view_mut(&self) -> RwLockWriteGuard<'_, View> {
        self.view.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffers {
    fn has_room(&self, sectors: usize, most: usize) -> bool {
        self.active.is_empty() || self.active.len() + sectors <= most
    }

    /// Whether there is enough for a batch: half of what is the most.
    fn is_due(&self, most: usize) -> bool {
        self.active.len() >= most / 2
    }

    /// Whether there was room.
    fn put(
        &mut self,
        first: u64,
        sectors: &[[u8; SECTOR_BYTES]],
        tags: &[Tag],
        most: usize,
    ) -> bool {
        if !self.has_room(sectors.len(), most) {
            return false;
        }
        for (number, (data, tag)) in (first..).zip(sectors.iter().zip(tags)) {
            self.active.put(number, *tag, data);
        }
        true
    }

    /// Copies the sectors that are here, the newest of each, and says how many there are.
    fn copy(&self, first: u64, out: &mut [[u8; SECTOR_BYTES]], known: &mut [bool]) -> usize {
        if self.active.is_empty() && self.flushing.is_none() {
            return 0;
        }
        let flushing = self.flushing.as_deref();
        let mut count = 0;
        for (number, (out, known)) in (first..).zip(out.iter_mut().zip(known)) {
            let newest = self.active.get(number);
            if let Some(data) = newest.or_else(|| flushing?.get(number)) {
                out.copy_from_slice(data);
                *known = true;
                count += 1;
            }
        }
        count
    }

    /// What is to be flushed: what was left, or else what is active.
    fn next(&mut self, appended: &mut bool) -> Option<Arc<Buffer>> {
        if self.flushing.is_none() && !self.active.is_empty() {
            *appended = false;
            let next = std::mem::take(&mut self.spare);
            self.flushing = Some(Arc::new(std::mem::replace(&mut self.active, next)));
        }
        self.flushing.clone()
    }

    fn done(&mut self, buffer: Arc<Buffer>) {
        self.flushing = None;
        // While much is written, the memory goes round; after that it goes back.
        let keep_bytes = if buffer.len() >= BUFFER_SECTORS / 2 {
            usize::MAX
        } else {
            BUFFER_KEPT_BYTES
        };
        if let Ok(mut buffer) = Arc::try_unwrap(buffer) {
            buffer.clear(keep_bytes);
            self.spare = buffer;
        }
    }
}

/// Whether a sector's bytes are what its tag says.
fn fits(tagger: &Tagger, number: u64, sector: &[u8; SECTOR_BYTES], tag: &Tag) -> bool {
    if *tag == [0; 16] {
        return *sector == [0; SECTOR_BYTES];
    }
    seal::hash::ct_eq(&tagger.tag(SECTOR_DOMAIN, number, sector), tag)
}

/// The tag of all that a start reads before the first sector.
fn header_tag<B: Backing>(tagger: &Tagger, data: &B) -> io::Result<Tag> {
    let mut bytes = vec![0; HEADER_COVERED_BYTES];
    data.read_at(0, &mut bytes)?;
    Ok(tagger.tag(HEADER_DOMAIN, 0, &bytes))
}

/// Where a sector rests in the data file, bytes.
fn place(sector: u64) -> u64 {
    DATA_OFFSET_BYTES + sector * SECTOR_BYTES as u64
}

/// Writes the next part of the journal's place, from `at` on: nothing of the journal is there yet.
fn journal_ahead<B: Backing>(file: &B, at: u64) -> io::Result<()> {
    let blank = vec![0; usize::try_from(JOURNAL_AHEAD_BYTES).expect("a small constant")];
    file.write_at(JOURNAL_AT + at, &blank)
}

/// Where a checkpoint's superblock rests, bytes.
fn superblock_at(seq: u64) -> u64 {
    (seq & 1) * SUPERBLOCK_BYTES as u64
}
