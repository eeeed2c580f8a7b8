//! The last image of each kind that was begun of a workspace.

use super::{Store, get, number, signed};
use crate::error::KmsError;
use model::{ObjectId, Purpose, WorkspaceId};

impl Store {
    /// The last image of that kind and the run that began it, if there is one that may be opened.
    ///
    /// # Errors
    /// The database's.
    pub async fn image(
        &self,
        id: &WorkspaceId,
        purpose: Purpose,
    ) -> Result<Option<(String, u64)>, KmsError> {
        sqlx::query("SELECT object, run FROM image WHERE workspace = $1 AND purpose = $2")
            .bind(id.as_str())
            .bind(purpose.label())
            .fetch_optional(&self.read)
            .await
            .map_err(KmsError::store("read image"))?
            .map(|row| Ok((get(&row, "object")?, number(&row, "run")?)))
            .transpose()
    }

    /// Notes an image of a living workspace in the place of the one before; never an earlier run's.
    ///
    /// # Errors
    /// The database's.
    pub async fn image_put(
        &self,
        id: &WorkspaceId,
        purpose: Purpose,
        object: &ObjectId,
        run: u64,
    ) -> Result<(), KmsError> {
        sqlx::query(
            "INSERT INTO image (workspace, purpose, object, run)
             SELECT id, $2, $3, $4 FROM workspace WHERE id = $1 AND wrapped IS NOT NULL
             ON CONFLICT (workspace, purpose) DO UPDATE
                SET object = excluded.object, run = excluded.run WHERE excluded.run > image.run",
        )
        .bind(id.as_str())
        .bind(purpose.label())
        .bind(object.as_str())
        .bind(signed(run))
        .execute(&self.write)
        .await
        .map_err(KmsError::store("write image"))?;
        Ok(())
    }

    /// Forgets the workspace's memory, so that it is never woken again; with `only`, that one.
    /// Whether there was such a one. Without one nothing is written.
    ///
    /// # Errors
    /// The database's.
    pub async fn memory_use(
        &self,
        id: &WorkspaceId,
        only: Option<&ObjectId>,
    ) -> Result<bool, KmsError> {
        let done = sqlx::query(
            "DELETE FROM image
             WHERE workspace = $1 AND purpose = $2 AND ($3 = '' OR object = $3)",
        )
        .bind(id.as_str())
        .bind(Purpose::Memory.label())
        .bind(only.map_or("", |id| id.as_str()))
        .execute(&self.write)
        .await
        .map_err(KmsError::store("use memory up"))?;
        Ok(done.rows_affected() > 0)
    }
}
