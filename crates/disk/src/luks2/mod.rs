//! The volume's header: real LUKS2, so that `cryptsetup` can read any volume with its key.
//!
//! Two copies of a 16 KiB header, one keyslot, data at 16 MiB; layout in docs/formats/disk.md.
//! The keyslot's passphrase is the hex text of the disk's key, which the KMS derives, so PBKDF2
//! only has to fit the format (1,000 iterations), not to slow anybody down.
//!
//! Must never: hold a key outside secret memory, or let a header choose what is done with it.

mod bin;
pub(crate) mod json;
pub(crate) mod keyslot;

use model::WorkspaceId;
use seal::hash;
use seal::secret::SecretBytes;

use self::bin::Copy;
use self::json::{AREA_OFFSET_BYTES, Metadata, Pbkdf2};
use self::keyslot::STRIPES_BYTES;
pub use self::keyslot::VolumeKey;
use crate::DiskError;
use crate::backing::Backing;
use crate::limits::HEADER_BYTES;

/// The disk's key of a grant.
pub type DiskKey = SecretBytes<32>;

/// Writes keyslot and headers for `key`. The headers come after all that was written before is
/// durable, data included: a volume exists only once all of it does.
///
/// # Errors
/// The backing file's.
pub fn create(
    backing: &impl Backing,
    key: &VolumeKey,
    disk_key: &DiskKey,
    workspace: &WorkspaceId,
) -> Result<(), DiskError> {
    let (slot, digest) = (Pbkdf2::fresh(), Pbkdf2::fresh());
    let area = keyslot::close(key, passphrase(disk_key).expose(), &slot)?;
    let metadata = Metadata {
        workspace: workspace.clone(),
        area_offset_bytes: AREA_OFFSET_BYTES,
        slot,
        digest_of_key: keyslot::digest(key, &digest),
        digest,
    };
    backing
        .write_at(AREA_OFFSET_BYTES, &area)
        .map_err(DiskError::io("writing the keyslot"))?;
    backing
        .sync()
        .map_err(DiskError::io("syncing a new volume"))?;
    let (json, uuid) = (metadata.encode(), fresh_uuid());
    for copy in Copy::BOTH {
        let header = bin::encode(copy, 1, &seal::random::bytes(), &uuid, &json);
        backing
            .write_at(copy.offset(), &header)
            .map_err(DiskError::io("writing the header"))?;
    }
    backing.sync().map_err(DiskError::io("syncing the header"))
}

/// Whether a sound header is there, or one of a version that can't be judged. A copy that does not
/// add up is what a crash in [`create`] leaves.
///
/// # Errors
/// The backing file's.
pub fn exists(backing: &impl Backing) -> Result<bool, DiskError> {
    for copy in Copy::BOTH {
        let bytes = read(backing, copy)?;
        if matches!(
            bin::decode(copy, &bytes),
            Ok(Some(_)) | Err(DiskError::Version { .. })
        ) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Opens the volume: the sound copy of the header with the higher sequence number counts.
///
/// # Errors
/// [`DiskError::NoHeader`] if there is none; [`DiskError::Header`], [`DiskError::Version`] or
/// [`DiskError::Metadata`] if none is sound; [`DiskError::WrongWorkspace`], and
/// [`DiskError::WrongKey`] if the disk's key does not open it.
pub fn open(
    backing: &impl Backing,
    disk_key: &DiskKey,
    workspace: &WorkspaceId,
) -> Result<VolumeKey, DiskError> {
    let metadata = metadata(backing)?;
    if metadata.workspace != *workspace {
        return Err(DiskError::WrongWorkspace);
    }
    let mut area = vec![0; STRIPES_BYTES];
    backing
        .read_at(metadata.area_offset_bytes, &mut area)
        .map_err(DiskError::io("reading the keyslot"))?;
    let key = keyslot::open(&area, passphrase(disk_key).expose(), &metadata.slot)?;
    if hash::ct_eq(
        &keyslot::digest(&key, &metadata.digest),
        &metadata.digest_of_key,
    ) {
        Ok(key)
    } else {
        Err(DiskError::WrongKey)
    }
}

fn metadata(backing: &impl Backing) -> Result<Metadata, DiskError> {
    let mut best: Option<(u64, Metadata)> = None;
    let mut first_error = None;
    for copy in Copy::BOTH {
        let bytes = read(backing, copy)?;
        let found = bin::decode(copy, &bytes).and_then(|found| {
            found
                .map(|(seqid, json)| Ok((seqid, Metadata::decode(json)?)))
                .transpose()
        });
        match found {
            Ok(Some(one)) if best.as_ref().is_none_or(|best| one.0 > best.0) => best = Some(one),
            Ok(_) => {}
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    best.map(|(_, metadata)| metadata)
        .ok_or(first_error.unwrap_or(DiskError::NoHeader))
}

fn read(backing: &impl Backing, copy: Copy) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; HEADER_BYTES];
    backing
        .read_at(copy.offset(), &mut bytes)
        .map_err(DiskError::io("reading the header"))?;
    Ok(bytes)
}

/// The keyslot's passphrase: the key in lowercase hex.
pub(crate) fn passphrase(disk_key: &DiskKey) -> SecretBytes<64> {
    let mut out = SecretBytes::zeroed();
    hex::encode_to_slice(disk_key.expose(), out.expose_mut()).expect("64 digits for 32 bytes");
    out
}

/// RFC 9562, version 4.
pub(crate) fn fresh_uuid() -> String {
    let mut raw: [u8; 16] = seal::random::bytes();
    raw[6] = raw[6] & 0x0f | 0x40;
    raw[8] = raw[8] & 0x3f | 0x80;
    let hex = hex::encode(raw);
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}
