//! What the process says to the KMS about its disk, through processes that can't change it.

use api::context;
use api::kms::{Anchor, AnchorStatement};
use model::WorkspaceId;
use seal::kdf::hkdf;
use seal::secret::SecretBytes;

use super::Report;

/// Makes a disk's statements.
pub struct Witness {
    key: SecretBytes<32>,
    workspace: WorkspaceId,
}

impl Witness {
    /// The witness of a workspace's disk.
    #[must_use]
    pub fn new(disk_key: &[u8; 32], workspace: WorkspaceId) -> Self {
        let mut key = SecretBytes::<32>::zeroed();
        let salt = context::ANCHOR.as_bytes();
        hkdf(disk_key, salt, &[b"key"], key.expose_mut());
        Self { key, workspace }
    }

    /// States what [`super::Sidecar::anchor`] reported.
    #[must_use]
    pub fn statement(&self, report: &Report) -> AnchorStatement {
        let anchor = Anchor {
            run: report.generation.run,
            batch: report.generation.batch,
            root: hex::encode(report.root),
        };
        let covered = AnchorStatement::covered(&self.workspace, &anchor);
        let mac = seal::hash::hmac_sha256(self.key.expose(), &covered);
        AnchorStatement {
            workspace: self.workspace.clone(),
            anchor,
            mac: hex::encode(mac),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::layout::Generation;
    use super::*;

    #[test]
    fn a_statement_is_frozen() {
        // Recomputed with Python's hmac; the KMS has the same case.
        let report = Report {
            generation: Generation { run: 3, batch: 4 },
            root: [5; 32],
            refused: 0,
            first_refused: None,
        };
        let workspace = "ws_0000000000000001".parse().unwrap();
        let statement = Witness::new(&[7; 32], workspace).statement(&report);
        assert_eq!(
            statement.mac,
            "c67325aec22ce56e9bdedc6410dba03e7d6953722b56d05aad4cd71501859cac"
        );
    }
}
