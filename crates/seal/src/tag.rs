//! Keyed tags of what rests somewhere else: sectors, nodes, headers.
//!
//! A tag is AES-256-GCM-SIV (RFC 8452) over no plaintext: `data` is the associated data, `domain`
//! (4 bytes) and `number` (8 bytes), little-endian, are the nonce. So the same content at the same
//! place has the same tag, and nothing has to be counted or remembered: unlike GMAC, which gives
//! its key away with a nonce that comes twice, GCM-SIV derives keys from the nonce and sends the
//! hash through the cipher. Two contents of one place collide with a chance below 2^-119.
//! Docs/adr/0007 has the figures that chose it.

use std::fmt;
use std::ptr::{self, NonNull};

use aws_lc_sys as lc;

use crate::SealError;

/// Length of a tag, bytes.
pub const TAG_BYTES: usize = 16;

/// Makes the tags of one object. Threads may share it.
///
/// The key lives in AWS-LC's heap (the secret heap, if installed) and is wiped when dropped.
/// Making a tag allocates nothing.
pub struct Tagger(NonNull<lc::EVP_AEAD_CTX>);

// SAFETY: an EVP_AEAD_CTX has one owner and is tied to no thread.
unsafe impl Send for Tagger {}
// SAFETY: sealing takes the context as const, and AWS-LC promises that it may run on several
// threads at once (`EVP_AEAD_CTX_seal_scatter` in aead.h).
unsafe impl Sync for Tagger {}

impl Tagger {
    /// The tags under `key`.
    ///
    /// # Errors
    /// If AWS-LC is out of memory.
    pub fn new(key: &[u8; 32]) -> Result<Self, SealError> {
        // SAFETY: a static algorithm; `key` is the 32 bytes that are named; AWS-LC copies them.
        let context = unsafe {
            lc::EVP_AEAD_CTX_new(
                lc::EVP_aead_aes_256_gcm_siv(),
                key.as_ptr(),
                key.len(),
                TAG_BYTES,
            )
        };
        NonNull::new(context).map(Self).ok_or(SealError::Crypto {
            operation: "setting a tag's key",
        })
    }

    /// The tag of `data` at the place `number` of a `domain` (which kind of thing it is).
    ///
    /// # Panics
    /// If `data` is 64 GiB or more: the caller's bug.
    #[must_use]
    pub fn tag(&self, domain: u32, number: u64, data: &[u8]) -> [u8; TAG_BYTES] {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&domain.to_le_bytes());
        nonce[4..].copy_from_slice(&number.to_le_bytes());
        let mut tag = [0; TAG_BYTES];
        let mut written = 0;
        // SAFETY: the context lives; `nonce`, `tag` and `data` are passed with their lengths; no
        // plaintext is read and no ciphertext written.
        let ok = unsafe {
            lc::EVP_AEAD_CTX_seal_scatter(
                self.0.as_ptr(),
                ptr::null_mut(),
                tag.as_mut_ptr(),
                &mut written,
                tag.len(),
                nonce.as_ptr(),
                nonce.len(),
                ptr::null(),
                0,
                ptr::null(),
                0,
                data.as_ptr(),
                data.len(),
            )
        };
        // A tag that is not made must not pass for one.
        assert!(
            ok == 1 && written == TAG_BYTES,
            "AWS-LC's GCM-SIV refused associated data under a set key"
        );
        tag
    }
}

impl Drop for Tagger {
    fn drop(&mut self) {
        // SAFETY: made by EVP_AEAD_CTX_new, freed once; the allocator wipes what it frees.
        unsafe { lc::EVP_AEAD_CTX_free(self.0.as_ptr()) }
    }
}

impl fmt::Debug for Tagger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tagger(..)")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn is_rfc_8452s() {
        // Appendix C.2, the first case.
        let mut key = [0; 32];
        key[0] = 1;
        let tag = Tagger::new(&key).unwrap().tag(3, 0, b"");
        assert_eq!(hex::encode(tag), "07f5f4169bbf55a8400cd47ea6fd400f");
    }

    #[test]
    fn a_sectors_tag_is_frozen() {
        // Recomputed from the RFC with a POLYVAL in Python. Changing it makes every disk unreadable.
        let key = std::array::from_fn(|index| index as u8);
        let sector: Vec<u8> = (0..4096).map(|index| (index % 251) as u8).collect();
        let tag = Tagger::new(&key)
            .unwrap()
            .tag(1, 0x0102_0304_0506_0708, &sector);
        assert_eq!(hex::encode(tag), "64539501ccb186198d1116c6d1490949");
    }

    #[test]
    fn threads_share_one() {
        let tagger = Tagger::new(&[7; 32]).unwrap();
        let want: Vec<_> = (0..200)
            .map(|number| tagger.tag(1, number, &[5; 4096]))
            .collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for (number, want) in (0..).zip(&want) {
                        assert_eq!(tagger.tag(1, number, &[5; 4096]), *want);
                    }
                });
            }
        });
        assert_eq!(format!("{tagger:?}"), "Tagger(..)");
    }
}
