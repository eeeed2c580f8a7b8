//! Images: saved memory, and the disk of a snapshot. A volume like a disk's, whose first MiB is a
//! note instead of nothing: what warden wants to know of it when it comes back. It is encrypted and
//! has tags like all else, so that an image can't be paired with another's note.
//!
//! Copies go through the cipher: what is read under one key is written under the other, sector by
//! sector, and never in clear to any file.

use seal::Zeroize;

use crate::DiskError;
use crate::backing::{Backing, DataFile, next_data, next_hole};
use crate::format::write_non_zero;
use crate::grant::Grant;
use crate::limits::{
    DATA_OFFSET_BYTES, NOTE_AREA_BYTES, NOTE_MAX_BYTES, REQUEST_MAX_BYTES, SECTOR_BYTES,
};
use crate::luks2;
use crate::sidecar::{Keys, Sidecar};
use crate::volume::Volume;

const MAGIC: &[u8; 8] = b"CMNOTE\x00\x01";
const HEAD_BYTES: usize = MAGIC.len() + 4;
const SECTOR: u64 = SECTOR_BYTES as u64;

/// Opens an image, of the size that its sidecar says, and its note. Nothing is written to it: it was
/// closed before it was kept.
///
/// # Errors
/// [`DiskError::Tampered`] for anything but what was kept under this key; [`DiskError::Unfinished`]
/// without a note; the files'.
pub fn open<B: Backing>(
    backing: B,
    tags: B,
    grant: &Grant<'_>,
) -> Result<(Volume<B>, String), DiskError> {
    let keys = Keys::derive(grant.disk_key.expose())?;
    let sectors = Sidecar::sectors_at_rest(&tags, &keys)?;
    let size_bytes = sectors * SECTOR;
    let len = backing
        .length()
        .map_err(DiskError::io("measuring an image"))?;
    if len != DATA_OFFSET_BYTES + size_bytes {
        return Err(DiskError::Tampered {
            what: "the image's file was cut off or extended",
        });
    }
    let sidecar = Sidecar::open(tags, &backing, keys, sectors, grant.run, None);
    let sidecar = sidecar.map_err(unclosed)?;
    let key = luks2::open(&backing, &grant.disk_key, &grant.workspace)?;
    let volume = Volume::with_sidecar(backing, sidecar, &key, size_bytes)?;
    let note = note_read(&volume)?;
    Ok((volume, note))
}

/// One that wants to be recovered, which its files don't allow, has lost its last superblock since it
/// was kept.
fn unclosed(error: DiskError) -> DiskError {
    match error {
        DiskError::Io { source, .. } if source.raw_os_error() == Some(libc::EBADF) => {
            DiskError::Tampered {
                what: "the image's sidecar was changed",
            }
        }
        error => error,
    }
}

/// Writes the note.
///
/// # Errors
/// [`DiskError::Protocol`] for one that is too long; the volume's.
pub fn note_write<B: Backing>(volume: &Volume<B>, note: &str) -> Result<(), DiskError> {
    let len = u32::try_from(note.len())
        .ok()
        .filter(|_| note.len() <= NOTE_MAX_BYTES);
    let len = len.ok_or(DiskError::Protocol {
        subject: "note",
        why: "longer than 4084 bytes",
    })?;
    let mut sector = [0; SECTOR_BYTES];
    sector[..MAGIC.len()].copy_from_slice(MAGIC);
    sector[MAGIC.len()..HEAD_BYTES].copy_from_slice(&len.to_be_bytes());
    sector[HEAD_BYTES..HEAD_BYTES + note.len()].copy_from_slice(note.as_bytes());
    let written = volume.write(0, &mut sector);
    written.map_err(DiskError::io("writing the note of an image"))
}

/// Reads the note.
///
/// # Errors
/// [`DiskError::Unfinished`] without one: it comes last. The volume's.
fn note_read<B: Backing>(volume: &Volume<B>) -> Result<String, DiskError> {
    let mut sector = [0; SECTOR_BYTES];
    let read = volume.read(0, &mut sector);
    read.map_err(DiskError::io("reading the note of an image"))?;
    let (head, rest) = sector.split_at(HEAD_BYTES);
    let (magic, len) = head.split_at(MAGIC.len());
    let len = len.try_into().map_or(0, u32::from_be_bytes) as usize;
    let text = rest.get(..len).filter(|_| magic == MAGIC);
    text.and_then(|text| std::str::from_utf8(text).ok())
        .map(str::to_owned)
        .ok_or(DiskError::Unfinished)
}

/// Which way a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Behind the note of an image.
    ToImage,
    /// From behind it.
    FromImage,
}

/// Copies all sectors that `from` has, and that are not zeros. All that was written to `from` must
/// have reached its file. Not durable before `to` is synced, or made.
///
/// # Errors
/// [`DiskError::Size`] if they don't fit; the volumes'.
pub fn copy(from: &Volume<DataFile>, to: &Volume<DataFile>, way: Way) -> Result<(), DiskError> {
    let (skip, shift) = match way {
        Way::ToImage => (0, NOTE_AREA_BYTES),
        Way::FromImage => (NOTE_AREA_BYTES, 0),
    };
    if from.size_bytes() - skip > to.size_bytes().saturating_sub(shift) {
        return Err(DiskError::Size {
            why: "the snapshot's disk is larger: ask for at least its size",
        });
    }
    let reading = "reading the disk to copy";
    let file = from.backing().file();
    let end_of_all = DATA_OFFSET_BYTES + from.size_bytes();
    let mut buf = vec![0; REQUEST_MAX_BYTES];
    let mut at = DATA_OFFSET_BYTES + skip;
    while at < end_of_all {
        let data = next_data(file, at).map_err(DiskError::io(reading))?;
        let data = data.unwrap_or(end_of_all).min(end_of_all) / SECTOR * SECTOR;
        // What is skipped was never written, or somebody has made a hole of it.
        from.check_hole(at - DATA_OFFSET_BYTES, data - at)
            .map_err(DiskError::io(reading))?;
        if data == end_of_all {
            break;
        }
        let end = next_hole(file, data).map_err(DiskError::io(reading))?;
        let end = end.next_multiple_of(SECTOR).min(end_of_all);
        at = data;
        while at < end {
            let n = usize::try_from(end - at).map_or(buf.len(), |rest| rest.min(buf.len()));
            let offset = at - DATA_OFFSET_BYTES;
            from.read(offset, &mut buf[..n])
                .map_err(DiskError::io(reading))?;
            write_non_zero(to, offset - skip + shift, &mut buf[..n])?;
            at += n as u64;
        }
    }
    buf.zeroize();
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::luks2::VolumeKey;

    fn volume(mib: u64) -> Volume<DataFile> {
        let file = tempfile::tempfile().unwrap();
        Volume::new(file.into(), &VolumeKey::random(), mib << 20).unwrap()
    }

    #[test]
    fn a_note_comes_back_and_none_is_an_unfinished_image() {
        let volume = volume(2);
        assert!(matches!(note_read(&volume), Err(DiskError::Unfinished)));
        for note in ["", "a note", &"n".repeat(NOTE_MAX_BYTES)] {
            note_write(&volume, note).unwrap();
            assert_eq!(note_read(&volume).unwrap(), note);
        }
        assert!(note_write(&volume, &"n".repeat(NOTE_MAX_BYTES + 1)).is_err());
    }

    #[test]
    fn a_copy_of_a_copy_is_the_disk_under_another_key_and_holes_stay_holes() {
        let (disk, image, again) = (volume(64), volume(65), volume(64));
        for (at, byte) in [(0u64, 1u8), (5 << 20, 2), ((64 << 20) - 4096, 3)] {
            disk.write(at, &mut vec![byte; 4096]).unwrap();
        }
        // Allocated, and zeros.
        disk.write(9 << 20, &mut vec![4; 8192]).unwrap();
        disk.write(9 << 20, &mut vec![0; 8192]).unwrap();
        copy(&disk, &image, Way::ToImage).unwrap();
        note_write(&image, "n").unwrap();
        copy(&image, &again, Way::FromImage).unwrap();
        let whole = |v: &Volume<DataFile>| {
            let mut all = vec![0; 64 << 20];
            v.read(0, &mut all).unwrap();
            all
        };
        assert!(whole(&disk) == whole(&again));
        let allocated = |v: &Volume<DataFile>| {
            std::os::unix::fs::MetadataExt::blocks(&v.backing().file().metadata().unwrap()) * 512
        };
        assert!(allocated(&again) <= 3 * 4096, "{}", allocated(&again));
        let sector = |v: &Volume<DataFile>| {
            let mut raw = [0; SECTOR_BYTES];
            std::os::unix::fs::FileExt::read_exact_at(
                v.backing().file(),
                &mut raw,
                DATA_OFFSET_BYTES,
            )
            .unwrap();
            raw
        };
        assert_ne!(sector(&disk), sector(&again));
        // A larger one takes it, a smaller one does not.
        copy(&image, &volume(80), Way::FromImage).unwrap();
        assert!(matches!(
            copy(&image, &volume(63), Way::FromImage),
            Err(DiskError::Size { .. })
        ));
    }

    /// A disk with tags, of `mib`.
    fn tagged(mib: u64) -> Volume<DataFile> {
        let [file, tags] = [0; 2].map(|_| tempfile::tempfile().unwrap().into());
        let text = crate::grant::tests::sample().replace("0a0a", "0a0b");
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let grant = Grant {
            anchor: None,
            ..grant
        };
        crate::format::open_or_format(file, Some(tags), None, &grant, true, mib << 20).unwrap()
    }

    /// A hole that somebody makes in the file is not copied as one.
    #[test]
    fn i26_a_copy_skips_nothing_that_was_written() {
        let from = tagged(8);
        for (at, byte) in [(0u64, 1u8), (3 << 20, 2), ((8 << 20) - 4096, 3)] {
            from.write(at, &mut vec![byte; 4096]).unwrap();
        }
        from.close().unwrap();
        copy(&from, &volume(9), Way::ToImage).unwrap();
        for at in [0, 3 << 20, (8 << 20) - 4096] {
            let place = DATA_OFFSET_BYTES + at;
            let mut kept = [0; SECTOR_BYTES];
            Backing::read_at(from.backing(), place, &mut kept).unwrap();
            from.backing().punch(place, SECTOR).unwrap();
            let refused = copy(&from, &volume(9), Way::ToImage).unwrap_err();
            assert_eq!(refused.code(), api::ErrorCode::DiskTampered, "{at}");
            from.backing().write_at(place, &kept).unwrap();
        }
        copy(&from, &volume(9), Way::ToImage).unwrap();
        assert_eq!(from.report().refused, 3, "each is an alarm");
    }
}
