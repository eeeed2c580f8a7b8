//! The launcher: a fresh process that builds one root, clones one child into new namespaces, and
//! exits; the child waits for warden's word before it becomes the program.
//!
//! ```text
//! warden ──Ask + fds──▶ launcher ─clone(CLONE_PARENT)─▶ child ─ready─▶ (pid, pidfd) to warden
//!                                                          │
//!   journal written ── go ────────────────────────────────▶│ exec
//!   warden died ── end of file ───────────────────────────▶│ exit: a half-made jail never runs
//! ```
//!
//! It is a process of its own because warden has threads: after a fork of those, little may be
//! called. Must never take a path or a command from anything but the [`Plan`] of the kind.

use crate::ask::{Ask, Kind, OpenFor, Said};
use crate::channel::{recv, send};
use crate::files::{beneath, open_beneath};
use crate::limits::{ASK_MAX_BYTES, EXE_FD, NOFILE_MAX, VMM_UID};
use crate::plan::{Entry, Namespaces, Plan, Program};
use crate::{named, seccomp};
use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use rustix::net::RecvFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::ffi::CString;
use std::io::{self, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

pub(crate) type Step<T = ()> = Result<T, String>;

/// The launcher: `--root DIR` says which installation's; everything else comes by descriptor 0,
/// once. The exit status.
#[must_use]
pub fn main(args: impl Iterator<Item = String>) -> i32 {
    let Ok(sock) = high(rustix::stdio::stdin()) else {
        return 2;
    };
    let args: Vec<String> = args.collect();
    let done = match &args[..] {
        [flag, root] if flag == "--root" => launch(&sock, Path::new(root)),
        _ => Err("usage: casemate-jail --root DIR, by casemate-warden".into()),
    };
    match done {
        Ok(()) => 0,
        Err(why) => {
            // Nobody left to tell is no reason to stay.
            let _ = send(&sock, &Said::Failed(why), &[]);
            1
        }
    }
}

fn launch(sock: &OwnedFd, root: &Path) -> Step {
    let (bytes, mut fds) = recv(sock.as_fd(), ASK_MAX_BYTES).map_err(at("receive the request"))?;
    let ask: Ask = serde_json::from_slice(&bytes).map_err(at("read the request"))?;
    ask.kind.check()?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    rustix::thread::set_thread_groups(&[]).map_err(at("drop supplementary groups"))?;
    if ask.groups > fds.len() {
        return Err("fewer descriptors than control groups".into());
    }
    for group in fds.drain(..ask.groups) {
        rustix::io::write(&group, b"0").map_err(at("join a control group"))?;
    }
    match (ask.kind, &fds[..]) {
        (Kind::OpenMount { slot, access }, [mount]) => {
            return open_mount(sock, slot, access, mount);
        }
        (Kind::GiveMount { .. }, [vmm, mount]) => {
            named::hold(vmm, mount)?;
            return ready(sock, vmm);
        }
        (Kind::Settle { slot }, [vmm]) => {
            named::settle(slot, vmm)?;
            return ready(sock, vmm);
        }
        _ => {}
    }
    let (plan, fds) = crate::plan::of(ask.kind, fds, root)?;
    let fds: Vec<OwnedFd> = fds
        .into_iter()
        .map(high)
        .collect::<io::Result<_>>()
        .map_err(at("keep the descriptors"))?;
    // Below its own needs CAP_SYS_RESOURCE, which a container may lack (`weakened`).
    let _ = write_file(
        "/proc/self/oom_score_adj".as_ref(),
        &plan.oom_score_adj.to_string(),
    );
    // The old /proc stays reachable by this descriptor after the root is gone.
    let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open /proc"))?;
    build_root(&plan, &fds, root)?;
    let (mapped_r, mapped_w) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(at("make a pipe"))?;
    let apart = plan.namespaces == Namespaces::Apart;
    let mut flags = libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    if plan.namespaces != Namespaces::Fabric {
        flags |= libc::CLONE_NEWNET;
    }
    if apart {
        flags |= libc::CLONE_NEWUSER | libc::CLONE_NEWPID;
    }
    match clone_sibling(flags).map_err(at("clone"))? {
        None => {
            drop(mapped_w);
            drop(proc);
            let why = match child(sock, &plan, fds, &mapped_r) {
                Ok(never) => match never {},
                Err(why) => why,
            };
            let _ = send(sock, &Said::Failed(why), &[]);
            // SAFETY: _exit takes a number and does not return.
            unsafe { libc::_exit(1) }
        }
        Some((pid, pidfd)) => {
            if apart {
                map_ids(&proc, pid, plan.id)?;
            }
            rustix::io::write(&mapped_w, b"m").map_err(at("release the child"))?;
            send(sock, &Said::Ready { pid }, &[pidfd.as_fd()]).map_err(at("report"))
        }
    }
}

/// The child's way from clone to exec.
fn child(
    sock: &OwnedFd,
    plan: &Plan,
    fds: Vec<OwnedFd>,
    mapped: &OwnedFd,
) -> Step<std::convert::Infallible> {
    let mut byte = [0u8; 1];
    let n = rustix::io::read(mapped, &mut byte).map_err(at("wait for the id map"))?;
    if n != 1 {
        return Err("the launcher died".into());
    }
    let _ = rustix::system::sethostname(b"vm");
    if let Some(named) = &plan.named {
        named::tap_make(named, plan.id)?;
    }
    drop_privileges(plan.id, plan.capabilities)?;
    let exe = match &plan.program {
        // In the root, which is where this process stands.
        Program::Path(p) => beneath(CWD, p.trim_start_matches('/'), OFlags::PATH, 0)
            .map_err(at("open the program"))?,
        Program::Fd(i) => {
            rustix::io::fcntl_dupfd_cloexec(pick(&fds, *i)?, 3).map_err(at("keep the program"))?
        }
    };
    dup_to(exe.as_fd(), EXE_FD)?;
    rustix::io::fcntl_setfd(borrow(EXE_FD), rustix::io::FdFlags::CLOEXEC)
        .map_err(at("close the program on exec"))?;
    let null = beneath(CWD, "dev/null", OFlags::RDWR, 0).map_err(at("open /dev/null"))?;
    let stdin = plan.stdin.map_or(Ok(&null), |i| pick(&fds, i))?;
    dup_to(stdin.as_fd(), 0)?;
    dup_to(null.as_fd(), 1)?;
    if let Some(i) = plan.stderr {
        dup_to(pick(&fds, i)?.as_fd(), 2)?;
    }
    let mut next: RawFd = 3;
    for i in &plan.pass {
        dup_to(pick(&fds, *i)?.as_fd(), next)?;
        next += 1;
    }
    let sock_fd = sock.as_raw_fd();
    close_all(next, sock_fd - 1)?;
    close_all(sock_fd + 1, EXE_FD - 1)?;
    close_all(EXE_FD + 1, RawFd::MAX)?;
    // All of these were closed above by number, so they must not be closed again.
    for fd in fds.into_iter().chain([exe, null]) {
        let _ = fd.into_raw_fd();
    }

    let agent = plan.named.as_ref().map(|n| UnixListener::bind(&n.agent));
    let agent = agent.transpose().map_err(at("listen for the agent"))?;

    // Warden writes its journal now; its death means that nothing runs.
    let mut go = [0u8; 1];
    match rustix::net::recv(sock, go.as_mut_slice(), RecvFlags::empty()) {
        Ok((1, _)) => {}
        // SAFETY: _exit takes a number and does not return.
        _ => unsafe { libc::_exit(1) },
    }

    for (what, max) in [
        (Resource::Core, 0),
        (Resource::Nproc, plan.nproc),
        (Resource::Fsize, plan.fsize_bytes),
        (Resource::Memlock, plan.memlock_bytes),
        (Resource::Nofile, NOFILE_MAX),
    ] {
        // A limit that is lower already stays.
        let max = rustix::process::getrlimit(what)
            .maximum
            .map_or(max, |now| now.min(max));
        let limit = Rlimit {
            current: Some(max),
            maximum: Some(max),
        };
        rustix::process::setrlimit(what, limit).map_err(at("set a limit"))?;
    }
    let argv: Vec<CString> = plan
        .argv
        .iter()
        .map(|a| CString::new(a.as_str()).map_err(|_| "a NUL in an argument".to_owned()))
        .collect::<Step<_>>()?;
    let mut argv: Vec<*const libc::c_char> = argv.iter().map(|a| a.as_ptr()).collect();
    argv.push(std::ptr::null());
    let env: [*const libc::c_char; 1] = [std::ptr::null()];
    if let Some(driver) = plan.confine {
        landlock(&plan.root)?;
        if let (Some(named), Some(agent)) = (&plan.named, agent) {
            // The helper's; the VMM does not get it.
            let to = borrow(3);
            rustix::io::fcntl_setfd(to, rustix::io::FdFlags::CLOEXEC)
                .map_err(at("close the channel on exec"))?;
            named::helper(named, agent, to, &[sock.as_fd(), borrow(EXE_FD)])?;
        }
        seccomp::apply(driver)?;
    }
    // SAFETY: `argv` and `env` are NUL-terminated arrays of pointers into strings that live here.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            EXE_FD,
            c"".as_ptr(),
            argv.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(format!(
        "exec {}: {}",
        plan.argv.first().map_or("?", String::as_str),
        io::Error::last_os_error()
    ))
}

/// Ids, all capabilities but `keep`, and the promise to gain none again.
fn drop_privileges(id: u32, keep: CapabilitySet) -> Step {
    let (uid, gid) = (
        rustix::process::Uid::from_raw(id),
        rustix::process::Gid::from_raw(id),
    );
    for cap in CapabilitySet::all().difference(keep).iter() {
        match rustix::thread::remove_capability_from_bounding_set(cap) {
            // A capability younger than this kernel.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(e) => return Err(format!("empty the bounding set: {e}")),
        }
    }
    rustix::thread::set_keep_capabilities(!keep.is_empty()).map_err(at("keep capabilities"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at("set the gid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at("set the uid"))?;
    rustix::thread::clear_ambient_capability_set().map_err(at("clear ambient capabilities"))?;
    let sets = CapabilitySets {
        effective: keep,
        permitted: keep,
        inheritable: keep,
    };
    rustix::thread::set_capabilities(None, sets).map_err(at("drop capabilities"))?;
    for cap in keep.iter() {
        rustix::thread::configure_capability_in_ambient_set(cap, true)
            .map_err(at("keep a capability over exec"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(at("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(at("clear dumpable"))
}

/// Makes the plan's entries the whole file system of this process.
///
/// Nothing here goes by a path that somebody else can change: what is mounted came as a descriptor,
/// and where it goes is opened beneath the new root, through no link, not even one of the plan's.
fn build_root(plan: &Plan, fds: &[OwnedFd], installation: &Path) -> Step {
    // Copies of the mounts are taken while this is still the namespace they are in.
    let mut trees = Vec::new();
    for entry in &plan.root {
        trees.push(match entry {
            Entry::Bind { fd, .. }
            | Entry::BindWrite { fd, .. }
            | Entry::BindReplace { fd, .. }
            | Entry::Device { fd, .. } => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE
                    | OpenTreeFlags::OPEN_TREE_CLOEXEC
                    | OpenTreeFlags::AT_EMPTY_PATH;
                let fd = pick(fds, *fd)?;
                Some(rustix::mount::open_tree(fd, "", flags).map_err(at("copy a mount"))?)
            }
            Entry::Sockets { .. } => {
                let id = plan.id.to_string();
                let options = [("size", "4k"), ("nr_inodes", "16"), ("mode", "0700")];
                let own = [("uid", id.as_str()), ("gid", &id)];
                Some(tmpfs(&[&options[..], &own].concat()).map_err(at("make a directory"))?)
            }
            Entry::Placeholder { at: path, bytes } => {
                Some(placeholder(path, *bytes, plan.id).map_err(at("make a placeholder"))?)
            }
            Entry::Held { at: path } => {
                Some(placeholder(path, 0, 0).map_err(at("make a placeholder"))?)
            }
            // Attached nowhere: it is moved, and this root is the one place that it is ever in.
            Entry::Mount { fd, .. } => {
                let fd = pick(fds, *fd)?.try_clone();
                Some(fd.map_err(at("keep a mount"))?)
            }
            Entry::Link { .. } => None,
        });
    }
    // SAFETY: this process has one thread; no descriptor table or memory is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .map_err(at("unshare mounts"))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(at("make mounts private"))?;
    let (name, flags) = (crate::SCRATCH, OFlags::PATH | OFlags::DIRECTORY);
    let scratch = open_beneath(installation, name, flags, 0)
        .map_err(at("open the directory for the root"))?;
    let root = tmpfs(&[("size", "64k"), ("nr_inodes", "128"), ("mode", "0755")])
        .map_err(at("make the root"))?;
    attach(&root, &scratch).map_err(at("mount the root"))?;
    rustix::process::fchdir(&root).map_err(at("enter the root"))?;
    let mask = rustix::process::umask(Mode::empty());
    for (entry, tree) in plan.root.iter().zip(&trees) {
        place(&root, entry, tree.as_ref()).map_err(|e| format!("place {entry:?}: {e}"))?;
    }
    rustix::process::umask(mask);
    attributes(&root, libc::MOUNT_ATTR_RDONLY, 0).map_err(at("make the root read-only"))?;
    rustix::process::pivot_root(".", ".").map_err(at("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(at("let the old root go"))?;
    rustix::process::chdir("/").map_err(at("enter /"))
}

/// A file system in memory, attached nowhere: nothing of it is run.
fn tmpfs(options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&fs, *key, *value)?;
    }
    rustix::mount::fsconfig_create(&fs)?;
    let tight = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(rustix::mount::fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        tight,
    )?)
}

/// A directory in memory with one file of `id`'s that looks `bytes` large and holds a page at most.
fn placeholder(path: &str, bytes: u64, id: u32) -> io::Result<OwnedFd> {
    let dir = tmpfs(&[("size", "4k"), ("nr_inodes", "4"), ("mode", "0755")])?;
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    let file = beneath(&dir, name, flags, 0o600)?;
    rustix::fs::ftruncate(&file, bytes)?;
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    Ok(dir)
}

/// Attaches a mount at what `target` is, by descriptors alone.
pub(crate) fn attach(mount: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// Sets and clears attributes of the mount that `mount` is the root of.
fn attributes(mount: &OwnedFd, set: u64, clear: u64) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the call reads one `mount_attr` of the size that is given, which outlives it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

fn place(root: &OwnedFd, entry: &Entry, tree: Option<&OwnedFd>) -> io::Result<()> {
    let at = match entry {
        // The mount is the directory that it is in.
        Entry::Placeholder { at, .. } | Entry::Held { at } => {
            at.rsplit_once('/').map_or("", |(dir, _)| dir)
        }
        _ => entry.at(),
    };
    let at = at.trim_start_matches('/');
    let (dir, name) = match at.rsplit_once('/') {
        Some((dirs, name)) => (directory(root, dirs)?, name),
        None => (root.try_clone()?, at),
    };
    let Some(tree) = tree else {
        let Entry::Link { to, .. } = entry else {
            return Ok(());
        };
        return Ok(rustix::fs::symlinkat(to, &dir, name)?);
    };
    // Of a mount only its one user may ask; it is a file.
    let stat = match entry {
        Entry::Mount { .. } => None,
        _ => Some(rustix::fs::statat(tree, "", AtFlags::EMPTY_PATH)?),
    };
    if let (Entry::Device { .. }, Some(stat)) = (entry, &stat)
        && stat.st_mode & 0o006 != 0o006
    {
        // Not for everybody outside (/dev/kvm): a node of its own, for the one who is inside.
        let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
        return Ok(rustix::fs::mknodat(&dir, name, kind, mode, stat.st_rdev)?);
    }
    let is_directory =
        |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let target = if stat.is_some_and(is_directory) {
        rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755))?;
        beneath(&dir, name, OFlags::PATH | OFlags::DIRECTORY, 0)?
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
        beneath(&dir, name, flags, 0o600)?
    };
    let set = libc::MOUNT_ATTR_NOSUID
        | match entry {
            Entry::Device { .. } => libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY,
            Entry::BindWrite { .. }
            | Entry::BindReplace { .. }
            | Entry::Sockets { .. }
            | Entry::Placeholder { .. }
            | Entry::Held { .. } => libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV,
            Entry::Mount { .. } => {
                libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_RDONLY
            }
            _ => libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_RDONLY,
        };
    let all = libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV;
    attributes(tree, set, all & !set)?;
    attach(tree, &target)
}

/// The directory at `path` beneath `root`, made where it is missing.
fn directory(root: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let mut dir = root.try_clone()?;
    for part in path.split('/') {
        match rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        dir = beneath(&dir, part, OFlags::PATH | OFlags::DIRECTORY, 0)?;
    }
    Ok(dir)
}

/// Reading and running what is in the root, writing what is meant to be, nothing else; no TCP; no
/// signal or abstract socket out. As much of it as the kernel can do (`Status::weakened`).
fn landlock(root: &[Entry]) -> Step {
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let replace = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let run = || -> Result<(), landlock::RulesetError> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        for entry in root {
            let (at, access) = match entry {
                Entry::Bind { at, .. } => (at.as_str(), read),
                Entry::Mount { at, .. } => (at.as_str(), AccessFs::ReadFile.into()),
                Entry::BindWrite { at, .. } | Entry::Device { at, .. } => (at.as_str(), write),
                Entry::BindReplace { at, .. } => (at.as_str(), replace),
                Entry::Sockets { at } => (at.as_str(), AccessFs::MakeSock.into()),
                // What is mounted on a file is judged by the directory that the file is in.
                Entry::Placeholder { at, .. } => {
                    let dir = at.rsplit_once('/').map_or(at.as_str(), |(dir, _)| dir);
                    (dir, AccessFs::ReadFile | AccessFs::WriteFile)
                }
                Entry::Held { .. } | Entry::Link { .. } => continue,
            };
            // A path that can't be opened gets no rule, so it stays closed.
            if let Ok(fd) = PathFd::new(at) {
                rules = rules.add_rule(PathBeneath::new(fd, access))?;
            }
        }
        rules.restrict_self().map(drop)
    };
    run().map_err(|e| format!("landlock: {e}"))
}

/// Nothing was started: the VMM that it was done for is named, by its pidfd.
fn ready(sock: &OwnedFd, vmm: &OwnedFd) -> Step {
    send(sock, &Said::Ready { pid: 0 }, &[vmm.as_fd()]).map_err(at("report"))
}

/// Opens the file that a mount consists of, as the one uid that may, and sends it to warden.
fn open_mount(sock: &OwnedFd, slot: u16, access: OpenFor, mount: &OwnedFd) -> Step {
    drop_privileges(VMM_UID + u32::from(slot), CapabilitySet::empty())?;
    let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
    // The VMM matches the access mode and O_DIRECT of a descriptor that it is given.
    let flags = OFlags::CLOEXEC
        | match access {
            OpenFor::Disk => OFlags::RDWR | OFlags::DIRECT,
            OpenFor::Save => OFlags::WRONLY,
            OpenFor::Wake => OFlags::RDONLY,
        };
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(at("open the disk's file"))?;
    send(sock, &Said::Ready { pid: 0 }, &[file.as_fd()]).map_err(at("send the disk's file"))
}

fn map_ids(proc: &OwnedFd, pid: u32, id: u32) -> Step {
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{id} {id} 1")),
        ("gid_map", format!("{id} {id} 1")),
    ] {
        let path = format!("{pid}/{file}");
        let fd = rustix::fs::openat(proc, &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(at("open the id map"))?;
        rustix::io::write(&fd, text.as_bytes()).map_err(at("write the id map"))?;
    }
    Ok(())
}

/// Clones a child whose parent is warden, not this launcher.
fn clone_sibling(flags: libc::c_int) -> io::Result<Option<(u32, OwnedFd)>> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid `clone_args`: no stack, no TLS, no signal.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (flags | libc::CLONE_PARENT | libc::CLONE_PIDFD) as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    // SAFETY: without CLONE_VM this is a fork; the process has one thread, so the child may go on
    // in Rust. `args` has the size that is given, and `pidfd` outlives the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        // SAFETY: the kernel has just made this descriptor for us.
        pid => Ok(Some((pid as u32, unsafe { OwnedFd::from_raw_fd(pidfd) }))),
    }
}

fn high(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 128)?)
}

fn pick(fds: &[OwnedFd], i: usize) -> Step<&OwnedFd> {
    fds.get(i)
        .ok_or_else(|| format!("the plan names descriptor {i}, which did not come"))
}

fn borrow(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: only used for numbers that `dup_to` has just made; none is closed before exec.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Puts a copy of `fd` at the number `to`, kept on exec.
fn dup_to(fd: BorrowedFd<'_>, to: RawFd) -> Step {
    // SAFETY: plain descriptor numbers; nothing here owns `to`: all owned ones are 128 or above,
    // or were opened after the lower numbers were taken and are not used again after this.
    if unsafe { libc::dup2(fd.as_raw_fd(), to) } == to {
        return Ok(());
    }
    Err(format!(
        "place descriptor {to}: {}",
        io::Error::last_os_error()
    ))
}

fn close_all(from: RawFd, to: RawFd) -> Step {
    if from > to {
        return Ok(());
    }
    // SAFETY: closes descriptors by number; the caller forgets the ones it owned.
    if unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } == 0 {
        return Ok(());
    }
    Err(format!("close descriptors: {}", io::Error::last_os_error()))
}

fn write_file(path: &std::path::Path, text: &str) -> io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

pub(crate) fn at<E: std::fmt::Display>(step: &'static str) -> impl Fn(E) -> String {
    move |e| format!("{step}: {e}")
}
