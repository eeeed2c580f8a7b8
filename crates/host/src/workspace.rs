//! One workspace's task: asks [`machine::next`] what to do, does it, and publishes where it is.
//!
//! It is woken by a new desired state, by its VM going away, and by nothing else; whatever it
//! holds in memory may be lost at any moment (see the machine's notes on a kill of host).

use crate::activity::Activity;
use crate::desired::Store;
use crate::feed::Feed;
use crate::fleet::{Fleet, Shape, Spare};
use crate::limits::RETRY_AFTER;
use crate::machine::{self, Facts, Step, Vm};
use crate::peers::Peers;
use api::agent::Attach;
use api::audit::Lease;
use api::host::{Actual, ActualState, Desired};
use api::warden::{NetRates, Open, Source};
use api::{Error, ErrorCode};
use model::limits::PORT_AGENT_TLS;
use model::{Power, StartId, WorkspaceId};
use service::clock::Clock;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

/// What all workspaces of a host share.
pub struct Shared {
    /// The processes around.
    pub peers: Peers,
    /// VMs that are nobody's yet.
    pub fleet: Fleet,
    /// Actual states.
    pub feed: Feed,
    /// Desired states.
    pub store: Store,
    /// The clock.
    pub clock: Clock,
    /// When each was used last.
    pub activity: Activity,
}

/// Where a workspace's VM is, for the watcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its slot.
    pub slot: u16,
    /// Its start.
    pub start_id: StartId,
    /// Whether the guest runs, so that vmctl is asked too.
    pub up: bool,
}

/// That a VM went away by itself.
#[derive(Debug, Clone)]
pub struct Gone {
    /// Which.
    pub start_id: StartId,
    /// Nothing if the guest shut down by itself.
    pub error: Option<Error>,
}

/// What the rest of host holds of a workspace's task.
pub struct Handle {
    /// What is wanted.
    pub desired: watch::Sender<Arc<Desired>>,
    /// Tells it that its VM went away.
    pub gone: watch::Sender<Option<Gone>>,
    /// Where its VM is.
    pub place: Arc<Mutex<Option<Place>>>,
}

/// What is found of a workspace when host starts.
#[derive(Debug)]
pub enum Found {
    /// It is new to this host.
    New,
    /// It has no VM; if it was running, it does no longer.
    Nothing,
    /// Its VM runs, or is paused.
    Up {
        /// The VM.
        spare: Spare,
        /// The start.
        start_id: StartId,
        /// It is paused.
        paused: bool,
    },
    /// Its VM was on its way, or is dead.
    Remains(Spare),
}

/// The task.
pub struct Workspace {
    id: WorkspaceId,
    shared: Arc<Shared>,
    desired: watch::Receiver<Arc<Desired>>,
    gone: watch::Receiver<Option<Gone>>,
    place: Arc<Mutex<Option<Place>>>,
    vm: Vm,
    spare: Option<Spare>,
    start_id: Option<StartId>,
    attestation: Option<String>,
    released: Option<api::kms::Released>,
    net: Option<(Vec<Open>, NetRates)>,
    since_ms: Option<u64>,
    /// The last start whose lease is used up.
    spent: Option<StartId>,
    /// The generation for which the VM refused to pause or resume.
    refused: Option<u64>,
    erased: bool,
    crashed: bool,
    error: Option<Error>,
}

impl Workspace {
    /// The task of a workspace, and the handle to it. Run it with [`Workspace::run`].
    #[must_use]
    pub fn new(shared: Arc<Shared>, desired: Desired, found: Found) -> (Self, Handle) {
        let id = desired.workspace.clone();
        let (desired_tx, desired) = watch::channel(Arc::new(desired));
        let (gone_tx, gone) = watch::channel(None);
        let place = Arc::default();
        let mut workspace = Self {
            id,
            shared,
            desired,
            gone,
            place: Arc::clone(&place),
            vm: Vm::Absent,
            spare: None,
            start_id: None,
            attestation: None,
            released: None,
            net: None,
            since_ms: None,
            spent: None,
            refused: None,
            erased: false,
            crashed: false,
            error: None,
        };
        workspace.adopt(found);
        let handle = Handle {
            desired: desired_tx,
            gone: gone_tx,
            place,
        };
        (workspace, handle)
    }

    /// Brings the workspace to what is wanted and keeps it there; ends when it is deleted, or
    /// when its handle is dropped.
    pub async fn run(mut self) {
        loop {
            let desired = Arc::clone(&self.desired.borrow_and_update());
            let step = machine::next(desired.power, &self.facts(&desired));
            self.publish(&desired, step);
            let goes_on = match step {
                Step::Rest if desired.power == Power::Deleted => return,
                Step::Rest => self.rest().await,
                step => {
                    let began = Instant::now();
                    let done = self.perform(step, &desired).await;
                    let ms = began.elapsed().as_secs_f64() * 1e3;
                    tracing::debug!(workspace = %self.id, start = ?self.start_id, ?step, ms, "step");
                    match done {
                        Ok(()) => true,
                        Err(e) => self.failed(step, &desired, e).await,
                    }
                }
            };
            if !goes_on {
                return;
            }
        }
    }

    fn adopt(&mut self, found: Found) {
        match found {
            Found::New => return,
            Found::Nothing => {}
            Found::Up {
                spare,
                start_id,
                paused,
            } => {
                self.vm = if paused { Vm::Paused } else { Vm::Running };
                self.spare = Some(spare);
                self.start_id = Some(start_id);
                self.since_ms = Some(self.shared.clock.now_ms());
                self.place_set(true);
            }
            Found::Remains(spare) => {
                self.vm = Vm::Down;
                self.spare = Some(spare);
            }
        }
        if self.vm == Vm::Absent || self.vm == Vm::Down {
            self.crashed = true;
            self.error = Some(Error::new(
                ErrorCode::VmUnavailable,
                "the host restarted while the workspace ran or was starting",
            ));
        }
    }

    fn facts(&self, desired: &Desired) -> Facts {
        Facts {
            vm: self.vm,
            net_current: self.net.as_ref() == Some(&rules(desired)),
            lease_usable: self.lease(desired).is_some(),
            provisioned: !desired.token_state.is_empty(),
            erased: self.erased,
            refused: self.refused == Some(desired.generation),
        }
    }

    /// The lease and its receipt, if they were not used and are not over.
    fn lease<'a>(&self, desired: &'a Desired) -> Option<(&'a Lease, &'a serde_json::Value)> {
        let (lease, receipt) = (desired.start.as_ref()?, desired.lease.as_ref()?);
        let fresh = self.spent.as_ref() != Some(&lease.start_id)
            && lease.workspace == self.id
            && lease.exp_ms > self.shared.clock.now_ms();
        fresh.then_some((lease, receipt))
    }

    /// Waits for a new wish or for the VM to go away; `false` when nobody is left to wish.
    async fn rest(&mut self) -> bool {
        tokio::select! {
            changed = self.desired.changed() => changed.is_ok(),
            Ok(()) = self.gone.changed() => {
                let gone = self.gone.borrow_and_update().clone();
                if let Some(gone) = gone.filter(|g| Some(&g.start_id) == self.start_id.as_ref()) {
                    tracing::warn!(workspace = %self.id, start = %gone.start_id, error = ?gone.error, "the VM went away");
                    self.vm = Vm::Down;
                    self.crashed = true;
                    self.error = gone.error;
                }
                true
            }
        }
    }

    async fn perform(&mut self, step: Step, desired: &Desired) -> api::Result<()> {
        let shared = Arc::clone(&self.shared);
        let peers = &shared.peers;
        match step {
            Step::Claim => {
                let lease = self.lease(desired).ok_or_else(no_lease)?;
                (self.crashed, self.error) = (false, None);
                let start_id = lease.0.start_id.clone();
                self.spare = Some(shared.fleet.claim(&shape(desired)).await?);
                (self.net, self.vm) = (None, Vm::Claimed);
                self.start_id = Some(start_id);
            }
            Step::DiskOpen => {
                let (lease, _) = self.lease(desired).ok_or_else(no_lease)?;
                // A new lease may have come since the claim.
                let start_id = lease.start_id.clone();
                let opened = peers.disk_open(self.slot()?, lease, desired).await?;
                self.attestation = Some(opened.attestation);
                self.vm = Vm::Attested;
                self.start_id = Some(start_id);
                self.place_set(false);
            }
            Step::KeyRelease => {
                let (lease, receipt) = self
                    .lease(desired)
                    .filter(|(l, _)| Some(&l.start_id) == self.start_id.as_ref())
                    .ok_or_else(no_lease)?;
                let attestation = self.attestation.as_deref().unwrap_or_default();
                let key = peers.key_release(lease, receipt, attestation).await?;
                self.spent = Some(lease.start_id.clone());
                self.released = Some(key);
                self.vm = Vm::Keyed;
            }
            Step::DiskGrant => {
                let key = self.released.take().ok_or_else(no_lease)?;
                peers.disk_grant(self.slot()?, key).await?;
                self.vm = Vm::DiskIn;
            }
            Step::NetSet => {
                let rules = rules(desired);
                peers.net_set(self.slot()?, rules.clone()).await?;
                self.net = Some(rules);
            }
            Step::Attach => self.attach(desired).await?,
            Step::Pause => {
                peers.vm_pause(self.slot()?).await?;
                self.vm = Vm::Paused;
            }
            Step::Resume => {
                peers.vm_resume(self.slot()?).await?;
                self.vm = Vm::Running;
                shared.activity.note(&self.id);
            }
            Step::Shutdown => {
                // Whatever comes of it, the VM is closed next.
                if let Err(e) = peers.vm_shutdown(self.slot()?).await {
                    tracing::warn!(workspace = %self.id, error = %e, detail = e.detail, "shutdown");
                }
                self.vm = Vm::Down;
            }
            Step::Close => {
                self.place_clear();
                if let Some(spare) = &self.spare {
                    shared.fleet.close(spare.slot).await?;
                }
                self.vm = Vm::Absent;
                self.spare = None;
                self.start_id = None;
                self.attestation = None;
                self.released = None;
                self.net = None;
                self.since_ms = None;
            }
            Step::Erase => {
                peers.disk_erase(&self.id).await?;
                let (store, id) = (shared.store.clone(), self.id.clone());
                blocking(move || store.remove(&id)).await?;
                self.erased = true;
            }
            Step::Rest => {}
        }
        Ok(())
    }

    /// Continues the guest; given up at once when it is no longer wanted.
    async fn attach(&mut self, desired: &Desired) -> api::Result<()> {
        let spare = self.spare.as_ref().ok_or_else(lost)?;
        let attach = Attach {
            time_unix_ns: self.shared.clock.now_ms().saturating_mul(1_000_000),
            config: desired.config.clone(),
            token_state: desired.token_state.clone(),
            ip: spare.net.ip.clone(),
            prefix: spare.net.prefix,
            gateway: spare.net.gateway.clone(),
        };
        let mut wish = self.desired.clone();
        let unwanted = wish.wait_for(|d| matches!(d.power, Power::Stopped | Power::Deleted));
        let start_id = self.start_id.clone();
        let mut gone = self.gone.clone();
        let died = gone.wait_for(|g| {
            g.as_ref().map(|g| &g.start_id) == start_id.as_ref() && start_id.is_some()
        });
        tokio::select! {
            up = self.shared.peers.vm_attach(spare.slot, attach) => {
                let up = up?;
                tracing::info!(workspace = %self.id, start = ?self.start_id, kernel = %clip(&up.kernel), from = spare.from, "up");
            }
            _ = unwanted => {
                return Err(Error::new(ErrorCode::Conflict, "the start was called off"));
            }
            _ = died => return Err(lost()),
        }
        self.vm = Vm::Running;
        self.shared.activity.note(&self.id);
        self.since_ms = Some(self.shared.clock.now_ms());
        self.place_set(true);
        Ok(())
    }

    /// What a failure means; `false` when nobody is left to wish.
    async fn failed(&mut self, step: Step, desired: &Desired, e: Error) -> bool {
        tracing::warn!(
            workspace = %self.id, start = ?self.start_id, ?step, code = e.code.as_str(), error = %e,
            detail = e.detail, "step failed"
        );
        match step {
            Step::Pause | Step::Resume => {
                self.refused = Some(desired.generation);
                self.error = Some(e);
            }
            Step::Close | Step::Erase => return self.pause().await,
            Step::NetSet if matches!(self.vm, Vm::Running | Vm::Paused) => {
                return self.pause().await;
            }
            Step::Claim => {
                self.spent = desired.start.as_ref().map(|l| l.start_id.clone());
                self.error = Some(e);
            }
            _ => {
                self.spent = self.start_id.clone();
                self.error = Some(e);
                self.vm = Vm::Down;
            }
        }
        true
    }

    /// A pause before another try, cut short by a new wish.
    async fn pause(&mut self) -> bool {
        tokio::select! {
            changed = self.desired.changed() => changed.is_ok(),
            () = tokio::time::sleep(RETRY_AFTER) => true,
        }
    }

    fn publish(&mut self, desired: &Desired, step: Step) {
        let state = match (step, self.vm) {
            (Step::NetSet | Step::Pause | Step::Resume, Vm::Running | Vm::Paused) => return,
            (Step::Shutdown | Step::Close | Step::Erase, _) => ActualState::Stopping,
            (Step::Rest, Vm::Running) => ActualState::Running,
            (Step::Rest, Vm::Paused) => ActualState::Paused,
            (Step::Rest, Vm::Attested) => ActualState::Starting,
            (Step::Rest, _) => match desired.power {
                Power::Deleted => ActualState::Deleted,
                Power::Stopped => {
                    (self.crashed, self.error) = (false, None);
                    ActualState::Stopped
                }
                _ if self.crashed => ActualState::Crashed,
                _ => {
                    self.error.get_or_insert_with(no_lease);
                    ActualState::Failed
                }
            },
            _ => ActualState::Starting,
        };
        self.publish_state(desired, state);
    }

    fn publish_state(&self, desired: &Desired, state: ActualState) {
        let up = matches!(state, ActualState::Running | ActualState::Paused);
        let spare = self.spare.as_ref().filter(|_| up);
        self.shared.feed.publish(Actual {
            workspace: self.id.clone(),
            generation: desired.generation,
            state,
            start_id: self.start_id.clone().filter(|_| up),
            ip: spare.map(|s| s.net.ip.clone()),
            public_access: desired.public_access,
            since_ms: self.since_ms.filter(|_| up),
            started_from: spare.map(|s| s.from.to_owned()),
            error: self.error.clone(),
        });
    }

    fn slot(&self) -> api::Result<u16> {
        self.spare.as_ref().map(|s| s.slot).ok_or_else(lost)
    }

    fn place_set(&self, up: bool) {
        let place = match (&self.spare, &self.start_id) {
            (Some(spare), Some(start_id)) => Some(Place {
                slot: spare.slot,
                start_id: start_id.clone(),
                up,
            }),
            _ => None,
        };
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }

    fn place_clear(&self) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What warden's firewall is told of a desired state.
fn rules(desired: &Desired) -> (Vec<Open>, NetRates) {
    (triples(desired), desired.net_rates)
}

/// The firewall triples of a desired state: `public_access` adds the edge to the sources; what
/// it may then reach is the agent's mTLS port and the `ingress_ports`.
fn triples(desired: &Desired) -> Vec<Open> {
    if !desired.public_access {
        return Vec::new();
    }
    let mut ports = vec![PORT_AGENT_TLS];
    ports.extend(&desired.ingress_ports);
    ports.sort_unstable();
    ports.dedup();
    let source = Source::Edge;
    ports
        .into_iter()
        .map(|port| Open { source, port })
        .collect()
}

fn shape(desired: &Desired) -> Shape {
    Shape {
        image: desired.image.clone(),
        memory_mb: desired.resources.memory_mb,
        cpus: desired.resources.cpus,
    }
}

fn no_lease() -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "the start's permission ran out before the workspace was up; start it again",
    )
}

fn lost() -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "the workspace's VM went away; start it again",
    )
}

/// Hostile text for a log line.
fn clip(text: &str) -> String {
    text.chars().take(64).filter(|c| !c.is_control()).collect()
}

/// Runs file-system work off the reactor.
pub(crate) async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> api::Result<T> {
    match tokio::task::spawn_blocking(f).await {
        Ok(Ok(v)) => Ok(v),
        Ok(Err(e)) if e.kind() == std::io::ErrorKind::StorageFull => Err(Error::new(
            ErrorCode::StorageFull,
            "the host's disk is full; tell the operator",
        )
        .detail(e)),
        Ok(Err(e)) => Err(Error::internal(e)),
        Err(e) => Err(Error::internal(e)),
    }
}
