//! The only door to cryptography: every other crate of Casemate asks this one.
//!
//! | module | what | standard |
//! |---|---|---|
//! | [`random`] | random bytes | kernel-seeded DRBG of AWS-LC |
//! | [`hash`] | SHA-256, HMAC-SHA-256, constant-time equality | FIPS 180-4, RFC 2104 |
//! | [`kdf`] | HKDF, PBKDF2, Argon2id | RFC 5869, RFC 8018, RFC 9106 |
//! | [`aead`] | AES-256-GCM under a random nonce | NIST SP 800-38D |
//! | [`hpke`] | sealing to a public key | RFC 9180 base mode |
//! | [`sign`] | Ed25519 and compact signed documents | RFC 8032 |
//! | [`verify`] | signatures by keys that others made, from PEM | RFC 8032, FIPS 186-5 |
//! | [`jwt`] | gateway tokens | RFC 7519, RFC 8725 |
//! | [`xts`] | sectors at rest | IEEE 1619, NIST SP 800-38E |
//! | [`tag`] | keyed tags of what rests elsewhere | RFC 8452 |
//! | [`secret`] | memory that nobody else can read | `memfd_secret(2)` |
//! | `tls` (feature `tls`) | TLS 1.3 pinned to an Ed25519 identity | RFC 8446 |
//!
//! Must never: log, print a secret in an error or a `Debug`, let a caller choose an algorithm or
//! a nonce, or accept two encodings of one signed thing.
#![allow(unsafe_code)] // AWS-LC's XTS, tags and HPKE have no safe binding; memfd_secret needs raw memory.

pub mod aead;
mod error;
pub mod hash;
mod hexkey;
pub mod hpke;
mod json;
pub mod jwt;
pub mod kdf;
pub mod limits;
pub mod random;
pub mod secret;
pub mod sign;
pub mod tag;
#[cfg(feature = "tls")]
pub mod tls;
pub mod verify;
pub mod xts;

pub use error::SealError;
pub use zeroize::{Zeroize, Zeroizing};
