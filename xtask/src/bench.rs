//! `cargo xtask bench NAME`: what it costs, against a baseline that does less.
//!
//! Each figure is a line `bench NAME METRIC VALUE UNIT`, the median of several runs; a ratio is a
//! METRIC `ratio_…` with UNIT `x`. Lines that begin with `#` are for people: the baseline's command
//! line and where the time goes.
//!
//! | name | what | baseline |
//! |---|---|---|
//! | start | `POST /workspace` to the first result of an exec | QEMU alone: restore to the agent's first answer; cold boot to its `booted` |
//! | exec | `true`, by the gateway | the same call of the agent, past the edge |
//! | disk | direct writes, reads and random reads by one program in a workspace | the same program on ext4 in QEMU alone: over its LUKS driver, over a plain file, over the disk process's way without cipher and tags |
//! | sleep | a request that wakes a workspace, to its agent's answer; memory, written and encrypted | QEMU alone: the same restore; the same work of the guest after a wake; the same memory to a plain file |
//! | fork | snapshot, fork, opening, first exec; 16 forks at once | the same restore |
//! | density | memory of 16 workspaces, without the VMMs' | none |
//! | neighbour | a workspace's rounds of work beside another's floods | the same alone, under the same quotas |
//! | audit, kms | durable entries, audited releases | none |
//!
//! Must never be the program that is measured: it builds and runs the release executables.

mod bare;
mod density;
mod disk;
mod exec;
mod fork;
mod neighbour;
mod platform;
mod sleep;
mod start;
mod wake;

use anyhow::{Context as _, Result, ensure};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

pub(crate) use exec::Direct;

/// The executables of the platform.
const PACKAGES: &[&str] = &[
    "audit", "cli", "control", "disk", "edge", "host", "jail", "kms", "mint", "net", "vmm",
    "volumes", "warden",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure.
    name: Name,
    /// Of `neighbour`: which floods; all unless named.
    kinds: Vec<String>,
    /// Kernel, images and VMM: what `cargo xtask image` made.
    #[arg(long, default_value = "/var/lib/casemate/artifacts")]
    artifacts: PathBuf,
    /// Runs of each measurement; the figure is their median.
    #[arg(long, default_value_t = 15)]
    runs: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    Start,
    Exec,
    Disk,
    Sleep,
    Fork,
    Density,
    Neighbour,
    Audit,
    Kms,
    All,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if cfg!(debug_assertions) {
        return release();
    }
    ensure!(args.runs >= 3, "--runs must be at least 3");
    let is = |name| args.name == name || args.name == Name::All;
    if is(Name::Audit) {
        example("audit", "bench")?;
    }
    if is(Name::Kms) {
        example("kms", "releases")?;
    }
    if is(Name::Start) {
        start::run(args)?;
    }
    if is(Name::Exec) {
        exec::run(args)?;
    }
    if is(Name::Disk) {
        example("disk", "cipher")?;
        disk::run(args)?;
    }
    if is(Name::Sleep) {
        sleep::run(args)?;
    }
    if is(Name::Fork) {
        fork::run(args)?;
    }
    if is(Name::Density) {
        density::run(args)?;
    }
    if is(Name::Neighbour) {
        neighbour::run(args)?;
    }
    Ok(())
}

/// Builds the release executables and does it again as one of them.
fn release() -> Result<()> {
    let root = crate::image::workspace()?;
    let mut build = cargo();
    build.args(["build", "--release", "--quiet", "--bins", "-p", "xtask"]);
    for package in PACKAGES {
        build.args(["-p", &format!("casemate-{package}")]);
    }
    let built = build.current_dir(&root).status().context("start cargo")?;
    ensure!(built.success(), "the platform does not build; see above");
    let status = Command::new(root.join("target/release/xtask"))
        .args(std::env::args_os().skip(1))
        .status()
        .context("start the release xtask")?;
    std::process::exit(status.code().unwrap_or(1));
}

/// A crate's own measurement: an example that prints the lines itself.
fn example(package: &str, example: &str) -> Result<()> {
    let name = format!("casemate-{package}");
    let status = cargo()
        .args(["run", "--release", "--quiet", "-p", &name])
        .args(["--example", example])
        .current_dir(crate::image::workspace()?)
        .status()
        .context("start cargo")?;
    ensure!(status.success(), "{name}'s example `{example}` failed");
    Ok(())
}

fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Command::new(cargo)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?)
}

/// One figure.
fn say(bench: &str, metric: &str, value: f64, unit: &str) {
    println!("bench {bench} {metric} {value:.2} {unit}");
}

fn median(mut figures: Vec<f64>) -> f64 {
    assert!(!figures.is_empty(), "a median is of something");
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}
