//! The KMS's state: wrapped keys and tombstones in one SQLite file. Holds no plaintext key.
//!
//! One writer at a time (a pool of one connection), readers beside it (WAL). A commit is durable
//! when it returns (`synchronous=FULL`), and what is deleted is overwritten (`secure_delete`).

mod image;

use crate::error::KmsError;
use crate::limits::{OUTBOX_MAX, STORE_WAIT};
use api::kms::Anchor;
use model::{AccountId, WorkspaceId};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row as _, Sqlite, SqliteConnection, SqlitePool, Transaction};
use std::path::Path;

/// Version of the format; older ones are migrated, newer ones refused.
pub const FORMAT: i64 = 1;

const SCHEMA: &[&str] = &[
    "CREATE TABLE IF NOT EXISTS state (
        id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER NOT NULL, epoch INTEGER NOT NULL,
        rotated_ms INTEGER NOT NULL, sign_pub TEXT NOT NULL, sign_wrapped BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS account (
        id TEXT PRIMARY KEY, version INTEGER NOT NULL, epoch INTEGER NOT NULL,
        wrapped BLOB NOT NULL, log_pub TEXT NOT NULL, published INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS workspace (
        id TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES account (id),
        version INTEGER NOT NULL, account_version INTEGER NOT NULL, epoch INTEGER NOT NULL,
        wrapped BLOB, created_ms INTEGER NOT NULL,
        destroyed_ms INTEGER, record_digest TEXT, receipt TEXT) STRICT",
    "CREATE INDEX IF NOT EXISTS workspace_account ON workspace (account) WHERE wrapped IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS workspace_pending ON workspace (id)
        WHERE wrapped IS NULL AND receipt IS NULL",
    "CREATE TABLE IF NOT EXISTS log_key (
        class TEXT PRIMARY KEY, first_day INTEGER NOT NULL, epoch INTEGER NOT NULL,
        wrapped BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS anchor (
        workspace TEXT PRIMARY KEY REFERENCES workspace (id), run INTEGER NOT NULL,
        batch INTEGER NOT NULL, root TEXT NOT NULL, time_ms INTEGER NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS image (
        workspace TEXT NOT NULL REFERENCES workspace (id), purpose TEXT NOT NULL,
        object TEXT NOT NULL, run INTEGER NOT NULL, stands INTEGER NOT NULL,
        PRIMARY KEY (workspace, purpose, object)) STRICT",
    "CREATE TABLE IF NOT EXISTS outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT, class TEXT NOT NULL, entry TEXT NOT NULL) STRICT",
];

/// The store.
pub struct Store {
    write: SqlitePool,
    read: SqlitePool,
}

/// The one row of the state.
#[derive(Debug, Clone)]
pub struct State {
    /// The epoch in force.
    pub epoch: u64,
    /// When it came into force, ms since the epoch of Unix.
    pub rotated_ms: u64,
    /// Public half of the signing key, hex.
    pub sign_pub: String,
    /// The signing key's seed, wrapped.
    pub sign_wrapped: Vec<u8>,
}

/// An account's row.
#[derive(Debug, Clone)]
pub struct Account {
    /// The account.
    pub id: AccountId,
    /// Version of its key; grows with each epoch.
    pub version: u32,
    /// The epoch whose root wraps it.
    pub epoch: u64,
    /// Key (32 bytes) and log seed (32 bytes), wrapped.
    pub wrapped: Vec<u8>,
    /// The public key that entries about it are sealed to, hex.
    pub log_pub: String,
}

/// A workspace's row.
#[derive(Debug, Clone)]
pub struct Workspace {
    /// The workspace.
    pub id: WorkspaceId,
    /// Its account.
    pub account: AccountId,
    /// Version of its key.
    pub version: u32,
    /// Version of the account's key that wraps it.
    pub account_version: u32,
    /// The epoch it was last wrapped in.
    pub epoch: u64,
    /// Its key, wrapped; none once it is destroyed.
    pub wrapped: Option<Vec<u8>>,
    /// When it was erased, ms.
    pub destroyed_ms: Option<u64>,
    /// SHA-256 of the erased record, hex.
    pub record_digest: Option<String>,
    /// The signed erasure receipt.
    pub receipt: Option<String>,
}

/// The day seeds of one log.
#[derive(Debug, Clone)]
pub struct LogKey {
    /// The log's class.
    pub class: String,
    /// Day of the first seed.
    pub first_day: u32,
    /// The epoch whose root wraps them.
    pub epoch: u64,
    /// The seeds, 32 bytes each, wrapped as one.
    pub wrapped: Vec<u8>,
}

impl Store {
    /// Opens the store; with `create`, an empty one where there is none.
    ///
    /// # Errors
    /// [`KmsError::NoState`] if there is none; the database's errors.
    pub async fn open(path: &Path, create: bool) -> Result<Self, KmsError> {
        if !create && !path.exists() {
            return Err(KmsError::NoState(path.to_owned()));
        }
        if create {
            file_private(path).map_err(KmsError::io("make", path))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(STORE_WAIT)
            .pragma("secure_delete", "ON")
            .pragma("trusted_schema", "OFF");
        let pool = |n| {
            SqlitePoolOptions::new()
                .max_connections(n)
                .acquire_timeout(STORE_WAIT)
        };
        let write = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(KmsError::store("open state.db"))?;
        for sql in SCHEMA {
            sqlx::query(*sql)
                .execute(&write)
                .await
                .map_err(KmsError::store("prepare state.db"))?;
        }
        let read = pool(4)
            .connect_with(options)
            .await
            .map_err(KmsError::store("open state.db"))?;
        Ok(Self { write, read })
    }

    /// Ends all connections.
    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// Starts the one write transaction.
    ///
    /// # Errors
    /// The database's.
    pub async fn begin(&self) -> Result<Transaction<'static, Sqlite>, KmsError> {
        self.write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(KmsError::store("begin"))
    }

    /// The state's row, if it was initialised.
    ///
    /// # Errors
    /// The database's, or a format this program does not know.
    pub async fn state(&self) -> Result<Option<State>, KmsError> {
        let mut conn = self
            .read
            .acquire()
            .await
            .map_err(KmsError::store("read state"))?;
        state(&mut conn).await
    }

    /// A workspace's row with its account's, in one snapshot.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspace(
        &self,
        id: &WorkspaceId,
    ) -> Result<Option<(Workspace, Account)>, KmsError> {
        let row = sqlx::query(
            "SELECT w.id, w.account, w.version, w.account_version, w.epoch, w.wrapped,
                w.destroyed_ms, w.record_digest, w.receipt,
                a.version AS a_version, a.epoch AS a_epoch, a.wrapped AS a_wrapped, a.log_pub
             FROM workspace w JOIN account a ON a.id = w.account WHERE w.id = $1",
        )
        .bind(id.as_str())
        .fetch_optional(&self.read)
        .await
        .map_err(KmsError::store("read workspace key"))?;
        row.map(|row| {
            let account = Account {
                id: parsed(&row, "account")?,
                version: number(&row, "a_version")?,
                epoch: number(&row, "a_epoch")?,
                wrapped: get(&row, "a_wrapped")?,
                log_pub: get(&row, "log_pub")?,
            };
            Ok((workspace_of(&row)?, account))
        })
        .transpose()
    }

    /// How many keys live.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspaces_living(&self) -> Result<u64, KmsError> {
        let row = sqlx::query("SELECT COUNT(*) AS n FROM workspace WHERE wrapped IS NOT NULL")
            .fetch_one(&self.read)
            .await
            .map_err(KmsError::store("count keys"))?;
        number(&row, "n")
    }

    /// Keys that were erased and have no receipt yet: a crash came between.
    ///
    /// # Errors
    /// The database's.
    pub async fn workspaces_pending(&self) -> Result<Vec<Workspace>, KmsError> {
        sqlx::query("SELECT * FROM workspace WHERE wrapped IS NULL AND receipt IS NULL LIMIT 1000")
            .fetch_all(&self.read)
            .await
            .map_err(KmsError::store("read erased keys"))?
            .iter()
            .map(workspace_of)
            .collect()
    }

    /// Accounts whose log key the log may not have yet: at most 100.
    ///
    /// # Errors
    /// The database's.
    pub async fn accounts_unpublished(&self) -> Result<Vec<(AccountId, String)>, KmsError> {
        sqlx::query("SELECT id, log_pub FROM account WHERE published = 0 LIMIT 100")
            .fetch_all(&self.read)
            .await
            .map_err(KmsError::store("read accounts"))?
            .iter()
            .map(|row| Ok((parsed(row, "id")?, get(row, "log_pub")?)))
            .collect()
    }

    /// Notes that the log has an account's key.
    ///
    /// # Errors
    /// The database's.
    pub async fn account_published(&self, id: &AccountId) -> Result<(), KmsError> {
        sqlx::query("UPDATE account SET published = 1 WHERE id = $1")
            .bind(id.as_str())
            .execute(&self.write)
            .await
            .map_err(KmsError::store("note account's log key"))?;
        Ok(())
    }

    /// How far a workspace's disk had got.
    ///
    /// # Errors
    /// The database's.
    pub async fn anchor(&self, id: &WorkspaceId) -> Result<Option<Anchor>, KmsError> {
        sqlx::query("SELECT run, batch, root FROM anchor WHERE workspace = $1")
            .bind(id.as_str())
            .fetch_optional(&self.read)
            .await
            .map_err(KmsError::store("read anchor"))?
            .map(|row| {
                Ok(Anchor {
                    run: number(&row, "run")?,
                    batch: number(&row, "batch")?,
                    root: get(&row, "root")?,
                })
            })
            .transpose()
    }

    /// Notes how far a living workspace's disk has got, if that is further than what is noted.
    ///
    /// # Errors
    /// The database's.
    pub async fn anchor_raise(
        &self,
        id: &WorkspaceId,
        anchor: &Anchor,
        now_ms: u64,
    ) -> Result<(), KmsError> {
        sqlx::query(
            "INSERT INTO anchor (workspace, run, batch, root, time_ms)
             SELECT id, $2, $3, $4, $5 FROM workspace WHERE id = $1 AND wrapped IS NOT NULL
             ON CONFLICT (workspace) DO UPDATE SET run = excluded.run, batch = excluded.batch,
                root = excluded.root, time_ms = excluded.time_ms
             WHERE (excluded.run, excluded.batch) > (anchor.run, anchor.batch)",
        )
        .bind(id.as_str())
        .bind(signed(anchor.run))
        .bind(signed(anchor.batch))
        .bind(&anchor.root)
        .bind(signed(now_ms))
        .execute(&self.write)
        .await
        .map_err(KmsError::store("write anchor"))?;
        Ok(())
    }

    /// Stores an erasure's receipt.
    ///
    /// # Errors
    /// The database's.
    pub async fn receipt_store(&self, id: &WorkspaceId, receipt: &str) -> Result<(), KmsError> {
        sqlx::query("UPDATE workspace SET receipt = $2 WHERE id = $1 AND wrapped IS NULL")
            .bind(id.as_str())
            .bind(receipt)
            .execute(&self.write)
            .await
            .map_err(KmsError::store("store receipt"))?;
        Ok(())
    }

    /// The oldest entry that waits for the log.
    ///
    /// # Errors
    /// The database's.
    pub async fn outbox_first(&self) -> Result<Option<(i64, String, String)>, KmsError> {
        let row = sqlx::query("SELECT id, class, entry FROM outbox ORDER BY id LIMIT 1")
            .fetch_optional(&self.read)
            .await
            .map_err(KmsError::store("read outbox"))?;
        row.map(|row| Ok((get(&row, "id")?, get(&row, "class")?, get(&row, "entry")?)))
            .transpose()
    }

    /// Adds an entry that waits for the log.
    ///
    /// # Errors
    /// The database's, or too many wait already.
    pub async fn outbox_add(&self, class: &str, entry: &str) -> Result<(), KmsError> {
        let mut tx = self.begin().await?;
        outbox_add(&mut tx, class, entry).await?;
        tx.commit().await.map_err(KmsError::store("fill outbox"))
    }

    /// Forgets an entry that the log has.
    ///
    /// # Errors
    /// The database's.
    pub async fn outbox_remove(&self, id: i64) -> Result<(), KmsError> {
        sqlx::query("DELETE FROM outbox WHERE id = $1")
            .bind(id)
            .execute(&self.write)
            .await
            .map_err(KmsError::store("empty outbox"))?;
        Ok(())
    }

    /// Moves the write-ahead log into the file and truncates it, so that rows of an old epoch do
    /// not linger there. (They could not be opened any more; this is tidiness.)
    pub async fn checkpoint(&self) {
        let done = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)")
            .execute(&self.write)
            .await;
        if let Err(e) = done {
            tracing::warn!(error = %e, "checkpoint of state.db");
        }
    }
}

/// The state's row, within a transaction.
///
/// # Errors
/// The database's, or a format this program does not know.
pub async fn state(conn: &mut SqliteConnection) -> Result<Option<State>, KmsError> {
    let row = sqlx::query("SELECT * FROM state WHERE id = 1")
        .fetch_optional(conn)
        .await
        .map_err(KmsError::store("read state"))?;
    let Some(row) = row else { return Ok(None) };
    if get::<i64>(&row, "format")? != FORMAT {
        return Err(KmsError::Unseal(
            "state.db is of another version of casemate-kms",
        ));
    }
    Ok(Some(State {
        epoch: number(&row, "epoch")?,
        rotated_ms: number(&row, "rotated_ms")?,
        sign_pub: get(&row, "sign_pub")?,
        sign_wrapped: get(&row, "sign_wrapped")?,
    }))
}

/// Writes the state's row.
///
/// # Errors
/// The database's.
pub async fn state_put(conn: &mut SqliteConnection, s: &State) -> Result<(), KmsError> {
    sqlx::query(
        "INSERT INTO state (id, format, epoch, rotated_ms, sign_pub, sign_wrapped)
         VALUES (1, $1, $2, $3, $4, $5)
         ON CONFLICT (id) DO UPDATE SET epoch = excluded.epoch, rotated_ms = excluded.rotated_ms,
            sign_wrapped = excluded.sign_wrapped",
    )
    .bind(FORMAT)
    .bind(signed(s.epoch))
    .bind(signed(s.rotated_ms))
    .bind(&s.sign_pub)
    .bind(&s.sign_wrapped)
    .execute(conn)
    .await
    .map_err(KmsError::store("write state"))?;
    Ok(())
}

/// An account's row, within a transaction.
///
/// # Errors
/// The database's.
pub async fn account(
    conn: &mut SqliteConnection,
    id: &AccountId,
) -> Result<Option<Account>, KmsError> {
    sqlx::query("SELECT * FROM account WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(conn)
        .await
        .map_err(KmsError::store("read account key"))?
        .map(|row| account_of(&row))
        .transpose()
}

/// Accounts after `after` in the order of ids, at most 1,000.
///
/// # Errors
/// The database's.
pub async fn accounts_after(
    conn: &mut SqliteConnection,
    after: &str,
) -> Result<Vec<Account>, KmsError> {
    sqlx::query("SELECT * FROM account WHERE id > $1 ORDER BY id LIMIT 1000")
        .bind(after)
        .fetch_all(conn)
        .await
        .map_err(KmsError::store("read account keys"))?
        .iter()
        .map(account_of)
        .collect()
}

/// Inserts or re-wraps an account.
///
/// # Errors
/// The database's.
pub async fn account_put(conn: &mut SqliteConnection, a: &Account) -> Result<(), KmsError> {
    sqlx::query(
        "INSERT INTO account (id, version, epoch, wrapped, log_pub, published)
         VALUES ($1, $2, $3, $4, $5, 0)
         ON CONFLICT (id) DO UPDATE SET version = excluded.version, epoch = excluded.epoch,
            wrapped = excluded.wrapped",
    )
    .bind(a.id.as_str())
    .bind(i64::from(a.version))
    .bind(signed(a.epoch))
    .bind(&a.wrapped)
    .bind(&a.log_pub)
    .execute(conn)
    .await
    .map_err(KmsError::store("write account key"))?;
    Ok(())
}

/// Living workspaces of an account after `after`, at most 1,000.
///
/// # Errors
/// The database's.
pub async fn workspaces_after(
    conn: &mut SqliteConnection,
    account: &AccountId,
    after: &str,
) -> Result<Vec<Workspace>, KmsError> {
    sqlx::query(
        "SELECT * FROM workspace WHERE account = $1 AND wrapped IS NOT NULL AND id > $2
         ORDER BY id LIMIT 1000",
    )
    .bind(account.as_str())
    .bind(after)
    .fetch_all(conn)
    .await
    .map_err(KmsError::store("read workspace keys"))?
    .iter()
    .map(workspace_of)
    .collect()
}

/// Inserts a workspace's key unless the id is taken; says whether it was free.
///
/// # Errors
/// The database's.
pub async fn workspace_insert(
    conn: &mut SqliteConnection,
    w: &Workspace,
    now_ms: u64,
) -> Result<bool, KmsError> {
    let done = sqlx::query(
        "INSERT INTO workspace (id, account, version, account_version, epoch, wrapped, created_ms)
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING",
    )
    .bind(w.id.as_str())
    .bind(w.account.as_str())
    .bind(i64::from(w.version))
    .bind(i64::from(w.account_version))
    .bind(signed(w.epoch))
    .bind(&w.wrapped)
    .bind(signed(now_ms))
    .execute(conn)
    .await
    .map_err(KmsError::store("store workspace key"))?;
    Ok(done.rows_affected() == 1)
}

/// Stores a workspace's key as it is wrapped now.
///
/// # Errors
/// The database's.
pub async fn workspace_rewrap(conn: &mut SqliteConnection, w: &Workspace) -> Result<(), KmsError> {
    sqlx::query(
        "UPDATE workspace SET account_version = $2, epoch = $3, wrapped = $4
         WHERE id = $1 AND wrapped IS NOT NULL",
    )
    .bind(w.id.as_str())
    .bind(i64::from(w.account_version))
    .bind(signed(w.epoch))
    .bind(&w.wrapped)
    .execute(conn)
    .await
    .map_err(KmsError::store("re-wrap workspace key"))?;
    Ok(())
}

/// The wrapped key of a workspace, within a transaction; none once it is erased.
///
/// # Errors
/// The database's.
pub async fn workspace_wrapped(
    conn: &mut SqliteConnection,
    id: &WorkspaceId,
) -> Result<Option<Vec<u8>>, KmsError> {
    let row = sqlx::query("SELECT wrapped FROM workspace WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(conn)
        .await
        .map_err(KmsError::store("read workspace key"))?;
    row.map_or(Ok(None), |row| get(&row, "wrapped"))
}

/// Erases a workspace's key; the row stays as a tombstone, with the epoch it could be opened in.
///
/// # Errors
/// The database's.
pub async fn workspace_erase(
    conn: &mut SqliteConnection,
    id: &WorkspaceId,
    epoch: u64,
    digest: &str,
    now_ms: u64,
) -> Result<(), KmsError> {
    sqlx::query(
        "UPDATE workspace SET wrapped = NULL, epoch = $2, record_digest = $3, destroyed_ms = $4
         WHERE id = $1 AND wrapped IS NOT NULL",
    )
    .bind(id.as_str())
    .bind(signed(epoch))
    .bind(digest)
    .bind(signed(now_ms))
    .execute(&mut *conn)
    .await
    .map_err(KmsError::store("erase workspace key"))?;
    // What is left of disk and images is of no use to anyone.
    for forget in [
        "DELETE FROM anchor WHERE workspace = $1",
        "DELETE FROM image WHERE workspace = $1",
    ] {
        sqlx::query(forget)
            .bind(id.as_str())
            .execute(&mut *conn)
            .await
            .map_err(KmsError::store("forget disk and images"))?;
    }
    Ok(())
}

/// The logs' day seeds.
///
/// # Errors
/// The database's.
pub async fn log_keys(conn: &mut SqliteConnection) -> Result<Vec<LogKey>, KmsError> {
    sqlx::query("SELECT * FROM log_key ORDER BY class")
        .fetch_all(conn)
        .await
        .map_err(KmsError::store("read log keys"))?
        .iter()
        .map(|row| {
            Ok(LogKey {
                class: get(row, "class")?,
                first_day: number(row, "first_day")?,
                epoch: number(row, "epoch")?,
                wrapped: get(row, "wrapped")?,
            })
        })
        .collect()
}

/// Stores the day seeds of a log.
///
/// # Errors
/// The database's.
pub async fn log_key_put(conn: &mut SqliteConnection, k: &LogKey) -> Result<(), KmsError> {
    sqlx::query(
        "INSERT INTO log_key (class, first_day, epoch, wrapped) VALUES ($1, $2, $3, $4)
         ON CONFLICT (class) DO UPDATE SET first_day = excluded.first_day, epoch = excluded.epoch,
            wrapped = excluded.wrapped",
    )
    .bind(&k.class)
    .bind(i64::from(k.first_day))
    .bind(signed(k.epoch))
    .bind(&k.wrapped)
    .execute(conn)
    .await
    .map_err(KmsError::store("write log keys"))?;
    Ok(())
}

/// Adds an entry that waits for the log, within the transaction of the act it is about.
///
/// # Errors
/// The database's, or too many wait already.
pub async fn outbox_add(
    conn: &mut SqliteConnection,
    class: &str,
    entry: &str,
) -> Result<(), KmsError> {
    let done = sqlx::query(
        "INSERT INTO outbox (class, entry) SELECT $1, $2
         WHERE (SELECT COUNT(*) FROM outbox) < $3",
    )
    .bind(class)
    .bind(entry)
    .bind(OUTBOX_MAX)
    .execute(conn)
    .await
    .map_err(KmsError::store("fill outbox"))?;
    if done.rows_affected() == 0 {
        return Err(KmsError::Unseal(
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

fn account_of(row: &SqliteRow) -> Result<Account, KmsError> {
    Ok(Account {
        id: parsed(row, "id")?,
        version: number(row, "version")?,
        epoch: number(row, "epoch")?,
        wrapped: get(row, "wrapped")?,
        log_pub: get(row, "log_pub")?,
    })
}

fn workspace_of(row: &SqliteRow) -> Result<Workspace, KmsError> {
    Ok(Workspace {
        id: parsed(row, "id")?,
        account: parsed(row, "account")?,
        version: number(row, "version")?,
        account_version: number(row, "account_version")?,
        epoch: number(row, "epoch")?,
        wrapped: get(row, "wrapped")?,
        destroyed_ms: get::<Option<i64>>(row, "destroyed_ms")?
            .map(|ms| u64::try_from(ms).map_err(|_| damaged("destroyed_ms")))
            .transpose()?,
        record_digest: get(row, "record_digest")?,
        receipt: get(row, "receipt")?,
    })
}

fn get<'r, T>(row: &'r SqliteRow, column: &'static str) -> Result<T, KmsError>
where
    T: sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite>,
{
    row.try_get(column)
        .map_err(KmsError::store("read a column"))
}

fn number<N: TryFrom<i64>>(row: &SqliteRow, column: &'static str) -> Result<N, KmsError> {
    N::try_from(get::<i64>(row, column)?).map_err(|_| damaged(column))
}

fn parsed<T: std::str::FromStr>(row: &SqliteRow, column: &'static str) -> Result<T, KmsError> {
    get::<String>(row, column)?
        .parse()
        .map_err(|_| damaged(column))
}

fn damaged(column: &str) -> KmsError {
    KmsError::Damaged {
        operation: "read state.db",
        subject: column.to_owned(),
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
