//! AWS-LC's allocator inside a [`SecretArena`].
//!
//! Memory goes out in runs of 64-byte granules. Which granules are taken stands *outside* the
//! arena, so nothing written there can lead the allocator astray; freeing what was not given out
//! aborts. First fit from where the last search ended; runs are wiped when freed.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use zeroize::Zeroize;

use crate::SealError;
use crate::limits::{SECRET_HEAP_MAX_BYTES, SECRET_HEAP_MIN_BYTES};
use crate::secret::SecretArena;

const GRANULE_BYTES: usize = 64;

/// Makes AWS-LC keep everything it allocates in `bytes` of secret memory, for good.
///
/// Call it once, first thing in `main`: what AWS-LC allocated before stays in ordinary memory (and
/// is never freed). 1 MiB serves a process with a few ciphers and private keys; mind
/// `RLIMIT_MEMLOCK`. When it is full the process aborts. A forked child has no such heap, so it
/// must `execve` before it uses cryptography (`std::process::Command` does).
///
/// # Errors
/// If `bytes` is out of bounds, the kernel refuses (see [`SecretArena::new`]), or a heap is
/// installed already.
pub fn install_secret_heap(bytes: usize) -> Result<(), SealError> {
    let wrong = |why| SealError::Malformed {
        what: "secret heap",
        why,
    };
    if !(SECRET_HEAP_MIN_BYTES..=SECRET_HEAP_MAX_BYTES).contains(&bytes) {
        return Err(wrong("its size must be from 64 KiB to 64 MiB"));
    }
    let twice = "it is installed already";
    if HEAP.get().is_some() {
        return Err(wrong(twice));
    }
    HEAP.set(Mutex::new(Heap::new(SecretArena::new(bytes)?)))
        .map_err(|_| wrong(twice))?;
    // SAFETY: the three functions keep malloc's, realloc's and free's contracts (below), call
    // nothing of AWS-LC, and the heap they use is in place.
    let ok = unsafe {
        aws_lc_sys::CRYPTO_set_mem_functions(
            Some(secret_malloc),
            Some(secret_realloc),
            Some(secret_free),
        )
    };
    if ok != 1 {
        return Err(wrong("AWS-LC has another allocator already"));
    }
    Ok(())
}

/// How full the secret heap is; `None` if there is none.
#[must_use]
pub fn secret_heap_use() -> Option<SecretHeapUse> {
    let heap = lock(HEAP.get()?);
    Some(SecretHeapUse {
        used_bytes: heap.used * GRANULE_BYTES,
        peak_bytes: heap.peak * GRANULE_BYTES,
        total_bytes: heap.runs.len() * GRANULE_BYTES,
    })
}

/// How full the secret heap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretHeapUse {
    /// Given out now.
    pub used_bytes: usize,
    /// Most that was ever given out.
    pub peak_bytes: usize,
    /// Its size.
    pub total_bytes: usize,
}

static HEAP: OnceLock<Mutex<Heap>> = OnceLock::new();

/// A granule's state: free, the first of a run of so many, or a later one of a run.
const FREE: u32 = 0;
const INNER: u32 = u32::MAX;

struct Heap {
    base: NonNull<u8>,
    runs: Box<[u32]>,
    next: usize,
    used: usize,
    peak: usize,
}

// SAFETY: the heap owns its mapping; who uses which part of it is what it keeps track of.
unsafe impl Send for Heap {}

impl Heap {
    fn new(arena: SecretArena) -> Self {
        let (base, len) = arena.leak();
        Self {
            base,
            runs: vec![FREE; len / GRANULE_BYTES].into(),
            next: 0,
            used: 0,
            peak: 0,
        }
    }

    /// A zeroed run of at least `size` bytes, aligned to 64.
    fn alloc(&mut self, size: usize) -> Option<NonNull<u8>> {
        let want = size.max(1).div_ceil(GRANULE_BYTES);
        let first = self
            .find_free(self.next, self.runs.len(), want)
            .or_else(|| self.find_free(0, self.runs.len(), want))?;
        self.runs[first + 1..first + want].fill(INNER);
        self.runs[first] = u32::try_from(want).expect("64 MiB are 2^20 granules");
        self.next = first + want;
        self.used += want;
        self.peak = self.peak.max(self.used);
        // SAFETY: `first` is below the number of granules of the mapping.
        Some(unsafe { self.base.add(first * GRANULE_BYTES) })
    }

    fn find_free(&self, from: usize, to: usize, want: usize) -> Option<usize> {
        let mut at = from;
        while at + want <= to {
            match self.runs[at..at + want]
                .iter()
                .rposition(|state| *state != FREE)
            {
                None => return Some(at),
                Some(taken) => at += taken + 1,
            }
        }
        None
    }

    /// Wipes and takes back the run that starts at `ptr`.
    fn free(&mut self, ptr: *mut c_void) {
        let (first, len) = self.run_at(ptr);
        // SAFETY: the run is `len` granules of the mapping, and its user has given it up.
        let bytes: &mut [u8] =
            unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len * GRANULE_BYTES) };
        bytes.zeroize();
        self.runs[first..first + len].fill(FREE);
        self.used -= len;
    }

    /// First granule and length of the run that starts at `ptr`, which must be in the arena.
    fn run_at(&self, ptr: *mut c_void) -> (usize, usize) {
        let offset = ptr as usize - self.base.as_ptr() as usize;
        let first = offset / GRANULE_BYTES;
        let len = self.runs[first];
        if !offset.is_multiple_of(GRANULE_BYTES) || len == FREE || len == INNER {
            die("a pointer that was not given out was freed");
        }
        (first, len as usize)
    }

    fn holds(&self, ptr: *mut c_void) -> bool {
        let base = self.base.as_ptr() as usize;
        (base..base + self.runs.len() * GRANULE_BYTES).contains(&(ptr as usize))
    }
}

fn lock(heap: &Mutex<Heap>) -> MutexGuard<'_, Heap> {
    heap.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The heap, for AWS-LC's calls: they come after it was set.
fn installed() -> MutexGuard<'static, Heap> {
    match HEAP.get() {
        Some(heap) => lock(heap),
        None => die("AWS-LC called it before it was installed"),
    }
}

fn die(why: &str) -> ! {
    eprintln!("secret heap: {why}");
    std::process::abort();
}

extern "C" fn secret_malloc(size: usize, _file: *const c_char, _line: c_int) -> *mut c_void {
    match installed().alloc(size) {
        Some(ptr) => ptr.as_ptr().cast(),
        None => die("it is full: install a larger one"),
    }
}

/// # Safety
/// Like C's `realloc`: `ptr` is null or was given out and not freed yet.
unsafe extern "C" fn secret_realloc(
    ptr: *mut c_void,
    size: usize,
    _file: *const c_char,
    _line: c_int,
) -> *mut c_void {
    let mut heap = installed();
    if ptr.is_null() {
        return match heap.alloc(size) {
            Some(new) => new.as_ptr().cast(),
            None => die("it is full: install a larger one"),
        };
    }
    if !heap.holds(ptr) {
        die("AWS-LC was used before it was installed: install it first in main");
    }
    let (_, granules) = heap.run_at(ptr);
    let old_bytes = granules * GRANULE_BYTES;
    if size <= old_bytes {
        return ptr;
    }
    let Some(new) = heap.alloc(size) else {
        die("it is full: install a larger one")
    };
    // SAFETY: both are runs of this heap, distinct, the old one of `old_bytes` < `size`.
    unsafe { ptr::copy_nonoverlapping(ptr.cast::<u8>(), new.as_ptr(), old_bytes) };
    heap.free(ptr);
    new.as_ptr().cast()
}

/// # Safety
/// Like C's `free`: `ptr` is null or was given out and not freed yet.
unsafe extern "C" fn secret_free(ptr: *mut c_void, _file: *const c_char, _line: c_int) {
    let mut heap = installed();
    // Not ours: from before the heap was installed. Only AWS-LC knows its true start, so it stays.
    if !ptr.is_null() && heap.holds(ptr) {
        heap.free(ptr);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn heap(bytes: usize) -> Heap {
        Heap::new(SecretArena::new(bytes).unwrap())
    }

    fn slice<'a>(ptr: NonNull<u8>, len: usize) -> &'a mut [u8] {
        // SAFETY: tests pass a live run and its length, and hold one reference at a time.
        unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr(), len) }
    }

    #[test]
    fn gives_out_all_of_it_wipes_and_gives_it_out_again() {
        let mut heap = heap(4096);
        let runs: Vec<_> = (0..64).map(|_| heap.alloc(64).unwrap()).collect();
        assert!(heap.alloc(1).is_none());
        slice(runs[3], 64).fill(0xee);
        for run in &runs {
            heap.free(run.as_ptr().cast());
        }
        let whole = heap.alloc(4096).unwrap();
        assert!(slice(whole, 4096).iter().all(|b| *b == 0));
        assert_eq!((heap.used, heap.peak), (64, 64));
        heap.free(whole.as_ptr().cast());
        assert!(heap.alloc(4097).is_none());
        assert!(heap.alloc(usize::MAX).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn runs_never_overlap(steps in proptest::collection::vec((0usize..700, any::<bool>()), 1..200)) {
            let mut heap = heap(8192);
            let mut live: Vec<(NonNull<u8>, usize, u8)> = Vec::new();
            for (index, (size, free)) in steps.into_iter().enumerate() {
                if free && !live.is_empty() {
                    let (ptr, len, mark) = live.swap_remove(size % live.len());
                    prop_assert!(slice(ptr, len).iter().all(|b| *b == mark));
                    heap.free(ptr.as_ptr().cast());
                } else if let Some(ptr) = heap.alloc(size) {
                    prop_assert_eq!(ptr.as_ptr() as usize % GRANULE_BYTES, 0);
                    prop_assert!(slice(ptr, size).iter().all(|b| *b == 0));
                    let mark = (index % 255) as u8 + 1;
                    slice(ptr, size).fill(mark);
                    live.push((ptr, size, mark));
                }
            }
            for (ptr, len, mark) in live.drain(..) {
                prop_assert!(slice(ptr, len).iter().all(|b| *b == mark));
                heap.free(ptr.as_ptr().cast());
            }
            prop_assert_eq!(heap.used, 0);
        }
    }
}
