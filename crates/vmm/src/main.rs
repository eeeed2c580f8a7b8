//! casemate-vmctl: one VM's control, behind a closed enum.
//!
//! Started by warden, one per VM, as a uid of its own. Inherits: 3 the VMM's control socket,
//! connected; 4 the guest's channel, connected; 5 the listener for host; 6 the listener for warden.
//! Firecracker makes its control socket itself: a helper in its jail connects to it, and sends the
//! connection over 3, with the listener that the guest's vsock connection comes out of.

#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use vmm::Vmm;
use vmm::agent::Channel;
use vmm::driver::Driver;
use vmm::firecracker::{self, Firecracker};
use vmm::qemu::{How, Qemu};
use vmm::server::Server;
use vmm::vmctl::Vm;

struct Args {
    slot: u16,
    how: How,
    host_uid: u32,
    driver: Driver,
    /// Firecracker's alone: QEMU has them from its command line.
    memory_mib: u32,
    cpus: u32,
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
    let control = inherited(3, "the VMM's control socket")?;
    let agent = inherited(4, "the guest's channel")?;
    let host = inherited(5, "host's listener")?;
    let warden = inherited(6, "warden's listener")?;
    vmm::sandbox::enter().context("enter the sandbox")?;
    let channel = "open the guest's channel";
    match args.driver {
        Driver::Qemu => {
            let vmm = Qemu::new(control.into()).context("greet the VMM")?;
            let agent = Channel::new(agent.into()).context(channel)?;
            serve(&args, vmm, agent, host, warden)
        }
        Driver::Firecracker => {
            let spec = firecracker::Spec {
                how: args.how,
                memory_mib: args.memory_mib,
                cpus: args.cpus,
                tap: true,
                limits: firecracker::Limits::default(),
                paths: firecracker::Paths::jail(),
            };
            let (control, agent) = firecracker::connected(&control).context("reach the VMM")?;
            let vmm = Firecracker::new(control, spec).context("greet the VMM")?;
            let agent = Channel::listen(agent).context(channel)?;
            serve(&args, vmm, agent, host, warden)
        }
    }
}

fn serve(args: &Args, vmm: impl Vmm, agent: Channel, host: OwnedFd, warden: OwnedFd) -> Result<()> {
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
    let (mut driver, mut memory_mib, mut cpus) = (Driver::Qemu, None, None);
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
                    "wake" => How::Wake,
                    _ => bail!("--how must be template, cold, build or wake"),
                });
            }
            "--host-uid" => host_uid = Some(number()?),
            "--driver" => {
                driver = match value.as_str() {
                    "qemu" => Driver::Qemu,
                    "firecracker" => Driver::Firecracker,
                    _ => bail!("--driver must be qemu or firecracker"),
                };
            }
            "--memory-mib" => memory_mib = Some(number()?),
            "--cpus" => cpus = Some(number()?),
            _ => bail!(
                "unknown argument {name}; known: --slot, --how, --host-uid, --driver, \
                 --memory-mib, --cpus"
            ),
        }
    }
    if driver == Driver::Firecracker && (memory_mib.is_none() || cpus.is_none()) {
        bail!("--driver firecracker needs --memory-mib and --cpus");
    }
    Ok(Args {
        driver,
        memory_mib: memory_mib.unwrap_or_default(),
        cpus: cpus.unwrap_or_default(),
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
        assert_eq!(a.driver, Driver::Qemu);
        let firecracker = "--slot 3 --how cold --host-uid 42 --driver firecracker";
        let a = parse(&format!("{firecracker} --memory-mib 256 --cpus 2")).unwrap();
        assert_eq!(a.driver, Driver::Firecracker);
        assert_eq!((a.memory_mib, a.cpus), (256, 2));
        assert!(parse(&format!("{firecracker} --cpus 2")).is_err());
        for bad in [
            "",
            "--slot",
            "--slot 70000 --how cold --host-uid 1",
            "--slot 1 --how warm --host-uid 1",
            "--slot 1 --how cold",
            "--slot 1 --how cold --host-uid -1",
            "--slot 1 --how cold --host-uid 1 --monitor x",
            "--slot 1 --how cold --host-uid 1 --driver bhyve",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
