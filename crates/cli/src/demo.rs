//! `casemate quickstart`: starts the platform, shows what it does, each step with what was
//! measured or seen, and stops it. Any step that is not so ends it with an error.

use crate::client::Client;
use crate::probe::{Probe, occurrences};
use crate::{erasure, operate, supervise, urls, ws};
use anyhow::{Context as _, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use service::config::Config;
use service::paths::Paths;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

/// How the demonstration runs.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Leave the platform running and print how to reach it, as shell exports.
    #[arg(long)]
    keep: bool,
    /// Python file to run inside the workspace instead of the built-in lines.
    #[arg(long)]
    code: Option<PathBuf>,
}

const DEFAULT_CODE: &str = "import platform, os\n\
    print('hello from', platform.node(), 'as uid', os.getuid(), 'on Linux', platform.release())\n\
    print('sum of squares below 1000:', sum(n * n for n in range(1000)))\n";

/// Runs the demonstration; the process's exit code.
///
/// # Errors
/// The step that was not so.
pub fn run(paths: &Paths, config: &Config, options: &Options) -> anyhow::Result<u8> {
    let code = match &options.code {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?
        }
        None => DEFAULT_CODE.to_owned(),
    };
    let began = Instant::now();
    let bar = crate::progress::spinner();
    let was_up = supervise::status_of(paths).iter().all(|s| s.ready);
    if !was_up {
        supervise::up(paths, config, None, |what| {
            bar.set_message(format!("starting: {what}"))
        })?;
    }
    bar.finish_and_clear();
    say(
        "platform up",
        &format!("{} processes answer", supervise::processes::ALL.len()),
        began,
    );
    let result = steps(paths, config, &code, options.keep);
    if result.is_err() || !options.keep {
        let stopping = Instant::now();
        supervise::down(paths, false)?;
        let left = supervise::leftovers(paths, config);
        ensure!(
            left.is_empty(),
            "after `down` this is left: {}",
            left.join(", ")
        );
        if result.is_ok() {
            say(
                "platform down",
                "looked: no process, mount, network namespace or control group is left",
                stopping,
            );
        }
    }
    if let Some(exports) = result? {
        println!("\n# point any client at it; `casemate down` stops it\n{exports}");
    }
    Ok(0)
}

fn steps(paths: &Paths, config: &Config, code: &str, keep: bool) -> anyhow::Result<Option<String>> {
    let account = operate::account_create(paths, "quickstart")?;
    let key = operate::key_create(paths, &account, "quickstart")?;
    let [control, gateway] = urls(config);
    let exports = format!(
        "export CASEMATE_CONTROL_URL={control}\nexport CASEMATE_GATEWAY_URL={gateway}\n\
         export CASEMATE_CLIENT_ID={}\nexport CASEMATE_CLIENT_SECRET={}\nexport CASEMATE_CA={}",
        key.client_id,
        key.client_secret,
        paths.ca().display()
    );
    let client = Client::new(
        control,
        gateway,
        Some(paths.ca()),
        key.client_id.to_string(),
        key.client_secret,
    )?;
    let probe = Probe { paths, config };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?
        .block_on(show(&client, &probe, code))?;
    Ok(keep.then_some(exports))
}

async fn show(client: &Client, probe: &Probe<'_>, code: &str) -> anyhow::Result<()> {
    let t = Instant::now();
    let w = ws::create(
        client,
        &json!({ "name": "quickstart", "image": "python-3", "mode": "permanent" }),
    )
    .await?;
    let id = w["id"]
        .as_str()
        .context("the answer holds no id")?
        .to_owned();
    say(
        "workspace created",
        &format!("{id}, permanent, image python-3"),
        t,
    );

    let result = acts(client, probe, code, &id).await;
    if result.is_err() {
        // Leave no workspace behind a failed demonstration.
        let _ = client
            .control(Method::DELETE, &format!("/workspace/{id}"), None)
            .await;
    }
    result
}

async fn acts(client: &Client, probe: &Probe<'_>, code: &str, id: &str) -> anyhow::Result<()> {
    // Dark: the token is valid, the way is closed.
    let t = Instant::now();
    let token = client.runtime_token(id).await?;
    let slot = probe.slot(id)?;
    let before = probe.counters(slot.slot)?;
    let refused = client.runtime(&token, Method::GET, "/health", None).await?;
    let status = refused.status().as_u16();
    let body: Value = refused.json().await.unwrap_or_default();
    ensure!(
        status == 403 && body["code"] == "network_blocked",
        "a dark workspace answered {status} {body} instead of 403 network_blocked"
    );
    let after = probe.counters(slot.slot)?;
    ensure!(
        after.in_packets == before.in_packets,
        "a refused request sent {} packets to the VM",
        after.in_packets - before.in_packets
    );
    say(
        "dark, at the edge",
        "valid token: 403 network_blocked; 0 packets reached the VM",
        t,
    );

    let t = Instant::now();
    let agent = SocketAddr::new(slot.net.ip.parse()?, model::limits::PORT_AGENT_TLS);
    let met = probe.dial(agent, None)?;
    let last = probe.counters(slot.slot)?;
    let dropped = last.in_dropped_packets - after.in_dropped_packets;
    ensure!(
        met != "open" && met != "refused" && dropped > 0 && last.in_packets == after.in_packets,
        "a dial past the edge met {met:?}; nftables dropped {dropped} packets"
    );
    say(
        "dark, past the edge",
        &format!("dial {agent}: {met}; nftables counted {dropped} dropped"),
        t,
    );

    // Opened.
    let t = Instant::now();
    let body = json!({ "public_access": true });
    client
        .control(
            Method::PATCH,
            &format!("/workspace/{id}/network"),
            Some(&body),
        )
        .await?;
    let guest = output(client, &token, &["uname", "-r"]).await?;
    let host = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    ensure!(
        !guest.trim().is_empty() && guest.trim() != host,
        "the guest says kernel {guest:?}"
    );
    say(
        "opened",
        &format!("guest kernel {}, host kernel {host}", guest.trim()),
        t,
    );

    let t = Instant::now();
    let printed = output(client, &token, &["python3", "-c", code]).await?;
    say("python inside the VM", "its output:", t);
    for line in printed.lines() {
        println!("      {line}");
    }

    // A canary in a file, through stop and start.
    let t = Instant::now();
    let canary = format!("canary-{}", hex::encode(seal::random::bytes::<16>()));
    let body = json!({ "path": "/root/canary.txt", "content": canary });
    crate::client::json(
        client
            .runtime(&token, Method::POST, "/files/write", Some(&body))
            .await?,
    )
    .await?;
    output(client, &token, &["sync"]).await?;
    say("file written", "/root/canary.txt", t);

    let t = Instant::now();
    client
        .post(&format!("/workspace/{id}/stop"), &json!({}))
        .await?;
    for pid in [Some(slot.vmm_pid), slot.disk_pid].into_iter().flatten() {
        ensure!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} of the stopped workspace is still there"
        );
    }
    say(
        "stopped",
        "looked: the processes of VM and disk are gone",
        t,
    );

    let t = Instant::now();
    let file = probe.disk_file(id);
    let found = occurrences(&file, canary.as_bytes())?;
    ensure!(
        found == 0,
        "the canary stands {found} times in {}",
        file.display()
    );
    let size = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&file)?) * 512 / 1024;
    say(
        "disk is ciphertext",
        &format!("{size} KiB searched, canary found 0 times"),
        t,
    );

    let t = Instant::now();
    client
        .post(&format!("/workspace/{id}/start"), &json!({}))
        .await?;
    let token = client.runtime_token(id).await?;
    let back = output(client, &token, &["cat", "/root/canary.txt"]).await?;
    ensure!(
        back.trim() == canary,
        "after stop and start the file holds {back:?}"
    );
    say("started again", "the file is there", t);

    let t = Instant::now();
    let gone = client
        .control(Method::DELETE, &format!("/workspace/{id}"), None)
        .await?;
    let receipt = gone["erasure_receipt"]
        .as_str()
        .context("the deletion came without a receipt")?;
    let kms = service::trust::key(probe.paths, service::trust::KMS)?;
    let erased = erasure::verify(receipt, &kms)?;
    ensure!(
        erased.workspace.as_str() == id,
        "the receipt is for {}",
        erased.workspace
    );
    if file.exists() {
        bail!("{} is still there", file.display());
    }
    say(
        "deleted",
        &format!(
            "key destroyed (epoch {} is gone, {} is current); receipt verified offline:",
            erased.epoch_destroyed, erased.epoch_now
        ),
        t,
    );
    println!("      {receipt}");
    Ok(())
}

/// What a command inside prints; a non-zero exit is an error.
async fn output(client: &Client, token: &str, command: &[&str]) -> anyhow::Result<String> {
    let body = json!({ "cmd": command, "exec_mode": "direct" });
    let task = crate::client::json(
        client
            .runtime(token, Method::POST, "/exec", Some(&body))
            .await?,
    )
    .await?;
    if task["exit_code"] != 0 {
        bail!("{command:?} inside the workspace: {task}");
    }
    Ok(task["stdout"].as_str().unwrap_or_default().to_owned())
}

fn say(what: &str, how: &str, since: Instant) {
    println!(
        "{:>8.0} ms  {what:<22} {how}",
        since.elapsed().as_secs_f64() * 1e3
    );
}
