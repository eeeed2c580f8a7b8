//! The driver of the VMM and its vmctl, as far as warden knows them: arguments and descriptors.

use crate::fault::{At, Result};
use crate::jail;
use crate::journal::Record;
use crate::layout::{Layout, remove};
use crate::limits::VMCTL_WAIT;
use crate::templates::Files;
use api::Error;
use api::vmctl::WardenOp;
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::os::unix::net::{UnixListener, UnixStream};

/// The VMM inside the closure.
pub const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";

/// The driver.
pub struct Vmm {
    /// /dev/kvm truly runs guests.
    pub kvm: bool,
    /// Which accelerator, and why.
    pub accel_why: String,
}

impl Vmm {
    /// Finds out which accelerator runs guests here.
    #[must_use]
    pub fn probe() -> Self {
        Self {
            kvm: false,
            accel_why: "tcg".into(),
        }
    }

    /// Memory for translated code, MiB.
    #[must_use]
    pub fn translator_mb(&self) -> u64 {
        if self.kvm { 0 } else { TRANSLATOR_MB }
    }
}

/// Memory that TCG may use for translated code, MiB.
const TRANSLATOR_MB: u64 = 128;

/// The descriptors of both programs, in the order of their numbers from 3 on.
pub struct Ends {
    /// The VMM's: QMP, agent channel, tap, template state.
    pub vmm: Vec<OwnedFd>,
    /// vmctl's: QMP, agent channel, host's listener, warden's listener, template state.
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
            let copy = || files.state.try_clone().at("copy", "a template's state");
            ends.vmm.push(copy()?);
            ends.vmctl.push(copy()?);
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
pub fn launch(_vmm: &Vmm, record: &Record, host_uid: u32) -> Launch {
    Launch {
        vmm_argv: vec!["qemu-system-x86_64".into()],
        vmctl_argv: vec![
            "casemate-vmctl".into(),
            record.slot.to_string(),
            host_uid.to_string(),
        ],
    }
}

/// Gives vmctl the disk's file.
///
/// # Errors
/// vmctl's own; a timeout.
pub fn hand_over(layout: &Layout, slot: u16, file: OwnedFd, size_bytes: u64) -> Result {
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
        body: WardenOp::DiskFd { size_bytes },
    };
    jail::send_bytes(
        stream.as_fd(),
        &api::rpc::encode(&request)?,
        &[file.as_fd()],
    )
    .at("write", &name)?;
    let answer = api::rpc::blocking::read_frame(&mut stream).at("read", &name)?;
    let answer = answer.ok_or_else(|| Error::internal("vmctl closed without an answer"))?;
    api::rpc::decode::<api::rpc::Reply<bool>>(&answer)?
        .into_result()
        .map(drop)
}
