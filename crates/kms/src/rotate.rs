//! Rotation: a new epoch, everything that lives wrapped anew, the old epoch's secret destroyed.
//!
//! ```text
//! slot n+1 written ─▶ all re-wrapped in one transaction ─▶ COMMIT ─▶ slot n destroyed ─▶ memory
//!      crash: state says n, slot n+1 is destroyed at start │ crash: state says n+1, slot n is
//! ```
//!
//! The commit is the point of no return. Account keys are made new each time: an account key that
//! stayed would open an old backup's workspace keys. After a rotation no copy of an older state
//! can be opened by anybody, with the unseal secret or without (DSK-4).
//!
//! Costs one pass over all living keys; destructions that wait at the same time share one.

use crate::error::KmsError;
use crate::fault::{Faults, Step};
use crate::keyring::{Key, Place, epoch_root};
use crate::ring::{Ring, account_unwrap, account_wrap};
use crate::slots::Slots;
use crate::store::{self, Store};
use sqlx::SqliteConnection;
use std::sync::Arc;

/// Rotates; one at a time.
pub struct Rotor {
    store: Arc<Store>,
    slots: Arc<Slots>,
    faults: Faults,
    turn: tokio::sync::Mutex<()>,
}

impl Rotor {
    /// A rotor of this store and these slots.
    #[must_use]
    pub fn new(store: Arc<Store>, slots: Arc<Slots>, faults: Faults) -> Self {
        Self {
            store,
            slots,
            faults,
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// Brings a new epoch into force and destroys the old one's secret; answers the epoch now.
    ///
    /// With `after`, an epoch that is newer already will do: whoever waited for the turn is
    /// served by the rotation that ran meanwhile.
    ///
    /// # Errors
    /// The store's and the file system's; calling it again takes up where it was left.
    pub async fn rotate(
        &self,
        ring: &Ring,
        after: Option<u64>,
        now_ms: u64,
    ) -> Result<u64, KmsError> {
        let _turn = self.turn.lock().await;
        let state = self
            .store
            .state()
            .await?
            .ok_or(KmsError::Unseal("no state"))?;
        let now = match after {
            Some(epoch) if state.epoch > epoch => state.epoch,
            _ => self.rewrap_all(ring, state.epoch, now_ms).await?,
        };
        self.faults.at(Step::SlotDestroy)?;
        let slots = Arc::clone(&self.slots);
        blocking(move || slots.destroy_others(now)).await?;
        self.faults.at(Step::EpochSwitch)?;
        ring.retain(now);
        self.store.checkpoint().await;
        Ok(now)
    }

    async fn rewrap_all(&self, ring: &Ring, from: u64, now_ms: u64) -> Result<u64, KmsError> {
        let to = from + 1;
        self.faults.at(Step::SlotCreate)?;
        let slots = Arc::clone(&self.slots);
        let secret = blocking(move || slots.create(to)).await?;
        // Held before the commit, so that a reader who sees a new row can open it.
        ring.root_add(to, epoch_root(ring.unseal(), &secret, to));
        let old = ring
            .root(from)
            .ok_or(KmsError::Unseal("the epoch in force is not held"))?;
        let new = ring
            .root(to)
            .ok_or(KmsError::Unseal("the new epoch is not held"))?;
        self.faults.at(Step::Rewrap)?;
        let mut tx = self.store.begin().await?;
        let mut state = store::state(&mut tx)
            .await?
            .ok_or(KmsError::Unseal("no state"))?;
        assert_eq!(
            state.epoch, from,
            "only the holder of the turn changes the epoch"
        );
        let pass = Pass {
            from,
            to,
            old: &old,
            new: &new,
        };
        pass.accounts(&mut tx).await?;
        pass.log_keys(&mut tx).await?;
        let seed: Key = Place::Sign { epoch: from }.unwrap_bytes(&old, &state.sign_wrapped)?;
        state.sign_wrapped = Place::Sign { epoch: to }.wrap(&new, seed.expose());
        state.epoch = to;
        state.rotated_ms = now_ms;
        store::state_put(&mut tx, &state).await?;
        self.faults.at(Step::RewrapCommit)?;
        tx.commit()
            .await
            .map_err(KmsError::store("commit the new epoch"))?;
        Ok(to)
    }
}

/// One pass of re-wrapping, from an epoch to the next.
struct Pass<'a> {
    from: u64,
    to: u64,
    old: &'a Key,
    new: &'a Key,
}

impl Pass<'_> {
    async fn accounts(&self, conn: &mut SqliteConnection) -> Result<(), KmsError> {
        let mut after = String::new();
        loop {
            let page = store::accounts_after(conn, &after).await?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            last.id.as_str().clone_into(&mut after);
            for account in page {
                self.account(conn, account).await?;
            }
        }
    }

    async fn account(
        &self,
        conn: &mut SqliteConnection,
        mut account: store::Account,
    ) -> Result<(), KmsError> {
        let (old_key, seed) = account_unwrap(&account, self.old)?;
        let new_key = Key::random();
        let version = account.version + 1;
        let mut after = String::new();
        loop {
            let page = store::workspaces_after(conn, &account.id, &after).await?;
            let Some(last) = page.last() else { break };
            last.id.as_str().clone_into(&mut after);
            for mut w in page {
                let at = |account_version, epoch| Place::Workspace {
                    workspace: &w.id,
                    account: &w.account,
                    version: w.version,
                    account_version,
                    epoch,
                };
                let blob = w.wrapped.as_deref().unwrap_or_default();
                let key: Key = at(account.version, self.from).unwrap_bytes(&old_key, blob)?;
                let wrapped = at(version, self.to).wrap(&new_key, key.expose());
                (w.account_version, w.epoch, w.wrapped) = (version, self.to, Some(wrapped));
                store::workspace_rewrap(conn, &w).await?;
            }
        }
        account.wrapped = account_wrap(&account.id, version, self.to, self.new, &new_key, &seed);
        (account.version, account.epoch) = (version, self.to);
        store::account_put(conn, &account).await
    }

    async fn log_keys(&self, conn: &mut SqliteConnection) -> Result<(), KmsError> {
        for mut row in store::log_keys(conn).await? {
            let at = |epoch| Place::Log {
                class: &row.class,
                first_day: row.first_day,
                epoch,
            };
            let seeds = at(self.from).unwrap(self.old, &row.wrapped)?;
            row.wrapped = at(self.to).wrap(self.new, seeds.expose());
            row.epoch = self.to;
            store::log_key_put(conn, &row).await?;
        }
        Ok(())
    }
}

/// Runs file work off the runtime's threads.
///
/// # Errors
/// The work's.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KmsError> + Send + 'static,
) -> Result<T, KmsError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(KmsError::Unseal(
            "a worker thread of the KMS ended early; restart it",
        )),
    }
}
