//! What a workspace costs in memory beside its VM: PSS of the daemons, disks and vmctls.

use super::platform::{Platform, create, delete};
use super::{Args, runtime, say};
use anyhow::{Context as _, Result};
use std::path::Path;

const WORKSPACES: usize = 16;
/// Users of VMMs, of disk processes and of vmctls; see warden's limits.
const VMMS: std::ops::Range<u32> = 900_000..910_000;
const DISKS: std::ops::Range<u32> = 910_000..920_000;
const VMCTLS: std::ops::Range<u32> = 920_000..929_997;
/// Users of warden's own processes.
const WARDENS: std::ops::Range<u32> = 929_997..929_999;

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let platform = Platform::up(&args.artifacts, 0, false)?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let mut made = Vec::new();
    for _ in 0..WORKSPACES {
        made.push(runtime.block_on(create(&client, memory_mb))?);
    }
    let [vmms, disks, vmctls] = [VMMS, DISKS, VMCTLS].map(|range| of_users(&range));
    let mut daemons = of_users(&WARDENS);
    for pid in platform.daemons() {
        daemons += pss_mib(&Path::new("/proc").join(pid.to_string())).context("a daemon's PSS")?;
    }
    let each = |mib: f64| mib / WORKSPACES as f64;
    println!(
        "# MiB a workspace: daemons {:.2}, disk {:.2}, vmctl {:.2}",
        each(daemons),
        each(disks),
        each(vmctls)
    );
    let ours = each(daemons + disks + vmctls);
    say("density", "ours_pss_mib_per_workspace", ours, "MiB");
    say("density", "vmm_pss_mib_per_workspace", each(vmms), "MiB");
    for id in made {
        runtime.block_on(delete(&client, &id))?;
    }
    Ok(())
}

/// PSS of all processes of users in `range`, MiB. A process that ends meanwhile counts nothing.
fn of_users(range: &std::ops::Range<u32>) -> f64 {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|e| {
        let name = e.file_name();
        name.to_str()?.parse::<u32>().ok()?;
        let status = std::fs::read_to_string(e.path().join("status")).ok()?;
        let line = status.lines().find(|l| l.starts_with("Uid:"))?;
        let uid: u32 = line.split_whitespace().nth(1)?.parse().ok()?;
        range.contains(&uid).then(|| pss_mib(&e.path()))?
    })
    .sum()
}

fn pss_mib(process: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let line = text.lines().find(|l| l.starts_with("Pss:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}
