//! Bounds of everything that comes from a registry, a layout or a layer.

use serde::{Deserialize, Serialize};

/// Largest index, manifest or configuration, bytes.
pub const JSON_MAX_BYTES: u64 = 4 << 20;
/// Layers of an image.
pub const LAYERS_MAX: usize = 128;
/// Manifests that an index may list.
pub const INDEX_MAX: usize = 512;
/// Longest name of one directory entry, bytes.
pub const NAME_MAX_BYTES: usize = 255;
/// Longest path in an image and longest symlink, bytes.
pub const PATH_MAX_BYTES: usize = 4_095;
/// Deepest directory.
pub const DEPTH_MAX: usize = 100;
/// Symbolic links that one path may lead through.
pub const LINKS_FOLLOWED_MAX: usize = 16;
/// Largest header that precedes an entry (pax records, a GNU long name), bytes.
pub const TAR_HEADER_MAX_BYTES: u64 = 1 << 20;
/// Extended attributes of one file.
pub const XATTRS_MAX: usize = 32;
/// Extended attributes of one file, names and values, bytes. Below erofs' and ext4's own bounds.
pub const XATTR_MAX_BYTES: usize = 3_072;
/// Items of one list of the image's configuration (`Env`, `Cmd`, `Entrypoint`).
pub const CONFIG_ITEMS_MAX: usize = 256;
/// What is kept of the image's configuration, bytes.
pub const CONFIG_MAX_BYTES: usize = 16 << 10;
/// Largest message between the command and its workers, bytes.
pub const MESSAGE_MAX_BYTES: usize = 64 << 10;
/// Largest policy file, bytes.
pub const POLICY_MAX_BYTES: u64 = 256 << 10;
/// Largest payload of a signature, bytes.
pub const PAYLOAD_MAX_BYTES: u64 = 32 << 10;
/// Signatures of one image that are looked at.
pub const SIGNATURES_MAX: usize = 16;
/// Largest manifest of the artifacts, bytes; host reads no larger one.
pub const MANIFEST_MAX_BYTES: u64 = 1 << 20;
/// Images of one machine; host reads no more.
pub const IMAGES_MAX: usize = 256;
/// Address space of a worker, bytes.
pub const WORKER_MEMORY_BYTES: u64 = 3 << 30;
/// CPU time of the unpacker, s.
pub const WORKER_CPU_S: u64 = 1_800;
/// Redirects of one download.
pub const REDIRECTS_MAX: usize = 5;

/// The bounds of an image's size; a policy can lower and raise them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// One layer as it is stored, bytes.
    pub layer_stored_max_bytes: u64,
    /// One layer unpacked, bytes.
    pub layer_unpacked_max_bytes: u64,
    /// All layers unpacked, bytes.
    pub image_unpacked_max_bytes: u64,
    /// How many times larger than stored a layer may be unpacked, beyond the first 64 MiB.
    pub ratio_max: u64,
    /// Entries of all layers.
    pub entries_max: u64,
}

impl Limits {
    /// Unpacked bytes that need no ratio.
    pub const RATIO_FREE_BYTES: u64 = 64 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_stored_max_bytes: 4 << 30,
            layer_unpacked_max_bytes: 12 << 30,
            image_unpacked_max_bytes: 16 << 30,
            ratio_max: 100,
            entries_max: 500_000,
        }
    }
}
