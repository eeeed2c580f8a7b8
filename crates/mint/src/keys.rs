//! Mint's own keys: files of 32 random bytes, 0600, in secret memory while it runs.
//!
//! | file | for |
//! |---|---|
//! | `sign.key` | assertions, policies, token states (`mint.pub`) |
//! | `gateway.key` | gateway tokens (`gateway.pub`) |
//! | `raw.key` | raw connection tokens: nothing but a version of one is at rest |
//! | `pepper` | API keys are stored as HMAC under it |

use crate::error::MintError;
use api::mint::KeyMade;
use model::{KeyId, WorkspaceId};
use seal::hash::{hmac_sha256, sha256};
use seal::secret::SecretBytes;
use seal::sign::SigningKey;
use std::path::Path;

const API_KEY_LABEL: &[u8] = b"casemate/api-key/v1\0";
const RAW_LABEL: &[u8] = b"casemate/raw-token/v1\0";

/// Mint's own keys.
pub struct Keys {
    /// Signs assertions, policies and token states.
    pub sign: SigningKey,
    /// Signs gateway tokens.
    pub gateway: SigningKey,
    raw: SecretBytes<32>,
    pepper: SecretBytes<32>,
}

impl Keys {
    /// Reads the keys, making those that are missing.
    ///
    /// # Errors
    /// The file system's, or a file that is not 32 bytes.
    pub fn open(dir: &Path) -> Result<Self, MintError> {
        let read = |name: &str| {
            let path = dir.join(name);
            service::files::seed_or_create(&path).map_err(|source| MintError::Io {
                operation: "read or make key",
                path: path.display().to_string(),
                source,
            })
        };
        Ok(Self {
            sign: SigningKey::from_seed(read("sign.key")?.expose()),
            gateway: SigningKey::from_seed(read("gateway.key")?.expose()),
            raw: read("raw.key")?,
            pepper: read("pepper")?,
        })
    }

    /// A new API key, and what of it is stored.
    #[must_use]
    pub fn api_key_make(&self) -> (KeyMade, [u8; 32]) {
        let id = KeyId::from_bytes(seal::random::bytes());
        let secret = format!("sk_{}", hex::encode(seal::random::bytes::<32>()));
        let mac = self.api_key_mac(&id, &secret);
        (
            KeyMade {
                client_id: id,
                client_secret: secret,
            },
            mac,
        )
    }

    /// What is stored of an API key: HMAC under the pepper, bound to its id.
    #[must_use]
    pub fn api_key_mac(&self, id: &KeyId, secret: &str) -> [u8; 32] {
        let message = seal::Zeroizing::new(
            [
                API_KEY_LABEL,
                id.as_str().as_bytes(),
                b"\0",
                secret.as_bytes(),
            ]
            .concat(),
        );
        hmac_sha256(self.pepper.expose(), &message)
    }

    /// The raw connection token of a workspace at a version: 64 hex digits.
    #[must_use]
    pub fn raw_token(&self, workspace: &WorkspaceId, version: u64) -> seal::Zeroizing<String> {
        let id = workspace.as_str().as_bytes();
        let message = [RAW_LABEL, id, b"\0", &version.to_be_bytes()].concat();
        seal::Zeroizing::new(hex::encode(hmac_sha256(self.raw.expose(), &message)))
    }

    /// What verifiers know of a raw token: SHA-256 of its text, hex.
    #[must_use]
    pub fn raw_hash(&self, workspace: &WorkspaceId, version: u64) -> String {
        hex::encode(sha256(self.raw_token(workspace, version).as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn keys_persist_and_tokens_differ() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        let again = Keys::open(dir.path()).unwrap();
        let [a, b] = [1, 2].map(|n| WorkspaceId::from_bytes([n; 8]));
        assert_eq!(keys.raw_token(&a, 1), again.raw_token(&a, 1));
        assert_ne!(keys.raw_token(&a, 1), keys.raw_token(&a, 2));
        assert_ne!(keys.raw_token(&a, 1), keys.raw_token(&b, 1));
        assert_eq!(keys.raw_token(&a, 1).len(), 64);
        assert_eq!(
            keys.raw_hash(&a, 1),
            hex::encode(sha256(keys.raw_token(&a, 1).as_bytes()))
        );
        let (made, mac) = keys.api_key_make();
        assert!(made.client_secret.starts_with("sk_") && made.client_secret.len() == 67);
        assert_eq!(again.api_key_mac(&made.client_id, &made.client_secret), mac);
        let other = KeyId::from_bytes([9; 8]);
        assert_ne!(keys.api_key_mac(&other, &made.client_secret), mac);
    }
}
