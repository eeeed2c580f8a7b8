//! casemate-vmctl: one VM's control, behind a closed enum.
//!
//! Started by warden, one per VM, as a uid of its own. Inherits: 3 the VMM's QMP socket, 4 the
//! guest's channel, 5 the listener for host, 6 the listener for warden.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use vmm::agent::Channel;
use vmm::qemu::{How, Qemu};
use vmm::server::Server;
use vmm::vmctl::Vm;

struct Args {
    slot: u16,
    how: How,
    host_uid: u32,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            vmm::log::line("error", 0, "vmctl ends", Some(&format!("{e:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args = args(std::env::args().skip(1))?;
    let qmp = inherited(3, "the VMM's control socket")?;
    let agent = inherited(4, "the guest's channel")?;
    let host = inherited(5, "host's listener")?;
    let warden = inherited(6, "warden's listener")?;
    vmm::sandbox::enter().context("enter the sandbox")?;
    let vmm = Qemu::new(qmp.into()).context("greet the VMM")?;
    let agent = Channel::new(agent.into()).context("open the guest's channel")?;
    let vm = Vm::new(args.slot, args.how, vmm, agent);
    vmm::log::line("info", args.slot, "ready", None);
    Server::new(args.slot, vm, host.into(), warden.into(), args.host_uid)
        .and_then(|mut s| s.run())
        .context("serve")
}

/// A copy of descriptor `number`, which whoever started us left open.
fn inherited(number: i32, what: &str) -> Result<OwnedFd> {
    // The one way to own an inherited descriptor without a claim that the compiler can't check.
    let this = pidfd_open(getpid(), PidfdFlags::empty()).context("pidfd_open of this process")?;
    pidfd_getfd(&this, number, PidfdGetfdFlags::empty())
        .with_context(|| format!("descriptor {number}, {what}, was not inherited"))
}

fn args(mut words: impl Iterator<Item = String>) -> Result<Args> {
    let (mut slot, mut how, mut host_uid) = (None, None, None);
    while let Some(name) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{name} needs a value"))?;
        let number = || {
            value
                .parse::<u32>()
                .with_context(|| format!("{name} needs a number"))
        };
        match name.as_str() {
            "--slot" => slot = Some(u16::try_from(number()?).context("--slot is above 65535")?),
            "--how" => {
                how = Some(match value.as_str() {
                    "template" => How::Template,
                    "cold" => How::Cold,
                    "build" => How::Build,
                    _ => bail!("--how must be template, cold or build"),
                });
            }
            "--host-uid" => host_uid = Some(number()?),
            _ => bail!("unknown argument {name}; known: --slot, --how, --host-uid"),
        }
    }
    Ok(Args {
        slot: slot.context("--slot is missing")?,
        how: how.context("--how is missing")?,
        host_uid: host_uid.context("--host-uid is missing")?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(words: &str) -> Result<Args> {
        args(words.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments() {
        let a = parse("--slot 3 --how cold --host-uid 42").unwrap();
        assert_eq!((a.slot, a.how, a.host_uid), (3, How::Cold, 42));
        for bad in [
            "",
            "--slot",
            "--slot 70000 --how cold --host-uid 1",
            "--slot 1 --how warm --host-uid 1",
            "--slot 1 --how cold",
            "--slot 1 --how cold --host-uid -1",
            "--slot 1 --how cold --host-uid 1 --monitor x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
