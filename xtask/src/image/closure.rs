//! The VMM's closure: QEMU, every library it loads, its firmware. It is the root of a VMM's jail,
//! laid out so that no loader cache is needed.

use super::steps::{Cache, copy, file_sha256, run};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// The one firmware that the machine boots by.
const FIRMWARE: &str = "/usr/share/qemu/qboot.rom";
/// Accelerators that some builds load at run time; absent where they are built in.
const ACCELERATORS: &[&str] = &["accel-tcg-x86_64.so"];
const MODULES: &str = "/usr/lib/x86_64-linux-gnu/qemu";
/// The first version that takes a template's memory read-only.
const VERSION_MIN: u32 = 10;

#[derive(Serialize)]
pub(crate) struct Closure {
    qemu: String,
    /// SHA-256 by path.
    files: BTreeMap<String, String>,
}

/// Makes `to` hold the closure.
pub(crate) fn install(cache: &Cache, to: &Path) -> Result<Closure> {
    let files = collect()?;
    let qemu = version()?;
    let mut key = qemu.clone();
    for f in &files {
        let m = f
            .metadata()
            .with_context(|| format!("look at {}", f.display()))?;
        // Writing to a String can't fail.
        let _ = write!(key, "\n{} {} {}", f.display(), m.len(), m.mtime());
    }
    let marker = format!("{key}\n{}", to.display());
    let fresh = !cache.is("closure", &marker) || !to.join(&QEMU[1..]).exists();
    if fresh {
        copy_all(&files, to)?;
        cache.made("closure", &marker)?;
    }
    cache.say("closure", &format!("{qemu}, {} files", files.len()), !fresh);
    let files = files
        .iter()
        .map(|f| {
            let at = in_closure(f);
            Ok((at.display().to_string(), file_sha256(&to.join(&at))?))
        })
        .collect::<Result<_>>()?;
    Ok(Closure { qemu, files })
}

fn version() -> Result<String> {
    let text = run(QEMU, PACKAGE, ["--version"], None)?;
    let line = text.lines().next().unwrap_or_default();
    let version = line
        .strip_prefix("QEMU emulator version ")
        .unwrap_or(line)
        .to_owned();
    let major = version
        .split('.')
        .next()
        .and_then(|v| v.parse::<u32>().ok());
    if major.is_none_or(|m| m < VERSION_MIN) {
        bail!(
            "QEMU {version} can't take a template's memory read-only; install {VERSION_MIN} or \
             later: sudo apt-get install -t bookworm-backports {PACKAGE}"
        );
    }
    Ok(version)
}

/// The files, by the names that programs use for them.
fn collect() -> Result<BTreeSet<PathBuf>> {
    if !Path::new(QEMU).exists() {
        bail!("{QEMU} is not installed: sudo apt-get install -t bookworm-backports {PACKAGE}");
    }
    if !Path::new(FIRMWARE).exists() {
        bail!("{FIRMWARE} is not installed: sudo apt-get install qemu-system-data");
    }
    let mut programs = vec![PathBuf::from(QEMU)];
    for name in ACCELERATORS {
        let path = Path::new(MODULES).join(name);
        if path.exists() {
            programs.push(path);
        }
    }
    let mut files = BTreeSet::from([PathBuf::from(FIRMWARE)]);
    for program in programs {
        let text = run("ldd", "libc-bin", [program.as_os_str()], None)?;
        for line in text.lines() {
            if line.contains("not found") {
                bail!("{}: library missing: {}", program.display(), line.trim());
            }
            // `name => /path (address)`, or `/path (address)` for the loader.
            let path = line.split_whitespace().find(|w| w.starts_with('/'));
            files.extend(path.map(PathBuf::from));
        }
        files.insert(program);
    }
    Ok(files)
}

fn copy_all(files: &BTreeSet<PathBuf>, to: &Path) -> Result<()> {
    let (new, old) = (to.with_extension("new"), to.with_extension("old"));
    for dir in [&new, &old] {
        if dir.exists() {
            std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
        }
    }
    for file in files {
        let at = new.join(in_closure(file));
        let dir = at.parent().context("a file's directory")?;
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        copy(file, &at)?;
        let mode = file.metadata()?.permissions().mode();
        std::fs::set_permissions(&at, PermissionsExt::from_mode(mode & 0o555))?;
    }
    for (name, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        std::os::unix::fs::symlink(target, new.join(name))
            .with_context(|| format!("link {name}"))?;
    }
    if to.exists() {
        std::fs::rename(to, &old).with_context(|| format!("rename {}", to.display()))?;
    }
    std::fs::rename(&new, to).with_context(|| format!("rename to {}", to.display()))?;
    if old.exists() {
        // What runs keeps its files.
        std::fs::remove_dir_all(&old).with_context(|| format!("remove {}", old.display()))?;
    }
    Ok(())
}

/// `/lib/x` and `/usr/lib/x` are one, as on Debian itself.
fn in_closure(file: &Path) -> PathBuf {
    let file = file.strip_prefix("/").unwrap_or(file);
    if file.starts_with("lib") || file.starts_with("lib64") {
        Path::new("usr").join(file)
    } else {
        file.to_owned()
    }
}
