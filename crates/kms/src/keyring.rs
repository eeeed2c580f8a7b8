//! How keys hang together: epoch root > account key > workspace key > what is released.
//!
//! ```text
//! unseal secret ─┐
//!                ├─HKDF─▶ epoch root ─wraps─▶ account key ─wraps─▶ workspace key ─HKDF─▶ disk key
//! epoch secret ──┘            │ (of a slot)    (new in each epoch)                 └────▶ identity seed
//!                             └─wraps─▶ signing key, the log's day seeds
//! ```
//!
//! Each wrap is AES-256-GCM bound to its place (table, ids, versions, epoch), so a row that is
//! moved or kept from an older epoch does not open.

use crate::error::KmsError;
use model::{AccountId, Purpose, WorkspaceId};
use seal::secret::{SecretBuf, SecretBytes};
use seal::{aead, kdf};

/// A key of 32 bytes, in secret memory.
pub type Key = SecretBytes<32>;

const ROOT_SALT: &[u8] = b"casemate/kms/epoch-root/v1";
const WORKSPACE_SALT: &[u8] = b"casemate/kms/workspace/v1";
const LOG_SALT: &[u8] = b"casemate/kms/log/v1";

/// The root of an epoch: both secrets are needed, and either one destroyed ends it.
#[must_use]
pub fn epoch_root(unseal: &Key, epoch_secret: &Key, epoch: u64) -> Key {
    let mut both = SecretBytes::<64>::zeroed();
    both.expose_mut()[..32].copy_from_slice(unseal.expose());
    both.expose_mut()[32..].copy_from_slice(epoch_secret.expose());
    let mut root = Key::zeroed();
    kdf::hkdf(
        both.expose(),
        ROOT_SALT,
        &[&epoch.to_be_bytes()],
        root.expose_mut(),
    );
    root
}

/// The disk key (or another purpose's) of a workspace: never the workspace key itself.
#[must_use]
pub fn purpose_key(key: &Key, purpose: Purpose, object: &str, version: u32) -> Key {
    derive(
        key,
        &[
            b"purpose",
            purpose.label().as_bytes(),
            object.as_bytes(),
            &version.to_be_bytes(),
        ],
    )
}

/// The seed of a workspace's Ed25519 identity.
#[must_use]
pub fn identity_seed(key: &Key, workspace: &WorkspaceId) -> Key {
    derive(key, &[b"identity", workspace.as_str().as_bytes()])
}

/// The HPKE seed of an account's view of the log.
#[must_use]
pub fn account_log_key(seed: &Key) -> seal::hpke::SecretKey {
    let mut out = Key::zeroed();
    kdf::hkdf(seed.expose(), LOG_SALT, &[b"account"], out.expose_mut());
    seal::hpke::SecretKey::from_seed(out.expose())
}

fn derive(key: &Key, info: &[&[u8]]) -> Key {
    let mut out = Key::zeroed();
    kdf::hkdf(key.expose(), WORKSPACE_SALT, info, out.expose_mut());
    out
}

/// A place where a wrapped secret may stand; its text is the wrap's associated data.
#[derive(Debug, Clone)]
pub enum Place<'a> {
    /// An account's key and log seed, under the epoch root.
    Account {
        /// The account.
        account: &'a AccountId,
        /// Version of its key.
        version: u32,
        /// The epoch.
        epoch: u64,
    },
    /// A workspace's key, under its account's key.
    Workspace {
        /// The workspace.
        workspace: &'a WorkspaceId,
        /// Its account.
        account: &'a AccountId,
        /// Version of the workspace's key.
        version: u32,
        /// Version of the account's key above it.
        account_version: u32,
        /// The epoch.
        epoch: u64,
    },
    /// The signing key, under the epoch root.
    Sign {
        /// The epoch.
        epoch: u64,
    },
    /// The day seeds of a log, under the epoch root.
    Log {
        /// The log's class.
        class: &'a str,
        /// The day of the first seed.
        first_day: u32,
        /// The epoch.
        epoch: u64,
    },
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Ids and class names hold no `|`.
        match self {
            Self::Account {
                account,
                version,
                epoch,
            } => {
                write!(f, "account|{account}|{version}|{epoch}")
            }
            Self::Workspace {
                workspace,
                account,
                version,
                account_version,
                epoch,
            } => {
                write!(
                    f,
                    "workspace|{workspace}|{account}|{version}|{account_version}|{epoch}"
                )
            }
            Self::Sign { epoch } => write!(f, "sign|{epoch}"),
            Self::Log {
                class,
                first_day,
                epoch,
            } => write!(f, "log|{class}|{first_day}|{epoch}"),
        }
    }
}

impl Place<'_> {
    fn aad(&self) -> Vec<u8> {
        format!("casemate/kms/v1|{self}").into_bytes()
    }

    /// Wraps `secret` for this place.
    #[must_use]
    pub fn wrap(&self, under: &Key, secret: &[u8]) -> Vec<u8> {
        aead::seal(under.expose(), &self.aad(), secret)
    }

    /// Unwraps what stands at this place.
    ///
    /// # Errors
    /// [`KmsError::Wrapped`] if it was not wrapped for this very place under this key.
    pub fn unwrap(&self, under: &Key, blob: &[u8]) -> Result<SecretBuf, KmsError> {
        let plain = aead::open(under.expose(), &self.aad(), blob).map_err(|_| self.wrong())?;
        let mut out = SecretBuf::new(plain.len());
        out.expose_mut().copy_from_slice(&plain);
        Ok(out)
    }

    /// Unwraps a secret of `N` bytes.
    ///
    /// # Errors
    /// As [`Place::unwrap`], and for another length.
    pub fn unwrap_bytes<const N: usize>(
        &self,
        under: &Key,
        blob: &[u8],
    ) -> Result<SecretBytes<N>, KmsError> {
        SecretBytes::from_slice(self.unwrap(under, blob)?.expose()).ok_or_else(|| self.wrong())
    }

    fn wrong(&self) -> KmsError {
        KmsError::Wrapped {
            subject: self.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn key(n: u8) -> Key {
        Key::take(&mut [n; 32])
    }

    #[test]
    fn derivations_are_frozen() {
        // Recomputed with Python's hmac. Changing one makes every disk unreadable: only with a new label and a migration.
        let ws: WorkspaceId = "ws_0000000000000001".parse().unwrap();
        expect_test::expect!["93a84d254d46fddb21e539d69bf7c4cbc927424b9a3fa5923a26bc9e0c0da947"]
            .assert_eq(&hex::encode(epoch_root(&key(1), &key(2), 3).expose()));
        expect_test::expect!["70e78430e5e65b334e399d26d6660d2d5d0cff7a9f3e6624c12af6f8a9770ef4"]
            .assert_eq(&hex::encode(
                purpose_key(&key(1), Purpose::Disk, ws.as_str(), 1).expose(),
            ));
        let labels = Purpose::ALL.map(Purpose::label);
        assert_eq!(
            labels,
            [
                "disk",
                "memory",
                "snapshot-disk",
                "snapshot-memory",
                "archive"
            ]
        );
        expect_test::expect!["bc12e64019cf2d87040909c1dc1322459657309135a32fa188ee0d02cf9a4513"]
            .assert_eq(&hex::encode(identity_seed(&key(1), &ws).expose()));
    }

    #[test]
    fn both_secrets_and_the_number_make_the_root() {
        let root = epoch_root(&key(1), &key(2), 3);
        assert_ne!(root, epoch_root(&key(9), &key(2), 3));
        assert_ne!(root, epoch_root(&key(1), &key(9), 3));
        assert_ne!(root, epoch_root(&key(1), &key(2), 4));
        assert_ne!(root, epoch_root(&key(2), &key(1), 3));
    }

    proptest! {
        #[test]
        fn a_wrap_opens_only_at_its_place(
            a: [u8; 8], b: [u8; 8], v in 0u32..9, e in 0u64..9, dv in 0u32..3, de in 0u64..3,
        ) {
            let (acct, other) = (AccountId::from_bytes(a), AccountId::from_bytes(b));
            let ws = WorkspaceId::from_bytes(a);
            let place = Place::Workspace {
                workspace: &ws, account: &acct, version: v, account_version: v, epoch: e,
            };
            let blob = place.wrap(&key(1), &[7; 32]);
            let same = a == b && dv == 0 && de == 0;
            let ws2 = WorkspaceId::from_bytes(b);
            let moved = Place::Workspace {
                workspace: &ws2, account: &other, version: v + dv, account_version: v, epoch: e + de,
            };
            prop_assert_eq!(moved.unwrap(&key(1), &blob).is_ok(), same);
            prop_assert!(place.unwrap(&key(2), &blob).is_err());
            prop_assert!(place.unwrap_bytes::<31>(&key(1), &blob).is_err());
            let table = Place::Account { account: &acct, version: v, epoch: e };
            prop_assert!(table.unwrap(&key(1), &blob).is_err());
        }
    }
}
