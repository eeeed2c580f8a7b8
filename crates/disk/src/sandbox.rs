//! What this process may still ask of the kernel once it is up: nothing but its own few files.
//!
//! Landlock with no right at all (no path can be opened, no port bound or dialled, no abstract
//! socket or process outside reached), then a seccomp allow-list; anything else kills the process.
//! Where a call takes a descriptor, it is bound to the one it is for. Each thread enters by
//! itself, before it touches what comes from outside, so no call that makes a thread, a process or
//! a descriptor is on the list.
//!
//! To find what is missing after a change: run the tests under `strace -f`; the last call before
//! `killed by SIGSYS` is it. Then it needs its reason here. (`SeccompAction::Log` in place of
//! `KillProcess` reports all of them at once, where the kernel's log can be read.)

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::DiskError;
use crate::limits::{
    BACKING_FD, BESIDE_FD, BESIDE_TAGS_FD, CONTROL_FD, DIRECT_FD, FUSE_CLONE_FD, FUSE_FD,
    STDERR_FD, TAGS_FD,
};

/// The oldest Landlock that has all rights and scopes that are closed here (Linux 6.12).
const LANDLOCK: ABI = ABI::V6;

/// Before any other thread is there: all threads allocate from the first arena. Before it gives memory
/// of another one back, glibc opens a file of /proc (`check_may_shrink_heap` in its arena.c).
pub fn prepare() {
    // SAFETY: takes numbers only.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    assert_eq!(set, 1, "glibc takes a number of arenas");
}

/// Confines the calling thread, for good.
///
/// # Errors
/// [`DiskError::Sandbox`] if the kernel has no Landlock or no seccomp: nothing is served then.
pub fn enter() -> Result<(), DiskError> {
    forbid_paths()?;
    let program = filter().map_err(|why| failed("seccomp")(&why))?;
    seccompiler::apply_filter(&program).map_err(|why| failed("seccomp")(&why))
}

fn forbid_paths() -> Result<(), DiskError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(LANDLOCK)))
        .and_then(|rules| rules.scope(Scope::from_all(LANDLOCK)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(|why| failed("Landlock")(&why))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(failed("Landlock")(
            &"the kernel has none: needs Linux 5.13, better 6.12",
        ));
    }
    Ok(())
}

fn failed(operation: &'static str) -> impl FnOnce(&dyn std::fmt::Display) -> DiskError {
    move |why| DiskError::Sandbox {
        operation,
        why: why.to_string(),
    }
}

/// When a call is allowed.
enum When {
    Always,
    /// Its first argument is one of these descriptors.
    Fd(&'static [i32]),
    /// Its second argument is `F_GETFD`.
    GetFd,
    /// Its third argument asks for no executable memory.
    NotExec,
    /// Anonymous memory, not executable.
    Anonymous,
}

/// Files at rest. What may only be read was opened so.
const FILES: &[i32] = &[BACKING_FD, TAGS_FD, BESIDE_FD, BESIDE_TAGS_FD];
/// Those that hold ciphertext.
const VOLUMES: &[i32] = &[BACKING_FD, BESIDE_FD];
/// Those that are written: the disk's volume in two ways.
const WRITTEN: &[i32] = &[BACKING_FD, TAGS_FD, DIRECT_FD, BESIDE_FD, BESIDE_TAGS_FD];

/// Each call with its reason.
const ALLOWED: &[(libc::c_long, When)] = &[
    // Requests and answers.
    (libc::SYS_read, When::Fd(&[FUSE_FD, FUSE_CLONE_FD])),
    (libc::SYS_writev, When::Fd(&[FUSE_FD, FUSE_CLONE_FD])),
    // Ciphertext and tags: the object's, and those of one beside it that it is filled from or copied
    // to (the first may also be a template).
    (libc::SYS_pread64, When::Fd(FILES)),
    (libc::SYS_pwrite64, When::Fd(WRITTEN)),
    (libc::SYS_fallocate, When::Fd(VOLUMES)),       // Holes.
    (libc::SYS_ftruncate, When::Fd(FILES)),         // New, or larger.
    (libc::SYS_sync_file_range, When::Fd(VOLUMES)), // Written data begins to go out.
    (libc::SYS_fdatasync, When::Fd(FILES)),
    (libc::SYS_lseek, When::Fd(VOLUMES)), // Length; where the data is.
    // Warden.
    (libc::SYS_recvmsg, When::Fd(&[CONTROL_FD])), // With the files.
    (libc::SYS_sendto, When::Fd(&[CONTROL_FD])),
    (libc::SYS_close, When::Always), // The template, when it is copied.
    (libc::SYS_fcntl, When::GetFd),  // The standard library's check before it, in debug builds.
    // Threads: locks, rate limits and their clock (where the vDSO has none).
    (libc::SYS_futex, When::Always),
    (libc::SYS_clock_nanosleep, When::Always),
    (libc::SYS_restart_syscall, When::Always), // A sleep that was stopped and continued.
    (libc::SYS_clock_gettime, When::Always),
    // The allocator.
    (libc::SYS_mmap, When::Anonymous),
    (libc::SYS_mprotect, When::NotExec),
    (libc::SYS_munmap, When::Always),
    (libc::SYS_mremap, When::Always),
    (libc::SYS_madvise, When::Always),
    (libc::SYS_brk, When::Always),
    // Keys, salts and the identity's seed.
    (libc::SYS_getrandom, When::Always),
    // The last words of a panic, and its abort.
    (libc::SYS_write, When::Fd(&[STDERR_FD])),
    (libc::SYS_rt_sigprocmask, When::Always),
    (libc::SYS_rt_sigaction, When::Always),
    (libc::SYS_getpid, When::Always),
    (libc::SYS_gettid, When::Always),
    (libc::SYS_tgkill, When::Always),
    // The end: of a thread (which gives its signal stack back), of the process; the standard
    // library parks every thread but the first that ends the process.
    (libc::SYS_sigaltstack, When::Always),
    (libc::SYS_pause, When::Always),
    (libc::SYS_exit, When::Always),
    (libc::SYS_exit_group, When::Always),
];

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = std::collections::BTreeMap::new();
    for (number, when) in ALLOWED {
        rules.insert(*number, when.rules()?);
    }
    let arch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )?
    .try_into()
}

impl When {
    /// Any one of these is enough; none means always.
    fn rules(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let dword = |argument, op, value| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)
        };
        let not_exec = || dword(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
        let anonymous = || {
            let flag = libc::MAP_ANONYMOUS as u64;
            dword(3, SeccompCmpOp::MaskedEq(flag), flag)
        };
        match self {
            Self::Always => Ok(vec![]),
            Self::Fd(fds) => fds
                .iter()
                .map(|fd| SeccompRule::new(vec![dword(0, SeccompCmpOp::Eq, *fd as u64)?]))
                .collect(),
            Self::GetFd => {
                let get = dword(1, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
                Ok(vec![SeccompRule::new(vec![get])?])
            }
            Self::NotExec => Ok(vec![SeccompRule::new(vec![not_exec()?])?]),
            Self::Anonymous => Ok(vec![SeccompRule::new(vec![not_exec()?, anonymous()?])?]),
        }
    }
}
