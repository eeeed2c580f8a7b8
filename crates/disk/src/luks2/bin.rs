//! The binary header and its checksum: 4096 bytes, then the JSON area.
//!
//! Integers are big-endian. Both copies are [`HEADER_BYTES`] long and differ in magic, salt,
//! offset and checksum only. Layout: docs/formats/disk.md.

use std::ops::Range;

use seal::hash;

use crate::DiskError;
use crate::limits::HEADER_BYTES;

const BINARY_BYTES: usize = 4096;
const VERSION: u16 = 2;
const MAGIC: Range<usize> = 0..6;
const VERSION_AT: Range<usize> = 6..8;
const HDR_SIZE: Range<usize> = 8..16;
const SEQID: Range<usize> = 16..24;
const CSUM_ALG: Range<usize> = 72..104;
const SALT: Range<usize> = 104..168;
const UUID: Range<usize> = 168..208;
const HDR_OFFSET: Range<usize> = 256..264;
const CSUM: Range<usize> = 448..512;
const SHA256_BYTES: usize = 32;

/// Which of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    Primary,
    Secondary,
}

impl Copy {
    pub(super) const BOTH: [Self; 2] = [Self::Primary, Self::Secondary];

    /// Where it lies in the file, bytes.
    pub(super) fn offset(self) -> u64 {
        match self {
            Self::Primary => 0,
            Self::Secondary => HEADER_BYTES as u64,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }

    fn magic(self) -> &'static [u8; 6] {
        match self {
            Self::Primary => b"LUKS\xba\xbe",
            Self::Secondary => b"SKUL\xba\xbe",
        }
    }
}

/// A copy of the header with its checksum. `json` must leave room for a NUL.
pub(super) fn encode(copy: Copy, seqid: u64, salt: &[u8; 64], uuid: &str, json: &[u8]) -> Vec<u8> {
    assert!(
        json.len() < HEADER_BYTES - BINARY_BYTES,
        "our own JSON is below 2 KiB"
    );
    assert!(uuid.len() < UUID.len());
    let mut out = vec![0; HEADER_BYTES];
    out[MAGIC].copy_from_slice(copy.magic());
    out[VERSION_AT].copy_from_slice(&VERSION.to_be_bytes());
    out[HDR_SIZE].copy_from_slice(&(HEADER_BYTES as u64).to_be_bytes());
    out[SEQID].copy_from_slice(&seqid.to_be_bytes());
    put_text(&mut out[CSUM_ALG], b"sha256");
    out[SALT].copy_from_slice(salt);
    put_text(&mut out[UUID], uuid.as_bytes());
    out[HDR_OFFSET].copy_from_slice(&copy.offset().to_be_bytes());
    put_text(&mut out[BINARY_BYTES..], json);
    let sum = hash::sha256(&out);
    put_text(&mut out[CSUM], &sum);
    out
}

/// Checks a copy and answers its sequence number and its JSON. `None`: there is no such magic.
pub(super) fn decode(copy: Copy, bytes: &[u8]) -> Result<Option<(u64, &[u8])>, DiskError> {
    let wrong = |why| DiskError::Header {
        copy: copy.name(),
        why,
    };
    if bytes.len() < HEADER_BYTES {
        return Err(wrong("truncated"));
    }
    let bytes = &bytes[..HEADER_BYTES];
    if bytes[MAGIC] != copy.magic()[..] {
        return Ok(None);
    }
    let version = u16::from_be_bytes([bytes[VERSION_AT.start], bytes[VERSION_AT.start + 1]]);
    if version != VERSION {
        return Err(DiskError::Version { found: version });
    }
    if u64_at(bytes, HDR_SIZE) != HEADER_BYTES as u64 {
        return Err(wrong("its size is not 16 KiB"));
    }
    if u64_at(bytes, HDR_OFFSET) != copy.offset() {
        return Err(wrong("its offset is not where it lies"));
    }
    if text(&bytes[CSUM_ALG]) != b"sha256" {
        return Err(wrong("its checksum is not SHA-256"));
    }
    let mut hash = hash::Sha256::new();
    hash.update(&bytes[..CSUM.start]);
    hash.update(&[0; CSUM.end - CSUM.start]);
    hash.update(&bytes[CSUM.end..]);
    if hash.finish()[..] != bytes[CSUM][..SHA256_BYTES] {
        return Err(wrong("its checksum does not hold"));
    }
    Ok(Some((u64_at(bytes, SEQID), text(&bytes[BINARY_BYTES..]))))
}

fn put_text(field: &mut [u8], text: &[u8]) {
    field[..text.len()].copy_from_slice(text);
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn u64_at(bytes: &[u8], at: Range<usize>) -> u64 {
    u64::from_be_bytes(
        bytes[at]
            .try_into()
            .expect("the range is 8 bytes, inside the header"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sample(copy: Copy) -> Vec<u8> {
        encode(
            copy,
            7,
            &[9; 64],
            "bc8c8d14-6e95-497d-b083-ef47989e96a7",
            b"{}",
        )
    }

    #[test]
    fn reads_what_it_writes_and_each_copy_only_as_itself() {
        for copy in Copy::BOTH {
            let bytes = sample(copy);
            let (seqid, json) = decode(copy, &bytes).unwrap().unwrap();
            assert_eq!((seqid, json), (7, &b"{}"[..]));
        }
        assert!(
            decode(Copy::Primary, &sample(Copy::Secondary))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_future_version_and_a_cut_header_have_their_own_errors() {
        let mut bytes = sample(Copy::Primary);
        bytes[7] = 3;
        let error = decode(Copy::Primary, &bytes).unwrap_err();
        assert!(matches!(error, DiskError::Version { found: 3 }));
        let error = decode(Copy::Primary, &bytes[..HEADER_BYTES - 1]).unwrap_err();
        assert!(matches!(
            error,
            DiskError::Header {
                why: "truncated",
                ..
            }
        ));
    }

    proptest! {
        #[test]
        fn any_changed_bit_is_noticed(at in 0..HEADER_BYTES, bit in 0u8..8) {
            let mut bytes = sample(Copy::Primary);
            bytes[at] ^= 1 << bit;
            // The checksum field is 64 bytes, SHA-256 fills half of it.
            let unused = (CSUM.start + SHA256_BYTES..CSUM.end).contains(&at);
            prop_assert_eq!(matches!(decode(Copy::Primary, &bytes), Ok(Some(_))), unused);
        }

        #[test]
        fn survives_any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), magic: bool) {
            if magic && bytes.len() >= 8 {
                bytes[..6].copy_from_slice(Copy::Primary.magic());
            }
            bytes.resize(HEADER_BYTES, 0);
            prop_assert!(!matches!(decode(Copy::Primary, &bytes), Ok(Some(_))));
        }
    }
}
