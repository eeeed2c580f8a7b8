//! Keys from keys (HKDF) and keys from what a human remembers (PBKDF2, Argon2id).

use std::num::NonZeroU32;

use zeroize::Zeroizing;

use crate::limits::HKDF_OUT_MAX_BYTES;

/// Argon2id memory, in KiB (64 MiB; RFC 9106's second recommended option).
pub const ARGON2ID_MEMORY_KIB: u32 = 64 * 1024;
/// Argon2id passes over that memory.
pub const ARGON2ID_PASSES: u32 = 3;
/// Argon2id lanes.
pub const ARGON2ID_LANES: u32 = 1;
/// Shortest Argon2id salt, in bytes (RFC 9106: 8; use 16).
pub const ARGON2ID_SALT_MIN_BYTES: usize = 8;

/// HKDF-SHA-256 (RFC 5869) of the secret `ikm` into `out`.
///
/// Each part of `info` goes in behind its length (4 bytes, big-endian), so that
/// `["ab", "c"]` and `["a", "bc"]` give unrelated keys.
///
/// # Panics
/// If `out` is longer than [`HKDF_OUT_MAX_BYTES`] or a part of `info` is 4 GiB: both are bugs of
/// the caller, whose lengths are constants.
pub fn hkdf(ikm: &[u8], salt: &[u8], info: &[&[u8]], out: &mut [u8]) {
    let mut joined = Vec::with_capacity(info.iter().map(|part| part.len() + 4).sum());
    for part in info {
        let len = u32::try_from(part.len()).expect("a part of HKDF's info is below 4 GiB");
        joined.extend_from_slice(&len.to_be_bytes());
        joined.extend_from_slice(part);
    }
    let prk = hkdf_extract(salt, ikm);
    hkdf_expand(&prk, &joined, out);
}

/// PBKDF2-HMAC-SHA-256 (RFC 8018). For LUKS2 keyslots; for passphrases prefer [`argon2id`].
///
/// # Panics
/// If `iters` is 0: whoever reads it from a header checks it first.
pub fn pbkdf2_sha256(pass: &[u8], salt: &[u8], iters: u32, out: &mut [u8]) {
    let iters = NonZeroU32::new(iters).expect("PBKDF2 iterates at least once");
    aws_lc_rs::pbkdf2::derive(
        aws_lc_rs::pbkdf2::PBKDF2_HMAC_SHA256,
        iters,
        salt,
        pass,
        out,
    );
}

/// Argon2id version 0x13 (RFC 9106) with m = 64 MiB, t = 3, p = 1. Takes about 0.1-0.2 s.
///
/// # Panics
/// If `salt` is shorter than [`ARGON2ID_SALT_MIN_BYTES`] or either input is 4 GiB.
pub fn argon2id(pass: &[u8], salt: &[u8], out: &mut [u8; 32]) {
    assert!(
        salt.len() >= ARGON2ID_SALT_MIN_BYTES,
        "argon2id: the salt is too short"
    );
    let params = argon2::Params::new(
        ARGON2ID_MEMORY_KIB,
        ARGON2ID_PASSES,
        ARGON2ID_LANES,
        Some(32),
    )
    .expect("constants within Argon2's bounds");
    let mut memory = Zeroizing::new(vec![argon2::Block::default(); params.block_count()]);
    argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
        .hash_password_into_with_memory(pass, salt, out, memory.as_mut_slice())
        .expect("salt checked above, lengths below 4 GiB, memory of the asked size");
}

/// HKDF-Extract. Not by way of [`crate::hash::hmac_sha256`]: its state, which holds the secret as it
/// is, moves about the stack; AWS-LC's own stays where it is and is wiped.
pub(crate) fn hkdf_extract(salt: &[u8], ikm: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut prk = Zeroizing::new([0; 32]);
    let mut len = 0;
    // SAFETY: each pointer comes from a slice and is passed with that slice's length, which AWS-LC
    // reads; it writes one digest of SHA-256, 32 bytes, to `prk`, and its length to `len`.
    let ok = unsafe {
        aws_lc_sys::HKDF_extract(
            prk.as_mut_ptr(),
            &raw mut len,
            aws_lc_sys::EVP_sha256(),
            ikm.as_ptr(),
            ikm.len(),
            salt.as_ptr(),
            salt.len(),
        )
    };
    assert_eq!(
        (ok, len),
        (1, 32),
        "HKDF-Extract fails for want of memory only"
    );
    prk
}

/// HKDF-Expand with `info` as it stands.
pub(crate) fn hkdf_expand(prk: &[u8; 32], info: &[u8], out: &mut [u8]) {
    assert!(
        out.len() <= HKDF_OUT_MAX_BYTES,
        "hkdf: more than 255 blocks of output"
    );
    // SAFETY: each pointer comes from a slice and is passed with that slice's length; AWS-LC
    // reads `prk` and `info` and writes `out.len()` bytes to `out`. EVP_sha256 is a static.
    let ok = unsafe {
        aws_lc_sys::HKDF_expand(
            out.as_mut_ptr(),
            out.len(),
            aws_lc_sys::EVP_sha256(),
            prk.as_ptr(),
            prk.len(),
            info.as_ptr(),
            info.len(),
        )
    };
    assert_eq!(
        ok, 1,
        "HKDF-Expand fails on too long an output only, which is checked above"
    );
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        hex::decode(text).unwrap()
    }

    fn rfc5869(ikm: &str, salt: &str, info: &str, okm: &str) {
        let mut out = vec![0; okm.len() / 2];
        let prk = hkdf_extract(&unhex(salt), &unhex(ikm));
        hkdf_expand(&prk, &unhex(info), &mut out);
        assert_eq!(hex::encode(out), okm);
    }

    #[test]
    fn hkdf_is_rfc_5869s() {
        rfc5869(
            "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b",
            "000102030405060708090a0b0c",
            "f0f1f2f3f4f5f6f7f8f9",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        );
        rfc5869(
            "0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b",
            "",
            "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        );
    }

    #[test]
    fn info_parts_can_not_collide() {
        let derive = |info: &[&[u8]]| {
            let mut out = [0; 32];
            hkdf(b"ikm", b"salt", info, &mut out);
            out
        };
        assert_ne!(derive(&[b"ab", b"c"]), derive(&[b"a", b"bc"]));
        assert_ne!(derive(&[b"abc"]), derive(&[b"abc", b""]));
        assert_ne!(derive(&[]), derive(&[b""]));
        assert_eq!(derive(&[b"a", b"b"]), derive(&[b"a", b"b"]));
    }

    #[test]
    fn pbkdf2_is_rfc_7914s() {
        let mut out = [0; 64];
        pbkdf2_sha256(b"passwd", b"salt", 1, &mut out);
        assert_eq!(
            hex::encode(out),
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc\
             49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
        );
    }

    #[test]
    fn argon2id_is_openssls_and_depends_on_both_inputs() {
        let derive = |pass: &[u8], salt: &[u8]| {
            let mut out = [0; 32];
            argon2id(pass, salt, &mut out);
            out
        };
        let one = derive(b"correct horse", b"sixteen bytes ..");
        // By OpenSSL 3 (python-cryptography's Argon2id, iterations=3, lanes=1, memory_cost=65536).
        assert_eq!(
            hex::encode(one),
            "c2d65295be0312b7c645fef631ce7e8942a6ecfc4d877d42a6855928850c235f"
        );
        assert_ne!(one, derive(b"correct horsf", b"sixteen bytes .."));
        assert_ne!(one, derive(b"correct horse", b"sixteen bytes ./"));
    }
}
