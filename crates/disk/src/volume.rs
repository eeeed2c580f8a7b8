//! The decrypted volume over its backing file.
//!
//! Sector `n` (4096 bytes) of the volume rests at `DATA_OFFSET_BYTES + 4096 n`, encrypted under
//! `plain64`'s number for it. A sector whose ciphertext is all zeros is a hole and reads as zeros
//! (no plaintext encrypts to that but with a chance of 2^-32768). Only whole sectors are written:
//! a part of one is read, changed and written under the lock of its range.
//!
//! With a [`Sidecar`] each sector has a tag: what does not fit it is not answered, and what is
//! written waits there for its batch.
//!
//! Must never: answer a sync before the backing file did; go on after a sync that failed (the
//! kernel may have dropped what was to be written, and says so once); write beyond its size.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use seal::xts::Xts;

use crate::DiskError;
use crate::backing::Backing;
use crate::limits::{DATA_OFFSET_BYTES, HOLE_MIN_SECTORS, RUN_SECTORS, SECTOR_BYTES};
use crate::luks2::VolumeKey;
use crate::ranges::Ranges;
use crate::sidecar::{Report, Sidecar};

const SECTOR: u64 = SECTOR_BYTES as u64;

/// One thread's way to the volume. Clone it for another thread.
pub struct Volume<B> {
    shared: Arc<Shared<B>>,
    cipher: Xts,
}

struct Shared<B> {
    backing: B,
    sidecar: Option<Sidecar<B>>,
    size_bytes: u64,
    ranges: Ranges,
    lost: AtomicBool,
}

impl<B> Clone for Volume<B> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            cipher: self.cipher.clone(),
        }
    }
}

impl<B: Backing> Volume<B> {
    /// The volume of `size_bytes` under `key`, without integrity: what reads exports, and what
    /// integrity is measured against. A backing file that is shorter is extended with a hole.
    ///
    /// # Errors
    /// [`DiskError::Size`] if the size is not whole sectors or the file holds more than that.
    pub fn new(backing: B, key: &VolumeKey, size_bytes: u64) -> Result<Self, DiskError> {
        Self::build(backing, None, key, size_bytes)
    }

    /// The volume of `size_bytes` under `key`, with the tags of `sidecar`.
    ///
    /// # Errors
    /// Like [`Volume::new`].
    pub fn with_sidecar(
        backing: B,
        sidecar: Sidecar<B>,
        key: &VolumeKey,
        size_bytes: u64,
    ) -> Result<Self, DiskError> {
        Self::build(backing, Some(sidecar), key, size_bytes)
    }

    fn build(
        backing: B,
        sidecar: Option<Sidecar<B>>,
        key: &VolumeKey,
        size_bytes: u64,
    ) -> Result<Self, DiskError> {
        let size = |why| DiskError::Size { why };
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
            return Err(size("its size must be whole sectors of 4096 bytes"));
        }
        let end = DATA_OFFSET_BYTES
            .checked_add(size_bytes)
            .ok_or(size("its size is beyond any file's"))?;
        let len = backing
            .length()
            .map_err(DiskError::io("measuring the volume"))?;
        if len > end {
            return Err(size(
                "the file holds more than the size asked for: disks don't shrink",
            ));
        }
        if len < end {
            backing
                .set_len(end)
                .map_err(DiskError::io("extending the volume"))?;
        }
        let cipher = Xts::new(key.expose())?;
        let (ranges, lost) = (Ranges::default(), AtomicBool::new(false));
        Ok(Self {
            shared: Arc::new(Shared {
                backing,
                sidecar,
                size_bytes,
                ranges,
                lost,
            }),
            cipher,
        })
    }

    /// Its size, bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; the backing file's.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let sectors = self.sectors(offset, buf.len() as u64)?;
        let _range = self.shared.ranges.lock(sectors, false);
        for_each_piece(offset, buf, |piece| match piece {
            Piece::Whole { sector, data } => self.load(sector, data),
            Piece::Part { sector, from, data } => {
                let mut whole = [0; SECTOR_BYTES];
                self.load(sector, &mut whole)?;
                data.copy_from_slice(&whole[from..from + data.len()]);
                Ok(())
            }
        })
    }

    /// Writes `data` at `offset`; `data` holds ciphertext afterwards.
    ///
    /// # Errors
    /// `EINVAL` beyond the end; `EIO` after a sync that failed; the backing file's (a part may be
    /// written then).
    pub fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let sectors = self.sectors(offset, data.len() as u64)?;
        self.check_not_lost()?;
        let _range = self.shared.ranges.lock(sectors, true);
        for_each_piece(offset, data, |piece| match piece {
            Piece::Whole { sector, data } => self.store(sector, data),
            Piece::Part { sector, from, data } => {
                let mut whole = [0; SECTOR_BYTES];
                self.load(sector, &mut whole)?;
                whole[from..from + data.len()].copy_from_slice(data);
                self.store(sector, &mut whole)
            }
        })
    }

    /// Makes the range zeros: whole sectors become holes, the edges are written.
    ///
    /// # Errors
    /// Like [`Volume::write`].
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let sectors = self.sectors(offset, len)?;
        self.check_not_lost()?;
        let _range = self.shared.ranges.lock(sectors, true);
        let end = offset + len; // Within the size: checked.
        let holes = offset.div_ceil(SECTOR)..end / SECTOR;
        if holes.start < holes.end {
            self.zero_whole(holes.start, holes.end)?;
            self.zero_part(offset, holes.start * SECTOR)?;
            self.zero_part(holes.end * SECTOR, end)
        } else {
            let middle = end.min(holes.start * SECTOR);
            self.zero_part(offset, middle)?;
            self.zero_part(middle, end)
        }
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The backing file's; every later write and sync is refused with `EIO` then.
    pub fn sync(&self) -> io::Result<()> {
        self.check_not_lost()?;
        if let Some(sidecar) = &self.shared.sidecar {
            return sidecar.sync(&self.shared.backing);
        }
        self.shared
            .backing
            .sync()
            .inspect_err(|_| self.shared.lost.store(true, Ordering::SeqCst))
    }

    /// The work of a thread beside those that write: see [`Sidecar::drain_as_due`]. Of a volume
    /// without a sidecar there is none.
    pub fn drain_as_due(&self) {
        if let Some(sidecar) = &self.shared.sidecar {
            sidecar.drain_as_due(&self.shared.backing);
        }
    }

    /// As [`Volume::sync`], and leaves the sidecar without a journal. A volume that was only begun
    /// is one from here on.
    ///
    /// # Errors
    /// Like [`Volume::sync`].
    pub fn close(&self) -> io::Result<()> {
        self.check_not_lost()?;
        match &self.shared.sidecar {
            Some(sidecar) => sidecar.close(&self.shared.backing),
            None => self.sync(),
        }
    }

    /// What may be anchored now; `None` without a sidecar.
    ///
    /// # Errors
    /// Like [`Volume::sync`].
    pub fn anchor(&self) -> io::Result<Option<Report>> {
        let sidecar = self.shared.sidecar.as_ref();
        sidecar
            .map(|sidecar| sidecar.anchor(&self.shared.backing))
            .transpose()
    }

    /// Its state as it is known, durable or not; of a volume without a sidecar, none.
    #[must_use]
    pub fn report(&self) -> Report {
        let sidecar = self.shared.sidecar.as_ref();
        sidecar.map(Sidecar::report).unwrap_or_default()
    }

    /// Ends the making of a volume: see [`Sidecar::finish`].
    pub(crate) fn finish(&self) -> Result<(), DiskError> {
        match &self.shared.sidecar {
            Some(sidecar) => sidecar
                .finish(&self.shared.backing)
                .map_err(DiskError::io("making the sidecar")),
            None => Ok(()),
        }
    }

    /// Fills `data` from a sector; `false` if it is a hole.
    ///
    /// # Errors
    /// Like [`Volume::read`].
    pub(crate) fn read_sector(
        &self,
        sector: u64,
        data: &mut [u8; SECTOR_BYTES],
    ) -> io::Result<bool> {
        let sectors = self.sectors(sector.saturating_mul(SECTOR), SECTOR)?;
        let _range = self.shared.ranges.lock(sectors, false);
        self.fetch(sector, data)?;
        let allocated = *data != [0; SECTOR_BYTES];
        if allocated {
            self.cipher.decrypt(sector, data);
        }
        Ok(allocated)
    }

    /// Whether nothing was ever written to the range of whole sectors, or all of it was given back:
    /// by the sidecar's word. Without a sidecar that is believed.
    ///
    /// # Errors
    /// As a read of a sector that its tag does not fit.
    pub(crate) fn check_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.shared.sidecar {
            Some(sidecar) => sidecar.check_hole(offset / SECTOR, len / SECTOR),
            None => Ok(()),
        }
    }

    /// The backing file.
    pub(crate) fn backing(&self) -> &B {
        &self.shared.backing
    }

    /// Zeros less than a sector that lies in one sector.
    fn zero_part(&self, offset: u64, end: u64) -> io::Result<()> {
        if offset == end {
            return Ok(());
        }
        let sector = offset / SECTOR;
        let from = index(offset % SECTOR);
        let mut whole = [0; SECTOR_BYTES];
        self.load(sector, &mut whole)?;
        whole[from..from + index(end - offset)].fill(0);
        self.store(sector, &mut whole)
    }

    /// Makes whole sectors holes.
    fn zero_whole(&self, first: u64, end: u64) -> io::Result<()> {
        let backing = &self.shared.backing;
        match &self.shared.sidecar {
            None => backing.punch(place(first), (end - first) * SECTOR),
            Some(sidecar) if end - first >= HOLE_MIN_SECTORS => {
                sidecar.punch(backing, first, end - first)
            }
            Some(_) => {
                (first..end).try_for_each(|sector| self.store(sector, &mut [0; SECTOR_BYTES]))
            }
        }
    }

    /// Reads the ciphertext of whole sectors.
    fn fetch(&self, first_sector: u64, data: &mut [u8]) -> io::Result<()> {
        match &self.shared.sidecar {
            Some(sidecar) => sidecar.read(&self.shared.backing, first_sector, data),
            None => self.shared.backing.read_at(place(first_sector), data),
        }
    }

    /// Reads and decrypts whole sectors.
    fn load(&self, first_sector: u64, data: &mut [u8]) -> io::Result<()> {
        for (first, data) in runs(first_sector, data) {
            self.fetch(first, data)?;
            let (sectors, rest) = data.as_chunks_mut::<SECTOR_BYTES>();
            assert!(rest.is_empty());
            for (sector, data) in (first..).zip(sectors) {
                if *data != [0; SECTOR_BYTES] {
                    self.cipher.decrypt(sector, data);
                }
            }
        }
        Ok(())
    }

    /// Encrypts, in place, and writes whole sectors.
    fn store(&self, first_sector: u64, data: &mut [u8]) -> io::Result<()> {
        let len = data.len() as u64;
        assert!(place(first_sector) + len <= DATA_OFFSET_BYTES + self.shared.size_bytes);
        for (first, data) in runs(first_sector, data) {
            self.cipher.encrypt(first, data);
            match &self.shared.sidecar {
                Some(sidecar) => sidecar.write(&self.shared.backing, first, data)?,
                None => self.shared.backing.write_at(place(first), data)?,
            }
        }
        Ok(())
    }

    /// The sectors that a range touches, if it lies within the volume.
    fn sectors(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        match offset.checked_add(len) {
            Some(end) if end <= self.shared.size_bytes => Ok(offset / SECTOR..end.div_ceil(SECTOR)),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    fn check_not_lost(&self) -> io::Result<()> {
        if self.shared.lost.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

enum Piece<'a> {
    Whole {
        sector: u64,
        data: &'a mut [u8],
    },
    Part {
        sector: u64,
        from: usize,
        data: &'a mut [u8],
    },
}

/// Splits `data` at `offset` into what lies in whole sectors and, around it, parts of one.
fn for_each_piece(
    offset: u64,
    data: &mut [u8],
    mut run: impl FnMut(Piece<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let from = index(offset % SECTOR);
    let mut sector = offset / SECTOR;
    let head_bytes = if from == 0 {
        0
    } else {
        (SECTOR_BYTES - from).min(data.len())
    };
    let (head, rest) = data.split_at_mut(head_bytes);
    if !head.is_empty() {
        run(Piece::Part {
            sector,
            from,
            data: head,
        })?;
        sector += 1;
    }
    let (whole, tail) = rest.split_at_mut(rest.len() / SECTOR_BYTES * SECTOR_BYTES);
    let whole_sectors = (whole.len() / SECTOR_BYTES) as u64;
    if !whole.is_empty() {
        run(Piece::Whole {
            sector,
            data: whole,
        })?;
    }
    if !tail.is_empty() {
        run(Piece::Part {
            sector: sector + whole_sectors,
            from: 0,
            data: tail,
        })?;
    }
    Ok(())
}

/// Whole sectors in pieces that stay in a core's cache from one pass over them to the next.
fn runs(first_sector: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    let pieces = data.chunks_mut(RUN_SECTORS * SECTOR_BYTES);
    (first_sector..).step_by(RUN_SECTORS).zip(pieces)
}

/// Where a sector rests in the backing file, bytes.
fn place(sector: u64) -> u64 {
    DATA_OFFSET_BYTES + sector * SECTOR
}

fn index(below_a_sector: u64) -> usize {
    usize::try_from(below_a_sector).expect("at most 4096")
}
