//! How many releases per second the KMS answers, each checked, used once and durable in the log:
//! KMS, append and integrate on this machine's disk, many callers in flight over the KMS's socket.
//!
//! Run as root, as receipts are asked for by another user, as control is:
//! `cargo run --release -p casemate-kms --example releases`

use anyhow::{Context as _, Result, ensure};
use api::audit::{Class, Entry, Lease, Phase};
use api::context;
use api::kms::{Attestation, Op};
use api::mint::Assertion;
use audit::append::{self, keys::Keys};
use audit::integrate;
use kms::check::Trust;
use kms::fault::Faults;
use kms::{Kms, Setup};
use model::{AccountId, HostId, KeyId, Purpose, StartId, WorkspaceId};
use seal::hpke::SecretKey;
use seal::sign::{Signed, SigningKey};
use serde_json::Value;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use service::rpc::Uids;
use std::io::{BufRead as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};

const RUNS: usize = 3;
const RELEASES: usize = 4_000;
const WORKSPACES: u64 = 100;
const ACCOUNTS: u64 = 10;
const IN_FLIGHT: usize = 256;
const CONTROL_UID: u32 = 65_534;
const MEASUREMENT: &str = "abababababababababababababababababababababababababababababababab";

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let mut words = std::env::args().skip(1);
    if let (Some("control"), Some(dir)) = (words.next().as_deref(), words.next()) {
        return runtime.block_on(control(Path::new(&dir)));
    }
    let mut rates = Vec::new();
    for _ in 0..RUNS {
        rates.push(runtime.block_on(run())?);
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "bench kms audited_releases_per_s {:.0} releases/s",
        rates[RUNS / 2]
    );
    Ok(())
}

/// Releases per second.
async fn run() -> Result<f64> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755))?;
    let paths = Paths::new(dir.path());
    let (stop, stopped) = watch::channel(false);
    let trust = log_prepare(&paths)?;
    let mut tasks = vec![
        tokio::spawn(integrate_run(paths.clone(), stopped.clone())),
        tokio::spawn(append_run(paths.clone(), stopped.clone())),
    ];
    wait_for(&paths.socket(append::PROCESS, "append")).await?;

    let (mint, machine) = (SigningKey::generate(), SigningKey::generate());
    let clock = Clock::system();
    kms::init::init(&paths.state("kms"), None, clock.now_ms()).await?;
    let kms = Kms::open(Setup {
        dir: paths.state("kms"),
        trust: Trust {
            audit: trust,
            origin: tlog::class::Class::Host.origin(&Config::default().installation.name)?,
            mint: mint.public(),
            gateway: SigningKey::generate().public(),
            edge: SigningKey::generate().public(),
            hosts: [(host(), machine.public())].into(),
            disk_measurements: vec![MEASUREMENT.into()],
        },
        log: service::audit::Log::new(&paths),
        clock: clock.clone(),
        faults: Faults::default(),
    })
    .await?;
    kms.unseal_by_file().await?;
    let socket = paths.socket("kms", "kms");
    std::fs::create_dir_all(socket.parent().context("a socket has a directory")?)?;
    let listener = service::rpc::bind(&socket)?;
    let uids = Arc::new(uids("host"));
    let server = kms.clone();
    tasks.push(tokio::spawn(async move {
        service::rpc::serve(listener, uids, &["host"], stopped, move |peer, id, op| {
            let kms = server.clone();
            async move { kms.handle(peer, id, op).await }
        })
        .await;
        Ok(())
    }));

    let wish = |event: &str, n: u64| {
        let now_ms = clock.now_ms();
        let lease = lease(n % WORKSPACES, now_ms);
        (entry(event, n % WORKSPACES, &lease, &mint, now_ms), lease)
    };
    let creates: Vec<_> = (0..WORKSPACES)
        .map(|n| wish("workspace.create", n).0)
        .collect();
    let peer = service::rpc::Peer {
        uid: CONTROL_UID,
        process: "control".into(),
    };
    for receipt in receipts(dir.path(), creates).await? {
        let op = Op::WorkspaceKeyCreate { receipt };
        kms.handle(peer.clone(), "req_0123456789abcdef".into(), op)
            .await?;
    }
    let (starts, leases): (Vec<_>, Vec<_>) = (0..RELEASES as u64)
        .map(|n| wish("workspace.start", n))
        .unzip();
    let receipts = receipts(dir.path(), starts).await?;
    let releases: Vec<Op> = receipts
        .into_iter()
        .zip(leases)
        .map(|(receipt, lease)| Op::Release {
            receipt,
            attestation: attestation(&lease, &machine, clock.now_ms()),
        })
        .collect();
    ensure!(releases.len() == RELEASES, "a receipt is missing");

    let client = api::rpc::Client::new(&socket);
    let gate = Arc::new(Semaphore::new(IN_FLIGHT));
    let began = Instant::now();
    let calls: Vec<_> = releases
        .into_iter()
        .map(|op| {
            let (client, gate) = (client.clone(), Arc::clone(&gate));
            tokio::spawn(async move {
                let _one = gate.acquire().await?;
                let _: api::kms::Released = client.call("req_0123456789abcdef", &op).await?;
                Ok::<_, anyhow::Error>(())
            })
        })
        .collect();
    for call in calls {
        call.await??;
    }
    let rate = RELEASES as f64 / began.elapsed().as_secs_f64();
    stop.send_replace(true);
    for task in tasks {
        task.await??;
    }
    kms.close().await;
    Ok(rate)
}

/// Appends entries as control does and gives their receipts, by a process of its user.
async fn receipts(dir: &Path, entries: Vec<Entry>) -> Result<Vec<Value>> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("control")
        .arg(dir)
        .uid(CONTROL_UID)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the other user's process (this needs root)")?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    tokio::task::spawn_blocking(move || {
        for entry in entries {
            serde_json::to_writer(&mut stdin, &entry)?;
            stdin.write_all(b"\n")?;
        }
        drop(stdin);
        let out = child.wait_with_output()?;
        ensure!(out.status.success(), "the other user's process failed");
        out.stdout
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| Ok(serde_json::from_slice(l)?))
            .collect()
    })
    .await?
}

/// The other user's process: entries come in, receipts go out, in the same order.
async fn control(dir: &Path) -> Result<()> {
    let log = service::audit::Log::new(&Paths::new(dir));
    let mut calls = Vec::new();
    let gate = Arc::new(Semaphore::new(IN_FLIGHT));
    for line in std::io::stdin().lock().lines() {
        let entry: Entry = serde_json::from_str(&line?)?;
        let (log, gate) = (log.clone(), Arc::clone(&gate));
        calls.push(tokio::spawn(async move {
            let _one = gate.acquire().await?;
            Ok::<_, anyhow::Error>(log.append_with_receipt(Class::Host, entry).await?)
        }));
    }
    for call in calls {
        println!("{}", call.await??);
    }
    Ok(())
}

fn entry(event: &str, n: u64, lease: &Lease, mint: &SigningKey, now_ms: u64) -> Entry {
    let assertion = Assertion {
        account: account(n),
        key: KeyId::from_bytes([1; 8]),
        binding: "00".repeat(32),
        iat_ms: now_ms,
        exp_ms: now_ms + 30_000,
        jti: hex::encode(seal::random::bytes::<16>()),
    };
    Entry {
        event: event.into(),
        phase: Phase::Intent,
        request_id: "req_0123456789abcdef".into(),
        account: Some(account(n)),
        actor: "key_0101010101010101".into(),
        subject: Some(lease.workspace.to_string()),
        authority: Some(Signed::new(mint, context::ASSERTION, &assertion).to_string()),
        lease: Some(lease.clone()),
        result: None,
        data: serde_json::Map::new(),
    }
}

fn lease(n: u64, now_ms: u64) -> Lease {
    Lease {
        workspace: WorkspaceId::from_bytes(n.to_be_bytes()),
        host: host(),
        start_id: StartId::from_bytes(seal::random::bytes()),
        purpose: Purpose::Disk,
        nonce: hex::encode(seal::random::bytes::<32>()),
        exp_ms: now_ms + 60_000,
        config_digest: "cd".repeat(32),
        object: None,
        also: vec![],
    }
}

fn attestation(lease: &Lease, machine: &SigningKey, now_ms: u64) -> String {
    let attestation = Attestation {
        host: lease.host.clone(),
        workspace: lease.workspace.clone(),
        start_id: lease.start_id.clone(),
        purpose: lease.purpose,
        nonce: lease.nonce.clone(),
        hpke_pub: SecretKey::generate().public().to_hex(),
        measurement: MEASUREMENT.into(),
        time_ms: now_ms,
    };
    Signed::new(machine, context::ATTESTATION, &attestation).to_string()
}

fn account(n: u64) -> AccountId {
    AccountId::from_bytes((n % ACCOUNTS).to_be_bytes())
}

fn host() -> HostId {
    HostId::from_bytes([9; 8])
}

/// Directories, the log's key and day keys; the log's public key.
fn log_prepare(paths: &Paths) -> Result<seal::sign::VerifyingKey> {
    for process in [append::PROCESS, integrate::PROCESS] {
        std::fs::create_dir_all(paths.state(process))?;
        std::fs::create_dir_all(paths.run().join(process))?;
    }
    let mut keys = Keys::open(&paths.state(append::PROCESS))?;
    let key = SecretKey::generate().public();
    let today = tlog::leaf::day_of(Clock::system().now_ms());
    let days = tlog::class::Class::ALL
        .into_iter()
        .flat_map(|class| (today..today + 2).map(move |day| (class, day, key)));
    keys.days_set(days, today)?;
    integrate::init(paths, &Config::default())
}

async fn integrate_run(paths: Paths, stop: watch::Receiver<bool>) -> Result<()> {
    integrate::run(&paths, &Config::default(), uids(append::PROCESS), stop).await
}

async fn append_run(paths: Paths, stop: watch::Receiver<bool>) -> Result<()> {
    append::run(&paths, uids("kms"), Clock::system(), stop).await
}

/// This process's user under one name, and control's.
fn uids(me: &str) -> Uids {
    let own = rustix::process::getuid().as_raw();
    Uids::from_map([(me.to_owned(), own), ("control".to_owned(), CONTROL_UID)].into())
}

async fn wait_for(socket: &Path) -> Result<()> {
    for _ in 0..1_000 {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    anyhow::bail!("{} does not answer", socket.display())
}
