//! What each jail holds: the VMM's, vmctl's, a disk's, and mkfs's. All that a plan names comes
//! from constants and numbers here.

use crate::cgroup::Bounds;
use crate::fault::{At, Result};
use crate::jail::{Entry, Plan, Program};
use crate::layout::{Layout, open_beneath};
use crate::limits::{
    DISK_MEMORY_MB, DISK_MEMORY_MIN_MB, DISK_UID, MKFS_UID, PIDS_MAX, STATE_MAX_BYTES, VMCTL_UID,
    VMM_OVERHEAD_MB, VMM_UID,
};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::path::Path;

const MIB: u64 = 1 << 20;
/// What a disk's file may grow to: the largest volume and its header.
const DISK_FILE_MAX_BYTES: u64 = (*model::limits::DISK_MB.end() as u64 + 64) * MIB;

/// A plan and the descriptors that go with it.
pub struct Jail {
    /// The plan.
    pub plan: Plan,
    owned: Vec<OwnedFd>,
}

impl Jail {
    fn new(layout: &Layout, id: u32, program: Program, cgroups: Vec<std::path::PathBuf>) -> Self {
        let plan = Plan {
            id,
            program,
            argv: vec![],
            apart: true,
            root: vec![],
            scratch: layout.own_run().join("root"),
            pass: vec![],
            stdin: None,
            stderr: None,
            cgroups,
            oom_score_adj: 0,
            nproc: PIDS_MAX,
            fsize_bytes: DISK_FILE_MAX_BYTES,
            memlock_bytes: 0,
            confine: false,
        };
        Self {
            plan,
            owned: vec![],
        }
    }

    /// The descriptors, in the plan's order.
    #[must_use]
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.owned.iter().map(AsFd::as_fd).collect()
    }

    fn own(&mut self, fd: OwnedFd) -> usize {
        self.owned.push(fd);
        self.owned.len() - 1
    }

    /// Passes a descriptor: the first becomes 3, the next 4.
    fn pass(&mut self, fd: OwnedFd) {
        let i = self.own(fd);
        self.plan.pass.push(i);
    }

    fn bind(&mut self, fd: OwnedFd, at: &str) {
        let fd = self.own(fd);
        self.plan.root.push(Entry::Bind { fd, at: at.into() });
    }

    fn device(&mut self, name: &str) -> Result {
        let at = format!("/dev/{name}");
        let fd = path_fd(Path::new("/dev"), name).at("open", &at)?;
        let fd = self.own(fd);
        self.plan.root.push(Entry::Device { fd, at });
        Ok(())
    }

    /// The system's shared libraries, for programs of our own.
    fn libraries(&mut self) -> Result {
        for dir in ["usr/lib", "usr/lib64"] {
            match path_fd(Path::new("/"), dir) {
                Ok(fd) => self.bind(fd, &format!("/{dir}")),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).at("open", dir),
            }
        }
        for (at, to) in [("/lib", "usr/lib"), ("/lib64", "usr/lib64")] {
            self.plan.root.push(Entry::Link {
                at: at.into(),
                to: to.into(),
            });
        }
        self.device("null")
    }
}

/// What a VMM's jail is made of, besides the VMM itself.
pub struct VmmParts {
    /// The slot.
    pub slot: u16,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Arguments, the name first.
    pub argv: Vec<String>,
    /// The base image.
    pub image: OwnedFd,
    /// Kernel and initramfs, for a boot.
    pub boot: Option<(OwnedFd, OwnedFd)>,
    /// The template's memory, and whether it is being built.
    pub memory: Option<(OwnedFd, bool)>,
    /// Descriptors 3, 4, …
    pub pass: Vec<OwnedFd>,
    /// Its stderr.
    pub stderr: OwnedFd,
    /// Whether /dev/kvm is in the jail.
    pub kvm: bool,
}

/// The VMM's jail: the closure, the kernel, the image, the template; three devices.
///
/// # Errors
/// The artifact that is not there.
pub fn vmm(
    layout: &Layout,
    program: &str,
    parts: VmmParts,
    cgroups: Vec<std::path::PathBuf>,
) -> Result<Jail> {
    let id = VMM_UID + u32::from(parts.slot);
    let mut jail = Jail::new(layout, id, Program::Path(program.into()), cgroups);
    let closure = layout.artifacts().join("closure");
    for entry in std::fs::read_dir(&closure).at("read", closure.display())? {
        let entry = entry.at("read", closure.display())?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let at = format!("/{name}");
        if entry.file_type().at("read", &name)?.is_symlink() {
            let to = std::fs::read_link(entry.path())
                .at("read", &name)?
                .to_string_lossy()
                .into_owned();
            jail.plan.root.push(Entry::Link { to, at });
        } else {
            jail.bind(path_fd(&closure, &name).at("open", &name)?, &at);
        }
    }
    jail.bind(parts.image, "/image/base.erofs");
    if let Some((kernel, initramfs)) = parts.boot {
        jail.bind(kernel, &format!("/{}", crate::vm::KERNEL));
        jail.bind(initramfs, &format!("/{}", crate::vm::INITRAMFS));
    }
    match parts.memory {
        Some((memory, false)) => jail.bind(memory, "/template/memory"),
        Some((memory, true)) => {
            let fd = jail.own(memory);
            jail.plan.root.push(Entry::BindWrite {
                fd,
                at: "/template/memory".into(),
            });
        }
        None => {}
    }
    for name in ["null", "zero", "urandom"] {
        jail.device(name)?;
    }
    if parts.kvm {
        jail.device("kvm")?;
    }
    for fd in parts.pass {
        jail.pass(fd);
    }
    jail.plan.stderr = Some(jail.own(parts.stderr));
    jail.plan.argv = parts.argv;
    jail.plan.nproc = PIDS_MAX + u64::from(parts.cpus);
    jail.plan.oom_score_adj = 500;
    jail.plan.confine = true;
    Ok(jail)
}

/// vmctl's jail: itself and the system's libraries. Not apart: it reads its peers' uids.
///
/// # Errors
/// A descriptor's.
pub fn vmctl(
    layout: &Layout,
    slot: u16,
    exe: OwnedFd,
    argv: Vec<String>,
    pass: Vec<OwnedFd>,
    cgroups: Vec<std::path::PathBuf>,
) -> Result<Jail> {
    let mut jail = Jail::new(layout, VMCTL_UID + u32::from(slot), Program::Fd(0), cgroups);
    jail.own(exe);
    jail.libraries()?;
    for fd in pass {
        jail.pass(fd);
    }
    jail.plan.argv = argv;
    jail.plan.apart = false;
    jail.plan.fsize_bytes = STATE_MAX_BYTES;
    Ok(jail)
}

/// A disk's jail: the very file that was measured, and the system's libraries. It also holds
/// `channel`, warden's end of its channel, so that the channel outlives a warden, and the next one
/// finds it there.
///
/// # Errors
/// A descriptor's.
pub fn disk(
    layout: &Layout,
    slot: u16,
    exe: OwnedFd,
    channel: OwnedFd,
    pass: Vec<OwnedFd>,
    cgroups: Vec<std::path::PathBuf>,
) -> Result<Jail> {
    let mut jail = Jail::new(layout, DISK_UID + u32::from(slot), Program::Fd(0), cgroups);
    jail.own(exe);
    jail.libraries()?;
    jail.device("urandom")?;
    for fd in pass {
        jail.pass(fd);
    }
    jail.plan.stdin = Some(jail.own(channel));
    let vmm = VMM_UID + u32::from(slot);
    jail.plan.argv = vec!["casemate-disk".into(), "--uid".into(), vmm.to_string()];
    jail.plan.oom_score_adj = -900;
    jail.plan.memlock_bytes = 16 * MIB; // its secret heap
    Ok(jail)
}

/// mkfs's jail: the system's programs, read-only, and the file to format.
///
/// # Errors
/// A descriptor's.
pub fn mkfs(layout: &Layout, file: OwnedFd) -> Result<Jail> {
    let program = Program::Path("/usr/sbin/mke2fs".into());
    let mut jail = Jail::new(layout, MKFS_UID, program, vec![]);
    jail.libraries()?;
    jail.bind(
        path_fd(Path::new("/"), "usr/sbin").at("open", "/usr/sbin")?,
        "/usr/sbin",
    );
    if let Ok(conf) = path_fd(Path::new("/etc"), "mke2fs.conf") {
        jail.bind(conf, "/etc/mke2fs.conf");
    }
    let fd = jail.own(file);
    jail.plan.root.push(Entry::BindWrite {
        fd,
        at: "/volume".into(),
    });
    jail.plan.argv = [
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-I", "256",
    ]
    .into_iter()
    .chain([
        "-J",
        "size=16",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
        "-L",
        "workspace",
    ])
    .chain(["/volume"])
    .map(String::from)
    .collect();
    Ok(jail)
}

/// Opens a mount as the one uid that may.
#[must_use]
pub fn mount_opener(layout: &Layout, slot: u16) -> Plan {
    Jail::new(
        layout,
        VMM_UID + u32::from(slot),
        Program::OpenMount(0),
        vec![],
    )
    .plan
}

/// Bounds of a VM's group.
#[must_use]
pub fn vm_bounds(memory_mb: u32, cpus: u32, translator_mb: u64) -> Bounds {
    Bounds {
        memory_bytes: (u64::from(memory_mb) + VMM_OVERHEAD_MB + translator_mb) * MIB,
        memory_min_bytes: 0,
        pids: PIDS_MAX + u64::from(cpus),
        cpu_us: u64::from(cpus) * 100_000,
    }
}

/// Bounds of a disk's group.
#[must_use]
pub fn disk_bounds() -> Bounds {
    Bounds {
        memory_bytes: DISK_MEMORY_MB * MIB,
        memory_min_bytes: DISK_MEMORY_MIN_MB * MIB,
        pids: PIDS_MAX,
        cpu_us: 100_000,
    }
}

/// A handle to something of root's, for copying its mount.
fn path_fd(dir: &Path, name: &str) -> std::io::Result<OwnedFd> {
    open_beneath(dir, name, OFlags::PATH, 0)
}

/// Opens an executable of our own for measuring and running.
///
/// # Errors
/// The file's.
pub fn executable(dir: &Path, name: &str) -> Result<OwnedFd> {
    rustix::fs::open(
        dir.join(name),
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )
    .at("open", dir.join(name).display())
}
