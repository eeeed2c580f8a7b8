//! What the edge knows of workspaces, and who may pass: two layers that know nothing of each
//! other (ACC-4).
//!
//! - mint's feed: token states, each signed. Epochs only grow.
//! - host's feed: where a workspace runs, and whether `public_access` is on.
//!
//! A request is admitted by both, once, when it begins. From then on it is in the table of live
//! requests, and every change that would refuse it now cuts it: its bodies end with an error and
//! its connection to the guest is closed, whether or not the client takes its bytes.
//!
//! Must never admit while a feed is lost, nor take an address from a token.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::host::{Actual, ActualState};
use api::mint::{GatewayClaims, TokenState};
use api::{Error, ErrorCode, context};
use model::{AccountId, StartId, WorkspaceId};
use seal::sign::{Signed, VerifyingKey};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::limits::{FEED_LOST_CUT, FEED_STALE_MAX, GUEST_IN_FLIGHT_MAX};

/// One of the two sources of truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// Token states.
    Mint,
    /// Actual states.
    Host,
}

/// Where guests are.
#[derive(Debug, Clone, Copy)]
pub struct GuestNet {
    /// First address of the /16 that guests' addresses are in.
    pub base: Ipv4Addr,
    /// The agent's mTLS port.
    pub port: u16,
}

impl GuestNet {
    /// The agent's address, if that is a guest's address at all.
    fn agent(&self, ip: &str) -> Option<SocketAddr> {
        let ip: Ipv4Addr = ip.parse().ok()?;
        let same_net = ip.octets()[..2] == self.base.octets()[..2];
        same_net.then_some(SocketAddr::new(IpAddr::V4(ip), self.port))
    }
}

/// A running guest that the edge may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Its start.
    pub start: StartId,
    /// The agent's address.
    pub agent: SocketAddr,
    /// The identity that the guest must prove, by mint's word.
    pub identity: VerifyingKey,
}

/// A token state that a guest should be told.
#[derive(Debug, Clone)]
pub struct Push {
    /// Where.
    pub route: Route,
    /// What, as mint signed it.
    pub signed: String,
    /// Its number.
    pub seq: u64,
}

/// The table.
pub struct Table {
    mint_key: VerifyingKey,
    net: GuestNet,
    inner: Mutex<Inner>,
    /// Something changed that guests may have to be told.
    pub changed: Notify,
    /// Telling a guest has ended, one way or the other.
    pub settled: Notify,
    /// A workspace's actual state changed: wakes all who wait for one.
    pub moved: Notify,
}

#[derive(Default)]
struct Inner {
    feeds: HashMap<Source, Feed>,
    entries: HashMap<WorkspaceId, Entry>,
    /// Workspaces that a request was admitted to since the last report.
    used: HashSet<WorkspaceId>,
    live_next: u64,
    live_count: usize,
    cut_count: u64,
}

#[derive(Clone, Copy)]
struct Feed {
    /// What to ask after next.
    seq: u64,
    /// When it was last heard; `None` while it is lost.
    heard: Option<Instant>,
    lost_since: Option<Instant>,
}

struct Entry {
    token: Option<Token>,
    actual: Option<Actual>,
    /// Number of the answer that `actual` came with.
    actual_seq: u64,
    live: HashMap<u64, LiveEntry>,
    room: Arc<Semaphore>,
    told: Option<(StartId, u64)>,
    telling: bool,
    tries: u64,
}

struct Token {
    state: TokenState,
    signed: String,
    identity: VerifyingKey,
}

struct LiveEntry {
    account: AccountId,
    epoch: u64,
    start: StartId,
    cut: CancellationToken,
    connection: Option<CancellationToken>,
    /// The guest's answer has begun.
    answered: bool,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            token: None,
            actual: None,
            actual_seq: 0,
            live: HashMap::new(),
            room: Arc::new(Semaphore::new(GUEST_IN_FLIGHT_MAX)),
            told: None,
            telling: false,
            tries: 0,
        }
    }
}

/// A request that was admitted; leaves the table when it is dropped.
pub struct Live {
    table: Arc<Table>,
    workspace: WorkspaceId,
    number: u64,
    cut: CancellationToken,
    _room: OwnedSemaphorePermit,
}

impl Live {
    /// Ends when the request must end.
    #[must_use]
    pub fn cut(&self) -> CancellationToken {
        self.cut.clone()
    }

    /// Its answer has begun: from now on it outlasts a pause.
    pub fn answered(&self) {
        let mut inner = self.table.lock();
        let entry = inner.entries.get_mut(&self.workspace);
        if let Some(live) = entry.and_then(|e| e.live.get_mut(&self.number)) {
            live.answered = true;
        }
    }

    /// The guest's connection that ends with it.
    pub fn on(&self, connection: CancellationToken) {
        let mut inner = self.table.lock();
        let entry = inner.entries.get_mut(&self.workspace);
        match entry.and_then(|e| e.live.get_mut(&self.number)) {
            Some(live) if !live.cut.is_cancelled() => live.connection = Some(connection),
            _ => connection.cancel(),
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let mut inner = self.table.lock();
        if let Some(entry) = inner.entries.get_mut(&self.workspace)
            && entry.live.remove(&self.number).is_some()
        {
            let empty = entry.is_empty();
            inner.live_count -= 1;
            if empty {
                inner.entries.remove(&self.workspace);
            }
        }
    }
}

impl Table {
    /// An empty table, both feeds lost.
    #[must_use]
    pub fn new(mint_key: VerifyingKey, net: GuestNet) -> Arc<Self> {
        let lost = Feed {
            seq: 0,
            heard: None,
            lost_since: Some(Instant::now()),
        };
        let feeds = [(Source::Mint, lost), (Source::Host, lost)].into();
        Arc::new(Self {
            mint_key,
            net,
            inner: Mutex::new(Inner {
                feeds,
                ..Inner::default()
            }),
            changed: Notify::new(),
            settled: Notify::new(),
            moved: Notify::new(),
        })
    }

    /// Admits a request whose token's signature, audience and time were found good.
    ///
    /// # Errors
    /// What refuses it, first the token's layer, then the firewall's.
    pub fn admit(
        self: &Arc<Self>,
        workspace: &WorkspaceId,
        claims: &GatewayClaims,
    ) -> Result<(Route, Live), Error> {
        let mut inner = self.lock();
        if !inner.is_fresh() {
            return Err(Error::new(
                ErrorCode::Unavailable,
                "the edge can't tell now whether this is allowed; try again",
            ));
        }
        let unknown = || Error::new(ErrorCode::NotFound, "no such workspace");
        let Some(entry) = inner.entries.get(workspace) else {
            return Err(unknown());
        };
        let token = entry
            .token
            .as_ref()
            .filter(|t| !t.state.gone)
            .ok_or_else(unknown)?;
        token_allows(&token.state, claims.sub.as_str(), claims.epoch)?;
        let route = entry.route(workspace, token, &self.net)?;
        let Ok(room) = Arc::clone(&entry.room).try_acquire_owned() else {
            return Err(Error::new(
                ErrorCode::RateLimited,
                format!("more than {GUEST_IN_FLIGHT_MAX} requests at once to this workspace"),
            ));
        };
        let account = token.state.account.clone();
        let number = inner.live_next;
        inner.live_next += 1;
        let cut = CancellationToken::new();
        let live = LiveEntry {
            account,
            epoch: claims.epoch,
            start: route.start.clone(),
            cut: cut.clone(),
            connection: None,
            answered: false,
        };
        inner.used.insert(workspace.clone());
        inner.live_count += 1;
        if let Some(entry) = inner.entries.get_mut(workspace) {
            entry.live.insert(number, live);
        }
        let live = Live {
            table: Arc::clone(self),
            workspace: workspace.clone(),
            number,
            cut,
            _room: room,
        };
        Ok((route, live))
    }

    /// Takes a token state, if mint signed it and it is news; cuts what it revokes. Returns its
    /// workspace.
    pub fn token_state(&self, text: &str) -> Option<WorkspaceId> {
        let verified = Signed::parse(text)
            .and_then(|s| s.verify::<TokenState>(&self.mint_key, context::TOKEN_STATE))
            .and_then(|s| Ok((VerifyingKey::from_hex(&s.identity_pub)?, s)));
        let (identity, state) = match verified {
            Ok(v) => v,
            Err(e) => {
                tracing::error!(error = %e, "a token state that mint did not sign; ignored");
                return None;
            }
        };
        let workspace = state.workspace.clone();
        let mut inner = self.lock();
        let entry = inner.entries.entry(workspace.clone()).or_default();
        if let Some(held) = &entry.token {
            if state.seq <= held.state.seq {
                return Some(workspace);
            }
            if state.epoch < held.state.epoch || (held.state.gone && !state.gone) {
                tracing::error!("a token state that goes back; ignored");
                return Some(workspace);
            }
        }
        entry.token = Some(Token {
            state,
            signed: text.to_owned(),
            identity,
        });
        inner.settle(&workspace);
        drop(inner);
        self.changed.notify_one();
        Some(workspace)
    }

    /// Takes an actual state out of the answer numbered `seq`; cuts what it closes. An older
    /// answer than the last is nothing new, unless a `restart` of the feed numbers anew.
    pub fn actual(&self, actual: Actual, seq: u64, restart: bool) {
        let workspace = actual.workspace.clone();
        let mut inner = self.lock();
        let entry = inner.entries.entry(workspace.clone()).or_default();
        if seq < entry.actual_seq && !restart {
            return;
        }
        entry.actual_seq = seq;
        entry.actual = (actual.state != ActualState::Deleted).then_some(actual);
        inner.settle(&workspace);
        drop(inner);
        self.changed.notify_one();
        self.moved.notify_waiters();
    }

    /// Whether a workspace rests and a request may wake it.
    #[must_use]
    pub fn may_wake(&self, workspace: &WorkspaceId) -> bool {
        self.rests(workspace, |a| a.wakes)
    }

    /// Whether a workspace that was asked for may still come up.
    #[must_use]
    pub fn may_come_up(&self, workspace: &WorkspaceId) -> bool {
        self.rests(workspace, |a| a.wakes || a.state != ActualState::Stopped)
    }

    fn rests(&self, workspace: &WorkspaceId, and: impl Fn(&Actual) -> bool) -> bool {
        let inner = self.lock();
        let actual = inner.entries.get(workspace).and_then(|e| e.actual.as_ref());
        actual.is_some_and(|a| {
            !matches!(a.state, ActualState::Running | ActualState::Paused) && and(a)
        })
    }

    /// A feed was read from its beginning: what it did not name is gone.
    pub fn only(&self, source: Source, named: &HashSet<WorkspaceId>) {
        let mut inner = self.lock();
        let rest: Vec<_> = inner
            .entries
            .keys()
            .filter(|w| !named.contains(*w))
            .cloned()
            .collect();
        for workspace in rest {
            if let Some(entry) = inner.entries.get_mut(&workspace) {
                match source {
                    Source::Mint => entry.token = None,
                    Source::Host => entry.actual = None,
                }
            }
            inner.settle(&workspace);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// A feed answered; `seq` is what to ask after next.
    pub fn heard(&self, source: Source, seq: u64) {
        let feed = Feed {
            seq,
            heard: Some(Instant::now()),
            lost_since: None,
        };
        self.lock().feeds.insert(source, feed);
    }

    /// What to ask a feed after, while it is there.
    #[must_use]
    pub fn seq(&self, source: Source) -> Option<u64> {
        let inner = self.lock();
        let feed = inner.feeds.get(&source)?;
        feed.heard.map(|_| feed.seq)
    }

    /// A feed is lost; whether it was there before. After a while what was opened can't be closed
    /// by it, so it is cut.
    pub fn lost(&self, source: Source) -> bool {
        let mut inner = self.lock();
        let now = Instant::now();
        let before = inner.feeds.get(&source).copied();
        let since = before.and_then(|f| f.lost_since.or(f.heard)).unwrap_or(now);
        inner.feeds.insert(
            source,
            Feed {
                seq: 0,
                heard: None,
                lost_since: Some(since),
            },
        );
        if since.elapsed() > FEED_LOST_CUT {
            let all: Vec<_> = inner.entries.keys().cloned().collect();
            for workspace in all {
                inner.cut(&workspace, |_| true);
            }
        }
        before.is_some_and(|f| f.heard.is_some())
    }

    /// Whether both feeds are there.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.lock().is_fresh()
    }

    /// Requests that pass now, and requests that were cut so far.
    #[must_use]
    pub fn counts(&self) -> (usize, u64) {
        let inner = self.lock();
        (inner.live_count, inner.cut_count)
    }

    /// Workspaces with requests that pass now are used, too.
    pub fn used_note_live(&self) {
        let mut inner = self.lock();
        let Inner { entries, used, .. } = &mut *inner;
        let live = entries.iter().filter(|(_, e)| !e.live.is_empty());
        used.extend(live.map(|(id, _)| id.clone()));
    }

    /// At most `most` workspaces that were used since they were taken last.
    #[must_use]
    pub fn used_take(&self, most: usize) -> Vec<WorkspaceId> {
        let mut inner = self.lock();
        let mut all = std::mem::take(&mut inner.used).into_iter();
        let taken = all.by_ref().take(most).collect();
        inner.used = all.collect();
        taken
    }

    /// Nobody was told of these: they are taken again.
    pub fn used_return(&self, workspaces: Vec<WorkspaceId>) {
        let mut inner = self.lock();
        let known = workspaces
            .into_iter()
            .filter(|w| inner.entries.contains_key(w));
        let known: Vec<_> = known.collect();
        inner.used.extend(known);
    }

    /// Whether connections to this start of a workspace may be used.
    #[must_use]
    pub fn is_current(&self, workspace: &WorkspaceId, start: &StartId) -> bool {
        let inner = self.lock();
        inner
            .entries
            .get(workspace)
            .is_some_and(|e| e.is_open_for(start))
    }

    /// The next guests to be told their token state, those that were tried least often first;
    /// each is to be [`Table::told`].
    #[must_use]
    pub fn to_tell(&self, at_most: usize) -> Vec<Push> {
        let mut inner = self.lock();
        let mut wanting: Vec<_> = inner
            .entries
            .iter_mut()
            .filter_map(|(workspace, entry)| Some((entry.push(workspace, &self.net)?, entry)))
            .collect();
        wanting.sort_by_key(|(_, entry)| entry.tries);
        wanting.truncate(at_most);
        let begin = |(push, entry): (Push, &mut Entry)| {
            entry.telling = true;
            entry.tries += 1;
            push
        };
        wanting.into_iter().map(begin).collect()
    }

    /// What a guest must be told before it gets a request, or it would judge the token by an
    /// older state than the edge did; and whether it is being told something already.
    #[must_use]
    pub fn untold(&self, workspace: &WorkspaceId) -> Option<(Push, bool)> {
        let inner = self.lock();
        let entry = inner.entries.get(workspace)?;
        Some((entry.untold(workspace, &self.net)?, entry.telling))
    }

    /// How telling went.
    pub fn told(&self, push: &Push, taken: bool) {
        let mut inner = self.lock();
        if let Some(entry) = inner.entries.get_mut(&push.route.workspace) {
            entry.telling = false;
            if taken {
                entry.tries = 0;
                entry.told = Some((push.route.start.clone(), push.seq));
            }
        }
        drop(inner);
        self.settled.notify_waiters();
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn is_fresh(&self) -> bool {
        self.feeds
            .values()
            .all(|f| f.heard.is_some_and(|t| t.elapsed() <= FEED_STALE_MAX))
    }

    /// Cuts what a workspace's state no longer allows, and forgets an entry that says nothing.
    fn settle(&mut self, workspace: &WorkspaceId) {
        let Some(entry) = self.entries.get(workspace) else {
            return;
        };
        let state = entry.token.as_ref().map(|t| &t.state).filter(|s| !s.gone);
        let stays: HashSet<u64> = entry
            .live
            .iter()
            .filter(|(_, l)| {
                state.is_some_and(|s| token_allows(s, l.account.as_str(), l.epoch).is_ok())
                    && entry.is_open_for(&l.start)
                    && (l.answered || !entry.is_paused())
            })
            .map(|(n, _)| *n)
            .collect();
        self.cut(workspace, |n| !stays.contains(&n));
        if self.entries.get(workspace).is_some_and(Entry::is_empty) {
            self.entries.remove(workspace);
        }
    }

    fn cut(&mut self, workspace: &WorkspaceId, which: impl Fn(u64) -> bool) {
        let Some(entry) = self.entries.get(workspace) else {
            return;
        };
        for (_, live) in entry
            .live
            .iter()
            .filter(|(n, l)| which(**n) && !l.cut.is_cancelled())
        {
            self.cut_count += 1;
            live.cut.cancel();
            if let Some(connection) = &live.connection {
                connection.cancel();
            }
        }
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.token.is_none() && self.actual.is_none() && self.live.is_empty() && !self.telling
    }

    /// What its guest should be told, and nobody is telling it now.
    fn push(&self, workspace: &WorkspaceId, net: &GuestNet) -> Option<Push> {
        self.untold(workspace, net).filter(|_| !self.telling)
    }

    /// What its guest has not taken yet.
    fn untold(&self, workspace: &WorkspaceId, net: &GuestNet) -> Option<Push> {
        let token = self.token.as_ref().filter(|t| !t.state.gone)?;
        let route = self.route(workspace, token, net).ok()?;
        let seq = token.state.seq;
        let told = self
            .told
            .as_ref()
            .is_some_and(|(s, n)| *s == route.start && *n == seq);
        (!told).then(|| Push {
            route,
            signed: token.signed.clone(),
            seq,
        })
    }

    /// Its CPUs stand still: what was asked of it is not answered before it is resumed.
    fn is_paused(&self) -> bool {
        let state = self.actual.as_ref().map(|a| a.state);
        state == Some(ActualState::Paused)
    }

    /// The firewall's layer: open, and this very start.
    fn is_open_for(&self, start: &StartId) -> bool {
        self.actual
            .as_ref()
            .is_some_and(|a| a.public_access && a.start_id.as_ref() == Some(start))
    }

    fn route(
        &self,
        workspace: &WorkspaceId,
        token: &Token,
        net: &GuestNet,
    ) -> Result<Route, Error> {
        let Some(actual) = self.actual.as_ref().filter(|a| a.public_access) else {
            return Err(Error::new(
                ErrorCode::NetworkBlocked,
                "this workspace is dark: nothing reaches it until its owner turns public_access on",
            ));
        };
        if self.is_paused() {
            return Err(Error::new(
                ErrorCode::VmNotRunning,
                "the workspace is paused; resume it first",
            ));
        }
        let (ActualState::Running, Some(start), Some(ip)) =
            (actual.state, &actual.start_id, &actual.ip)
        else {
            return Err(Error::new(
                ErrorCode::VmNotRunning,
                "the workspace is not running; start it first",
            ));
        };
        let agent = net.agent(ip).ok_or_else(|| {
            Error::new(
                ErrorCode::Unavailable,
                "the workspace can't be reached; try again",
            )
            .detail("host names an address outside network.base")
        })?;
        Ok(Route {
            workspace: workspace.clone(),
            start: start.clone(),
            agent,
            identity: token.identity,
        })
    }
}

/// The token's layer.
fn token_allows(state: &TokenState, account: &str, epoch: u64) -> Result<(), Error> {
    if account != state.account.as_str() || epoch < state.epoch {
        return Err(Error::new(
            ErrorCode::Unauthorized,
            "this token was revoked; get a new one",
        ));
    }
    if !state.enabled {
        return Err(Error::new(
            ErrorCode::Forbidden,
            "the runtime API of this workspace is disabled; its owner can enable it",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
