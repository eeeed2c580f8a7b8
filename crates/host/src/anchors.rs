//! How far disks have got, on its way from their processes to the KMS.
//!
//! While a workspace runs, a statement that the KMS does not take is followed by a newer one. The
//! last one of a start has no successor: it is kept in a file until the KMS has it, so that a stop
//! goes through while the KMS is away. Statements are the disk process's word under a MAC; host
//! can hold one back, and change none.
//!
//! Must never keep a start or a stop from happening.

use crate::limits::{ANCHOR_MAX_BYTES, WORKSPACES_MAX};
use crate::peers::Peers;
use anyhow::Context as _;
use api::ErrorCode;
use api::disk::Anchored;
use api::kms::{Anchor, AnchorStatement};
use model::WorkspaceId;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Statements under way.
pub struct Anchors {
    peers: Peers,
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// What the KMS has.
    taken: HashMap<WorkspaceId, Anchor>,
    /// What it is to have, and is in a file.
    waiting: HashMap<WorkspaceId, AnchorStatement>,
    /// Reads that a running disk refused.
    refused: HashMap<WorkspaceId, u64>,
}

impl Anchors {
    /// Those that the host before this one kept in `dir`.
    ///
    /// # Errors
    /// The directory's.
    pub fn open(peers: Peers, dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let mut inner = Inner::default();
        let entries = std::fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
        for entry in entries.take(WORKSPACES_MAX) {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue; // A temporary file of an interrupted write.
            }
            match read(&path) {
                Ok(said) => {
                    inner.waiting.insert(said.workspace.clone(), said);
                }
                Err(e) => tracing::error!(path = %path.display(), error = %e, "unreadable"),
            }
        }
        Ok(Self {
            peers,
            dir: dir.into(),
            inner: Mutex::new(inner),
        })
    }

    /// Brings a statement of a disk that runs to the KMS; whether reads were refused since the
    /// one before.
    pub(crate) async fn carry(&self, said: Anchored) -> bool {
        let refused = self.refused(&said);
        let statement = said.statement;
        if self.lock().taken.get(&statement.workspace) != Some(&statement.anchor) {
            let _later = self.send(&statement).await;
        }
        refused
    }

    /// Brings the last statement of a start to the KMS, or keeps it until that can be.
    pub(crate) async fn carry_last(&self, said: Anchored) -> bool {
        let refused = self.refused(&said);
        let statement = said.statement;
        self.lock().refused.remove(&statement.workspace);
        if self.lock().taken.get(&statement.workspace) == Some(&statement.anchor)
            || self.send(&statement).await
        {
            return refused;
        }
        let path = self.path(&statement.workspace);
        let bytes = serde_json::to_vec(&statement).unwrap_or_default();
        let kept =
            tokio::task::spawn_blocking(move || service::files::write_atomic(&path, &bytes, 0o600));
        if !matches!(kept.await, Ok(Ok(()))) {
            tracing::error!(workspace = %statement.workspace, "a disk's last anchor is in memory only");
        }
        let id = statement.workspace.clone();
        self.lock().waiting.insert(id, statement);
        refused
    }

    /// Tries again what waits: all, or of one workspace.
    pub(crate) async fn flush(&self, only: Option<&WorkspaceId>) {
        let waiting: Vec<AnchorStatement> = {
            let inner = self.lock();
            let all = inner.waiting.values();
            all.filter(|s| only.is_none_or(|id| s.workspace == *id))
                .cloned()
                .collect()
        };
        for statement in waiting {
            if !self.send(&statement).await {
                return;
            }
        }
    }

    /// Forgets a workspace that is deleted.
    pub(crate) fn forget(&self, id: &WorkspaceId) {
        let mut inner = self.lock();
        inner.taken.remove(id);
        inner.refused.remove(id);
        inner.waiting.remove(id);
        drop(inner);
        // Left behind it would be refused by the KMS, and be gone then.
        let _ = std::fs::remove_file(self.path(id));
    }

    /// Statements that wait for the KMS.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Whether the KMS has decided about it: taken, or refused for good.
    async fn send(&self, statement: &AnchorStatement) -> bool {
        let id = &statement.workspace;
        match self.peers.anchor(statement).await {
            Ok(_) => {
                let anchor = statement.anchor.clone();
                self.lock().taken.insert(id.clone(), anchor);
            }
            Err(e) if is_final(e.code) => {
                tracing::error!(workspace = %id, error = %e, detail = e.detail, "the KMS refuses how far a disk has got");
            }
            Err(e) => {
                tracing::warn!(workspace = %id, error = %e, detail = e.detail, "how far a disk has got waits for the KMS");
                return false;
            }
        }
        let done = self.lock().waiting.remove(id).is_some();
        if done {
            // Sent twice it changes nothing.
            let _ = std::fs::remove_file(self.path(id));
        }
        true
    }

    fn refused(&self, said: &Anchored) -> bool {
        let id = &said.statement.workspace;
        let before = self.lock().refused.insert(id.clone(), said.refused);
        let news = said.refused > before.unwrap_or(0);
        if news {
            tracing::error!(
                event = "disk.tampered", workspace = %id, refused = said.refused,
                sector = said.first_refused, "reads of a running disk were refused"
            );
        }
        news
    }

    fn path(&self, id: &WorkspaceId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether asking again is of no use.
fn is_final(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::KeyRefused
            | ErrorCode::NotFound
            | ErrorCode::Conflict
            | ErrorCode::ValidationError
    )
}

fn read(path: &Path) -> anyhow::Result<AnchorStatement> {
    let bytes = service::files::read_bounded(path, ANCHOR_MAX_BYTES)?;
    Ok(serde_json::from_slice(&bytes)?)
}
