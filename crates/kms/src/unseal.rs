//! The unseal secret: beside the ciphertext (`file`, a first run) or from a passphrase.
//!
//! `unseal.json` says which; it holds salt and a check value, never the secret.

use crate::error::KmsError;
use crate::keyring::Key;
use crate::limits::PASSPHRASE_BYTES;
use api::kms::Unseal;
use seal::{hash, kdf};
use serde::{Deserialize, Serialize};
use service::files::{read_bounded, write_atomic};
use std::path::Path;

const FILE: &str = "unseal.json";
const KEY_FILE: &str = "unseal.key";
const CHECK_LABEL: &[u8] = b"casemate/kms/unseal-check/v1";
const VERSION: u32 = 1;

/// How this KMS is unsealed, as stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Means {
    v: u32,
    /// File or passphrase.
    pub kind: Unseal,
    /// Argon2id salt, 16 bytes, hex; empty for a file.
    salt: String,
    /// First 16 bytes of HMAC(secret, label), hex: tells a wrong passphrase from damaged state.
    check: String,
}

impl Means {
    /// Makes the unseal secret and stores how to come by it.
    ///
    /// # Errors
    /// The file system's, or a passphrase out of bounds.
    pub fn create(dir: &Path, passphrase: Option<&[u8]>) -> Result<Key, KmsError> {
        let (kind, salt, secret) = match passphrase {
            None => {
                let secret = Key::random();
                let path = dir.join(KEY_FILE);
                write_atomic(&path, secret.expose(), 0o600)
                    .map_err(KmsError::io("write", &path))?;
                (Unseal::File, Vec::new(), secret)
            }
            Some(text) => {
                let salt = seal::random::bytes::<16>();
                (Unseal::Passphrase, salt.to_vec(), stretch(text, &salt)?)
            }
        };
        let means = Self {
            v: VERSION,
            kind,
            salt: hex::encode(salt),
            check: check(&secret),
        };
        let path = dir.join(FILE);
        let text = serde_json::to_vec(&means).map_err(|_| KmsError::Unseal("can't be written"))?;
        write_atomic(&path, &text, 0o600).map_err(KmsError::io("write", &path))?;
        Ok(secret)
    }

    /// Reads how this KMS is unsealed.
    ///
    /// # Errors
    /// The file system's, or a file that is not ours.
    pub fn load(dir: &Path) -> Result<Self, KmsError> {
        let path = dir.join(FILE);
        let text = read_bounded(&path, 4_096).map_err(KmsError::io("read", &path))?;
        let means: Self = serde_json::from_slice(&text)
            .map_err(|_| KmsError::Unseal("unseal.json is malformed; restore it"))?;
        if means.v != VERSION {
            return Err(KmsError::Unseal("unseal.json is of a newer version"));
        }
        Ok(means)
    }

    /// The secret in the file.
    ///
    /// # Errors
    /// The file system's, or a file that does not fit `unseal.json`.
    pub fn from_file(&self, dir: &Path) -> Result<Key, KmsError> {
        let path = dir.join(KEY_FILE);
        let bytes = read_bounded(&path, 32).map_err(KmsError::io("read", &path))?;
        let bytes = seal::Zeroizing::new(bytes);
        let secret = Key::from_slice(&bytes).ok_or(KmsError::Unseal(
            "unseal.key must hold 32 bytes; restore it",
        ))?;
        self.checked(
            secret,
            "unseal.key is not the one of this state; restore it",
        )
    }

    /// The secret of a passphrase; takes about 0.2 s of a core, so call it off the runtime.
    ///
    /// # Errors
    /// [`KmsError::Unseal`] if it is wrong.
    pub fn from_passphrase(&self, text: &[u8]) -> Result<Key, KmsError> {
        if self.kind != Unseal::Passphrase {
            return Err(KmsError::Unseal(
                "this KMS is unsealed by its file, not by a passphrase",
            ));
        }
        let salt = hex::decode(&self.salt)
            .ok()
            .filter(|s| s.len() == 16)
            .ok_or(KmsError::Unseal("unseal.json is malformed; restore it"))?;
        self.checked(stretch(text, &salt)?, "the passphrase is wrong")
    }

    fn checked(&self, secret: Key, otherwise: &'static str) -> Result<Key, KmsError> {
        if hash::ct_eq(check(&secret).as_bytes(), self.check.as_bytes()) {
            Ok(secret)
        } else {
            Err(KmsError::Unseal(otherwise))
        }
    }
}

fn stretch(text: &[u8], salt: &[u8]) -> Result<Key, KmsError> {
    if !PASSPHRASE_BYTES.contains(&text.len()) {
        return Err(KmsError::Unseal("a passphrase has 12 to 1024 bytes"));
    }
    let mut out = Key::zeroed();
    kdf::argon2id(text, salt, out.expose_mut());
    Ok(out)
}

fn check(secret: &Key) -> String {
    hex::encode(&hash::hmac_sha256(secret.expose(), CHECK_LABEL)[..16])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_passphrase_comes_back_and_a_wrong_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let secret = Means::create(dir.path(), Some(b"correct horse battery")).unwrap();
        let means = Means::load(dir.path()).unwrap();
        assert_eq!(
            means.from_passphrase(b"correct horse battery").unwrap(),
            secret
        );
        for wrong in [&b"correct horse batterz"[..], b"", b"short", &[b'x'; 2_000]] {
            assert!(means.from_passphrase(wrong).is_err());
        }
        assert!(means.from_file(dir.path()).is_err());
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(!text.contains(&hex::encode(secret.expose())));
    }

    #[test]
    fn a_foreign_key_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let secret = Means::create(dir.path(), None).unwrap();
        let means = Means::load(dir.path()).unwrap();
        assert_eq!(means.from_file(dir.path()).unwrap(), secret);
        assert!(means.from_passphrase(b"correct horse battery").is_err());
        std::fs::write(dir.path().join(KEY_FILE), [1; 32]).unwrap();
        assert!(means.from_file(dir.path()).is_err());
        std::fs::write(dir.path().join(FILE), "{\"v\":1}").unwrap();
        assert!(Means::load(dir.path()).is_err());
    }
}
