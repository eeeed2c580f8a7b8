//! Direct I/O inside: 1 MiB in sequence by `dd`, 4 KiB at random places by
//! crates/guest/examples/baseline.rs. In a workspace (ext4 in LUKS2 behind FUSE, overlay on top),
//! and in QEMU alone on ext4 over its LUKS driver and over a plain file. Same image, same kernel,
//! same programs, the same empty ext4 as the workspace's, and as much CPU time as the workspace has
//! for its VMM and its disk process together. A baseline runs with QEMU's cache modes `none` and
//! `writeback`; the better of the two counts.
//!
//! Then QEMU alone once more, over the disk process's own code behind FUSE, with cipher and
//! integrity and without both.
//!
//! A write ends when the disk has taken the last block; a durable write when it is flushed as well,
//! which measures the machine's medium more than what lies above it.

use super::bare::{Bare, Disk, Quota};
use super::platform::{Platform, create, delete, exec};
use super::{Args, median, runtime, say};
use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use cli::client::{Client, json};
use reqwest::Method;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What is measured in sequence, by its metric, its mark in what the baseline says, and `dd`'s
/// words, as in crates/guest/examples/baseline.rs.
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
/// Random reads, by metric and mark: one at a time, and eight.
const READS: [(&str, &str); 2] = [("iops_depth_1", "1 "), ("iops", "8 ")];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the baseline's program is in its initramfs, and in the workspace.
const INIT: &str = "/baseline";
const PROGRAM: &str = "/root/baseline";
const DISK_MB: u32 = 1024;

/// Medians: MB/s of [`KINDS`], operations per second of [`READS`].
#[derive(Clone, Copy, Default)]
struct Figures {
    mb_per_s: [f64; KINDS.len()],
    iops: [f64; READS.len()],
}

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let baseline = baseline_build()?;
    let platform = Platform::up(&args.artifacts, 1, false)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let id = runtime.block_on(create(&client, memory_mb))?;
    platform.pool_wait()?;
    let ours = runtime.block_on(workspace(&client, &id, &baseline, args.runs))?;
    runtime.block_on(delete(&client, &id))?;
    for (figure, (metric, ..)) in ours.mb_per_s.iter().zip(KINDS) {
        say("disk", &format!("{metric}_mb_per_s"), *figure, "MB/s");
    }
    for (figure, (metric, _)) in ours.iops.iter().zip(READS) {
        say("disk", metric, *figure, "reads/s");
    }

    let mut bare = Bare::of(&platform)?;
    bare.quota = Some(Quota::one_cpu()?);
    let dir = platform.paths.state_dir().join("baseline");
    std::fs::create_dir_all(&dir)?;
    let initramfs = initramfs(&platform, &dir, &baseline)?;
    let [raw, luks] = images(&dir)?;
    for (what, driver, file) in [("qemu_luks", "luks", &luks), ("qemu_raw", "raw", &raw)] {
        let mut best = Figures::default();
        for direct in ["on", "off"] {
            let words = blockdev(driver, file, direct);
            let of = measure(&mut bare, memory_mb, &words, &initramfs)?;
            println!("# {what}, cache.direct={direct}: {}", of.words());
            best = best.or_better(&of);
        }
        println!("# baseline: {}", bare.line);
        for (i, (kind, ..)) in KINDS.into_iter().enumerate() {
            let metric = format!("{what}_{kind}_mb_per_s");
            say("disk", &metric, best.mb_per_s[i], "MB/s");
            let metric = format!("ratio_{kind}_vs_{what}");
            say("disk", &metric, ours.mb_per_s[i] / best.mb_per_s[i], "x");
        }
        for (i, (kind, _)) in READS.into_iter().enumerate() {
            let metric = format!("ratio_{kind}_vs_{what}");
            say("disk", &metric, ours.iops[i] / best.iops[i], "x");
        }
    }

    let mut served = [Figures::default(); 2];
    for (kind, of) in ["plain", "encrypted"].into_iter().zip(&mut served) {
        let serving = Serving::start(kind, &dir, &raw)?;
        if let Some(quota) = &bare.quota {
            quota.put(serving.child.id())?;
        }
        let words = blockdev("raw", &serving.at, "on");
        *of = measure(&mut bare, memory_mb, &words, &initramfs)?;
        println!("# {kind}, behind FUSE: {}", of.words());
        serving.stop()?;
    }
    let [plain, encrypted] = served;
    let mut least = f64::INFINITY;
    for (i, (kind, ..)) in KINDS.into_iter().enumerate() {
        let ratio = encrypted.mb_per_s[i] / plain.mb_per_s[i];
        least = least.min(ratio);
        let metric = format!("ratio_{kind}_encrypted_vs_plain");
        say("disk", &metric, ratio, "x");
    }
    for (i, (kind, _)) in READS.into_iter().enumerate() {
        let ratio = encrypted.iops[i] / plain.iops[i];
        least = least.min(ratio);
        let metric = format!("ratio_{kind}_encrypted_vs_plain");
        say("disk", &metric, ratio, "x");
    }
    // The least of those above.
    say("disk", "ratio_encrypted_vs_plain", least, "x");
    Ok(())
}

/// What a workspace does.
async fn workspace(client: &Client, id: &str, program: &Path, runs: usize) -> Result<Figures> {
    let token = client.runtime_token(id).await?;
    let mut rates = [const { Vec::new() }; KINDS.len()];
    for _ in 0..runs.div_ceil(3) {
        for (rates, (_, _, words)) in rates.iter_mut().zip(KINDS) {
            let words: Vec<&str> = std::iter::once("dd").chain(words.split(' ')).collect();
            let task = exec(client, &token, &words).await?;
            let said = task["stderr"].as_str().unwrap_or_default();
            rates.push(rate(said.lines().last().unwrap_or_default())?);
            // What was written is on the medium before the next begins.
            exec(client, &token, &["sync"]).await?;
        }
    }
    let text = base64::engine::general_purpose::STANDARD.encode(std::fs::read(program)?);
    let encoded = format!("{PROGRAM}.base64");
    let body = serde_json::json!({ "path": encoded, "content": text });
    let path = "/files/write";
    json(
        client
            .runtime(&token, Method::POST, path, Some(&body))
            .await?,
    )
    .await?;
    let script = format!("base64 -d {encoded} > {PROGRAM} && chmod +x {PROGRAM}");
    exec(client, &token, &["sh", "-c", &script]).await?;
    let task = exec(client, &token, &[PROGRAM, "reads", "/root/file"]).await?;
    let said = task["stdout"].as_str().unwrap_or_default();
    Ok(Figures {
        mb_per_s: rates.map(median),
        iops: READS.map(|(_, mark)| number(said, mark)),
    })
}

/// Boots QEMU alone on a disk, and reads what it says.
fn measure(bare: &mut Bare, memory_mb: u32, words: &[String], initramfs: &Path) -> Result<Figures> {
    let disk = Disk {
        words,
        initramfs,
        init: INIT,
    };
    let said = bare.with_disk(memory_mb, &disk)?;
    let mut of = Figures::default();
    for (figure, (_, mark, _)) in of.mb_per_s.iter_mut().zip(KINDS) {
        let rates: Result<Vec<f64>> = said
            .lines()
            .filter_map(|l| l.strip_prefix(mark))
            .map(rate)
            .collect();
        let rates = rates?;
        ensure!(!rates.is_empty(), "the baseline said {said}");
        *figure = median(rates);
    }
    of.iops = READS.map(|(_, mark)| number(&said, mark));
    ensure!(of.iops.iter().all(|n| *n > 0.0), "the baseline said {said}");
    Ok(of)
}

impl Figures {
    fn or_better(&self, other: &Self) -> Self {
        Self {
            mb_per_s: std::array::from_fn(|i| self.mb_per_s[i].max(other.mb_per_s[i])),
            iops: std::array::from_fn(|i| self.iops[i].max(other.iops[i])),
        }
    }

    fn words(&self) -> String {
        let rates = KINDS.iter().zip(self.mb_per_s);
        let reads = READS.iter().zip(self.iops);
        let rates = rates.map(|((kind, ..), n)| format!("{kind} {n:.0} MB/s"));
        let reads = reads.map(|((kind, _), n)| format!("{kind} {n:.0}/s"));
        rates.chain(reads).collect::<Vec<_>>().join(", ")
    }
}

/// crates/disk/examples/serve.rs at work.
struct Serving {
    child: Child,
    /// The file that it serves.
    at: PathBuf,
}

impl Serving {
    fn start(kind: &str, dir: &Path, from: &Path) -> Result<Self> {
        let root = crate::image::workspace()?;
        let package = ["--release", "--quiet", "-p", "casemate-disk"];
        let built = super::cargo()
            .arg("build")
            .args(package)
            .args(["--example", "serve"])
            .current_dir(&root)
            .status()
            .context("start cargo")?;
        ensure!(built.success(), "`serve` does not build; see above");
        let at = dir.join(kind);
        std::fs::write(&at, "")?;
        let child = Command::new(root.join("target/release/examples/serve"))
            .arg(kind)
            .args([&dir.join("backing"), from, &at])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start `serve`")?;
        let mut me = Self { child, at };
        let mut said = String::new();
        if let Some(out) = me.child.stdout.take() {
            BufReader::new(out).read_line(&mut said)?;
        }
        ensure!(said == "ready\n", "`serve` said {said:?}");
        Ok(me)
    }

    fn stop(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "`serve` ended with {status}");
        Ok(())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number of the line that begins with `mark`; 0 if there is none.
fn number(said: &str, mark: &str) -> f64 {
    let line = said.lines().find_map(|l| l.strip_prefix(mark));
    line.and_then(|n| n.parse().ok()).unwrap_or_default()
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
