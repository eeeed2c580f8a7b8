//! `cargo xtask kernel`: a small hardened guest kernel, from Debian's linux-source.
//!
//! `kernel/guest.config` is the whole configuration, over `allnoconfig`: everything built in, no
//! modules. A line that Kconfig drops or changes is an error, so that an option that a newer source
//! renamed is noticed. The build names no user, machine or time.
//!
//! Must never install a package, or patch the source.

use crate::image::kernel::Kernel;
use crate::image::steps::{Cache, install, run as program};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

const PACKAGE: &str = "linux-source-6.1";
const CONFIG: &str = include_str!("kernel/guest.config");
/// What `uname -r` has behind the version.
const SUFFIX: &str = "-casemate";
/// What a build needs beside a compiler: program, Debian package.
const TOOLS: &[(&str, &str)] = &[
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("strip", "binutils"),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where it goes, as kernel/vmlinux-small.
    #[arg(long, default_value = "/var/lib/casemate/artifacts")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let cache = Cache::new(false)?;
    let kernel = build(&cache)?;
    let dir = args.out.join("kernel");
    std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    install(&kernel.vmlinux, &dir.join("vmlinux-small"))?;
    cache.done(&format!(
        "{} ({})",
        dir.join("vmlinux-small").display(),
        kernel.release
    ));
    Ok(())
}

/// Makes, or finds, the kernel. Minutes on two cores.
pub(crate) fn build(cache: &Cache) -> Result<Kernel> {
    let version = installed()?;
    let package = format!("{PACKAGE}={version}");
    let dir = cache.dir("kernel-small")?;
    let vmlinux = dir.join("vmlinux");
    let key = format!("{package}\n{CONFIG}");
    let fresh = !cache.is("kernel-small", &key) || !vmlinux.exists();
    let tree = dir.join(PACKAGE);
    if fresh {
        cache.say(
            "kernel",
            &format!("compiling {package}: some minutes"),
            false,
        );
        unpack(cache, &dir, &tree, &package)?;
        configure(&dir, &tree)?;
        compile(&tree)?;
        let from = tree.join("vmlinux");
        let args = [
            "-s".as_ref(),
            "-o".as_ref(),
            vmlinux.as_os_str(),
            from.as_os_str(),
        ];
        program("strip", "binutils", args, None)?;
        cache.made("kernel-small", &key)?;
    }
    let release = std::fs::read_to_string(tree.join("include/config/kernel.release"))
        .context("read the kernel's release")?;
    cache.say("kernel", &package, !fresh);
    Ok(Kernel {
        package,
        release: release.trim().to_owned(),
        vmlinux,
        modules: Vec::new(),
        vsock_modules: Vec::new(),
    })
}

/// The version of the source package on this machine.
fn installed() -> Result<String> {
    for (tool, package) in TOOLS {
        if program(tool, package, ["--version"], None).is_err() {
            bail!("{tool} is missing: sudo apt-get install {package}");
        }
    }
    let args = ["-W", "-f", "${db:Status-Status} ${Version}", PACKAGE];
    let text = program("dpkg-query", "dpkg", args, None).unwrap_or_default();
    let version = text.strip_prefix("installed ").map(str::to_owned);
    version.with_context(|| {
        format!(
            "{PACKAGE} is not installed: sudo apt-get install {PACKAGE} flex bison bc libelf-dev"
        )
    })
}

/// Unpacks the source, unless this version of it is there: objects in it are used again.
fn unpack(cache: &Cache, dir: &Path, tree: &Path, package: &str) -> Result<()> {
    if cache.is("kernel-source", package) && tree.join("Makefile").exists() {
        return Ok(());
    }
    if tree.exists() {
        std::fs::remove_dir_all(tree).with_context(|| format!("remove {}", tree.display()))?;
    }
    let archive = format!("/usr/src/{PACKAGE}.tar.xz");
    program("tar", "tar", ["-xJf", &archive], Some(dir)).context("unpack the kernel's source")?;
    cache.made("kernel-source", package)
}

/// Writes `.config` and compares it with what was asked for.
fn configure(dir: &Path, tree: &Path) -> Result<()> {
    let wanted = dir.join("guest.config");
    std::fs::write(&wanted, CONFIG).with_context(|| format!("write {}", wanted.display()))?;
    let given = format!("KCONFIG_ALLCONFIG={}", wanted.display());
    program("make", "make", ["-s", &given, "allnoconfig"], Some(tree))
        .context("configure the kernel")?;
    let config = std::fs::read_to_string(tree.join(".config")).context("read .config")?;
    let changed = changed(CONFIG, &config);
    if !changed.is_empty() {
        bail!(
            "the kernel's configuration does not take {}: edit xtask/src/kernel/guest.config",
            changed.join(", ")
        );
    }
    Ok(())
}

/// Lines of `wanted` that `config` does not have.
fn changed<'a>(wanted: &'a str, config: &str) -> Vec<&'a str> {
    let lines: std::collections::HashSet<&str> = config.lines().collect();
    let holds = |line: &str| match line.strip_suffix("=n") {
        Some(name) => !lines
            .iter()
            .any(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with('='))),
        None => lines.contains(line),
    };
    let options = wanted.lines().filter(|l| l.starts_with("CONFIG_"));
    options.filter(|l| !holds(l)).collect()
}

fn compile(tree: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = format!("-j{jobs}");
    let local = format!("LOCALVERSION={SUFFIX}");
    let args = [
        "-s",
        &jobs,
        "vmlinux",
        &local,
        // The same source and compiler make the same kernel.
        "KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970",
        "KBUILD_BUILD_USER=casemate",
        "KBUILD_BUILD_HOST=casemate",
    ];
    program("make", "make", args, Some(tree))
        .context("compile the kernel")
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::changed;

    #[test]
    fn a_dropped_line_is_noticed() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\nCONFIG_DD=y\n";
        assert!(
            changed(
                "# text\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=64\nCONFIG_D=n\n",
                config
            )
            .is_empty()
        );
        let wanted = "CONFIG_A=n\nCONFIG_B=y\nCONFIG_C=32\nCONFIG_DD=n\n";
        assert_eq!(changed(wanted, config).len(), 4);
    }

    #[test]
    fn the_committed_configuration_says_each_option_once() {
        let names: Vec<_> = super::CONFIG
            .lines()
            .filter(|l| l.starts_with("CONFIG_"))
            .map(|l| l.split('=').next())
            .collect();
        let set: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(set.len(), names.len());
    }
}
