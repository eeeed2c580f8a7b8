//! Sealing to a public key: HPKE base mode (RFC 9180), DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
//! AES-256-GCM; one message per sealing. By AWS-LC's `EVP_HPKE`.
//!
//! A sealed message is `enc (32) || ciphertext || tag (16)`. It proves nothing about who sealed
//! it: whoever needs that signs what goes with it.

use std::fmt;
use std::ptr::NonNull;

use aws_lc_sys as lc;
use zeroize::Zeroizing;

use crate::{SealError, hash, hexkey, kdf, random};

/// What sealing adds to a plaintext, in bytes.
pub const OVERHEAD_BYTES: usize = ENC_BYTES + TAG_BYTES;
const ENC_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const WHAT: &str = "HPKE message";

/// A private X25519 key. It lives in AWS-LC's heap (the secret heap, if installed) and is wiped
/// when dropped.
pub struct SecretKey(NonNull<lc::EVP_HPKE_KEY>);

// SAFETY: an EVP_HPKE_KEY is plain data with one owner; AWS-LC ties it to no thread.
unsafe impl Send for SecretKey {}
// SAFETY: through `&SecretKey` AWS-LC only reads it (`const EVP_HPKE_KEY *`).
unsafe impl Sync for SecretKey {}

impl SecretKey {
    /// A fresh key.
    #[must_use]
    pub fn generate() -> Self {
        Self::from_seed(&Zeroizing::new(random::bytes()))
    }

    /// The key of this seed, by RFC 9180's `DeriveKeyPair`: the same seed, the same key.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let private = derive_private(seed);
        // SAFETY: allocates and zeroes a key; null means out of memory, checked below.
        let key = unsafe { lc::EVP_HPKE_KEY_new() };
        let key = Self(NonNull::new(key).expect("out of memory for 100 bytes"));
        // SAFETY: `key` was made above and is not initialised yet; `private` is 32 readable bytes,
        // which it copies. The KEM is a static.
        let ok = unsafe {
            lc::EVP_HPKE_KEY_init(
                key.0.as_ptr(),
                lc::EVP_hpke_x25519_hkdf_sha256(),
                private.as_ptr(),
                private.len(),
            )
        };
        assert_eq!(ok, 1, "each 32 bytes are an X25519 key");
        key
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut out = [0; 32];
        let mut len = 0;
        // SAFETY: the key is initialised; at most `out.len()` bytes are written to `out`.
        let ok = unsafe {
            lc::EVP_HPKE_KEY_public_key(self.0.as_ptr(), out.as_mut_ptr(), &mut len, out.len())
        };
        assert_eq!((ok, len), (1, 32), "an X25519 public key has 32 bytes");
        PublicKey(out)
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        // SAFETY: made by EVP_HPKE_KEY_new, freed once; the allocator wipes what it frees.
        unsafe { lc::EVP_HPKE_KEY_free(self.0.as_ptr()) }
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey(of {})", self.public())
    }
}

/// A public X25519 key; in text and JSON 64 lowercase hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

hexkey::hex_key!(PublicKey, "X25519 public key");

impl PublicKey {
    /// Takes 32 bytes.
    ///
    /// # Errors
    /// If there are not 32, or the point is of small order: then there is no shared secret, and
    /// anybody could open what is sealed to it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealError> {
        let wrong = |why| SealError::Malformed {
            what: "X25519 public key",
            why,
        };
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| wrong("must have 32 bytes"))?;
        let (mut shared, scalar) = ([0; 32], [0x40; 32]);
        // SAFETY: three arrays of 32 bytes, the first written. It answers 0 if the result is zero,
        // which is so for each scalar (all are multiples of 8) just when the order divides 8.
        let ok = unsafe { lc::X25519(shared.as_mut_ptr(), scalar.as_ptr(), bytes.as_ptr()) };
        if ok == 1 {
            Ok(Self(bytes))
        } else {
            Err(wrong("is of small order: it keeps no secret"))
        }
    }

    /// Names the key: the first 8 hex digits of its SHA-256.
    #[must_use]
    pub fn key_id(&self) -> String {
        hex::encode(&hash::sha256(&self.0)[..4])
    }
}

/// Seals `plaintext` to `to`; only the holder of its private half opens it, and only with the same
/// `info` (what it is for) and `aad` (what it goes with).
///
/// # Panics
/// If the plaintext is 64 GiB or more, or memory is out.
#[must_use]
pub fn seal(to: &PublicKey, info: &[u8], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let context = Context::new();
    let mut out = vec![0; plaintext.len() + OVERHEAD_BYTES];
    let (enc, body) = out.split_at_mut(ENC_BYTES);
    let (mut enc_len, mut body_len) = (0, 0);
    // SAFETY: `context` is fresh; each pointer comes from a slice and is passed with its length,
    // written ones as the maximum. KEM, KDF and AEAD are statics.
    let ok = unsafe {
        lc::EVP_HPKE_CTX_setup_sender(
            context.0.as_ptr(),
            enc.as_mut_ptr(),
            &mut enc_len,
            enc.len(),
            lc::EVP_hpke_x25519_hkdf_sha256(),
            lc::EVP_hpke_hkdf_sha256(),
            lc::EVP_hpke_aes_256_gcm(),
            to.0.as_ptr(),
            to.0.len(),
            info.as_ptr(),
            info.len(),
        ) == 1
            && lc::EVP_HPKE_CTX_seal(
                context.0.as_ptr(),
                body.as_mut_ptr(),
                &mut body_len,
                body.len(),
                plaintext.as_ptr(),
                plaintext.len(),
                aad.as_ptr(),
                aad.len(),
            ) == 1
    };
    assert!(
        ok,
        "HPKE refuses small-order keys, which PublicKey can't hold, and 64 GiB"
    );
    assert_eq!(
        (enc_len, body_len),
        (ENC_BYTES, body.len()),
        "HPKE lengths are fixed"
    );
    out
}

/// Opens what was [`seal`]ed to the public half of `key`.
///
/// # Errors
/// [`SealError::Open`] if it was not, or anything about it is different.
pub fn open(
    key: &SecretKey,
    info: &[u8],
    aad: &[u8],
    message: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let max = message.len().saturating_sub(ENC_BYTES);
    let mut out = Zeroizing::new(vec![0; max]);
    let len = open_raw(key, info, aad, message, &mut out)?;
    out.truncate(len);
    Ok(out)
}

/// Opens a secret of exactly `N` bytes straight into secret memory: the plaintext is never on the
/// ordinary heap or the stack.
///
/// # Errors
/// [`SealError::Open`] as with [`open`], and when the secret is of another length.
pub fn open_secret<const N: usize>(
    key: &SecretKey,
    info: &[u8],
    aad: &[u8],
    message: &[u8],
) -> Result<crate::secret::SecretBytes<N>, SealError> {
    if message.len() != N + OVERHEAD_BYTES {
        return Err(SealError::Open { what: WHAT });
    }
    // AWS-LC wants room for the tag while it opens.
    let mut room = crate::secret::SecretBuf::new(N + TAG_BYTES);
    let len = open_raw(key, info, aad, message, room.expose_mut())?;
    assert_eq!(len, N, "a plaintext is a tag shorter than its ciphertext");
    let mut out = crate::secret::SecretBytes::zeroed();
    out.expose_mut().copy_from_slice(&room.expose()[..N]);
    Ok(out)
}

fn open_raw(
    key: &SecretKey,
    info: &[u8],
    aad: &[u8],
    message: &[u8],
    out: &mut [u8],
) -> Result<usize, SealError> {
    if message.len() < OVERHEAD_BYTES {
        return Err(SealError::Open { what: WHAT });
    }
    let (enc, body) = message.split_at(ENC_BYTES);
    let context = Context::new();
    let mut len = 0;
    // SAFETY: `context` is fresh, `key` initialised; each pointer comes from a slice and is passed
    // with its length, `out` as the maximum to write. KDF and AEAD are statics.
    let ok = unsafe {
        lc::EVP_HPKE_CTX_setup_recipient(
            context.0.as_ptr(),
            key.0.as_ptr(),
            lc::EVP_hpke_hkdf_sha256(),
            lc::EVP_hpke_aes_256_gcm(),
            enc.as_ptr(),
            enc.len(),
            info.as_ptr(),
            info.len(),
        ) == 1
            && lc::EVP_HPKE_CTX_open(
                context.0.as_ptr(),
                out.as_mut_ptr(),
                &mut len,
                out.len(),
                body.as_ptr(),
                body.len(),
                aad.as_ptr(),
                aad.len(),
            ) == 1
    };
    if ok {
        Ok(len)
    } else {
        Err(SealError::Open { what: WHAT })
    }
}

/// An HPKE context of AWS-LC, freed (and with it wiped) when dropped.
struct Context(NonNull<lc::EVP_HPKE_CTX>);

impl Context {
    fn new() -> Self {
        // SAFETY: allocates and zeroes a context; null means out of memory.
        let context = unsafe { lc::EVP_HPKE_CTX_new() };
        Self(NonNull::new(context).expect("out of memory for an HPKE context"))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_HPKE_CTX_new, freed once.
        unsafe { lc::EVP_HPKE_CTX_free(self.0.as_ptr()) }
    }
}

/// RFC 9180, 7.1.3: `DeriveKeyPair` for X25519.
fn derive_private(ikm: &[u8]) -> Zeroizing<[u8; 32]> {
    const SUITE: &[u8] = b"KEM\x00\x20";
    let labeled = Zeroizing::new([b"HPKE-v1", SUITE, b"dkp_prk", ikm].concat());
    let prk = kdf::hkdf_extract(b"", &labeled);
    let mut private = Zeroizing::new([0; 32]);
    let info = [&32u16.to_be_bytes(), b"HPKE-v1" as &[u8], SUITE, b"sk"].concat();
    kdf::hkdf_expand(&prk, &info, private.as_mut_slice());
    private
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ::hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
    use proptest::prelude::*;

    type OracleKem = ::hpke::kem::X25519HkdfSha256;
    type OracleKdf = ::hpke::kdf::HkdfSha256;
    type OracleAead = ::hpke::aead::AesGcm256;

    #[test]
    fn key_derivation_is_rfc_9180s() {
        // RFC 9180, A.1.1: ikmR, skRm, pkRm.
        let seed: [u8; 32] =
            hex::decode("6db9df30aa07dd42ee5e8181afdb977e538f5e1fec8a06223f33f7013e525037")
                .unwrap()
                .try_into()
                .unwrap();
        assert_eq!(
            hex::encode(derive_private(&seed)),
            "4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8"
        );
        assert_eq!(
            SecretKey::from_seed(&seed).public().to_hex(),
            "3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d"
        );
    }

    #[test]
    fn keys_have_one_text_and_no_small_order() {
        let public = SecretKey::generate().public();
        assert_eq!(PublicKey::from_hex(&public.to_hex()).unwrap(), public);
        let json = serde_json::to_string(&public).unwrap();
        assert_eq!(serde_json::from_str::<PublicKey>(&json).unwrap(), public);
        assert!(PublicKey::from_hex(&public.to_hex().to_uppercase()).is_err());
        assert!(PublicKey::from_hex("").is_err() && PublicKey::from_bytes(&[9; 31]).is_err());
        assert!(PublicKey::from_bytes(&[0; 32]).is_err());
        for small in [
            "0100000000000000000000000000000000000000000000000000000000000000",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        ] {
            assert!(PublicKey::from_hex(small).is_err(), "{small}");
        }
    }

    #[test]
    fn secrets_are_opened_into_secret_memory_and_have_one_length() {
        let key = SecretKey::generate();
        let sealed = seal(&key.public(), b"i", b"a", &[7; 64]);
        assert_eq!(
            open_secret::<64>(&key, b"i", b"a", &sealed)
                .unwrap()
                .expose(),
            &[7; 64]
        );
        assert!(open_secret::<63>(&key, b"i", b"a", &sealed).is_err());
        assert!(open_secret::<65>(&key, b"i", b"a", &sealed).is_err());
        assert!(open_secret::<64>(&key, b"i", b"b", &sealed).is_err());
        assert!(!format!("{key:?}").contains(&hex::encode([7; 8])));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn speaks_with_crate_hpke_both_ways(
            seed: [u8; 32],
            info in proptest::collection::vec(any::<u8>(), 0..40),
            aad in proptest::collection::vec(any::<u8>(), 0..40),
            plaintext in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let ours = SecretKey::from_seed(&seed);
            let (their_private, their_public) = OracleKem::derive_keypair(&seed);
            prop_assert_eq!(their_public.to_bytes().to_vec(), ours.public().to_bytes().to_vec());

            let sealed = seal(&ours.public(), &info, &aad, &plaintext);
            let (enc, body) = sealed.split_at(32);
            let enc = <OracleKem as Kem>::EncappedKey::from_bytes(enc).unwrap();
            let opened = ::hpke::single_shot_open::<OracleAead, OracleKdf, OracleKem>(
                &OpModeR::Base, &their_private, &enc, &info, body, &aad,
            )
            .unwrap();
            prop_assert_eq!(&opened, &plaintext);

            let (enc, body) = ::hpke::single_shot_seal::<OracleAead, OracleKdf, OracleKem>(
                &OpModeS::Base, &their_public, &info, &plaintext, &aad,
            )
            .unwrap();
            let sealed = [enc.to_bytes().as_slice(), &body].concat();
            prop_assert_eq!(&*open(&ours, &info, &aad, &sealed).unwrap(), &plaintext);
        }

        #[test]
        fn refuses_any_change(
            plaintext in proptest::collection::vec(any::<u8>(), 0..100),
            at: prop::sample::Index,
            flip in 1u8..,
        ) {
            let key = SecretKey::generate();
            let sealed = seal(&key.public(), b"info", b"aad", &plaintext);
            prop_assert_eq!(sealed.len(), plaintext.len() + OVERHEAD_BYTES);
            let at = at.index(sealed.len());
            let mut bad = sealed.clone();
            bad[at] ^= flip;
            // X25519 ignores the top bit of `enc`, but HPKE hashes all of it into the key.
            prop_assert!(open(&key, b"info", b"aad", &bad).is_err());
            prop_assert!(open(&key, b"info", b"aad", &sealed[..at]).is_err());
            prop_assert!(open(&key, b"infp", b"aad", &sealed).is_err());
            prop_assert!(open(&key, b"info", b"aae", &sealed).is_err());
            prop_assert!(open(&SecretKey::generate(), b"info", b"aad", &sealed).is_err());
        }
    }
}
