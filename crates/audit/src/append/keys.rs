//! Public keys that entries are sealed to: one per class and day, one per account. The KMS
//! publishes them; their private halves never leave it.

use crate::limits::{ACCOUNT_KEYS_MAX, DAY_KEYS_FILE_MAX_BYTES, DAY_KEYS_MAX};
use anyhow::{Context as _, bail};
use model::AccountId;
use seal::hpke::PublicKey;
use serde::{Deserialize, Serialize};
use service::files::{read_bounded, write_atomic};
use std::collections::{BTreeMap, HashMap};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tlog::class::Class;

/// The keys, and where they are kept.
pub struct Keys {
    dir: PathBuf,
    days: BTreeMap<(Class, u32), PublicKey>,
    accounts: HashMap<AccountId, PublicKey>,
}

/// A day key as it is stored.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    class: Class,
    day: u32,
    public: PublicKey,
}

impl Keys {
    /// Reads the keys kept below `dir`, and makes the directories that are missing.
    ///
    /// # Errors
    /// The file and what is wrong with it.
    pub fn open(dir: &Path) -> anyhow::Result<Keys> {
        let mut keys = Keys {
            dir: dir.to_owned(),
            days: BTreeMap::new(),
            accounts: HashMap::new(),
        };
        let path = keys.days_path();
        match read_bounded(&path, DAY_KEYS_FILE_MAX_BYTES) {
            Ok(bytes) => {
                let stored: Vec<Stored> = serde_json::from_slice(&bytes).with_context(|| {
                    format!(
                        "{} is damaged; remove it, and the KMS publishes its keys again",
                        path.display()
                    )
                })?;
                keys.days = stored
                    .into_iter()
                    .map(|s| ((s.class, s.day), s.public))
                    .collect();
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        }
        let accounts = keys.accounts_dir();
        std::fs::create_dir_all(&accounts)
            .and_then(|()| std::fs::set_permissions(&accounts, Permissions::from_mode(0o700)))
            .with_context(|| format!("make {}", accounts.display()))?;
        for entry in std::fs::read_dir(&accounts)? {
            let entry = entry?;
            let name = entry.file_name();
            let Ok(account) = name.to_string_lossy().parse::<AccountId>() else {
                continue; // A temporary file of an interrupted write.
            };
            let bytes = read_bounded(&entry.path(), 64)?;
            let public = std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| PublicKey::from_hex(text).ok())
                .with_context(|| {
                    format!("{} holds no X25519 key; remove it", entry.path().display())
                })?;
            keys.accounts.insert(account, public);
        }
        Ok(keys)
    }

    /// The key of a class and day.
    #[must_use]
    pub fn day(&self, class: Class, day: u32) -> Option<PublicKey> {
        self.days.get(&(class, day)).copied()
    }

    /// An account's key.
    #[must_use]
    pub fn account(&self, account: &AccountId) -> Option<PublicKey> {
        self.accounts.get(account).copied()
    }

    /// Takes in day keys, durably; days before `today` but the last one are forgotten.
    ///
    /// # Errors
    /// Too many keys, or the file system's; nothing has changed then.
    pub fn days_set(
        &mut self,
        new: impl IntoIterator<Item = (Class, u32, PublicKey)>,
        today: u32,
    ) -> anyhow::Result<()> {
        let mut days = self.days.clone();
        days.extend(new.into_iter().map(|(class, day, key)| ((class, day), key)));
        days.retain(|(_, day), _| *day >= today.saturating_sub(1));
        if days.len() > DAY_KEYS_MAX {
            bail!("more than {DAY_KEYS_MAX} day keys; publish fewer days ahead");
        }
        if days == self.days {
            return Ok(());
        }
        let stored: Vec<Stored> = days
            .iter()
            .map(|((class, day), public)| Stored {
                class: *class,
                day: *day,
                public: *public,
            })
            .collect();
        let path = self.days_path();
        write_atomic(&path, &serde_json::to_vec(&stored)?, 0o600)
            .with_context(|| format!("write {}", path.display()))?;
        self.days = days;
        Ok(())
    }

    /// Takes in an account's key, durably.
    ///
    /// # Errors
    /// Too many accounts, or the file system's; nothing has changed then.
    pub fn account_set(&mut self, account: &AccountId, public: PublicKey) -> anyhow::Result<()> {
        if self.account(account) == Some(public) {
            return Ok(());
        }
        if self.accounts.len() >= ACCOUNT_KEYS_MAX && !self.accounts.contains_key(account) {
            bail!("more than {ACCOUNT_KEYS_MAX} accounts");
        }
        let path = self.accounts_dir().join(account.as_str());
        write_atomic(&path, public.to_hex().as_bytes(), 0o600)
            .with_context(|| format!("write {}", path.display()))?;
        self.accounts.insert(account.clone(), public);
        Ok(())
    }

    fn days_path(&self) -> PathBuf {
        self.dir.join("days.json")
    }

    fn accounts_dir(&self) -> PathBuf {
        self.dir.join("accounts")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::hpke::SecretKey;

    #[test]
    fn keys_are_kept_and_past_days_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let mut keys = Keys::open(dir.path()).unwrap();
        let public = SecretKey::generate().public();
        let account = AccountId::from_bytes([1; 8]);
        let new = (0..10).map(|day| (Class::Host, day, public));
        keys.days_set(new, 5).unwrap();
        keys.account_set(&account, public).unwrap();
        let too_many = (0..5_000).map(|day| (Class::Host, day, public));
        assert!(keys.days_set(too_many, 5).is_err());
        drop(keys);
        std::fs::write(dir.path().join("accounts/.acct_x.tmp"), "torn").unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        assert_eq!(keys.account(&account), Some(public));
        assert_eq!(keys.day(Class::Host, 4), Some(public));
        assert_eq!(keys.day(Class::Host, 3), None);
        assert_eq!(keys.day(Class::Api, 5), None);
        assert_eq!(keys.day(Class::Host, 10), None);
    }
}
