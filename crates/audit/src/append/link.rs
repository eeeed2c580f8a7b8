//! The way from a class's durable entries to integrate: one request at a time, which carries all
//! receipts that were asked for meanwhile.

use super::{Job, unavailable};
use crate::integrate::Op;
use crate::integrate::log::Integrated;
use crate::limits::{INTEGRATE_DELAY, INTEGRATE_TIMEOUT, RECEIPT_TIMEOUT, RECEIPTS_MAX};
use api::rpc::Client;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tlog::class::Class;
use tlog::merkle::Hash;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// What makes an entry's receipt.
#[derive(Clone)]
pub struct Proof {
    /// The audit path, leaf first.
    pub path: Vec<Hash>,
    /// The checkpoint it leads to.
    pub checkpoint: String,
}

/// The link of one class.
pub struct Link {
    wants: mpsc::Sender<Want>,
    durable: watch::Sender<u64>,
}

struct Want {
    index: u64,
    answer: oneshot::Sender<api::Result<Proof>>,
}

impl Link {
    /// A link for a log that has `size` durable entries, and the task that serves it until the link
    /// is dropped and all that is durable integrated.
    pub(crate) fn start(
        class: Class,
        size: u64,
        integrate: Client,
        writer: mpsc::WeakSender<Job>,
    ) -> (Link, JoinHandle<()>) {
        let (wants, wanted) = mpsc::channel(4 * RECEIPTS_MAX);
        let (durable, seen) = watch::channel(size);
        let task = Task {
            class,
            integrate,
            writer,
            wanted,
            durable: seen,
            integrated: 0,
            waiting: Vec::new(),
        };
        (Link { wants, durable }, tokio::spawn(task.run()))
    }

    /// Where the writer says how many entries are durable.
    #[must_use]
    pub fn durable(&self) -> watch::Sender<u64> {
        self.durable.clone()
    }

    /// The proof of a durable entry, once it is in the tree.
    ///
    /// # Errors
    /// [`api::ErrorCode::AuditUnavailable`] when integrate does not answer.
    pub async fn receipt(&self, index: u64) -> api::Result<Proof> {
        let (answer, proof) = oneshot::channel();
        let gone = || unavailable(&"the way to audit-integrate is closed");
        self.wants
            .send(Want { index, answer })
            .await
            .map_err(|_| gone())?;
        tokio::time::timeout(RECEIPT_TIMEOUT, proof)
            .await
            .map_err(|_| unavailable(&"audit-integrate does not answer"))?
            .map_err(|_| gone())?
    }
}

struct Task {
    class: Class,
    integrate: Client,
    writer: mpsc::WeakSender<Job>,
    wanted: mpsc::Receiver<Want>,
    durable: watch::Receiver<u64>,
    integrated: u64,
    waiting: Vec<Want>,
}

impl Task {
    async fn run(mut self) {
        let mut open = true;
        while open {
            open = self.gather().await;
            let durable = *self.durable.borrow_and_update();
            if self.waiting.is_empty() && durable <= self.integrated {
                continue;
            }
            let wants = std::mem::take(&mut self.waiting);
            let op = Op::Integrate {
                class: self.class,
                size: durable,
                receipts: wants.iter().map(|w| w.index).collect(),
            };
            let result = self
                .integrate
                .call_within::<_, Integrated>("integrate", &op, INTEGRATE_TIMEOUT)
                .await;
            match result {
                Ok(done) => self.answer(wants, &done),
                Err(e) => {
                    tracing::warn!(class = %self.class, error = %e,
                        detail = e.detail.as_deref().unwrap_or(""), "integrate");
                    for want in wants {
                        let detail = format!("{e}; {}", e.detail.as_deref().unwrap_or(""));
                        let _ = want.answer.send(Err(unavailable(&detail)));
                    }
                    if !open {
                        return;
                    }
                    tokio::time::sleep(INTEGRATE_DELAY).await;
                }
            }
        }
    }

    /// Waits until somebody wants a receipt, or entries have waited long enough; false at the end.
    async fn gather(&mut self) -> bool {
        let first = if *self.durable.borrow() > self.integrated {
            match tokio::time::timeout(INTEGRATE_DELAY, self.wanted.recv()).await {
                Err(_) => return true,
                Ok(first) => first,
            }
        } else {
            tokio::select! {
                first = self.wanted.recv() => first,
                changed = self.durable.changed() => return changed.is_ok(),
            }
        };
        let Some(first) = first else {
            return false;
        };
        self.waiting.push(first);
        while self.waiting.len() < RECEIPTS_MAX
            && let Ok(want) = self.wanted.try_recv()
        {
            self.waiting.push(want);
        }
        true
    }

    fn answer(&mut self, wants: Vec<Want>, done: &Integrated) {
        let paths = decode(done).filter(|paths| paths.len() == wants.len());
        let Some(paths) = paths else {
            for want in wants {
                let _ = want
                    .answer
                    .send(Err(unavailable(&"audit-integrate answered nonsense")));
            }
            return;
        };
        for (want, path) in wants.into_iter().zip(paths) {
            let checkpoint = done.checkpoint.clone();
            let _ = want.answer.send(Ok(Proof { path, checkpoint }));
        }
        if done.size > self.integrated {
            self.integrated = done.size;
            if let Some(writer) = self.writer.upgrade() {
                // If the queue is full, the next integration says it again.
                let _ = writer.try_send(Job::Integrated(done.size));
            }
        }
    }
}

fn decode(done: &Integrated) -> Option<Vec<Vec<Hash>>> {
    let path = |proof: &Vec<String>| {
        proof
            .iter()
            .map(|h| STANDARD.decode(h).ok()?.try_into().ok())
            .collect()
    };
    done.proofs.iter().map(path).collect()
}
