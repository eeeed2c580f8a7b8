//! The file as the VMM sees it: the identity area, then the volume.

use std::io;
use std::sync::Arc;

use api::agent::VOLUME_OFFSET_BYTES;

use crate::backing::Backing;
use crate::fuse::Content;
use crate::identity::Identity;
use crate::volume::Volume;

/// One thread's way to the file. Clone it for another thread.
pub struct Object<B> {
    identity: Arc<Identity>,
    volume: Volume<B>,
}

impl<B> Clone for Object<B> {
    fn clone(&self) -> Self {
        Self {
            identity: Arc::clone(&self.identity),
            volume: self.volume.clone(),
        }
    }
}

impl<B: Backing> Object<B> {
    /// The volume with an identity in front.
    #[must_use]
    pub fn new(identity: Identity, volume: Volume<B>) -> Self {
        Self {
            identity: Arc::new(identity),
            volume,
        }
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &Volume<B> {
        &self.volume
    }

    /// The volume's offset of a range that may be changed.
    fn in_volume(&self, offset: u64, len: u64) -> io::Result<u64> {
        let errno = |code| Err(io::Error::from_raw_os_error(code));
        match (
            offset.checked_sub(VOLUME_OFFSET_BYTES),
            offset.checked_add(len),
        ) {
            (None, _) => errno(libc::EPERM),
            (Some(offset), Some(end)) if end <= self.size_bytes() => Ok(offset),
            _ => errno(libc::EFBIG),
        }
    }
}

impl<B: Backing> Content for Object<B> {
    fn size_bytes(&self) -> u64 {
        VOLUME_OFFSET_BYTES + self.volume.size_bytes()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size_bytes().saturating_sub(offset);
        let n = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let in_identity = VOLUME_OFFSET_BYTES.saturating_sub(offset);
        let split = usize::try_from(in_identity).map_or(n, |bytes| bytes.min(n));
        let (front, behind) = buf[..n].split_at_mut(split);
        if !front.is_empty() {
            self.identity.read(offset, front);
        }
        if !behind.is_empty() {
            self.volume
                .read(offset + split as u64 - VOLUME_OFFSET_BYTES, behind)?;
        }
        Ok(n)
    }

    /// `EPERM` in the identity area, `EFBIG` beyond the end. `data` holds ciphertext afterwards.
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
        self.volume.sync()
    }
}
