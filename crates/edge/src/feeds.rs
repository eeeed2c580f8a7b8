//! Follows mint's and host's changes into the table, and tells guests their token state.
//!
//! Each feed is a long-polled question, so a peer that went away or hangs is noticed within a
//! second. After any fault the feed is read again from its beginning, and what it does not name
//! then is gone.

use std::collections::HashSet;
use std::sync::Arc;

use api::rpc::Client;
use api::{host, mint};
use tokio::sync::Semaphore;

use crate::guest::Guests;
use crate::limits::{
    FEED_PAGE, FEED_PAGES_MAX, FEED_RETRY, FEED_STALE_MAX, FEED_WAIT_MS, FULL_READ_MAX, PUSH_MAX,
    PUSH_RETRY, PUSHES_MAX, REFRESHES_MAX,
};
use crate::metrics::Metrics;
use crate::state::{Source, Table};

/// Both feeds.
pub struct Feeds {
    mint: Client,
    host: Client,
    table: Arc<Table>,
    refreshing: Semaphore,
}

impl Feeds {
    /// Of these peers, into this table.
    #[must_use]
    pub fn new(mint: Client, host: Client, table: Arc<Table>) -> Arc<Self> {
        Arc::new(Self {
            mint,
            host,
            table,
            refreshing: Semaphore::new(REFRESHES_MAX),
        })
    }

    /// Asks both feeds for what happened until now, so that who was just told of a change finds
    /// it made. Does nothing when too many ask, or a feed is lost.
    pub async fn refresh(&self) {
        let Ok(_turn) = self.refreshing.try_acquire() else {
            return;
        };
        tokio::join!(
            self.refresh_one(Source::Mint),
            self.refresh_one(Source::Host)
        );
    }

    async fn refresh_one(&self, source: Source) {
        // Where the feed is not read as a whole yet, its follower is at it.
        let Some(since) = self.table.seq(source) else {
            return;
        };
        if let Ok(news) = self.ask(source, since, 0).await
            && news.seq() >= since
        {
            news.take_into(&self.table, None);
        }
    }

    /// Follows one feed for ever.
    pub async fn follow(self: Arc<Self>, source: Source) {
        loop {
            let e = self.follow_until_fault(source).await;
            if self.table.lost(source) {
                tracing::warn!(?source, error = %e, "feed lost; requests to workspaces wait for it");
            }
            tokio::time::sleep(FEED_RETRY).await;
        }
    }

    async fn follow_until_fault(&self, source: Source) -> api::Error {
        let mut since = 0;
        let mut named = Some(HashSet::new());
        let mut pages = 0;
        loop {
            let wait_ms = if named.is_some() { 0 } else { FEED_WAIT_MS };
            let news = match self.ask(source, since, wait_ms).await {
                Ok(news) => news,
                Err(e) => return e,
            };
            let count = news.len();
            if news.seq() < since {
                return api::Error::internal("the feed went back; reading it again");
            }
            since = news.seq();
            news.take_into(&self.table, named.as_mut());
            if count < FEED_PAGE
                && let Some(named) = named.take()
            {
                self.table.only(source, &named);
            }
            if named.is_none() {
                self.table.heard(source, since);
            } else {
                pages += 1;
                if pages > FEED_PAGES_MAX {
                    return api::Error::internal("the feed has no end");
                }
            }
        }
    }

    async fn ask(&self, source: Source, since: u64, wait_ms: u64) -> api::Result<News> {
        // A full read of many states may take longer than a question for news.
        let within = if since == 0 {
            FULL_READ_MAX
        } else {
            FEED_STALE_MAX
        };
        let id = "edge.feed";
        match source {
            Source::Mint => self
                .mint
                .call_within(id, &mint::Op::Changes { since, wait_ms }, within)
                .await
                .map(News::Mint),
            Source::Host => self
                .host
                .call_within(id, &host::Op::Changes { since, wait_ms }, within)
                .await
                .map(News::Host),
        }
    }
}

/// An answer of either feed.
enum News {
    Mint(mint::Changes),
    Host(host::Changes),
}

impl News {
    fn seq(&self) -> u64 {
        match self {
            Self::Mint(c) => c.seq,
            Self::Host(c) => c.seq,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Mint(c) => c.states.len(),
            Self::Host(c) => c.states.len(),
        }
    }

    /// Hands the states over; `named` collects whose they are while a feed is read as a whole.
    fn take_into(self, table: &Table, mut named: Option<&mut HashSet<model::WorkspaceId>>) {
        match self {
            Self::Mint(c) => {
                for text in &c.states {
                    if let (Some(w), Some(named)) = (table.token_state(text), named.as_mut()) {
                        named.insert(w);
                    }
                }
            }
            Self::Host(c) => {
                let restart = named.is_some();
                for actual in c.states {
                    if let Some(named) = named.as_mut() {
                        named.insert(actual.workspace.clone());
                    }
                    table.actual(actual, c.seq, restart);
                }
            }
        }
    }
}

/// Tells guests their token state whenever it or their start changes, for ever.
pub async fn tell_guests(table: Arc<Table>, guests: Arc<Guests>, metrics: Arc<Metrics>) {
    let room = Arc::new(Semaphore::new(PUSHES_MAX));
    loop {
        table.changed.notified().await;
        // What a change closed is closed now, idle connections too.
        guests.sweep(&table);
        let free = room.available_permits();
        for push in table.to_tell(free) {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            let (table, guests, metrics) = (
                Arc::clone(&table),
                Arc::clone(&guests),
                Arc::clone(&metrics),
            );
            tokio::spawn(async move {
                let told = guests.tell(&table, push.clone());
                let told = tokio::time::timeout(PUSH_MAX, told).await;
                let (push, taken) = told.unwrap_or((push, false));
                drop(permit);
                if !taken {
                    metrics.pushes_failed.inc();
                    // Its start may be over; if not, it is offered again.
                    tokio::time::sleep(PUSH_RETRY).await;
                }
                table.told(&push, taken);
            });
        }
    }
}
