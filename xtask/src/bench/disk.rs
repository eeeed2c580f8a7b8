//! Sequential direct I/O by `dd` inside: in a workspace (ext4 in LUKS2 behind FUSE, overlay on
//! top), and in QEMU alone on ext4 over its LUKS driver and over a plain file. Same image, same
//! kernel, same `dd`, and the same empty ext4 as the workspace's. A baseline runs with QEMU's cache
//! modes `none` and `writeback`; the better of the two counts.
//!
//! A write ends when the disk has taken the last block; a durable write when it is flushed as well,
//! which measures the machine's medium more than what lies above it.

use super::bare::{Bare, Disk};
use super::platform::{Platform, create, delete, exec};
use super::{Args, median, runtime, say};
use anyhow::{Context as _, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is measured, by its metric, the baseline's mark and `dd`'s words, as in
/// crates/guest/examples/baseline.rs.
const KINDS: [(&str, &str, &str); 3] = [
    (
        "write",
        "w ",
        "if=/dev/zero of=/root/file bs=1M count=256 oflag=direct",
    ),
    (
        "durable_write",
        "f ",
        "if=/dev/zero of=/root/file bs=1M count=256 oflag=direct conv=fsync",
    ),
    (
        "read",
        "r ",
        "if=/root/file of=/dev/null bs=1M iflag=direct",
    ),
];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the baseline's program is in its initramfs.
const INIT: &str = "/baseline";
const DISK_MB: u32 = 1024;

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let baseline = baseline_build()?;
    let platform = Platform::up(&args.artifacts, 1, false)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let id = runtime.block_on(create(&client, memory_mb))?;
    platform.pool_wait()?;
    let token = runtime.block_on(client.runtime_token(&id))?;
    let dd = |words: &str| -> Result<f64> {
        let words: Vec<&str> = std::iter::once("dd").chain(words.split(' ')).collect();
        let task = runtime.block_on(exec(&client, &token, &words))?;
        let said = task["stderr"].as_str().unwrap_or_default();
        rate(said.lines().last().unwrap_or_default())
    };
    let mut ours = [const { Vec::new() }; KINDS.len()];
    for _ in 0..args.runs.div_ceil(3) {
        for (rates, (_, _, words)) in ours.iter_mut().zip(KINDS) {
            rates.push(dd(words)?);
            // What was written is on the medium before the next begins.
            runtime.block_on(exec(&client, &token, &["sync"]))?;
        }
        runtime.block_on(exec(&client, &token, &["rm", "/root/file"]))?;
    }
    let ours = ours.map(median);
    for (figure, (metric, ..)) in ours.iter().zip(KINDS) {
        say("disk", &format!("{metric}_mb_per_s"), *figure, "MB/s");
    }

    let mut bare = Bare::of(&platform)?;
    let dir = platform.paths.state_dir().join("baseline");
    std::fs::create_dir_all(&dir)?;
    let initramfs = initramfs(&platform, &dir, &baseline)?;
    let [raw, luks] = images(&dir)?;
    for (what, driver, file) in [("qemu_luks", "luks", &luks), ("raw", "raw", &raw)] {
        let mut best = [0.0f64; KINDS.len()];
        for direct in ["on", "off"] {
            let words = blockdev(driver, file, direct);
            let disk = Disk {
                words: &words,
                initramfs: &initramfs,
                init: INIT,
            };
            let said = bare.with_disk(memory_mb, &disk)?;
            for (best, (_, mark, _)) in best.iter_mut().zip(KINDS) {
                let rates: Result<Vec<f64>> = said
                    .lines()
                    .filter_map(|l| l.strip_prefix(mark))
                    .map(rate)
                    .collect();
                let rates = rates?;
                ensure!(!rates.is_empty(), "the baseline said {said}");
                let figure = median(rates);
                println!("# {what}, cache.direct={direct}: {mark}{figure:.0} MB/s");
                *best = best.max(figure);
            }
        }
        println!("# baseline: {}", bare.line);
        for (i, (kind, ..)) in KINDS.into_iter().enumerate() {
            let metric = format!("{what}_{kind}_mb_per_s");
            say("disk", &metric, best[i], "MB/s");
            let metric = format!("ratio_{kind}_vs_{what}");
            say("disk", &metric, ours[i] / best[i], "x");
        }
    }
    runtime.block_on(delete(&client, &id))
}

/// MB/s of `268435456 bytes (268 MB, 256 MiB) copied, 0.5 s, 537 MB/s`.
fn rate(line: &str) -> Result<f64> {
    let parse = || -> Option<f64> {
        let bytes: f64 = line.split(' ').next()?.parse().ok()?;
        let seconds = line.split("copied, ").nth(1)?.split(' ').next()?;
        Some(bytes / seconds.parse::<f64>().ok()? / 1e6)
    };
    parse().with_context(|| format!("dd said {line:?}"))
}

/// The baseline's program, static.
fn baseline_build() -> Result<PathBuf> {
    let root = crate::image::workspace()?;
    let target = root.join("target/guest");
    let status = super::cargo()
        .args(["build", "--quiet", "--release", "-p", "casemate-guest"])
        .args(["--example", "baseline", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(&root)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .status()
        .context("start cargo")?;
    ensure!(status.success(), "the baseline does not build; see above");
    Ok(target.join(TARGET).join("release/examples/baseline"))
}

/// The platform's initramfs and one more archive behind it, which the kernel unpacks too.
fn initramfs(platform: &Platform, dir: &Path, program: &Path) -> Result<PathBuf> {
    let mut bytes = std::fs::read(platform.paths.artifacts().join("kernel/initramfs.cpio"))?;
    bytes.extend(crate::image::one_file_archive(
        INIT.trim_start_matches('/'),
        &std::fs::read(program)?,
    )?);
    let path = dir.join("initramfs.cpio");
    std::fs::write(&path, bytes)?;
    Ok(path)
}

/// A file with an empty ext4, made as a workspace's is, and the same in LUKS1 by QEMU.
fn images(dir: &Path) -> Result<[PathBuf; 2]> {
    let (raw, luks, secret) = (dir.join("raw"), dir.join("luks"), dir.join("secret"));
    std::fs::write(&secret, "bench")?;
    let file = std::fs::File::create(&raw)?;
    file.set_len(u64::from(DISK_MB) << 20)?;
    let run = |program: &str, words: &[&str], last: &[&Path]| -> Result<()> {
        let out = Command::new(program).args(words).args(last).output();
        let out = out.with_context(|| format!("run {program}"))?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "{program}: {}", said.trim());
        Ok(())
    };
    let mkfs = "-q -F -t ext4 -b 4096 -m 0 -I 256 -J size=16 -E \
                lazy_itable_init=1,lazy_journal_init=1,nodiscard,resize=67108864";
    let mkfs: Vec<&str> = mkfs.split_whitespace().collect();
    run("mke2fs", &mkfs, &[&raw])?;
    let object = format!("secret,id=s,file={}", secret.display());
    let words = ["convert", "--object", &object, "-f", "raw", "-O", "luks"];
    let words = [&words[..], &["-o", "key-secret=s,iter-time=10"]].concat();
    run("qemu-img", &words, &[&raw, &luks])?;
    Ok([raw, luks])
}

fn blockdev(driver: &str, file: &Path, direct: &str) -> Vec<String> {
    let path = file.display();
    let secret = file.with_file_name("secret");
    let cache = format!("cache.direct={direct},discard=unmap");
    let file = format!("driver=file,node-name=disk-file,filename={path},{cache}");
    let key = if driver == "luks" {
        ",key-secret=s"
    } else {
        ""
    };
    let node = format!("driver={driver},node-name=disk,file=disk-file,{cache}{key}");
    let mut words: Vec<String> = Vec::new();
    if driver == "luks" {
        let object = format!("secret,id=s,file={}", secret.display());
        words.extend(["-object".into(), object]);
    }
    words.extend(["-blockdev".into(), file, "-blockdev".into(), node]);
    words
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::rate;

    #[test]
    fn dd_says_a_rate() {
        let line = "268435456 bytes (268 MB, 256 MiB) copied, 0.5 s, 537 MB/s";
        assert_eq!(rate(line).unwrap().round(), 537.0);
        assert!(rate("dd: failed to open").is_err());
    }
}
