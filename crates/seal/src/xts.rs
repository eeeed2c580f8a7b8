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

    /// Encrypts the 512-byte data units in `buf` in place; the first of them has the tweak
    /// `first_unit`. LUKS keyslot areas have these units whatever the volume's sectors are
    /// (LUKS2 On-Disk Format Specification 1.1.1, section 4.2).
    ///
    /// # Panics
    /// If `buf` is not whole units, or the count passes 2^64: the caller's bug.
    pub fn encrypt_units_512(&self, first_unit: u64, buf: &mut [u8]) {
        self.encrypt.run_512(first_unit, buf);
    }

    /// Decrypts 512-byte data units in place; see [`Xts::encrypt_units_512`].
    ///
    /// # Panics
    /// Like [`Xts::encrypt_units_512`].
    pub fn decrypt_units_512(&self, first_unit: u64, buf: &mut [u8]) {
        self.decrypt.run_512(first_unit, buf);
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
            self.run_unit(unit, sector);
            unit = unit.wrapping_add(XTS_TWEAK_UNITS_PER_SECTOR); // Checked above.
        }
    }

    fn run_512(&self, first_unit: u64, buf: &mut [u8]) {
        let (units, rest) = buf.as_chunks_mut::<512>();
        assert!(rest.is_empty(), "XTS runs over whole units of 512 bytes");
        let mut number = first_unit;
        for unit in units {
            self.run_unit(number, unit);
            number = number.checked_add(1).expect("fewer than 2^64 units");
        }
    }

    /// One data unit (16 bytes to 16 MiB) under the tweak `number`.
    fn run_unit(&self, number: u64, data: &mut [u8]) {
        let mut tweak = [0; 16];
        tweak[..8].copy_from_slice(&number.to_le_bytes());
        let bytes = data.as_mut_ptr();
        // SAFETY: the context has its cipher and key (made by `new` or copied) and nobody else
        // uses it meanwhile (`Context` is not Sync). AWS-LC copies the 16 bytes of the tweak, then
        // reads and writes exactly `data` in place, which its XTS allows.
        let ok = unsafe {
            lc::EVP_CipherInit_ex(
                self.0.as_ptr(),
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                -1,
            ) == 1
                && lc::EVP_Cipher(self.0.as_ptr(), bytes, bytes, data.len()) == 1
        };
        // Going on would put plaintext on a disk.
        assert!(ok, "AWS-LC's XTS refused a data unit under a set key");
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn key() -> [u8; 64] {
        std::array::from_fn(|index| index as u8)
    }

    /// IEEE 1619-2007, vectors 10 to 14: XTS-AES-256, 512 bytes, data unit numbers up to 40 bits.
    #[test]
    fn is_ieee_1619s() {
        let key: [u8; 64] = hex::decode(
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
        )
        .unwrap()
        .try_into()
        .unwrap();
        let xts = Xts::new(&key).unwrap();
        // First block and SHA-256 of the ciphertext.
        for (unit, first, digest) in [
            (
                0xff,
                "1c3b3a102f770386e4836c99e370cf9b",
                "e97e974fa393af794f7a4684395814cf820de60a01eaec677d87b452e316b364",
            ),
            (
                0xffff,
                "77a31251618a15e6b92d1d66dffe7b50",
                "def4fad29e95dfe1a24b1ad4620f86d7be094cced5b19e0b121aa82d9e6baf98",
            ),
            (
                0xff_ffff,
                "e387aaa58ba483afa7e8eb469778317e",
                "8bf44861a081dd660d91ce615b5cdfb4d5df9d72c3025c12e67cc0ae097fa5d5",
            ),
            (
                0xffff_ffff,
                "bf53d2dade78e822a4d949a9bc6766b0",
                "c706140a11affda7402234f5e6331eacbfeb687d8e80d83962691823bb3636f0",
            ),
            (
                0xff_ffff_ffff,
                "64497e5a831e4a932c09be3e5393376d",
                "afba71abc4e95b186d89a63a5437c1bafcfd1a18ca273970c534aba4f8d05282",
            ),
        ] {
            let plain: [u8; 512] = std::array::from_fn(|index| index as u8);
            let mut data = plain;
            xts.encrypt.run_unit(unit, &mut data);
            assert_eq!(hex::encode(&data[..16]), first);
            assert_eq!(hex::encode(hash::sha256(&data)), digest);
            xts.decrypt.run_unit(unit, &mut data);
            assert_eq!(data, plain);
        }
    }

    /// What cryptsetup 2.6.1 wrote (`reencrypt --encrypt --type luks2 --sector-size 4096
    /// --cipher aes-xts-plain64` with this volume key over 16 sectors filled with their number):
    /// it fixes the unit of the tweak.
    #[test]
    fn is_what_cryptsetup_writes_with_4_kib_sectors() {
        let xts = Xts::new(&key()).unwrap();
        let mut volume: Vec<u8> = (0..16).flat_map(|number| [number; 4096]).collect();
        xts.encrypt(0, &mut volume);
        assert_eq!(
            hex::encode(hash::sha256(&volume)),
            "2648a2e4b9069c3692599970bc5fb47aaee2b2cad10e6341af605967ac990e10"
        );
        let mut fifth = [5; 4096];
        xts.encrypt(5, &mut fifth);
        assert_eq!(fifth, volume[5 * 4096..6 * 4096]);
    }

    #[test]
    fn equal_halves_are_refused() {
        assert!(Xts::new(&[9; 64]).is_err());
        let mut key = [9; 64];
        key[63] = 8;
        assert_eq!(format!("{:?}", Xts::new(&key).unwrap()), "Xts(..)");
    }

    #[test]
    fn nothing_is_no_sectors() {
        Xts::new(&key()).unwrap().encrypt(u64::MAX / 8, &mut []);
    }

    #[test]
    #[should_panic(expected = "whole sectors")]
    fn half_a_sector_is_a_bug() {
        Xts::new(&key()).unwrap().encrypt(0, &mut [0; 2048]);
    }

    #[test]
    #[should_panic(expected = "fewer than 2^61")]
    fn a_tweak_never_wraps() {
        Xts::new(&key())
            .unwrap()
            .encrypt(u64::MAX / 8, &mut [0; 8192]);
    }

    #[test]
    fn clones_work_on_other_threads_after_the_first_is_gone() {
        let xts = Xts::new(&key()).unwrap();
        let mut want = vec![1; 4096 * 3];
        xts.encrypt(77, &mut want);
        let clones: Vec<Xts> = (0..4).map(|_| xts.clone()).collect();
        drop(xts);
        std::thread::scope(|scope| {
            for clone in clones {
                let want = &want;
                scope.spawn(move || {
                    for _ in 0..50 {
                        let mut data = vec![1; 4096 * 3];
                        clone.encrypt(77, &mut data);
                        assert_eq!(&data, want);
                        clone.decrypt(77, &mut data);
                        assert!(data.iter().all(|byte| *byte == 1));
                    }
                });
            }
        });
    }

    /// `cargo test --release -p casemate-seal xts::tests::speed -- --ignored --nocapture`
    #[test]
    #[ignore = "prints a measurement, asserts nothing"]
    fn speed() {
        let xts = Xts::new(&key()).unwrap();
        for bytes in [4096, 65_536, 1 << 20] {
            let mut data = vec![0; bytes];
            let rounds = (4 << 30) / bytes as u64;
            for (name, run) in [
                ("encrypt", Xts::encrypt as fn(&Xts, u64, &mut [u8])),
                ("decrypt", Xts::decrypt),
            ] {
                let start = std::time::Instant::now();
                for sector in 0..rounds {
                    run(&xts, sector, &mut data);
                }
                let gb_per_s = (4u64 << 30) as f64 / 1e9 / start.elapsed().as_secs_f64();
                println!("{name} {bytes:>8} bytes a call: {gb_per_s:.1} GB/s");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn sectors_are_independent_of_how_they_are_grouped(
            first in 0..u64::MAX / 16,
            sectors in 1usize..6,
            cut in 0usize..6,
            fill: u8,
        ) {
            let xts = Xts::new(&key()).unwrap();
            let plain: Vec<u8> = (0..sectors * 4096).map(|at| (at as u8) ^ fill).collect();
            let mut whole = plain.clone();
            xts.encrypt(first, &mut whole);
            let cut = cut.min(sectors);
            let mut parts = plain.clone();
            let (head, tail) = parts.split_at_mut(cut * 4096);
            xts.encrypt(first + cut as u64, tail);
            xts.encrypt(first, head);
            prop_assert_eq!(&whole, &parts);
            xts.decrypt(first, &mut whole);
            prop_assert_eq!(whole, plain);
        }
    }
}
