//! Bounds of mint, with their units.

use std::time::Duration;

/// Memory for keys, bytes; counts against `RLIMIT_MEMLOCK`.
pub const SECRET_HEAP_BYTES: usize = 1 << 20;
/// Clock difference between the processes of an installation that is forgiven, ms.
pub const SKEW_MS: u64 = 5_000;
/// Oldest assertion that may still forget a workspace, ms: a delete waits for its host.
pub const FORGET_AUTHORITY_MAX_MS: u64 = 24 * 3_600_000;
/// Longest secret that is looked at, bytes.
pub const SECRET_MAX_BYTES: usize = 256;
/// Longest name of an account or key, characters.
pub const NAME_MAX_CHARS: usize = 255;
/// Longest wait for a change, ms.
pub const CHANGES_WAIT_MAX_MS: u64 = 30_000;
/// Most states in one answer.
pub const CHANGES_MAX: usize = 1_000;
/// Accounts, and API keys, of an installation.
pub const ACCOUNTS_MAX: usize = 1_000_000;
/// Acts in a policy.
pub const POLICY_ACTS_MAX: usize = 8;
/// Refusals a second and source that are logged one by one; more are counted.
pub const REFUSALS_LOGGED_PER_S: u32 = 10;
/// Sources whose refusals are counted apart; the rest share one count.
pub const REFUSAL_SOURCES_MAX: usize = 4_096;
/// Refusals that wait for the log at once; beyond, they are only counted.
pub const REFUSALS_QUEUED_MAX: usize = 256;
/// How long a closing act waits for the log before it goes ahead without it.
pub const CLOSING_LOG_WAIT: Duration = Duration::from_secs(2);
/// Entries that wait for the log to come back; beyond it closing acts wait too.
pub const OUTBOX_MAX: i64 = 10_000;
/// How often duties without a request are looked after.
pub const DUTY_INTERVAL: Duration = Duration::from_secs(5);
/// Longest wait for the store.
pub const STORE_WAIT: Duration = Duration::from_secs(10);

const _: () = assert!(CHANGES_MAX * 1_000 <= api::limits::FRAME_MAX_BYTES);
