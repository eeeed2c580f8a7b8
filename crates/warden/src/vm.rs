//! The driver of the VMM and its vmctl, as far as warden knows them: arguments and descriptors.

use crate::fault::{At, Result};
use crate::jail;
use crate::journal::Record;
use crate::layout::{Digests, Layout, hex, read_small, remove, write_small};
use crate::limits::VMCTL_WAIT;
use crate::templates::Files;
use api::Error;
use api::vmctl::WardenOp;
use api::warden::Start;
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::os::unix::net::{UnixListener, UnixStream};
use vmm::qemu::{Accel, How, Paths, Spec};

/// The VMM inside the closure.
pub const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// The guest's kernel, among the artifacts and in the jail.
pub const KERNEL: &str = "kernel/vmlinux";
/// Its first file system.
pub const INITRAMFS: &str = "kernel/initramfs.cpio";

/// The driver.
pub struct Vmm {
    /// /dev/kvm truly runs guests.
    pub kvm: bool,
    /// Which accelerator, and why.
    pub accel_why: String,
}

/// What a probe found, and for what: another boot or another VMM asks again.
#[derive(serde::Serialize, serde::Deserialize)]
struct Probed {
    key: String,
    kvm: bool,
    why: String,
}

impl Vmm {
    /// Finds out which accelerator runs guests here, by running one (trusted, 64 KiB, no devices);
    /// once per boot and VMM.
    ///
    /// # Errors
    /// When there is no VMM among the artifacts.
    pub fn probe(layout: &Layout) -> Result<Self> {
        let program = layout.artifacts().join(format!("closure{PROGRAM}"));
        let file = std::fs::File::open(&program).at("open", program.display())?;
        let digest = Digests::default().of(&file, PROGRAM)?;
        let boot =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").at("read", "the boot id")?;
        let key = format!("{} {digest}", boot.trim());
        let cache = layout.state().join("accel.json");
        let cached =
            read_small(&cache)?.and_then(|text| serde_json::from_str::<Probed>(&text).ok());
        let probed = match cached.filter(|c| c.key == key) {
            Some(probed) => probed,
            None => {
                let vmm::kvm::Probe { usable, why } = vmm::kvm::probe(&program, &layout.state());
                let probed = Probed {
                    key,
                    kvm: usable,
                    why,
                };
                let text = serde_json::to_string(&probed).at("write", cache.display())?;
                write_small(&cache, &text, 0o600, false)?;
                probed
            }
        };
        Ok(Self {
            kvm: probed.kvm,
            accel_why: probed.why,
        })
    }

    /// Memory for translated code, MiB.
    #[must_use]
    pub fn translator_mb(&self) -> u64 {
        if self.kvm { 0 } else { TRANSLATOR_MB }
    }

    /// Names the machine that a template is a state of: all of its arguments.
    #[must_use]
    pub fn machine(&self, memory_mb: u32, cpus: u32) -> String {
        let arguments = self.arguments(How::Template, memory_mb, cpus).join("\0");
        hex(&seal::hash::sha256(arguments.as_bytes()))
    }

    /// The VMM's arguments, its name first: constants of the driver and numbers, all of it ASCII.
    fn arguments(&self, how: How, memory_mib: u32, cpus: u32) -> Vec<String> {
        let accel = if self.kvm { Accel::Kvm } else { Accel::Tcg };
        let spec = Spec {
            how,
            memory_mib,
            cpus,
            accel,
            net: vmm::qemu::Net::Tap,
            paths: Paths::jail(),
        };
        let name = std::iter::once("qemu-system-x86_64".into());
        name.chain(
            vmm::qemu::argv(&spec)
                .into_iter()
                .map(|a| a.to_string_lossy().into_owned()),
        )
        .collect()
    }
}

/// Memory that TCG may use for translated code: the VMM's own bound, MiB.
const TRANSLATOR_MB: u64 = vmm::qemu::argv::TRANSLATOR_MIB;

/// The descriptors of both programs, in the order of their numbers from 3 on.
pub struct Ends {
    /// The VMM's: QMP, agent channel, tap, template state.
    pub vmm: Vec<OwnedFd>,
    /// vmctl's: QMP, agent channel, host's listener, warden's listener.
    pub vmctl: Vec<OwnedFd>,
}

impl Ends {
    /// Makes the channels between them, and the sockets to vmctl.
    ///
    /// # Errors
    /// A descriptor's.
    pub fn new(layout: &Layout, slot: u16, tap: OwnedFd, files: Option<&Files>) -> Result<Self> {
        let pair = || {
            rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC,
                None,
            )
            .at("make", "a channel")
        };
        let (qmp, vmctl_qmp) = pair()?;
        let (agent, vmctl_agent) = pair()?;
        let mut ends = Self {
            vmm: vec![qmp, agent, tap],
            vmctl: vec![
                vmctl_qmp,
                vmctl_agent,
                listener(layout, &format!("{slot}.sock"), 0o666)?,
                listener(layout, &format!("{slot}.warden.sock"), 0o600)?,
            ],
        };
        if let Some(files) = files {
            ends.vmm
                .push(files.state.try_clone().at("copy", "a template's state")?);
        }
        Ok(ends)
    }
}

fn listener(layout: &Layout, name: &str, mode: u32) -> Result<OwnedFd> {
    let path = layout.vmctl().join(name);
    remove(&path)?;
    let listener = UnixListener::bind(&path).at("bind", path.display())?;
    rustix::fs::chmod(&path, Mode::from_raw_mode(mode)).at("set the mode of", path.display())?;
    Ok(listener.into())
}

/// Arguments of both programs.
pub struct Launch {
    /// The VMM's.
    pub vmm_argv: Vec<String>,
    /// vmctl's: numbers.
    pub vmctl_argv: Vec<String>,
}

/// Says how both programs are started.
#[must_use]
pub fn launch(vmm: &Vmm, record: &Record, host_uid: u32) -> Launch {
    let (how, word) = match record.how {
        Start::Template => (How::Template, "template"),
        Start::Cold => (How::Cold, "cold"),
        Start::Build => (How::Build, "build"),
    };
    let vmm_argv = vmm.arguments(how, record.memory_mb, record.cpus);
    let (slot, uid) = (record.slot.to_string(), host_uid.to_string());
    let vmctl_argv = [
        "casemate-vmctl",
        "--slot",
        &slot,
        "--how",
        word,
        "--host-uid",
        &uid,
    ];
    Launch {
        vmm_argv,
        vmctl_argv: vmctl_argv.map(String::from).into(),
    }
}

/// Tells vmctl about the disk.
///
/// # Errors
/// vmctl's own; a timeout.
pub fn tell(layout: &Layout, slot: u16, op: WardenOp, fds: &[BorrowedFd<'_>]) -> Result {
    let path = layout.vmctl().join(format!("{slot}.warden.sock"));
    let name = path.display().to_string();
    let mut stream = UnixStream::connect(&path).at("connect", &name)?;
    stream
        .set_read_timeout(Some(VMCTL_WAIT))
        .at("set timeout of", &name)?;
    stream
        .set_write_timeout(Some(VMCTL_WAIT))
        .at("set timeout of", &name)?;
    let request = api::rpc::Request {
        v: api::rpc::VERSION,
        id: 1,
        request_id: "internal:warden".into(),
        body: op,
    };
    jail::send_bytes(stream.as_fd(), &api::rpc::encode(&request)?, fds).at("write", &name)?;
    let answer = api::rpc::blocking::read_frame(&mut stream).at("read", &name)?;
    let answer = answer.ok_or_else(|| Error::internal("vmctl closed without an answer"))?;
    api::rpc::decode::<api::rpc::Reply<bool>>(&answer)?
        .into_result()
        .map(drop)
}
