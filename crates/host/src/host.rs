//! The host's operations, and the tasks behind them: one per workspace, one that watches the
//! machine, one that tends templates and the pool.

use crate::fleet::{Shape, Spare};
use crate::images;
use crate::limits::{
    ANCHOR_RETRY_AFTER, APPLY_WAIT_MAX_MS, CHANGES_WAIT_MAX_MS, RETRY_AFTER, VMCTL_SILENT_MAX,
    WATCH_EVERY, WORKSPACES_MAX,
};
use crate::workspace::{Found, Gone, Handle, Place, Shared, Workspace, blocking};
use api::host::{ACTIVE_MAX, Actual, ActualState, Desired, Idle, Info, Op};
use api::vmctl::VmState;
use api::warden::{Slot, SlotState, Start};
use api::{Error, ErrorCode};
use model::{Power, WorkspaceId};
use service::rpc::Peer;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The pool's shape, by the image's name.
#[derive(Debug, Clone)]
pub struct PoolWish {
    /// The image's name.
    pub image: String,
    /// Memory, MiB.
    pub memory_mb: u32,
}

/// One machine's workspaces.
pub struct Host {
    shared: Arc<Shared>,
    artifacts: PathBuf,
    pool: PoolWish,
    workspaces: Mutex<HashMap<WorkspaceId, Entry>>,
    /// Orders the writes of desired states.
    applying: tokio::sync::Mutex<()>,
}

struct Entry {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Host {
    /// A host without workspaces; [`Host::recover`] finds those of the one before it.
    #[must_use]
    pub fn new(shared: Arc<Shared>, artifacts: PathBuf, pool: PoolWish) -> Arc<Self> {
        Arc::new(Self {
            shared,
            artifacts,
            pool,
            workspaces: Mutex::default(),
            applying: tokio::sync::Mutex::default(),
        })
    }

    /// Takes over what the host process before this one left: running workspaces and pooled VMs
    /// go on, everything half-done is closed. Waits for warden as long as it takes.
    ///
    /// # Errors
    /// If the desired states can't be read.
    pub async fn recover(self: &Arc<Self>) -> anyhow::Result<()> {
        let status = loop {
            match self.shared.peers.status().await {
                Ok(status) => break status,
                Err(e) => tracing::warn!(error = %e, detail = e.detail, "waiting for warden"),
            }
            tokio::time::sleep(RETRY_AFTER).await;
        };
        self.note_templates(&status);
        self.pool_shape();
        let mut desired: HashMap<_, _> = self
            .shared
            .store
            .load()?
            .into_iter()
            .map(|d| (d.workspace.clone(), d))
            .collect();
        for slot in status.slots {
            let wish = slot.workspace.as_ref().and_then(|w| desired.remove(w));
            match wish {
                Some(wish) => {
                    let found = self.found(&slot).await;
                    self.shared.fleet.adopt_running(slot.slot);
                    self.start_task(wish, found);
                }
                None if self.shared.fleet.pool_has_room() && self.is_spare(&slot).await => {
                    let shape = shape_of(&slot);
                    self.shared.fleet.adopt_spare(shape, slot.slot, slot.net);
                }
                None => {
                    self.shared.fleet.adopt_running(slot.slot);
                    self.shared.fleet.close_some_time(slot.slot).await;
                }
            }
        }
        for (_, wish) in desired {
            self.start_task(wish, Found::Nothing);
        }
        Ok(())
    }

    /// Watches and tends the machine until `stop`.
    pub async fn run(self: Arc<Self>, stop: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        let (host, mut stopped) = (Arc::clone(&self), stop.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = host.watch() => {}
                _ = stopped.wait_for(|s| *s) => {}
            }
        });
        let (shared, mut stopped) = (Arc::clone(&self.shared), stop.clone());
        tasks.spawn(async move {
            let again = async {
                loop {
                    tokio::time::sleep(ANCHOR_RETRY_AFTER).await;
                    shared.anchors.flush(None).await;
                }
            };
            tokio::select! {
                () = again => {}
                _ = stopped.wait_for(|s| *s) => {}
            }
        });
        let (shared, mut stopped) = (Arc::clone(&self.shared), stop.clone());
        tasks.spawn(async move {
            // A VM that is being prepared is left where it is, as a kill would leave it: the next
            // host finds it on its slot, or warden closes it.
            tokio::select! {
                () = shared.fleet.tend(stop) => {}
                _ = stopped.wait_for(|s| *s) => {}
            }
        });
        while tasks.join_next().await.is_some() {}
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The operation's; [`ErrorCode::Forbidden`] if the peer may not ask for it.
    pub async fn handle(self: Arc<Self>, peer: Peer, op: Op) -> api::Result<serde_json::Value> {
        use service::rpc::ok;
        match (op, peer.process.as_str()) {
            (Op::Apply { desired, wait_ms }, "control") => {
                ok(&self.apply(*desired, wait_ms).await?)
            }
            (Op::Changes { since, wait_ms }, _) => {
                let wait = Duration::from_millis(wait_ms.min(CHANGES_WAIT_MAX_MS));
                ok(&self.shared.feed.changes(since, wait).await)
            }
            (Op::Active { workspaces }, "edge" | "control") => {
                for id in workspaces.iter().take(ACTIVE_MAX) {
                    if self.with(id, |_| ()).is_some() {
                        self.shared.activity.note(id);
                    }
                }
                ok(&true)
            }
            (Op::Want { workspace }, "edge") => {
                self.shared.feed.want(&workspace);
                ok(&true)
            }
            (_, "edge") | (Op::Want { .. } | Op::Apply { .. } | Op::Active { .. }, _) => {
                Err(Error::new(
                    ErrorCode::Forbidden,
                    "this process may not ask that of host",
                ))
            }
            (Op::Get { workspace }, _) => ok(&self.get(&workspace)?),
            (Op::List, _) => ok(&self.shared.feed.list()),
            (Op::Counters { workspace }, _) => ok(&self.counters(&workspace).await?),
            (Op::Info, _) => ok(&self.info().await?),
            (Op::Idle { mut workspaces }, _) => {
                workspaces.truncate(ACTIVE_MAX);
                workspaces.retain(|id| self.with(id, |_| ()).is_some());
                let idle = workspaces.into_iter().map(|workspace| Idle {
                    idle_ms: self.shared.activity.idle_ms(&workspace),
                    workspace,
                });
                ok(&idle.collect::<Vec<_>>())
            }
        }
    }

    async fn apply(self: &Arc<Self>, mut desired: Desired, wait_ms: u64) -> api::Result<Actual> {
        let (id, generation) = (desired.workspace.clone(), desired.generation);
        desired
            .resources
            .check()
            .map_err(|e| Error::new(ErrorCode::ValidationError, e))?;
        {
            let _one = self.applying.lock().await;
            let last = self.with(&id, |e| Arc::clone(&e.handle.desired.borrow()));
            if last
                .as_ref()
                .is_some_and(|last| generation < last.generation)
            {
                return Err(Error::new(
                    ErrorCode::Conflict,
                    "a newer state of this workspace is known already",
                ));
            }
            if last.is_none() && self.lock().len() >= WORKSPACES_MAX {
                return Err(Error::new(
                    ErrorCode::VmUnavailable,
                    "this host holds as many workspaces as it can",
                ));
            }
            // A change that comes in the middle of a start does not take its lease away.
            let starting = |p| matches!(p, Power::Running | Power::Paused);
            let starts_on = last.as_ref().filter(|l| starting(l.power));
            let goes_on = |l: &Desired| {
                starting(l.power) && starting(desired.power)
                    || l.power == Power::Asleep && desired.power == Power::Asleep
            };
            if let Some(last) = last.as_ref().filter(|l| goes_on(l))
                && desired.lease.is_none()
            {
                desired.lease.clone_from(&last.lease);
                desired.start.clone_from(&last.start);
            }
            // A wish of the same generation says nothing new but what a start waits for, and which
            // a host that restarts is told again: the start does not wait for the disk then.
            let known =
                starts_on.is_some_and(|l| l.generation == generation && l.power == desired.power);
            let (store, d) = (self.shared.store.clone(), desired.clone());
            let put = blocking(move || store.put(&d));
            let put = if known {
                Some(put)
            } else {
                put.await?;
                None
            };
            let fresh = Arc::new(desired.clone());
            // A task that ended (its workspace was deleted) hears nothing: it gets a new one.
            let heard = self.with(&id, |e| e.handle.desired.send(fresh).is_ok());
            if heard != Some(true) {
                self.start_task(desired, Found::New);
            }
            if let Some(put) = put {
                put.await?;
            }
        }
        let wait = Duration::from_millis(wait_ms.min(APPLY_WAIT_MAX_MS));
        let settled = |a: &Actual| {
            a.state == ActualState::Deleted
                || a.generation >= generation
                    && !matches!(a.state, ActualState::Starting | ActualState::Stopping)
        };
        self.shared
            .feed
            .wait(&id, wait, settled)
            .await
            .ok_or_else(|| not_found(&id))
    }

    fn get(&self, id: &WorkspaceId) -> api::Result<Actual> {
        self.shared.feed.get(id).ok_or_else(|| not_found(id))
    }

    async fn counters(&self, id: &WorkspaceId) -> api::Result<api::warden::Counters> {
        let place = self
            .with(id, |e| place(&e.handle))
            .ok_or_else(|| not_found(id))?;
        let place = place.ok_or_else(|| {
            Error::new(
                ErrorCode::VmNotRunning,
                "the workspace does not run: it has no counters",
            )
        })?;
        self.shared.peers.counters(place.slot).await
    }

    async fn info(&self) -> api::Result<Info> {
        let status = self.shared.peers.status().await?;
        let artifacts = self.artifacts.clone();
        let images = tokio::task::spawn_blocking(move || images::load(&artifacts))
            .await
            .map_err(Error::internal)??;
        let (pool_ready, pool_wanted) = self.shared.fleet.pool_size();
        Ok(Info {
            host: status.host,
            images,
            accel: status.accel,
            pool_ready,
            pool_wanted,
            weakened: status.weakened,
        })
    }

    fn start_task(self: &Arc<Self>, desired: Desired, found: Found) {
        let id = desired.workspace.clone();
        let (workspace, handle) = Workspace::new(Arc::clone(&self.shared), desired, found);
        let task = tokio::spawn(workspace.run());
        self.lock().insert(id, Entry { handle, task });
    }

    /// What warden and vmctl say of a workspace's slot.
    async fn found(&self, slot: &Slot) -> Found {
        let spare = Spare {
            slot: slot.slot,
            net: slot.net.clone(),
            from: from(slot.how),
        };
        let vm = match (slot.state, &slot.start_id) {
            (SlotState::DiskAttached, Some(_)) => self.shared.peers.vm_status(slot.slot).await,
            _ => return Found::Remains(spare),
        };
        match (vm.map(|s| s.vm), slot.start_id.clone()) {
            (Ok(vm @ (VmState::Running | VmState::Paused)), Some(start_id)) => Found::Up {
                spare,
                start_id,
                paused: vm == VmState::Paused,
            },
            _ => Found::Remains(spare),
        }
    }

    async fn is_spare(&self, slot: &Slot) -> bool {
        slot.workspace.is_none()
            && slot.state == SlotState::Open
            && slot.how != Start::Build
            && matches!(self.shared.peers.vm_status(slot.slot).await, Ok(s) if s.vm == VmState::Pooled)
    }

    /// Looks at the machine again and again.
    async fn watch(&self) {
        let mut silent: HashMap<u16, u32> = HashMap::new();
        loop {
            tokio::time::sleep(WATCH_EVERY).await;
            self.pool_shape();
            self.forget_deleted();
            // What we believe first, then what is so: whatever is in the first must be in the
            // second, unless it went away.
            let spares = self.shared.fleet.spare_slots();
            let places: Vec<_> = self
                .lock()
                .iter()
                .filter_map(|(id, e)| Some((id.clone(), place(&e.handle)?)))
                .collect();
            match self.shared.peers.status().await {
                Ok(status) => self.look(&status, spares, places, &mut silent).await,
                Err(e) => tracing::warn!(error = %e, detail = e.detail, "warden does not answer"),
            }
        }
    }

    async fn look(
        &self,
        status: &api::warden::Status,
        spares: Vec<u16>,
        places: Vec<(WorkspaceId, Place)>,
        silent: &mut HashMap<u16, u32>,
    ) {
        self.note_templates(status);
        let slots: HashMap<u16, &Slot> = status.slots.iter().map(|s| (s.slot, s)).collect();
        for slot in slots.keys() {
            self.shared.fleet.orphan_close(*slot).await;
        }
        for slot in spares {
            if slots.get(&slot).is_none_or(|s| s.state == SlotState::Dead) {
                self.shared.fleet.spare_drop(slot).await;
            }
        }
        silent.retain(|slot, _| places.iter().any(|(_, p)| p.slot == *slot));
        for (id, place) in places {
            let there = slots.get(&place.slot).is_some_and(|s| {
                s.state != SlotState::Dead && s.start_id.as_ref() == Some(&place.start_id)
            });
            let error = if !there {
                Some(Some(gone("its VM or its disk ended")))
            } else if place.up {
                self.exited(place.slot, silent).await
            } else {
                None
            };
            if let Some(error) = error {
                let start_id = place.start_id;
                self.with(&id, |e| {
                    e.handle.gone.send_if_modified(|g| {
                        let news = g.as_ref().is_none_or(|g| g.start_id != start_id);
                        if news {
                            *g = Some(Gone {
                                start_id: start_id.clone(),
                                error: error.clone(),
                            });
                        }
                        news
                    })
                });
            }
        }
    }

    /// Whether vmctl says that the guest is gone, and why.
    async fn exited(&self, slot: u16, silent: &mut HashMap<u16, u32>) -> Option<Option<Error>> {
        match self.shared.peers.vm_status(slot).await {
            Ok(s) if s.vm == VmState::Exited => {
                silent.remove(&slot);
                match s.reason.as_deref() {
                    Some("shutdown") => Some(None),
                    Some("panic") => Some(Some(gone("its kernel panicked"))),
                    Some("reset") => Some(Some(gone("it reset itself"))),
                    _ => Some(Some(gone("its VM ended"))),
                }
            }
            Ok(_) => {
                silent.remove(&slot);
                None
            }
            Err(e) => {
                let times = silent.entry(slot).or_default();
                *times += 1;
                tracing::warn!(slot, error = %e, detail = e.detail, times, "vmctl does not answer");
                (*times >= VMCTL_SILENT_MAX).then(|| Some(gone("its VM can't be reached")))
            }
        }
    }

    fn note_templates(&self, status: &api::warden::Status) {
        let shapes = status.templates.iter().cloned();
        self.shared
            .fleet
            .templates_set(shapes.map(|(image, memory_mb, cpus)| Shape {
                image,
                memory_mb,
                cpus,
            }));
    }

    fn pool_shape(&self) {
        let shape = images::load(&self.artifacts).ok().and_then(|images| {
            let image = images.into_iter().find(|i| i.name == self.pool.image)?;
            Some(Shape {
                image: image.id,
                memory_mb: self.pool.memory_mb,
                cpus: model::Resources::default().cpus,
            })
        });
        self.shared.fleet.pool_shape_set(shape);
    }

    fn forget_deleted(&self) {
        self.lock().retain(|id, e| {
            let gone = e.task.is_finished() && e.handle.desired.borrow().power == Power::Deleted;
            if gone {
                self.shared.activity.forget(id);
            }
            !gone
        });
    }

    fn with<T>(&self, id: &WorkspaceId, f: impl FnOnce(&Entry) -> T) -> Option<T> {
        self.lock().get(id).map(f)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkspaceId, Entry>> {
        self.workspaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn place(handle: &Handle) -> Option<Place> {
    handle
        .place
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

fn from(how: Start) -> &'static str {
    match how {
        Start::Template => "template",
        Start::Cold | Start::Build => "cold",
        Start::Wake => "wake",
    }
}

fn shape_of(slot: &Slot) -> Shape {
    Shape {
        image: slot.image.clone(),
        memory_mb: slot.memory_mb,
        cpus: slot.cpus,
    }
}

fn gone(why: &str) -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        format!("the workspace went away: {why}"),
    )
}

fn not_found(id: &WorkspaceId) -> Error {
    Error::new(
        ErrorCode::NotFound,
        format!("this host knows no workspace {id}"),
    )
}
