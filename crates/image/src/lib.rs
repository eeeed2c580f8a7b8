//! OCI images into verified, read-only bases.
//!
//! An image is a stranger's. The command (root) opens files and moves the result; everything that
//! parses the image runs as `casemate-image`, without privileges, in a process that has nothing but
//! the descriptors it was handed. The image's tree is put together in memory and written as erofs:
//! no name of an image is ever looked up in a file system of this machine.
//!
//! ```text
//! casemate image import ──socket──▶ casemate-image fetch    network, one directory
//!        │  opens blobs by digest     casemate-image collect  one directory
//!        └──────────socket────────▶ casemate-image unpack   descriptors only
//! ```
//!
//! Must never run anything of an image, follow a link of one on this machine, give a worker a path,
//! or take an image whose digests do not agree from the manifest to the last byte of each layer.
//! `docs/formats/image.md` has the details.
#![forbid(unsafe_code)]

mod collect;
pub mod erofs;
pub mod error;
pub mod import;
pub mod limits;
pub mod oci;
pub mod policy;
pub mod reference;
pub mod registry;
mod sandbox;
pub mod signature;
pub mod store;
pub mod tar;
pub mod tree;
pub mod unpack;
mod wire;
pub mod worker;
mod zstd;

pub use error::{Code, Error, Refusal};
