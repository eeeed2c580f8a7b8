//! Opening a backing file: the volume that is there, or a new one.
//!
//! A new volume is made in an order that a crash can't spoil: template through the cipher and
//! keyslot, sync, headers, sync, the sidecar's superblock, sync. Without a header it is no volume, and the next try begins again
//! under a new key. A file with a header is never formatted.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::DiskError;
use crate::backing::{Backing, next_data, next_hole};
use crate::grant::Grant;
use crate::limits::{REQUEST_MAX_BYTES, SECTOR_BYTES};
use crate::luks2::{self, VolumeKey};
use crate::sidecar::{Keys, Sidecar};
use crate::volume::Volume;

/// Opens the volume in `backing` with its sidecar in `tags`, or makes both, if `format` says that
/// the files are new. `template` is a raw file system that a new volume begins with.
///
/// # Errors
/// Those of [`open`] and [`create`].
pub fn open_or_format<B: Backing>(
    backing: B,
    tags: Option<B>,
    template: Option<&File>,
    grant: &Grant<'_>,
    format: bool,
    size_bytes: u64,
) -> Result<Volume<B>, DiskError> {
    if !format {
        return open(backing, tags, grant, size_bytes);
    }
    create(backing, tags, grant, size_bytes, |volume| match template {
        Some(template) => copy_template(template, volume),
        None => Ok(()),
    })
}

/// Opens the volume that is there. Without `tags` it is a volume without integrity.
///
/// # Errors
/// Those of [`luks2::open`], [`Sidecar::open`] and [`Volume::new`].
pub fn open<B: Backing>(
    backing: B,
    tags: Option<B>,
    grant: &Grant<'_>,
    size_bytes: u64,
) -> Result<Volume<B>, DiskError> {
    let Some(tags) = tags else {
        let key = luks2::open(&backing, &grant.disk_key, &grant.workspace)?;
        return Volume::new(backing, &key, size_bytes);
    };
    // Tags first: of the header nothing is believed that its tag does not fit.
    let keys = Keys::derive(grant.disk_key.expose())?;
    let (anchor, sectors) = (grant.anchor.as_ref(), size_bytes / SECTOR_BYTES as u64);
    let sidecar = Sidecar::open(tags, &backing, keys, sectors, grant.run, anchor)?;
    let key = luks2::open(&backing, &grant.disk_key, &grant.workspace)?;
    Volume::with_sidecar(backing, sidecar, &key, size_bytes)
}

/// Makes a volume that begins with what `fill` writes. Until that is durable it is none, so that
/// nothing of it goes through the journal.
///
/// # Errors
/// Those of [`luks2::create`] and [`Volume::new`], and `fill`'s; [`DiskError::Occupied`] if a file
/// said to be new holds a volume; [`DiskError::Tampered`] if the disk had a past and its file is said
/// to be new.
pub fn create<B: Backing>(
    backing: B,
    tags: Option<B>,
    grant: &Grant<'_>,
    size_bytes: u64,
    fill: impl FnOnce(&Volume<B>) -> Result<(), DiskError>,
) -> Result<Volume<B>, DiskError> {
    let volume = begin(backing, tags, grant, size_bytes, fill)?;
    volume.finish()?;
    Ok(volume)
}

/// As [`create`], but for its end: it is no volume before [`Volume::close`].
///
/// # Errors
/// Those of [`create`].
pub fn begin<B: Backing>(
    backing: B,
    tags: Option<B>,
    grant: &Grant<'_>,
    size_bytes: u64,
    fill: impl FnOnce(&Volume<B>) -> Result<(), DiskError>,
) -> Result<Volume<B>, DiskError> {
    if grant.anchor.is_some() {
        return Err(DiskError::Tampered {
            what: "its file is gone, and it was in use before",
        });
    }
    if luks2::exists(&backing)? {
        return Err(DiskError::Occupied { what: "a volume" });
    }
    // What an earlier try left is under a key that nobody has: it would read as garbage.
    backing
        .set_len(0)
        .map_err(DiskError::io("emptying a new volume"))?;
    let key = VolumeKey::random();
    let volume = match tags {
        None => Volume::new(backing, &key, size_bytes)?,
        Some(tags) => {
            let keys = Keys::derive(grant.disk_key.expose())?;
            let sectors = size_bytes / SECTOR_BYTES as u64;
            let sidecar = Sidecar::create(tags, keys, sectors, grant.run)?;
            Volume::with_sidecar(backing, sidecar, &key, size_bytes)?
        }
    };
    fill(&volume)?;
    volume
        .sync()
        .map_err(DiskError::io("syncing a new volume"))?;
    luks2::create(volume.backing(), &key, &grant.disk_key, &grant.workspace)?;
    Ok(volume)
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

pub(crate) fn write_non_zero<B: Backing>(
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
