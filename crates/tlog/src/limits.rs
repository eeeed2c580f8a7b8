//! Every bound of this crate, with its unit and its reason.

/// Hashes (or entries) in a full tile. Fixed by tlog-tiles.
pub const TILE_WIDTH: u16 = 256;
/// Binary tree levels that one tile spans: log2 of [`TILE_WIDTH`].
pub const TILE_HEIGHT: u8 = 8;
/// Highest tile level that a tree of at most [`TREE_SIZE_MAX`] entries can have.
pub const TILE_LEVEL_MAX: u8 = 7;
/// Most entries a tree may have. Keeps all shifts and sums within `u64`.
pub const TREE_SIZE_MAX: u64 = 1 << 62;
/// Bytes of one SHA-256 hash.
pub const HASH_BYTES: usize = 32;

/// Most bytes of one log entry: tlog-tiles prefixes each with a `u16`.
pub const LEAF_BYTES_MAX: usize = 65_535;
/// Most bytes of one entry bundle: 256 entries, each with its `u16` prefix.
pub const BUNDLE_BYTES_MAX: usize = TILE_WIDTH as usize * (2 + LEAF_BYTES_MAX);
/// Most bytes of one wrapped batch key in a leaf.
pub const WRAP_BYTES_MAX: usize = 1024;
/// Most bytes of the plain payload of a leaf (60 KiB).
pub const PAYLOAD_BYTES_MAX: usize = 60 * 1024;
/// Bytes that an AEAD adds to what it seals: a 12-byte nonce and a 16-byte tag.
pub const SEAL_OVERHEAD_BYTES: usize = 12 + 16;
/// Bytes of the commitment's salt.
pub const SALT_BYTES: usize = 32;
/// Most bytes of a sealed payload: nonce, salt, payload, tag.
pub const SEALED_BYTES_MAX: usize = SEAL_OVERHEAD_BYTES + SALT_BYTES + PAYLOAD_BYTES_MAX;

/// Most hashes in a proof: a tree of 2^62 entries needs at most 63.
pub const PROOF_HASHES_MAX: usize = 64;

/// Most bytes of a signed note.
pub const NOTE_BYTES_MAX: usize = 16 * 1024;
/// Most signature lines on a note. signed-note asks for at least 16.
pub const NOTE_SIGNATURES_MAX: usize = 32;
/// Most bytes of a key name or an origin.
pub const NAME_BYTES_MAX: usize = 255;
/// Most extension lines on a checkpoint.
pub const CHECKPOINT_EXTENSIONS_MAX: usize = 16;

/// Most bytes of a receipt as JSON; callers refuse a longer body before parsing it.
pub const RECEIPT_JSON_BYTES_MAX: usize = 256 * 1024;

/// Most faults a verification lists; further ones are only counted.
pub const FAULTS_MAX: usize = 1_000;
/// How far an entry's time may lie behind the latest time before it, in milliseconds.
pub const TIME_BACKSTEP_MAX_MS: u64 = 5 * 60 * 1000;

const _: () = assert!(1 << TILE_HEIGHT == TILE_WIDTH as usize);
const _: () = assert!((TILE_LEVEL_MAX as u32 + 1) * TILE_HEIGHT as u32 == u64::BITS);
// Fixed fields, two full wraps, the largest sealed payload and three length fields fit a leaf.
const _: () =
    assert!(82 + 2 + WRAP_BYTES_MAX + 2 + WRAP_BYTES_MAX + 4 + SEALED_BYTES_MAX <= LEAF_BYTES_MAX);
// A receipt's parts in base64 fit its JSON bound.
const _: () = assert!(
    LEAF_BYTES_MAX.div_ceil(3) * 4
        + PAYLOAD_BYTES_MAX.div_ceil(3) * 4
        + PROOF_HASHES_MAX * 48
        + 2 * NOTE_BYTES_MAX
        + 1024
        <= RECEIPT_JSON_BYTES_MAX
);
