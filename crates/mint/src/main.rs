//! `casemate-mint`: serves `mint/mint.sock`.

use anyhow::{Context as _, bail};
use mint::keys::Keys;
use mint::store::Store;
use mint::{Mint, Setup};
use service::{Boot, Command, audit, metrics, rpc, trust};
use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

const PEERS: &[&str] = &["edge", "control", "host", "root"];

fn main() -> anyhow::Result<()> {
    seal::secret::harden_process()?;
    seal::secret::install_secret_heap(mint::limits::SECRET_HEAP_BYTES)?;
    let boot = service::boot("mint")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match boot.command {
            Command::Init => init(&boot).await,
            Command::Run => run(boot).await,
        }
    })
}

async fn init(boot: &Boot) -> anyhow::Result<()> {
    if !boot.rest.is_empty() {
        bail!("init takes no arguments");
    }
    let dir = boot.paths.state("mint");
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("make {}", dir.display()))?;
    let keys = Keys::open(&dir)?;
    Store::open(&dir.join("state.db"), true)
        .await?
        .close()
        .await;
    service::print_trust(&BTreeMap::from([
        (trust::MINT, keys.sign.public().to_hex().into()),
        (trust::GATEWAY, keys.gateway.public().to_hex().into()),
    ]));
    Ok(())
}

async fn run(boot: Boot) -> anyhow::Result<()> {
    let paths = &boot.paths;
    let dir = paths.state("mint");
    let lock = std::fs::File::create(dir.join("lock")).context("run `casemate-mint init` first")?;
    if lock.try_lock().is_err() {
        bail!(
            "another casemate-mint runs on {}; stop it first",
            dir.display()
        );
    }
    let mint = Mint::open(Setup {
        dir,
        kms: trust::key(paths, trust::KMS)?,
        log: audit::Log::new(paths),
        clock: boot.clock.clone(),
    })
    .await?;
    let mut registry = prometheus_client::registry::Registry::default();
    mint.metrics().register(&mut registry);
    let _metrics = metrics::serve(&paths.socket("mint", "metrics"), registry)?;
    let listener = rpc::bind(&paths.socket("mint", "mint"))?;
    let uids = Arc::new(rpc::Uids::load(paths)?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let duties = tokio::spawn(duties(mint.clone()));
    let handler = {
        let mint = mint.clone();
        move |peer, request_id, op| {
            let mint = mint.clone();
            async move { mint.handle(peer, request_id, op).await }
        }
    };
    let server = tokio::spawn(rpc::serve(listener, uids, PEERS, stopped, handler));
    service::stop_requested().await;
    let _ = stop.send(true);
    mint.stop();
    let _ = server.await;
    duties.abort();
    mint.close().await;
    drop(lock);
    Ok(())
}

/// Tells the log what waited for it.
async fn duties(mint: Mint) {
    let mut tick = tokio::time::interval(mint::limits::DUTY_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Err(e) = mint.outbox_drain().await {
            tracing::warn!(error = %e, detail = e.detail.as_deref().unwrap_or(""), "outbox");
        }
    }
}
