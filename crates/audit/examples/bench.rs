//! How many entries per second become durable, and how long a receipt takes: append and integrate
//! on this machine's disk, many callers in flight over their socket.
//!
//! `cargo run --release -p casemate-audit --example bench`

use anyhow::ensure;
use api::audit::{Appended, Class, Entry, Op, Phase};
use api::rpc::Client;
use audit::append::{self, keys::Keys};
use audit::integrate;
use model::AccountId;
use seal::hpke::SecretKey;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use service::rpc::Uids;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::watch;

const RUNS: usize = 5;
const CONNECTIONS: u64 = 4;
const IN_FLIGHT: u64 = 250;
const ENTRIES: u64 = 60_000;
const RECEIPTS: u64 = 300;
const ACCOUNTS: u64 = 16;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let (mut rates, mut waits) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (rate, wait) = runtime.block_on(run())?;
        rates.push(rate);
        waits.push(wait);
    }
    println!(
        "bench audit durable_entries_per_s {:.0} entries/s",
        median(rates)
    );
    println!("bench audit receipt_p50_ms {:.2} ms", median(waits));
    Ok(())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Entries per second, and the median of a receipt's time in ms.
async fn run() -> anyhow::Result<(f64, f64)> {
    let dir = tempfile::tempdir()?;
    let paths = Paths::new(dir.path());
    prepare(&paths)?;
    let (stop, stopped) = watch::channel(false);
    let tasks = [
        tokio::spawn(integrate_run(paths.clone(), stopped.clone())),
        tokio::spawn(append_run(paths.clone(), stopped)),
    ];
    let socket = paths.socket(append::PROCESS, "append");
    wait_for(&socket).await?;
    let started = Instant::now();
    let mut callers = Vec::new();
    for _ in 0..CONNECTIONS {
        let client = Client::new(&socket);
        for _ in 0..IN_FLIGHT {
            let client = client.clone();
            callers.push(tokio::spawn(async move {
                for i in 0..ENTRIES / CONNECTIONS / IN_FLIGHT {
                    append(&client, i, false).await?;
                }
                Ok::<_, api::Error>(())
            }));
        }
    }
    for caller in callers {
        caller.await??;
    }
    let rate = ENTRIES as f64 / started.elapsed().as_secs_f64();
    let client = Client::new(&socket);
    let mut waits = Vec::new();
    for i in 0..RECEIPTS {
        let started = Instant::now();
        let done = append(&client, i, true).await?;
        ensure!(done.receipt.is_some(), "an answer without the receipt");
        waits.push(started.elapsed().as_secs_f64() * 1e3);
    }
    stop.send_replace(true);
    for task in tasks {
        task.await??;
    }
    Ok((rate, median(waits)))
}

/// Directories, the log's key, day keys and account keys.
fn prepare(paths: &Paths) -> anyhow::Result<()> {
    for process in [append::PROCESS, integrate::PROCESS] {
        std::fs::create_dir_all(paths.state(process))?;
        std::fs::create_dir_all(paths.run().join(process))?;
    }
    integrate::init(paths, &Config::default())?;
    let mut keys = Keys::open(&paths.state(append::PROCESS))?;
    let key = SecretKey::generate().public();
    let today = tlog::leaf::day_of(Clock::system().now_ms());
    let days = tlog::class::Class::ALL
        .into_iter()
        .flat_map(|class| (today..today + 2).map(move |day| (class, day, key)));
    keys.days_set(days, today)?;
    for i in 0..ACCOUNTS {
        keys.account_set(&account(i), SecretKey::generate().public())?;
    }
    Ok(())
}

async fn integrate_run(paths: Paths, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    integrate::run(&paths, &Config::default(), me(append::PROCESS), stop).await
}

async fn append_run(paths: Paths, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    append::run(&paths, me("control"), Clock::system(), stop).await
}

/// This process's uid, under one name.
fn me(process: &str) -> Uids {
    Uids::from_map([(process.to_owned(), rustix::process::getuid().as_raw())].into())
}

async fn wait_for(socket: &Path) -> anyhow::Result<()> {
    for _ in 0..1_000 {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    anyhow::bail!("{} does not answer", socket.display())
}

async fn append(client: &Client, i: u64, want_receipt: bool) -> api::Result<Appended> {
    let entry = Box::new(Entry {
        event: "workspace.start".into(),
        phase: Phase::Intent,
        request_id: "req_0123456789abcdef".into(),
        account: Some(account(i)),
        actor: "key_0123456789abcdef".into(),
        subject: Some("ws_0123456789abcdef".into()),
        authority: None,
        lease: None,
        result: None,
        data: serde_json::Map::new(),
    });
    let op = Op::Append {
        class: Class::Host,
        entry,
        want_receipt,
    };
    client.call("req_0123456789abcdef", &op).await
}

fn account(i: u64) -> AccountId {
    AccountId::from_bytes((i % ACCOUNTS).to_be_bytes())
}
