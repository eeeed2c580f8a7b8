//! One workspace's task: asks [`machine::next`] what to do, does it, and publishes where it is.
//!
//! It is woken by a new desired state, by its VM going away, and by nothing else; whatever it
//! holds in memory may be lost at any moment (see the machine's notes on a kill of host).

use crate::activity::Activity;
use crate::anchors::Anchors;
use crate::desired::Store;
use crate::feed::Feed;
use crate::fleet::{Fleet, Shape, Spare};
use crate::limits::{ANCHOR_EVERY, RETRY_AFTER};
use crate::machine::{self, Act, Facts, Step, Vm};
use crate::peers::Peers;
use crate::save::{self, Saving, Waking};
use api::agent::{Attach, Wake};
use api::audit::Lease;
use api::host::{Actual, ActualState, Archived, Desired};
use api::warden::{NetRates, Open, Source};
use api::{Error, ErrorCode};
use model::limits::PORT_AGENT_TLS;
use model::{ObjectId, Power, Purpose, StartId, WorkspaceId};
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
    /// How far disks have got.
    pub anchors: Anchors,
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
    pub(crate) id: WorkspaceId,
    pub(crate) shared: Arc<Shared>,
    pub(crate) desired: watch::Receiver<Arc<Desired>>,
    gone: watch::Receiver<Option<Gone>>,
    place: Arc<Mutex<Option<Place>>>,
    pub(crate) vm: Vm,
    pub(crate) spare: Option<Spare>,
    /// The slot that it had last.
    pub(crate) last_slot: Option<u16>,
    pub(crate) start_id: Option<StartId>,
    attestation: Option<String>,
    /// The same for the disk that this one begins as a copy of.
    copy_attestation: Option<String>,
    released: Option<(api::kms::Released, Option<api::kms::Released>)>,
    pub(crate) net: Option<(Vec<Open>, NetRates)>,
    since_ms: Option<u64>,
    /// The last act whose lease is used up.
    pub(crate) spent: Option<StartId>,
    /// The generation for which the VM refused to pause or resume.
    refused: Option<u64>,
    /// The generation for which it could not be saved.
    unsaved: Option<u64>,
    /// What is being saved.
    pub(crate) saving: Option<Saving>,
    /// What was being saved may be held by warden yet.
    pub(crate) undropped: bool,
    /// The saved memory that its VM comes up from.
    pub(crate) waking: Option<Waking>,
    /// Its memory is saved here.
    pub(crate) memory: bool,
    /// Whether that is known.
    looked: bool,
    /// The last snapshot.
    pub(crate) snapshot: Option<ObjectId>,
    /// The last archive.
    pub(crate) archived: Option<Archived>,
    /// The archives and snapshots beside which there is none.
    swept: Option<save::Kept>,
    erased: bool,
    pub(crate) crashed: bool,
    pub(crate) error: Option<Error>,
    /// When its disk is asked next how far it has got.
    anchor_at: Option<Instant>,
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
            last_slot: None,
            start_id: None,
            attestation: None,
            copy_attestation: None,
            released: None,
            net: None,
            since_ms: None,
            spent: None,
            refused: None,
            unsaved: None,
            saving: None,
            undropped: false,
            waking: None,
            memory: false,
            looked: false,
            snapshot: None,
            archived: None,
            swept: None,
            erased: false,
            crashed: false,
            error: None,
            anchor_at: None,
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
        if !self.look().await {
            return;
        }
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

    /// Finds out whether its memory is saved here; `false` when nobody is left to wish.
    async fn look(&mut self) -> bool {
        while !self.looked {
            match self.memory_look().await {
                Ok(memory) => {
                    self.memory = memory;
                    self.looked = true;
                }
                Err(e) => {
                    tracing::warn!(workspace = %self.id, error = %e, detail = e.detail, "look for memory");
                    if !self.pause().await {
                        return false;
                    }
                }
            }
        }
        // The host process before this one may have been at a save.
        !matches!(self.vm, Vm::Running | Vm::Paused) || self.save_drop().await.is_ok()
    }

    fn adopt(&mut self, found: Found) {
        match found {
            Found::New => {
                // A first start has nothing here to look for.
                self.looked = self.desired.borrow().start.is_some();
                self.swept = self.looked.then(save::Kept::default);
                return;
            }
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
                self.looked = true;
                self.anchor_at = Some(Instant::now());
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
            saving: self.saving.as_ref().map(|s| (s.act, s.stage)),
            net_current: self.net.as_ref() == Some(&rules(desired)),
            lease: self
                .lease(desired)
                .map(|(lease, _)| save::act_of(lease, desired)),
            waking: self.waking.is_some(),
            provisioned: !desired.token_state.is_empty(),
            erased: self.erased,
            memory: self.memory,
            refused: self.refused == Some(desired.generation),
            unsaved: self.unsaved == Some(desired.generation),
            swept: self.swept.as_ref() == Some(&save::Kept::of(desired)),
        }
    }

    /// The lease and its receipt, if they were not used and are not over.
    pub(crate) fn lease<'a>(
        &self,
        desired: &'a Desired,
    ) -> Option<(&'a Lease, &'a serde_json::Value)> {
        let (lease, receipt) = (desired.start.as_ref()?, desired.lease.as_ref()?);
        let fresh = self.spent.as_ref() != Some(&lease.start_id)
            && lease.workspace == self.id
            && lease.exp_ms > self.shared.clock.now_ms();
        fresh.then_some((lease, receipt))
    }

    /// The lease of the start that is under way.
    pub(crate) fn lease_of_start<'a>(
        &self,
        desired: &'a Desired,
    ) -> api::Result<(&'a Lease, &'a serde_json::Value)> {
        self.lease(desired)
            .filter(|(l, _)| Some(&l.start_id) == self.start_id.as_ref())
            .ok_or_else(no_lease)
    }

    /// Waits for a new wish or for the VM to go away; `false` when nobody is left to wish.
    async fn rest(&mut self) -> bool {
        let anchor_due = self.anchor_due();
        tokio::select! {
            () = anchor_due => {
                self.anchor_carry();
                true
            }
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
            Step::MemoryOpen => self.memory_open(desired).await?,
            Step::MemoryKey => self.memory_key(desired).await?,
            Step::MemoryGrant => self.memory_grant(desired).await?,
            Step::DiskOpen => {
                let (lease, _) = match &self.waking {
                    // Memory and disk under one lease.
                    Some(_) => self.lease_of_start(desired)?,
                    // A new lease may have come since the claim.
                    None => self.lease(desired).ok_or_else(no_lease)?,
                };
                let start_id = lease.start_id.clone();
                let from = save::copied_from(lease);
                let opened = peers.disk_open(self.slot()?, lease, desired, from).await?;
                self.attestation = Some(opened.attestation);
                self.copy_attestation = opened.from;
                self.vm = Vm::Attested;
                self.start_id = Some(start_id);
                self.place_set(false);
            }
            Step::KeyRelease => {
                let (lease, receipt) = self.lease_of_start(desired)?;
                // What is still under way of the last start is to be in this grant.
                shared.anchors.flush(Some(&self.id)).await;
                let attestation = self.attestation.as_deref().unwrap_or_default();
                let key = peers.key_release(lease, receipt, attestation).await?;
                let copy = match &self.copy_attestation {
                    Some(a) => Some(peers.key_release(lease, receipt, a).await?),
                    None => None,
                };
                self.spent = Some(lease.start_id.clone());
                self.released = Some((key, copy));
                self.vm = Vm::Keyed;
            }
            Step::DiskGrant => {
                let (key, copy) = self.released.take().ok_or_else(no_lease)?;
                peers.disk_grant(self.slot()?, key, copy).await?;
                self.memory_used();
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
            Step::Save(act, stage) => self.save(act, stage, desired).await?,
            Step::SaveDrop => self.save_drop().await?,
            Step::Forget => {
                peers.object_erase(&self.id, Purpose::Memory, None).await?;
                self.memory = false;
            }
            Step::Sweep => {
                let kept = save::Kept::of(desired);
                save::sweep(&shared, &self.id, &kept).await?;
                self.swept = Some(kept);
            }
            Step::Shutdown => {
                // Whatever comes of it, the VM is closed next.
                if let Err(e) = peers.vm_shutdown(self.slot()?).await {
                    tracing::warn!(workspace = %self.id, error = %e, detail = e.detail, "shutdown");
                }
                self.vm = Vm::Down;
            }
            Step::Close => {
                // Whether a save that was at its end came to it, only warden knows.
                let unsure = self.saving.as_ref().is_some_and(|s| s.act == Act::Sleep);
                self.closed().await?;
                if unsure {
                    self.memory = self.memory_look().await?;
                }
            }
            Step::Erase => {
                save::erase(&shared, &self.id).await?;
                peers.disk_erase(&self.id).await?;
                shared.anchors.forget(&self.id);
                let (store, id) = (shared.store.clone(), self.id.clone());
                blocking(move || store.remove(&id)).await?;
                self.erased = true;
            }
            Step::Rest => {}
        }
        Ok(())
    }

    /// Closes the slot, and forgets everything of the VM.
    pub(crate) async fn closed(&mut self) -> api::Result<()> {
        self.place_clear();
        self.anchor_at = None;
        if let Some(slot) = self.spare.as_ref().map(|s| s.slot) {
            let deleted = self.desired.borrow().power == Power::Deleted;
            if !deleted {
                self.anchor_last(slot).await?;
            }
            self.shared.fleet.close(slot).await?;
            self.last_slot = Some(slot);
        }
        self.vm = Vm::Absent;
        self.spare = None;
        self.start_id = None;
        (self.attestation, self.copy_attestation) = (None, None);
        self.released = None;
        (self.saving, self.waking) = (None, None);
        self.undropped = false;
        self.net = None;
        self.since_ms = None;
        Ok(())
    }

    /// Ends when the running disk is to be asked how far it has got.
    pub(crate) fn anchor_due(&self) -> impl Future<Output = ()> + use<> {
        let due = self.anchor_at.map(tokio::time::Instant::from_std);
        async move {
            match due {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Asks the running disk how far it has got, and tells the KMS, beside everything else.
    pub(crate) fn anchor_carry(&mut self) {
        self.anchor_at = Some(Instant::now() + ANCHOR_EVERY);
        let Some(slot) = self.spare.as_ref().map(|s| s.slot) else {
            self.anchor_at = None;
            return;
        };
        let (shared, id) = (Arc::clone(&self.shared), self.id.clone());
        tokio::spawn(async move {
            match shared.peers.disk_anchor(slot, false).await {
                Ok(Some(said)) if said.statement.workspace == id => {
                    if shared.anchors.carry(said).await
                        && let Some(mut actual) = shared.feed.get(&id)
                    {
                        actual.error = Some(refused_reads());
                        shared.feed.publish(actual);
                    }
                }
                Ok(_) => {}
                Err(e) => {
                    tracing::warn!(workspace = %id, error = %e, detail = e.detail, "the disk does not say how far it has got");
                }
            }
        });
    }

    /// Ends the VM and brings its disk's last word to the KMS, or keeps it for that.
    async fn anchor_last(&mut self, slot: u16) -> api::Result<()> {
        match self.shared.peers.disk_anchor(slot, true).await {
            Ok(Some(said)) if said.statement.workspace == self.id => {
                // Whatever else was said: that is why.
                if self.shared.anchors.carry_last(said).await {
                    let before = self.error.take().map(|e| e.to_string());
                    self.error = Some(refused_reads().detail(before.unwrap_or_default()));
                }
            }
            Ok(_) => {}
            // Asked again, with the slot as it is.
            Err(e) if e.code == ErrorCode::Unavailable => return Err(e),
            Err(e) => {
                tracing::warn!(workspace = %self.id, error = %e, detail = e.detail, "no last word of the disk");
            }
        }
        Ok(())
    }

    /// Continues the guest; given up at once when it is no longer wanted.
    async fn attach(&mut self, desired: &Desired) -> api::Result<()> {
        let spare = self.spare.as_ref().ok_or_else(lost)?;
        let time_unix_ns = self.shared.clock.now_ms().saturating_mul(1_000_000);
        let token_state = desired.token_state.clone();
        let net = spare.net.clone();
        let (ip, prefix, gateway) = (net.ip, net.prefix, net.gateway);
        let up = async {
            let peers = &self.shared.peers;
            if self.waking.is_some() {
                let wake = Wake {
                    time_unix_ns,
                    token_state,
                    ip,
                    prefix,
                    gateway,
                };
                return peers.vm_wake(spare.slot, wake).await;
            }
            let attach = Attach {
                time_unix_ns,
                config: desired.config.clone(),
                token_state,
                ip,
                prefix,
                gateway,
            };
            peers.vm_attach(spare.slot, attach).await
        };
        let mut wish = self.desired.clone();
        let unwanted = wish.wait_for(|d| matches!(d.power, Power::Stopped | Power::Deleted));
        let start_id = self.start_id.clone();
        let mut gone = self.gone.clone();
        let died = gone.wait_for(|g| {
            g.as_ref().map(|g| &g.start_id) == start_id.as_ref() && start_id.is_some()
        });
        tokio::select! {
            up = up => {
                let up = up?;
                tracing::info!(workspace = %self.id, start = ?self.start_id, kernel = %clip(&up.kernel), from = spare.from, "up");
            }
            _ = unwanted => {
                return Err(Error::new(ErrorCode::Conflict, "the start was called off"));
            }
            _ = died => return Err(lost()),
        }
        self.vm = Vm::Running;
        self.waking = None;
        self.shared.activity.note(&self.id);
        self.since_ms = Some(self.shared.clock.now_ms());
        self.anchor_at = Some(Instant::now());
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
            Step::Close | Step::Erase | Step::Forget | Step::Sweep => {
                return self.pause().await;
            }
            // What was begun is dropped next, and the guest goes on.
            Step::Save(..) => {
                self.unsaved = Some(desired.generation);
                self.error = Some(e);
            }
            Step::NetSet if matches!(self.vm, Vm::Running | Vm::Paused) => {
                return self.pause().await;
            }
            Step::Claim | Step::MemoryOpen => {
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
            // A snapshot is news when it is there, and so is an archive, or that it is gone.
            (Step::Sweep, _)
            | (
                Step::NetSet | Step::Pause | Step::Resume | Step::SaveDrop,
                Vm::Running | Vm::Paused,
            )
            | (Step::Save(Act::Snapshot | Act::Archive | Act::Unarchive, _), _) => return,
            (Step::Shutdown | Step::Close | Step::Erase | Step::Save(..), _) => {
                ActualState::Stopping
            }
            (Step::Rest, Vm::Running) => ActualState::Running,
            (Step::Rest, Vm::Paused) => ActualState::Paused,
            (Step::Rest, Vm::Attested) => ActualState::Starting,
            (Step::Rest, _) => match desired.power {
                Power::Deleted => ActualState::Deleted,
                Power::Stopped => {
                    (self.crashed, self.error) = (false, None);
                    ActualState::Stopped
                }
                Power::Asleep if self.memory => {
                    (self.crashed, self.error) = (false, None);
                    ActualState::Asleep
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
            memory: self.memory,
            wakes: desired.wakes,
            wanted: false,
            snapshot: self.snapshot.clone(),
            archived: self.archived.clone(),
            error: self.error.clone(),
        });
    }

    pub(crate) fn slot(&self) -> api::Result<u16> {
        self.spare.as_ref().map(|s| s.slot).ok_or_else(lost)
    }

    pub(crate) fn place_set(&self, up: bool) {
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

pub(crate) fn no_lease() -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "the start's permission ran out before the workspace was up; start it again",
    )
}

pub(crate) fn lost() -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "the workspace's VM went away; start it again",
    )
}

fn refused_reads() -> Error {
    Error::new(
        ErrorCode::DiskTampered,
        "parts of the workspace's disk or of the memory that it was woken from were changed while \
         they were at rest and can't be read; have the operator look for who writes to the machine's \
         disk, and go back to a snapshot or copy out what can be read",
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
