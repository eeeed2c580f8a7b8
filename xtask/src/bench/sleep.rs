//! Sleep and wake, against QEMU alone.
//!
//! A wake counts from the request at the gateway, which is all that wakes the workspace, to the
//! first answer of its agent, by the edge; the baseline is the restore of `bench start`, to its
//! agent's first answer, one line on a serial port. The bare wake beside it is the same work of the
//! guest, up to the same request, without the platform around it: see [`super::wake`].
//!
//! Writing memory counts from vmctl's order to the image that is kept: pages, tags, note, all
//! durable; the baseline is the same method of the same QEMU with a plain file on the same file
//! system, synced. A workspace's memory holds a little more than the bare VM's, so it is rates that
//! are compared.

use super::bare::Bare;
use super::platform::{Platform, allocated_mib, create, delete, exec};
use super::wake::BareWake;
use super::{Args, median, ms, runtime, say};
use anyhow::{Context as _, Result};
use cli::client::{Client, json};
use reqwest::Method;
use serde_json::json;
use std::time::Instant;

/// The steps that write memory, as host's log names them.
const WRITES: [&str; 2] = [
    "Save(Snapshot, Some(Ready))",
    "Save(Snapshot, Some(Written))",
];

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let platform = Platform::up_told(&args.artifacts, 1)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let id = runtime.block_on(create(&client, memory_mb))?;
    platform.pool_wait()?;
    let token = runtime.block_on(client.runtime_token(&id))?;
    runtime.block_on(exec(&client, &token, &["true"]))?;
    let mut bare = Bare::of(&platform)?;

    save(args, &runtime, &platform, &client, &id, &mut bare)?;
    wake(args, &runtime, &platform, &client, (&id, &token), &mut bare)?;
    runtime.block_on(delete(&client, &id))
}

fn save(
    args: &Args,
    runtime: &tokio::runtime::Runtime,
    platform: &Platform,
    client: &Client,
    id: &str,
    bare: &mut Bare,
) -> Result<()> {
    let plain = platform.paths.state_dir().join("baseline-memory");
    let (mut ours, mut baseline, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    let mut mib = [0.0; 2];
    for _ in 0..args.runs.div_ceil(3) {
        let began = Instant::now();
        runtime.block_on(client.post(&format!("/workspace/{id}/snapshot"), &json!({})))?;
        whole.push(ms(began.elapsed()));
        let took: Result<Vec<f64>> = WRITES
            .iter()
            .map(|step| platform.step_ms(id, step))
            .collect();
        mib[0] = allocated_mib(&platform.object_file(id, "snapshot-memory")?)?;
        ours.push(mib[0] / took?.iter().sum::<f64>() * 1e3);
        let took = ms(bare.save(platform.config.host.pool_memory_mb, &plain)?);
        mib[1] = allocated_mib(&plain)?;
        baseline.push(mib[1] / took * 1e3);
        std::fs::remove_file(&plain)?;
    }
    println!("# baseline: {}", bare.line);
    println!(
        "# memory written: {:.0} MiB of the workspace, {:.0} MiB of the bare VM",
        mib[0], mib[1]
    );
    let (ours, baseline) = (median(ours), median(baseline));
    say("sleep", "snapshot_ms", median(whole), "ms");
    say("sleep", "save_encrypted_mib_per_s", ours, "MiB/s");
    say("sleep", "save_plain_mib_per_s", baseline, "MiB/s");
    say(
        "sleep",
        "ratio_save_encrypted_vs_plain",
        baseline / ours,
        "x",
    );
    Ok(())
}

fn wake(
    args: &Args,
    runtime: &tokio::runtime::Runtime,
    platform: &Platform,
    client: &Client,
    (id, token): (&str, &str),
    bare: &mut Bare,
) -> Result<()> {
    // Only with an idle policy does a request wake what sleeps.
    let path = format!("/workspace/{id}/lifecycle/idle");
    let body = json!({ "suspend_after": 86_400 });
    runtime.block_on(client.control(Method::PUT, &path, Some(&body)))?;
    let mut bare_wake = BareWake::asleep(platform, runtime)?;
    let (mut ours, mut baseline, mut bare_wakes) = (vec![], vec![], vec![]);
    let (mut slept, mut execs) = (vec![], vec![]);
    for _ in 0..args.runs {
        let began = Instant::now();
        runtime.block_on(client.post(&format!("/workspace/{id}/sleep"), &json!({})))?;
        slept.push(ms(began.elapsed()));
        baseline.push(ms(bare.restore(platform.config.host.pool_memory_mb)?));
        bare_wakes.push(ms(bare_wake.wake(runtime)?));
        let began = Instant::now();
        let answer = async {
            let asked = client.runtime(token, Method::GET, "/health", None).await?;
            json(asked).await
        };
        runtime.block_on(answer).context("the wake")?;
        ours.push(ms(began.elapsed()));
        let began = Instant::now();
        runtime.block_on(exec(client, token, &["true"]))?;
        execs.push(ms(began.elapsed()));
    }
    println!("# baseline: {}", bare.line);
    let (ours, baseline) = (median(ours), median(baseline));
    say("sleep", "sleep_ms", median(slept), "ms");
    say("sleep", "wake_ms", ours, "ms");
    say("sleep", "exec_after_wake_ms", median(execs), "ms");
    say("sleep", "bare_restore_ms", baseline, "ms");
    say("sleep", "ratio_wake_vs_bare_restore", ours / baseline, "x");
    bare_wake.explain();
    let bare_wakes = median(bare_wakes);
    say("sleep", "bare_wake_ms", bare_wakes, "ms");
    say("sleep", "ratio_wake_vs_bare_wake", ours / bare_wakes, "x");
    Ok(())
}
