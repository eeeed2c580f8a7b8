//! What the steps share: the cache, running programs, files by rename.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// `target/image`: what the steps made, each next to the key it was made for.
pub(crate) struct Cache {
    root: PathBuf,
    pub(crate) refresh: bool,
    start: Instant,
}

impl Cache {
    pub(crate) fn new(refresh: bool) -> Result<Self> {
        let root = workspace()?.join("target/image");
        std::fs::create_dir_all(&root).with_context(|| format!("make {}", root.display()))?;
        Ok(Self {
            root,
            refresh,
            start: Instant::now(),
        })
    }

    /// The directory of step `name`.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// Whether step `name` was last made for `key`.
    pub(crate) fn is(&self, name: &str, key: &str) -> bool {
        self.key(name).as_deref() == Some(key)
    }

    /// What step `name` was last made for.
    pub(crate) fn key(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(format!("{name}.key"))).ok()
    }

    /// Notes that step `name` is made for `key`.
    pub(crate) fn made(&self, name: &str, key: &str) -> Result<()> {
        write_if_changed(&self.root.join(format!("{name}.key")), key.as_bytes()).map(drop)
    }

    /// One line of progress.
    pub(crate) fn say(&self, step: &str, what: &str, kept: bool) {
        let kept = if kept { " (kept)" } else { "" };
        let s = self.start.elapsed().as_secs_f32();
        println!("{s:6.1} s  {step:<10} {what}{kept}");
    }

    pub(crate) fn done(&self, out: &str) {
        self.say("done", out, false);
    }
}

/// The project's directory.
pub(crate) fn workspace() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here
        .parent()
        .context("xtask lies in the workspace")?
        .to_owned())
}

/// Runs a program of Debian's; `package` is where it comes from. Gives what it printed.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &str,
    package: &str,
    args: impl IntoIterator<Item = S>,
    dir: Option<&Path>,
) -> Result<String> {
    let mut command = Command::new(program);
    command
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    if let Some(dir) = dir {
        command.current_dir(dir);
    }
    let output = match command.output() {
        Ok(o) => o,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("{program} is not installed: sudo apt-get install {package}")
        }
        Err(e) => return Err(e).with_context(|| format!("start {program}")),
    };
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = text.lines().rev().take(8).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("{program} failed ({}):\n{}", output.status, tail.join("\n"));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed no UTF-8"))
}

/// SHA-256 of a file, hex.
pub(crate) fn file_sha256(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = seal::hash::Sha256::new();
    let mut buf = vec![0; 1 << 20];
    loop {
        let n = file
            .read(&mut buf)
            .with_context(|| format!("read {}", path.display()))?;
        if n == 0 {
            return Ok(hex::encode(hash.finish()));
        }
        hash.update(&buf[..n]);
    }
}

/// Writes `bytes` under `path` by rename, if they differ from what is there.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<bool> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let new = beside(path)?;
    std::fs::write(&new, bytes).with_context(|| format!("write {}", new.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("rename to {}", path.display()))?;
    Ok(true)
}

/// Copies `from` to `to` by rename, unless `to` is a copy already.
pub(crate) fn install(from: &Path, to: &Path) -> Result<bool> {
    if same(from, to)? {
        return Ok(false);
    }
    let new = beside(to)?;
    copy(from, &new)?;
    std::fs::rename(&new, to).with_context(|| format!("rename to {}", to.display()))?;
    Ok(true)
}

/// Copies contents, and the time, by which [`install`] knows a copy.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::copy(from, to)
        .with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    let at = std::fs::metadata(from).and_then(|m| m.modified())?;
    std::fs::File::options()
        .write(true)
        .open(to)
        .and_then(|f| f.set_modified(at))
        .with_context(|| format!("set the time of {}", to.display()))
}

fn same(a: &Path, b: &Path) -> Result<bool> {
    let a = std::fs::metadata(a).with_context(|| format!("look at {}", a.display()))?;
    let Ok(b) = std::fs::metadata(b) else {
        return Ok(false);
    };
    Ok(a.len() == b.len() && a.modified()? == b.modified()?)
}

fn beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().context("a file's path")?;
    let mut new = std::ffi::OsString::from(".new-");
    new.push(name);
    Ok(path.with_file_name(new))
}

/// Building our own programs.
pub(crate) mod cargo {
    use super::{Cache, workspace};
    use anyhow::{Context, Result, bail};
    use std::path::PathBuf;
    use std::process::Command;

    const TARGET: &str = "x86_64-unknown-linux-gnu";

    /// The agent, static: nothing else is in its file system.
    pub(crate) fn guest_agent(cache: &Cache) -> Result<PathBuf> {
        let root = workspace()?;
        // A directory of its own: other flags than the host's programs.
        let target = root.join("target/guest");
        cache.say("agent", "cargo build -p casemate-guest (static)", false);
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--release", "-p", "casemate-guest"])
            .args(["--bin", "casemate-guest", "--target", TARGET])
            .arg("--target-dir")
            .arg(&target)
            .current_dir(&root)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("RUSTFLAGS", "-C target-feature=+crt-static")
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .status()
            .context("start cargo")?;
        if !status.success() {
            bail!("the guest agent does not build; see above");
        }
        Ok(target.join(TARGET).join("release/casemate-guest"))
    }
}
