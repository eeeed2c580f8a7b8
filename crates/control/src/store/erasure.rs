//! Erasure receipts: what is left of a deleted workspace.

use super::workspace::not_found;
use super::{Store, failed, to_i64, to_u64};
use crate::store::Workspace;
use api::Error;
use model::AccountId;
use sqlx::Row as _;

/// The proof that a workspace's key was destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    /// The workspace.
    pub workspace: String,
    /// The KMS's signed receipt.
    pub receipt: String,
    /// ms since the epoch.
    pub time_ms: u64,
}

impl Store {
    /// Removes a workspace's row and keeps its erasure receipt, both or neither. Idempotent.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace_erase(
        &self,
        w: &Workspace,
        receipt: Option<&str>,
        now_ms: u64,
    ) -> api::Result<()> {
        let lost = failed("erase workspace");
        let mut tx = self.pool.begin().await.map_err(&lost)?;
        if let Some(receipt) = receipt {
            sqlx::query(
                "INSERT INTO erasures (workspace, account, receipt, time_ms)
                 VALUES ($1, $2, $3, $4) ON CONFLICT (workspace) DO NOTHING",
            )
            .bind(w.id.as_str())
            .bind(w.account.as_str())
            .bind(receipt)
            .bind(to_i64(now_ms))
            .execute(&mut *tx)
            .await
            .map_err(&lost)?;
        }
        sqlx::query("DELETE FROM workspaces WHERE id = $1")
            .bind(w.id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(&lost)?;
        tx.commit().await.map_err(&lost)
    }

    /// An account's erasure receipt of a workspace.
    ///
    /// # Errors
    /// [`api::ErrorCode::NotFound`], for another account's too.
    pub async fn erasure_get(&self, account: &AccountId, workspace: &str) -> api::Result<Erasure> {
        let row = sqlx::query(
            "SELECT workspace, receipt, time_ms FROM erasures
             WHERE account = $1 AND workspace = $2",
        )
        .bind(account.as_str())
        .bind(workspace)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("get erasure"))?
        .ok_or_else(not_found)?;
        let read = || -> Result<Erasure, sqlx::Error> {
            Ok(Erasure {
                workspace: row.try_get("workspace")?,
                receipt: row.try_get("receipt")?,
                time_ms: to_u64(row.try_get("time_ms")?),
            })
        };
        read().map_err(Error::internal)
    }
}
