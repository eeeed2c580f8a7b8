//! A hostile VMM: stands in the jail in the VMM's place and tries, on request, one system call or
//! one named escape. Requests and answers are lines on descriptor 3; no answer means that it died.
//!
//! It carries no harm: signals are SIGURG (ignored unless somebody asks for it), magic numbers of
//! `reboot` and its like are wrong, bombs stop at a bound of their own.
#![allow(unsafe_code, clippy::unwrap_used, missing_docs)]

mod saved;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

type Args = HashMap<String, String>;
type Escape = (&'static str, fn(&Args) -> i64);

/// Bytes between two guards, for calls that write further than they should.
const BUFFER: usize = 64 << 10;
/// Where the memory bomb ends by itself.
const MEMORY_END: i64 = 512 << 20;

fn main() {
    let channel = channel();
    let buffer = buffer();
    for line in BufReader::new(&channel).lines() {
        let Ok(line) = line else { return };
        let mut words = line.split(' ');
        let answer = match words.next() {
            Some("sys") => {
                let nr: i64 = words.next().unwrap().parse().unwrap();
                let class: u8 = words.next().unwrap().parse().unwrap();
                sys(nr, arguments(class, buffer)).to_string()
            }
            Some("list") => saved::all().map(|e| e.0).collect::<Vec<_>>().join("|"),
            Some("try") => {
                let number: usize = words.next().unwrap().parse().unwrap();
                let args = words
                    .filter_map(|w| w.split_once('='))
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .collect();
                (saved::all().nth(number).unwrap().1)(&args).to_string()
            }
            Some("descriptors") => descriptors(),
            Some("self") => about(),
            _ => "?".into(),
        };
        if (&channel)
            .write_all(format!("{answer}\n").as_bytes())
            .is_err()
        {
            return;
        }
    }
}

/// Descriptor 3; in the place of a VMM that is to listen, whoever connects.
fn channel() -> File {
    match std::env::args().skip_while(|a| a != "--api-sock").nth(1) {
        // SAFETY: descriptor 3 is this program's channel, owned by nobody else.
        None => unsafe { File::from_raw_fd(3) },
        Some(path) => {
            let listener = UnixListener::bind(path).unwrap();
            let (channel, _) = listener.accept().unwrap();
            let _ = listener.into_raw_fd();
            OwnedFd::from(channel).into()
        }
    }
}

/// A call's result, or minus its error number.
fn sys(nr: i64, a: [i64; 6]) -> i64 {
    // SAFETY: trying calls is what this program is for; it has nothing to lose.
    let r = unsafe { libc::syscall(nr, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if r == -1 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        r
    }
}

fn call<const N: usize>(nr: libc::c_long, args: [i64; N]) -> i64 {
    let mut all = [0; 6];
    all[..N].copy_from_slice(&args);
    sys(nr, all)
}

fn arguments(class: u8, buffer: i64) -> [i64; 6] {
    match class {
        0 => [0; 6],
        1 => [-1; 6],
        2 => [buffer; 6],
        _ => [1, buffer, 8, 0, 0, 0],
    }
}

fn buffer() -> i64 {
    let none = i64::from(libc::PROT_NONE);
    let flags = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let base = call(libc::SYS_mmap, [0, 3 * BUFFER as i64, none, flags, -1, 0]);
    let middle = base + BUFFER as i64;
    let rw = i64::from(libc::PROT_READ | libc::PROT_WRITE);
    call(libc::SYS_mprotect, [middle, BUFFER as i64, rw]);
    middle
}

/// A NUL-terminated string that stays.
fn c(text: &str) -> i64 {
    std::ffi::CString::new(text).unwrap().into_raw() as i64
}

fn at<T>(value: T) -> i64 {
    Box::into_raw(Box::new(value)) as i64
}

fn open(path: &str, flags: i32) -> i64 {
    let dir = i64::from(libc::AT_FDCWD);
    call(libc::SYS_openat, [dir, c(path), flags.into(), 0o600])
}

fn number(args: &Args, key: &str) -> i64 {
    args[key].parse().unwrap()
}

fn unix_address(text: &str) -> (i64, i64) {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    let (from, text) = match text.strip_prefix('@') {
        Some(name) => (1, name),
        None => (0, text),
    };
    for (to, byte) in address.sun_path[from..].iter_mut().zip(text.bytes()) {
        *to = byte.cast_signed();
    }
    let len = 2 + from + text.len() + usize::from(from == 0);
    (at(address), len as i64)
}

fn socket(family: i32, kind: i32, protocol: i32) -> i64 {
    call(
        libc::SYS_socket,
        [family.into(), kind.into(), protocol.into()],
    )
}

fn unix(nr: libc::c_long, kind: i32, address: &str) -> i64 {
    let fd = socket(libc::AF_UNIX, kind, 0);
    if fd < 0 {
        return fd;
    }
    let (address, len) = unix_address(address);
    if nr == libc::SYS_sendto {
        call(nr, [fd, c("x"), 1, 0, address, len])
    } else {
        call(nr, [fd, address, len])
    }
}

fn tcp(nr: libc::c_long, args: &Args) -> i64 {
    let fd = socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    if fd < 0 {
        return fd;
    }
    let mut address = vec![2u8, 0];
    address.extend(number(args, "port").to_be_bytes()[6..].iter());
    address.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    let address = address.leak().as_ptr() as i64;
    call(nr, [fd, address, 16])
}

const QUIET: i64 = libc::SIGURG as i64;

const ESCAPES: &[Escape] = &[
    // Files that are not its own.
    ("open /proc/1/root", |_| open("/proc/1/root", 0)),
    ("open /proc/self/mem", |_| {
        open("/proc/self/mem", libc::O_RDWR)
    }),
    ("open /proc", |_| open("/proc", 0)),
    ("open /sys", |_| open("/sys", 0)),
    ("open /etc/passwd", |_| open("/etc/passwd", 0)),
    ("open ../../etc/passwd", |_| {
        open("../../../../etc/passwd", 0)
    }),
    ("open /dev/mem", |_| open("/dev/mem", libc::O_RDWR)),
    ("open /dev/kvm", |_| open("/dev/kvm", libc::O_RDWR)),
    ("open /dev/fuse", |_| open("/dev/fuse", libc::O_RDWR)),
    ("open /dev/net/tun", |_| open("/dev/net/tun", libc::O_RDWR)),
    ("open a host's file", |a| open(&a["file"], libc::O_RDWR)),
    ("list the root", |_| open("/", libc::O_DIRECTORY)),
    ("reopen /dev/fd/2", |_| open("/dev/fd/2", libc::O_RDWR)),
    ("reopen /proc/self/fd/3", |_| {
        open("/proc/self/fd/3", libc::O_RDWR)
    }),
    ("open_by_handle_at", |_| {
        call(libc::SYS_open_by_handle_at, [3, at([0u64; 16]), 0])
    }),
    ("name_to_handle_at", |_| {
        call(
            libc::SYS_name_to_handle_at,
            [-100, c("/"), at([0u64; 16]), at(0u64), 0],
        )
    }),
    // Writing what it may read.
    ("write the template", |_| {
        open("/template/memory", libc::O_RDWR)
    }),
    ("map the template shared", |_| {
        map_shared("/template/memory")
    }),
    ("write the image", |_| {
        open("/image/base.erofs", libc::O_WRONLY)
    }),
    ("truncate the image", |_| {
        call(libc::SYS_truncate, [c("/image/base.erofs"), 0])
    }),
    ("ftruncate the image", |_| {
        let fd = open("/image/base.erofs", 0);
        if fd < 0 {
            fd
        } else {
            call(libc::SYS_ftruncate, [fd, 0])
        }
    }),
    ("fallocate the image", |_| {
        let fd = open("/image/base.erofs", 0);
        if fd < 0 {
            fd
        } else {
            call(libc::SYS_fallocate, [fd, 0, 0, 1 << 20])
        }
    }),
    ("map the image shared", |_| map_shared("/image/base.erofs")),
    ("write the VMM's program", |_| {
        open("/usr/bin/qemu-system-x86_64", libc::O_WRONLY)
    }),
    ("write the VMM's library", |_| {
        open("/usr/lib/x86_64-linux-gnu/libm.so.6", libc::O_WRONLY)
    }),
    ("write the state", |_| {
        call(libc::SYS_pwrite64, [6, c("owned"), 5, 0])
    }),
    ("clone into the state", |_| {
        call(libc::SYS_ioctl, [6, 0x4004_9409, 6])
    }),
    ("make /x", |_| open("/x", libc::O_CREAT | libc::O_WRONLY)),
    ("make /dev/x", |_| {
        open("/dev/x", libc::O_CREAT | libc::O_WRONLY)
    }),
    ("mkdir", |_| call(libc::SYS_mkdir, [c("/d"), 0o755])),
    ("link", |_| {
        call(libc::SYS_link, [c("/image/base.erofs"), c("/l")])
    }),
    ("symlink", |_| {
        call(libc::SYS_symlink, [c("/etc/passwd"), c("/s")])
    }),
    ("rename", |_| call(libc::SYS_rename, [c("/image"), c("/i")])),
    ("unlink", |_| {
        call(libc::SYS_unlink, [c("/image/base.erofs")])
    }),
    ("mknod /mem", |_| {
        call(
            libc::SYS_mknod,
            [c("/mem"), i64::from(libc::S_IFCHR | 0o666), 0x101],
        )
    }),
    ("mknod in /dev", |_| {
        call(
            libc::SYS_mknod,
            [c("/dev/mem"), i64::from(libc::S_IFCHR | 0o666), 0x101],
        )
    }),
    ("chmod", |_| {
        call(libc::SYS_chmod, [c("/image/base.erofs"), 0o4777])
    }),
    ("chown", |_| {
        call(libc::SYS_chown, [c("/image/base.erofs"), 0, 0])
    }),
    ("setxattr", |_| {
        call(
            libc::SYS_setxattr,
            [c("/image/base.erofs"), c("user.x"), c("x"), 1, 0],
        )
    }),
    // Other processes.
    ("ptrace a victim", |a| {
        call(libc::SYS_ptrace, [0x4206, number(a, "victim"), 0, 0]) // PTRACE_SEIZE: does not stop it
    }),
    ("process_vm_readv", |a| vm(libc::SYS_process_vm_readv, a)),
    ("process_vm_writev", |a| vm(libc::SYS_process_vm_writev, a)),
    ("kill a victim", |a| {
        call(libc::SYS_kill, [number(a, "victim"), QUIET])
    }),
    ("kill everybody", |_| call(libc::SYS_kill, [-1, QUIET])),
    ("kill the own group", |_| call(libc::SYS_kill, [0, QUIET])),
    ("tgkill a victim", |a| {
        call(
            libc::SYS_tgkill,
            [number(a, "victim"), number(a, "victim"), QUIET],
        )
    }),
    ("tgkill another jail", |a| {
        call(
            libc::SYS_tgkill,
            [number(a, "peer"), number(a, "peer"), QUIET],
        )
    }),
    ("tkill a victim", |a| {
        call(libc::SYS_tkill, [number(a, "victim"), QUIET])
    }),
    ("sigqueue a victim", |a| {
        let info = at([QUIET, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        call(
            libc::SYS_rt_sigqueueinfo,
            [number(a, "victim"), QUIET, info],
        )
    }),
    ("F_SETOWN a victim", |a| {
        // The channel's signals, then one of them.
        let own = call(
            libc::SYS_fcntl,
            [4, libc::F_SETOWN.into(), number(a, "victim")],
        );
        if own < 0 {
            own
        } else {
            call(
                libc::SYS_fcntl,
                [4, libc::F_SETFL.into(), libc::O_ASYNC.into()],
            )
        }
    }),
    ("pidfd_open a victim", |a| {
        call(libc::SYS_pidfd_open, [number(a, "victim"), 0])
    }),
    ("pidfd_getfd", |_| call(libc::SYS_pidfd_getfd, [3, 0, 0])),
    ("setpriority of a victim", |a| {
        call(libc::SYS_setpriority, [0, number(a, "victim"), 10])
    }),
    ("setpriority of its own", |_| {
        call(libc::SYS_setpriority, [0, 0, -10])
    }),
    ("real-time scheduling", |_| {
        call(
            libc::SYS_sched_setscheduler,
            [0, libc::SCHED_FIFO.into(), at(1i32)],
        )
    }),
    ("ioprio_set real-time", |_| {
        call(libc::SYS_ioprio_set, [1, 0, 1 << 13])
    }),
    ("affinity of a victim", |a| {
        call(
            libc::SYS_sched_setaffinity,
            [number(a, "victim"), 8, at(1u64)],
        )
    }),
    ("limits of a victim", |a| {
        call(
            libc::SYS_prlimit64,
            [
                number(a, "victim"),
                libc::RLIMIT_CORE as i64,
                at([0u64, 0]),
                0,
            ],
        )
    }),
    ("limits of another jail", |a| {
        call(
            libc::SYS_prlimit64,
            [
                number(a, "peer"),
                libc::RLIMIT_NOFILE as i64,
                at([9u64, 9]),
                0,
            ],
        )
    }),
    ("kcmp", |a| {
        call(libc::SYS_kcmp, [1, number(a, "victim"), 0, 0, 0])
    }),
    ("migrate_pages", |a| {
        call(
            libc::SYS_migrate_pages,
            [number(a, "victim"), 8, at(1u64), at(1u64)],
        )
    }),
    // Namespaces, privileges.
    ("mount", |_| {
        call(libc::SYS_mount, [c("none"), c("/dev"), c("tmpfs"), 0, 0])
    }),
    ("umount", |_| {
        call(libc::SYS_umount2, [c("/dev/null"), libc::MNT_DETACH.into()])
    }),
    ("pivot_root", |_| {
        call(libc::SYS_pivot_root, [c("/"), c("/")])
    }),
    ("chroot", |_| call(libc::SYS_chroot, [c("/usr")])),
    ("fsopen", |_| call(libc::SYS_fsopen, [c("proc"), 0])),
    ("open_tree", |_| {
        call(libc::SYS_open_tree, [-100, c("/"), 1])
    }),
    ("unshare a user namespace", |_| {
        call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into()])
    }),
    ("unshare a network", |_| {
        call(libc::SYS_unshare, [libc::CLONE_NEWNET.into()])
    }),
    ("setns", |_| call(libc::SYS_setns, [4, 0])),
    ("clone a user namespace", |_| {
        child(libc::CLONE_NEWUSER | libc::SIGCHLD)
    }),
    ("clone a process", |_| child(libc::SIGCHLD)),
    ("fork", |_| fork(libc::SYS_fork)),
    ("execve", |_| {
        call(libc::SYS_execve, [c("/usr/bin/nothing"), 0, 0])
    }),
    ("execveat a descriptor", |_| {
        call(
            libc::SYS_execveat,
            [4, c(""), 0, 0, libc::AT_EMPTY_PATH.into()],
        )
    }),
    ("execveat the launcher's number", |_| {
        call(
            libc::SYS_execveat,
            [1023, c(""), 0, 0, libc::AT_EMPTY_PATH.into()],
        )
    }),
    ("setuid 0", |_| call(libc::SYS_setuid, [0])),
    ("setgid 0", |_| call(libc::SYS_setgid, [0])),
    ("setgroups", |_| call(libc::SYS_setgroups, [1, at(0u32)])),
    ("capset", |_| {
        call(
            libc::SYS_capset,
            [
                at([0x2008_0522u32, 0]),
                at([1u32 << 21, 1 << 21, 0, 0, 0, 0]),
            ],
        )
    }),
    ("dumpable on", |_| {
        call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1])
    }),
    ("no_new_privs off", |_| {
        call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS.into(), 0])
    }),
    ("no_new_privs is not set", |_| {
        let set = call(libc::SYS_prctl, [libc::PR_GET_NO_NEW_PRIVS.into(), 0]);
        if set == 0 { 0 } else { -i64::from(libc::EPERM) }
    }),
    ("securebits", |_| {
        call(libc::SYS_prctl, [libc::PR_SET_SECUREBITS.into(), 1])
    }),
    ("ambient capability", |_| {
        call(libc::SYS_prctl, [libc::PR_CAP_AMBIENT.into(), 2, 21])
    }),
    ("personality", |_| {
        call(libc::SYS_personality, [0x0040_0000])
    }),
    ("modify_ldt", |_| {
        call(libc::SYS_modify_ldt, [0, at([0u64; 8]), 64])
    }),
    ("iopl", |_| call(libc::SYS_iopl, [3])),
    ("add_key", |_| {
        call(
            libc::SYS_add_key,
            [c("user"), c("casemate-hostile"), c("x"), 1, -2],
        )
    }),
    ("keyctl", |_| call(libc::SYS_keyctl, [0, -4, 0])),
    ("kexec_load", |_| call(libc::SYS_kexec_load, [0, 99, 0, 0])),
    ("init_module", |_| {
        call(libc::SYS_init_module, [c("x"), 1, c("")])
    }),
    ("finit_module", |_| {
        call(libc::SYS_finit_module, [6, c(""), 0])
    }),
    ("reboot", |_| call(libc::SYS_reboot, [0, 0, 0])),
    ("swapon", |_| call(libc::SYS_swapon, [c("/nothing"), 0])),
    ("sethostname", |_| {
        call(libc::SYS_sethostname, [c("owned"), 5])
    }),
    ("syslog", |_| {
        call(libc::SYS_syslog, [3, at([0u64; 64]), 512])
    }),
    ("settimeofday", |_| call(libc::SYS_settimeofday, [0, 0])),
    ("acct", |_| call(libc::SYS_acct, [c("/nothing")])),
    ("userfaultfd", |_| call(libc::SYS_userfaultfd, [0])),
    ("io_uring_setup", |_| {
        call(libc::SYS_io_uring_setup, [8, at([0u64; 32])])
    }),
    ("bpf", |_| {
        call(
            libc::SYS_bpf,
            [
                0,
                at([2u32, 4, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                64,
            ],
        )
    }),
    ("perf_event_open", |_| {
        let mut attributes = [0u64; 16];
        attributes[0] = 0x70_0000_0001;
        call(libc::SYS_perf_event_open, [at(attributes), 0, -1, -1, 0])
    }),
    ("memfd_create", |_| {
        call(libc::SYS_memfd_create, [c("x"), 0])
    }),
    ("seccomp", |_| {
        call(libc::SYS_seccomp, [2, 0, at(0x8000_0000u32)])
    }),
    ("SysV shared memory", |_| {
        call(libc::SYS_shmget, [0x0ca5_e3a7, 4096, 0o1666])
    }),
    // Sockets.
    ("socket of IPv4", |_| {
        socket(libc::AF_INET, libc::SOCK_STREAM, 0)
    }),
    ("socket of IPv6", |_| {
        socket(libc::AF_INET6, libc::SOCK_STREAM, 0)
    }),
    ("raw socket", |_| socket(libc::AF_INET, libc::SOCK_RAW, 1)),
    ("packet socket", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0x300)
    }),
    ("netlink socket", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)
    }),
    ("vsock", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)),
    ("crypto socket", |_| {
        socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)
    }),
    ("TCP to the host", |a| tcp(libc::SYS_connect, a)),
    ("TCP listener", |a| tcp(libc::SYS_bind, a)),
    ("connect to a host's socket", |a| {
        unix(libc::SYS_connect, libc::SOCK_STREAM, &a["socket"])
    }),
    ("connect to an abstract socket", |a| {
        unix(libc::SYS_connect, libc::SOCK_STREAM, &a["abstract"])
    }),
    ("sendto a host's socket", |a| {
        unix(libc::SYS_sendto, libc::SOCK_DGRAM, &a["datagram"])
    }),
    ("sendto an abstract socket", |a| {
        unix(libc::SYS_sendto, libc::SOCK_DGRAM, &a["abstract_datagram"])
    }),
    ("bind an abstract name", |_| {
        unix(libc::SYS_bind, libc::SOCK_STREAM, "@casemate-hostile")
    }),
    ("TIOCSTI on stderr", |_| {
        call(libc::SYS_ioctl, [2, 0x5412, c("x")])
    }),
    ("a VMM's own memory in hugetlb", |_| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        call(libc::SYS_mmap, [0, 2 << 20, 3, flags.into(), -1, 0])
    }),
    // More than its share: the result says how far it came.
    ("raise the limit of files", |_| {
        let limit = at([1u64 << 20, 1 << 20]);
        call(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NOFILE as i64, limit, 0],
        )
    }),
    ("raise the limit of threads", |_| {
        let limit = at([1u64 << 20, 1 << 20]);
        call(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NPROC as i64, limit, 0],
        )
    }),
    ("lock memory", |_| {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED;
        call(libc::SYS_mmap, [0, 1 << 20, 3, flags.into(), -1, 0])
    }),
    ("core dump allowed", |_| {
        let limit = Box::leak(Box::new([0u64; 2]));
        call(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_CORE as i64, 0, limit.as_ptr() as i64],
        );
        // SAFETY: the kernel wrote it; the box is alive.
        if unsafe { std::ptr::read_volatile(limit) } == [0, 0] {
            -i64::from(libc::EPERM)
        } else {
            0
        }
    }),
    ("file above its size", |a| {
        // SIGXFSZ kills where the limit holds.
        let fd = open("/template/memory", libc::O_RDWR);
        if fd < 0 {
            return fd;
        }
        call(libc::SYS_pwrite64, [fd, c("x"), 1, number(a, "large")])
    }),
    ("descriptor bomb", |_| {
        let mut n = 0;
        while n < 4096 && call(libc::SYS_dup, [1]) >= 0 {
            n += 1;
        }
        n
    }),
    ("thread bomb", |_| {
        let mut n = 0;
        while n < 600 {
            let thread = std::thread::Builder::new().stack_size(16 << 10);
            if thread.spawn(std::thread::park).is_err() {
                break;
            }
            n += 1;
        }
        n
    }),
    ("memory bomb", |_| {
        let (step, mut all) = (4 << 20, 0);
        while all < MEMORY_END {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
            let got = call(libc::SYS_mmap, [0, step, 3, flags.into(), -1, 0]);
            if got < 0 {
                return got;
            }
            all += step;
        }
        all
    }),
    ("flood of stderr", |_| {
        call(
            libc::SYS_fcntl,
            [2, libc::F_SETFL.into(), libc::O_NONBLOCK.into()],
        );
        let (text, mut all) = (c(&"x".repeat(4096)), 0);
        while all < 8 << 20 {
            let n = call(libc::SYS_write, [2, text, 4096]);
            if n <= 0 {
                break;
            }
            all += n;
        }
        all
    }),
    // What a VMM has that takes names.
    ("a tap of its own", |_| tun("tap1", TUNSETIFF)),
    ("keep the tap for ever", |_| tun("tap0", TUNSETPERSIST)),
    ("a file beside the sockets", |_| {
        open("/vmm/file", libc::O_RDWR | libc::O_CREAT)
    }),
    ("a link beside the sockets", |_| {
        call(libc::SYS_symlink, [c("/disk"), c("/vmm/link")])
    }),
    ("another API socket", |_| {
        let gone = call(libc::SYS_unlink, [c("/vmm/api.sock")]);
        if gone < 0 {
            gone
        } else {
            unix(libc::SYS_bind, libc::SOCK_STREAM, "/vmm/api.sock")
        }
    }),
    ("the disk before its time", |_| {
        open("/held/disk", libc::O_RDWR)
    }),
    ("another disk", |_| {
        call(libc::SYS_rename, [c("/disk/volume"), c("/disk/old")])
    }),
    ("truncate the disk's place", |_| {
        open("/disk/volume", libc::O_RDWR | libc::O_TRUNC)
    }),
    ("fill the disk's place", |_| {
        let fd = open("/disk/volume", libc::O_RDWR);
        if fd < 0 {
            return fd;
        }
        let page = "x".repeat(4096);
        let (text, mut all) = (c(&page), 0);
        while all < 8 << 20 {
            let n = call(libc::SYS_write, [fd, text, 4096]);
            if n <= 0 {
                break;
            }
            all += n;
        }
        all
    }),
    ("a second VM of KVM", |_| {
        let kvm = open("/dev/kvm", libc::O_RDWR);
        if kvm < 0 {
            return kvm;
        }
        call(libc::SYS_ioctl, [kvm, 0xae01, 0])
    }),
    ("a filter that another answers for", |_| {
        // One instruction: allow.
        let filter = at([6u16, 0, 0, 0x7fff]);
        let program = at([1i64, filter]);
        call(libc::SYS_seccomp, [1, 8, program])
    }),
    ("larger pipe for stderr", |_| {
        call(libc::SYS_fcntl, [2, libc::F_SETPIPE_SZ.into(), 1 << 30])
    }),
];

const TUNSETIFF: i64 = 0x4004_54ca;
const TUNSETPERSIST: i64 = 0x4004_54cb;

/// Opens the tap of that name; then asks for more of it, or for it to be made.
fn tun(name: &str, request: i64) -> i64 {
    let fd = open("/dev/net/tun", libc::O_RDWR);
    if fd < 0 {
        return fd;
    }
    let mut interface = [0u8; 40];
    interface[..name.len()].copy_from_slice(name.as_bytes());
    interface[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    let opened = call(libc::SYS_ioctl, [fd, TUNSETIFF, at(interface)]);
    if opened < 0 || request == TUNSETIFF {
        return opened;
    }
    call(libc::SYS_ioctl, [fd, request, 1])
}

fn map_shared(path: &str) -> i64 {
    let fd = open(path, 0);
    if fd < 0 {
        return fd;
    }
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    call(
        libc::SYS_mmap,
        [0, 4096, rw.into(), libc::MAP_SHARED.into(), fd, 0],
    )
}

fn vm(nr: libc::c_long, args: &Args) -> i64 {
    // Address and length are valid only in the victim; a refusal comes before either is looked at.
    let local = at([at([0u64; 2]), 8]);
    let remote = at([number(args, "address"), 8]);
    call(nr, [number(args, "victim"), local, 1, remote, 1, 0])
}

fn child(flags: i32) -> i64 {
    let pid = call(libc::SYS_clone, [flags.into(), 0, 0, 0, 0]);
    if pid == 0 {
        call(libc::SYS_exit_group, [0]);
    }
    pid
}

fn fork(nr: libc::c_long) -> i64 {
    let pid = call(nr, []);
    if pid == 0 {
        call(libc::SYS_exit_group, [0]);
    }
    pid
}

/// Every open descriptor with its kind: `0:character 3:socket …`.
fn descriptors() -> String {
    let mut all = Vec::new();
    for fd in 0..4096 {
        // SAFETY: all-zero is a valid `stat` to be filled.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: `stat` is there to be written.
        if unsafe { libc::fstat(fd, &raw mut stat) } != 0 {
            continue;
        }
        let kind = match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => "directory",
            libc::S_IFSOCK => "socket",
            libc::S_IFIFO => "pipe",
            libc::S_IFREG => "file",
            libc::S_IFCHR => "character",
            _ => "other",
        };
        all.push(format!("{fd}:{kind}"));
    }
    all.join(" ")
}

fn about() -> String {
    // SAFETY: these take and return numbers; `uname` fills what it is given.
    let (uid, gid, node) = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        let node = std::ffi::CStr::from_ptr(name.nodename.as_ptr());
        (
            libc::getuid(),
            libc::getgid(),
            node.to_string_lossy().into_owned(),
        )
    };
    let (env, pid) = (std::env::vars_os().count(), std::process::id());
    format!("uid={uid} gid={gid} pid={pid} node={node} env={env}")
}
