//! Leaf v1: the entry that Casemate's logs hold.
//!
//! A leaf says in clear only what verification needs: class, time, a blinded account tag with its
//! sequence number, a commitment, and the day under whose key the rest is sealed. The payload is
//! sealed together with the commitment's salt, so that once the batch key is destroyed the
//! commitment tells nothing, while the leaf's hash and every proof stay valid.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | version, 1 |
//! | 1 | class, 1 to 5 |
//! | 8 | time, milliseconds since the epoch, big-endian like all numbers |
//! | 32 | account tag |
//! | 8 | account sequence number |
//! | 32 | commitment |
//! | 4 | day, days since the epoch |
//! | 2 + n | batch key wrapped to the (class, day) key |
//! | 2 + n | batch key wrapped to the account |
//! | 4 + n | sealed: nonce (12), then salt (32) and payload under AEAD, tag (16) |
//!
//! Must never encrypt or decrypt: sealing is the audit daemon's.

use crate::class::{Class, ClassError};
use crate::limits::{
    LEAF_BYTES_MAX, PAYLOAD_BYTES_MAX, SALT_BYTES, SEAL_OVERHEAD_BYTES, SEALED_BYTES_MAX,
    WRAP_BYTES_MAX,
};
use crate::merkle::{self, Hash};
use seal::hash::{hmac_sha256, sha256};

/// The version byte.
pub const VERSION: u8 = 1;
/// The sequence number of an account's first entry in a log.
pub const ACCOUNT_SEQ_FIRST: u64 = 0;
/// Milliseconds of a day.
pub const DAY_MS: u64 = 24 * 60 * 60 * 1000;
/// Separates commitments from all else that is hashed.
const COMMIT_LABEL: &[u8] = b"casemate/leaf/commit/v1\0";
/// Separates account tags from all else that the blinding key may be used for.
const TAG_LABEL: &[u8] = b"casemate/leaf/account/v1\0";

/// One entry of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The log it belongs to.
    pub class: Class,
    /// When it was appended, milliseconds since the epoch.
    pub time_ms: u64,
    /// Which account it concerns, blinded: see [`account_tag`].
    pub account_tag: [u8; 32],
    /// Counts this account's entries in this log from [`ACCOUNT_SEQ_FIRST`], without gaps.
    pub account_seq: u64,
    /// Binds salt and payload: see [`commitment`].
    pub commitment: Hash,
    /// The day whose key the batch key is wrapped to, days since the epoch.
    pub day: u32,
    /// The batch key, wrapped to the public key of (class, day). At most 1024 bytes.
    pub wrap_class: Vec<u8>,
    /// The batch key, wrapped to the account; may be empty. At most 1024 bytes.
    pub wrap_account: Vec<u8>,
    /// Nonce, then salt and payload sealed under the batch key.
    pub sealed: Vec<u8>,
}

/// What a leaf's commitment binds: shown to those who may read the entry.
#[derive(Clone, PartialEq, Eq)]
pub struct Opening {
    /// 32 random bytes.
    pub salt: [u8; SALT_BYTES],
    /// The entry in clear. At most 60 KiB.
    pub payload: Vec<u8>,
}

/// Why a leaf or an opening was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeafError {
    /// A field is longer than its bound.
    #[error("leaf: {field} has {got} bytes, the bound is {max}; shorten it")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its bytes.
        got: usize,
        /// Its bound.
        max: usize,
    },
    /// The bytes end inside a field.
    #[error("decode leaf: the bytes end within {field}; the entry is damaged")]
    Short {
        /// Which field.
        field: &'static str,
    },
    /// Bytes follow the last field.
    #[error("decode leaf: {0} bytes follow the last field; the entry is damaged")]
    Trailing(usize),
    /// Another version.
    #[error("decode leaf: version {0} is unknown; use a newer release")]
    Version(u8),
    /// An unknown class.
    #[error("decode leaf: {0}")]
    Class(#[from] ClassError),
    /// Too short to be a nonce, a salt and a tag.
    #[error("leaf: sealed payload has {0} bytes, too few for nonce, salt and tag")]
    SealedShort(usize),
    /// Salt and payload are not what the leaf commits to.
    #[error("open leaf: salt and payload are not those that the leaf commits to")]
    Commitment,
}

impl Leaf {
    /// The bytes of the entry: what the log stores and hashes.
    ///
    /// # Errors
    /// [`LeafError`] when a field is out of bounds.
    pub fn encode(&self) -> Result<Vec<u8>, LeafError> {
        field_check("wrap_class", self.wrap_class.len(), WRAP_BYTES_MAX)?;
        field_check("wrap_account", self.wrap_account.len(), WRAP_BYTES_MAX)?;
        sealed_check(self.sealed.len())?;
        let mut out = Vec::with_capacity(256 + self.sealed.len());
        out.extend_from_slice(&[VERSION, self.class.code()]);
        out.extend_from_slice(&self.time_ms.to_be_bytes());
        out.extend_from_slice(&self.account_tag);
        out.extend_from_slice(&self.account_seq.to_be_bytes());
        out.extend_from_slice(&self.commitment);
        out.extend_from_slice(&self.day.to_be_bytes());
        for wrap in [&self.wrap_class, &self.wrap_account] {
            out.extend_from_slice(&(wrap.len() as u16).to_be_bytes());
            out.extend_from_slice(wrap);
        }
        out.extend_from_slice(&(self.sealed.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.sealed);
        assert!(
            out.len() <= LEAF_BYTES_MAX,
            "the bounds of the fields add up to a leaf's"
        );
        Ok(out)
    }

    /// Reads an entry; there is one encoding for each leaf, and nothing may follow it.
    ///
    /// # Errors
    /// [`LeafError`] naming the field that is damaged or out of bounds.
    pub fn decode(bytes: &[u8]) -> Result<Leaf, LeafError> {
        field_check("leaf", bytes.len(), LEAF_BYTES_MAX)?;
        let mut rest = bytes;
        let [version] = take(&mut rest, "version")?;
        if version != VERSION {
            return Err(LeafError::Version(version));
        }
        let [class] = take(&mut rest, "class")?;
        let class = Class::from_code(class)?;
        let time_ms = u64::from_be_bytes(take(&mut rest, "time_ms")?);
        let account_tag = take(&mut rest, "account_tag")?;
        let account_seq = u64::from_be_bytes(take(&mut rest, "account_seq")?);
        let commitment = take(&mut rest, "commitment")?;
        let day = u32::from_be_bytes(take(&mut rest, "day")?);
        let length = u16::from_be_bytes(take(&mut rest, "wrap_class")?).into();
        field_check("wrap_class", length, WRAP_BYTES_MAX)?;
        let wrap_class = take_slice(&mut rest, length, "wrap_class")?;
        let length = u16::from_be_bytes(take(&mut rest, "wrap_account")?).into();
        field_check("wrap_account", length, WRAP_BYTES_MAX)?;
        let wrap_account = take_slice(&mut rest, length, "wrap_account")?;
        let length = u32::from_be_bytes(take(&mut rest, "sealed")?) as usize;
        sealed_check(length)?;
        let sealed = take_slice(&mut rest, length, "sealed")?;
        if !rest.is_empty() {
            return Err(LeafError::Trailing(rest.len()));
        }
        Ok(Leaf {
            class,
            time_ms,
            account_tag,
            account_seq,
            commitment,
            day,
            wrap_class,
            wrap_account,
            sealed,
        })
    }

    /// The leaf hash of the entry.
    ///
    /// # Errors
    /// [`LeafError`] when a field is out of bounds.
    pub fn hash(&self) -> Result<Hash, LeafError> {
        Ok(merkle::leaf_hash(&self.encode()?))
    }
}

impl Opening {
    /// The commitment of this opening.
    pub fn commitment(&self) -> Hash {
        commitment(&self.salt, &self.payload)
    }

    /// What is sealed under the batch key: the salt, then the payload.
    ///
    /// # Errors
    /// [`LeafError::TooLong`] beyond 60 KiB of payload.
    pub fn plaintext(&self) -> Result<Vec<u8>, LeafError> {
        field_check("payload", self.payload.len(), PAYLOAD_BYTES_MAX)?;
        Ok([self.salt.as_slice(), &self.payload].concat())
    }

    /// Reads what was sealed under the batch key.
    ///
    /// # Errors
    /// [`LeafError`] when it has no salt or is out of bounds.
    pub fn from_plaintext(plaintext: &[u8]) -> Result<Opening, LeafError> {
        let mut payload = plaintext;
        let salt = take(&mut payload, "salt")?;
        field_check("payload", payload.len(), PAYLOAD_BYTES_MAX)?;
        Ok(Opening {
            salt,
            payload: payload.to_vec(),
        })
    }

    /// Checks that this is what `leaf` commits to.
    ///
    /// # Errors
    /// [`LeafError::Commitment`] when it is not, [`LeafError::TooLong`] beyond the bound.
    pub fn verify(&self, leaf: &Leaf) -> Result<(), LeafError> {
        field_check("payload", self.payload.len(), PAYLOAD_BYTES_MAX)?;
        if self.commitment() == leaf.commitment {
            Ok(())
        } else {
            Err(LeafError::Commitment)
        }
    }
}

/// Payloads are what the log keeps confidential: not for debug output.
impl std::fmt::Debug for Opening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opening {{ payload: {} bytes }}", self.payload.len())
    }
}

/// SHA-256("casemate/leaf/commit/v1" || 0x00 || salt || payload).
pub fn commitment(salt: &[u8; SALT_BYTES], payload: &[u8]) -> Hash {
    sha256(&[COMMIT_LABEL, salt, payload].concat())
}

/// The blinded tag of an account in one class's log:
/// HMAC-SHA-256(`blinding_key`, "casemate/leaf/account/v1" || 0x00 || class || `account_id`).
/// Tags of one account differ between logs. Entries that concern no account take the tag of the
/// empty id, and so are numbered too.
pub fn account_tag(blinding_key: &[u8; 32], class: Class, account_id: &str) -> [u8; 32] {
    hmac_sha256(
        blinding_key,
        &[TAG_LABEL, &[class.code()], account_id.as_bytes()].concat(),
    )
}

/// The day of a time: days since the epoch.
pub fn day_of(time_ms: u64) -> u32 {
    u32::try_from(time_ms / DAY_MS).unwrap_or(u32::MAX)
}

fn field_check(field: &'static str, got: usize, max: usize) -> Result<(), LeafError> {
    if got > max {
        Err(LeafError::TooLong { field, got, max })
    } else {
        Ok(())
    }
}

fn sealed_check(length: usize) -> Result<(), LeafError> {
    if length < SEAL_OVERHEAD_BYTES + SALT_BYTES {
        return Err(LeafError::SealedShort(length));
    }
    field_check("sealed", length, SEALED_BYTES_MAX)
}

fn take<const N: usize>(rest: &mut &[u8], field: &'static str) -> Result<[u8; N], LeafError> {
    let (head, tail) = rest
        .split_first_chunk::<N>()
        .ok_or(LeafError::Short { field })?;
    *rest = tail;
    Ok(*head)
}

fn take_slice(rest: &mut &[u8], length: usize, field: &'static str) -> Result<Vec<u8>, LeafError> {
    let (head, tail) = rest
        .split_at_checked(length)
        .ok_or(LeafError::Short { field })?;
    *rest = tail;
    Ok(head.to_vec())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::leaf_with;
    use expect_test::expect;
    use proptest::prelude::*;

    #[test]
    fn the_encoding_is_frozen() {
        let leaf = Leaf {
            class: Class::Host,
            time_ms: 0x0102_0304_0506_0708,
            account_tag: [0xaa; 32],
            account_seq: 0x1112_1314_1516_1718,
            commitment: [0xcc; 32],
            day: 0x2122_2324,
            wrap_class: vec![0xd1, 0xd2],
            wrap_account: vec![],
            sealed: vec![0xee; 60],
        };
        let expected = [
            "01",
            "02",
            "0102030405060708",
            &"aa".repeat(32),
            "1112131415161718",
            &"cc".repeat(32),
            "21222324",
            "0002d1d2",
            "0000",
            "0000003c",
            &"ee".repeat(60),
        ]
        .concat();
        assert_eq!(hex::encode(leaf.encode().unwrap()), expected);
        assert_eq!(Leaf::decode(&hex::decode(expected).unwrap()).unwrap(), leaf);
    }

    #[test]
    fn commitment_and_tag_are_frozen() {
        // Recomputed with Python's hashlib and hmac from the formulas in the page.
        expect!["94c1b2136fa3c5102f05ea9a7aa6a2d1d9c8916ed39e98255e243f2a5493dcc4"]
            .assert_eq(&hex::encode(commitment(&[7; 32], b"payload")));
        expect!["5c93f46060a11a42f5e6eaff1f2f4fb8db76d0e26e9e935a0efa90b027449591"]
            .assert_eq(&hex::encode(account_tag(&[9; 32], Class::Api, "acc_1")));
        assert_ne!(
            account_tag(&[9; 32], Class::Api, "a"),
            account_tag(&[9; 32], Class::Host, "a")
        );
    }

    #[test]
    fn the_largest_leaf_fits_a_bundle_and_no_larger_one_is_made() {
        let (mut leaf, _) = leaf_with(Class::Api, 0, 1, 0, b"x");
        leaf.wrap_class = vec![0; WRAP_BYTES_MAX];
        leaf.wrap_account = vec![0; WRAP_BYTES_MAX];
        leaf.sealed = vec![0; SEALED_BYTES_MAX];
        assert!(leaf.encode().unwrap().len() <= LEAF_BYTES_MAX);
        leaf.sealed.push(0);
        assert!(leaf.encode().is_err());
        leaf.sealed = vec![0; SEAL_OVERHEAD_BYTES + SALT_BYTES - 1];
        assert!(leaf.encode().is_err());
    }

    #[test]
    fn debug_output_shows_no_payload() {
        let opening = Opening {
            salt: [1; 32],
            payload: b"canary".to_vec(),
        };
        assert!(!format!("{opening:?}").contains("canary"));
    }

    fn any_leaf() -> impl Strategy<Value = Leaf> {
        let bytes = |range| proptest::collection::vec(any::<u8>(), range);
        (
            (
                0usize..5,
                any::<u64>(),
                any::<[u8; 32]>(),
                any::<u64>(),
                any::<[u8; 32]>(),
            ),
            (any::<u32>(), bytes(0..80), bytes(0..80), bytes(60..200)),
        )
            .prop_map(
                |((class, time_ms, account_tag, account_seq, commitment), rest)| Leaf {
                    class: Class::ALL[class],
                    time_ms,
                    account_tag,
                    account_seq,
                    commitment,
                    day: rest.0,
                    wrap_class: rest.1,
                    wrap_account: rest.2,
                    sealed: rest.3,
                },
            )
    }

    proptest! {
        #[test]
        fn leaves_round_trip(leaf in any_leaf()) {
            prop_assert_eq!(Leaf::decode(&leaf.encode().unwrap()).unwrap(), leaf);
        }

        #[test]
        fn any_bytes_decode_to_one_leaf_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(leaf) = Leaf::decode(&bytes) {
                prop_assert_eq!(leaf.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn a_changed_leaf_is_another_leaf_or_none(leaf in any_leaf(), at in any::<usize>(), bit in 0u8..8) {
            let mut bytes = leaf.encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(other) = Leaf::decode(&bytes) {
                prop_assert_ne!(other.hash().unwrap(), leaf.hash().unwrap());
            }
            bytes[at] ^= 1 << bit;
            let cut = at;
            prop_assert!(Leaf::decode(&bytes[..cut]).is_err());
            bytes.push(0);
            prop_assert!(Leaf::decode(&bytes).is_err());
        }

        #[test]
        fn only_the_committed_opening_verifies(payload in proptest::collection::vec(any::<u8>(), 0..100), at in any::<usize>()) {
            let (leaf, opening) = leaf_with(Class::Api, 0, 1, 0, &payload);
            prop_assert!(opening.verify(&leaf).is_ok());
            let again = Opening::from_plaintext(&opening.plaintext().unwrap()).unwrap();
            prop_assert_eq!(&again, &opening);
            let mut other = opening.clone();
            other.salt[at % 32] ^= 1;
            prop_assert_eq!(other.verify(&leaf), Err(LeafError::Commitment));
            let mut other = opening;
            other.payload.push(0);
            prop_assert_eq!(other.verify(&leaf), Err(LeafError::Commitment));
        }
    }
}
