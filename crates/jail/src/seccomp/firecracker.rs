//! Firecracker's: from upstream's own three lists for the pinned version (`io_uring_*` taken out;
//! its threads install them on top of this one, each its own), and what comes before them. The
//! release is built with musl; a build with glibc makes some calls under other names.
//!
//! `spare:` is what no run that was watched made (`jail_firecracker`, with a real one); no guest ran
//! in any of them, so what only a guest brings about is among these.

/// Calls that do not exist for it: tried, and done without.
pub const ABSENT: &[(libc::c_long, &str)] = &[(
    libc::SYS_clone3,
    "glibc's first try; its flags are in memory, where no filter sees them; `clone` serves",
)];

/// Calls that are allowed whatever their arguments.
pub const ALLOWED: &[(libc::c_long, &str)] = &[
    // Memory.
    (libc::SYS_brk, "malloc"),
    (libc::SYS_mmap, "guest RAM, a template's memory"),
    (
        libc::SYS_munmap,
        "the kernel's and the initramfs's files, given back",
    ),
    (libc::SYS_mprotect, "guard pages, relocations"),
    (libc::SYS_mremap, "spare: realloc of large blocks"),
    (libc::SYS_madvise, "memory that a child must not see"),
    (
        libc::SYS_msync,
        "spare: snapshots of files that are mapped shared",
    ),
    (libc::SYS_mincore, "spare: differential snapshots"),
    (libc::SYS_memfd_create, "rings of descriptors (iov_deque)"),
    // Files that are in the root.
    (libc::SYS_read, "event descriptors, files, the API"),
    (libc::SYS_write, "event descriptors, files, the tap"),
    (libc::SYS_readv, "spare: packets from the tap"),
    (libc::SYS_writev, "spare: packets to the tap, vsock"),
    (libc::SYS_open, "spare: openat, in musl"),
    (
        libc::SYS_openat,
        "what the API names (Landlock says what there is)",
    ),
    (libc::SYS_close, "what was opened"),
    (libc::SYS_lseek, "sizes, and where a block is"),
    (libc::SYS_stat, "spare: statx, in musl"),
    (libc::SYS_fstat, "spare: statx, in musl"),
    (
        libc::SYS_newfstatat,
        "whether there is a generation counter; statx, in glibc",
    ),
    (libc::SYS_statx, "sizes and kinds of files"),
    (
        libc::SYS_readlink,
        "its own path, in a static build with glibc",
    ),
    (
        libc::SYS_ftruncate,
        "the size of a snapshot's memory, of rings",
    ),
    (libc::SYS_fsync, "snapshots, and the guest's flush"),
    (libc::SYS_fcntl, "duplicates, O_NONBLOCK, seals of rings"),
    (libc::SYS_dup, "duplicates for threads"),
    (libc::SYS_dup2, "makes room for descriptors at the start"),
    // Waiting.
    (
        libc::SYS_epoll_create1,
        "the loops of the API and of the devices",
    ),
    (libc::SYS_epoll_ctl, "the same"),
    (libc::SYS_epoll_wait, "the same, in glibc"),
    (libc::SYS_epoll_pwait, "spare: the same, in musl"),
    (libc::SYS_poll, "whether the standard streams are open"),
    (libc::SYS_eventfd2, "interrupts, requests of threads"),
    (libc::SYS_timerfd_create, "rate limiters"),
    (libc::SYS_timerfd_settime, "the same"),
    (
        libc::SYS_clock_gettime,
        "spare: where the vDSO does not serve",
    ),
    (libc::SYS_futex, "locks"),
    (libc::SYS_sched_yield, "spare: spin loops under contention"),
    (
        libc::SYS_restart_syscall,
        "spare: a wait interrupted by a stop",
    ),
    // Threads and signals of its own.
    (libc::SYS_set_robust_list, "threads, in glibc"),
    (libc::SYS_set_tid_address, "threads"),
    (libc::SYS_rseq, "threads, in glibc"),
    (
        libc::SYS_arch_prctl,
        "thread-local storage, the guest's share of AMX",
    ),
    (libc::SYS_sched_getaffinity, "thread stacks, in glibc"),
    (libc::SYS_getpid, "kicks of virtual CPUs, in glibc"),
    (libc::SYS_gettid, "the same"),
    (libc::SYS_tgkill, "the same (Landlock keeps it inside)"),
    (libc::SYS_tkill, "spare: the same, in musl"),
    (libc::SYS_rt_sigaction, "handlers"),
    (libc::SYS_rt_sigprocmask, "handlers"),
    (libc::SYS_rt_sigreturn, "handlers"),
    (libc::SYS_sigaltstack, "stacks of handlers"),
    (libc::SYS_exit, "spare: a thread ends"),
    (libc::SYS_exit_group, "spare: the process ends"),
    (
        libc::SYS_prlimit64,
        "stack size, most descriptors; limits only go down",
    ),
    (libc::SYS_getrandom, "hash seeds, virtio-rng"),
    // The API, vsock: only sockets of the same host, and only what lies in the root.
    (libc::SYS_bind, "the API's socket and vsock's, in /vmm"),
    (libc::SYS_listen, "the same"),
    (libc::SYS_accept4, "vmctl, once"),
    (
        libc::SYS_connect,
        "spare: the agent's connection, made by the guest",
    ),
    (libc::SYS_recvfrom, "spare: vsock"),
    (libc::SYS_recvmsg, "the API"),
    (libc::SYS_sendto, "the API, vsock"),
    (libc::SYS_sendmsg, "spare: vsock"),
];

/// `ioctl` requests; those of /dev/kvm go by their type.
pub const IOCTLS: &[(u64, &str)] = &[
    (0x5401, "TCGETS: is stdin a terminal"),
    (0x5402, "spare: TCSETS: the terminal as it was, at the end"),
    (0x5413, "spare: TIOCGWINSZ: the same"),
    (0x5421, "FIONBIO: the API, vsock"),
    (0x4004_54ca, "TUNSETIFF: the tap that was made for it"),
    (
        0x4004_54d0,
        "spare: TUNSETOFFLOAD: once a guest has its driver",
    ),
    (0x4004_54d8, "TUNSETVNETHDRSZ"),
];

/// `prctl` options.
pub const PRCTLS: &[libc::c_int] = &[libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS];
