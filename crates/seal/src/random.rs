//! Random bytes, fit for keys; and what a process does whose memory may be a copy.
//!
//! They are AWS-LC's: a CTR-DRBG for each thread, seeded by the kernel, whose state lies in this
//! process's memory. Two copies of that memory, as of a VM's snapshot that is restored twice, draw
//! the same bytes, whatever the kernel was given meanwhile. AWS-LC knows how to do better where
//! something tells it: it looks for `/dev/sysgenid` at its first draw, maps it, and from then on seeds
//! anew whenever the number in it has changed (`crypto/ube/vm_ube_detect.c` and
//! `rand_check_ctr_drbg_uniqueness` in `crypto/fipsmodule/rand/rand.c`, aws-lc-sys 0.47). No kernel of
//! ours has such a device, so [`Generation`] is one: a file that is there for AWS-LC's look only.
//!
//! Must never change that number in the middle of a draw: AWS-LC ends the process then.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Where AWS-LC looks (`AWSLC_SYSGENID_PATH`).
const SYSGENID: &str = "/dev/sysgenid";
const NUMBER_BYTES: usize = size_of::<u32>();

/// Held by each draw, and by a change of generation alone.
static DRAWS: RwLock<()> = RwLock::new(());

/// Fills `out` with random bytes.
///
/// # Panics
/// If the kernel has no entropy to give; nothing could be kept secret then.
pub fn fill(out: &mut [u8]) {
    let _draws = DRAWS.read().unwrap_or_else(PoisonError::into_inner);
    aws_lc_rs::rand::fill(out).expect("AWS-LC aborts by itself before it returns bad randomness");
}

/// `N` random bytes.
#[must_use]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    fill(&mut out);
    out
}

/// Which life of its memory this process is in. A copy of the memory has its own number, which
/// [`Generation::next`] makes another one.
#[derive(Debug, Clone, Copy)]
pub struct Generation(&'static AtomicU32);

impl Generation {
    /// This process's. The first call must come before anything in the process has drawn, and while
    /// no process that is to know nothing of it makes its own first draw.
    ///
    /// # Errors
    /// If something has drawn already, or the file can't be made: then this process can't be told that
    /// it is a copy.
    pub fn of_process() -> io::Result<Self> {
        static BEGUN: Mutex<Option<Generation>> = Mutex::new(None);
        let mut begun = BEGUN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(generation) = *begun {
            return Ok(generation);
        }
        let owner_reads = 0o400;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(owner_reads)
            .open(SYSGENID)?;
        let generation = Self::of_file(&file);
        // Mapped or not: nobody else is to find it.
        std::fs::remove_file(SYSGENID)?;
        Ok(*begun.insert(generation?))
    }

    fn of_file(file: &File) -> io::Result<Self> {
        file.set_len(NUMBER_BYTES as u64)?;
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let number = unsafe { mmap(std::ptr::null_mut(), NUMBER_BYTES, access, shared, file, 0) }?;
        // SAFETY: aligned to a page, of the file's length, never unmapped, and nobody shortens the
        // file: it has no name by the time that another could. AWS-LC only reads it.
        let number = unsafe { AtomicU32::from_ptr(number.cast()) };
        // The look.
        let _drawn = bytes::<1>();
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let is_theirs = |line: &str| line.contains(" r--s ") && line.ends_with(SYSGENID);
        if !maps.lines().any(is_theirs) {
            let why = "AWS-LC did not map it: something has drawn before";
            return Err(io::Error::other(why));
        }
        Ok(Self(number))
    }

    /// From here on each thread's next draw is of a new seed of the kernel's, which must have been
    /// seeded anew itself. Draws that a TLS library makes for itself are not waited for: the caller
    /// must be the only thread that has such.
    pub fn next(self) {
        let _no_draws = DRAWS.write().unwrap_or_else(PoisonError::into_inner);
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ() {
        assert_ne!(super::bytes::<32>(), super::bytes::<32>());
        super::fill(&mut []);
    }
}
