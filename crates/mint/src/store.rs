//! Mint's state at rest, in one SQLite file. Holds no secret: API keys as HMAC, raw tokens as a
//! version number.
//!
//! Everything is held in memory too ([`crate::book`]); the file is read once at start and written
//! by one writer at a time, durable when a call returns.

use crate::error::MintError;
use crate::limits::{OUTBOX_MAX, STORE_WAIT};
use model::{AccountId, KeyId, WorkspaceId};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row as _, Sqlite, SqlitePool, Transaction};
use std::path::Path;

/// Version of the format; newer ones are refused.
const FORMAT: i64 = 1;

const SCHEMA: &[&str] = &[
    "CREATE TABLE IF NOT EXISTS meta (id INTEGER PRIMARY KEY CHECK (id = 1),
        format INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS account (id TEXT PRIMARY KEY, name TEXT NOT NULL,
        created_ms INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS api_key (id TEXT PRIMARY KEY,
        account TEXT NOT NULL REFERENCES account (id), name TEXT NOT NULL, mac BLOB NOT NULL,
        created_ms INTEGER NOT NULL, revoked_ms INTEGER) STRICT",
    "CREATE TABLE IF NOT EXISTS workspace (id TEXT PRIMARY KEY,
        account TEXT NOT NULL REFERENCES account (id), identity_pub TEXT NOT NULL,
        epoch INTEGER NOT NULL, raw_version INTEGER NOT NULL, enabled INTEGER NOT NULL,
        gone INTEGER NOT NULL, seq INTEGER NOT NULL UNIQUE) STRICT",
    "CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,
        class TEXT NOT NULL, entry TEXT NOT NULL) STRICT",
];

/// The store.
pub struct Store {
    pool: SqlitePool,
}

/// An API key's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// The key.
    pub id: KeyId,
    /// Its account.
    pub account: AccountId,
    /// HMAC of its secret.
    pub mac: [u8; 32],
    /// It is valid no more.
    pub revoked: bool,
}

/// A workspace's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workspace {
    /// The workspace.
    pub id: WorkspaceId,
    /// Its account.
    pub account: AccountId,
    /// Public key of its guest's identity, hex.
    pub identity_pub: String,
    /// Gateway tokens below it are revoked.
    pub epoch: u64,
    /// Version of its raw token.
    pub raw_version: u64,
    /// The runtime API answers.
    pub enabled: bool,
    /// It is deleted.
    pub gone: bool,
    /// Number of its last change.
    pub seq: u64,
}

/// Everything, as read at start.
#[derive(Debug, Default)]
pub struct All {
    /// The accounts.
    pub accounts: Vec<AccountId>,
    /// The API keys.
    pub keys: Vec<ApiKey>,
    /// The workspaces, deleted ones included.
    pub workspaces: Vec<Workspace>,
}

impl Store {
    /// Opens the store; with `create`, an empty one where there is none.
    ///
    /// # Errors
    /// [`MintError::NoState`] if there is none; the database's errors.
    pub async fn open(path: &Path, create: bool) -> Result<Self, MintError> {
        if !create && !path.exists() {
            return Err(MintError::NoState(path.display().to_string()));
        }
        if create {
            file_private(path).map_err(|source| MintError::Io {
                operation: "make",
                path: path.display().to_string(),
                source,
            })?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(STORE_WAIT)
            .pragma("trusted_schema", "OFF");
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(STORE_WAIT)
            .connect_with(options)
            .await
            .map_err(MintError::store("open state.db"))?;
        for sql in SCHEMA {
            sqlx::query(*sql)
                .execute(&pool)
                .await
                .map_err(MintError::store("prepare state.db"))?;
        }
        sqlx::query("INSERT INTO meta (id, format) VALUES (1, $1) ON CONFLICT (id) DO NOTHING")
            .bind(FORMAT)
            .execute(&pool)
            .await
            .map_err(MintError::store("prepare state.db"))?;
        let row = sqlx::query("SELECT format FROM meta WHERE id = 1")
            .fetch_one(&pool)
            .await
            .map_err(MintError::store("read format"))?;
        if get::<i64>(&row, "format")? != FORMAT {
            return Err(MintError::Damaged(
                "the format, which is another version's,",
            ));
        }
        Ok(Self { pool })
    }

    /// Ends all connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Everything.
    ///
    /// # Errors
    /// The database's, or a damaged row.
    pub async fn load(&self) -> Result<All, MintError> {
        let rows = async |sql: &'static str| {
            sqlx::query(sql)
                .fetch_all(&self.pool)
                .await
                .map_err(MintError::store("load"))
        };
        Ok(All {
            accounts: rows("SELECT id FROM account")
                .await?
                .iter()
                .map(|row| parsed(row, "id"))
                .collect::<Result<_, _>>()?,
            keys: rows("SELECT * FROM api_key")
                .await?
                .iter()
                .map(api_key_of)
                .collect::<Result<_, _>>()?,
            workspaces: rows("SELECT * FROM workspace")
                .await?
                .iter()
                .map(workspace_of)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Starts a write.
    ///
    /// # Errors
    /// The database's.
    pub async fn begin(&self) -> Result<Transaction<'static, Sqlite>, MintError> {
        self.pool
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(MintError::store("begin"))
    }

    /// Adds an account.
    ///
    /// # Errors
    /// The database's.
    pub async fn account_insert(
        &self,
        id: &AccountId,
        name: &str,
        now_ms: u64,
    ) -> Result<(), MintError> {
        sqlx::query("INSERT INTO account (id, name, created_ms) VALUES ($1, $2, $3)")
            .bind(id.as_str())
            .bind(name)
            .bind(signed(now_ms))
            .execute(&self.pool)
            .await
            .map_err(MintError::store("add account"))?;
        Ok(())
    }

    /// Adds an API key.
    ///
    /// # Errors
    /// The database's.
    pub async fn api_key_insert(
        &self,
        key: &ApiKey,
        name: &str,
        now_ms: u64,
    ) -> Result<(), MintError> {
        sqlx::query(
            "INSERT INTO api_key (id, account, name, mac, created_ms)
             VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(key.id.as_str())
        .bind(key.account.as_str())
        .bind(name)
        .bind(key.mac.as_slice())
        .bind(signed(now_ms))
        .execute(&self.pool)
        .await
        .map_err(MintError::store("add API key"))?;
        Ok(())
    }

    /// Revokes an API key.
    ///
    /// # Errors
    /// The database's.
    pub async fn api_key_revoke(
        &self,
        id: &KeyId,
        now_ms: u64,
        waiting: Option<&str>,
    ) -> Result<(), MintError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE api_key SET revoked_ms = $2 WHERE id = $1 AND revoked_ms IS NULL")
            .bind(id.as_str())
            .bind(signed(now_ms))
            .execute(&mut *tx)
            .await
            .map_err(MintError::store("revoke API key"))?;
        outbox_add(&mut tx, waiting).await?;
        tx.commit()
            .await
            .map_err(MintError::store("revoke API key"))
    }

    /// Writes a workspace's row; `waiting` is an entry that the log could not take.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace_put(
        &self,
        w: &Workspace,
        waiting: Option<&str>,
    ) -> Result<(), MintError> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO workspace
                (id, account, identity_pub, epoch, raw_version, enabled, gone, seq)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch,
                raw_version = excluded.raw_version, enabled = excluded.enabled,
                gone = excluded.gone, seq = excluded.seq",
        )
        .bind(w.id.as_str())
        .bind(w.account.as_str())
        .bind(&w.identity_pub)
        .bind(signed(w.epoch))
        .bind(signed(w.raw_version))
        .bind(w.enabled)
        .bind(w.gone)
        .bind(signed(w.seq))
        .execute(&mut *tx)
        .await
        .map_err(MintError::store("write workspace"))?;
        outbox_add(&mut tx, waiting).await?;
        tx.commit()
            .await
            .map_err(MintError::store("write workspace"))
    }

    /// The oldest entry that waits for the log.
    ///
    /// # Errors
    /// The database's.
    pub async fn outbox_first(&self) -> Result<Option<(i64, String)>, MintError> {
        let row = sqlx::query("SELECT id, entry FROM outbox ORDER BY id LIMIT 1")
            .fetch_optional(&self.pool)
            .await
            .map_err(MintError::store("read outbox"))?;
        row.map(|row| Ok((get(&row, "id")?, get(&row, "entry")?)))
            .transpose()
    }

    /// Forgets an entry that the log has.
    ///
    /// # Errors
    /// The database's.
    pub async fn outbox_remove(&self, id: i64) -> Result<(), MintError> {
        sqlx::query("DELETE FROM outbox WHERE id = $1")
            .bind(id)
            .execute(&self.pool)
            .await
            .map_err(MintError::store("empty outbox"))?;
        Ok(())
    }
}

async fn outbox_add(
    tx: &mut Transaction<'static, Sqlite>,
    entry: Option<&str>,
) -> Result<(), MintError> {
    let Some(entry) = entry else { return Ok(()) };
    let done = sqlx::query(
        "INSERT INTO outbox (class, entry) SELECT 'host', $1
         WHERE (SELECT COUNT(*) FROM outbox) < $2",
    )
    .bind(entry)
    .bind(OUTBOX_MAX)
    .execute(&mut **tx)
    .await
    .map_err(MintError::store("fill outbox"))?;
    if done.rows_affected() == 0 {
        return Err(MintError::Full(
            "10,000 entries wait for the audit log already; bring it back first",
        ));
    }
    Ok(())
}

/// Makes the file, if it is missing, for its owner only; SQLite's other files take after it.
fn file_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map(drop)
}

fn api_key_of(row: &SqliteRow) -> Result<ApiKey, MintError> {
    let mac: Vec<u8> = get(row, "mac")?;
    Ok(ApiKey {
        id: parsed(row, "id")?,
        account: parsed(row, "account")?,
        mac: mac
            .try_into()
            .map_err(|_| MintError::Damaged("an API key's mac"))?,
        revoked: get::<Option<i64>>(row, "revoked_ms")?.is_some(),
    })
}

fn workspace_of(row: &SqliteRow) -> Result<Workspace, MintError> {
    Ok(Workspace {
        id: parsed(row, "id")?,
        account: parsed(row, "account")?,
        identity_pub: get(row, "identity_pub")?,
        epoch: number(row, "epoch")?,
        raw_version: number(row, "raw_version")?,
        enabled: get(row, "enabled")?,
        gone: get(row, "gone")?,
        seq: number(row, "seq")?,
    })
}

fn get<'r, T>(row: &'r SqliteRow, column: &'static str) -> Result<T, MintError>
where
    T: sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite>,
{
    row.try_get(column)
        .map_err(MintError::store("read a column"))
}

fn number(row: &SqliteRow, column: &'static str) -> Result<u64, MintError> {
    u64::try_from(get::<i64>(row, column)?).map_err(|_| MintError::Damaged(column))
}

fn parsed<T: std::str::FromStr>(row: &SqliteRow, column: &'static str) -> Result<T, MintError> {
    get::<String>(row, column)?
        .parse()
        .map_err(|_| MintError::Damaged(column))
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
