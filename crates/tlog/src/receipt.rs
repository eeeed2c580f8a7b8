//! Receipts: the proof that one entry is in a log, which others check before they act.
//!
//! KMS releases no key without one. A receipt carries the entry, what it commits to, the path to
//! a root and the log's checkpoint over that root; it is verified with nothing but the log's
//! public key and origin.
//!
//! Must never be trusted before [`Receipt::verify`]: every field is the sender's word.

use crate::checkpoint::{Checkpoint, CheckpointError, Opened, hash_parse};
use crate::class::{Class, ClassError};
use crate::leaf::{Leaf, LeafError, Opening};
use crate::limits::{
    LEAF_BYTES_MAX, NOTE_BYTES_MAX, PAYLOAD_BYTES_MAX, PROOF_HASHES_MAX, SALT_BYTES,
};
use crate::merkle::{Hash, ProofError, inclusion_verify, leaf_hash};
use crate::note::{Signed, Verifier};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use seal::hash::sha256;
use seal::sign::VerifyingKey;
use serde::{Deserialize, Serialize};

/// A receipt on the wire. Refuse a body beyond [`crate::limits::RECEIPT_JSON_BYTES_MAX`] before
/// parsing it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Name of the class whose log this is.
    pub log: String,
    /// Index of the entry in it.
    pub index: u64,
    /// The entry, base64.
    pub leaf: String,
    /// What the entry commits to.
    pub opening: ReceiptOpening,
    /// The audit path, each hash in base64, leaf first.
    pub proof: Vec<String>,
    /// The log's checkpoint, a signed note.
    pub checkpoint: String,
}

/// What an entry commits to, on the wire. Confidential, like what the entry says.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptOpening {
    /// 32 bytes, base64.
    pub salt: String,
    /// The entry in clear, base64.
    pub payload: String,
}

/// What a verified receipt proves.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifiedReceipt {
    /// The entry in clear.
    pub payload: Vec<u8>,
    /// When the log took it, milliseconds since the epoch.
    pub time_ms: u64,
    /// The log it is in.
    pub class: Class,
    /// Its index there.
    pub index: u64,
    /// The size of the log at the checkpoint.
    pub size: u64,
    /// The root of the log at the checkpoint.
    pub root: Hash,
    /// Blinded tag of the account it concerns.
    pub account_tag: [u8; 32],
    /// Its number among that account's entries.
    pub account_seq: u64,
    /// SHA-256 of the entry's bytes: names it in what is bound to it.
    pub leaf_sha256: Hash,
    /// The trusted witnesses that cosigned the checkpoint.
    pub cosignatures: Vec<Signed>,
}

/// Why a receipt was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// A field is too long, or not base64 of the right length.
    #[error("verify receipt: field {0} is malformed or out of bounds")]
    Field(&'static str),
    /// The log's name is none of the five.
    #[error("verify receipt: field log: {0}")]
    Class(#[from] ClassError),
    /// Log, origin and leaf name different classes.
    #[error("verify receipt: the entry, the log and the expected origin are of different classes")]
    OtherClass,
    /// The entry is no leaf, or the opening is not its own.
    #[error("verify receipt: {0}")]
    Leaf(#[from] LeafError),
    /// The checkpoint is not the log's.
    #[error("verify receipt: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// The path does not lead to the checkpoint's root.
    #[error("verify receipt: {0}")]
    Proof(#[from] ProofError),
}

impl Receipt {
    /// A receipt over the entry `leaf` at `index`, opened by `opening`.
    pub fn new(
        class: Class,
        index: u64,
        leaf: &[u8],
        opening: &Opening,
        proof: &[Hash],
        checkpoint: &str,
    ) -> Receipt {
        Receipt {
            log: class.name().to_string(),
            index,
            leaf: STANDARD.encode(leaf),
            opening: ReceiptOpening {
                salt: STANDARD.encode(opening.salt),
                payload: STANDARD.encode(&opening.payload),
            },
            proof: proof.iter().map(|hash| STANDARD.encode(hash)).collect(),
            checkpoint: checkpoint.to_string(),
        }
    }

    /// Checks that the log `origin`, whose key is `log_key`, holds this entry, and opens it.
    ///
    /// # Errors
    /// [`ReceiptError`] naming what is wrong; nothing of the receipt may then be used.
    pub fn verify(
        &self,
        log_key: &VerifyingKey,
        origin: &str,
    ) -> Result<VerifiedReceipt, ReceiptError> {
        self.verify_witnessed(log_key, origin, &[])
    }

    /// Like [`Receipt::verify`], and also verifies the cosignatures of `witnesses`. How many of
    /// them it takes is the caller's policy: see [`VerifiedReceipt::cosignatures`].
    ///
    /// # Errors
    /// [`ReceiptError`] naming what is wrong; nothing of the receipt may then be used.
    pub fn verify_witnessed(
        &self,
        log_key: &VerifyingKey,
        origin: &str,
        witnesses: &[Verifier],
    ) -> Result<VerifiedReceipt, ReceiptError> {
        let class: Class = self.log.parse()?;
        if origin.rsplit('/').next() != Some(class.name()) {
            return Err(ReceiptError::OtherClass);
        }
        if self.checkpoint.len() > NOTE_BYTES_MAX {
            return Err(ReceiptError::Field("checkpoint"));
        }
        let Opened {
            checkpoint,
            cosignatures,
        } = Checkpoint::open(self.checkpoint.as_bytes(), origin, log_key, witnesses)?;
        let leaf_bytes = base64_bounded(&self.leaf, LEAF_BYTES_MAX, "leaf")?;
        let proof = self.proof_decode()?;
        inclusion_verify(
            self.index,
            checkpoint.size,
            &leaf_hash(&leaf_bytes),
            &proof,
            &checkpoint.root,
        )?;
        let leaf = Leaf::decode(&leaf_bytes)?;
        if leaf.class != class {
            return Err(ReceiptError::OtherClass);
        }
        let opening = self.opening_decode()?;
        opening.verify(&leaf)?;
        Ok(VerifiedReceipt {
            payload: opening.payload,
            time_ms: leaf.time_ms,
            class,
            index: self.index,
            size: checkpoint.size,
            root: checkpoint.root,
            account_tag: leaf.account_tag,
            account_seq: leaf.account_seq,
            leaf_sha256: sha256(&leaf_bytes),
            cosignatures,
        })
    }

    fn proof_decode(&self) -> Result<Vec<Hash>, ReceiptError> {
        if self.proof.len() > PROOF_HASHES_MAX {
            return Err(ReceiptError::Field("proof"));
        }
        self.proof
            .iter()
            .map(|text| hash_parse(text).ok_or(ReceiptError::Field("proof")))
            .collect()
    }

    fn opening_decode(&self) -> Result<Opening, ReceiptError> {
        let salt = base64_bounded(&self.opening.salt, SALT_BYTES, "opening.salt")?;
        let salt = salt
            .try_into()
            .map_err(|_| ReceiptError::Field("opening.salt"))?;
        let payload = base64_bounded(&self.opening.payload, PAYLOAD_BYTES_MAX, "opening.payload")?;
        Ok(Opening { salt, payload })
    }
}

/// The payload is confidential: not for debug output.
impl std::fmt::Debug for ReceiptOpening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ReceiptOpening {{ payload: {} base64 characters }}",
            self.payload.len()
        )
    }
}

/// The payload is confidential: not for debug output.
impl std::fmt::Debug for VerifiedReceipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerifiedReceipt")
            .field("class", &self.class)
            .field("index", &self.index)
            .field("size", &self.size)
            .field("time_ms", &self.time_ms)
            .finish_non_exhaustive()
    }
}

/// Decodes canonical base64 of at most `max` bytes.
fn base64_bounded(text: &str, max: usize, field: &'static str) -> Result<Vec<u8>, ReceiptError> {
    if text.len() > max.div_ceil(3) * 4 {
        return Err(ReceiptError::Field(field));
    }
    let bytes = STANDARD
        .decode(text)
        .map_err(|_| ReceiptError::Field(field))?;
    if bytes.len() > max {
        Err(ReceiptError::Field(field))
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
