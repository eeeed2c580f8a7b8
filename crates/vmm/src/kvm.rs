//! Whether KVM truly runs a guest here.
//!
//! `/dev/kvm` that opens proves nothing: under nested PVM it does, and an ordinary kernel crawls.
//! So the probe runs instructions and looks at the clock: QEMU with a ROM of 64 KiB that counts
//! down in real mode and then leaves by the debug-exit port. Hardware does that in milliseconds.

use crate::limits::PROBE_MAX;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The answer; the caller keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Use [`crate::qemu::Accel::Kvm`].
    pub usable: bool,
    /// Which and why, for the operator.
    pub why: String,
}

/// Iterations of the ROM's loop: two instructions each.
const COUNT: u32 = 20_000_000;
/// The ROM's exit value; QEMU exits with twice that and one.
const EXIT_VALUE: u8 = 0x31;

/// Runs `qemu` with KVM, for [`PROBE_MAX`] at most. `scratch` is a directory for the ROM's file.
#[must_use]
pub fn probe(qemu: &Path, scratch: &Path) -> Probe {
    if let Err(e) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Probe {
            usable: false,
            why: format!("TCG: /dev/kvm can't be opened: {e}"),
        };
    }
    match run(qemu, scratch, "kvm", PROBE_MAX) {
        Ok(took) => Probe {
            usable: true,
            why: format!(
                "KVM: ran {COUNT} loops of a guest in {} ms",
                took.as_millis()
            ),
        },
        Err(why) => Probe {
            usable: false,
            why: format!("TCG: /dev/kvm opens, but {why}"),
        },
    }
}

/// Runs the ROM under `accel`.
fn run(qemu: &Path, scratch: &Path, accel: &str, limit: Duration) -> Result<Duration, String> {
    let mut rom = tempfile::NamedTempFile::new_in(scratch)
        .map_err(|e| format!("no file could be made in {}: {e}", scratch.display()))?;
    rom.write_all(&rom_image())
        .and_then(|()| rom.flush())
        .map_err(|e| format!("the probe's ROM could not be written: {e}"))?;
    let start = Instant::now();
    let child = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-m", "64M", "-accel", accel])
        .args(["-machine", "microvm,x-option-roms=off,acpi=off"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"])
        .arg("-bios")
        .arg(rom.path())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{} could not be started: {e}", qemu.display()))?;
    match wait(child, start + limit)? {
        Some(code) if code == i32::from(EXIT_VALUE) * 2 + 1 => Ok(start.elapsed()),
        Some(code) => Err(format!("its guest failed (exit {code})")),
        None => Err(format!(
            "its guest did not count to {COUNT} in {} ms: emulated, as under a nested hypervisor",
            limit.as_millis()
        )),
    }
}

/// The exit code (-1 for a signal); `None`, and the child killed, at the deadline.
fn wait(mut child: Child, deadline: Instant) -> Result<Option<i32>, String> {
    let pid = rustix::process::Pid::from_child(&child);
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
        .map_err(|e| format!("pidfd_open: {e}"));
    let ended = fd.and_then(|fd| {
        crate::qemu::qmp::readable(&fd, deadline).map_err(|e| format!("wait for it: {e}"))
    });
    if !matches!(ended, Ok(true)) {
        // Gone already is good; the wait below reaps it either way.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| format!("wait for it: {e}"))?;
    Ok(ended?.then(|| status.code().unwrap_or(-1)))
}

/// 64 KiB that end at 4 GiB: the reset vector jumps to the counting loop.
fn rom_image() -> Vec<u8> {
    let mut rom = vec![0xf4u8; 64 << 10]; // hlt
    let [a, b, c, d] = COUNT.to_le_bytes();
    let code = [
        0x66, 0xb9, a, b, c, d, // mov ecx, COUNT
        0x66, 0x49, // 1: dec ecx
        0x75, 0xfc, // jnz 1b
        0xb0, EXIT_VALUE, // mov al, EXIT_VALUE
        0xe6, 0xf4, // out 0xf4, al
        0xf4, // hlt
    ];
    let at = 0xff00;
    rom[at..at + code.len()].copy_from_slice(&code);
    // jmp short back to 0xff00 does not reach: jmp near from 0xfff0, relative to 0xfff3.
    rom[0xfff0] = 0xe9;
    rom[0xfff1..0xfff3].copy_from_slice(&0xff0du16.to_le_bytes());
    rom
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const QEMU: &str = "/usr/bin/qemu-system-x86_64";

    /// The ROM itself works: the translator runs it to its end.
    #[test]
    fn the_rom_counts_and_leaves() {
        let dir = tempfile::tempdir().unwrap();
        run(Path::new(QEMU), dir.path(), "tcg", Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_probe_always_answers_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let p = probe(Path::new(QEMU), dir.path());
        assert!(
            p.why.starts_with(if p.usable { "KVM: " } else { "TCG: " }),
            "{p:?}"
        );
        let p = probe(Path::new("/nonexistent/qemu"), dir.path());
        assert!(!p.usable);
    }
}
