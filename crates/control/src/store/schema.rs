//! The schema, as steps that are each done once.

use sqlx::{AnyPool, Executor as _, Row as _};

/// The steps, in order; never change one that was released.
const STEPS: &[&[&str]] = &[&[
    "CREATE TABLE workspaces (
        id TEXT PRIMARY KEY,
        account TEXT NOT NULL,
        slug TEXT,
        idempotency_key TEXT,
        generation BIGINT NOT NULL,
        created_ms BIGINT NOT NULL,
        doc TEXT NOT NULL,
        UNIQUE (account, slug),
        UNIQUE (account, idempotency_key)
    )",
    "CREATE TABLE erasures (
        workspace TEXT PRIMARY KEY,
        account TEXT NOT NULL,
        receipt TEXT NOT NULL,
        time_ms BIGINT NOT NULL
    )",
]];

/// Brings the schema up to date.
pub(super) async fn migrate(pool: &AnyPool) -> anyhow::Result<()> {
    pool.execute("CREATE TABLE IF NOT EXISTS casemate_schema (version BIGINT PRIMARY KEY)")
        .await?;
    let row = sqlx::query("SELECT COALESCE(MAX(version), 0) AS version FROM casemate_schema")
        .fetch_one(pool)
        .await?;
    let done = usize::try_from(row.try_get::<i64, _>("version")?)?;
    anyhow::ensure!(
        done <= STEPS.len(),
        "the database is of a newer version ({done}) than this program ({})",
        STEPS.len()
    );
    for (step, statements) in STEPS.iter().enumerate().skip(done) {
        let mut tx = pool.begin().await?;
        for statement in *statements {
            tx.execute(*statement).await?;
        }
        sqlx::query("INSERT INTO casemate_schema (version) VALUES ($1)")
            .bind(i64::try_from(step + 1)?)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    Ok(())
}
