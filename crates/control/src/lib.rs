//! The control daemon: workspaces as their owners ask for them.
//!
//! ```text
//! http/ ──▶ app/ ──▶ store/        a request: unwrapped, decided, persisted; the same noun at each hop
//! reconcile ──▶ app/               what nobody asks for: restarts, ends of time, unfinished deletions
//!    app/ ──▶ audit, kms, mint, host
//! ```
//!
//! Must never be root, hold a disk key or a signing key, see a client's secret, or act for a
//! client without an assertion that mint signed for that very request.
#![forbid(unsafe_code)]

pub mod app;
pub mod audit;
pub mod http;
pub mod limits;
pub mod metrics;
pub mod op;
pub mod reconcile;
pub mod spool;
pub mod store;

use anyhow::Context as _;
use app::{App, Peers};
use audit::Audit;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use service::trust;
use spool::Spool;
use std::sync::Arc;
use store::Store;
use tokio::sync::watch;

/// The daemon's name.
pub const NAME: &str = "control";

/// Makes what is missing in the state directory. Idempotent.
///
/// # Errors
/// The database's.
pub async fn init(paths: &Paths, config: &Config) -> anyhow::Result<()> {
    let store = Store::open(&config.control.database, &paths.state(NAME)).await?;
    store.close().await;
    Ok(())
}

/// Opens what the daemon works with.
///
/// # Errors
/// If the state or the trusted keys can't be used.
pub async fn open(paths: &Paths, config: &Config, clock: Clock) -> anyhow::Result<Arc<App>> {
    let store = Store::open(&config.control.database, &paths.state(NAME)).await?;
    let spool = Spool::open(&paths.state(NAME).join("spool.jsonl"))?;
    let audit = Audit::new(service::audit::Log::new(paths), spool);
    let peers = Peers {
        kms: api::rpc::Client::new(paths.socket("kms", "kms")),
        mint: api::rpc::Client::new(paths.socket("mint", "mint")),
        host: api::rpc::Client::new(paths.socket("host", "host")),
    };
    let keys = (
        trust::key(paths, trust::MINT)?,
        trust::key(paths, trust::KMS)?,
    );
    Ok(App::new(store, audit, clock, config.clone(), peers, keys))
}

/// Serves until `stop`.
///
/// # Errors
/// If the state, the trusted keys or the sockets can't be used.
pub async fn run(
    paths: &Paths,
    config: &Config,
    clock: Clock,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let app = open(paths, config, clock).await?;
    let uids = Arc::new(service::rpc::Uids::load(paths)?);
    let metrics = service::metrics::serve(&paths.socket(NAME, "metrics"), app.metrics.registry())?;
    let listener = service::rpc::bind(&paths.socket(NAME, "http"))?;
    let reconciler = tokio::spawn(reconcile::run(Arc::clone(&app), stop.clone()));
    let server = http::Server::new(Arc::clone(&app));
    http::serve(listener, uids, server, stop)
        .await
        .context("serve")?;
    reconciler.await.context("reconciler")?;
    metrics.abort();
    app.store.close().await;
    Ok(())
}
