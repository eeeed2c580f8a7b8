//! Two copies of one memory draw alike until each is told that it is one.
//!
//! In processes of its own, forked before anything here has drawn: what AWS-LC looks for is looked for
//! once in a process. A fork is a copy of its memory as a snapshot's restore is, but for AWS-LC's
//! own notice of forks, which is taken away from it.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use seal::random::{self, Generation};
use std::fs::{File, read_to_string, write};
use std::io::{Read as _, Write as _};
use std::path::Path;

/// `madvise(2)`: undoes `MADV_WIPEONFORK`, by which AWS-LC notices a fork.
const MADV_KEEPONFORK: libc::c_int = 19;

#[test]
fn i16_a_copy_of_memory_draws_its_own_bytes_once_it_is_told() {
    in_child(|| {
        dev_of_its_own();
        let generation = Generation::of_process().unwrap();
        assert!(!Path::new("/dev/sysgenid").exists(), "others would find it");
        forks_go_unnoticed();
        let copy = || in_child(|| random::bytes::<32>().to_vec());
        assert_eq!(copy(), copy(), "no copies: this test shows nothing");
        let told = || {
            in_child(|| {
                generation.next();
                random::bytes::<32>().to_vec()
            })
        };
        let (one, other) = (told(), told());
        assert_ne!(one, other);
        assert_ne!(one, copy(), "told, it goes on alike");
        vec![]
    });
}

#[test]
fn a_process_that_has_drawn_has_no_generation() {
    in_child(|| {
        dev_of_its_own();
        let _drawn = random::bytes::<1>();
        Generation::of_process().unwrap_err();
        assert!(!Path::new("/dev/sysgenid").exists());
        vec![]
    });
}

/// What `f` gives in a copy of this process.
fn in_child(f: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let (read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child runs `f` in the one thread that it has, and ends without returning.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        std::panic::set_hook(Box::new(|why| {
            // Past the test harness, which is the parent's.
            let _ = writeln!(std::io::stderr(), "{why}");
            std::process::abort();
        }));
        File::from(write).write_all(&f()).unwrap();
        // SAFETY: ends the process; what the parent would do at its end is the parent's.
        unsafe { libc::_exit(0) };
    }
    drop(write);
    let mut given = vec![];
    File::from(read).read_to_end(&mut given).unwrap();
    let mut status = 0;
    // SAFETY: waits for the child made above; writes one int.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0, "the child failed");
    given
}

/// A `/dev` with nothing in it, in namespaces of this process's own.
fn dev_of_its_own() {
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    // SAFETY: two numbers; this process has one thread.
    let done = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) };
    assert_eq!(done, 0, "needs user namespaces");
    write("/proc/self/setgroups", "deny").unwrap();
    write("/proc/self/uid_map", format!("0 {} 1", uid.as_raw())).unwrap();
    write("/proc/self/gid_map", format!("0 {} 1", gid.as_raw())).unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
    mount("tmpfs", "/dev", "tmpfs", MountFlags::empty(), c"").unwrap();
}

/// Keeps what AWS-LC would find wiped in a fork.
fn forks_go_unnoticed() {
    let (mut range, mut kept) = (String::new(), 0);
    for line in read_to_string("/proc/self/smaps").unwrap().lines() {
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            // Each mapping's first line begins with its range.
            let first = line.split(' ').next().unwrap();
            if first.contains('-') {
                range = first.to_owned();
            }
            continue;
        };
        if !flags.split(' ').any(|flag| flag == "wf") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
        let address = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: a mapping of this process's, whose content stays. The C library's own, of which
        // the kernel refuses it, are not meant.
        let done = unsafe { libc::madvise(address, end - start, MADV_KEEPONFORK) };
        kept += usize::from(done == 0);
    }
    assert!(kept > 0, "AWS-LC notices forks in another way now");
}
