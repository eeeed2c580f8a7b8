//! Bounds of the VMM drivers and of vmctl.

use std::time::Duration;

/// Longest line that the VMM's control channel may send, bytes.
pub const QMP_LINE_MAX_BYTES: usize = 1 << 20;
/// Events of the VMM that are kept until someone asks; later ones push out the oldest.
pub const QMP_EVENTS_MAX: usize = 64;
/// How long one command to the VMM may take.
pub const QMP_COMMAND_MAX: Duration = Duration::from_secs(10);
/// How long loading or saving a template's state may take.
pub const MIGRATE_MAX: Duration = Duration::from_secs(60);
/// How long saving a guest's memory may take.
pub const MEMORY_SAVE_MAX: Duration = Duration::from_secs(300);
/// Pause between two looks at a running migration.
pub const MIGRATE_POLL: Duration = Duration::from_millis(1);
/// How long the VMM may take to end after `quit`.
pub const QUIT_MAX: Duration = Duration::from_secs(5);

/// How long a new Firecracker may take to be reached.
pub const API_CONNECT_MAX: Duration = Duration::from_secs(8);
/// Longest head of an answer of Firecracker's API, bytes.
pub const API_HEAD_MAX_BYTES: usize = 8 << 10;
/// Longest body of one, bytes.
pub const API_BODY_MAX_BYTES: usize = 64 << 10;
/// How long Firecracker may take to answer; a snapshot may take [`MIGRATE_MAX`].
pub const API_CALL_MAX: Duration = Duration::from_secs(10);
/// How long writing a request to it may block.
pub const API_WRITE_MAX: Duration = Duration::from_secs(5);

/// How long a restored guest may take to its rehearsal's end.
pub const PREPARE_TEMPLATE_MAX: Duration = Duration::from_secs(30);
/// How long a cold boot may take to its rehearsal's end.
pub const PREPARE_COLD_MAX: Duration = Duration::from_secs(120);
/// Longest `wait_ms` of an attach.
pub const ATTACH_WAIT_MAX_MS: u64 = 120_000;
/// Longest `wait_ms` of an archive.
pub const ARCHIVE_WAIT_MAX_MS: u64 = 600_000;
/// Longest `grace_ms` of a shutdown.
pub const SHUTDOWN_GRACE_MAX_MS: u64 = 60_000;

/// What the guest may say on its channel between two requests of ours, bytes. Then nobody
/// listens until the next request: a flooding guest fills its own queue, not our time.
pub const AGENT_BUDGET_BYTES: usize = 1 << 20;
/// How long a write to the guest's channel may block.
pub const AGENT_WRITE_MAX: Duration = Duration::from_secs(5);
/// Longest text of the guest that reaches the operator's log, characters.
pub const GUEST_TEXT_MAX_CHARS: usize = 256;

/// Connections to vmctl at a time, both sockets together.
pub const CONNECTIONS_MAX: usize = 16;
/// How long writing an answer to a client may block.
pub const CLIENT_WRITE_MAX: Duration = Duration::from_secs(2);
/// Smallest disk: identity area and a volume, bytes.
pub const DISK_MIN_BYTES: u64 = 2 << 20;
/// Largest disk, bytes: the size of the placeholder that the guest sees before.
pub const DISK_MAX_BYTES: u64 = 1 << 40;

/// Guest memory, MiB.
pub const MEMORY_MIN_MIB: u32 = 128;
/// Guest memory, MiB.
pub const MEMORY_MAX_MIB: u32 = 1 << 20;
/// Virtual CPUs: what `microvm` takes.
pub const CPUS_MAX: u32 = 64;
/// Virtual CPUs: what Firecracker takes.
pub const CPUS_MAX_FIRECRACKER: u32 = 32;

/// How long the KVM probe's guest may run.
pub const PROBE_MAX: Duration = Duration::from_secs(3);

const _: () = assert!(api::limits::CHANNEL_MESSAGE_MAX_BYTES < AGENT_BUDGET_BYTES);
