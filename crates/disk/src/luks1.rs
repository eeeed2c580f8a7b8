//! A copy of a volume as LUKS1, for readers that know no LUKS2 (`nbdkit --filter=luks`, QEMU).
//!
//! LUKS1 encrypts units of 512 bytes, a volume sectors of 4096: the header alone does not do, the
//! data is encrypted again. Key and passphrase stay the volume's, so an export dies with the
//! workspace's key like any copy of the volume. Layout: LUKS On-Disk Format Specification 1.2.3;
//! numbers are big-endian.
//!
//! Must never: write anything to the output that is not encrypted, but the header; write over a
//! file that holds something.

use std::fs::File;

use seal::xts::Xts;

use crate::DiskError;
use crate::backing::Backing;
use crate::limits::{LUKS1_DATA_OFFSET_BYTES, SECTOR_BYTES};
use crate::luks2::json::Pbkdf2;
use crate::luks2::keyslot::{self, KEY_BYTES, STRIPES};
use crate::luks2::{self, DiskKey, VolumeKey};
use crate::volume::Volume;

const UNIT_BYTES: u64 = 512;
const UNITS_PER_SECTOR: u64 = SECTOR_BYTES as u64 / UNIT_BYTES;
const HEADER_BYTES: usize = 592;
const DIGEST_BYTES: usize = 20;
const KEYSLOTS: u32 = 8;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
/// Where the first keyslot's area begins, and how far the next one is, in units of 512 bytes.
const AREA_AT: u32 = 8;
const AREA_STEP: u32 = 504;
const DATA_AT: u32 = (LUKS1_DATA_OFFSET_BYTES / UNIT_BYTES) as u32;

const _: () = assert!(AREA_STEP as u64 * UNIT_BYTES >= STRIPES as u64 * KEY_BYTES as u64);
const _: () = assert!(AREA_AT + KEYSLOTS * AREA_STEP <= DATA_AT);
const _: () = assert!(LUKS1_DATA_OFFSET_BYTES.is_multiple_of(SECTOR_BYTES as u64));

/// Writes the volume to `out`, an empty file, as LUKS1 under the same `key` and passphrase (the
/// disk's key in hex). Holes stay holes. Nobody may write to the volume meanwhile. The header
/// comes last, after the rest is durable: a part of an export is none. After an error remove it.
///
/// # Errors
/// [`DiskError::Occupied`] if `out` holds something; those of the volume and of `out`.
pub fn export<B: Backing>(
    volume: &Volume<B>,
    key: &VolumeKey,
    disk_key: &DiskKey,
    out: &File,
) -> Result<(), DiskError> {
    if out
        .length()
        .map_err(DiskError::io("measuring the export"))?
        != 0
    {
        return Err(DiskError::Occupied { what: "something" });
    }
    out.set_len(LUKS1_DATA_OFFSET_BYTES + volume.size_bytes())
        .map_err(DiskError::io("sizing the export"))?;
    write_data(volume, &Xts::new(key.expose())?, out)?;
    let (slot, digest) = (Pbkdf2::fresh(), Pbkdf2::fresh());
    let area = keyslot::close(key, luks2::passphrase(disk_key).expose(), &slot)?;
    out.write_at(u64::from(AREA_AT) * UNIT_BYTES, &area)
        .map_err(DiskError::io("writing the export's keyslot"))?;
    out.sync().map_err(DiskError::io("syncing the export"))?;
    let header = header(&slot, &digest, &keyslot::digest(key, &digest));
    out.write_at(0, &header)
        .map_err(DiskError::io("writing the export's header"))?;
    out.sync()
        .map_err(DiskError::io("syncing the export's header"))
}

fn write_data<B: Backing>(volume: &Volume<B>, cipher: &Xts, out: &File) -> Result<(), DiskError> {
    let mut data = [0; SECTOR_BYTES];
    for sector in 0..volume.size_bytes() / SECTOR_BYTES as u64 {
        let allocated = volume
            .read_sector(sector, &mut data)
            .map_err(DiskError::io("reading the volume"))?;
        if allocated {
            cipher.encrypt_units_512(sector * UNITS_PER_SECTOR, &mut data);
            let at = LUKS1_DATA_OFFSET_BYTES + sector * SECTOR_BYTES as u64;
            out.write_at(at, &data)
                .map_err(DiskError::io("writing the export"))?;
        }
    }
    Ok(())
}

/// The header with one keyslot of eight in use.
fn header(slot: &Pbkdf2, digest: &Pbkdf2, digest_of_key: &[u8; 32]) -> Vec<u8> {
    let mut out = b"LUKS\xba\xbe\x00\x01".to_vec();
    put_text(&mut out, "aes", 32);
    put_text(&mut out, "xts-plain64", 32);
    put_text(&mut out, "sha256", 32);
    put_number(&mut out, DATA_AT);
    put_number(&mut out, KEY_BYTES as u32);
    out.extend_from_slice(&digest_of_key[..DIGEST_BYTES]); // Of PBKDF2's output, the beginning.
    out.extend_from_slice(&digest.salt);
    put_number(&mut out, digest.iterations);
    put_text(&mut out, &luks2::fresh_uuid(), 40);
    let unused = Pbkdf2 {
        salt: vec![0; 32],
        iterations: 0,
    };
    for index in 0..KEYSLOTS {
        let (state, kdf) = if index == 0 {
            (ENABLED, slot)
        } else {
            (DISABLED, &unused)
        };
        put_number(&mut out, state);
        put_number(&mut out, kdf.iterations);
        out.extend_from_slice(&kdf.salt);
        put_number(&mut out, AREA_AT + index * AREA_STEP);
        put_number(&mut out, STRIPES);
    }
    assert_eq!(out.len(), HEADER_BYTES, "salts of 32 bytes");
    out
}

fn put_number(out: &mut Vec<u8>, number: u32) {
    out.extend_from_slice(&number.to_be_bytes());
}

/// `text` and zeros, `len` bytes in all.
fn put_text(out: &mut Vec<u8>, text: &str, len: usize) {
    assert!(text.len() < len, "a NUL ends it");
    let end = out.len() + len;
    out.extend_from_slice(text.as_bytes());
    out.resize(end, 0);
}
