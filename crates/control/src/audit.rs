//! The log, as control writes it: an intent before each act and an outcome after it.
//!
//! - An *opening* act (create, start, open, mint) whose intent can't be appended does not happen.
//! - A *closing* act (stop, delete, revoke, close) goes ahead; its entries go to the [`Spool`]
//!   and from there to the log when it is back.
//! - Every API call leaves a fact in the class `api`: method, route, status, latency, caller.
//!   Never a body, a query or a name that a client chose.

use crate::limits::{API_ENTRIES_IN_FLIGHT_MAX, API_ENTRIES_QUEUED_MAX, CLOSING_LOG_WAIT};
use crate::op::{Actor, Op};
use crate::spool::Spool;
use api::Error;
use api::audit::{Class, Entry, Lease, Phase};
use model::AccountId;
use serde_json::{Map, Value};
use service::audit::Log;
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};

/// What is about to be done.
#[derive(Debug, Clone)]
pub struct Act<'a> {
    /// Noun first: `workspace.create`.
    pub event: &'static str,
    /// The account concerned.
    pub account: Option<&'a AccountId>,
    /// On what.
    pub subject: &'a str,
    /// The standing policy, where no client is at hand.
    pub policy: Option<&'a str>,
    /// A few facts.
    pub data: Map<String, Value>,
}

impl<'a> Act<'a> {
    /// An act on `subject` without more facts.
    #[must_use]
    pub fn new(event: &'static str, account: &'a AccountId, subject: &'a str) -> Self {
        Self {
            event,
            account: Some(account),
            subject,
            policy: None,
            data: Map::new(),
        }
    }

    fn entry(&self, op: &Op, phase: Phase) -> Entry {
        let authority = match &op.actor {
            Actor::Key { assertion, .. } => Some(assertion.clone()),
            _ => self.policy.map(str::to_owned),
        };
        Entry {
            event: self.event.into(),
            phase,
            request_id: op.request_id.clone(),
            account: self.account.cloned(),
            actor: op.actor.name(),
            subject: Some(self.subject.to_owned()),
            authority: authority.filter(|_| phase == Phase::Intent),
            lease: None,
            result: None,
            data: self.data.clone(),
        }
    }
}

/// The log and its spool.
#[derive(Clone)]
pub struct Audit {
    log: Log,
    spool: Arc<Spool>,
    calls: mpsc::Sender<Entry>,
}

impl Audit {
    /// The log, and the task that sends entries of API calls.
    #[must_use]
    pub fn new(log: Log, spool: Spool) -> Self {
        let (calls, queue) = mpsc::channel(API_ENTRIES_QUEUED_MAX);
        let audit = Self {
            log,
            spool: Arc::new(spool),
            calls,
        };
        tokio::spawn(send_calls(
            audit.log.clone(),
            Arc::clone(&audit.spool),
            queue,
        ));
        audit
    }

    /// Announces an opening act.
    ///
    /// # Errors
    /// [`api::ErrorCode::AuditUnavailable`]: the act must not happen.
    pub async fn intent(&self, op: &Op, act: &Act<'_>) -> api::Result<()> {
        let entry = act.entry(op, Phase::Intent);
        self.log.append(Class::Host, entry).await.map(drop)
    }

    /// Announces an opening act that needs a key; returns the receipt.
    ///
    /// # Errors
    /// [`api::ErrorCode::AuditUnavailable`]: the act must not happen.
    pub async fn intent_with_lease(
        &self,
        op: &Op,
        act: &Act<'_>,
        lease: &Lease,
    ) -> api::Result<Value> {
        let mut entry = act.entry(op, Phase::Intent);
        entry.lease = Some(lease.clone());
        self.log.append_with_receipt(Class::Host, entry).await
    }

    /// Announces a closing act: in the log, or in the spool until the log is back.
    pub async fn intent_closing(&self, op: &Op, act: &Act<'_>) {
        self.append_or_spool(Class::Host, act.entry(op, Phase::Intent))
            .await;
    }

    /// Records what came of an act.
    pub async fn outcome<T>(&self, op: &Op, act: &Act<'_>, result: &api::Result<T>) {
        let mut entry = act.entry(op, Phase::Outcome);
        entry.result = Some(word(result.as_ref().err()));
        self.append_or_spool(Class::Host, entry).await;
    }

    /// Records an act that happened by itself.
    pub async fn fact(&self, op: &Op, act: &Act<'_>, result: Option<&Error>) {
        let mut entry = act.entry(op, Phase::Fact);
        entry.result = Some(word(result));
        self.append_or_spool(Class::Host, entry).await;
    }

    /// Records what somebody should look into.
    pub async fn alarm(&self, op: &Op, event: &'static str, subject: &str, error: &Error) {
        let act = Act {
            event,
            account: None,
            subject,
            policy: None,
            data: Map::new(),
        };
        let mut entry = act.entry(op, Phase::Fact);
        entry.result = Some(word(Some(error)));
        self.append_or_spool(Class::Security, entry).await;
    }

    /// Records an API call.
    pub async fn call(&self, op: &Op, call: CallFacts) {
        let mut data = Map::new();
        data.insert("method".into(), call.method.into());
        data.insert("route".into(), call.route.into());
        data.insert("status".into(), call.status.into());
        data.insert("latency_ms".into(), call.latency_ms.into());
        let entry = Entry {
            event: "api.call".into(),
            phase: Phase::Fact,
            request_id: op.request_id.clone(),
            account: op.account().ok().cloned(),
            actor: op.actor.name(),
            subject: None,
            authority: None,
            lease: None,
            result: Some(call.code.into()),
            data,
        };
        if let Err(full) = self.calls.try_send(entry) {
            self.spool.put(Class::Api, full.into_inner()).await;
        }
    }

    /// Sends what the spool holds; returns how many entries are left in it.
    pub async fn spool_flush(&self) -> u64 {
        self.spool.flush(&self.log).await
    }

    async fn append_or_spool(&self, class: Class, entry: Entry) {
        let append = self.log.append(class, entry.clone());
        // A log that answers too late has the entry twice, which does no harm.
        let appended = tokio::time::timeout(CLOSING_LOG_WAIT, append).await;
        if !matches!(appended, Ok(Ok(_))) {
            self.spool.put(class, entry).await;
        }
    }
}

/// What is recorded of an API call.
#[derive(Debug, Clone)]
pub struct CallFacts {
    /// The method, one of those of the operation table.
    pub method: &'static str,
    /// The route's template.
    pub route: &'static str,
    /// HTTP status.
    pub status: u16,
    /// `ok` or the error's code.
    pub code: &'static str,
    /// Milliseconds.
    pub latency_ms: u64,
}

fn word(e: Option<&Error>) -> String {
    e.map_or("ok", |e| e.code.as_str()).to_owned()
}

async fn send_calls(log: Log, spool: Arc<Spool>, mut queue: mpsc::Receiver<Entry>) {
    let in_flight = Arc::new(Semaphore::new(API_ENTRIES_IN_FLIGHT_MAX));
    while let Some(entry) = queue.recv().await {
        let Ok(permit) = Arc::clone(&in_flight).acquire_owned().await else {
            return;
        };
        let (log, spool) = (log.clone(), Arc::clone(&spool));
        tokio::spawn(async move {
            if log.append(Class::Api, entry.clone()).await.is_err() {
                spool.put(Class::Api, entry).await;
            }
            drop(permit);
        });
    }
}
