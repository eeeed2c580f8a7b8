//! What the workers may ask of the kernel.
//!
//! All: no new privileges, no core, bounded memory, CPU time and files. The unpacker: nothing but
//! its descriptors, so no path, no socket, no process. The fetcher: the network, its own directory
//! and what name resolution and TLS read.

use crate::error::{Error, os};
use crate::limits::{Limits, WORKER_CPU_S, WORKER_MEMORY_BYTES};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::path::Path;

/// The oldest Landlock that has all rights and scopes that are closed here (Linux 6.12); an older
/// kernel closes what it knows.
const LANDLOCK: ABI = ABI::V6;

/// What getaddrinfo(3) and the system's certificates need.
const READABLE: &[&str] = &[
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/run/systemd/resolve",
    "/proc/self",
];

/// (call, reason) of the unpacker.
const ALLOWED: &[(i64, &str)] = &[
    (libc::SYS_read, "blobs"),
    (libc::SYS_pread64, "the spool"),
    (libc::SYS_write, "the image's file; last words"),
    (libc::SYS_writev, "last words"),
    (libc::SYS_pwrite64, "the spool"),
    (libc::SYS_lseek, "a blob's second reading"),
    (libc::SYS_recvmsg, "the command and its descriptors"),
    (libc::SYS_sendmsg, "the command"),
    (libc::SYS_close, "blobs"),
    (libc::SYS_fstat, "how much a read takes at once"),
    (libc::SYS_statx, "the same"),
    (
        libc::SYS_fcntl,
        "the standard library's check before a close, in debug builds",
    ),
    (libc::SYS_brk, "memory"),
    (libc::SYS_mmap, "memory"),
    (libc::SYS_mprotect, "memory"),
    (libc::SYS_mremap, "memory"),
    (libc::SYS_munmap, "memory"),
    (libc::SYS_madvise, "memory"),
    (libc::SYS_getrandom, "hash maps' start"),
    (libc::SYS_futex, "locks"),
    (libc::SYS_clock_gettime, "where the vDSO can't"),
    (libc::SYS_sigaltstack, "the end"),
    (libc::SYS_rt_sigaction, "the end"),
    (libc::SYS_rt_sigprocmask, "the end"),
    (libc::SYS_rt_sigreturn, "signals"),
    (libc::SYS_restart_syscall, "a stopped and continued wait"),
    (libc::SYS_getpid, "an abort"),
    (libc::SYS_gettid, "an abort"),
    (libc::SYS_tgkill, "an abort"),
    (libc::SYS_exit, "the end"),
    (libc::SYS_exit_group, "the end"),
];

/// Confines the unpacker, for good.
///
/// # Errors
/// Which part the kernel lacks; nothing is unpacked then.
pub(crate) fn enter_unpacker(limits: &Limits) -> Result<(), Error> {
    // The spool holds each file that any layer has; the image what is left of them.
    bound(limits.image_unpacked_max_bytes.saturating_mul(2))?;
    bound_one(Resource::Cpu, WORKER_CPU_S)?;
    bound_one(Resource::Nproc, 0)?;
    forbid(&[])?;
    let failed = |e: &dyn std::fmt::Display| Error::Worker(format!("seccomp: {e}"));
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| failed(&e))?;
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        ALLOWED.iter().map(|(n, _)| (*n, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )
    .map_err(|e| failed(&e))?;
    let program: BpfProgram = filter.try_into().map_err(|e| failed(&e))?;
    seccompiler::apply_filter(&program).map_err(|e| failed(&e))
}

/// Confines the fetcher, for good: it writes below `scratch` only.
///
/// # Errors
/// Which part the kernel lacks.
pub(crate) fn enter_fetcher(
    scratch: &Path,
    limits: &Limits,
    ca: Option<&Path>,
) -> Result<(), Error> {
    bound(limits.layer_stored_max_bytes)?;
    let write = AccessFs::from_all(LANDLOCK);
    let read = AccessFs::from_read(LANDLOCK) & !AccessFs::Execute;
    let mut open = vec![(scratch.to_owned(), write)];
    open.extend(READABLE.iter().map(|p| (p.into(), read)));
    open.extend(ca.map(|p| (p.to_owned(), AccessFs::ReadFile.into())));
    forbid(&open)
}

fn bound(file_bytes: u64) -> Result<(), Error> {
    rustix::thread::set_no_new_privs(true).map_err(os("give up new privileges"))?;
    bound_one(Resource::Core, 0)?;
    bound_one(Resource::Nofile, 64)?;
    bound_one(Resource::As, WORKER_MEMORY_BYTES)?;
    bound_one(Resource::Fsize, file_bytes)
}

fn bound_one(resource: Resource, to: u64) -> Result<(), Error> {
    let limit = Rlimit {
        current: Some(to),
        maximum: Some(to),
    };
    setrlimit(resource, limit).map_err(os(format!("bound a worker's {resource:?}")))
}

fn forbid(open: &[(std::path::PathBuf, landlock::BitFlags<AccessFs>)]) -> Result<(), Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Worker(format!("Landlock: {e}"));
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))
        .and_then(|r| r.scope(Scope::from_all(LANDLOCK)))
        .and_then(|r| match open {
            [] => r.handle_access(AccessNet::from_all(LANDLOCK)),
            _ => r.handle_access(AccessNet::BindTcp),
        })
        .and_then(Ruleset::create)
        .map_err(|e| failed(&e))?;
    for (path, access) in open {
        // What this machine does not have, nobody reads.
        if let Ok(fd) = PathFd::new(path) {
            rules = rules
                .add_rule(PathBeneath::new(fd, *access))
                .map_err(|e| failed(&e))?;
        }
    }
    let status = rules.restrict_self().map_err(|e| failed(&e))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(failed(
            &"the kernel has none: needs Linux 5.13, better 6.12",
        ));
    }
    Ok(())
}
