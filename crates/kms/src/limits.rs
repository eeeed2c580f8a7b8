//! Bounds of the KMS, with their units.

use std::time::Duration;

/// Memory for keys, bytes; counts against `RLIMIT_MEMLOCK`.
pub const SECRET_HEAP_BYTES: usize = 4 << 20;
/// Account keys kept unwrapped.
pub const ACCOUNT_CACHE_MAX: usize = 4_096;
/// Clock difference between the processes of an installation that is forgiven, ms.
pub const SKEW_MS: u64 = 5_000;
/// Oldest assertion that may still destroy a key, ms: a delete waits for its host to come back.
pub const DESTROY_AUTHORITY_MAX_MS: u64 = 24 * 3_600_000;
/// Leases whose nonce is remembered at once (60 s at 3,000/s).
pub const NONCES_MAX: usize = 200_000;
/// Length of a lease's nonce, hex digits.
pub const NONCE_HEX_CHARS: usize = 64;
/// Room for a grant in clear, bytes.
pub const GRANT_BYTES_MAX: usize = 1_024;
/// How often the epoch changes by itself, ms.
pub const EPOCH_MAX_AGE_MS: u64 = 24 * 3_600_000;
/// How often duties without a request are looked after.
pub const DUTY_INTERVAL: Duration = Duration::from_secs(5);
/// How often a file-sealed KMS tries again to unseal itself.
pub const UNSEAL_RETRY: Duration = Duration::from_millis(250);
/// How long a closing act waits for the log before it goes ahead without it.
pub const CLOSING_LOG_WAIT: Duration = Duration::from_secs(2);
/// Entries that wait for the log to come back; beyond it closing acts wait too.
pub const OUTBOX_MAX: i64 = 10_000;
/// Days for which the log's public keys are published ahead.
pub const LOG_DAYS_AHEAD: u32 = 400;
/// Batch keys opened by one request.
pub const LOG_OPEN_MAX: usize = 64;
/// Longest reason of a request to open entries, bytes.
pub const REASON_MAX_BYTES: usize = 1_024;
/// Passphrase length, bytes.
pub const PASSPHRASE_BYTES: std::ops::RangeInclusive<usize> = 12..=1_024;
/// Longest wait for the store, which one rotation may hold.
pub const STORE_WAIT: Duration = Duration::from_secs(30);
/// Files that the slot directory may hold before it is refused as not ours.
pub const SLOT_FILES_MAX: usize = 64;

const _: () = assert!(LOG_DAYS_AHEAD as usize * 5 <= 2_000, "one DayKeys message");
const _: () = assert!(ACCOUNT_CACHE_MAX * 64 * 4 <= SECRET_HEAP_BYTES);
