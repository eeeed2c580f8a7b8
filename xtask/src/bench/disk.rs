//! Direct I/O inside, by crates/guest/examples/baseline.rs: 1 MiB in sequence, 4 KiB at random
//! places. In a workspace (ext4 in LUKS2 behind FUSE, overlay on top), and in QEMU alone on ext4 over
//! its LUKS driver and over a plain file. Same image, same kernel, same program, the same empty ext4
//! as the workspace's, and as much CPU time as the workspace has for its VMM and its disk process
//! together. A baseline runs with QEMU's cache modes `none` and `writeback`; the better of the two
//! counts.
//!
//! Beside them QEMU alone over the disk process's own code behind FUSE, with cipher and integrity and
//! without both: the same files, written past the page cache and read through it.
//!
//! In turns, as machines are faster at one time than at another; LUKS comes last, once.
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

/// What the program measures, and its unit. The last, eight reads at a time, is *the* reads/s.
const METRICS: [(&str, &str); 6] = [
    ("write", "MB/s"),
    ("durable_write", "MB/s"),
    ("read", "MB/s"),
    ("reread", "MB/s"),
    ("iops_depth_1", "reads/s"),
    ("iops", "reads/s"),
];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the program is in the baseline's initramfs, and in the workspace.
const INIT: &str = "/baseline";
const PROGRAM: &str = "/root/baseline";
const DISK_MB: u32 = 1024;
/// Of `--runs`: a turn takes more than a minute, and measures three times.
const RUNS_PER_TURN: usize = 4;
/// QEMU's cache modes `none` and `writeback`.
const DIRECT: [&str; 2] = ["on", "off"];

/// Medians, in the order of [`METRICS`].
type Figures = [f64; METRICS.len()];

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let program = baseline_build()?;
    let platform = Platform::up(&args.artifacts, 1, false)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let id = runtime.block_on(create(&client, memory_mb))?;
    platform.pool_wait()?;
    let token = runtime.block_on(workspace(&client, &id, &program))?;

    let mut bare = Bare::of(&platform)?;
    bare.quota = Some(Quota::one_cpu()?);
    let dir = platform.paths.state_dir().join("baseline");
    std::fs::create_dir_all(&dir)?;
    let initramfs = initramfs(&platform, &dir, &program)?;
    let [raw, luks] = images(&dir)?;

    let mut said = Said::default();
    let turns = args.runs.div_ceil(RUNS_PER_TURN);
    for turn in 0..turns {
        println!("# turn {} of {turns}", turn + 1);
        let task = runtime.block_on(exec(&client, &token, &[PROGRAM, "/root/file"]))?;
        said.workspace += task["stdout"].as_str().unwrap_or_default();
        for (said, direct) in said.raw.iter_mut().zip(DIRECT) {
            let words = blockdev("raw", &raw, direct);
            *said += &measure(&mut bare, memory_mb, &words, &initramfs)?;
            if turn == 0 {
                println!("# baseline: {}", bare.line);
            }
        }
        let mut kinds = [
            ("plain", &mut said.plain),
            ("encrypted", &mut said.encrypted),
        ];
        if turn % 2 == 1 {
            kinds.reverse();
        }
        for (kind, said) in kinds {
            let serving = Serving::start(kind, &dir, &raw)?;
            if let Some(quota) = &bare.quota {
                quota.put(serving.child.id())?;
            }
            let words = blockdev("raw", &serving.at, "on");
            *said += &measure(&mut bare, memory_mb, &words, &initramfs)?;
            serving.stop()?;
        }
    }
    for (said, direct) in said.luks.iter_mut().zip(DIRECT) {
        let words = blockdev("luks", &luks, direct);
        *said += &measure(&mut bare, memory_mb, &words, &initramfs)?;
        println!("# baseline: {}", bare.line);
    }
    runtime.block_on(delete(&client, &id))?;
    said.tell()
}

/// What the program said, in all turns; of a baseline, with each of [`DIRECT`].
#[derive(Default)]
struct Said {
    workspace: String,
    raw: [String; 2],
    luks: [String; 2],
    plain: String,
    encrypted: String,
}

impl Said {
    fn tell(&self) -> Result<()> {
        let ours = figures(&self.workspace)?;
        for (figure, (metric, unit)) in ours.iter().zip(METRICS) {
            say("disk", &format!("workspace_{metric}"), *figure, unit);
        }
        for (what, said) in [("qemu_luks", &self.luks), ("qemu_raw", &self.raw)] {
            let mut best = Figures::default();
            for (said, direct) in said.iter().zip(DIRECT) {
                let of = figures(said)?;
                println!("# {what}, cache.direct={direct}: {}", words_of(&of));
                best = std::array::from_fn(|i| best[i].max(of[i]));
            }
            for (i, (metric, unit)) in METRICS.into_iter().enumerate() {
                say("disk", &format!("{what}_{metric}"), best[i], unit);
                let ratio = format!("ratio_{metric}_vs_{what}");
                say("disk", &ratio, ours[i] / best[i], "x");
            }
        }
        let [plain, encrypted] = [figures(&self.plain)?, figures(&self.encrypted)?];
        println!("# plain, behind FUSE: {}", words_of(&plain));
        println!("# encrypted, behind FUSE: {}", words_of(&encrypted));
        let mut least = f64::INFINITY;
        for (i, (metric, _)) in METRICS.into_iter().enumerate() {
            let ratio = encrypted[i] / plain[i];
            least = least.min(ratio);
            let name = format!("ratio_{metric}_encrypted_vs_plain");
            say("disk", &name, ratio, "x");
        }
        // The least of those above.
        say("disk", "ratio_encrypted_vs_plain", least, "x");
        Ok(())
    }
}

/// Puts the program into the workspace; the token to run it with.
async fn workspace(client: &Client, id: &str, program: &Path) -> Result<String> {
    let token = client.runtime_token(id).await?;
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
    Ok(token)
}

/// Boots QEMU alone on a disk, and reads what it says.
fn measure(bare: &mut Bare, memory_mb: u32, words: &[String], initramfs: &Path) -> Result<String> {
    let disk = Disk {
        words,
        initramfs,
        init: INIT,
    };
    bare.with_disk(memory_mb, &disk)
}

/// The medians of what the program said.
fn figures(said: &str) -> Result<Figures> {
    let mut medians = Figures::default();
    for (figure, (metric, _)) in medians.iter_mut().zip(METRICS) {
        let values = said
            .lines()
            .filter_map(|line| line.strip_prefix(metric)?.strip_prefix(' ')?.parse().ok());
        let values: Vec<f64> = values.collect();
        ensure!(!values.is_empty(), "the baseline's program said {said}");
        *figure = median(values);
    }
    Ok(medians)
}

fn words_of(of: &Figures) -> String {
    let words = METRICS.iter().zip(of);
    let words = words.map(|((metric, unit), figure)| format!("{metric} {figure:.0} {unit}"));
    words.collect::<Vec<_>>().join(", ")
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
        // One that did not end by itself leaves its mount.
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
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

/// A file with an empty ext4, and the same in LUKS1 by QEMU.
fn images(dir: &Path) -> Result<[PathBuf; 2]> {
    let (raw, luks, secret) = (dir.join("raw"), dir.join("luks"), dir.join("secret"));
    std::fs::write(&secret, "bench")?;
    ext4(&raw, 0)?;
    let object = format!("secret,id=s,file={}", secret.display());
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "--object", &object, "-f", "raw", "-O", "luks"]);
    convert.args(["-o", "key-secret=s,iter-time=10"]);
    quietly(convert.args([&raw, &luks]))?;
    Ok([raw, luks])
}

/// A new file with an empty ext4 from `offset_bytes` on, made as a workspace's is.
pub(super) fn ext4(file: &Path, offset_bytes: u64) -> Result<()> {
    let length_bytes = u64::from(DISK_MB) << 20;
    std::fs::File::create(file)?.set_len(offset_bytes + length_bytes)?;
    let words = jail::plan::mke2fs(&format!(",offset={offset_bytes}"));
    let mut mkfs = Command::new(&words[0]);
    mkfs.args(&words[1..]);
    quietly(mkfs.arg(file).arg(format!("{DISK_MB}M")))
}

/// Runs a program that says nothing unless it fails.
pub(super) fn quietly(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let out = command.output();
    let out = out.with_context(|| format!("run {program}"))?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{program}: {}", said.trim());
    Ok(())
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
    use super::{METRICS, figures};

    #[test]
    fn a_programs_lines_become_medians() {
        let mut said = String::from("write 1\nwrite 3\nwrite 2\n");
        for (metric, _) in &METRICS[1..] {
            said += &format!("{metric} 7.5\n");
        }
        assert_eq!(figures(&said).unwrap(), [2.0, 7.5, 7.5, 7.5, 7.5, 7.5]);
        assert!(figures("write 1\n").is_err());
        assert!(figures("failed: no disk\n").is_err());
    }
}
