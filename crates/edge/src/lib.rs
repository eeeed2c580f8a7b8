//! The edge: TLS 1.3, routes by Host, mTLS to the guest.
//!
//! ```text
//!  client ─TLS 1.3─▶ server ─▶ hosts ┬▶ control ─▶ mint: Assert ─▶ control's HTTP socket
//!                                    └▶ gateway ─▶ state: admit ─▶ guest: mTLS, streamed
//!                                                     ▲ feeds: mint's token states, host's routes
//! ```
//! It terminates clients' TLS, and that is its residual: who owns it sees the traffic it is
//! terminating. Must never store a body, pass a client's secret on, or dial an address from a
//! token.
#![forbid(unsafe_code)]

pub mod activity;
pub mod answer;
pub mod awaited;
pub mod body;
pub mod control;
pub mod crowd;
pub mod feeds;
pub mod gateway;
pub mod guest;
pub mod handover;
pub mod headers;
pub mod hosts;
pub mod identity;
pub mod limits;
pub mod metrics;
pub mod server;
pub mod state;
pub mod upstream;
pub mod wake;
pub mod wire;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use api::rpc::Client;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use seal::sign::VerifyingKey;
use seal::tls::Identity;
use seal::tls::rustls::ServerConfig;
use serde_json::json;
use service::Boot;
use service::clock::Clock;
use service::{print_trust, stop_requested, trust};
use tokio::sync::watch;

use control::Control;
use feeds::Feeds;
use gateway::Gateway;
use guest::Guests;
use hosts::Hosts;
use identity::Keys;
use limits::{
    CONNECTIONS_MAX, FILES_RESERVED, FILES_WANTED, READY_MAX_WAIT, SERVER_CERT_CHECK_EVERY,
    UPSTREAM_IDLE_MAX,
};
use metrics::Metrics;
use server::Server;
use state::{GuestNet, Source, Table};
use wake::Wakes;

/// What the edge is made of.
pub struct Parts {
    /// The host names of both planes.
    pub hosts: Hosts,
    /// The identity towards guests.
    pub identity: Identity,
    /// Mint's key: token states.
    pub mint_key: VerifyingKey,
    /// The key of gateway tokens.
    pub gateway_key: VerifyingKey,
    /// Mint's socket.
    pub mint: PathBuf,
    /// Host's socket.
    pub host: PathBuf,
    /// Control's HTTP socket.
    pub control: PathBuf,
    /// Where guests are.
    pub net: GuestNet,
    /// The clock.
    pub clock: Clock,
    /// Client connections at once.
    pub connections_max: usize,
    /// How long a request waits for a workspace that wakes.
    pub wake_max: Duration,
}

/// A running edge's inside.
pub struct Edge {
    server: Arc<Server>,
    host: PathBuf,
    /// Who may pass.
    pub table: Arc<Table>,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl Edge {
    /// Puts the parts together; nothing runs yet.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        let metrics = Arc::new(Metrics::default());
        let table = Table::new(parts.mint_key, parts.net);
        let guests = Arc::new(Guests::new(parts.identity, Arc::clone(&metrics)));
        // Clients of their own: a stuck feed must not delay an assertion.
        let (mint, host) = (Client::new(&parts.mint), Client::new(&parts.host));
        let wakes = Wakes::new(Client::new(&parts.host), parts.wake_max);
        let feeds = Feeds::new(mint, host, Arc::clone(&table));
        let server = Arc::new(Server {
            hosts: parts.hosts,
            control: Control::new(Client::new(&parts.mint), parts.control),
            gateway: Gateway {
                key: parts.gateway_key,
                table: Arc::clone(&table),
                feeds,
                wakes,
                guests,
                clock: parts.clock,
            },
            metrics: Arc::clone(&metrics),
            connections_max: parts.connections_max,
        });
        Self {
            server,
            host: parts.host,
            table,
            metrics,
        }
    }

    /// Serves until `stop` turns true, then drains.
    pub async fn serve(
        &self,
        listeners: Vec<tokio::net::TcpListener>,
        tls: watch::Receiver<Arc<ServerConfig>>,
        stop: watch::Receiver<bool>,
    ) {
        let mut background = tokio::task::JoinSet::new();
        let table = || Arc::clone(&self.table);
        for source in [Source::Mint, Source::Host] {
            let feeds = Arc::clone(&self.server.gateway.feeds);
            background.spawn(feeds.follow(source));
        }
        let guests = Arc::clone(&self.server.gateway.guests);
        background.spawn(feeds::tell_guests(
            table(),
            guests,
            Arc::clone(&self.metrics),
        ));
        background.spawn(activity::report(table(), self.host.clone()));
        background.spawn(sweep(Arc::clone(&self.server)));
        server::serve(Arc::clone(&self.server), listeners, tls, stop).await;
        background.shutdown().await;
    }
}

/// Closes idle connections to what is behind the edge, for ever.
async fn sweep(server: Arc<Server>) {
    loop {
        tokio::time::sleep(UPSTREAM_IDLE_MAX).await;
        server.gateway.guests.sweep(&server.gateway.table);
        server.control.sweep();
    }
}

/// Makes keys that are missing and prints the public halves.
///
/// # Errors
/// What can't be made or kept.
pub fn init(boot: &Boot) -> anyhow::Result<()> {
    let keys = keys(boot);
    hosts(boot)?;
    let identity = keys.identity()?.public().to_hex();
    let ca = keys.ca_pem()?;
    keys.server(boot.clock.now_s())?;
    print_trust(&[(trust::EDGE, json!(identity)), ("ca.pem", json!(ca))].into());
    Ok(())
}

/// Serves until SIGTERM.
///
/// # Errors
/// What is missing, and where it comes from.
pub fn run(boot: &Boot) -> anyhow::Result<()> {
    // Clients' secrets pass through this memory.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("forbid core dumps")?;
    let listeners = handover::listeners(rustix::stdio::stdin())?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run_with(boot, listeners))
}

async fn run_with(boot: &Boot, listeners: Vec<TcpListener>) -> anyhow::Result<()> {
    let paths = &boot.paths;
    let keys = keys(boot);
    let edge = Edge::new(Parts {
        hosts: hosts(boot)?,
        identity: keys.identity()?,
        mint_key: trust::key(paths, trust::MINT)?,
        gateway_key: trust::key(paths, trust::GATEWAY)?,
        mint: paths.socket("mint", "mint"),
        host: paths.socket("host", "host"),
        control: paths.socket("control", "http"),
        net: GuestNet {
            base: boot.config.network.base,
            port: model::limits::PORT_AGENT_TLS,
        },
        clock: boot.clock.clone(),
        connections_max: connections_max(),
        wake_max: limits::WAKE_MAX,
    });
    let listeners = listeners
        .into_iter()
        .map(tokio::net::TcpListener::from_std)
        .collect::<Result<Vec<_>, _>>()
        .context("use the listeners")?;
    let (tls, tls_now) = watch::channel(keys.server(boot.clock.now_s())?);
    let (stop, stopping) = watch::channel(false);
    let metrics = service::metrics::serve(
        &paths.socket("edge", "metrics"),
        edge.metrics.registry(&edge.table),
    )?;
    let renewing = tokio::spawn(renew(keys, boot.clock.clone(), tls));
    let ready = Ready::at(paths.run().join("edge/ready"));
    let announced = async {
        let fresh = async {
            while !edge.table.is_fresh() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(READY_MAX_WAIT, fresh).await.is_err() {
            tracing::warn!("mint or host does not answer yet; requests to workspaces wait for it");
        }
        ready.announce()?;
        stop_requested().await;
        ready.withdraw();
        // The receiver lives as long as the server.
        let _ = stop.send(true);
        anyhow::Ok(())
    };
    let serving = async {
        edge.serve(listeners, tls_now, stopping).await;
        anyhow::Ok(())
    };
    let ended = tokio::try_join!(announced, serving);
    ready.withdraw();
    renewing.abort();
    metrics.abort();
    ended.map(|_| ())
}

/// Replaces the server certificate in time, without a restart.
async fn renew(keys: Keys, clock: Clock, tls: watch::Sender<Arc<ServerConfig>>) {
    loop {
        tokio::time::sleep(SERVER_CERT_CHECK_EVERY).await;
        match keys.server(clock.now_s()) {
            Ok(config) => {
                tls.send_replace(config);
            }
            Err(e) => tracing::error!(error = format!("{e:#}"), "renew the server certificate"),
        }
    }
}

/// The file by which the supervisor knows that the edge serves.
struct Ready(PathBuf);

impl Ready {
    fn at(path: PathBuf) -> Self {
        Self(path)
    }

    fn announce(&self) -> anyhow::Result<()> {
        let path: &Path = &self.0;
        std::fs::write(path, b"").with_context(|| format!("write {}", path.display()))
    }

    fn withdraw(&self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn keys(boot: &Boot) -> Keys {
    let edge = &boot.config.edge;
    Keys::new(
        boot.paths.state("edge"),
        edge.control_hosts.iter().chain(&edge.gateway_hosts),
    )
}

fn hosts(boot: &Boot) -> anyhow::Result<Hosts> {
    let edge = &boot.config.edge;
    Hosts::new(&edge.control_hosts, &edge.gateway_hosts)
}

/// Asks for more open files, and fits the number of connections to what is granted: each may
/// need one to the guest as well.
fn connections_max() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES_WANTED, |m| m.min(FILES_WANTED));
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    let granted = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => Some(wanted),
        Err(_) => limit.current,
    };
    let files = granted.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    (files.saturating_sub(FILES_RESERVED) / 2).clamp(16, CONNECTIONS_MAX)
}
