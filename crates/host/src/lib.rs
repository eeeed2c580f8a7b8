//! The host daemon: brings one machine's workspaces from what control wants to what is so.
//!
//! ```text
//! control ──Apply──▶ host ──ids──▶ warden     slots, disks, rules
//! edge ◀──Changes──   │  ──lease─▶ kms        sealed key, carried unopened
//!                     │  ◀─anchor─ warden ─▶ kms: how far a disk has got, carried unchanged
//!                     └──────────▶ vmctl      one VM's power
//! ```
//!
//! Must never be root, hold a key, open a VMM's socket, or hold a descriptor of a disk or of a
//! guest's memory: it names ids, and carries ciphertext that it can't open.
#![forbid(unsafe_code)]

pub mod activity;
pub mod anchors;
pub mod desired;
pub mod feed;
pub mod fleet;
pub mod host;
pub mod images;
pub mod limits;
pub mod machine;
mod metrics;
pub mod peers;
mod save;
pub mod workspace;

use anchors::Anchors;
use anyhow::Context as _;
use desired::Store;
use feed::Feed;
use fleet::{Bounds, Fleet};
use host::{Host, PoolWish};
use peers::Peers;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use std::sync::Arc;
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
        peers: peers.clone(),
        feed: Feed::new(clock.now_ms()),
        store: Store::open(&paths.state(NAME).join("desired"))?,
        clock,
        activity: activity::Activity::new(),
        anchors: Anchors::open(peers.clone(), &paths.state(NAME).join("anchors"))?,
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
    let metrics = metrics::serve(Arc::clone(&shared), paths)?;
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
