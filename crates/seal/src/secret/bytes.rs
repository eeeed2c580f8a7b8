//! Secrets with an owner: in AWS-LC's heap, wiped when dropped, silent in `Debug`.

use std::fmt;
use std::ptr::NonNull;

use aws_lc_sys as lc;
use zeroize::Zeroize;

use crate::{hash, random};

/// A secret of `N` bytes. Moving it moves a pointer, so no copy stays behind on a stack.
pub struct SecretBytes<const N: usize>(SecretBuf);

impl<const N: usize> SecretBytes<N> {
    /// All zeroes, to be filled through [`SecretBytes::expose_mut`].
    #[must_use]
    pub fn zeroed() -> Self {
        Self(SecretBuf::new(N))
    }

    /// Random bytes.
    #[must_use]
    pub fn random() -> Self {
        let mut out = Self::zeroed();
        random::fill(out.expose_mut());
        out
    }

    /// Takes `bytes` over and wipes them where they were.
    #[must_use]
    pub fn take(bytes: &mut [u8; N]) -> Self {
        let mut out = Self::zeroed();
        out.expose_mut().copy_from_slice(bytes);
        bytes.zeroize();
        out
    }

    /// A copy of `bytes`, or nothing if there are not `N`. The caller wipes the original.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != N {
            return None;
        }
        let mut out = Self::zeroed();
        out.expose_mut().copy_from_slice(bytes);
        Some(out)
    }

    /// The secret, for one call. Don't copy it.
    #[must_use]
    pub fn expose(&self) -> &[u8; N] {
        self.0.expose().try_into().expect("made with N bytes")
    }

    /// The secret, for filling it.
    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        self.0.expose_mut().try_into().expect("made with N bytes")
    }
}

impl<const N: usize> Clone for SecretBytes<N> {
    fn clone(&self) -> Self {
        let mut out = Self::zeroed();
        out.expose_mut().copy_from_slice(self.expose());
        out
    }
}

/// In constant time.
impl<const N: usize> PartialEq for SecretBytes<N> {
    fn eq(&self, other: &Self) -> bool {
        hash::ct_eq(self.expose(), other.expose())
    }
}

impl<const N: usize> Eq for SecretBytes<N> {}

impl<const N: usize> Zeroize for SecretBytes<N> {
    fn zeroize(&mut self) {
        self.0.expose_mut().zeroize();
    }
}

impl<const N: usize> zeroize::ZeroizeOnDrop for SecretBytes<N> {}

impl<const N: usize> fmt::Debug for SecretBytes<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes<{N}>(..)")
    }
}

/// A secret whose length is known at run time only.
pub struct SecretBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its bytes like a Box<[u8]> does; AWS-LC's allocator is thread-safe.
unsafe impl Send for SecretBuf {}
// SAFETY: through `&SecretBuf` the bytes are only read.
unsafe impl Sync for SecretBuf {}

impl SecretBuf {
    /// `len` zeroes.
    ///
    /// # Panics
    /// If there is no memory (with a secret heap installed, the process aborts instead).
    #[must_use]
    pub fn new(len: usize) -> Self {
        // SAFETY: OPENSSL_zalloc takes any size; null means out of memory. One byte at least, so
        // that no allocator may answer null for an empty buffer.
        let ptr = unsafe { lc::OPENSSL_zalloc(len.max(1)) };
        Self {
            ptr: NonNull::new(ptr.cast()).expect("out of memory for a secret"),
            len,
        }
    }

    /// The secret, for one call. Don't copy it.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        // SAFETY: `ptr` is `len` bytes of ours, initialised by zalloc, alive as long as `self`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The secret, for filling it.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `expose`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for SecretBuf {
    fn drop(&mut self) {
        // SAFETY: from OPENSSL_zalloc, freed once. OPENSSL_free wipes before it frees, and so
        // does the secret heap.
        unsafe { lc::OPENSSL_free(self.ptr.as_ptr().cast()) }
    }
}

impl fmt::Debug for SecretBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn takes_wipes_compares_and_stays_silent() {
        let mut source = [0x5a; 32];
        let secret = SecretBytes::take(&mut source);
        assert_eq!(source, [0; 32]);
        assert_eq!(secret.expose(), &[0x5a; 32]);
        assert_eq!(secret.clone(), secret);
        assert_ne!(SecretBytes::<32>::zeroed(), secret);
        assert_eq!(format!("{secret:?}"), "SecretBytes<32>(..)");
        assert!(SecretBytes::<4>::from_slice(&[1, 2, 3]).is_none());
        assert_eq!(
            SecretBytes::<3>::from_slice(&[1, 2, 3]).unwrap().expose(),
            &[1, 2, 3]
        );
        assert_ne!(SecretBytes::<32>::random(), SecretBytes::random());
        assert!(SecretBuf::new(0).expose().is_empty());
        assert_eq!(format!("{:?}", SecretBuf::new(3)), "SecretBuf(3 bytes)");
    }
}
