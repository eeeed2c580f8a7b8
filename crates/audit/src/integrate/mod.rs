//! The integrate process: builds the trees from the segments and signs their checkpoints. It holds
//! the log's key.
//!
//! Must never read a payload, integrate what append has not called durable, or sign what does not
//! follow from its own last checkpoint.

pub mod log;
pub mod tiles;

use crate::limits::RECEIPTS_MAX;
use crate::{api_class, metrics};
use anyhow::Context as _;
use api::{Error, ErrorCode};
use log::{Integrated, Log, Source};
use seal::sign::SigningKey;
use serde::{Deserialize, Serialize};
use service::config::Config;
use service::paths::Paths;
use service::rpc::{Peer, Uids, ok};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tlog::class::Class;
use tokio::sync::watch;

/// The process's name.
pub const PROCESS: &str = "audit-integrate";
/// Who may ask.
const ALLOW: &[&str] = &["audit-append"];
const KEY_FILE: &str = "log.key";

/// A request of the append process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Answer: class → entries integrated ([`Sizes`]).
    Sizes,
    /// Integrates up to `size` entries, all of which are durable. Answer: [`Integrated`].
    Integrate {
        /// The log.
        class: Class,
        /// How many entries are durable.
        size: u64,
        /// Entries whose proofs are wanted, all below `size`; at most 256.
        receipts: Vec<u64>,
    },
}

/// Class → how many entries are in its tree.
pub type Sizes = BTreeMap<Class, u64>;

/// Where the tree of a class is.
#[must_use]
pub fn log_dir(paths: &Paths, class: Class) -> PathBuf {
    paths.state(PROCESS).join(class.name())
}

/// Makes the log's key and five empty logs, unless there are any; the key's public half.
///
/// # Errors
/// When there are logs without the key that signed them, or the file system fails.
pub fn init(paths: &Paths, config: &Config) -> anyhow::Result<seal::sign::VerifyingKey> {
    let state = paths.state(PROCESS);
    let key_path = state.join(KEY_FILE);
    if key_path.exists() {
        return Ok(key_load(&key_path)?.public());
    }
    let seed = seal::secret::SecretBytes::<32>::random();
    let key = SigningKey::from_seed(seed.expose());
    for class in Class::ALL {
        let dir = log_dir(paths, class);
        if dir.join("tile").exists() {
            anyhow::bail!(
                "{} holds entries, but {} is missing: restore it from a backup",
                dir.display(),
                key_path.display()
            );
        }
        log::create(
            &crate::disk::Disk::default(),
            &dir,
            class,
            &config.installation.name,
            &key,
        )
        .with_context(|| format!("make the log {class}"))?;
    }
    // Last: without the key, the next attempt starts over.
    service::files::write_atomic(&key_path, seed.expose(), 0o600)
        .with_context(|| format!("write {}", key_path.display()))?;
    Ok(key.public())
}

fn key_load(path: &Path) -> anyhow::Result<SigningKey> {
    let bytes = seal::Zeroizing::new(
        service::files::read_bounded(path, 32)
            .with_context(|| format!("read {}; `casemate up` makes it", path.display()))?,
    );
    let seed = seal::secret::SecretBytes::<32>::from_slice(&bytes).with_context(|| {
        format!(
            "{} must hold 32 bytes; restore it from a backup",
            path.display()
        )
    })?;
    Ok(SigningKey::from_seed(seed.expose()))
}

/// Serves until `stop` turns true.
///
/// # Errors
/// When a log is not what its last checkpoint says, or the socket can't be made.
pub async fn run(
    paths: &Paths,
    config: &Config,
    uids: Uids,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let state = paths.state(PROCESS);
    let _lock = crate::lock(&state)?;
    let key = key_load(&state.join(KEY_FILE))?;
    let mut logs = BTreeMap::new();
    let mut registry = metrics::registry();
    let figures = metrics::Integrate::register(&mut registry);
    for class in Class::ALL {
        let source = Source {
            disk: crate::disk::Disk::default(),
            dir: log_dir(paths, class),
            segments: crate::append::segments_dir(paths, class),
            class,
            installation: config.installation.name.clone(),
            key: key.clone(),
        };
        let log = Log::open(source)?;
        figures
            .size
            .get_or_create(&metrics::of(class))
            .set(metrics::gauge(log.size()));
        logs.insert(class, Arc::new(Mutex::new(log)));
    }
    let listener = service::rpc::bind(&paths.socket(PROCESS, "integrate"))?;
    let _metrics = service::metrics::serve(&paths.socket(PROCESS, "metrics"), registry)?;
    let logs = Arc::new(logs);
    let handler = move |_: Peer, _: String, op: Op| {
        let (logs, figures) = (Arc::clone(&logs), figures.clone());
        async move {
            tokio::task::spawn_blocking(move || answer(&logs, &figures, op))
                .await
                .map_err(Error::internal)?
        }
    };
    tracing::info!("ready");
    service::rpc::serve(listener, Arc::new(uids), ALLOW, stop, handler).await;
    Ok(())
}

fn answer(
    logs: &BTreeMap<Class, Arc<Mutex<Log>>>,
    figures: &metrics::Integrate,
    op: Op,
) -> api::Result<serde_json::Value> {
    let lock = |log: &'_ Arc<Mutex<Log>>| Arc::clone(log);
    match op {
        Op::Sizes => {
            let sizes: Sizes = logs
                .iter()
                .map(|(class, log)| {
                    (
                        *class,
                        lock(log)
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .size(),
                    )
                })
                .collect();
            ok(&sizes)
        }
        Op::Integrate {
            class,
            size,
            receipts,
        } => {
            if receipts.len() > RECEIPTS_MAX || receipts.iter().any(|index| *index >= size) {
                return Err(Error::new(
                    ErrorCode::ValidationError,
                    "receipts: at most 256, each below size",
                ));
            }
            let log = logs
                .get(&class)
                .ok_or_else(|| Error::internal(format!("no log {}", api_class(class).name())))?;
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            let before = log.size();
            let done: Integrated = log.integrate(size, &receipts).map_err(|e| {
                figures.failures.get_or_create(&metrics::of(class)).inc();
                tracing::error!(%class, error = %e, "integrate");
                Error::new(ErrorCode::AuditUnavailable, "the log can't be integrated").detail(e)
            })?;
            if done.size > before {
                figures.checkpoints.get_or_create(&metrics::of(class)).inc();
            }
            figures
                .receipts
                .get_or_create(&metrics::of(class))
                .inc_by(receipts.len() as u64);
            figures
                .size
                .get_or_create(&metrics::of(class))
                .set(metrics::gauge(done.size));
            ok(&done)
        }
    }
}
