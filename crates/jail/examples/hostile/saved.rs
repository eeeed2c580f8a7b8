//! What a woken VMM may try with the memory that it was woken from: a file that it can read by one
//! descriptor of its own and open once more, and that it must not change, keep or pass on.

use super::{Args, Escape, at, c, call, open, sys};

const MEMORY: &str = "/saved/memory";
/// Where the pages lie, bytes.
const PAGES: i64 = 17 << 20;
/// The descriptor that it comes up with.
const STATE: i64 = 6;
const HERE: i64 = libc::AT_FDCWD as i64;
const RW: i64 = (libc::PROT_READ | libc::PROT_WRITE) as i64;
const PUNCH: i64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as i64;
const FUSE_DEV_IOC_CLONE: i64 = 0x8004_e500;

/// All escapes: those of any VMM, then these.
pub(crate) fn all() -> impl Iterator<Item = &'static Escape> {
    super::ESCAPES.iter().chain(ESCAPES)
}

const ESCAPES: &[Escape] = &[
    ("write the saved memory", |_| write(MEMORY, 0)),
    ("write the saved memory's pages", |_| write(MEMORY, PAGES)),
    ("append to the saved memory", |_| {
        with(libc::O_WRONLY | libc::O_APPEND, |fd| {
            call(libc::SYS_write, [fd, c("owned"), 5])
        })
    }),
    ("open the saved memory to truncate", |_| {
        open(MEMORY, libc::O_RDWR | libc::O_TRUNC)
    }),
    ("truncate the saved memory", |_| {
        call(libc::SYS_truncate, [c(MEMORY), 0])
    }),
    ("ftruncate the saved memory", |_| {
        with(libc::O_RDWR, |fd| call(libc::SYS_ftruncate, [fd, 0]))
    }),
    ("extend the saved memory", |_| {
        with(libc::O_RDWR, |fd| call(libc::SYS_ftruncate, [fd, 1 << 40]))
    }),
    ("punch into the saved memory", |_| {
        with(libc::O_RDWR, |fd| {
            call(libc::SYS_fallocate, [fd, PUNCH, 0, 1 << 20])
        })
    }),
    ("map the saved memory shared", |_| {
        with(libc::O_RDWR, map_shared)
    }),
    ("write by the saved state", |_| {
        call(libc::SYS_pwrite64, [STATE, c("owned"), 5, PAGES])
    }),
    ("write by the saved state, made so", |_| {
        let rw = libc::O_RDWR.into();
        call(libc::SYS_fcntl, [STATE, libc::F_SETFL.into(), rw]);
        call(libc::SYS_pwrite64, [STATE, c("owned"), 5, PAGES])
    }),
    ("ftruncate by the saved state", |_| {
        call(libc::SYS_ftruncate, [STATE, 0])
    }),
    ("punch by the saved state", |_| {
        call(libc::SYS_fallocate, [STATE, PUNCH, 0, 1 << 20])
    }),
    ("map the saved state shared", |_| map_shared(STATE)),
    ("its server's queue by the saved state", |_| {
        call(libc::SYS_ioctl, [STATE, FUSE_DEV_IOC_CLONE, at(STATE)])
    }),
    ("open the saved memory a third time", |_| {
        // Its state was opened for it; the second is its own.
        let second = open(MEMORY, libc::O_RDONLY);
        if second < 0 {
            // It has less than it needs: as bad.
            return 0;
        }
        call(libc::SYS_close, [second]);
        open(MEMORY, libc::O_RDONLY)
    }),
    ("link the saved memory", |_| {
        call(libc::SYS_link, [c(MEMORY), c("/link")])
    }),
    ("link by the saved state", |_| {
        let empty = libc::AT_EMPTY_PATH.into();
        call(libc::SYS_linkat, [STATE, c(""), HERE, c("/link"), empty])
    }),
    ("rename the saved memory", |_| {
        call(libc::SYS_rename, [c(MEMORY), c("/saved/old")])
    }),
    ("another file over the saved memory", |_| {
        call(libc::SYS_rename, [c("/image/base.erofs"), c(MEMORY)])
    }),
    ("unlink the saved memory", |_| {
        call(libc::SYS_unlink, [c(MEMORY)])
    }),
    ("unmount the saved memory", |_| {
        call(libc::SYS_umount2, [c(MEMORY), libc::MNT_DETACH.into()])
    }),
    ("chmod the saved memory", |_| {
        call(libc::SYS_chmod, [c(MEMORY), 0o777])
    }),
    ("setxattr of the saved memory", |_| {
        call(libc::SYS_setxattr, [c(MEMORY), c("user.x"), c("x"), 1, 0])
    }),
    ("a file beside the saved memory", |_| {
        open("/saved/other", libc::O_CREAT | libc::O_RDWR)
    }),
    ("list the saved memory's place", |_| {
        open("/saved", libc::O_DIRECTORY)
    }),
    ("another's saved memory at rest", |a| {
        open(&a["saved"], libc::O_RDONLY)
    }),
    ("another jail's saved memory", |a: &Args| {
        let path = format!("/proc/{}/root{MEMORY}", a["peer"]);
        open(&path, libc::O_RDONLY)
    }),
    ("another jail's saved memory by a way up", |_| {
        open("/saved/../../saved/memory/../other", libc::O_RDONLY)
    }),
    ("another's saved memory by its handle", |_| {
        let handle = at([8u32, 1, 2, 0, 0, 0]);
        call(libc::SYS_open_by_handle_at, [STATE, handle, 0])
    }),
];

/// What comes of an attempt on the memory, opened like that.
fn with(flags: i32, attempt: fn(i64) -> i64) -> i64 {
    let fd = open(MEMORY, flags);
    if fd < 0 { fd } else { attempt(fd) }
}

fn write(path: &str, offset: i64) -> i64 {
    let fd = open(path, libc::O_RDWR);
    if fd < 0 {
        return fd;
    }
    call(libc::SYS_pwrite64, [fd, c("owned"), 5, offset])
}

fn map_shared(fd: i64) -> i64 {
    sys(
        libc::SYS_mmap,
        [0, 4096, RW, libc::MAP_SHARED.into(), fd, PAGES],
    )
}
