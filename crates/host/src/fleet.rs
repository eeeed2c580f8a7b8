//! The VMs of this machine that are nobody's yet: slots, templates and the pool.
//!
//! A claim takes a pooled VM of the right shape, else restores a template, else boots cold; all
//! three give the same workspace. Templates are built at first need, one at a time, in the
//! background, and the pool is refilled one VM at a time.
//!
//! Must never give one VM to two workspaces, nor take one back: what was claimed is closed.

use crate::limits::{TEMPLATE_RETRY_AFTER, TEMPLATES_WANTED_MAX, TEND_AFTER_CLAIM, TEND_EVERY};
use crate::peers::Peers;
use api::vmctl::VmState;
use api::warden::{ImageId, Start, VmOpened};
use api::{Error, ErrorCode};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What a template is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The image.
    pub image: ImageId,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
}

/// A VM without identity that is ready for one.
#[derive(Debug, Clone)]
pub struct Spare {
    /// Its slot.
    pub slot: u16,
    /// Its network.
    pub net: VmOpened,
    /// `pool`, `template` or `cold`.
    pub from: &'static str,
}

/// How many VMs there may be, and which are kept.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Workspaces that may run at once.
    pub max_running: u16,
    /// Pooled VMs wanted.
    pub pool_size: u32,
}

/// The VMs that are nobody's yet.
pub struct Fleet {
    peers: Peers,
    bounds: Bounds,
    pool_shape: watch::Sender<Option<Shape>>,
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    /// Slots in use, by whomever.
    used: BTreeSet<u16>,
    /// The slot after the one given last: an address is not given again at once.
    next: u16,
    /// Slots of workspaces.
    running: HashSet<u16>,
    pool: Vec<(Shape, Spare)>,
    templates: HashSet<Shape>,
    wanted: VecDeque<Shape>,
    not_before: HashMap<Shape, Instant>,
    /// When the pool may be refilled although it is not empty.
    refill_at: Option<Instant>,
    /// Slots that could not be closed when they had to be.
    doomed: Vec<u16>,
}

impl Fleet {
    /// An empty fleet.
    #[must_use]
    pub fn new(peers: Peers, bounds: Bounds) -> Self {
        Self {
            peers,
            bounds,
            pool_shape: watch::Sender::new(None),
            inner: Mutex::default(),
            wake: Notify::new(),
        }
    }

    /// Takes a VM for a workspace.
    ///
    /// # Errors
    /// [`ErrorCode::VmUnavailable`] if no more may run, or warden's error.
    pub async fn claim(&self, shape: &Shape) -> api::Result<Spare> {
        while let Some(spare) = self.pool_take(shape)? {
            self.wake.notify_one();
            if matches!(self.peers.vm_status(spare.slot).await, Ok(s) if s.vm == VmState::Pooled) {
                return Ok(spare);
            }
            tracing::warn!(slot = spare.slot, "a pooled VM is not what it was");
            self.close_some_time(spare.slot).await;
        }
        let how = if self.lock().templates.contains(shape) {
            Start::Template
        } else {
            Start::Cold
        };
        let opened = match self.open(shape, how, true).await {
            // A slot may be taken by what a killed host process still had under way.
            Err(e) if how == Start::Template || e.code == ErrorCode::Conflict => {
                tracing::warn!(error = %e, detail = e.detail, "booting cold");
                self.open(shape, Start::Cold, true).await
            }
            other => other,
        };
        if how == Start::Cold {
            let due = Instant::now() + TEND_AFTER_CLAIM;
            self.lock().not_before.entry(shape.clone()).or_insert(due);
            self.want_template(shape);
        }
        opened
    }

    /// Ends what is on a slot and frees it. Idempotent.
    ///
    /// # Errors
    /// Warden's; the slot stays taken.
    pub async fn close(&self, slot: u16) -> api::Result<()> {
        self.peers.slot_close(slot).await?;
        let mut inner = self.lock();
        inner.used.remove(&slot);
        inner.running.remove(&slot);
        inner.pool.retain(|(_, s)| s.slot != slot);
        drop(inner);
        self.wake.notify_one();
        Ok(())
    }

    /// Marks a slot that warden already has as a workspace's.
    pub(crate) fn adopt_running(&self, slot: u16) {
        let mut inner = self.lock();
        inner.used.insert(slot);
        inner.running.insert(slot);
    }

    /// Takes a pooled VM over from the host process before this one.
    pub(crate) fn adopt_spare(&self, shape: Shape, slot: u16, net: VmOpened) {
        let from = "pool";
        let mut inner = self.lock();
        inner.used.insert(slot);
        inner.pool.push((shape, Spare { slot, net, from }));
    }

    /// What templates there are, by warden's word.
    pub(crate) fn templates_set(&self, templates: impl Iterator<Item = Shape>) {
        self.lock().templates = templates.collect();
    }

    /// The shape that the pool holds.
    pub(crate) fn pool_shape_set(&self, shape: Option<Shape>) {
        let changed = self.pool_shape.send_if_modified(|now| {
            let changed = *now != shape;
            *now = shape;
            changed
        });
        if changed {
            self.wake.notify_one();
        }
    }

    /// Slots of pooled VMs.
    pub(crate) fn spare_slots(&self) -> Vec<u16> {
        self.lock().pool.iter().map(|(_, s)| s.slot).collect()
    }

    /// Pooled VMs ready now, and wanted.
    #[must_use]
    pub fn pool_size(&self) -> (u32, u32) {
        let ready = u32::try_from(self.lock().pool.len()).unwrap_or(u32::MAX);
        (ready, self.bounds.pool_size)
    }

    /// Closes a pooled VM that died, unless a workspace took it meanwhile.
    pub(crate) async fn spare_drop(&self, slot: u16) {
        let pooled = {
            let mut inner = self.lock();
            let before = inner.pool.len();
            inner.pool.retain(|(_, s)| s.slot != slot);
            inner.pool.len() < before
        };
        if pooled {
            self.close_some_time(slot).await;
        }
    }

    /// Closes a slot that warden has and nobody here knows: a killed host process had it under
    /// way.
    pub(crate) async fn orphan_close(&self, slot: u16) {
        let unknown = self.lock().used.insert(slot);
        if unknown {
            tracing::warn!(slot, "nobody's VM");
            self.close_some_time(slot).await;
        }
    }

    /// Whether fewer VMs are pooled than wanted.
    pub(crate) fn pool_has_room(&self) -> bool {
        let (ready, wanted) = self.pool_size();
        ready < wanted
    }

    /// Builds templates and refills the pool until `stop`.
    pub async fn tend(&self, mut stop: watch::Receiver<bool>) {
        loop {
            while !*stop.borrow() && self.tend_once().await {}
            tokio::select! {
                () = self.wake.notified() => {}
                () = tokio::time::sleep(self.idle()) => {}
                _ = stop.wait_for(|s| *s) => return,
            }
        }
    }

    /// How long there is nothing to do.
    fn idle(&self) -> Duration {
        let inner = self.lock();
        let wanted = inner.wanted.iter().filter_map(|s| inner.not_before.get(s));
        let due = wanted.chain(&inner.refill_at);
        due.map(|at| at.saturating_duration_since(Instant::now()))
            .filter(|left| !left.is_zero())
            .fold(TEND_EVERY, Duration::min)
    }

    /// Does one thing; `false` if there is nothing to do.
    async fn tend_once(&self) -> bool {
        let doomed = self.lock().doomed.pop();
        if let Some(slot) = doomed {
            return self.close_some_time(slot).await;
        }
        let pool_shape = self.pool_shape.borrow().clone();
        if let Some(shape) = pool_shape {
            let (have_template, stale, short) = {
                let inner = self.lock();
                let stale = inner.pool.iter().find(|(s, _)| *s != shape);
                (
                    inner.templates.contains(&shape),
                    stale.map(|(_, spare)| spare.slot),
                    inner.pool.len() < self.bounds.pool_size as usize
                        && (inner.pool.is_empty() || inner.refill_at <= Some(Instant::now())),
                )
            };
            if let Some(slot) = stale {
                return self.close(slot).await.is_ok();
            }
            if self.bounds.pool_size > 0 && !have_template {
                self.want_template(&shape);
            }
            if short && have_template && self.may_try(&shape) {
                return self.refill(shape).await;
            }
        }
        let wanted = {
            let mut inner = self.lock();
            let now = Instant::now();
            let due = |s: &Shape| inner.not_before.get(s).is_none_or(|t| *t <= now);
            let at = inner.wanted.iter().position(due);
            at.and_then(|i| inner.wanted.remove(i))
        };
        let Some(shape) = wanted else { return false };
        match self.build(&shape).await {
            Ok(()) => {
                self.lock().templates.insert(shape);
            }
            Err(e) => self.put_off(shape, "template", &e),
        }
        true
    }

    async fn refill(&self, shape: Shape) -> bool {
        match self.open(&shape, Start::Template, false).await {
            Ok(spare) => {
                let from = "pool";
                self.lock().pool.push((shape, Spare { from, ..spare }));
                true
            }
            Err(e) => {
                self.put_off(shape, "pool", &e);
                false
            }
        }
    }

    async fn build(&self, shape: &Shape) -> api::Result<()> {
        let slot = self.slot_take(false, None)?;
        let built = async {
            self.peers.vm_open(slot, Start::Build, shape).await?;
            self.peers.vm_prepare(slot).await?;
            self.peers.vm_save(slot).await?;
            self.peers.template_seal(slot).await
        };
        let built = built.await;
        // Sealing closes the slot; closing it again does no harm, and frees the number.
        self.close_some_time(slot).await;
        built.map(drop)
    }

    /// Opens a VM and brings it to the point where a disk may be attached; for a workspace, or
    /// for the pool.
    async fn open(&self, shape: &Shape, how: Start, runs: bool) -> api::Result<Spare> {
        let slot = self.slot_take(runs, None)?;
        let opened = async {
            let net = self.peers.vm_open(slot, how, shape).await?;
            // A VM that is taken at once runs what it needs for the first time in earnest.
            if runs {
                self.peers.vm_prepare_now(slot).await?;
            } else {
                self.peers.vm_prepare(slot).await?;
            }
            Ok(net)
        };
        match opened.await {
            Ok(net) => Ok(Spare {
                slot,
                net,
                from: if how == Start::Template {
                    "template"
                } else {
                    "cold"
                },
            }),
            Err(e) => {
                self.close_some_time(slot).await;
                Err(e)
            }
        }
    }

    /// A free slot for a workspace that comes up from saved memory: `last`, where it was, if that is
    /// free. Its guest then keeps its address, and has nothing to change on its link.
    pub(crate) fn slot_for_memory(&self, last: Option<u16>) -> api::Result<u16> {
        self.slot_take(true, last)
    }

    /// Closes a slot now, or leaves it to `tend`.
    pub(crate) async fn close_some_time(&self, slot: u16) -> bool {
        match self.close(slot).await {
            Ok(()) => true,
            Err(e) => {
                tracing::error!(slot, error = %e, detail = e.detail, "can't close it yet");
                self.lock().doomed.push(slot);
                false
            }
        }
    }

    /// Takes a pooled VM for a workspace, if there is one of its shape.
    fn pool_take(&self, shape: &Shape) -> api::Result<Option<Spare>> {
        let mut inner = self.lock();
        if inner.running.len() >= usize::from(self.bounds.max_running) {
            return Err(full());
        }
        let at = inner.pool.iter().position(|(s, _)| s == shape);
        let spare = at.map(|i| inner.pool.swap_remove(i).1);
        if let Some(spare) = &spare {
            inner.running.insert(spare.slot);
            inner.refill_at = Some(Instant::now() + TEND_AFTER_CLAIM);
        }
        Ok(spare)
    }

    fn want_template(&self, shape: &Shape) {
        let mut inner = self.lock();
        if inner.wanted.len() < TEMPLATES_WANTED_MAX && !inner.wanted.contains(shape) {
            inner.wanted.push_back(shape.clone());
            drop(inner);
            self.wake.notify_one();
        }
    }

    fn may_try(&self, shape: &Shape) -> bool {
        let inner = self.lock();
        let not_before = inner.not_before.get(shape);
        not_before.is_none_or(|t| *t <= Instant::now())
    }

    fn put_off(&self, shape: Shape, what: &str, e: &Error) {
        tracing::error!(what, ?shape, error = %e, detail = e.detail, "put off");
        let mut inner = self.lock();
        if inner.not_before.len() >= 4 * TEMPLATES_WANTED_MAX {
            inner.not_before.clear();
        }
        let later = Instant::now() + TEMPLATE_RETRY_AFTER;
        inner.not_before.insert(shape, later);
    }

    fn slot_take(&self, runs: bool, last: Option<u16>) -> api::Result<u16> {
        let mut inner = self.lock();
        if runs && inner.running.len() >= usize::from(self.bounds.max_running) {
            return Err(full());
        }
        // Running ones, the pool, a refill and a build.
        let most = usize::from(self.bounds.max_running) + self.bounds.pool_size as usize + 2;
        let most = most.min(usize::from(model::limits::SLOTS_MAX));
        if inner.used.len() >= most {
            return Err(full());
        }
        let all = model::limits::SLOTS_MAX;
        let is_free = |s: &u16| !inner.used.contains(s);
        let next = || (0..all).map(|i| (inner.next + i) % all).find(is_free);
        let again = last.filter(is_free);
        let slot = again.or_else(next).ok_or_else(full)?;
        if again.is_none() {
            inner.next = (slot + 1) % all;
        }
        inner.used.insert(slot);
        if runs {
            inner.running.insert(slot);
        }
        Ok(slot)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn full() -> Error {
    Error::new(
        ErrorCode::VmUnavailable,
        "as many workspaces run on this host as it may hold; stop one and try again",
    )
}
