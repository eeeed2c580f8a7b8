//! The images of a workspace that may be opened: of each kind one stands, and one of a snapshot may be
//! begun beside it.

use super::{Store, number, outbox_add, signed};
use crate::error::KmsError;
use api::audit::Class;
use model::{ObjectId, Purpose, WorkspaceId};

impl Store {
    /// The run that began the image, if it may be opened.
    ///
    /// # Errors
    /// The database's.
    pub async fn image(
        &self,
        id: &WorkspaceId,
        purpose: Purpose,
        object: &str,
    ) -> Result<Option<u64>, KmsError> {
        sqlx::query("SELECT run FROM image WHERE workspace = $1 AND purpose = $2 AND object = $3")
            .bind(id.as_str())
            .bind(purpose.label())
            .bind(object)
            .fetch_optional(&self.read)
            .await
            .map_err(KmsError::store("read image"))?
            .map(|row| number(&row, "run"))
            .transpose()
    }

    /// Notes an image of a living workspace; never an earlier run's. Memory takes the place of the one
    /// before; a part of a snapshot that of one that was begun, and stands once
    /// [`Store::snapshot_keep`] says so.
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
        let stands = !purpose.is_by_id();
        let failed = || KmsError::store("write image");
        let mut tx = self.begin().await?;
        let noted = sqlx::query(
            "INSERT INTO image (workspace, purpose, object, run, stands)
             SELECT id, $2, $3, $4, $5 FROM workspace WHERE id = $1 AND wrapped IS NOT NULL
                AND NOT EXISTS
                (SELECT 1 FROM image WHERE workspace = $1 AND purpose = $2 AND run >= $4)
             ON CONFLICT (workspace, purpose, object) DO UPDATE
                SET run = excluded.run, stands = excluded.stands",
        )
        .bind(id.as_str())
        .bind(purpose.label())
        .bind(object.as_str())
        .bind(signed(run))
        .bind(stands)
        .execute(&mut *tx)
        .await
        .map_err(failed())?;
        if noted.rows_affected() > 0 {
            sqlx::query(
                "DELETE FROM image WHERE workspace = $1 AND purpose = $2 AND object <> $3
                    AND (stands = 0 OR $4)",
            )
            .bind(id.as_str())
            .bind(purpose.label())
            .bind(object.as_str())
            .bind(stands)
            .execute(&mut *tx)
            .await
            .map_err(failed())?;
        }
        tx.commit().await.map_err(failed())
    }

    /// The snapshot stands, and what stood before is forgotten; `told` waits for the log from then on.
    /// Of one that was not begun, and of one that stands already, nothing is written.
    ///
    /// # Errors
    /// The database's, or too many entries wait already.
    pub async fn snapshot_keep(
        &self,
        id: &WorkspaceId,
        object: &str,
        told: Option<&str>,
    ) -> Result<(), KmsError> {
        let failed = || KmsError::store("keep snapshot");
        let [disk, memory] = [Purpose::SnapshotDisk, Purpose::SnapshotMemory].map(Purpose::label);
        let bound = |query| {
            sqlx::query(query)
                .bind(id.as_str())
                .bind(object)
                .bind(disk)
                .bind(memory)
        };
        let mut tx = self.begin().await?;
        let stands = bound(
            "UPDATE image SET stands = 1
             WHERE workspace = $1 AND purpose IN ($3, $4) AND object = $2 AND stands = 0",
        );
        let stands = stands.execute(&mut *tx).await.map_err(failed())?;
        if stands.rows_affected() == 0 {
            return Ok(());
        }
        let others = bound(
            "DELETE FROM image
             WHERE workspace = $1 AND purpose IN ($3, $4) AND object <> $2 AND stands = 1",
        );
        others.execute(&mut *tx).await.map_err(failed())?;
        if let Some(told) = told {
            outbox_add(&mut tx, Class::Host.name(), told).await?;
        }
        tx.commit().await.map_err(failed())
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
