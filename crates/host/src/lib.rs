//! The host daemon: brings one machine's workspaces from what control wants to what is so.
//!
//! ```text
//! control ──Apply──▶ host ──ids──▶ warden     slots, disks, rules
//! edge ◀──Changes──   │  ──lease─▶ kms        sealed key, carried unopened
//!                     └──────────▶ vmctl      one VM's power
//! ```
//!
//! Must never be root, hold a key, open a VMM's socket, or hold a descriptor of a disk or of a
//! guest's memory: it names ids, and carries ciphertext that it can't open.
#![forbid(unsafe_code)]

pub mod desired;
pub mod feed;
pub mod fleet;
pub mod host;
pub mod images;
pub mod limits;
pub mod machine;
pub mod peers;
pub mod workspace;

use anyhow::Context as _;
use desired::Store;
use feed::Feed;
use fleet::{Bounds, Fleet};
use host::{Host, PoolWish};
use peers::Peers;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use workspace::Shared;

/// The daemon's name.
pub const NAME: &str = "host";

/// Who is heard.
pub const PEERS: &[&str] = &["control", "edge", "root"];

/// Makes what is missing in the state directory. Idempotent.
///
/// # Errors
/// The directory's.
pub fn init(paths: &Paths) -> anyhow::Result<()> {
    Store::open(&paths.state(NAME).join("desired")).map(drop)
}

/// Serves until `stop`.
///
/// # Errors
/// If the state, the uid table or the sockets can't be used.
pub async fn run(
    paths: &Paths,
    config: &Config,
    clock: Clock,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let peers = Peers::new(paths);
    let bounds = Bounds {
        max_running: config.host.max_running,
        pool_size: config.host.pool_size,
    };
    let shared = Arc::new(Shared {
        fleet: Fleet::new(peers.clone(), bounds),
        peers,
        feed: Feed::new(clock.now_ms()),
        store: Store::open(&paths.state(NAME).join("desired"))?,
        clock,
    });
    let pool = PoolWish {
        image: config.host.pool_image.clone(),
        memory_mb: config.host.pool_memory_mb,
    };
    let host = Host::new(Arc::clone(&shared), paths.artifacts(), pool);
    let uids = Arc::new(service::rpc::Uids::load(paths)?);
    let listener = service::rpc::bind(&paths.socket(NAME, NAME))?;
    let mut stopping = stop.clone();
    tokio::select! {
        recovered = host.recover() => recovered.context("take over what runs")?,
        _ = stopping.wait_for(|s| *s) => return Ok(()),
    }
    let metrics = metrics(Arc::clone(&shared), paths)?;
    let tasks = tokio::spawn(Arc::clone(&host).run(stop.clone()));
    let stopping = stop.clone();
    let answer = move |peer, _request_id, op: api::host::Op| {
        let (host, mut stopping) = (Arc::clone(&host), stopping.clone());
        async move {
            // Who waits for news is not waited for.
            let waits = matches!(op, api::host::Op::Changes { .. });
            tokio::select! {
                biased;
                answer = host.handle(peer, op) => answer,
                () = stopped(&mut stopping), if waits => Err(api::Error::new(
                    api::ErrorCode::Unavailable,
                    "host is stopping; ask again",
                )),
            }
        }
    };
    service::rpc::serve(listener, uids, PEERS, stop, answer).await;
    tasks.await.context("background tasks")?;
    metrics.abort();
    Ok(())
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|s| *s).await;
}

/// Gauges of what runs, refreshed every few seconds.
fn metrics(shared: Arc<Shared>, paths: &Paths) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    let mut registry = Registry::default();
    let gauge = |registry: &mut Registry, name: &str, help: &str| {
        let gauge: Gauge = Gauge::default();
        registry.register(name, help, gauge.clone());
        gauge
    };
    let running = gauge(
        &mut registry,
        "host_workspaces_running",
        "Workspaces that run",
    );
    let failed = gauge(
        &mut registry,
        "host_workspaces_failed",
        "Workspaces that failed to start or crashed",
    );
    let pool = gauge(&mut registry, "host_pool_ready", "Pooled VMs ready");
    let served = service::metrics::serve(&paths.socket(NAME, "metrics"), registry)?;
    Ok(tokio::spawn(async move {
        let _served = AbortOnDrop(served);
        loop {
            use api::host::ActualState as S;
            let states = shared.feed.list();
            let count = |of: &[S]| states.iter().filter(|a| of.contains(&a.state)).count();
            let as_i64 = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
            running.set(as_i64(count(&[S::Running])));
            failed.set(as_i64(count(&[S::Failed, S::Crashed])));
            pool.set(i64::from(shared.fleet.pool_size().0));
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
