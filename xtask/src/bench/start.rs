//! Starts: `POST /workspace` to the first result of an exec, encryption, keys, log and jail
//! included, against QEMU alone.

use super::bare::Bare;
use super::platform::{Platform, create, delete, exec};
use super::{Args, median, ms, runtime, say};
use anyhow::Result;
use cli::client::Client;
use std::time::{Duration, Instant};

/// Pooled VMs.
const POOL: u32 = 4;
/// How long creates and deletes alternate for the sustained rate.
const SUSTAINED: Duration = Duration::from_secs(30);
/// Cold starts: each with a memory size that has no template.
const COLD_RUNS: usize = 3;
const COLD_MEMORY_MB: u32 = 288;

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let platform = Platform::up(&args.artifacts, POOL, true)?;
    platform.pool_wait()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let mut bare = Bare::of(&platform)?;
    // Alternating, so that whatever else this machine does hits both.
    let client = platform.client()?;
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    runtime.block_on(one(&client, memory_mb))?;
    bare.restore(memory_mb)?;
    for _ in 0..args.runs {
        platform.pool_wait()?;
        ours.push(runtime.block_on(one(&client, memory_mb))?);
        platform.pool_wait()?;
        baseline.push(ms(bare.restore(memory_mb)?));
    }
    println!("# baseline: {}", bare.line);
    let restore = median(baseline);
    say("start", "bare_restore_ms", restore, "ms");
    let pooled = parts("pooled", &ours);
    say("start", "ratio_vs_bare_restore", pooled / restore, "x");
    let rate = runtime.block_on(sustained(&client, memory_mb))?;
    say("start", "sustained_starts_per_min", rate, "starts/min");
    drop(platform);

    let platform = Platform::up(&args.artifacts, 0, false)?;
    let client = platform.client()?;
    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for _ in 0..args.runs {
        ours.push(runtime.block_on(one(&client, memory_mb))?);
        baseline.push(ms(bare.restore(memory_mb)?));
    }
    let (unpooled, restore) = (parts("unpooled", &ours), median(baseline));
    let ratio = unpooled / restore;
    say("start", "ratio_unpooled_vs_bare_restore", ratio, "x");

    let (mut ours, mut baseline) = (Vec::new(), Vec::new());
    for i in 0..COLD_RUNS {
        let memory_mb = COLD_MEMORY_MB + 16 * u32::try_from(i)?;
        baseline.push(ms(bare.cold(memory_mb)?));
        ours.push(runtime.block_on(one(&client, memory_mb))?);
        // The template that this made host build, in the background.
        template_wait(&platform, i + 2)?;
    }
    println!("# baseline: {}", bare.line);
    let boot = median(baseline);
    say("start", "bare_cold_ms", boot, "ms");
    let ratio = parts("cold", &ours) / boot;
    say("start", "ratio_cold_vs_bare_cold", ratio, "x");
    Ok(())
}

/// One start, ms: until it runs, until there is a token, until the exec answered.
async fn one(client: &Client, memory_mb: u32) -> Result<[f64; 3]> {
    let began = Instant::now();
    let id = create(client, memory_mb).await?;
    let made = began.elapsed();
    let token = client.runtime_token(&id).await?;
    let may = began.elapsed();
    exec(client, &token, &["true"]).await?;
    let done = began.elapsed();
    delete(client, &id).await?;
    Ok([made, may, done].map(ms))
}

/// Says where the time went; the median of the whole.
fn parts(what: &str, starts: &[[f64; 3]]) -> f64 {
    let of = |f: &dyn Fn(&[f64; 3]) -> f64| median(starts.iter().map(f).collect());
    println!(
        "# {what}: create {:.1} ms, token {:.1} ms, first exec {:.1} ms",
        of(&|s| s[0]),
        of(&|s| s[1] - s[0]),
        of(&|s| s[2] - s[1])
    );
    let whole = of(&|s| s[2]);
    say("start", &format!("{what}_start_ms"), whole, "ms");
    whole
}

/// Starts a minute when each is deleted before the next, the pool's refill included.
async fn sustained(client: &Client, memory_mb: u32) -> Result<f64> {
    let (began, mut starts) = (Instant::now(), 0u32);
    while began.elapsed() < SUSTAINED {
        one(client, memory_mb).await?;
        starts += 1;
    }
    Ok(f64::from(starts) * 60.0 / began.elapsed().as_secs_f64())
}

/// Waits until there are `count` templates and nothing is being built.
fn template_wait(platform: &Platform, count: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = platform.probe().warden()?;
        if status.templates.len() >= count && status.slots.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            eprintln!("bench: a template is not built after a minute");
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
