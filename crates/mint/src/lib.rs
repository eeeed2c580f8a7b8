//! Mint: who may. API keys, actor assertions, gateway and raw tokens.
//!
//! | file | what |
//! |---|---|
//! | [`mint`] | the operations: check, log, act |
//! | [`book`], [`store`] | what it knows: in memory, and at rest |
//! | [`keys`] | its own keys |
//! | [`refusals`] | how refused credentials are logged within bounds |
//!
//! Must never trust control's word for who is asking. `docs/formats/tokens.md` describes every
//! token and signed document.
#![forbid(unsafe_code)]

pub mod book;
pub mod error;
pub mod keys;
pub mod limits;
pub mod metrics;
pub mod mint;
pub mod refusals;
pub mod store;

#[cfg(test)]
mod tests;

pub use mint::{Mint, Setup};
