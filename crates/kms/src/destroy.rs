//! Destruction: the record erased, the epoch punctured, and only then a receipt.
//!
//! ```text
//! doomed ─▶ intent logged ─▶ record erased, tombstone left ─▶ rotation ─▶ receipt signed, stored
//!            (or outbox)      COMMIT: can't be undone           slot gone    answered again and again
//! ```
//!
//! A closing act: it goes ahead while the log is down, and its entries wait in the outbox, the
//! intent in the same transaction as the erasure. A crash after the commit is finished by
//! [`crate::duties`]. Must never sign a receipt while the epoch that could open the record lives.

use crate::check::{self, Refusal};
use crate::error::KmsError;
use crate::fault::Step;
use crate::kms::{Call, Inner, entry, entry_text};
use crate::ring::Ring;
use crate::store;
use api::audit::{Class, Entry, Phase};
use api::context;
use api::kms::{Destroyed, Erasure};
use model::WorkspaceId;
use seal::sign::Signed;

impl Inner {
    pub(crate) async fn destroy(
        &self,
        call: &Call,
        workspace: &WorkspaceId,
        authority: &str,
    ) -> api::Result<Destroyed> {
        let ring = self.ring()?;
        let checked = check::destroy(&self.trust, workspace, authority, self.now_ms());
        let by = match checked {
            Ok(by) => by,
            Err(r) => return Err(self.refuse(call, r, Some(workspace)).await),
        };
        match self.store.workspace(workspace).await? {
            None => return Err(self.refuse(call, Refusal::Unknown, Some(workspace)).await),
            Some((w, _)) if w.account != *by.account() => {
                return Err(self.refuse(call, Refusal::Account, Some(workspace)).await);
            }
            Some((
                store::Workspace {
                    receipt: Some(receipt),
                    ..
                },
                _,
            )) => {
                return Ok(Destroyed { receipt });
            }
            Some(_) => {}
        }
        self.doomed().insert(workspace.clone());
        let mut intent = entry(
            "kms.destroy",
            Phase::Intent,
            &call.request_id,
            by.key().as_str(),
        );
        intent.account = Some(by.account().clone());
        intent.subject = Some(workspace.to_string());
        intent.authority = Some(authority.to_owned());
        let spooled = match self.log_closing(&intent).await {
            Ok(()) => None,
            Err(_) => Some(intent),
        };
        if let Err(e) = self.erase(workspace, spooled).await {
            // Nothing was erased, so the key may go on living.
            self.doomed().remove(workspace);
            return Err(e.into());
        }
        let receipt = self
            .erasure_finish(&ring, workspace, &call.request_id)
            .await?;
        self.doomed().remove(workspace);
        Ok(Destroyed { receipt })
    }

    /// Erases the record and leaves a tombstone that names the epoch it could be opened in.
    async fn erase(&self, id: &WorkspaceId, spooled: Option<Entry>) -> Result<(), KmsError> {
        self.faults.at(Step::Erase)?;
        let mut tx = self.store.begin().await?;
        let epoch = store::state(&mut tx)
            .await?
            .ok_or(KmsError::Unseal("no state"))?
            .epoch;
        if let Some(blob) = store::workspace_wrapped(&mut tx, id).await? {
            let digest = hex::encode(seal::hash::sha256(&blob));
            store::workspace_erase(&mut tx, id, epoch, &digest, self.now_ms()).await?;
        }
        if let Some(entry) = spooled {
            outbox_put(&mut tx, Class::Host, &entry).await?;
        }
        tx.commit()
            .await
            .map_err(KmsError::store("erase workspace key"))
    }

    /// Punctures, signs and stores the receipt of an erased key: takes up where a crash left it.
    pub(crate) async fn erasure_finish(
        &self,
        ring: &Ring,
        id: &WorkspaceId,
        request_id: &str,
    ) -> Result<String, KmsError> {
        let damaged = || KmsError::Damaged {
            operation: "finish erasure",
            subject: id.to_string(),
        };
        let (w, _) = self.store.workspace(id).await?.ok_or_else(damaged)?;
        self.faults.at(Step::Puncture)?;
        let epoch_now = self
            .rotor
            .rotate(ring, Some(w.epoch), self.now_ms())
            .await?;
        self.metrics.epoch_is(epoch_now);
        let erasure = Erasure {
            workspace: id.clone(),
            key_versions: w.version,
            record_digest: w.record_digest.ok_or_else(damaged)?,
            epoch_destroyed: w.epoch,
            epoch_now,
            time_ms: w.destroyed_ms.ok_or_else(damaged)?,
        };
        assert!(
            erasure.check().is_ok(),
            "a receipt is signed after the puncture only"
        );
        let receipt = Signed::new(&ring.sign, context::ERASURE, &erasure).to_string();
        self.faults.at(Step::ReceiptStore)?;
        self.store.receipt_store(id, &receipt).await?;
        self.faults.at(Step::ReceiptAnswer)?;
        self.metrics.destroyed();
        let mut outcome = entry("kms.destroy", Phase::Outcome, request_id, "internal:kms");
        outcome.account = Some(w.account);
        outcome.subject = Some(id.to_string());
        outcome.result = Some("ok".into());
        outcome
            .data
            .insert("receipt".into(), receipt.as_str().into());
        if self.log_closing(&outcome).await.is_err() {
            let text = entry_text(&outcome)?;
            self.store.outbox_add(Class::Host.name(), &text).await?;
        }
        Ok(receipt)
    }
}

async fn outbox_put(
    conn: &mut sqlx::SqliteConnection,
    class: Class,
    e: &Entry,
) -> Result<(), KmsError> {
    store::outbox_add(conn, class.name(), &entry_text(e)?).await
}
