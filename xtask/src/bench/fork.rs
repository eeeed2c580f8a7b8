//! A fork of a running workspace with 64 MiB of its own on disk: a snapshot of it, a new workspace
//! from that, whose disk is encrypted again under its own key before it answers, opened, and the
//! first result of an exec in it. The baseline is the restore of `bench start`.

use super::bare::Bare;
use super::platform::{Platform, allocated_mib, create, delete, exec};
use super::{Args, median, ms, runtime, say};
use anyhow::{Context as _, Result, ensure};
use cli::client::Client;
use reqwest::Method;
use serde_json::json;
use std::time::{Duration, Instant};

/// Pooled VMs.
const POOL: u32 = 2;
/// Forks at once.
const AT_ONCE: usize = 16;
/// Within this the edge hears of a fork.
const HEARD_WITHIN: Duration = Duration::from_secs(10);
/// What the source has of its own.
const OWN: [&str; 3] = [
    "sh",
    "-c",
    "dd if=/dev/urandom of=/root/own bs=1M count=64 && sync && sha256sum /root/own",
];
/// What of it a fork must have.
const CHECK: [&str; 2] = ["sha256sum", "/root/own"];

/// Where a fork's time went, ms.
struct Times {
    snapshot: f64,
    fork: f64,
    open: f64,
    exec: f64,
}

impl Times {
    fn whole(&self) -> f64 {
        self.snapshot + self.fork + self.open + self.exec
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let platform = Platform::up_told(&args.artifacts, POOL)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let source = runtime.block_on(create(&client, memory_mb))?;
    let token = runtime.block_on(client.runtime_token(&source))?;
    let said = runtime.block_on(exec(&client, &token, &OWN))?;
    let said = said["stdout"].as_str().unwrap_or_default().to_owned();
    let mut bare = Bare::of(&platform)?;

    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for _ in 0..args.runs.div_ceil(3) {
        platform.pool_wait()?;
        let (times, fork) = runtime.block_on(one(&client, &source))?;
        ours.push(times);
        let token = runtime.block_on(client.runtime_token(&fork))?;
        let kept = runtime.block_on(exec(&client, &token, &CHECK))?;
        ensure!(
            kept["stdout"].as_str() == Some(said.as_str()),
            "the fork has another file: {kept}"
        );
        runtime.block_on(delete(&client, &fork))?;
        platform.pool_wait()?;
        baseline.push(ms(bare.restore(memory_mb)?));
    }
    println!("# baseline: {}", bare.line);
    let own = allocated_mib(&platform.object_file(&source, "disk")?)?;
    let of = |f: &dyn Fn(&Times) -> f64| median(ours.iter().map(f).collect());
    println!(
        "# fork of {own:.0} MiB: snapshot {:.1} ms, fork {:.1} ms, opening {:.1} ms, first exec {:.1} ms",
        of(&|t| t.snapshot),
        of(&|t| t.fork),
        of(&|t| t.open),
        of(&|t| t.exec),
    );
    let (whole, restore) = (of(&Times::whole), median(baseline));
    say("fork", "fork_ms", whole, "ms");
    say("fork", "bare_restore_ms", restore, "ms");
    say("fork", "ratio_vs_bare_restore", whole / restore, "x");
    let without = of(&|t| t.whole() - t.snapshot);
    let metric = "ratio_without_snapshot_vs_bare_restore";
    say("fork", metric, without / restore, "x");

    platform.pool_wait()?;
    let began = Instant::now();
    runtime.block_on(snapshot(&client, &source))?;
    let forks = (0..AT_ONCE).map(|_| async {
        let fork = fork_open_exec(&client, &source).await?.1;
        anyhow::Ok((ms(began.elapsed()), fork))
    });
    let forks = runtime.block_on(futures_util::future::try_join_all(forks))?;
    let mut ready: Vec<f64> = forks.iter().map(|(ms, _)| *ms).collect();
    ready.sort_by(f64::total_cmp);
    let total = ready.last().copied().unwrap_or_default();
    let each: Vec<String> = ready.iter().map(|ms| format!("{ms:.0}")).collect();
    println!(
        "# {AT_ONCE} forks at once answered after {} ms",
        each.join(", ")
    );
    say("fork", "sixteen_at_once_ms", total, "ms");
    let per_fork = total / AT_ONCE as f64 / restore;
    say("fork", "ratio_of_sixteen_per_fork", per_fork, "x");
    for (_, fork) in forks {
        runtime.block_on(delete(&client, &fork))?;
    }
    runtime.block_on(delete(&client, &source))
}

/// One fork, until its first exec answered; its id.
async fn one(client: &Client, source: &str) -> Result<(Times, String)> {
    let began = Instant::now();
    snapshot(client, source).await?;
    let snapshot = ms(began.elapsed());
    let ([fork, open, exec], id) = fork_open_exec(client, source).await?;
    let times = Times {
        snapshot,
        fork,
        open,
        exec,
    };
    Ok((times, id))
}

async fn snapshot(client: &Client, source: &str) -> Result<()> {
    let path = format!("/workspace/{source}/snapshot");
    // As `casemate ws fork` asks for it: no fork gets the memory.
    let body = json!({ "memory": false });
    client.post(&path, &body).await.map(drop)
}

/// The first `true` that is answered. An edge on a machine that is busy with other starts may hear of
/// this one late, and refuses until then.
async fn first_exec(client: &Client, token: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        match exec(client, token, &["true"]).await {
            Err(_) if began.elapsed() < HEARD_WITHIN => {}
            done => return done.map(drop),
        }
    }
}

/// Forks the snapshot that there is, opens the fork and runs `true` in it; ms of each, and its id.
async fn fork_open_exec(client: &Client, source: &str) -> Result<([f64; 3], String)> {
    let began = Instant::now();
    let path = format!("/workspace/{source}/fork");
    let made = client.post(&path, &json!({})).await?;
    let id = made["workspace"]["id"].as_str().context("no id")?;
    ensure!(
        made["workspace"]["ready"] == true,
        "the fork is not up: {made}"
    );
    let forked = began.elapsed();
    let path = format!("/workspace/{id}/network");
    let body = json!({ "public_access": true });
    client.control(Method::PATCH, &path, Some(&body)).await?;
    let token = client.runtime_token(id).await?;
    let opened = began.elapsed();
    first_exec(client, &token).await?;
    let done = began.elapsed();
    Ok((
        [forked, opened - forked, done - opened].map(ms),
        id.to_owned(),
    ))
}
