//! Merkle tiles, checkpoints, proofs and their verification: the arithmetic of the audit logs.
//!
//! The formats are public ones, so that others' tools can read our logs: C2SP tlog-tiles,
//! tlog-checkpoint, signed-note and tlog-cosignature over RFC 6962 hashing. Only the entries
//! ([`leaf`]) and the receipts ([`receipt`]) are our own. `docs/formats/audit-log.md` describes
//! all of it byte by byte.
//!
//! | who | uses |
//! |---|---|
//! | audit daemon | [`grow`] to append, [`tile::TileHashes`] and [`merkle`] to prove, [`checkpoint`] |
//! | KMS, control | [`receipt::Receipt::verify`] before they act |
//! | witness | [`merkle::consistency_verify`], [`note::Signature::cosign_v1`] |
//! | `casemate audit verify` | [`verify`] |
//!
//! Must never do IO, hold a secret, or read a clock: callers hand in bytes and times.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod class;
pub mod grow;
pub mod leaf;
pub mod limits;
pub mod merkle;
pub mod note;
pub mod receipt;
pub mod tile;
pub mod verify;

#[cfg(test)]
mod testing;
