//! What vmctl may ask of the kernel once its descriptors are there.
//!
//! Each call has its reason; the test of the sandbox runs a whole life of a VM under it.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;

/// (call, reason).
const ALLOWED: &[(i64, &str)] = &[
    (libc::SYS_poll, "the loop"),
    (
        libc::SYS_ppoll,
        "the loop, as rustix spells it with a timeout",
    ),
    (libc::SYS_recvfrom, "the VMM, the guest"),
    (libc::SYS_recvmsg, "clients, and warden's descriptor"),
    (libc::SYS_sendto, "answers"),
    (libc::SYS_sendmsg, "the VMM, and the disk's descriptor"),
    (libc::SYS_read, "an archive that is put back"),
    (libc::SYS_write, "answers, the guest, the log"),
    (libc::SYS_accept4, "clients"),
    (
        libc::SYS_shutdown,
        "nobody listens for the guest once it has connected",
    ),
    (
        libc::SYS_fdatasync,
        "saved memory, before it counts as saved",
    ),
    (libc::SYS_getsockopt, "who the client is"),
    (libc::SYS_setsockopt, "how long a write may block"),
    (libc::SYS_ioctl, "FIONBIO: blocking or not"),
    (libc::SYS_close, "clients that leave"),
    (
        libc::SYS_fcntl,
        "libc's check of a closed descriptor, in debug builds",
    ),
    (libc::SYS_clock_gettime, "deadlines, where the vDSO can't"),
    (
        libc::SYS_clock_nanosleep,
        "between two looks at a migration",
    ),
    (libc::SYS_nanosleep, "the same"),
    (libc::SYS_brk, "memory"),
    (libc::SYS_mmap, "memory"),
    (libc::SYS_mremap, "memory"),
    (libc::SYS_munmap, "memory"),
    (libc::SYS_madvise, "memory"),
    (
        libc::SYS_getrandom,
        "the allocator's and the hash map's start",
    ),
    (libc::SYS_futex, "stderr's lock"),
    (libc::SYS_sigaltstack, "the end of the main thread"),
    (libc::SYS_rt_sigaction, "the end, after a panic"),
    (libc::SYS_rt_sigprocmask, "the end, after a panic"),
    (libc::SYS_rt_sigreturn, "signals"),
    (libc::SYS_restart_syscall, "a stopped and continued wait"),
    (libc::SYS_exit, "the end"),
    (libc::SYS_exit_group, "the end"),
];

/// Why the sandbox could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter.
    #[error("build the seccomp filter; this architecture or list is not supported")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel.
    #[error("install the seccomp filter; the kernel needs CONFIG_SECCOMP_FILTER")]
    Install(#[from] seccompiler::Error),
}

/// Sets `no_new_privs` and an allow-list filter that kills the process, for good.
///
/// # Errors
/// See [`Error`].
pub fn enter() -> Result<(), Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        ALLOWED.iter().map(|(n, _)| (*n, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
