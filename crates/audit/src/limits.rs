//! Every bound of this crate, with its unit and its reason.

use std::time::Duration;

/// Most entries in one batch: what one `fdatasync` makes durable.
pub const BATCH_ENTRIES_MAX: usize = 4_096;
/// A batch is closed once its leaves have this many bytes; it may exceed it by one leaf.
pub const BATCH_BYTES_SOFT: usize = 4 << 20;
/// Most bytes of a batch's leaves; more is damage.
pub const BATCH_BYTES_MAX: usize = BATCH_BYTES_SOFT + 2 + tlog::limits::LEAF_BYTES_MAX;
/// A segment beyond this many bytes is followed by a new one.
pub const SEGMENT_BYTES_SOFT: u64 = 16 << 20;
/// Accounts whose sequence numbers a segment's header can carry.
pub const SEGMENT_TAGS_MAX: usize = 4_000_000;
/// Largest segment that is read; more is damage.
pub const SEGMENT_BYTES_MAX: u64 =
    SEGMENT_BYTES_SOFT + SEGMENT_TAGS_MAX as u64 * 40 + 2 * BATCH_BYTES_MAX as u64;
/// Segments of one class; only a log that can't be integrated for long has more than a few.
pub const SEGMENTS_MAX: usize = 100_000;

/// Entries of one class that wait for their batch; further callers wait to be queued.
pub const QUEUE_MAX: usize = 4_096;
/// Entries sealed under one batch key.
pub const BATCH_KEY_ENTRIES_MAX: u32 = 256;
/// How long a batch key lives in memory.
pub const BATCH_KEY_LIFE: Duration = Duration::from_secs(10);
/// Batch keys held at once per class; beyond it all are dropped and made anew.
pub const BATCH_KEYS_MAX: usize = 1_024;

/// Day keys in one request.
pub const DAY_KEYS_REQUEST_MAX: usize = 5 * 400;
/// Day keys held; days that are past are forgotten.
pub const DAY_KEYS_MAX: usize = 5 * 800;
/// Largest file of day keys, bytes.
pub const DAY_KEYS_FILE_MAX_BYTES: u64 = 1 << 20;
/// Account keys held.
pub const ACCOUNT_KEYS_MAX: usize = 1_000_000;

/// Longest `event` of an entry, bytes.
pub const EVENT_MAX_BYTES: usize = 64;
/// Longest request id, actor, subject or result of an entry, bytes.
pub const FIELD_MAX_BYTES: usize = 256;

/// Receipts that one integration answers; the rest go with the next.
pub const RECEIPTS_MAX: usize = 256;
/// Entries between two checkpoints while a backlog is integrated.
pub const CYCLE_ENTRIES_MAX: u64 = 16_384;
/// Files synced at once.
pub const SYNC_LANES_MAX: usize = 4;
/// Directories of tiles whose names are remembered to be durable.
pub const NAMED_MAX: usize = 10_000;
/// How long entries without a waiting receipt may stay out of the tree.
pub const INTEGRATE_DELAY: Duration = Duration::from_millis(50);
/// How long one request to integrate may take: it may work off a backlog.
pub const INTEGRATE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a writer waits for its receipt.
pub const RECEIPT_TIMEOUT: Duration = Duration::from_secs(8);
/// How long the append process waits for integrate when it starts.
pub const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How far back the wall clock may step without being reported, ms.
pub const CLOCK_STEP_REPORT_MS: u64 = 1_000;

/// Entries in one answer of the reader.
pub const READ_ENTRIES_MAX: u32 = 256;
/// Bytes of entries in one answer of the reader: with base64 they fit a frame.
pub const READ_BYTES_SOFT: usize = 384 << 10;
/// Longest reason for reading, bytes.
pub const REASON_MAX_BYTES: usize = 256;
/// Wraps that the KMS opens in one request.
pub const LOG_OPEN_MAX: usize = 64;

const _: () = assert!(api::limits::AUDIT_PAYLOAD_MAX_BYTES <= tlog::limits::PAYLOAD_BYTES_MAX);
// A payload in clear as JSON and its leaf in base64, twice the soft bound at worst, fit a frame.
const _: () =
    assert!(READ_BYTES_SOFT * 2 + 4 * tlog::limits::LEAF_BYTES_MAX < api::limits::FRAME_MAX_BYTES);
// 256 receipts of a tree of 2^32 entries fit a frame.
const _: () = assert!(RECEIPTS_MAX * 32 * 48 + 64 * 1024 < api::limits::FRAME_MAX_BYTES);
