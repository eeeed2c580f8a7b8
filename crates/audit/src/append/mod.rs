//! The append process: stamps, numbers, seals and makes durable what the platform's processes
//! report.
//!
//! ```text
//!  connections ──▶ queue (one per class) ──▶ writer thread: Log::commit ──▶ answers
//!                                                 │ durable                  ▲
//!                                                 ▼                          │ proofs
//!                                               link ──▶ integrate.sock ─────┘
//! ```
//!
//! Must never answer what is in a log, take a process's name from anybody but the kernel, or answer
//! before the entry is durable.

pub mod keys;
pub mod link;
pub mod log;
pub mod sealer;

use crate::integrate::Sizes;
use crate::limits::{
    BATCH_BYTES_SOFT, BATCH_ENTRIES_MAX, BATCH_KEY_LIFE, DAY_KEYS_REQUEST_MAX, EVENT_MAX_BYTES,
    FIELD_MAX_BYTES, QUEUE_MAX, RECEIPT_TIMEOUT, START_TIMEOUT,
};
use crate::{log_class, metrics};
use anyhow::{Context as _, bail};
use api::audit::{Appended, Entry, Op, Phase, Stamped};
use api::limits::AUDIT_PAYLOAD_MAX_BYTES;
use api::rpc::Client;
use api::{Error, ErrorCode};
use keys::Keys;
use link::Link;
use log::{Committed, Draft, Log, Placed};
use seal::hpke::PublicKey;
use service::clock::Clock;
use service::paths::Paths;
use service::rpc::{Peer, Uids, ok};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;
use tlog::class::Class;
use tlog::leaf::day_of;
use tlog::receipt::Receipt;
use tokio::sync::{mpsc, oneshot, watch};

/// The process's name.
pub const PROCESS: &str = "audit-append";
/// Who may append. Warden runs as root.
const ALLOW: &[&str] = &[
    "control",
    "kms",
    "mint",
    "host",
    "edge",
    "audit-read",
    "root",
];
/// Who may publish keys.
const KMS: &str = "kms";

/// Where a class's segments are.
#[must_use]
pub fn segments_dir(paths: &Paths, class: Class) -> PathBuf {
    paths.state(PROCESS).join(class.name())
}

/// Makes the blinding key, unless there is one.
///
/// # Errors
/// The file system's.
pub fn init(paths: &Paths) -> anyhow::Result<()> {
    let path = blinding_path(paths);
    service::files::seed_or_create(&path).with_context(|| format!("make {}", path.display()))?;
    Ok(())
}

fn blinding_path(paths: &Paths) -> PathBuf {
    paths.state(PROCESS).join("blinding.key")
}

/// Serves until `stop` turns true, or a log can't be written.
///
/// # Errors
/// When a segment is damaged, the published log is longer than the segments, or a write failed:
/// then the process must start anew and look at what is on the disk.
pub async fn run(
    paths: &Paths,
    uids: Uids,
    clock: Clock,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let state = paths.state(PROCESS);
    let _lock = crate::lock(&state)?;
    init(paths)?;
    let blinding = service::files::seed_or_create(&blinding_path(paths))?;
    let keys = Arc::new(RwLock::new(Keys::open(&state)?));
    let mut registry = metrics::registry();
    let figures = metrics::Append::register(&mut registry);
    let integrate = Client::new(paths.socket(crate::integrate::PROCESS, "integrate"));
    let mut logs = BTreeMap::new();
    for class in Class::ALL {
        let dir = segments_dir(paths, class);
        let log = Log::open(crate::disk::Disk::default(), &dir, class, blinding.clone())?;
        logs.insert(class, log);
    }
    sizes_check(&integrate, &logs).await?;
    let (broken, mut broke) = mpsc::channel::<log::LogError>(Class::ALL.len());
    let mut writers = BTreeMap::new();
    let mut threads = Vec::new();
    let mut links = Vec::new();
    for (class, log) in logs {
        let (queue, jobs) = mpsc::channel(QUEUE_MAX);
        let (link, task) = Link::start(class, log.size(), integrate.clone(), queue.downgrade());
        let writer = Writer {
            log,
            keys: Arc::clone(&keys),
            clock: clock.clone(),
            link,
            figures: figures.clone(),
            class,
        };
        let broken = broken.clone();
        threads.push(
            std::thread::Builder::new()
                .name(format!("append-{class}"))
                .spawn(move || {
                    if let Err(e) = writer.run(jobs) {
                        // The receiver is gone only when the process is ending anyway.
                        let _ = broken.blocking_send(e);
                    }
                })
                .context("start a writer")?,
        );
        links.push(task);
        writers.insert(class, queue);
    }
    let appender = Arc::new(Appender {
        keys,
        clock,
        writers,
        figures,
    });
    let listener = service::rpc::bind(&paths.socket(PROCESS, "append"))?;
    let _metrics = service::metrics::serve(&paths.socket(PROCESS, "metrics"), registry)?;
    let purge = tokio::spawn(purge_often(Arc::clone(&appender)));
    let handler = {
        let appender = Arc::clone(&appender);
        move |peer: Peer, _: String, op: Op| {
            let appender = Arc::clone(&appender);
            async move { appender.answer(&peer, op).await }
        }
    };
    tracing::info!("ready");
    let result = tokio::select! {
        () = service::rpc::serve(listener, Arc::new(uids), ALLOW, stop, handler) => Ok(()),
        Some(e) = broke.recv() => Err(e),
    };
    purge.abort();
    let _ = purge.await;
    // The queues end with the last appender: a connection that is still open holds one.
    drop(appender);
    drop(broken);
    if result.is_ok() {
        let drained = async {
            for task in links {
                let _ = task.await;
            }
        };
        let _ = tokio::time::timeout(service::limits::DRAIN_MAX, drained).await;
        for thread in threads
            .into_iter()
            .filter(std::thread::JoinHandle::is_finished)
        {
            let _ = thread.join();
        }
    }
    result.map_err(anyhow::Error::from)
}

/// Refuses to go on from segments that end before what is published.
async fn sizes_check(integrate: &Client, logs: &BTreeMap<Class, Log>) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_TIMEOUT;
    let sizes: Sizes = loop {
        match integrate.call("start", &crate::integrate::Op::Sizes).await {
            Ok(sizes) => break sizes,
            Err(e) if Instant::now() > deadline => {
                return Err(e).context("ask audit-integrate for the logs' sizes; is it running?");
            }
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
        }
    };
    for (class, log) in logs {
        let published = sizes.get(class).copied().unwrap_or(0);
        if published > log.size() {
            bail!(
                "audit log {class}: the segments end at entry {}, the published log at {published}: \
                 restore {PROCESS}'s state from a backup, or check the log with `casemate audit verify`",
                log.size()
            );
        }
    }
    Ok(())
}

/// What the writer of a class is asked to do.
pub(crate) enum Job {
    /// Append and answer, and have the proof made if it is wanted.
    Append(Draft, Caller),
    /// So many entries are in the tree, durably.
    Integrated(u64),
    /// Look after batch keys.
    Purge,
}

/// Who waits for an entry.
pub(crate) struct Caller {
    placed: oneshot::Sender<api::Result<Placed>>,
    proof: Option<link::Answer>,
}

struct Writer {
    log: Log,
    keys: Arc<RwLock<Keys>>,
    clock: Clock,
    link: Link,
    figures: metrics::Append,
    class: Class,
}

impl Writer {
    /// Works off the queue until it is closed.
    fn run(mut self, mut jobs: mpsc::Receiver<Job>) -> Result<(), log::LogError> {
        while let Some(job) = jobs.blocking_recv() {
            let (mut drafts, mut callers, mut bytes) = (Vec::new(), Vec::new(), 0);
            let mut next = Some(job);
            while let Some(job) = next.take() {
                match job {
                    Job::Append(draft, caller) => {
                        bytes += draft.payload.len();
                        drafts.push(draft);
                        callers.push(caller);
                    }
                    Job::Integrated(size) => {
                        self.figures
                            .integrated
                            .get_or_create(&metrics::of(self.class))
                            .set(metrics::gauge(size));
                        if let Err(e) = self.log.forget(size) {
                            tracing::warn!(error = %e, "an integrated segment stays");
                        }
                    }
                    Job::Purge => self.log.purge(Instant::now()),
                }
                if drafts.len() < BATCH_ENTRIES_MAX && bytes < BATCH_BYTES_SOFT {
                    next = jobs.try_recv().ok();
                }
            }
            if !drafts.is_empty() {
                self.commit(drafts, callers)?;
            }
        }
        Ok(())
    }

    fn commit(&mut self, drafts: Vec<Draft>, callers: Vec<Caller>) -> Result<(), log::LogError> {
        let wall_ms = self.clock.now_ms();
        let done = match self.commit_at(drafts, wall_ms) {
            Ok(done) => done,
            Err(e) => {
                tracing::error!(class = %self.class, error = %e, "append");
                for caller in callers {
                    let _ = caller.placed.send(Err(unavailable(&e)));
                }
                return Err(e);
            }
        };
        let of = metrics::of(self.class);
        let count = done.placed.iter().filter(|p| p.is_ok()).count() as u64;
        self.figures.entries.get_or_create(&of).inc_by(count);
        self.figures.batches.get_or_create(&of).inc();
        self.figures
            .size
            .get_or_create(&of)
            .set(metrics::gauge(self.log.size()));
        let mut wanted = Vec::new();
        for (caller, placed) in callers.into_iter().zip(done.placed) {
            if let (Ok(placed), Some(proof)) = (&placed, caller.proof) {
                wanted.push((placed.index, proof));
            }
            // A caller that went away needs no answer; its entry stays.
            let _ = caller.placed.send(placed.map_err(|e| unavailable(&e)));
        }
        self.link.durable(self.log.size(), wanted);
        if let Some(ms) = done.stepped_back_ms {
            self.figures.clock_steps.get_or_create(&of).inc();
            tracing::warn!(class = %self.class, ms, "the clock stepped back");
            self.commit_at(vec![clock_step(self.class, ms)?], wall_ms)?;
            self.link.durable(self.log.size(), []);
        }
        self.log.rotate_if_full()
    }

    fn commit_at(&mut self, drafts: Vec<Draft>, wall_ms: u64) -> Result<Committed, log::LogError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        self.log.commit(drafts, &keys, wall_ms, Instant::now())
    }
}

/// The entry that says that the clock stepped back: times in the log stand still meanwhile.
fn clock_step(class: Class, ms: u64) -> Result<Draft, log::LogError> {
    let data = [
        ("log".to_owned(), class.name().into()),
        ("back_ms".to_owned(), ms.into()),
    ];
    let stamped = Stamped {
        process: PROCESS.into(),
        entry: Entry {
            event: "audit.clock_back".into(),
            phase: Phase::Fact,
            request_id: "internal".into(),
            account: None,
            actor: "internal:audit-append".into(),
            subject: None,
            authority: None,
            lease: None,
            result: None,
            data: data.into_iter().collect(),
        },
    };
    let payload = serde_json::to_vec(&stamped).map_err(|_| log::LogError::Broken(class))?;
    Ok(Draft {
        account: None,
        payload,
    })
}

struct Appender {
    keys: Arc<RwLock<Keys>>,
    clock: Clock,
    writers: BTreeMap<Class, mpsc::Sender<Job>>,
    figures: metrics::Append,
}

impl Appender {
    async fn answer(&self, peer: &Peer, op: Op) -> api::Result<serde_json::Value> {
        match op {
            Op::Append {
                class,
                entry,
                want_receipt,
            } => {
                let class = log_class(class);
                let result = self.append(peer, class, *entry, want_receipt).await;
                if result.is_err() {
                    self.figures
                        .refusals
                        .get_or_create(&metrics::of(class))
                        .inc();
                }
                ok(&result?)
            }
            Op::DayKeys { keys } => {
                kms_only(peer)?;
                if keys.len() > DAY_KEYS_REQUEST_MAX {
                    return Err(invalid("keys", "at most 2000 day keys at once"));
                }
                let keys = keys
                    .iter()
                    .map(|k| Ok((log_class(k.class), k.day, public_key(&k.public)?)))
                    .collect::<api::Result<Vec<_>>>()?;
                let today = day_of(self.clock.now_ms());
                self.keys_change(move |held| held.days_set(keys, today))
                    .await
            }
            Op::AccountKey { account, public } => {
                kms_only(peer)?;
                let public = public_key(&public)?;
                self.keys_change(move |held| held.account_set(&account, public))
                    .await
            }
        }
    }

    async fn append(
        &self,
        peer: &Peer,
        class: Class,
        entry: Entry,
        want_receipt: bool,
    ) -> api::Result<Appended> {
        entry_check(&entry)?;
        let account = entry.account.clone();
        let stamped = Stamped {
            process: peer.process.clone(),
            entry,
        };
        let payload = serde_json::to_vec(&stamped).map_err(Error::internal)?;
        if payload.len() > AUDIT_PAYLOAD_MAX_BYTES {
            return Err(Error::new(
                ErrorCode::TooLarge,
                format!(
                    "entry: {} bytes, at most {AUDIT_PAYLOAD_MAX_BYTES}",
                    payload.len()
                ),
            ));
        }
        let queue = self
            .writers
            .get(&class)
            .ok_or_else(|| Error::internal("a class without a writer"))?;
        let gone = || unavailable(&"the log's writer has stopped");
        let (answer, placed) = oneshot::channel();
        let (proof_answer, proof) = oneshot::channel();
        let caller = Caller {
            placed: answer,
            proof: want_receipt.then_some(proof_answer),
        };
        queue
            .send(Job::Append(Draft { account, payload }, caller))
            .await
            .map_err(|_| gone())?;
        let placed = placed.await.map_err(|_| gone())??;
        let mut appended = Appended {
            index: placed.index,
            time_ms: placed.time_ms,
            receipt: None,
        };
        if want_receipt {
            let proof = tokio::time::timeout(RECEIPT_TIMEOUT, proof)
                .await
                .map_err(|_| unavailable(&"audit-integrate does not answer"))?
                .map_err(|_| gone())??;
            let receipt = Receipt::new(
                class,
                placed.index,
                &placed.leaf,
                &placed.opening,
                &proof.path,
                &proof.checkpoint,
            );
            appended.receipt = Some(serde_json::to_value(receipt).map_err(Error::internal)?);
        }
        Ok(appended)
    }

    async fn keys_change(
        &self,
        change: impl FnOnce(&mut Keys) -> anyhow::Result<()> + Send + 'static,
    ) -> api::Result<serde_json::Value> {
        let keys = Arc::clone(&self.keys);
        tokio::task::spawn_blocking(move || {
            change(&mut keys.write().unwrap_or_else(PoisonError::into_inner))
        })
        .await
        .map_err(Error::internal)?
        .map_err(|e| unavailable(&format!("{e:#}")))?;
        ok(&true)
    }
}

async fn purge_often(appender: Arc<Appender>) {
    let mut every = tokio::time::interval(BATCH_KEY_LIFE);
    loop {
        every.tick().await;
        for queue in appender.writers.values() {
            // A full queue is a busy writer, which renews its keys by itself.
            let _ = queue.try_send(Job::Purge);
        }
    }
}

fn kms_only(peer: &Peer) -> api::Result<()> {
    if peer.process == KMS {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::Forbidden,
        "only the KMS publishes the log's keys",
    ))
}

/// Checks an entry's fields; its size as a whole is checked once it is stamped.
fn entry_check(entry: &Entry) -> api::Result<()> {
    let field = |name: &'static str, text: &str, max: usize| {
        if text.len() > max || text.chars().any(char::is_control) {
            return Err(invalid(
                name,
                &format!("at most {max} bytes, no control characters"),
            ));
        }
        Ok(())
    };
    field("event", &entry.event, EVENT_MAX_BYTES)?;
    if entry.event.is_empty() || entry.actor.is_empty() {
        return Err(invalid("event, actor", "must not be empty"));
    }
    field("actor", &entry.actor, FIELD_MAX_BYTES)?;
    field("request_id", &entry.request_id, FIELD_MAX_BYTES)?;
    field(
        "subject",
        entry.subject.as_deref().unwrap_or(""),
        FIELD_MAX_BYTES,
    )?;
    field(
        "result",
        entry.result.as_deref().unwrap_or(""),
        FIELD_MAX_BYTES,
    )
}

fn public_key(hex: &str) -> api::Result<PublicKey> {
    PublicKey::from_hex(hex).map_err(|e| invalid("public", &e.to_string()))
}

fn invalid(field: &str, why: &str) -> Error {
    Error::new(ErrorCode::ValidationError, format!("{field}: {why}"))
}

fn unavailable(why: &impl std::fmt::Display) -> Error {
    Error::new(
        ErrorCode::AuditUnavailable,
        "the audit log can't take the entry now; try again",
    )
    .detail(why)
}
