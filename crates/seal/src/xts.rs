//! AES-256-XTS over 4096-byte sectors, as a LUKS2 volume with 4 KiB sectors has it
//! (`aes-xts-plain64`, 512-bit key; IEEE 1619, NIST SP 800-38E), by AWS-LC.
//!
//! **The tweak's unit.** `plain64` counts 512-byte units whatever the sector size is (only
//! dm-crypt's `iv_large_sectors` changes that, which LUKS2 does not set), so the tweak of sector
//! `n` is `8 n`, little-endian.
//!
//! XTS keeps a secret; it detects no change. Whoever needs that adds tags.

use std::fmt;
use std::ptr::{self, NonNull};

use aws_lc_sys as lc;

use crate::limits::{XTS_SECTOR_BYTES, XTS_TWEAK_UNITS_PER_SECTOR};
use crate::{SealError, hash};

/// The cipher of one volume. `Send`, not `Sync`: give each thread its own [`Clone`].
///
/// The key schedules live in AWS-LC's heap (the secret heap, if installed) and are wiped when
/// dropped. Encrypting and decrypting allocate nothing.
pub struct Xts {
    encrypt: Context,
    decrypt: Context,
}

impl Xts {
    /// The cipher of `key` = data key (32) || tweak key (32).
    ///
    /// # Errors
    /// If the halves are equal, which breaks XTS.
    pub fn new(key: &[u8; 64]) -> Result<Self, SealError> {
        let (data, tweak) = key.split_at(32);
        if hash::ct_eq(data, tweak) {
            let why = "its two halves are equal: make the key from 64 random bytes";
            return Err(SealError::Malformed {
                what: "XTS key",
                why,
            });
        }
        Ok(Self {
            encrypt: Context::new(key, 1)?,
            decrypt: Context::new(key, 0)?,
        })
    }

    /// Encrypts the sectors in `buf` in place; the first of them is sector `first_sector` (in
    /// units of 4096 bytes from the start of the volume's data).
    ///
    /// # Panics
    /// If `buf` is not whole sectors or lies beyond sector 2^61: the caller's bug, and nothing may
    /// be written to a disk then.
    pub fn encrypt(&self, first_sector: u64, buf: &mut [u8]) {
        self.encrypt.run(first_sector, buf);
    }

    /// Decrypts the sectors in `buf` in place; see [`Xts::encrypt`].
    ///
    /// # Panics
    /// Like [`Xts::encrypt`].
    pub fn decrypt(&self, first_sector: u64, buf: &mut [u8]) {
        self.decrypt.run(first_sector, buf);
    }
}

impl Clone for Xts {
    fn clone(&self) -> Self {
        Self {
            encrypt: self.encrypt.clone(),
            decrypt: self.decrypt.clone(),
        }
    }
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Xts(..)")
    }
}

/// One direction: an `EVP_CIPHER_CTX` with its key set.
struct Context(NonNull<lc::EVP_CIPHER_CTX>);

// SAFETY: an EVP_CIPHER_CTX has one owner and is tied to no thread. It is not Sync (the raw
// pointer sees to that), so that setting the tweak through `&self` can't race.
unsafe impl Send for Context {}

impl Context {
    fn new(key: &[u8; 64], encrypt: i32) -> Result<Self, SealError> {
        let context = Self::empty();
        // SAFETY: `context` is fresh; the cipher is a static; `key` is the 64 bytes that
        // aes-256-xts reads; no engine; the tweak is set before each use.
        let ok = unsafe {
            lc::EVP_CipherInit_ex(
                context.0.as_ptr(),
                lc::EVP_aes_256_xts(),
                ptr::null_mut(),
                key.as_ptr(),
                ptr::null(),
                encrypt,
            )
        };
        if ok != 1 {
            return Err(SealError::Crypto {
                operation: "setting an XTS key",
            });
        }
        Ok(context)
    }

    fn empty() -> Self {
        // SAFETY: allocates and zeroes a context; null means out of memory.
        let context = unsafe { lc::EVP_CIPHER_CTX_new() };
        Self(NonNull::new(context).expect("out of memory for a cipher context"))
    }

    fn run(&self, first_sector: u64, buf: &mut [u8]) {
        let (sectors, rest) = buf.as_chunks_mut::<XTS_SECTOR_BYTES>();
        assert!(
            rest.is_empty(),
            "XTS runs over whole sectors of {XTS_SECTOR_BYTES} bytes"
        );
        let mut unit = first_sector
            .checked_add(sectors.len() as u64)
            .and_then(|end| end.checked_mul(XTS_TWEAK_UNITS_PER_SECTOR))
            .map(|_| first_sector * XTS_TWEAK_UNITS_PER_SECTOR)
            .expect("a volume has fewer than 2^61 sectors");
        for sector in sectors {
            self.run_sector(unit, sector);
            unit = unit.wrapping_add(XTS_TWEAK_UNITS_PER_SECTOR); // Checked above.
        }
    }

    fn run_sector(&self, unit: u64, sector: &mut [u8; XTS_SECTOR_BYTES]) {
        let mut tweak = [0; 16];
        tweak[..8].copy_from_slice(&unit.to_le_bytes());
        let data = sector.as_mut_ptr();
        // SAFETY: the context has its cipher and key (made by `new` or copied) and nobody else
        // uses it meanwhile (`Context` is not Sync). AWS-LC copies the 16 bytes of the tweak, then
        // reads and writes exactly one sector in place, which its XTS allows.
        let ok = unsafe {
            lc::EVP_CipherInit_ex(
                self.0.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                -1,
            ) == 1
                && lc::EVP_Cipher(self.0.as_ptr(), data, data, XTS_SECTOR_BYTES) == 1
        };
        // Going on would put plaintext on a disk.
        assert!(ok, "AWS-LC's XTS refused a whole sector under a set key");
    }
}

impl Clone for Context {
    fn clone(&self) -> Self {
        let copy = Self::empty();
        // SAFETY: both contexts are valid and distinct; the key schedules are copied.
        let ok = unsafe { lc::EVP_CIPHER_CTX_copy(copy.0.as_ptr(), self.0.as_ptr()) };
        assert_eq!(
            ok, 1,
            "copying a cipher context fails only when out of memory"
        );
        copy
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by EVP_CIPHER_CTX_new, freed once; the allocator wipes what it frees.
        unsafe { lc::EVP_CIPHER_CTX_free(self.0.as_ptr()) }
    }
}
