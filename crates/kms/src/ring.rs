//! The keys of an unsealed KMS, in secret memory only.
//!
//! The roots of at most two epochs are held at once: during a rotation a row may be of either, and
//! the row says which. So releases go on while everything is re-wrapped, and none fails.

use crate::error::KmsError;
use crate::keyring::{Key, Place};
use crate::limits::ACCOUNT_CACHE_MAX;
use crate::store::{Account, Workspace};
use api::audit::Class;
use model::AccountId;
use seal::secret::{SecretBuf, SecretBytes};
use seal::sign::SigningKey;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// The keys of an unsealed KMS.
pub struct Ring {
    unseal: Key,
    /// Signs identity statements and erasure receipts.
    pub sign: SigningKey,
    /// The log index of this run's first entry; older intents release nothing.
    pub floor: u64,
    roots: RwLock<Vec<(u64, Arc<Key>)>>,
    accounts: Mutex<HashMap<(AccountId, u32), Arc<Key>>>,
    days: RwLock<BTreeMap<&'static str, Arc<DaySeeds>>>,
}

/// The day seeds of one log: one independent 32-byte seed a day.
pub struct DaySeeds {
    /// The day of the first seed.
    pub first_day: u32,
    /// The seeds, one after the other.
    pub seeds: SecretBuf,
}

impl DaySeeds {
    /// The key that entries of `day` are wrapped to.
    #[must_use]
    pub fn key(&self, day: u32) -> Option<seal::hpke::SecretKey> {
        let n = usize::try_from(day.checked_sub(self.first_day)?).ok()?;
        let seed = self
            .seeds
            .expose()
            .get(n.checked_mul(32)?..)?
            .first_chunk::<32>()?;
        Some(seal::hpke::SecretKey::from_seed(seed))
    }

    /// The first day without a seed.
    #[must_use]
    pub fn end_day(&self) -> u32 {
        self.first_day + u32::try_from(self.seeds.expose().len() / 32).unwrap_or(u32::MAX)
    }

    /// The same with seeds up to `end_day`.
    #[must_use]
    pub fn extended(&self, end_day: u32) -> Self {
        let have = self.seeds.expose().len();
        let more = usize::try_from(end_day.saturating_sub(self.end_day())).unwrap_or(0) * 32;
        let mut seeds = SecretBuf::new(have + more);
        seeds.expose_mut()[..have].copy_from_slice(self.seeds.expose());
        seal::random::fill(&mut seeds.expose_mut()[have..]);
        Self {
            first_day: self.first_day,
            seeds,
        }
    }
}

impl Ring {
    /// A ring with the epoch in force.
    #[must_use]
    pub fn new(unseal: Key, sign: SigningKey, epoch: u64, root: Key) -> Self {
        Self {
            unseal,
            sign,
            floor: u64::MAX,
            roots: RwLock::new(vec![(epoch, Arc::new(root))]),
            accounts: Mutex::default(),
            days: RwLock::default(),
        }
    }

    /// The unseal secret, for the root of the next epoch.
    #[must_use]
    pub fn unseal(&self) -> &Key {
        &self.unseal
    }

    /// The root of an epoch, if it is held.
    #[must_use]
    pub fn root(&self, epoch: u64) -> Option<Arc<Key>> {
        let roots = self.roots.read().unwrap_or_else(PoisonError::into_inner);
        roots
            .iter()
            .find(|(e, _)| *e == epoch)
            .map(|(_, root)| Arc::clone(root))
    }

    /// Holds the root of a coming epoch beside the one in force.
    pub fn root_add(&self, epoch: u64, root: Key) {
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        roots.retain(|(e, _)| *e != epoch);
        roots.push((epoch, Arc::new(root)));
    }

    /// Forgets every epoch but this one, and every key that was unwrapped under another.
    pub fn retain(&self, epoch: u64) {
        let mut roots = self.roots.write().unwrap_or_else(PoisonError::into_inner);
        roots.retain(|(e, _)| *e == epoch);
        self.accounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The key of a living workspace; `None` if its epoch is not held any more: the row is old,
    /// read it again.
    ///
    /// # Errors
    /// [`KmsError::Wrapped`] if the row is not at its place.
    pub fn workspace_key(&self, w: &Workspace, a: &Account) -> Result<Option<Key>, KmsError> {
        let Some(root) = self.root(a.epoch) else {
            return Ok(None);
        };
        let place = Place::Workspace {
            workspace: &w.id,
            account: &w.account,
            version: w.version,
            account_version: w.account_version,
            epoch: w.epoch,
        };
        let wrapped = w
            .wrapped
            .as_deref()
            .filter(|_| w.account == a.id && w.epoch == a.epoch && w.account_version == a.version);
        let Some(wrapped) = wrapped else {
            return Err(KmsError::Wrapped {
                subject: place.to_string(),
            });
        };
        let key = self.account_key(a, &root)?;
        place.unwrap_bytes(&key, wrapped).map(Some)
    }

    /// The days of a log.
    #[must_use]
    pub fn days(&self, class: Class) -> Option<Arc<DaySeeds>> {
        let days = self.days.read().unwrap_or_else(PoisonError::into_inner);
        days.get(class.name()).cloned()
    }

    /// Holds the days of a log.
    pub fn days_put(&self, class: Class, seeds: DaySeeds) {
        let mut days = self.days.write().unwrap_or_else(PoisonError::into_inner);
        days.insert(class.name(), Arc::new(seeds));
    }

    fn account_key(&self, a: &Account, root: &Key) -> Result<Arc<Key>, KmsError> {
        let at = (a.id.clone(), a.version);
        let lock = || self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(key) = lock().get(&at) {
            return Ok(Arc::clone(key));
        }
        let (key, _) = account_unwrap(a, root)?;
        let key = Arc::new(key);
        let mut cache = lock();
        if cache.len() >= ACCOUNT_CACHE_MAX {
            cache.clear();
        }
        cache.insert(at, Arc::clone(&key));
        Ok(key)
    }
}

/// An account's key and log seed.
///
/// # Errors
/// [`KmsError::Wrapped`] if the row is not at its place.
pub fn account_unwrap(a: &Account, root: &Key) -> Result<(Key, Key), KmsError> {
    let place = Place::Account {
        account: &a.id,
        version: a.version,
        epoch: a.epoch,
    };
    let both: SecretBytes<64> = place.unwrap_bytes(root, &a.wrapped)?;
    let (mut key, mut seed) = (Key::zeroed(), Key::zeroed());
    key.expose_mut().copy_from_slice(&both.expose()[..32]);
    seed.expose_mut().copy_from_slice(&both.expose()[32..]);
    Ok((key, seed))
}

/// Wraps an account's key and log seed for version and epoch.
#[must_use]
pub fn account_wrap(
    id: &AccountId,
    version: u32,
    epoch: u64,
    root: &Key,
    key: &Key,
    seed: &Key,
) -> Vec<u8> {
    let mut both = SecretBytes::<64>::zeroed();
    both.expose_mut()[..32].copy_from_slice(key.expose());
    both.expose_mut()[32..].copy_from_slice(seed.expose());
    Place::Account {
        account: id,
        version,
        epoch,
    }
    .wrap(root, both.expose())
}
