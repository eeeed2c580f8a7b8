//! What each jail holds: its root, its user, its limits. All that a plan names comes from constants
//! and numbers here.

use crate::ask::Kind;
use crate::cgroup::Bounds;
use crate::files::{beneath, open_beneath, open_of_root};
use crate::launch::{Step, at};
use crate::limits::{
    DISK_MEMORY_MB, DISK_MEMORY_MIN_MB, DISK_UID, MKFS_UID, NET_UID, PIDS_MAX, STATE_MAX_BYTES,
    VMCTL_UID, VMM_OVERHEAD_MB, VMM_UID, VOLUMES_UID,
};
use crate::named::Named;
use api::warden::Start;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;
use std::path::Path;
use vmm::driver::Driver;
use vmm::firecracker::{Paths, pin};
use vmm::qemu::{Accel, How, Net, Spec};

const MIB: u64 = 1 << 20;
/// What a disk's file may grow to: the largest volume and its header.
const DISK_FILE_MAX_BYTES: u64 = (*model::limits::DISK_MB.end() as u64 + 64) * MIB;

/// What a volume's file system leaves room to grow to, in blocks of 4 KiB. Not more: the room of
/// mke2fs' default, a thousandfold, is more than a journal of 16 MiB can take in one transaction,
/// and the kernel then grows nothing (ENOSPC).
const GROW_MAX_BLOCKS: u64 = 1 << 26;
const _: () = assert!(GROW_MAX_BLOCKS * 4096 > *model::limits::DISK_MB.end() as u64 * MIB);

/// Where the disk's mount waits in Firecracker's jail until its VM is prepared.
pub(crate) const HELD: &str = "/held/disk";
/// Firecracker, in its jail.
const FIRECRACKER: &str = "/firecracker";
/// QEMU inside the closure.
pub const VMM: &str = "/usr/bin/qemu-system-x86_64";
/// The guest's kernel, in the jail and among the artifacts.
pub const KERNEL: &str = "kernel/vmlinux";
/// Its first file system.
pub const INITRAMFS: &str = "kernel/initramfs.cpio";

/// Where casemate-volumes finds its directory.
pub const VOLUMES_AT: &str = "/volumes";

/// What a jail is. Descriptors are named by their place in the message.
#[derive(Debug)]
pub struct Plan {
    /// uid and gid.
    pub id: u32,
    /// The program: a file in the root, or a descriptor.
    pub program: Program,
    /// Its arguments, the name first.
    pub argv: Vec<String>,
    /// What it shares with the host.
    pub namespaces: Namespaces,
    /// All that is left of root's power.
    pub capabilities: CapabilitySet,
    /// All that its file system holds.
    pub root: Vec<Entry>,
    /// Descriptors that become 3, 4, …
    pub pass: Vec<usize>,
    /// The descriptor that becomes 0; otherwise /dev/null.
    pub stdin: Option<usize>,
    /// The descriptor that becomes 2; otherwise the launcher's own.
    pub stderr: Option<usize>,
    /// For the out-of-memory killer.
    pub oom_score_adj: i32,
    /// Threads and processes.
    pub nproc: u64,
    /// Largest file it may write, bytes.
    pub fsize_bytes: u64,
    /// Memory it may lock, bytes.
    pub memlock_bytes: u64,
    /// Landlock, and this VMM's system-call list.
    pub confine: Option<Driver>,
    /// What is made in the jail for a VMM that takes no descriptors.
    pub named: Option<Named>,
}

/// Namespaces. Mounts, IPC, UTS and cgroup are a process's own in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespaces {
    /// Its own network and processes, and a user namespace that maps its id alone, so that not even
    /// root outside owns what is inside.
    Apart,
    /// Its own network; it can tell its peers' uids.
    Alone,
    /// The network that warden is in.
    Fabric,
}

/// What is run.
#[derive(Debug, PartialEq, Eq)]
pub enum Program {
    /// A path inside the root.
    Path(String),
    /// A descriptor: the very file that was measured.
    Fd(usize),
}

/// One thing in the root.
#[derive(Debug)]
pub enum Entry {
    /// A file or directory, read-only.
    Bind {
        /// Its descriptor.
        fd: usize,
        /// Where, absolute.
        at: String,
    },
    /// A file that may be written.
    BindWrite {
        /// Its descriptor.
        fd: usize,
        /// Where, absolute.
        at: String,
    },
    /// A file that may be written and cut off.
    BindReplace {
        /// Its descriptor.
        fd: usize,
        /// Where, absolute.
        at: String,
    },
    /// An empty directory of its user's, in memory, for sockets.
    Sockets {
        /// Where, absolute.
        at: String,
    },
    /// A file of its user's without anything in it, in a directory of its own: something is
    /// mounted on it later.
    Placeholder {
        /// Where, absolute.
        at: String,
        /// How large it looks.
        bytes: u64,
    },
    /// A place where something is mounted until it is needed: nothing here may be opened.
    Held {
        /// Where, absolute.
        at: String,
    },
    /// A device.
    Device {
        /// Its descriptor.
        fd: usize,
        /// Where, absolute.
        at: String,
    },
    /// A mount of one file that is attached nowhere yet, read-only.
    Mount {
        /// Its descriptor.
        fd: usize,
        /// Where, absolute.
        at: String,
    },
    /// A symbolic link.
    Link {
        /// What it says.
        to: String,
        /// Where, absolute.
        at: String,
    },
}

impl Entry {
    /// Where it is, absolute.
    #[must_use]
    pub fn at(&self) -> &str {
        match self {
            Self::Bind { at, .. }
            | Self::BindWrite { at, .. }
            | Self::BindReplace { at, .. }
            | Self::Sockets { at }
            | Self::Placeholder { at, .. }
            | Self::Held { at }
            | Self::Device { at, .. }
            | Self::Mount { at, .. }
            | Self::Link { at, .. } => at,
        }
    }
}

/// The plan of `kind` in the installation at `root`, and its descriptors: those given, and those of
/// what it binds.
pub(crate) fn of(kind: Kind, fds: Vec<OwnedFd>, root: &Path) -> Step<(Plan, Vec<OwnedFd>)> {
    let mut given = Given(fds.into_iter());
    let jail = match kind {
        Kind::Vmm { slot, driver, .. } => {
            let id = VMM_UID + u32::from(slot);
            match driver {
                Driver::Qemu => {
                    let jail = Jail::new(id, Program::Path(VMM.into()));
                    vmm(jail, kind, &mut given, root)?
                }
                Driver::Firecracker => {
                    let jail = Jail::new(id, Program::Path(FIRECRACKER.into()));
                    firecracker(jail, kind, &mut given, root)?
                }
            }
        }
        Kind::Vmctl { slot, .. } => {
            let jail = Jail::run(VMCTL_UID + u32::from(slot), given.next("executable")?);
            vmctl(jail, kind, &mut given)?
        }
        Kind::Disk { slot } => {
            let jail = Jail::run(DISK_UID + u32::from(slot), given.next("executable")?);
            disk(jail, slot, &mut given)?
        }
        Kind::Net { base, edge_uid } => net(
            Jail::run(NET_UID, given.next("executable")?),
            base,
            edge_uid,
            &mut given,
        )?,
        Kind::Volumes => volumes(
            Jail::run(VOLUMES_UID, given.next("executable")?),
            &mut given,
            root,
        )?,
        Kind::Mkfs => mkfs(given.next("file")?)?,
        Kind::OpenMount { .. } | Kind::GiveMount { .. } | Kind::Settle { .. } => {
            return Err("it is no program".into());
        }
    };
    match given.0.next() {
        None => Ok((jail.plan, jail.owned)),
        Some(_) => Err("more descriptors came than the kind takes".into()),
    }
}

/// The descriptors that came, in their order.
struct Given(std::vec::IntoIter<OwnedFd>);

impl Given {
    fn next(&mut self, what: &str) -> Step<OwnedFd> {
        self.0.next().ok_or_else(|| format!("no {what} came"))
    }
}

/// A plan and the descriptors that go with it.
struct Jail {
    plan: Plan,
    owned: Vec<OwnedFd>,
}

impl Jail {
    fn new(id: u32, program: Program) -> Self {
        let plan = Plan {
            id,
            program,
            argv: vec![],
            namespaces: Namespaces::Apart,
            capabilities: CapabilitySet::empty(),
            root: vec![],
            pass: vec![],
            stdin: None,
            stderr: None,
            oom_score_adj: 0,
            nproc: PIDS_MAX,
            fsize_bytes: DISK_FILE_MAX_BYTES,
            memlock_bytes: 0,
            confine: None,
            named: None,
        };
        Self {
            plan,
            owned: vec![],
        }
    }

    /// One that runs the very file behind `exe`.
    fn run(id: u32, exe: OwnedFd) -> Self {
        let mut jail = Self::new(id, Program::Fd(0));
        jail.own(exe);
        jail
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

    fn bind_write(&mut self, fd: OwnedFd, at: &str) {
        let fd = self.own(fd);
        self.plan.root.push(Entry::BindWrite { fd, at: at.into() });
    }

    fn bind_replace(&mut self, fd: OwnedFd, at: &str) {
        let fd = self.own(fd);
        let at = at.into();
        self.plan.root.push(Entry::BindReplace { fd, at });
    }

    fn device(&mut self, name: &str) -> Step {
        let at = format!("/dev/{name}");
        let fd = handle("/dev", name).map_err(|e| format!("open {at}: {e}"))?;
        let fd = self.own(fd);
        self.plan.root.push(Entry::Device { fd, at });
        Ok(())
    }

    /// The system's shared libraries, for programs of our own.
    fn libraries(&mut self) -> Step {
        for dir in ["usr/lib", "usr/lib64"] {
            match handle("/", dir) {
                Ok(fd) => self.bind(fd, &format!("/{dir}")),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("open {dir}: {e}")),
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

/// The VMM's: the closure, the kernel, the image, the template; three devices.
fn vmm(mut jail: Jail, kind: Kind, given: &mut Given, root: &Path) -> Step<Jail> {
    let Kind::Vmm {
        how,
        memory_mb,
        cpus,
        kvm,
        ..
    } = kind
    else {
        return Err("no VMM".into());
    };
    closure(&mut jail, root)?;
    jail.bind(given.next("image")?, "/image/base.erofs");
    jail.plan.stderr = Some(jail.own(given.next("stderr")?));
    for what in ["QMP channel", "agent channel", "tap"] {
        jail.pass(given.next(what)?);
    }
    if matches!(how, Start::Cold | Start::Build) {
        jail.bind(given.next("kernel")?, &format!("/{KERNEL}"));
        jail.bind(given.next("initramfs")?, &format!("/{INITRAMFS}"));
    }
    match how {
        Start::Template => jail.bind(given.next("memory")?, "/template/memory"),
        Start::Build => jail.bind_write(given.next("memory")?, "/template/memory"),
        Start::Cold => {}
        Start::Wake => {
            let fd = jail.own(given.next("saved memory")?);
            let at = "/saved/memory".into();
            jail.plan.root.push(Entry::Mount { fd, at });
        }
    }
    if how != Start::Cold {
        jail.pass(given.next("state")?);
    }
    for name in ["null", "zero", "urandom"] {
        jail.device(name)?;
    }
    if kvm {
        jail.device("kvm")?;
    }
    jail.plan.argv = vmm_argv(how, memory_mb, cpus, kvm);
    jail.plan.nproc = vm_pids(cpus, 0);
    jail.plan.oom_score_adj = 500;
    jail.plan.confine = Some(Driver::Qemu);
    Ok(jail)
}

/// Firecracker's: itself, the kernel, the image, the template; what it opens by name and makes.
fn firecracker(mut jail: Jail, kind: Kind, given: &mut Given, root: &Path) -> Step<Jail> {
    let Kind::Vmm {
        how,
        cpus,
        kvm: true,
        ..
    } = kind
    else {
        return Err("Firecracker has no other way to run a guest than KVM".into());
    };
    let paths = Paths::jail();
    let artifacts = open_of_root(&root.join(crate::ARTIFACTS)).map_err(at("open the artifacts"))?;
    let program = beneath(&artifacts, pin::ARTIFACT, OFlags::PATH, 0);
    jail.bind(program.map_err(at("open Firecracker"))?, FIRECRACKER);
    jail.bind(given.next("image")?, &paths.image);
    jail.plan.stderr = Some(jail.own(given.next("stderr")?));
    jail.pass(given.next("channel to vmctl")?);
    // Nothing comes by it: the guest's channel is a connection that it makes.
    drop(given.next("agent channel")?);
    if matches!(how, Start::Cold | Start::Build) {
        jail.bind(given.next("kernel")?, &paths.kernel);
        jail.bind(given.next("initramfs")?, &paths.initramfs);
    }
    match how {
        Start::Cold => {}
        Start::Template => {
            jail.bind(given.next("memory")?, &paths.memory);
            jail.bind(given.next("state")?, &paths.state);
        }
        Start::Build => {
            jail.bind_replace(given.next("memory")?, &paths.memory);
            jail.bind_replace(given.next("state")?, &paths.state);
        }
        Start::Wake => return Err("Firecracker's guests are not put to sleep".into()),
    }
    for name in ["null", "kvm", "net/tun"] {
        jail.device(name)?;
    }
    let (sockets, _) = paths.control.rsplit_once('/').ok_or("no directory")?;
    let entries = [
        Entry::Sockets { at: sockets.into() },
        Entry::Placeholder {
            at: paths.disk.clone(),
            bytes: vmm::limits::DISK_MAX_BYTES,
        },
        Entry::Held { at: HELD.into() },
    ];
    jail.plan.root.extend(entries);
    jail.plan.argv = vec!["firecracker".into()];
    jail.plan.argv.extend(vmm::firecracker::argv(&paths));
    jail.plan.named = Some(Named {
        tap: vmm::firecracker::api::TAP,
        agent: paths.agent(),
        control: paths.control,
    });
    jail.plan.nproc = PIDS_MAX + u64::from(cpus);
    jail.plan.oom_score_adj = 500;
    jail.plan.confine = Some(Driver::Firecracker);
    Ok(jail)
}

/// Where the driver's executable is among the artifacts.
#[must_use]
pub fn executable(driver: Driver) -> String {
    match driver {
        Driver::Qemu => format!("closure{VMM}"),
        Driver::Firecracker => pin::ARTIFACT.into(),
    }
}

/// Names the machine that a template is a state of.
#[must_use]
pub fn machine(driver: Driver, kvm: bool, memory_mib: u32, cpus: u32) -> String {
    match driver {
        Driver::Qemu => vmm_argv(Start::Template, memory_mib, cpus, kvm).join("\0"),
        Driver::Firecracker => vmm::firecracker::machine(&vmm::firecracker::Spec {
            how: How::Template,
            memory_mib,
            cpus,
            tap: true,
            limits: vmm::firecracker::Limits::default(),
            paths: Paths::jail(),
        }),
    }
}

/// QEMU, its libraries and firmware: what is in the closure's directory, links as links.
fn closure(jail: &mut Jail, root: &Path) -> Step {
    let step = "open the closure";
    let artifacts = open_of_root(&root.join(crate::ARTIFACTS)).map_err(at(step))?;
    let closure =
        beneath(&artifacts, "closure", OFlags::RDONLY | OFlags::DIRECTORY, 0).map_err(at(step))?;
    for entry in rustix::fs::Dir::read_from(&closure).map_err(at("read the closure"))? {
        let entry = entry.map_err(at("read the closure"))?;
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        if matches!(name, "." | "..") {
            continue;
        }
        let place = format!("/{name}");
        match rustix::fs::readlinkat(&closure, name, Vec::new()) {
            Ok(to) => {
                let to = to.to_string_lossy().into_owned();
                jail.plan.root.push(Entry::Link { to, at: place });
            }
            // No link.
            Err(rustix::io::Errno::INVAL) => {
                let fd = beneath(&closure, name, OFlags::PATH, 0).map_err(at(step))?;
                jail.bind(fd, &place);
            }
            Err(e) => return Err(at("read the closure")(e)),
        }
    }
    Ok(())
}

/// The VMM's arguments, its name first: constants of the driver and numbers, all of it ASCII.
#[must_use]
pub fn vmm_argv(how: Start, memory_mib: u32, cpus: u32, kvm: bool) -> Vec<String> {
    let spec = Spec {
        how: match how {
            Start::Template => How::Template,
            Start::Cold => How::Cold,
            Start::Build => How::Build,
            Start::Wake => How::Wake,
        },
        memory_mib,
        cpus,
        accel: if kvm { Accel::Kvm } else { Accel::Tcg },
        net: Net::Tap,
        paths: vmm::qemu::Paths::jail(),
    };
    let argv = vmm::qemu::argv(&spec);
    let argv = argv.into_iter().map(|a| a.to_string_lossy().into_owned());
    std::iter::once("qemu-system-x86_64".into())
        .chain(argv)
        .collect()
}

/// vmctl's: itself and the system's libraries. Not apart: it reads its peers' uids.
fn vmctl(mut jail: Jail, kind: Kind, given: &mut Given) -> Step<Jail> {
    let Kind::Vmctl {
        slot,
        how,
        driver,
        memory_mb,
        cpus,
        host_uid,
    } = kind
    else {
        return Err("no vmctl".into());
    };
    let how = match how {
        Start::Template => "template",
        Start::Cold => "cold",
        Start::Build => "build",
        Start::Wake => "wake",
    };
    let argv = format!(
        "casemate-vmctl --slot {slot} --how {how} --host-uid {host_uid} --driver {} \
         --memory-mib {memory_mb} --cpus {cpus}",
        driver.word()
    );
    jail.plan.argv = argv.split(' ').map(String::from).collect();
    jail.libraries()?;
    for what in [
        "QMP channel",
        "agent channel",
        "host's listener",
        "warden's listener",
    ] {
        jail.pass(given.next(what)?);
    }
    jail.plan.namespaces = Namespaces::Alone;
    // Others write an archive, which is as large as a disk may be.
    if how == "build" {
        jail.plan.fsize_bytes = STATE_MAX_BYTES;
    }
    Ok(jail)
}

/// A disk's: the very file that was measured, and the system's libraries. It also holds warden's
/// end of its channel, so that the channel outlives a warden, and the next one finds it there.
fn disk(mut jail: Jail, slot: u16, given: &mut Given) -> Step<Jail> {
    jail.libraries()?;
    jail.device("urandom")?;
    jail.plan.stdin = Some(jail.own(given.next("warden's end of the channel")?));
    for what in ["channel", "/dev/fuse", "second /dev/fuse"] {
        jail.pass(given.next(what)?);
    }
    let vmm = VMM_UID + u32::from(slot);
    jail.plan.argv = vec!["casemate-disk".into(), "--uid".into(), vmm.to_string()];
    jail.plan.oom_score_adj = -900;
    jail.plan.memlock_bytes = 16 * MIB; // its secret heap
    Ok(jail)
}

/// casemate-net's: itself, the system's libraries (libnftables among them), /dev/net/tun, and the
/// kernel's settings of the network that it is in, which nobody without CAP_NET_ADMIN can write.
fn net(mut jail: Jail, base: u32, edge_uid: u32, given: &mut Given) -> Step<Jail> {
    jail.libraries()?;
    let tun = handle("/dev", "net/tun").map_err(at("open /dev/net/tun"))?;
    let fd = jail.own(tun);
    jail.plan.root.push(Entry::Device {
        fd,
        at: "/dev/net/tun".into(),
    });
    let settings = handle("/proc", "sys/net").map_err(at("open /proc/sys/net"))?;
    jail.bind_write(settings, "/proc/sys/net");
    jail.pass(given.next("channel")?);
    jail.plan.argv = vec![
        "casemate-net".into(),
        base.to_string(),
        edge_uid.to_string(),
    ];
    jail.plan.namespaces = Namespaces::Fabric;
    jail.plan.capabilities = CapabilitySet::NET_ADMIN;
    Ok(jail)
}

/// casemate-volumes': itself, the system's libraries, and its directory.
fn volumes(mut jail: Jail, given: &mut Given, root: &Path) -> Step<Jail> {
    jail.libraries()?;
    let (dir, name) = crate::VOLUMES.rsplit_once('/').unwrap_or_default();
    let files = open_of_root(&root.join(dir))
        .and_then(|dir| beneath(dir, name, OFlags::PATH, 0))
        .map_err(at("open the directory of volumes"))?;
    jail.bind_write(files, VOLUMES_AT);
    jail.plan.stdin = Some(jail.own(given.next("channel")?));
    jail.plan.argv = vec!["casemate-volumes".into()];
    Ok(jail)
}

/// mkfs's: the system's programs, read-only, and the file to format.
fn mkfs(file: OwnedFd) -> Step<Jail> {
    let mut jail = Jail::new(MKFS_UID, Program::Path("/usr/sbin/mke2fs".into()));
    jail.libraries()?;
    jail.bind(
        handle("/", "usr/sbin").map_err(at("open /usr/sbin"))?,
        "/usr/sbin",
    );
    if let Ok(conf) = handle("/etc", "mke2fs.conf") {
        jail.bind(conf, "/etc/mke2fs.conf");
    }
    jail.bind_write(file, "/volume");
    jail.plan.argv = mke2fs("");
    jail.plan.argv.push("/volume".into());
    Ok(jail)
}

/// `mke2fs` and what it is told of a workspace's file system, but for the file. `extended` is said
/// too, with a comma in front of each.
#[must_use]
pub fn mke2fs(extended: &str) -> Vec<String> {
    let words = "mke2fs -q -F -t ext4 -b 4096 -m 0 -I 256 -J size=16 -L workspace -E";
    // The file is a hole: without `assume_storage_prezeroed` (e2fsprogs 1.47) each guest would write
    // zeros over its inode tables, 16 MiB a GiB, in its first minutes.
    let options = format!(
        "lazy_itable_init=1,lazy_journal_init=1,nodiscard,assume_storage_prezeroed=1,\
         resize={GROW_MAX_BLOCKS}{extended}"
    );
    let words = words.split_whitespace().map(String::from);
    words.chain([options]).collect()
}

/// Bounds of all that a slot runs: what a guest makes its disk and its vmctl compute is the guest's
/// own CPU time. Memory and threads are bounded one level below.
#[must_use]
pub fn slot_bounds(cpus: u32) -> Bounds {
    Bounds {
        memory_bytes: None,
        memory_min_bytes: 0,
        pids: None,
        cpu_us: u64::from(cpus) * 100_000,
    }
}

/// Bounds of a slot's VMM and vmctl; `pids` as asked, 0 for the default.
#[must_use]
pub fn vm_bounds(memory_mb: u32, cpus: u32, translator_mb: u64, pids: u32) -> Bounds {
    Bounds {
        memory_bytes: Some((u64::from(memory_mb) + VMM_OVERHEAD_MB + translator_mb) * MIB),
        memory_min_bytes: 0,
        pids: Some(vm_pids(cpus, pids)),
        cpu_us: u64::from(cpus) * 100_000,
    }
}

/// Threads and processes of a VMM and its vmctl; `pids` as asked, 0 for the default.
#[must_use]
pub fn vm_pids(cpus: u32, pids: u32) -> u64 {
    match pids {
        0 => PIDS_MAX + u64::from(cpus),
        asked => asked.into(),
    }
}

/// Bounds of a disk's group.
#[must_use]
pub fn disk_bounds() -> Bounds {
    Bounds {
        memory_bytes: Some(DISK_MEMORY_MB * MIB),
        memory_min_bytes: DISK_MEMORY_MIN_MB * MIB,
        pids: Some(PIDS_MAX),
        cpu_us: 100_000,
    }
}

/// A handle to something of root's, for copying its mount.
fn handle(dir: impl AsRef<Path>, name: &str) -> std::io::Result<OwnedFd> {
    open_beneath(dir.as_ref(), name, OFlags::PATH, 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::Command;

    /// Of each group the file system says that its inode table is zeros: no guest writes them.
    #[test]
    fn no_guest_has_inode_tables_to_zero() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512 << 20).unwrap();
        let words = mke2fs("");
        let mut made = Command::new(&words[0]);
        let made = made.args(&words[1..]).arg(file.path()).status().unwrap();
        assert!(made.success());
        let said = Command::new("dumpe2fs").arg(file.path()).output().unwrap();
        let said = String::from_utf8_lossy(&said.stdout);
        let is_group = |line: &&str| line.starts_with("Group ") && line.contains("(Blocks");
        let groups: Vec<_> = said.lines().filter(is_group).collect();
        assert_eq!(groups.len(), 4, "{said}");
        assert!(groups.iter().all(|l| l.contains("ITABLE_ZEROED")), "{said}");
    }
}
