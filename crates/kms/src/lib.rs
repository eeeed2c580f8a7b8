//! The KMS: keys of workspaces, and nothing that leaves it in clear.
//!
//! | file | what |
//! |---|---|
//! | [`kms`] | the operations: check, log, act |
//! | [`check`] | whether a request may have what it asks for; pure |
//! | [`once`] | what may be used once |
//! | [`keyring`], [`ring`] | how keys hang together; the unsealed ones in memory |
//! | [`store`], [`slots`], [`unseal`] | what is at rest: wrapped keys, epoch secrets, the way in |
//! | `anchor` | how far each disk has got |
//! | [`rotate`], `destroy` | a new epoch; what was erased becomes unrecoverable |
//! | [`duties`] | what it does without being asked |
//!
//! Must never have a route to guests, give an unaudited answer, or let a plaintext key out.
//! `docs/formats/kms-state.md` describes what is at rest, byte by byte.
#![forbid(unsafe_code)]

mod anchor;
pub mod check;
mod destroy;
pub mod duties;
pub mod error;
pub mod fault;
mod image;
pub mod init;
pub mod keyring;
pub mod kms;
pub mod limits;
pub mod metrics;
pub mod once;
pub mod ring;
pub mod rotate;
pub mod slots;
pub mod store;
pub mod unseal;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use kms::{Kms, Setup};
