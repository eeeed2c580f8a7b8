//! One encrypted object as one FUSE file: the process between a VMM and its disk at rest.
//!
//! ```text
//!  VMM ──FUSE──▶ fuse ─▶ object ┬▶ identity   [0, 1 MiB)  synthesised, read-only
//!                               └▶ volume     [1 MiB, ..) ─▶ XTS ─▶ backing file (LUKS2)
//!  warden ──SEQPACKET──▶ control ─▶ grant (HPKE) ─▶ format: open the volume, or make it ─▶ late
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`luks2`] | the header: keyslot, checksums, JSON |
//! | [`luks1`] | a copy for tools that read only LUKS1; nothing shipped calls it |
//! | [`volume`] | sectors, holes, partial writes, sync |
//! | [`sidecar`] | integrity: a tag per sector, generations, the journal |
//! | [`image`] | saved memory and snapshots: their note; copies of disks |
//! | [`format`] | a new volume, safe against crashes |
//! | [`identity`], [`grant`] | what the guest becomes; what the KMS released |
//! | [`fuse`], [`bucket`] | serving the file; rate limits (DSK-5) |
//! | [`late`] | the file while there is no volume yet |
//! | [`sandbox`] | Landlock without rights, seccomp |
//!
//! Must never: open a path or a socket, hold a key outside secret memory, write plaintext or the
//! identity to the backing file, answer a flush before the data is durable, say a secret.
#![allow(unsafe_code)] // Inherited descriptors, FUSE_DEV_IOC_CLONE, aligned sectors.

pub mod backing;
pub mod bench;
pub mod bucket;
pub mod control;
mod error;
pub mod format;
pub mod fuse;
pub mod grant;
pub mod identity;
pub mod image;
pub mod late;
pub mod limits;
pub mod luks1;
pub mod luks2;
pub mod object;
pub mod process;
mod ranges;
pub mod sandbox;
pub mod sidecar;
pub mod volume;

pub use error::DiskError;
