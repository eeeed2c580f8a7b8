//! The way from a class's durable entries to integrate: one request at a time, which carries all
//! receipts that were asked for meanwhile.

use super::{Job, unavailable};
use crate::integrate::Op;
use crate::integrate::log::Integrated;
use crate::limits::{INTEGRATE_DELAY, INTEGRATE_TIMEOUT, RECEIPTS_MAX};
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

/// The writer's end of the link of one class.
pub struct Link {
    /// No bound of its own: each want has a caller that waits, and those are bounded.
    wants: mpsc::UnboundedSender<Want>,
    durable: watch::Sender<u64>,
}

struct Want {
    index: u64,
    answer: Answer,
}

/// Where a proof goes.
pub type Answer = oneshot::Sender<api::Result<Proof>>;

impl Link {
    /// A link for a log that has `size` durable entries, and the task that serves it until the link
    /// is dropped and all that is durable integrated.
    pub(crate) fn start(
        class: Class,
        size: u64,
        integrate: Client,
        writer: mpsc::WeakSender<Job>,
    ) -> (Link, JoinHandle<()>) {
        let (wants, wanted) = mpsc::unbounded_channel();
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

    /// Says that all entries below `size` are durable, and whose proofs are wanted.
    pub fn durable(&self, size: u64, wanted: impl IntoIterator<Item = (u64, Answer)>) {
        for (index, answer) in wanted {
            // If the task is gone, the caller sees its end of the answer closed.
            let _ = self.wants.send(Want { index, answer });
        }
        self.durable.send_replace(size);
    }
}

struct Task {
    class: Class,
    integrate: Client,
    writer: mpsc::WeakSender<Job>,
    wanted: mpsc::UnboundedReceiver<Want>,
    durable: watch::Receiver<u64>,
    integrated: u64,
    waiting: Vec<Want>,
}

impl Task {
    async fn run(mut self) {
        let mut open = true;
        while open {
            open = self.gather().await;
            // A wanted entry is durable, and so are all below it, even if that is not said yet.
            let wanted = self.waiting.iter().map(|want| want.index + 1).max();
            let durable = (*self.durable.borrow_and_update()).max(wanted.unwrap_or(0));
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
                biased;
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
