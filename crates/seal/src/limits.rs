//! Bounds of this crate, with units in the names.

/// Longest text of a [`crate::sign::Signed`], in bytes.
pub const SIGNED_MAX_BYTES: usize = 16 * 1024;
/// Longest JWT that is looked at, in bytes.
pub const JWT_MAX_BYTES: usize = 4 * 1024;
/// Longest life of a JWT (`exp` - `iat`), in seconds.
pub const JWT_TTL_MAX_S: i64 = 3600;
/// Clock difference between signer and verifier of a JWT that is forgiven, in seconds.
pub const JWT_LEEWAY_S: i64 = 30;
/// Most that HKDF-SHA-256 can put out, in bytes (RFC 5869: 255 blocks).
pub const HKDF_OUT_MAX_BYTES: usize = 255 * 32;
/// One XTS sector (data unit), in bytes.
pub const XTS_SECTOR_BYTES: usize = 4096;
/// How many 512-byte units one XTS sector counts in the tweak (dm-crypt's `plain64`).
pub const XTS_TWEAK_UNITS_PER_SECTOR: u64 = (XTS_SECTOR_BYTES / 512) as u64;
/// Smallest secret heap, in bytes: AWS-LC's own random state needs some of it.
pub const SECRET_HEAP_MIN_BYTES: usize = 64 * 1024;
/// Largest secret heap, in bytes: it can't be swapped, so it must stay small.
pub const SECRET_HEAP_MAX_BYTES: usize = 64 * 1024 * 1024;
/// How far a certificate's `not_before` lies in the past, in seconds.
pub const CERT_BACKDATE_S: u64 = 300;
/// Longest life of a leaf certificate, in seconds (398 days, the browsers' bound).
pub const CERT_TTL_MAX_S: u64 = 398 * 86_400;
/// Life of a local CA certificate, in seconds (10 years).
pub const CA_TTL_MAX_S: u64 = 3650 * 86_400;
/// Most DNS names and addresses in one certificate.
pub const CERT_NAMES_MAX: usize = 100;

const _: () = assert!(XTS_SECTOR_BYTES.is_multiple_of(512) && XTS_TWEAK_UNITS_PER_SECTOR == 8);
const _: () = assert!(SECRET_HEAP_MIN_BYTES < SECRET_HEAP_MAX_BYTES);
