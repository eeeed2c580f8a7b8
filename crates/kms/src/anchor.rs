//! How far each disk has got: the least state of it that may be opened again.
//!
//! ```text
//! disk process ─statement, MAC─▶ warden ─▶ host ─▶ here: newer? ─▶ store ─▶ the next grant
//! ```
//!
//! A statement comes through processes that are not believed: only its MAC counts, under a key
//! that the disk process and the KMS alone derive. It can be held back, which costs protection for
//! the time since the last one, and repeated, which changes nothing. Must never go back, or take
//! two states for one generation: that is a copy of a disk that lived twice.

use crate::check::Refusal;
use crate::keyring::{Key, purpose_key};
use crate::kms::{Call, Inner};
use api::context;
use api::kms::{Anchor, AnchorStatement};
use model::Purpose;
use seal::kdf;

impl Inner {
    pub(crate) async fn anchor(
        &self,
        call: &Call,
        statement: &AnchorStatement,
    ) -> api::Result<Anchor> {
        let ring = self.ring()?;
        let AnchorStatement {
            workspace, anchor, ..
        } = statement;
        let (key, w) = match self.workspace_key(&ring, workspace, None).await? {
            Ok(found) => found,
            Err(r) => return Err(self.refuse(call, r, Some(workspace)).await),
        };
        let disk_key = purpose_key(&key, Purpose::Disk, workspace.as_str(), w.version);
        if !is_by(&disk_key, statement) {
            return Err(self.refuse(call, Refusal::Anchor, Some(workspace)).await);
        }
        // SQLite's numbers are signed.
        if anchor.run > i64::MAX as u64 || anchor.batch > i64::MAX as u64 {
            return Err(self.refuse(call, Refusal::Bounds, Some(workspace)).await);
        }
        self.store
            .anchor_raise(workspace, anchor, self.now_ms())
            .await?;
        let now = self.store.anchor(workspace).await?;
        match now {
            Some(now) if (now.run, now.batch) == (anchor.run, anchor.batch) && now != *anchor => {
                Err(self.refuse(call, Refusal::Anchor, Some(workspace)).await)
            }
            Some(now) => Ok(now),
            // Destroyed meanwhile.
            None => Err(self.refuse(call, Refusal::Destroyed, Some(workspace)).await),
        }
    }
}

/// The key of a disk's statements.
pub(crate) fn anchor_key(disk_key: &Key) -> Key {
    let mut key = Key::zeroed();
    kdf::hkdf(
        disk_key.expose(),
        context::ANCHOR.as_bytes(),
        &[b"key"],
        key.expose_mut(),
    );
    key
}

/// Whether the disk's process made the statement.
fn is_by(disk_key: &Key, statement: &AnchorStatement) -> bool {
    let covered = AnchorStatement::covered(&statement.workspace, &statement.anchor);
    let mac = seal::hash::hmac_sha256(anchor_key(disk_key).expose(), &covered);
    let root_is_hex = statement.anchor.root.len() == 64
        && statement
            .anchor
            .root
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    root_is_hex && seal::hash::ct_eq(hex::encode(mac).as_bytes(), statement.mac.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_statement_is_frozen() {
        // Recomputed with Python's hmac; the disk process has the same case.
        let statement = AnchorStatement {
            workspace: "ws_0000000000000001".parse().unwrap(),
            anchor: Anchor {
                run: 3,
                batch: 4,
                root: "05".repeat(32),
            },
            mac: "c67325aec22ce56e9bdedc6410dba03e7d6953722b56d05aad4cd71501859cac".into(),
        };
        assert!(is_by(&Key::take(&mut [7; 32]), &statement));
        assert!(!is_by(&Key::take(&mut [8; 32]), &statement));
    }
}
