//! Workspace rows.

use super::{Store, failed, to_i64, to_u64};
use crate::limits::{CAS_ATTEMPTS_MAX, ROWS_MAX};
use api::{Error, ErrorCode};
use model::{
    AccountId, HostId, Idle, Mode, ObjectId, Power, Resources, RestartPolicy, TtlAction,
    WorkspaceId,
};
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::any::AnyRow;

/// A workspace.
#[derive(Debug, Clone, PartialEq)]
pub struct Workspace {
    /// Its id.
    pub id: WorkspaceId,
    /// Whose it is.
    pub account: AccountId,
    /// The owner's name for it in URLs, unique in the account.
    pub slug: Option<String>,
    /// The owner's key against a second creation.
    pub idempotency_key: Option<String>,
    /// Grows with every change.
    pub generation: u64,
    /// ms since the epoch.
    pub created_ms: u64,
    /// Everything else.
    pub doc: Doc,
}

/// What of a workspace is not searched for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Doc {
    /// A name for people.
    pub name: String,
    /// A picture for people.
    pub logo: Option<String>,
    /// How long its disk lives.
    pub mode: Mode,
    /// The image, as the owner named it.
    pub image: String,
    /// The image's digest.
    pub image_id: String,
    /// Its size.
    pub resources: Resources,
    /// The guest's config, its exact text.
    pub config: String,
    /// The machine.
    pub host: HostId,
    /// How far its life is.
    pub stage: Stage,
    /// What is wanted of it.
    pub power: Power,
    /// The edge may reach its agent.
    pub public_access: bool,
    /// The contract's `ingress_ports`.
    pub ingress_ports: Vec<u16>,
    /// When it is restarted by itself.
    pub restart_policy: RestartPolicy,
    /// Restarts in a row that the owner allows.
    pub max_restarts: Option<u32>,
    /// Time-to-live, seconds.
    pub ttl_s: Option<u64>,
    /// What happens at its end.
    pub ttl_action: TtlAction,
    /// When that is, ms since the epoch.
    pub ttl_expires_ms: Option<u64>,
    /// Delete when it ends by itself.
    pub remove_on_exit: bool,
    /// Mint's standing policy.
    pub policy: Option<String>,
    /// Mint's token state.
    pub token_state: String,
    /// The assertion it is created under, until it is created.
    pub creating_under: Option<String>,
    /// The request whose creation's outcome the log does not have yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome_owed: Option<String>,
    /// The deletion's journal.
    pub deletion: Option<Deletion>,
    /// When it ran first, ms since the epoch.
    pub completed_ms: Option<u64>,
    /// Unplanned restarts in a row.
    pub restarts: u32,
    /// Why it ended by itself.
    pub last_error: Option<Error>,
    /// What the platform owes it.
    #[serde(default)]
    pub life: Life,
    /// ms since the epoch.
    pub updated_ms: u64,
}

/// What the platform does to a workspace by itself, and how far that is: all that is needed to
/// do it once, whichever process was killed in between.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Life {
    /// What happens when nobody uses it.
    pub idle: Option<Idle>,
    /// The last ping, ms since the epoch.
    pub pinged_ms: u64,
    /// A start by the platform is owed then, ms since the epoch: after an exit, or after the stop
    /// of a restart.
    pub restart_at_ms: Option<u64>,
    /// The generation that such a start was handed to host with: as long as host has not seen it,
    /// the start has not been tried.
    pub restart_generation: Option<u64>,
    /// It ended as often in a row as it may.
    pub given_up: bool,
    /// It has ended and was to be removed then.
    pub remove_due: bool,
    /// The size of the VM that runs or sleeps, where another is wanted from the next start on.
    pub resources_running: Option<Resources>,
    /// The last image of its memory; host says whether it is there.
    pub memory: Option<ObjectId>,
    /// When it was put to sleep last, ms since the epoch.
    pub slept_ms: u64,
    /// When a sleep failed last, ms since the epoch.
    pub sleep_failed_ms: Option<u64>,
    /// When a request at its gateway woke it last, ms since the epoch.
    pub wake_tried_ms: u64,
    /// It was stopped because nobody used it: a request at its gateway starts it.
    pub idle_stopped: bool,
    /// Its snapshot.
    pub snapshot: Option<Snapshot>,
    /// One that was begun, to take that one's place: it is none yet.
    pub snapshot_next: Option<Box<Snapshot>>,
    /// Its archives, in the order in which they were begun; at most
    /// [`model::limits::ARCHIVES_MAX`].
    pub archives: Vec<Archive>,
    /// The largest number that was a version.
    pub archive_last: u64,
    /// When files of an archive were put back last, or were to be, ms since the epoch.
    pub archive_restored_ms: u64,
}

/// An archive of its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Archive {
    /// Its name, unique in the workspace.
    pub version: String,
    /// Its object's id.
    pub id: ObjectId,
    /// When it was begun, ms since the epoch.
    pub begun_ms: u64,
    /// The request that began it.
    pub request_id: String,
    /// What it holds.
    pub paths: Vec<String>,
    /// What it leaves out.
    pub exclude: Vec<String>,
    /// Once it was made to its end; none: it is none.
    pub made: Option<Made>,
}

/// What became of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// When, ms since the epoch.
    pub made_ms: u64,
    /// Size of the tar, bytes.
    pub bytes: u64,
    /// Files, directories and links in it, by the guest's word.
    pub entries: u64,
    /// What could not be read, by the guest's word.
    pub skipped: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its objects' id.
    pub id: ObjectId,
    /// The request that began it.
    #[serde(default)]
    pub request_id: String,
    /// When it was there, ms since the epoch; none: it was not taken to its end, and is none.
    pub taken_ms: Option<u64>,
    /// The size of what it is of.
    pub resources: Resources,
    /// Whether it holds memory too.
    #[serde(default = "yes")]
    pub memory: bool,
}

/// What snapshots held before one could do without.
fn yes() -> bool {
    true
}

impl Life {
    /// The owner has said what is wanted: nothing is owed any more.
    pub fn settle(&mut self) {
        (self.restart_at_ms, self.restart_generation) = (None, None);
        (self.given_up, self.remove_due) = (false, false);
        self.idle_stopped = false;
    }
}

/// How far a workspace's life is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Its key and tokens are being made.
    Creating,
    /// It may run.
    Ready,
    /// It is being deleted.
    Deleting,
}

/// The journal of a deletion: what is done already.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deletion {
    /// The request that asked for it.
    pub request_id: String,
    /// Who asked.
    pub actor: String,
    /// The assertion or policy that allows it; the first that is taken counts.
    pub authorities: Vec<String>,
    /// The host holds nothing of it.
    pub host_done: bool,
    /// The KMS destroyed its key.
    pub key_done: bool,
    /// The KMS's receipt, if there was a key.
    pub receipt: Option<String>,
    /// Mint forgot it.
    pub mint_done: bool,
}

/// What came of an insert.
#[derive(Debug, PartialEq)]
pub enum Inserted {
    /// It is there.
    New,
    /// The idempotency key was used before, for this one.
    Existing(Box<Workspace>),
}

impl Store {
    /// Inserts a workspace, if the account has fewer than `max`.
    ///
    /// # Errors
    /// [`ErrorCode::SandboxLimitReached`], or [`ErrorCode::Conflict`] for a slug in use.
    pub async fn workspace_insert(&self, w: &Workspace, max: u32) -> api::Result<Inserted> {
        let _one = self.inserting.lock().await;
        if let Some(key) = &w.idempotency_key
            && let Some(before) = self.workspace_by_idempotency_key(&w.account, key).await?
        {
            return Ok(Inserted::Existing(Box::new(before)));
        }
        let done = sqlx::query(
            "INSERT INTO workspaces (id, account, slug, idempotency_key, generation, created_ms, doc)
             SELECT $1, $2, CAST($3 AS TEXT), CAST($4 AS TEXT), $5, $6, $7
             WHERE (SELECT COUNT(*) FROM workspaces WHERE account = $8) < $9",
        )
        .bind(w.id.as_str())
        .bind(w.account.as_str())
        .bind(w.slug.clone())
        .bind(w.idempotency_key.clone())
        .bind(to_i64(w.generation))
        .bind(to_i64(w.created_ms))
        .bind(w.doc_text()?)
        .bind(w.account.as_str())
        .bind(i64::from(max))
        .execute(&self.pool)
        .await;
        match done {
            Ok(done) if done.rows_affected() == 1 => Ok(Inserted::New),
            Ok(_) => Err(Error::new(
                ErrorCode::SandboxLimitReached,
                format!("the account has its {max} workspaces; delete one first"),
            )),
            Err(e) => Err(unique(e)),
        }
    }

    /// An account's workspace, by id or slug.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], for another account's too.
    pub async fn workspace_get(&self, account: &AccountId, name: &str) -> api::Result<Workspace> {
        sqlx::query(
            "SELECT id, account, slug, idempotency_key, generation, created_ms, doc
             FROM workspaces WHERE account = $1 AND (id = $2 OR slug = $3)
             ORDER BY CASE WHEN id = $4 THEN 0 ELSE 1 END LIMIT 1",
        )
        .bind(account.as_str())
        .bind(name)
        .bind(name)
        .bind(name)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("get workspace"))?
        .map(|row| Workspace::from_row(&row))
        .transpose()?
        .ok_or_else(not_found)
    }

    /// The account's workspace that this idempotency key made.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace_by_idempotency_key(
        &self,
        account: &AccountId,
        key: &str,
    ) -> api::Result<Option<Workspace>> {
        sqlx::query(
            "SELECT id, account, slug, idempotency_key, generation, created_ms, doc
             FROM workspaces WHERE account = $1 AND idempotency_key = $2",
        )
        .bind(account.as_str())
        .bind(key)
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("get workspace by idempotency key"))?
        .map(|row| Workspace::from_row(&row))
        .transpose()
    }

    /// An account's workspaces, newest first.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace_list(&self, account: &AccountId) -> api::Result<Vec<Workspace>> {
        sqlx::query(
            "SELECT id, account, slug, idempotency_key, generation, created_ms, doc
             FROM workspaces WHERE account = $1 ORDER BY created_ms DESC, id LIMIT $2",
        )
        .bind(account.as_str())
        .bind(ROWS_MAX)
        .fetch_all(&self.pool)
        .await
        .map_err(failed("list workspaces"))?
        .iter()
        .map(Workspace::from_row)
        .collect()
    }

    /// Every account's workspaces, for the reconciler.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace_list_all(&self) -> api::Result<Vec<Workspace>> {
        sqlx::query(
            "SELECT id, account, slug, idempotency_key, generation, created_ms, doc
             FROM workspaces ORDER BY id LIMIT $1",
        )
        .bind(ROWS_MAX)
        .fetch_all(&self.pool)
        .await
        .map_err(failed("list all workspaces"))?
        .iter()
        .map(Workspace::from_row)
        .collect()
    }

    /// Changes a workspace: `change` sees the row as it is and may refuse. Returns the new row.
    ///
    /// # Errors
    /// The change's own, [`ErrorCode::NotFound`], or [`ErrorCode::Conflict`] for a slug in use.
    pub async fn workspace_update(
        &self,
        w: &Workspace,
        now_ms: u64,
        change: impl Fn(&mut Workspace) -> api::Result<()>,
    ) -> api::Result<Workspace> {
        for _ in 0..CAS_ATTEMPTS_MAX {
            let before = self.workspace_get(&w.account, w.id.as_str()).await?;
            let mut after = before.clone();
            change(&mut after)?;
            if after == before {
                return Ok(before);
            }
            after.generation = before.generation + 1;
            after.doc.updated_ms = now_ms;
            let row = sqlx::query(
                "UPDATE workspaces SET slug = $1, idempotency_key = $2, generation = $3, doc = $4
                 WHERE id = $5 AND generation = $6 RETURNING generation",
            )
            .bind(after.slug.clone())
            .bind(after.idempotency_key.clone())
            .bind(to_i64(after.generation))
            .bind(after.doc_text()?)
            .bind(after.id.as_str())
            .bind(to_i64(before.generation))
            .fetch_optional(&self.pool)
            .await
            .map_err(unique)?;
            if row.is_some() {
                return Ok(after);
            }
        }
        Err(Error::new(
            ErrorCode::Conflict,
            "the workspace is being changed by others all the time; try again",
        ))
    }
}

impl Workspace {
    fn from_row(row: &AnyRow) -> api::Result<Self> {
        let read = |row: &AnyRow| -> Result<Self, Box<dyn std::error::Error>> {
            let nullable = |c| row.try_get::<Option<String>, _>(c);
            Ok(Self {
                id: row.try_get::<String, _>("id")?.parse()?,
                account: row.try_get::<String, _>("account")?.parse()?,
                slug: nullable("slug")?,
                idempotency_key: nullable("idempotency_key")?,
                generation: to_u64(row.try_get("generation")?),
                created_ms: to_u64(row.try_get("created_ms")?),
                doc: serde_json::from_str(row.try_get::<&str, _>("doc")?)?,
            })
        };
        read(row).map_err(|e| Error::internal(format!("read a workspace row: {e}")))
    }

    fn doc_text(&self) -> api::Result<String> {
        serde_json::to_string(&self.doc).map_err(Error::internal)
    }
}

fn unique(e: sqlx::Error) -> Error {
    if e.as_database_error()
        .is_some_and(|e| e.is_unique_violation())
    {
        Error::new(
            ErrorCode::Conflict,
            "slug: another of the account's workspaces has it",
        )
    } else {
        failed("write workspace")(e)
    }
}

pub(crate) fn not_found() -> Error {
    Error::new(ErrorCode::NotFound, "there is no such workspace")
}
