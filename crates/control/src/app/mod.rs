//! What the operations decide: `http` unwraps a request and calls one function here, which
//! authorises by the account in each query, announces, acts, and records what came of it.
//!
//! Must never act for a client without mint's assertion, nor hold a key: receipts, signed
//! statements and ids pass through.

pub mod archive;
pub mod creation;
pub mod image;
pub mod lifecycle;
pub mod network;
pub mod power;
pub mod removal;
pub mod resources;
pub mod runtime_access;
pub mod sleep;
pub mod snapshot;
pub mod standing;
pub mod stats;
pub mod workspace;

use crate::audit::Audit;
use crate::limits::{HOST_CALL_GRACE, INFO_CACHE, INFO_RECENT, LEASE_MS};
use crate::metrics::Metrics;
use crate::op::Op;
use crate::store::{Store, Workspace};
use api::audit::Lease;
use api::host::{self, Actual, ActualState, Desired, Info};
use api::rpc::Client;
use api::warden::NetRates;
use api::{Error, ErrorCode};
use model::{HostId, Purpose, Resources, StartId, WorkspaceId};
use seal::sign::{Signed, VerifyingKey};
use serde::de::DeserializeOwned;
use serde_json::Value;
use service::clock::Clock;
use service::config::Config;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// The control plane.
pub struct App {
    /// Workspaces.
    pub store: Store,
    /// The log.
    pub audit: Audit,
    /// The clock.
    pub clock: Clock,
    /// Numbers for the operator.
    pub metrics: Metrics,
    /// The installation's configuration.
    pub config: Config,
    /// The processes around.
    pub peers: Peers,
    /// Mint's key.
    pub mint_key: VerifyingKey,
    /// The KMS's key.
    pub kms_key: VerifyingKey,
    /// Wakes the reconciler.
    pub wake: Notify,
    /// Wakes it at once: a request waits for a workspace that rests.
    pub wanted: Notify,
    actuals: RwLock<HashMap<WorkspaceId, Actual>>,
    busy: Mutex<HashMap<WorkspaceId, u32>>,
    /// Disks that are not what they were.
    alarms: Mutex<HashMap<WorkspaceId, Alarm>>,
    info: Mutex<Option<(Instant, Info)>>,
}

/// What is said once, until the workspace runs again.
struct Alarm {
    error: Error,
    said: bool,
}

/// The processes that control asks.
pub struct Peers {
    /// Keys.
    pub kms: Client,
    /// Tokens.
    pub mint: Client,
    /// The machine.
    pub host: Client,
}

/// Keeps the reconciler away from a workspace while a request is at it.
pub struct Busy {
    app: Arc<App>,
    id: WorkspaceId,
    wakes: bool,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut busy = self.app.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = busy.get_mut(&self.id) {
            *n -= 1;
            if *n == 0 {
                busy.remove(&self.id);
            }
        }
        drop(busy);
        if self.wakes {
            self.app.wake.notify_one();
        }
    }
}

impl App {
    /// A control plane.
    #[must_use]
    pub fn new(
        store: Store,
        audit: Audit,
        clock: Clock,
        config: Config,
        peers: Peers,
        keys: (VerifyingKey, VerifyingKey),
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            audit,
            clock,
            metrics: Metrics::default(),
            config,
            peers,
            mint_key: keys.0,
            kms_key: keys.1,
            wake: Notify::new(),
            wanted: Notify::new(),
            actuals: RwLock::default(),
            busy: Mutex::default(),
            alarms: Mutex::default(),
            info: Mutex::default(),
        })
    }

    /// Milliseconds since the epoch.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// Marks a workspace as being worked on by a request until the guard is dropped, which wakes
    /// the reconciler.
    #[must_use]
    pub fn busy(self: &Arc<Self>, id: &WorkspaceId) -> Busy {
        self.busy_with(id, true)
    }

    /// The same, for the reconciler's own work: what failed waits for its next round.
    #[must_use]
    pub fn busy_quietly(self: &Arc<Self>, id: &WorkspaceId) -> Busy {
        self.busy_with(id, false)
    }

    fn busy_with(self: &Arc<Self>, id: &WorkspaceId, wakes: bool) -> Busy {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        *busy.entry(id.clone()).or_default() += 1;
        Busy {
            app: Arc::clone(self),
            id: id.clone(),
            wakes,
        }
    }

    /// Whether somebody works on it.
    #[must_use]
    pub fn is_busy(&self, id: &WorkspaceId) -> bool {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.contains_key(id)
    }

    /// The last known actual state.
    #[must_use]
    pub fn actual_known(&self, id: &WorkspaceId) -> Option<Actual> {
        let actuals = self.actuals.read().unwrap_or_else(PoisonError::into_inner);
        actuals.get(id).cloned()
    }

    /// Takes note of an actual state.
    pub fn actual_note(&self, actual: Actual) {
        self.alarm_note(&actual);
        let mut actuals = self.actuals.write().unwrap_or_else(PoisonError::into_inner);
        if actual.state == ActualState::Deleted {
            actuals.remove(&actual.workspace);
        } else {
            actuals.insert(actual.workspace.clone(), actual);
        }
    }

    /// A disk that was changed at rest is somebody's doing: the operator hears of it, and the log of
    /// security alerts with the reconciler's next round.
    fn alarm_note(&self, actual: &Actual) {
        let id = &actual.workspace;
        let mut alarms = self.alarms.lock().unwrap_or_else(PoisonError::into_inner);
        let tampered = |e: &&Error| e.code == ErrorCode::DiskTampered;
        match (actual.state, actual.error.as_ref().filter(tampered)) {
            // On its way it still has the error of the start before.
            (ActualState::Starting | ActualState::Stopping, _) => {}
            (_, Some(error)) if !alarms.contains_key(id) => {
                tracing::error!(event = "disk.tampered", workspace = %id, detail = error.detail, "{error}");
                self.metrics.tampered.inc();
                let alarm = Alarm {
                    error: error.clone(),
                    said: false,
                };
                alarms.insert(id.clone(), alarm);
                self.wake.notify_one();
            }
            (ActualState::Running | ActualState::Deleted, None)
                if alarms.get(id).is_some_and(|a| a.said) =>
            {
                alarms.remove(id);
            }
            _ => {}
        }
    }

    /// Brings the alarms to the log.
    pub async fn alarms_say(&self) {
        let owed: Vec<(WorkspaceId, Error)> = {
            let mut alarms = self.alarms.lock().unwrap_or_else(PoisonError::into_inner);
            let owed = alarms.iter_mut().filter(|(_, a)| !a.said);
            owed.map(|(id, a)| {
                a.said = true;
                (id.clone(), a.error.clone())
            })
            .collect()
        };
        let op = Op::internal("reconcile.alarm");
        for (id, error) in owed {
            let event = "disk.tampered";
            self.audit.alarm(&op, event, id.as_str(), &error).await;
        }
    }

    /// The actual state now; the last known one while host does not answer.
    pub async fn actual(&self, op: &Op, id: &WorkspaceId) -> Option<Actual> {
        let ask = api::host::Op::Get {
            workspace: id.clone(),
        };
        match self.peers.host.call(&op.request_id, &ask).await {
            Ok(actual) => Some(actual),
            Err(e) if e.code == ErrorCode::NotFound => None,
            Err(_) => self.actual_known(id),
        }
    }

    /// What the machine can run.
    ///
    /// # Errors
    /// [`ErrorCode::VmUnavailable`] if it does not answer.
    pub async fn host_info(&self, op: &Op) -> api::Result<Info> {
        let fresh = |cached: &Option<(Instant, Info)>| {
            let (at, info) = cached.as_ref()?;
            (at.elapsed() < INFO_CACHE).then(|| info.clone())
        };
        if let Some(info) = fresh(&self.info.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(info);
        }
        let info: Info = self
            .peers
            .host
            .call(&op.request_id, &api::host::Op::Info)
            .await
            .map_err(host_away)?;
        let cached = Some((Instant::now(), info.clone()));
        *self.info.lock().unwrap_or_else(PoisonError::into_inner) = cached;
        Ok(info)
    }

    /// What the machine could run a short while ago; asks anew beside it when that is not so short.
    #[must_use]
    pub fn host_info_recent(self: &Arc<Self>) -> Option<Info> {
        let (at, info) = self
            .info
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()?;
        if at.elapsed() > INFO_CACHE {
            let app = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(e) = app.host_info(&Op::internal("info")).await {
                    tracing::debug!(error = %e, detail = e.detail, "host's images stay as known");
                }
            });
        }
        (at.elapsed() < INFO_RECENT).then_some(info)
    }

    /// Tells host what is wanted of a workspace, and waits up to `wait_ms` for it to be so.
    ///
    /// # Errors
    /// Host's, or [`ErrorCode::VmUnavailable`] if it does not answer.
    pub async fn host_apply(
        &self,
        op: &Op,
        w: &Workspace,
        lease: Option<(&Lease, &Value)>,
        wait_ms: u64,
    ) -> api::Result<Actual> {
        let makes = lease.is_some_and(|(lease, _)| lease.purpose == Purpose::Archive);
        let archives = &w.doc.life.archives;
        let begun = archives.iter().find(|a| makes && a.made.is_none());
        let desired = Desired {
            workspace: w.id.clone(),
            generation: w.generation,
            power: w.doc.power,
            image: w.doc.image_id.clone(),
            resources: size(w, lease.map(|(lease, _)| lease)),
            disk_bytes_per_s: self.config.limits.disk_bytes_per_s,
            disk_ops_per_s: self.config.limits.disk_ops_per_s,
            net_rates: NetRates {
                bytes_per_s: self.config.limits.network_bytes_per_s,
                packets_per_s: self.config.limits.network_packets_per_s,
            },
            pids: self.config.limits.pids,
            config: w.doc.config.clone(),
            public_access: w.doc.public_access,
            ingress_ports: w.doc.ingress_ports.clone(),
            wakes: sleep::wakes(w),
            archive: begun.map(|a| host::Archive {
                paths: a.paths.clone(),
                exclude: a.exclude.clone(),
                max_mb: archive::room_mb(w),
            }),
            archives: archives.iter().map(|a| a.id.clone()).collect(),
            snapshot: w.doc.life.snapshot.as_ref().map(|s| s.id.clone()),
            snapshot_next: w.doc.life.snapshot_next.as_ref().map(|s| s.id.clone()),
            lease: lease.map(|(_, receipt)| receipt.clone()),
            start: lease.map(|(lease, _)| lease.clone()),
            token_state: w.doc.token_state.clone(),
        };
        let apply = api::host::Op::Apply {
            desired: Box::new(desired),
            wait_ms,
        };
        let timeout = Duration::from_millis(wait_ms) + HOST_CALL_GRACE;
        self.peers
            .host
            .call_within(&op.request_id, &apply, timeout)
            .await
            .map_err(host_away)
    }

    /// A lease for one start of a workspace.
    #[must_use]
    pub fn lease_new(&self, workspace: &WorkspaceId, host: &HostId, config: &str) -> Lease {
        Lease {
            workspace: workspace.clone(),
            host: host.clone(),
            start_id: StartId::from_bytes(seal::random::bytes()),
            purpose: Purpose::Disk,
            nonce: hex::encode(seal::random::bytes::<32>()),
            exp_ms: self.now_ms() + LEASE_MS,
            config_digest: hex::encode(seal::hash::sha256(config.as_bytes())),
            object: None,
            also: Vec::new(),
        }
    }
}

/// The size of the VM that is wanted: one that comes up from memory has the size that it had.
fn size(w: &Workspace, lease: Option<&Lease>) -> Resources {
    let from_memory =
        |o: &api::audit::Object| matches!(o.purpose, Purpose::Memory | Purpose::SnapshotMemory);
    let wakes = lease.is_some_and(|l| l.purpose == Purpose::Disk && l.also.iter().any(from_memory));
    match w.doc.life.resources_running {
        Some(running) if wakes => running,
        _ => w.doc.resources,
    }
}

/// Does a step of an operation, and says in the operator's log (level debug) how long it took.
pub async fn timed<T>(op: &Op, step: &'static str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let done = work.await;
    let ms = began.elapsed().as_secs_f64() * 1e3;
    tracing::debug!(request_id = op.request_id, step, ms, "step");
    done
}

/// The payload of a document that `key` signed.
///
/// # Errors
/// [`ErrorCode::Internal`]: a process of ours gave something that is not its own.
pub fn signed<T: DeserializeOwned>(
    what: &'static str,
    text: &str,
    key: &VerifyingKey,
    context: &'static str,
) -> api::Result<T> {
    Signed::parse(text)
        .and_then(|s| s.verify(key, context))
        .map_err(|e| Error::internal(format!("{what}: {e}")))
}

/// The error of a start that did not come up.
#[must_use]
pub fn start_error(actual: &Actual) -> Option<Error> {
    match actual.state {
        ActualState::Failed | ActualState::Crashed => {
            Some(actual.error.clone().unwrap_or_else(|| {
                Error::new(
                    ErrorCode::VmUnavailable,
                    "the workspace ended as soon as it ran",
                )
            }))
        }
        _ => None,
    }
}

/// Host not answering is, to a client, a machine that can't run anything now.
fn host_away(e: Error) -> Error {
    match e.code {
        ErrorCode::Unavailable => Error {
            code: ErrorCode::VmUnavailable,
            message: "the machine that runs the workspace does not answer; try again".into(),
            detail: e.detail,
        },
        _ => e,
    }
}
