//! `casemate doctor`: what is missing or weakened on this machine, and the command that mends it.
//!
//! Must never change anything.

use service::config::Config;
use service::paths::Paths;
use std::path::Path;
use std::process::Command;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It runs, but a claim is weaker; the finding names it.
    Weakened,
    /// It can't run.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// How it is.
    pub level: Level,
    /// What was seen, and the claims that it weakens.
    pub seen: String,
    /// The command that mends it; empty if there is none.
    pub mend: String,
}

/// Programs that the platform runs, and the Debian package of each.
const PROGRAMS: &[(&str, &str)] = &[
    ("setpriv", "util-linux"),
    ("nsenter", "util-linux"),
    ("ip", "iproute2"),
    ("getent", "libc-bin"),
    ("useradd", "passwd"),
];

/// Makes the file system of each new disk.
const MKFS: &str = "mkfs.ext4";
/// The first mke2fs that knows `assume_storage_prezeroed`.
const MKFS_SINCE: (u32, u32) = (1, 47);

/// QEMU, in the VMM's closure or on the machine.
const QEMU: &str = "usr/bin/qemu-system-x86_64";
/// No VMM's executable is larger, bytes.
const EXECUTABLE_MAX_BYTES: u64 = 64 << 20;

/// Prints the findings; 1 if something is missing.
///
/// # Errors
/// Never; the signature is that of the other commands.
pub fn run(paths: &Paths, config: &Config, as_json: bool) -> anyhow::Result<u8> {
    let findings = look(paths, config);
    if as_json {
        println!("{}", serde_json::to_string(&findings)?);
    } else {
        for f in &findings {
            let mark = match f.level {
                Level::Ok => "ok      ",
                Level::Weakened => "weakened",
                Level::Missing => "MISSING ",
            };
            println!("{mark}  {:<22} {}", f.what, f.seen);
            if !f.mend.is_empty() && f.level != Level::Ok {
                println!("{:>34} {}", "mend:", f.mend);
            }
        }
    }
    Ok(u8::from(findings.iter().any(|f| f.level == Level::Missing)))
}

/// Looks at everything.
#[must_use]
pub fn look(paths: &Paths, config: &Config) -> Vec<Finding> {
    let mut out = vec![
        root(),
        kernel(),
        landlock(),
        secret_memory(),
        fuse(),
        driver(paths),
        cgroup(),
    ];
    out.extend(
        PROGRAMS
            .iter()
            .map(|(program, package)| program_there(program, package)),
    );
    out.push(mkfs());
    out.push(library("libnftables.so.1", "libnftables1"));
    out.push(artifacts(paths));
    out.push(swap());
    out.push(cores());
    out.push(unseal(config));
    out
}

fn finding(what: &'static str, level: Level, seen: impl Into<String>, mend: &str) -> Finding {
    Finding {
        what,
        level,
        seen: seen.into(),
        mend: mend.into(),
    }
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        finding("root", Level::Ok, "running as root", "")
    } else {
        finding(
            "root",
            Level::Missing,
            "jails, taps and mounts need root",
            "sudo casemate doctor",
        )
    }
}

/// The production floor is 6.12: Landlock ABI 6, memfd_secret on by default.
fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut parts = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|p| p.parse::<u32>());
    let version = (
        parts.next().and_then(Result::ok),
        parts.next().and_then(Result::ok),
    );
    match version {
        (Some(major), Some(minor)) if (major, minor) >= (6, 12) => {
            finding("kernel", Level::Ok, release, "")
        }
        _ => finding(
            "kernel",
            Level::Weakened,
            format!(
                "{release} is below 6.12: ISO-3 loses Landlock's signal and socket scopes, KMS-5 may lose secret memory"
            ),
            "apt-get install -t bookworm-backports linux-image-amd64",
        ),
    }
}

/// Asks the kernel for a ruleset of each version, and enforces none.
fn landlock() -> Finding {
    use landlock::{
        ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset,
        RulesetAttr as _, Scope,
    };
    let has = |abi: ABI| {
        Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(abi))
            .and_then(|r| r.handle_access(AccessNet::from_all(abi)))
            .and_then(|r| r.scope(Scope::from_all(abi)))
            .and_then(Ruleset::create)
            .is_ok()
    };
    if has(ABI::V6) {
        finding("Landlock", Level::Ok, "ABI 6 or later", "")
    } else {
        finding(
            "Landlock",
            Level::Weakened,
            "below ABI 6: ISO-3 loses the signal and socket scopes, and rests on namespaces and seccomp there",
            "boot a kernel of 6.12 or later, with landlock in its lsm= parameter",
        )
    }
}

fn secret_memory() -> Finding {
    match seal::secret::SecretArena::new(4096) {
        Ok(_) => finding("secret memory", Level::Ok, "memfd_secret works", ""),
        Err(e) => finding(
            "secret memory",
            Level::Missing,
            format!("memfd_secret: {e}; keys would be readable by root through /proc"),
            "boot with secretmem.enable=1",
        ),
    }
}

fn device(path: &str) -> bool {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .is_ok()
}

fn fuse() -> Finding {
    if device("/dev/fuse") {
        finding("FUSE", Level::Ok, "/dev/fuse opens", "")
    } else {
        finding(
            "FUSE",
            Level::Missing,
            "/dev/fuse does not open",
            "modprobe fuse",
        )
    }
}

/// Which driver runs guests here. KVM is asked by running one (trusted, 64 KiB, no devices).
fn driver(paths: &Paths) -> Finding {
    let artifacts = paths.artifacts();
    let closure = artifacts.join("closure").join(QEMU);
    let qemu = if closure.exists() {
        closure
    } else {
        Path::new("/").join(QEMU)
    };
    // Root's own, and there before anything is installed.
    let kvm = vmm::kvm::probe(&qemu, Path::new("/run"));
    let firecracker = artifacts.join(vmm::firecracker::pin::ARTIFACT);
    let found = match digest(&firecracker) {
        Ok(digest) => vmm::driver::Found::of(digest.as_deref()),
        Err(e) => vmm::driver::Found::Other(format!("unknown: {e}")),
    };
    let choice = vmm::driver::choose(&kvm, &found);
    if kvm.usable {
        finding("VMM", Level::Ok, choice.why, "")
    } else {
        finding(
            "VMM",
            Level::Weakened,
            format!("{}; ISO-1 is not hardware-enforced", choice.why),
            "use a machine with hardware virtualisation, enabled in its firmware; modprobe kvm_amd or kvm_intel",
        )
    }
}

/// SHA-256 of a file, lowercase hex; `None` if there is none.
fn digest(path: &Path) -> std::io::Result<Option<String>> {
    use std::io::Read as _;
    let file = match std::fs::File::open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    // One byte above the bound makes it another file's digest.
    file.take(EXECUTABLE_MAX_BYTES + 1)
        .read_to_end(&mut bytes)?;
    Ok(Some(hex::encode(seal::hash::sha256(&bytes))))
}

fn cgroup() -> Finding {
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let v1 = ["cpu", "memory", "pids"]
        .iter()
        .all(|c| Path::new("/sys/fs/cgroup").join(c).is_dir());
    if ["cpu", "memory", "pids"]
        .iter()
        .all(|c| v2.split_whitespace().any(|x| x == *c))
    {
        finding("cgroups", Level::Ok, "v2", "")
    } else if v1 {
        finding("cgroups", Level::Ok, "v1 holds the controllers", "")
    } else {
        finding(
            "cgroups",
            Level::Weakened,
            "no cpu, memory and pids controllers: ISO-8 has no limits",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

fn program_there(program: &'static str, package: &str) -> Finding {
    let dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    match dirs
        .iter()
        .map(|d| Path::new(d).join(program))
        .find(|p| p.exists())
    {
        Some(path) => finding(program, Level::Ok, path.display().to_string(), ""),
        None => finding(
            program,
            Level::Missing,
            "not found",
            &format!("apt-get install {package}"),
        ),
    }
}

/// One that is too old refuses what it is asked, and no new workspace would start.
fn mkfs() -> Finding {
    let there = program_there(MKFS, "e2fsprogs");
    if there.level != Level::Ok {
        return there;
    }
    let said = Command::new(&there.seen).arg("-V").output();
    let said = said.map(|o| String::from_utf8_lossy(&o.stderr).into_owned());
    let said = said.unwrap_or_default();
    let (level, needs) = match mke2fs_version(&said) {
        Some(version) if version >= MKFS_SINCE => (Level::Ok, ""),
        _ => (Level::Missing, "; disks need 1.47 or later"),
    };
    let seen = format!(
        "{}: {}{needs}",
        there.seen,
        said.lines().next().unwrap_or("?")
    );
    let mend = "apt-get install e2fsprogs # of Debian 12 or later";
    finding(MKFS, level, seen, mend)
}

/// Of `mke2fs 1.47.0 (5-Feb-2023)`, 1 and 47.
fn mke2fs_version(said: &str) -> Option<(u32, u32)> {
    let mut parts = said.strip_prefix("mke2fs ")?.split(['.', '-', ' ', '\n']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn library(name: &'static str, package: &str) -> Finding {
    let out = Command::new("/sbin/ldconfig").arg("-p").output();
    match out {
        Ok(o) if String::from_utf8_lossy(&o.stdout).contains(name) => {
            finding(name, Level::Ok, "in the loader's cache", "")
        }
        _ => finding(
            name,
            Level::Missing,
            "not found",
            &format!("apt-get install {package}"),
        ),
    }
}

fn artifacts(paths: &Paths) -> Finding {
    let manifest = paths.artifacts().join("manifest.json");
    if manifest.exists() {
        finding(
            "kernel and images",
            Level::Ok,
            paths.artifacts().display().to_string(),
            "",
        )
    } else {
        finding(
            "kernel and images",
            Level::Missing,
            format!("{} is missing", manifest.display()),
            &format!("cargo xtask image --out {}", paths.artifacts().display()),
        )
    }
}

fn swap() -> Finding {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().count() <= 1 {
        finding("swap", Level::Ok, "none", "")
    } else {
        finding(
            "swap",
            Level::Weakened,
            "on: guest memory can reach a disk in clear (DSK-7, DSK-8); keys can't, they are in secret memory",
            "swapoff -a, and take it out of /etc/fstab",
        )
    }
}

fn cores() -> Finding {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    finding(
        "core dumps",
        Level::Ok,
        format!(
            "pattern {:?}; every process of the platform that holds a key forbids its own",
            pattern.trim()
        ),
        "",
    )
}

fn unseal(config: &Config) -> Finding {
    match config.kms.unseal {
        api::kms::Unseal::Passphrase => finding("KMS unseal", Level::Ok, "passphrase", ""),
        api::kms::Unseal::File => finding(
            "KMS unseal",
            Level::Weakened,
            "a file beside the ciphertext: KMS-2, DSK-3 and DSK-8 are not_yet",
            "set kms.unseal = \"passphrase\" in casemate.toml before the first `casemate up`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{MKFS_SINCE, mke2fs_version};

    #[test]
    fn mke2fs_says_how_old_it_is() {
        let now =
            mke2fs_version("mke2fs 1.47.0 (5-Feb-2023)\n\tUsing EXT2FS Library version 1.47.0");
        assert_eq!(now, Some((1, 47)));
        let rc = mke2fs_version("mke2fs 1.48-rc1 (1-Jan-2027)");
        assert_eq!(rc, Some((1, 48)));
        assert!(mke2fs_version("mke2fs 1.46.5 (30-Dec-2021)").is_some_and(|old| old < MKFS_SINCE));
        assert!(mke2fs_version("mke2fs 2.0 (1-Jan-2030)").is_some_and(|new| new >= MKFS_SINCE));
        for other in [
            "",
            "mke2fs",
            "mke2fs ",
            "mke2fs x.y",
            "mke2fs 1",
            "BusyBox v1.36",
        ] {
            assert_eq!(mke2fs_version(other), None, "{other:?}");
        }
    }
}
