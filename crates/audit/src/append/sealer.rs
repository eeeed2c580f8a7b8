//! Seals payloads under batch keys, each wrapped to its class and day and to its account.
//!
//! A batch key serves one account for at most 256 entries or 10 seconds, so that the wrapping is
//! off the hot path. Batch keys exist in memory only.
//!
//! Must never keep a batch key beyond its life, or a payload.

use super::keys::Keys;
use crate::limits::{BATCH_KEY_ENTRIES_MAX, BATCH_KEY_LIFE, BATCH_KEYS_MAX, SEGMENT_TAGS_MAX};
use model::AccountId;
use seal::hpke::{self, PublicKey};
use seal::secret::SecretBytes;
use std::collections::HashMap;
use std::time::Instant;
use tlog::class::Class;
use tlog::leaf::{LeafError, Opening};

/// The sealer of one class.
pub struct Sealer {
    class: Class,
    batches: HashMap<Option<AccountId>, BatchKey>,
}

/// What sealing makes of a payload: the fields of a leaf.
pub struct Sealed {
    /// The batch key, wrapped to the class and day.
    pub wrap_class: Vec<u8>,
    /// The batch key, wrapped to the account; empty if there is none, or it has no key yet.
    pub wrap_account: Vec<u8>,
    /// Nonce, salt and payload, tag.
    pub sealed: Vec<u8>,
}

/// Why a payload was not sealed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealRefused {
    /// The KMS has not published the key of this day.
    #[error("no key for entries of day {0}: the KMS is sealed, or was so for too long")]
    NoDayKey(u32),
    /// A segment's start could not carry another account's number.
    #[error("the log numbers the entries of {SEGMENT_TAGS_MAX} accounts; it takes no further one")]
    Accounts,
    /// The payload does not fit.
    #[error("{0}")]
    Leaf(#[from] LeafError),
}

struct BatchKey {
    key: SecretBytes<32>,
    to_class: PublicKey,
    to_account: Option<PublicKey>,
    wrap_class: Vec<u8>,
    wrap_account: Vec<u8>,
    uses: u32,
    born: Instant,
}

impl Sealer {
    /// A sealer without keys.
    #[must_use]
    pub fn new(class: Class) -> Sealer {
        Sealer {
            class,
            batches: HashMap::new(),
        }
    }

    /// Seals an entry of `day` that concerns `account`.
    ///
    /// # Errors
    /// [`SealRefused`] without the day's key, or when the payload is too long.
    pub fn seal(
        &mut self,
        keys: &Keys,
        account: Option<&AccountId>,
        day: u32,
        opening: &Opening,
        now: Instant,
    ) -> Result<Sealed, SealRefused> {
        let to_class = keys
            .day(self.class, day)
            .ok_or(SealRefused::NoDayKey(day))?;
        let to_account = account.and_then(|a| keys.account(a));
        let plaintext = seal::Zeroizing::new(opening.plaintext()?);
        let slot = account.cloned();
        let fits = |b: &BatchKey| {
            b.uses < BATCH_KEY_ENTRIES_MAX
                && now.duration_since(b.born) < BATCH_KEY_LIFE
                && (b.to_class, b.to_account) == (to_class, to_account)
        };
        if !self.batches.get(&slot).is_some_and(fits) {
            if self.batches.len() >= BATCH_KEYS_MAX {
                self.batches.clear();
            }
            self.batches
                .insert(slot.clone(), BatchKey::new(to_class, to_account, now));
        }
        let batch = self
            .batches
            .get_mut(&slot)
            .expect("it fits, or was made above");
        batch.uses += 1;
        Ok(Sealed {
            wrap_class: batch.wrap_class.clone(),
            wrap_account: batch.wrap_account.clone(),
            sealed: seal::aead::seal(batch.key.expose(), &[], &plaintext),
        })
    }

    /// Forgets the keys whose life is over.
    pub fn purge(&mut self, now: Instant) {
        self.batches
            .retain(|_, b| now.duration_since(b.born) < BATCH_KEY_LIFE);
    }
}

impl BatchKey {
    fn new(to_class: PublicKey, to_account: Option<PublicKey>, now: Instant) -> BatchKey {
        let key = SecretBytes::<32>::random();
        let wrap = |to: &PublicKey, info: &str| hpke::seal(to, info.as_bytes(), &[], key.expose());
        BatchKey {
            wrap_class: wrap(&to_class, api::context::LOG_CLASS),
            wrap_account: to_account
                .as_ref()
                .map(|to| wrap(to, api::context::LOG_ACCOUNT))
                .unwrap_or_default(),
            key,
            to_class,
            to_account,
            uses: 0,
            born: now,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::hpke::SecretKey;

    #[test]
    fn batch_keys_serve_one_account_for_a_while_and_open_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let mut keys = Keys::open(dir.path()).unwrap();
        let (day_key, account_key) = (SecretKey::generate(), SecretKey::generate());
        let account = AccountId::from_bytes([1; 8]);
        let mut sealer = Sealer::new(Class::Host);
        let now = Instant::now();
        let opening = Opening {
            salt: [7; 32],
            payload: b"what was done".to_vec(),
        };
        let mut seal = |keys: &Keys, account: Option<&AccountId>, now| {
            sealer.seal(keys, account, 3, &opening, now)
        };
        assert_eq!(
            seal(&keys, None, now).err().unwrap(),
            SealRefused::NoDayKey(3)
        );
        keys.days_set([(Class::Host, 3, day_key.public())], 3)
            .unwrap();
        assert!(
            seal(&keys, Some(&account), now)
                .unwrap()
                .wrap_account
                .is_empty()
        );
        keys.account_set(&account, account_key.public()).unwrap();

        let first = seal(&keys, Some(&account), now).unwrap();
        for (key, wrap, info) in [
            (&day_key, &first.wrap_class, api::context::LOG_CLASS),
            (&account_key, &first.wrap_account, api::context::LOG_ACCOUNT),
        ] {
            let batch = hpke::open_secret::<32>(key, info.as_bytes(), &[], wrap).unwrap();
            let plain = seal::aead::open(batch.expose(), &[], &first.sealed).unwrap();
            assert!(Opening::from_plaintext(&plain).unwrap() == opening);
        }
        for _ in 1..BATCH_KEY_ENTRIES_MAX {
            let again = seal(&keys, Some(&account), now).unwrap();
            assert_eq!(again.wrap_class, first.wrap_class);
            assert_ne!(again.sealed, first.sealed);
        }
        let second = seal(&keys, Some(&account), now).unwrap();
        assert_ne!(second.wrap_class, first.wrap_class, "256 entries");
        let third = seal(&keys, Some(&account), now + BATCH_KEY_LIFE).unwrap();
        assert_ne!(third.wrap_class, second.wrap_class, "10 s");
        let other = seal(&keys, None, now + BATCH_KEY_LIFE).unwrap();
        assert_ne!(other.wrap_class, third.wrap_class, "another account");
        sealer.purge(now + 2 * BATCH_KEY_LIFE);
        assert!(sealer.batches.is_empty());
    }
}
