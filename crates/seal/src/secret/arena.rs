//! A `memfd_secret(2)` mapping.

use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::SealError;

const PAGE_BYTES: usize = 4096;

/// Zeroed memory that the kernel itself does not map: no other process, no core dump, no swap and
/// no hibernation image sees it (a system with such a mapping does not hibernate).
///
/// A forked child does not inherit it: it would share the pages, not copy them.
pub struct SecretArena {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its mapping like a Box<[u8]> owns its bytes.
unsafe impl Send for SecretArena {}
// SAFETY: through `&SecretArena` the bytes are only read.
unsafe impl Sync for SecretArena {}

impl SecretArena {
    /// Maps at least `bytes`, rounded up to pages, and touches each page, so that a shortage
    /// shows now.
    ///
    /// # Errors
    /// [`SealError::Os`] if the kernel has no `memfd_secret` or `RLIMIT_MEMLOCK` is below `bytes`.
    pub fn new(bytes: usize) -> Result<Self, SealError> {
        let len = bytes.max(1).next_multiple_of(PAGE_BYTES);
        let fd = memfd_secret()?;
        let os = |operation, hint| {
            move |source: rustix::io::Errno| SealError::Os {
                operation,
                hint,
                source: source.into(),
            }
        };
        rustix::fs::ftruncate(&fd, len as u64)
            .map_err(os("sizing secret memory", "the kernel refused the size"))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED, // The only kind memfd_secret knows.
                &fd,
                0,
            )
        }
        .map_err(os(
            "mapping secret memory",
            "raise RLIMIT_MEMLOCK (ulimit -l) above its size",
        ))?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap never answers null");
        let mut arena = Self { base, len };
        for (advice, operation) in [
            (
                Advice::LinuxDontDump,
                "keeping secret memory out of core dumps",
            ),
            (
                Advice::LinuxDontFork,
                "keeping secret memory from forked children",
            ),
        ] {
            // SAFETY: the range is the mapping made above; neither advice changes its content.
            unsafe { madvise(base.as_ptr().cast(), len, advice) }
                .map_err(os(operation, "the kernel refused it"))?;
        }
        arena.as_mut_slice().fill(0);
        Ok(arena)
    }

    /// The memory.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes mapped readable for as long as `self` lives, zeroed at first.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The memory, for writing.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Gives the mapping away for the rest of the process's life.
    pub(super) fn leak(self) -> (NonNull<u8>, usize) {
        let this = std::mem::ManuallyDrop::new(self);
        (this.base, this.len)
    }
}

impl Drop for SecretArena {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once. The kernel zeroes its pages.
        let _unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

impl fmt::Debug for SecretArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretArena({} bytes)", self.len)
    }
}

fn memfd_secret() -> Result<OwnedFd, SealError> {
    // SAFETY: the call takes one flag and makes a file descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(SealError::Os {
            operation: "memfd_secret",
            hint: "needs Linux 6.5, or an older one booted with secretmem.enable=1",
            source: std::io::Error::last_os_error(),
        });
    }
    let fd = i32::try_from(fd).expect("a file descriptor is an int");
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn is_ours_only() {
        let mut arena = SecretArena::new(5000).unwrap();
        assert_eq!(arena.as_slice().len(), 8192);
        assert!(arena.as_slice().iter().all(|b| *b == 0));
        arena.as_mut_slice()[..4].copy_from_slice(b"mine");
        assert_eq!(&arena.as_slice()[..4], b"mine");
        // What a debugger would do.
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let mut stolen = [0; 4];
        memory
            .read_exact_at(&mut stolen, b"open".as_ptr() as u64)
            .unwrap();
        assert_eq!(&stolen, b"open");
        let at = arena.as_slice().as_ptr() as u64;
        assert!(memory.read_exact_at(&mut stolen, at).is_err());
        assert_ne!(&stolen, b"mine");
    }
}
