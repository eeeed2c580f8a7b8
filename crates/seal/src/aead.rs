//! AES-256-GCM for small things at rest: wrapped keys, sealed records.
//!
//! A sealed blob is `nonce (12) || ciphertext || tag (16)`. The nonce is random, so **one key must
//! seal at most 2^32 blobs** (NIST SP 800-38D, 8.3): beyond that a repeated nonce, which breaks
//! GCM, gets likelier than 2^-32. Where one key could come near that, derive a key per object
//! with [`crate::kdf::hkdf`]. There is no call that takes a nonce, on purpose.

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use zeroize::Zeroizing;

use crate::SealError;

/// What sealing adds to a plaintext, in bytes.
pub const OVERHEAD_BYTES: usize = NONCE_BYTES + 16;
const NONCE_BYTES: usize = 12;
const WHAT: &str = "sealed blob";

/// Seals `plaintext` under `key`, bound to `aad` (which is not inside the result).
///
/// # Panics
/// If `plaintext` is 64 GiB or more (GCM's bound).
#[must_use]
pub fn seal(key: &[u8; 32], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(plaintext.len() + OVERHEAD_BYTES);
    out.resize(NONCE_BYTES, 0);
    out.extend_from_slice(plaintext);
    let (nonce, tag) = cipher(key)
        .seal_in_place_separate_tag(Aad::from(aad), &mut out[NONCE_BYTES..])
        .expect("AES-GCM refuses only 64 GiB and more");
    out[..NONCE_BYTES].copy_from_slice(nonce.as_ref());
    out.extend_from_slice(tag.as_ref());
    out
}

/// Opens what [`seal`] made under the same `key` and `aad`.
///
/// # Errors
/// [`SealError::Open`] if anything about it is different.
pub fn open(
    key: &[u8; 32],
    aad: &[u8],
    ciphertext: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let refused = SealError::Open { what: WHAT };
    if ciphertext.len() < OVERHEAD_BYTES {
        return Err(refused);
    }
    let (nonce, body) = ciphertext.split_at(NONCE_BYTES);
    let nonce = Nonce::try_assume_unique_for_key(nonce).expect("split at a nonce's length");
    let mut plaintext = Zeroizing::new(body.to_vec());
    let len = match cipher(key).open_in_place(nonce, Aad::from(aad), &mut plaintext) {
        Ok(opened) => opened.len(),
        Err(_) => return Err(refused),
    };
    plaintext.truncate(len);
    Ok(plaintext)
}

fn cipher(key: &[u8; 32]) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM, key).expect("a key of 32 bytes is AES-256's")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn opens_the_gcm_specs_vector() {
        // McGrew & Viega, test case 14: key 0, IV 0, one block of zeroes.
        let blob = hex::decode(
            "000000000000000000000000cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919",
        )
        .unwrap();
        assert_eq!(*open(&[0; 32], b"", &blob).unwrap(), vec![0; 16]);
    }

    #[test]
    fn nonces_are_fresh() {
        assert_ne!(
            seal(&[7; 32], b"", b"x")[..12],
            seal(&[7; 32], b"", b"x")[..12]
        );
    }

    proptest! {
        #[test]
        fn round_trips_and_refuses_any_change(
            key: [u8; 32],
            aad in proptest::collection::vec(any::<u8>(), 0..64),
            plaintext in proptest::collection::vec(any::<u8>(), 0..300),
            at: prop::sample::Index,
            flip in 1u8..,
        ) {
            let blob = seal(&key, &aad, &plaintext);
            prop_assert_eq!(blob.len(), plaintext.len() + OVERHEAD_BYTES);
            prop_assert_eq!(&*open(&key, &aad, &blob).unwrap(), &plaintext);

            let mut bad = blob.clone();
            let at_byte = at.index(bad.len());
            bad[at_byte] ^= flip;
            prop_assert!(open(&key, &aad, &bad).is_err());
            prop_assert!(open(&key, &aad, &blob[..at_byte]).is_err());
            let mut longer = blob.clone();
            longer.push(flip);
            prop_assert!(open(&key, &aad, &longer).is_err());
            let mut other_aad = aad.clone();
            other_aad.push(flip);
            prop_assert!(open(&key, &other_aad, &blob).is_err());
            let mut other_key = key;
            other_key[at.index(32)] ^= flip;
            prop_assert!(open(&other_key, &aad, &blob).is_err());
        }
    }
}
