//! Bounds of the control daemon, with their units.

use std::time::Duration;

/// HTTP connections at once.
pub const CONNECTIONS_MAX: usize = 1_024;
/// Longest path with query, bytes.
pub const URI_MAX_BYTES: usize = 4_096;
/// Time for a request's body to arrive.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(10);
/// Tolerated difference between mint's clock and ours, ms.
pub const CLOCK_SKEW_MAX_MS: u64 = 5_000;
/// Assertions remembered against their second use.
pub const ASSERTIONS_REMEMBERED_MAX: usize = 262_144;

/// How long a request that wants a running workspace waits for it, ms.
pub const READY_WAIT_MS: u64 = 30_000;
/// The same, of a client that said it polls: an answer that is ready saves it two seconds.
pub const READY_WAIT_POLLING_MS: u64 = 5_000;
/// How long a stop waits for the host's word, ms.
pub const STOP_WAIT_MS: u64 = 20_000;
/// How long a sleep or a snapshot waits for the host's word, ms.
pub const SLEEP_WAIT_MS: u64 = 120_000;
/// How long an archive waits for the host's word, ms: what takes longer is given up.
pub const ARCHIVE_WAIT_MS: u64 = 120_000;
/// Shortest time between two wakes that requests at a gateway bring about, ms: one that failed is
/// not tried again with each request.
pub const WAKE_RETRY_MS: u64 = 10_000;
/// After a sleep that failed, the next one by the clock waits, ms.
pub const SLEEP_RETRY_MS: u64 = 600_000;
/// How long a deletion waits for the host's word, ms.
pub const DELETE_WAIT_MS: u64 = 20_000;
/// How long a change of rules waits for the host's word, ms.
pub const NETWORK_WAIT_MS: u64 = 5_000;
/// How much longer than what it granted host may take to answer.
pub const HOST_CALL_GRACE: Duration = Duration::from_secs(3);
/// Life of a lease, ms; below the KMS's bound by what the log may take.
pub const LEASE_MS: u64 = 50_000;

/// Compare-and-swap attempts on one row.
pub const CAS_ATTEMPTS_MAX: u32 = 16;
/// Longest list that is read from the store at once.
pub const ROWS_MAX: i64 = 100_000;
/// Default and largest page of a listing.
pub const PAGE: (usize, usize) = (20, 100);
/// How long host's images stay known.
pub const INFO_CACHE: Duration = Duration::from_secs(2);
/// How old host's images may be where a start finds out soon enough that one is gone.
pub const INFO_RECENT: Duration = Duration::from_secs(60);

/// Longest string of a request that has no bound of its own, characters.
pub const TEXT_MAX_CHARS: usize = 1_024;
/// Longest idempotency key, characters.
pub const IDEMPOTENCY_KEY_MAX_CHARS: usize = 255;
/// Arguments of a workspace's command.
pub const CMD_ARGS_MAX: usize = 64;
/// A workspace's config with environment and command, bytes: it must fit the agent's channel
/// beside the token state.
pub const GUEST_CONFIG_MAX_BYTES: usize = 32 << 10;

/// How often everything is reconciled without being woken.
pub const RECONCILE_EVERY: Duration = Duration::from_secs(5);
/// Shortest time between two reconciliations.
pub const RECONCILE_GAP: Duration = Duration::from_millis(100);
/// How long a call for news waits at host, ms.
pub const NEWS_WAIT_MS: u64 = 25_000;

/// How long a closing act waits for the log before its entry goes to the spool.
pub const CLOSING_LOG_WAIT: Duration = Duration::from_secs(2);
/// Bytes set aside for entries of closing acts while the log is away.
pub const SPOOL_MAX_BYTES: u64 = 16 << 20;
/// Entries of API calls on their way to the log.
pub const API_ENTRIES_QUEUED_MAX: usize = 4_096;
/// Entries of API calls sent at once.
pub const API_ENTRIES_IN_FLIGHT_MAX: usize = 32;

const _: () = assert!(LEASE_MS <= api::limits::LEASE_MAX_MS);
const _: () = assert!(GUEST_CONFIG_MAX_BYTES + (17 << 10) < api::limits::CHANNEL_MESSAGE_MAX_BYTES);
