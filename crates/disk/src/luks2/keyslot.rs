//! A keyslot: the volume's key, split into stripes so that a part of them is worth nothing, and
//! encrypted under what PBKDF2 makes of the passphrase.

use seal::secret::{SecretBuf, SecretBytes};
use seal::xts::Xts;
use seal::{hash, kdf, random};

use super::json::Pbkdf2;
use crate::DiskError;

/// Stripes of the anti-forensic split. LUKS knows no other number.
pub(crate) const STRIPES: u32 = 4000;
/// All stripes, bytes.
pub(super) const STRIPES_BYTES: usize = STRIPES as usize * KEY_BYTES;
/// How the stripes are encrypted: in units of 512 bytes, whatever the volume's sectors are.
pub(super) const AREA_CIPHER: &str = "aes-xts-plain64";

/// The volume's key, bytes.
pub(crate) const KEY_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;
const _: () = assert!(STRIPES_BYTES.is_multiple_of(512));

/// The key of a volume: data key (32) and tweak key (32) of AES-256-XTS.
pub type VolumeKey = SecretBytes<KEY_BYTES>;

/// The encrypted stripes of `key` under the passphrase.
pub(crate) fn close(
    key: &VolumeKey,
    passphrase: &[u8],
    slot: &Pbkdf2,
) -> Result<Vec<u8>, DiskError> {
    let cipher = area_cipher(passphrase, slot)?;
    let mut stripes = SecretBuf::new(STRIPES_BYTES);
    split(key, stripes.expose_mut());
    cipher.encrypt_units_512(0, stripes.expose_mut());
    Ok(stripes.expose().to_vec()) // Ciphertext by now.
}

/// The key out of the encrypted stripes; some key, whatever the passphrase is.
pub(super) fn open(area: &[u8], passphrase: &[u8], slot: &Pbkdf2) -> Result<VolumeKey, DiskError> {
    assert_eq!(area.len(), STRIPES_BYTES);
    let cipher = area_cipher(passphrase, slot)?;
    let mut stripes = SecretBuf::new(STRIPES_BYTES);
    stripes.expose_mut().copy_from_slice(area);
    cipher.decrypt_units_512(0, stripes.expose_mut());
    Ok(merge(stripes.expose()))
}

/// PBKDF2 of the volume's key: how a header recognises it.
pub(crate) fn digest(key: &VolumeKey, digest: &Pbkdf2) -> [u8; DIGEST_BYTES] {
    let mut out = [0; DIGEST_BYTES];
    kdf::pbkdf2_sha256(key.expose(), &digest.salt, digest.iterations, &mut out);
    out
}

fn area_cipher(passphrase: &[u8], slot: &Pbkdf2) -> Result<Xts, DiskError> {
    let mut key = VolumeKey::zeroed();
    kdf::pbkdf2_sha256(passphrase, &slot.salt, slot.iterations, key.expose_mut());
    Ok(Xts::new(key.expose())?)
}

/// Fills `stripes` so that only all of them together give `key`.
fn split(key: &VolumeKey, stripes: &mut [u8]) {
    let (random_part, last) = stripes.split_at_mut(STRIPES_BYTES - KEY_BYTES);
    random::fill(random_part);
    let mixed = mix(random_part);
    for ((out, mixed), key) in last.iter_mut().zip(mixed.expose()).zip(key.expose()) {
        *out = mixed ^ key;
    }
}

fn merge(stripes: &[u8]) -> VolumeKey {
    let (random_part, last) = stripes.split_at(STRIPES_BYTES - KEY_BYTES);
    let mut key = mix(random_part);
    for (out, last) in key.expose_mut().iter_mut().zip(last) {
        *out ^= last;
    }
    key
}

/// d = H(d xor stripe) over all stripes but the last; H hashes each 32 bytes behind their index.
fn mix(random_part: &[u8]) -> VolumeKey {
    let mut mixed = VolumeKey::zeroed();
    for stripe in random_part.chunks_exact(KEY_BYTES) {
        let mixed = mixed.expose_mut();
        for (out, stripe) in mixed.iter_mut().zip(stripe) {
            *out ^= stripe;
        }
        for (index, part) in mixed.chunks_exact_mut(DIGEST_BYTES).enumerate() {
            let mut hash = hash::Sha256::new();
            hash.update(&u32::try_from(index).expect("two parts").to_be_bytes());
            hash.update(part);
            part.copy_from_slice(&hash.finish());
        }
    }
    mixed
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_right_passphrase_opens_it_and_another_gives_another_key() {
        let (key, slot) = (VolumeKey::random(), Pbkdf2::fresh());
        let area = close(&key, b"right", &slot).unwrap();
        assert_eq!(open(&area, b"right", &slot).unwrap(), key);
        assert_ne!(open(&area, b"wrong", &slot).unwrap(), key);
    }

    #[test]
    fn one_lost_stripe_loses_the_key() {
        let (key, slot) = (VolumeKey::random(), Pbkdf2::fresh());
        let mut area = close(&key, b"pass", &slot).unwrap();
        area[100 * KEY_BYTES] ^= 1;
        assert_ne!(open(&area, b"pass", &slot).unwrap(), key);
    }
}
