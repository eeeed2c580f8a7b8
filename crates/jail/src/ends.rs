//! The channels between a VMM, its vmctl, host and warden.

use crate::channel;
use crate::fault::{At, Result};
use crate::limits::VMCTL_WAIT;
use crate::small::remove;
use api::Error;
use api::vmctl::WardenOp;
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use rustix::fs::Mode;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// The descriptors of both programs, as [`crate::ask`] orders them.
pub struct Ends {
    /// The VMM's: QMP, agent channel.
    pub vmm: [OwnedFd; 2],
    /// vmctl's: QMP, agent channel, host's listener, warden's listener.
    pub vmctl: [OwnedFd; 4],
}

impl Ends {
    /// Makes the channels between them, and the sockets to vmctl, in the directory `vmctl`.
    ///
    /// # Errors
    /// A descriptor's.
    pub fn new(vmctl: &Path, slot: u16) -> Result<Self> {
        let pair = || UnixStream::pair().at("make a channel of slot", slot);
        let (qmp, vmctl_qmp) = pair()?;
        let (agent, vmctl_agent) = pair()?;
        let host = listener(vmctl, &format!("{slot}.sock"), 0o666)?;
        let warden = listener(vmctl, &format!("{slot}.warden.sock"), 0o600)?;
        Ok(Self {
            vmm: [qmp.into(), agent.into()],
            vmctl: [vmctl_qmp.into(), vmctl_agent.into(), host, warden],
        })
    }
}

fn listener(vmctl: &Path, name: &str, mode: u32) -> Result<OwnedFd> {
    let path = vmctl.join(name);
    remove(&path)?;
    let listener = UnixListener::bind(&path).at("bind", path.display())?;
    rustix::fs::chmod(&path, Mode::from_raw_mode(mode)).at("set the mode of", path.display())?;
    Ok(listener.into())
}

/// Tells the slot's vmctl something, by its socket in the directory `vmctl`.
///
/// # Errors
/// vmctl's own; a timeout.
pub fn tell(vmctl: &Path, slot: u16, op: WardenOp, fds: &[BorrowedFd<'_>]) -> Result {
    let path = vmctl.join(format!("{slot}.warden.sock"));
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
    channel::send_bytes(stream.as_fd(), &api::rpc::encode(&request)?, fds).at("write", &name)?;
    let answer = api::rpc::blocking::read_frame(&mut stream).at("read", &name)?;
    let answer = answer.ok_or_else(|| Error::internal("vmctl closed without an answer"))?;
    api::rpc::decode::<api::rpc::Reply<bool>>(&answer)?
        .into_result()
        .map(drop)
}
