//! Memory for secrets: outside the reach of other processes, core dumps and swap.
//!
//! [`install_secret_heap`] makes AWS-LC's allocator use a `memfd_secret(2)` mapping. Such pages
//! are not in the kernel's direct map: not even root reads them through `/proc/PID/mem`, `ptrace`
//! or a core dump. From then on key schedules ([`crate::xts`]), private keys ([`crate::hpke`],
//! [`crate::sign`]) and [`SecretBytes`] live there. It must never fall back to ordinary memory:
//! when it is full, the process aborts.
//!
//! What it can't cover: bytes in registers and on the stack while a call runs, and what the
//! caller copies out.

mod arena;
mod bytes;
mod heap;

pub use arena::SecretArena;
pub use bytes::{SecretBuf, SecretBytes};
pub use heap::{SecretHeapUse, install_secret_heap, secret_heap_use};

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::SealError;

/// Makes this process leave no core dump and be closed to other processes of its own user
/// (`RLIMIT_CORE` 0, `PR_SET_DUMPABLE` 0). Call it first in `main`; an `execve` undoes the second.
///
/// # Errors
/// [`SealError::Os`] if the kernel refuses; don't load a secret then.
pub fn harden_process() -> Result<(), SealError> {
    let os = |operation| {
        move |source: rustix::io::Errno| SealError::Os {
            operation,
            hint: "the kernel refused it: don't load a secret into this process",
            source: source.into(),
        }
    };
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )
    .map_err(os("turning core dumps off"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(os("closing the process to debuggers"))
}
