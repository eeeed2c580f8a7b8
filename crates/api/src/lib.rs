//! Wire types of every protocol between Casemate's processes, and the error-code registry.
//!
//! One module per process that answers; a type here is a promise between two trust boundaries,
//! so every enum is closed and every struct refuses fields it does not know where the sender is
//! less trusted than the receiver. Must never hold behaviour beyond framing.
#![forbid(unsafe_code)]

pub mod agent;
pub mod audit;
pub mod disk;
pub mod error;
pub mod host;
pub mod kms;
pub mod limits;
pub mod mint;
pub mod rpc;
pub mod vmctl;
pub mod warden;

pub use error::{Error, ErrorCode, Result};

/// Context strings of every signed document: a document of one kind never passes as another.
pub mod context {
    /// Actor assertions, by mint.
    pub const ASSERTION: &str = "casemate/assertion/v1";
    /// Standing policies, by mint.
    pub const POLICY: &str = "casemate/policy/v1";
    /// Token states, by mint.
    pub const TOKEN_STATE: &str = "casemate/token-state/v1";
    /// Identity statements, by the KMS.
    pub const IDENTITY: &str = "casemate/identity/v1";
    /// Erasure receipts, by the KMS.
    pub const ERASURE: &str = "casemate/erasure/v1";
    /// Attestations of a process on a host, by warden.
    pub const ATTESTATION: &str = "casemate/attestation/v1";
    /// Template manifests, by warden.
    pub const TEMPLATE: &str = "casemate/template/v1";
    /// HPKE info of a key release.
    pub const RELEASE: &str = "casemate/release/v1";
    /// Salt of the key that a disk's anchors are made under, and first word of what they cover.
    pub const ANCHOR: &str = "casemate/anchor/v1";
    /// HPKE info of a batch key wrapped to a (class, day) key of the log; associated data empty.
    pub const LOG_CLASS: &str = "casemate/log/class/v1";
    /// HPKE info of a batch key wrapped to an account; associated data empty.
    pub const LOG_ACCOUNT: &str = "casemate/log/account/v1";
}
