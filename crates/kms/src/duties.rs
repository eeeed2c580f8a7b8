//! What the KMS does without being asked: keys for the log, accounts' log keys, the outbox,
//! erasures that a crash interrupted, and a new epoch each day.
//!
//! `converge` takes no input, reads everything and may run twice.

use crate::error::KmsError;
use crate::keyring::Place;
use crate::kms::{Inner, Kms, entry};
use crate::limits::{DUTY_INTERVAL, EPOCH_MAX_AGE_MS, LOG_DAYS_AHEAD};
use crate::ring::{DaySeeds, Ring};
use crate::store;
use api::audit::{Class, DayKey, Entry, Op, Phase};
use seal::secret::SecretBuf;
use std::collections::BTreeMap;
use std::sync::Arc;

const DAY_MS: u64 = 24 * 3_600_000;
const REQUEST: &str = "kms.duties";

impl Kms {
    /// Looks after the duties once. A sealed KMS has only its outbox.
    ///
    /// # Errors
    /// The first duty that could not be done; the next round tries again.
    pub async fn converge(&self) -> api::Result<()> {
        let k = self.inner();
        k.outbox_drain().await?;
        let Ok(ring) = k.ring() else { return Ok(()) };
        for w in k.store.workspaces_pending().await? {
            k.erasure_finish(&ring, &w.id, REQUEST).await?;
        }
        let state = k.store.state().await?.ok_or(KmsError::Unseal("no state"))?;
        if k.now_ms() >= state.rotated_ms.saturating_add(EPOCH_MAX_AGE_MS) {
            let e = entry("kms.rotate", Phase::Intent, REQUEST, "internal:kms");
            k.log.append(Class::Host, e).await?;
            k.epoch_new(&ring, REQUEST).await?;
        }
        let horizon = today(k.now_ms()) + LOG_DAYS_AHEAD;
        let covered = Class::ALL
            .iter()
            .all(|c| ring.days(*c).is_some_and(|days| days.end_day() >= horizon));
        if !covered {
            k.log_keys_publish(&ring, REQUEST).await?;
        }
        k.accounts_publish(REQUEST).await
    }

    /// Looks after the duties for ever.
    pub async fn duties(self) {
        let mut tick = tokio::time::interval(DUTY_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            if let Err(e) = self.converge().await {
                tracing::warn!(error = %e, detail = e.detail.as_deref().unwrap_or(""), "duties");
            }
        }
    }
}

impl Inner {
    /// Makes the log's day seeds that are missing and gives it the public keys from today on.
    pub(crate) async fn log_keys_publish(&self, ring: &Ring, request_id: &str) -> api::Result<()> {
        let today = today(self.now_ms());
        let end = today + LOG_DAYS_AHEAD;
        self.log_keys_ensure(ring, today, end).await?;
        let mut keys = Vec::new();
        for class in Class::ALL {
            let days = ring
                .days(class)
                .ok_or(KmsError::Unseal("no keys for the log"))?;
            for day in today..end {
                let key = days
                    .key(day)
                    .ok_or(KmsError::Unseal("a day without a key"))?;
                keys.push(DayKey {
                    class,
                    day,
                    public: key.public().to_hex(),
                });
            }
        }
        let op = Op::DayKeys { keys };
        let answer = self.log.client().call::<_, bool>(request_id, &op);
        answer.await.map(drop).map_err(log_down)
    }

    async fn log_keys_ensure(&self, ring: &Ring, today: u32, end: u32) -> Result<(), KmsError> {
        let mut tx = self.store.begin().await?;
        let epoch = store::state(&mut tx)
            .await?
            .ok_or(KmsError::Unseal("no state"))?
            .epoch;
        let root = ring
            .root(epoch)
            .ok_or(KmsError::Unseal("the epoch in force is not held"))?;
        let rows: BTreeMap<String, store::LogKey> = store::log_keys(&mut tx)
            .await?
            .into_iter()
            .map(|row| (row.class.clone(), row))
            .collect();
        let mut all = Vec::new();
        for class in Class::ALL {
            let held = match rows.get(class.name()) {
                None => DaySeeds {
                    first_day: today,
                    seeds: SecretBuf::new(0),
                },
                Some(row) => {
                    let place = Place::Log {
                        class: &row.class,
                        first_day: row.first_day,
                        epoch: row.epoch,
                    };
                    DaySeeds {
                        first_day: row.first_day,
                        seeds: place.unwrap(&root, &row.wrapped)?,
                    }
                }
            };
            if held.end_day() >= end {
                all.push((class, held));
                continue;
            }
            let more = held.extended(end);
            let place = Place::Log {
                class: class.name(),
                first_day: more.first_day,
                epoch,
            };
            let row = store::LogKey {
                class: class.name().to_owned(),
                first_day: more.first_day,
                epoch,
                wrapped: place.wrap(&root, more.seeds.expose()),
            };
            store::log_key_put(&mut tx, &row).await?;
            all.push((class, more));
        }
        tx.commit()
            .await
            .map_err(KmsError::store("store the log's keys"))?;
        for (class, seeds) in all {
            ring.days_put(class, seeds);
        }
        Ok(())
    }

    /// Gives the log the keys of accounts that it does not have yet.
    pub(crate) async fn accounts_publish(&self, request_id: &str) -> api::Result<()> {
        for (account, public) in self.store.accounts_unpublished().await? {
            let op = Op::AccountKey {
                account: account.clone(),
                public,
            };
            let answer = self.log.client().call::<_, bool>(request_id, &op);
            answer.await.map_err(log_down)?;
            self.store.account_published(&account).await?;
        }
        Ok(())
    }

    /// Appends what waited for the log. A crash between the two steps writes an entry twice,
    /// never not at all.
    async fn outbox_drain(&self) -> api::Result<()> {
        while let Some((id, class, text)) = self.store.outbox_first().await? {
            let class = Class::ALL.into_iter().find(|c| c.name() == class);
            let entry: Option<Entry> = serde_json::from_str(&text).ok();
            match (class, entry) {
                (Some(class), Some(entry)) => {
                    self.log.append(class, entry).await?;
                }
                // Not what this program wrote: it must not stop what comes behind it.
                _ => tracing::error!(id, "outbox entry is damaged and dropped"),
            }
            self.store.outbox_remove(id).await?;
        }
        Ok(())
    }
}

fn today(now_ms: u64) -> u32 {
    u32::try_from(now_ms / DAY_MS)
        .unwrap_or(u32::MAX - LOG_DAYS_AHEAD)
        .max(1)
}

fn log_down(e: api::Error) -> api::Error {
    let detail = format!("{e}; {}", e.detail.as_deref().unwrap_or(""));
    api::Error::new(
        api::ErrorCode::AuditUnavailable,
        "the audit log does not answer; try again",
    )
    .detail(detail)
}

/// Keeps trying to unseal by the file until it works: the log may start later.
pub async fn unseal_until_done(kms: Arc<Kms>) {
    let mut last = String::new();
    while let Err(e) = kms.unseal_by_file().await {
        let text = format!("{e}: {}", e.detail.as_deref().unwrap_or(""));
        if text != last {
            tracing::warn!(reason = %text, "still sealed");
            last = text;
        }
        tokio::time::sleep(crate::limits::UNSEAL_RETRY).await;
    }
}
