//! The file as the VMM sees it: of a disk, the identity area, then the volume; of memory, what lies
//! behind the note of its image.

use std::io;
use std::sync::Arc;

use api::agent::VOLUME_OFFSET_BYTES;

use crate::backing::Backing;
use crate::fuse::Content;
use crate::identity::Identity;
use crate::limits::NOTE_AREA_BYTES;
use crate::volume::Volume;

/// One thread's way to the file. Clone it for another thread.
pub struct Object<B> {
    front: Front,
    volume: Volume<B>,
}

/// What is in front of the volume, or of it.
#[derive(Clone)]
enum Front {
    /// A disk's: made for this start, and nowhere in the volume.
    Identity(Arc<Identity>),
    /// Of memory that is being saved: the VMM's file begins behind the note.
    Saving,
    /// Of memory that is woken: the same, and nothing is written.
    Saved,
}

impl<B> Clone for Object<B> {
    fn clone(&self) -> Self {
        Self {
            front: self.front.clone(),
            volume: self.volume.clone(),
        }
    }
}

impl<B: Backing> Object<B> {
    /// The volume with an identity in front.
    #[must_use]
    pub fn new(identity: Identity, volume: Volume<B>) -> Self {
        Self {
            front: Front::Identity(Arc::new(identity)),
            volume,
        }
    }

    /// The image of a memory; `saved` if it is woken, else it is being written.
    #[must_use]
    pub fn memory(volume: Volume<B>, saved: bool) -> Self {
        let front = if saved { Front::Saved } else { Front::Saving };
        Self { front, volume }
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Volume<B> {
        &self.volume
    }

    /// Whether it is memory that is woken: then nothing is ever written to it.
    #[must_use]
    pub fn is_saved(&self) -> bool {
        matches!(self.front, Front::Saved)
    }

    /// The volume's offset of a range that may be changed.
    fn in_volume(&self, offset: u64, len: u64) -> io::Result<u64> {
        let errno = |code| Err(io::Error::from_raw_os_error(code));
        let place = match self.front {
            Front::Identity(_) => offset.checked_sub(VOLUME_OFFSET_BYTES),
            Front::Saving => offset.checked_add(NOTE_AREA_BYTES),
            Front::Saved => None,
        };
        match (place, offset.checked_add(len)) {
            (None, _) => errno(libc::EPERM),
            (Some(place), Some(end)) if end <= self.size_bytes() => Ok(place),
            _ => errno(libc::EFBIG),
        }
    }
}

impl<B: Backing> Content for Object<B> {
    fn size_bytes(&self) -> u64 {
        match self.front {
            Front::Identity(_) => VOLUME_OFFSET_BYTES + self.volume.size_bytes(),
            Front::Saving | Front::Saved => self.volume.size_bytes() - NOTE_AREA_BYTES,
        }
    }

    /// A woken VMM has its devices' state by one descriptor, and maps the pages by another.
    fn opens_max(&self) -> u32 {
        match self.front {
            Front::Identity(_) | Front::Saving => 1,
            Front::Saved => 2,
        }
    }

    /// A VMM that is told a disk's size sets it; one that saves cuts its file, which is empty, to
    /// where it begins to write. Neither changes anything.
    fn may_resize(&self, to_bytes: u64) -> bool {
        match self.front {
            Front::Identity(_) => to_bytes == self.size_bytes(),
            Front::Saving => to_bytes <= self.size_bytes(),
            Front::Saved => false,
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size_bytes().saturating_sub(offset);
        let n = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let Front::Identity(identity) = &self.front else {
            if n > 0 {
                self.volume.read(NOTE_AREA_BYTES + offset, &mut buf[..n])?;
            }
            return Ok(n);
        };
        let in_identity = VOLUME_OFFSET_BYTES.saturating_sub(offset);
        let split = usize::try_from(in_identity).map_or(n, |bytes| bytes.min(n));
        let (front, behind) = buf[..n].split_at_mut(split);
        if !front.is_empty() {
            identity.read(offset, front);
        }
        if !behind.is_empty() {
            self.volume
                .read(offset + split as u64 - VOLUME_OFFSET_BYTES, behind)?;
        }
        Ok(n)
    }

    /// `EPERM` in the identity area and in memory that is woken, `EFBIG` beyond the end. `data`
    /// holds ciphertext afterwards.
    fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let offset = self.in_volume(offset, data.len() as u64)?;
        self.volume.write(offset, data)
    }

    /// Whole sectors become holes.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let offset = self.in_volume(offset, len)?;
        self.volume.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        match self.front {
            Front::Saved => Ok(()),
            Front::Identity(_) | Front::Saving => self.volume.sync(),
        }
    }
}
