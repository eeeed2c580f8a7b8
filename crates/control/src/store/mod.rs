//! Workspaces and erasure receipts, in SQLite or PostgreSQL by one SQL text.
//!
//! A row is a few columns that are searched, and a JSON document. Each change is a
//! compare-and-swap on `generation`.
//!
//! Must never answer a client's question without its account in the `WHERE`.

mod erasure;
mod schema;
mod workspace;

pub use erasure::Erasure;
pub use workspace::{Archive, Deletion, Doc, Inserted, Life, Made, Snapshot, Stage, Workspace};

use anyhow::Context as _;
use api::{Error, ErrorCode};
use sqlx::any::AnyPoolOptions;
use sqlx::{AnyPool, Executor as _};
use std::path::Path;
use std::sync::Arc;
use tokio::sync::Mutex;

/// The store.
#[derive(Clone)]
pub struct Store {
    pool: AnyPool,
    /// Orders inserts, so that an account's limit holds on PostgreSQL too.
    inserting: Arc<Mutex<()>>,
}

impl Store {
    /// Opens the store and brings its schema up to date. `database` is `sqlite`, for a file in
    /// `dir`, or a `postgres://` URL.
    ///
    /// # Errors
    /// What could not be opened; never the URL, which may hold a password.
    pub async fn open(database: &str, dir: &Path) -> anyhow::Result<Self> {
        sqlx::any::install_default_drivers();
        let sqlite = database == "sqlite";
        let url = if sqlite {
            std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
            let file = dir.join("control.sqlite");
            format!("sqlite://{}?mode=rwc", file.display())
        } else {
            database.to_owned()
        };
        let pool = AnyPoolOptions::new()
            .max_connections(8)
            .after_connect(move |c, _| {
                Box::pin(async move {
                    if sqlite {
                        c.execute("PRAGMA journal_mode = WAL").await?;
                        c.execute("PRAGMA synchronous = FULL").await?;
                        c.execute("PRAGMA busy_timeout = 5000").await?;
                        // What is deleted is overwritten (SEE-5).
                        c.execute("PRAGMA secure_delete = ON").await?;
                    }
                    Ok(())
                })
            })
            .connect(&url)
            .await
            .map_err(|_| {
                anyhow::anyhow!("can't open the control database; see control.database")
            })?;
        schema::migrate(&pool)
            .await
            .context("migrate the control database")?;
        Ok(Self {
            pool,
            inserting: Arc::default(),
        })
    }

    /// Lets go of the database.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// A database error, for the operator; the client learns that it may try again.
fn failed(what: &'static str) -> impl Fn(sqlx::Error) -> Error {
    move |e| {
        Error::new(
            ErrorCode::Unavailable,
            "the control database does not answer; try again",
        )
        .detail(format!("{what}: {e}"))
    }
}

fn to_i64(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn to_u64(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}
