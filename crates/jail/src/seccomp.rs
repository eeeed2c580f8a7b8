//! The system calls that a VMM may make, each with its reason. Any other kills the process
//! before it executes (ISO-2).
//!
//! Two filters: the first answers what a VMM tries at its start but must not have with ENOSYS, as
//! an old kernel would; the second is the list.
//!
//! QEMU's is below, [`firecracker`]'s in a file of its own.
//!
//! To find what is missing after a change of the VMM: `KillProcess` → `Log` below, run the tests,
//! read `syscall=` in the kernel's log; then it needs its reason here.

pub mod firecracker;

use crate::limits::EXE_FD;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use vmm::driver::Driver;

/// Calls that do not exist for a VMM: tried, and done without.
pub const ABSENT: &[(libc::c_long, &str)] = &[
    (
        libc::SYS_clone3,
        "its flags are in memory, where no filter sees them; `clone` serves",
    ),
    (
        libc::SYS_io_uring_setup,
        "a wide way around this list; epoll and threads serve",
    ),
    (
        libc::SYS_memfd_create,
        "a probe; memory is anonymous or the template's",
    ),
    (libc::SYS_seccomp, "a probe of what filters there are"),
    (libc::SYS_get_mempolicy, "a probe of libnuma"),
    (libc::SYS_set_mempolicy, "a probe of libnuma"),
];

/// Advice on memory that does not exist for QEMU, which goes on without it.
pub const ABSENT_ADVICE: &[(libc::c_int, &str)] = &[(
    libc::MADV_HUGEPAGE,
    "around each page of saved memory that is touched the kernel would read 2 MiB, and 2 MiB \
     ahead, all of it decrypted while the guest waits",
)];

/// Calls that are allowed whatever their arguments. What no run of a VM was seen to make says
/// `spare:` and when it would (`platform::rules` holds the two equal).
pub const ALLOWED: &[(libc::c_long, &str)] = &[
    // Memory.
    (libc::SYS_brk, "malloc"),
    (libc::SYS_mmap, "guest RAM, translated code, thread stacks"),
    (libc::SYS_munmap, "the same, given back"),
    (
        libc::SYS_mprotect,
        "guard pages, the loader, translated code",
    ),
    (libc::SYS_mremap, "spare: realloc of large blocks"),
    (
        libc::SYS_madvise,
        "DONTDUMP, freed memory (see ABSENT_ADVICE)",
    ),
    (libc::SYS_msync, "saving RAM to the template's file"),
    (
        libc::SYS_membarrier,
        "spare: RCU, once memory is freed under load",
    ),
    // Files that are in the root or were passed in.
    (libc::SYS_read, "event descriptors, sockets, files"),
    (libc::SYS_write, "event descriptors, sockets, files"),
    (libc::SYS_readv, "tap, sockets"),
    (libc::SYS_writev, "tap, sockets"),
    (libc::SYS_pread64, "block reads, firmware"),
    (libc::SYS_pwrite64, "block writes"),
    (libc::SYS_preadv, "block reads"),
    (libc::SYS_pwritev, "block writes"),
    (libc::SYS_fdatasync, "guest flush"),
    (
        libc::SYS_fsync,
        "spare: saved files, where fdatasync is not enough",
    ),
    (libc::SYS_fallocate, "discard and write-zeroes"),
    (
        libc::SYS_fadvise64,
        "drops the page cache of an image after a restore",
    ),
    (libc::SYS_ftruncate, "the saved state"),
    (libc::SYS_open, "spare: the loader in older C libraries"),
    (
        libc::SYS_openat,
        "libraries, firmware, images (Landlock says which)",
    ),
    (libc::SYS_close, "what was opened"),
    (libc::SYS_lseek, "file sizes, holes"),
    (libc::SYS_stat, "spare: older C libraries"),
    (libc::SYS_fstat, "spare: older C libraries"),
    (libc::SYS_lstat, "spare: path checks of older C libraries"),
    (libc::SYS_newfstatat, "file kinds"),
    (libc::SYS_statx, "spare: file kinds, in newer C libraries"),
    (libc::SYS_statfs, "page size of a memory file"),
    (
        libc::SYS_fstatfs,
        "page size of a memory file, block limits",
    ),
    (libc::SYS_access, "the loader, firmware search"),
    (libc::SYS_readlink, "its own path"),
    (
        libc::SYS_readlinkat,
        "spare: its own path, in newer C libraries",
    ),
    (
        libc::SYS_getdents64,
        "spare: the module directory, if the closure has one",
    ),
    (libc::SYS_getcwd, "path of an image"),
    (libc::SYS_fcntl, "O_NONBLOCK, OFD locks, duplicates"),
    (libc::SYS_flock, "spare: image locks without OFD locks"),
    (
        libc::SYS_dup,
        "spare: descriptor sets that are asked for again",
    ),
    (libc::SYS_dup2, "spare: the same, in older C libraries"),
    (libc::SYS_dup3, "spare: the same"),
    (libc::SYS_pipe2, "spare: event notifiers without eventfd"),
    (libc::SYS_umask, "spare: making a file"),
    // Waiting.
    (libc::SYS_poll, "main loop"),
    (libc::SYS_ppoll, "main loop"),
    (libc::SYS_select, "spare: start-up of libraries"),
    (libc::SYS_epoll_create1, "aio contexts"),
    (
        libc::SYS_epoll_ctl,
        "spare: aio contexts above 64 descriptors",
    ),
    (libc::SYS_epoll_wait, "spare: the same"),
    (
        libc::SYS_epoll_pwait,
        "spare: the same, in newer C libraries",
    ),
    (libc::SYS_eventfd2, "event notifiers"),
    (libc::SYS_signalfd4, "SIGALRM and SIGIO in the main loop"),
    (
        libc::SYS_timerfd_create,
        "spare: timers below a millisecond without ppoll",
    ),
    (libc::SYS_timerfd_settime, "spare: the same"),
    (
        libc::SYS_timer_create,
        "spare: the alarm timer of the main loop",
    ),
    (libc::SYS_timer_settime, "spare: the same"),
    (libc::SYS_timer_delete, "spare: the same"),
    (
        libc::SYS_clock_gettime,
        "spare: where the vDSO does not serve",
    ),
    (
        libc::SYS_clock_getres,
        "spare: guest clock, where the vDSO does not serve",
    ),
    (libc::SYS_clock_nanosleep, "throttled CPUs"),
    (
        libc::SYS_nanosleep,
        "spare: throttled CPUs, in older C libraries",
    ),
    (
        libc::SYS_gettimeofday,
        "spare: where the vDSO does not serve",
    ),
    (libc::SYS_time, "spare: where the vDSO does not serve"),
    (libc::SYS_futex, "locks"),
    (libc::SYS_sched_yield, "spare: spin loops under contention"),
    (
        libc::SYS_restart_syscall,
        "spare: a wait interrupted by a stop",
    ),
    // Threads and signals of its own.
    (libc::SYS_set_robust_list, "threads"),
    (libc::SYS_set_tid_address, "threads"),
    (libc::SYS_rseq, "threads"),
    (libc::SYS_arch_prctl, "thread-local storage"),
    (libc::SYS_sched_getaffinity, "thread stacks, CPU count"),
    (
        libc::SYS_sched_setaffinity,
        "spare: thread contexts with CPUs of their own",
    ),
    (libc::SYS_getpid, "spare: logs, locks"),
    (libc::SYS_gettid, "threads"),
    (
        libc::SYS_getuid,
        "spare: libraries that ask if they are setuid",
    ),
    (libc::SYS_geteuid, "spare: the same"),
    (libc::SYS_getgid, "spare: the same"),
    (libc::SYS_getegid, "spare: the same"),
    (
        libc::SYS_tgkill,
        "spare: kicks a virtual CPU of KVM (Landlock keeps it inside)",
    ),
    (libc::SYS_rt_sigaction, "handlers"),
    (libc::SYS_rt_sigprocmask, "handlers"),
    (libc::SYS_rt_sigpending, "spare: virtual CPUs of KVM"),
    (libc::SYS_rt_sigtimedwait, "spare: virtual CPUs of KVM"),
    (libc::SYS_rt_sigreturn, "spare: after a kick of KVM"),
    (
        libc::SYS_sigaltstack,
        "spare: coroutines on alternative stacks",
    ),
    (libc::SYS_exit, "a thread ends"),
    (libc::SYS_exit_group, "the process ends"),
    (libc::SYS_wait4, "spare: libraries that reap"),
    // The rest.
    (libc::SYS_prlimit64, "stack size; limits only go down"),
    (
        libc::SYS_getrlimit,
        "spare: stack size, in older C libraries",
    ),
    (libc::SYS_getrandom, "hash seeds, virtio-rng"),
    (libc::SYS_uname, "spare: start-up of older C libraries"),
    (libc::SYS_sysinfo, "buffer sizes"),
    (libc::SYS_recvmsg, "QMP with descriptors, agent channel"),
    (libc::SYS_sendmsg, "QMP, agent channel"),
    (
        libc::SYS_recvfrom,
        "spare: channels, where recvmsg is not used",
    ),
    (
        libc::SYS_sendto,
        "spare: channels, where sendmsg is not used",
    ),
    (libc::SYS_getsockname, "an inherited channel's kind"),
    (libc::SYS_getpeername, "an inherited channel's kind"),
    (libc::SYS_getsockopt, "an inherited channel's kind"),
    (libc::SYS_setsockopt, "buffer sizes of a channel"),
    (
        libc::SYS_shutdown,
        "spare: the end of a channel that its peer did not end",
    ),
];

/// `ioctl` requests: of the tap, of plain descriptors and of /dev/kvm (type byte 0xAE).
pub const IOCTLS: &[(u64, &str)] = &[
    (0x5401, "TCGETS: is stdout a terminal"),
    (0x5421, "FIONBIO"),
    (0x541b, "FIONREAD"),
    (0x8004_54d2, "TUNGETIFF"),
    (0x8004_54cf, "TUNGETFEATURES"),
    (0x4004_54d0, "TUNSETOFFLOAD"),
    (0x4004_54d4, "TUNSETSNDBUF"),
    (0x8004_54d3, "TUNGETSNDBUF"),
    (0x8004_54d7, "TUNGETVNETHDRSZ"),
    (0x4004_54d8, "TUNSETVNETHDRSZ"),
    (0x4004_54dc, "TUNSETVNETLE"),
    (0x4004_54de, "TUNSETVNETBE"),
    (0x4004_54d9, "TUNSETQUEUE"),
    (
        0x8004_54e0,
        "TUNSETSTEERINGEBPF: takes none off; it could get no program to put on",
    ),
    (0x8008_1272, "BLKGETSIZE64: is it a block device"),
    (0x1268, "BLKSSZGET: is it a block device"),
    (0x127b, "BLKPBSZGET: is it a block device"),
    (0x5331, "CDROM_GET_CAPABILITY: host device probing"),
    (0x800c_581e, "XFS_IOC_DIOINFO: alignment of direct I/O"),
];

/// `prctl` options: names, timers and memory errors of its own threads.
const PRCTLS: &[libc::c_int] = &[
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_TIMERSLACK,
    libc::PR_MCE_KILL,
    libc::PR_SET_NO_NEW_PRIVS,
];

/// Installs both filters of the driver's on the calling thread; `no_new_privs` must be set.
///
/// # Errors
/// The step and the cause.
pub fn apply(driver: Driver) -> Result<(), String> {
    for program in programs(driver).map_err(|e| format!("compile seccomp: {e}"))? {
        seccompiler::apply_filter(&program).map_err(|e| format!("install seccomp: {e}"))?;
    }
    Ok(())
}

fn programs(driver: Driver) -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let arch = if cfg!(target_arch = "aarch64") {
        TargetArch::aarch64
    } else {
        TargetArch::x86_64
    };
    let (absent, advice, allowed, requests, options) = match driver {
        Driver::Qemu => (ABSENT, ABSENT_ADVICE, ALLOWED, IOCTLS, PRCTLS),
        Driver::Firecracker => (
            firecracker::ABSENT,
            &[][..],
            firecracker::ALLOWED,
            firecracker::IOCTLS,
            firecracker::PRCTLS,
        ),
    };
    use SeccompCmpArgLen::{Dword, Qword};
    let is = |arg, value| SeccompCondition::new(arg, Dword, SeccompCmpOp::Eq, value);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = allowed
        .iter()
        .chain(absent)
        .map(|(nr, _)| (*nr, vec![]))
        .collect();
    // Threads, not processes.
    let thread = libc::CLONE_THREAD as u64;
    let masked = SeccompCmpOp::MaskedEq(thread);
    let thread = SeccompCondition::new(0, Dword, masked, thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![thread])?]);
    // The one exec that starts the VMM: by a descriptor number that can't exist afterwards.
    rules.insert(
        libc::SYS_execveat,
        vec![SeccompRule::new(vec![is(0, EXE_FD as u64)?])?],
    );
    let mut ioctls = requests
        .iter()
        .map(|(request, _)| SeccompRule::new(vec![is(1, *request)?]))
        .collect::<Result<Vec<_>, seccompiler::BackendError>>()?;
    let kvm = SeccompCondition::new(1, Dword, SeccompCmpOp::MaskedEq(0xff00), 0xae00)?;
    ioctls.push(SeccompRule::new(vec![kvm])?);
    rules.insert(libc::SYS_ioctl, ioctls);
    rules.insert(
        libc::SYS_prctl,
        options
            .iter()
            .map(|n| SeccompRule::new(vec![is(0, *n as u64)?]))
            .collect::<Result<Vec<_>, seccompiler::BackendError>>()?,
    );
    // Only sockets of the same host, already useless in an empty network namespace.
    rules.insert(
        libc::SYS_socket,
        vec![SeccompRule::new(vec![is(0, libc::AF_UNIX as u64)?])?],
    );
    let own = [
        is(0, libc::SECCOMP_SET_MODE_FILTER.into())?,
        SeccompCondition::new(1, Qword, SeccompCmpOp::Eq, 0)?,
    ];
    match driver {
        // The second filter is installed under the first, then no more.
        Driver::Qemu => {}
        // Its threads add filters, which only take away; none that somebody else answers for.
        Driver::Firecracker => {
            rules.insert(libc::SYS_seccomp, vec![SeccompRule::new(own.into())?]);
        }
    }
    let list = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        arch,
    )?;
    let mut absent: BTreeMap<i64, Vec<SeccompRule>> =
        absent.iter().map(|(nr, _)| (*nr, vec![])).collect();
    if !advice.is_empty() {
        let rules = advice
            .iter()
            .map(|(advice, _)| SeccompRule::new(vec![is(2, *advice as u64)?]));
        absent.insert(libc::SYS_madvise, rules.collect::<Result<_, _>>()?);
    }
    let absent = SeccompFilter::new(
        absent,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        arch,
    )?;
    // In this order: the second of QEMU's makes `seccomp` itself absent.
    Ok([list.try_into()?, absent.try_into()?])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_list_compiles_and_names_each_call_once() {
        for driver in [Driver::Qemu, Driver::Firecracker] {
            programs(driver).unwrap();
        }
        for list in [ALLOWED, firecracker::ALLOWED] {
            let numbers: std::collections::BTreeSet<_> = list.iter().map(|(n, _)| n).collect();
            assert_eq!(numbers.len(), list.len());
            assert!(list.iter().all(|(_, why)| !why.is_empty()));
        }
    }

    #[test]
    fn the_list_holds_no_way_out() {
        for never in [
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_process_vm_readv,
            libc::SYS_pidfd_getfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_fork,
            libc::SYS_vfork,
        ] {
            for list in [ALLOWED, firecracker::ALLOWED] {
                assert!(list.iter().all(|(n, _)| *n != never), "{never}");
            }
        }
        // QEMU has all its channels from the start.
        for never in [libc::SYS_connect, libc::SYS_bind, libc::SYS_listen] {
            assert!(ALLOWED.iter().all(|(n, _)| *n != never), "{never}");
        }
    }
}
