//! The edge in a world of its own: mint, host and control as fakes that speak the real protocols,
//! guests behind real mutual TLS.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod access;
mod planes;
mod process;
mod revoke;
mod smuggle;
mod streams;
mod wake;
mod world;
