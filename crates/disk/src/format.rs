//! Opening a backing file: the volume that is there, or a new one.
//!
//! A new volume is made in an order that a crash can't spoil: mark, template through the cipher,
//! sync, keyslot, sync, headers, sync, unmark. Without a header it is no volume; with the mark it
//! is known as one that was being made, and is made again, under a new key. A file that holds
//! anything else is never formatted.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::DiskError;
use crate::backing::{Backing, next_data, next_hole};
use crate::grant::Grant;
use crate::limits::{DATA_OFFSET_BYTES, REQUEST_MAX_BYTES, SECTOR_BYTES};
use crate::luks2::{self, VolumeKey};
use crate::volume::Volume;

/// Where the mark lies, bytes: behind all that LUKS2 uses here.
const MARK_OFFSET_BYTES: u64 = 8 << 20;
const MARK: &[u8; 8] = b"CMFORMAT";

/// Opens the volume in `backing`, or makes it: if `format` says that the file is new, or if a
/// formatting did not end. `template` is a raw file system that a new volume begins with.
///
/// # Errors
/// [`DiskError`]: those of [`luks2::open`] and [`Volume::new`]; [`DiskError::Occupied`] if a file
/// said to be new is not.
pub fn open_or_format<B: Backing>(
    backing: B,
    template: Option<&File>,
    grant: &Grant<'_>,
    format: bool,
    size_bytes: u64,
) -> Result<Volume<B>, DiskError> {
    let there = luks2::exists(&backing)?;
    if there && format {
        return Err(DiskError::Occupied { what: "a volume" });
    }
    if there {
        let key = luks2::open(&backing, &grant.disk_key, &grant.workspace)?;
        return Volume::new(backing, &key, size_bytes);
    }
    let marked = is_marked(&backing)?;
    if !marked && !format {
        return Err(DiskError::NoHeader);
    }
    if !marked
        && !backing
            .is_blank()
            .map_err(DiskError::io("looking for data"))?
    {
        return Err(DiskError::Occupied {
            what: "something that is no volume",
        });
    }
    make(backing, template, grant, size_bytes)
}

fn make<B: Backing>(
    backing: B,
    template: Option<&File>,
    grant: &Grant<'_>,
    size_bytes: u64,
) -> Result<Volume<B>, DiskError> {
    backing
        .write_at(MARK_OFFSET_BYTES, MARK)
        .map_err(DiskError::io("marking a new volume"))?;
    backing
        .sync()
        .map_err(DiskError::io("marking a new volume"))?;
    clear_remains(&backing)?;
    let key = VolumeKey::random();
    let volume = Volume::new(backing, &key, size_bytes)?;
    if let Some(template) = template {
        copy_template(template, &volume)?;
    }
    volume
        .sync()
        .map_err(DiskError::io("syncing a new volume"))?;
    luks2::create(volume.backing(), &key, &grant.disk_key, &grant.workspace)?;
    // Not synced: with a header the mark means nothing.
    let mark_bytes = SECTOR_BYTES as u64;
    volume
        .backing()
        .punch(MARK_OFFSET_BYTES, mark_bytes)
        .map_err(DiskError::io("unmarking a new volume"))?;
    Ok(volume)
}

/// What an earlier try left is under a key that nobody has: it would read as garbage.
fn clear_remains(backing: &impl Backing) -> Result<(), DiskError> {
    let len = backing
        .length()
        .map_err(DiskError::io("measuring a new volume"))?;
    if len > DATA_OFFSET_BYTES {
        backing
            .punch(DATA_OFFSET_BYTES, len - DATA_OFFSET_BYTES)
            .map_err(DiskError::io("clearing a new volume"))?;
    }
    Ok(())
}

fn is_marked(backing: &impl Backing) -> Result<bool, DiskError> {
    let mut mark = [0; MARK.len()];
    backing
        .read_at(MARK_OFFSET_BYTES, &mut mark)
        .map_err(DiskError::io("reading the mark"))?;
    Ok(mark == *MARK)
}

/// Writes the template's sectors that are not zeros.
fn copy_template<B: Backing>(template: &File, volume: &Volume<B>) -> Result<(), DiskError> {
    let reading = "reading the template";
    let size = |why| DiskError::Size { why };
    let len = template.length().map_err(DiskError::io(reading))?;
    if !len.is_multiple_of(SECTOR_BYTES as u64) {
        return Err(size("the template is not whole sectors of 4096 bytes"));
    }
    if len > volume.size_bytes() {
        return Err(size("the template is larger than the volume"));
    }
    let mut buf = vec![0; REQUEST_MAX_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(template, at).map_err(DiskError::io(reading))? {
        let end = next_hole(template, data).map_err(DiskError::io(reading))?;
        let end = end.next_multiple_of(SECTOR_BYTES as u64).min(len);
        at = data / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;
        while at < end {
            let n = usize::try_from(end - at).map_or(buf.len(), |rest| rest.min(buf.len()));
            template
                .read_exact_at(&mut buf[..n], at)
                .map_err(DiskError::io(reading))?;
            write_non_zero(volume, at, &mut buf[..n])?;
            at += n as u64;
        }
    }
    Ok(())
}

fn write_non_zero<B: Backing>(
    volume: &Volume<B>,
    offset: u64,
    data: &mut [u8],
) -> Result<(), DiskError> {
    let is_zero = |sector: &[u8]| *sector == [0; SECTOR_BYTES];
    let mut at = offset;
    let by_kind = |a: &[u8], b: &[u8]| is_zero(a) == is_zero(b);
    let mut rest = data;
    while !rest.is_empty() {
        let mut sectors = rest.chunks_exact(SECTOR_BYTES);
        let first = sectors.next().expect("whole sectors, at least one");
        let run = 1 + sectors.take_while(|sector| by_kind(first, sector)).count();
        let zero = is_zero(first);
        let (run, behind) = rest.split_at_mut(run * SECTOR_BYTES);
        if !zero {
            volume
                .write(at, run)
                .map_err(DiskError::io("copying the template"))?;
        }
        at += run.len() as u64;
        rest = behind;
    }
    Ok(())
}
