//! The desired states on disk: one file per workspace, written beside, synced and renamed.
//!
//! Must never hold a lease: one lives for seconds, is used once, and a host that restarts asks
//! for another.

use crate::limits::{DESIRED_MAX_BYTES, WORKSPACES_MAX};
use anyhow::Context as _;
use api::host::Desired;
use model::WorkspaceId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;

/// The directory of desired states.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    casemate_desired: u32,
    desired: Desired,
}

impl Store {
    /// Opens the directory, making it if it is missing.
    ///
    /// # Errors
    /// The directory and the system's error.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(Self { dir: dir.into() })
    }

    /// All desired states. A file that can't be read is named in the log and left where it is:
    /// control pushes that workspace again.
    ///
    /// # Errors
    /// The directory's.
    pub fn load(&self) -> anyhow::Result<Vec<Desired>> {
        let mut all = Vec::new();
        let dir =
            std::fs::read_dir(&self.dir).with_context(|| format!("read {}", self.dir.display()))?;
        for entry in dir.take(WORKSPACES_MAX) {
            let path = entry?.path();
            let Some(id) = path
                .file_name()
                .and_then(|n| n.to_str())
                .and_then(|n| n.strip_suffix(".json"))
                .and_then(|n| n.parse::<WorkspaceId>().ok())
            else {
                continue; // A temporary file of an interrupted write.
            };
            match read(&path) {
                Ok(desired) if desired.workspace == id => all.push(desired),
                Ok(_) => tracing::error!(path = %path.display(), "is of another workspace"),
                Err(e) => tracing::error!(path = %path.display(), error = %e, "unreadable"),
            }
        }
        Ok(all)
    }

    /// Writes a desired state; durable when it returns.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&self, desired: &Desired) -> std::io::Result<()> {
        let file = File {
            casemate_desired: VERSION,
            desired: Desired {
                lease: None,
                start: None,
                archive: None,
                ..desired.clone()
            },
        };
        let bytes = serde_json::to_vec(&file)?;
        service::files::write_atomic(&self.path(&desired.workspace), &bytes, 0o600)
    }

    /// Forgets a workspace; idempotent.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, workspace: &WorkspaceId) -> std::io::Result<()> {
        match std::fs::remove_file(self.path(workspace)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => service::files::sync_dir(&self.dir),
        }
    }

    fn path(&self, workspace: &WorkspaceId) -> PathBuf {
        self.dir.join(format!("{workspace}.json"))
    }
}

fn read(path: &Path) -> anyhow::Result<Desired> {
    let bytes = service::files::read_bounded(path, DESIRED_MAX_BYTES)?;
    let file: File = serde_json::from_slice(&bytes)?;
    anyhow::ensure!(
        file.casemate_desired == VERSION,
        "version {} is not known here, {VERSION} is",
        file.casemate_desired
    );
    Ok(file.desired)
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use model::{Power, Resources};
    use proptest::prelude::*;

    pub(crate) fn desired(n: u8, power: Power) -> Desired {
        Desired {
            workspace: WorkspaceId::from_bytes([n; 8]),
            generation: 1,
            power,
            image: "ab".repeat(32),
            resources: Resources::default(),
            disk_bytes_per_s: 1 << 30,
            disk_ops_per_s: 1_000,
            net_rates: api::warden::NetRates::default(),
            pids: 0,
            config: "{}".into(),
            public_access: false,
            ingress_ports: vec![],
            wakes: false,
            archive: None,
            archives: Vec::new(),
            snapshot: None,
            snapshot_next: None,
            lease: Some(serde_json::json!({"secretish": 1})),
            start: None,
            token_state: "v1.x".into(),
        }
    }

    #[test]
    fn what_is_put_is_loaded_without_its_lease() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.put(&desired(1, Power::Running)).unwrap();
        store.put(&desired(2, Power::Stopped)).unwrap();
        store.remove(&desired(2, Power::Stopped).workspace).unwrap();
        store.remove(&desired(2, Power::Stopped).workspace).unwrap();
        let all = store.load().unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].power, Power::Running);
        assert!(all[0].lease.is_none());
        let text = std::fs::read_to_string(store.path(&all[0].workspace)).unwrap();
        assert!(!text.contains("secretish"));
    }

    #[test]
    fn a_file_of_another_workspace_or_version_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let d = desired(1, Power::Running);
        store.put(&d).unwrap();
        let bytes = std::fs::read(store.path(&d.workspace)).unwrap();
        std::fs::write(store.path(&WorkspaceId::from_bytes([9; 8])), &bytes).unwrap();
        let future = String::from_utf8(bytes)
            .unwrap()
            .replace("desired\":1", "desired\":2");
        std::fs::write(store.path(&d.workspace), future).unwrap();
        assert!(store.load().unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            std::fs::write(&path, bytes).unwrap();
            prop_assert!(read(&path).is_err());
        }
    }
}
