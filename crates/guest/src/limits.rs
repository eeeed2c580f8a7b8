//! Bounds of the agent, with units in the names.

use std::time::Duration;

/// Largest JSON body of `POST /files/write`, bytes.
pub const WRITE_BODY_MAX_BYTES: usize = 64 << 20;
/// Largest part of the machine's memory that one write's body may take, as a divisor.
pub const WRITE_BODY_MEMORY_DIVISOR: u64 = 6;
/// Largest body of any other request, and of an exec request, bytes.
pub const BODY_MAX_BYTES: usize = 1 << 20;
/// Largest request head, bytes.
pub const HEAD_MAX_BYTES: usize = 64 << 10;
/// How long a client may take over a request's head or a TLS handshake.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence inside a request's body.
pub const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections at a time, on each listener.
pub const CONNECTIONS_MAX: usize = 256;
/// Chunks queued for a slow reader of a stream before the sender waits.
pub const STREAM_QUEUE_CHUNKS: usize = 16;

/// Exec tasks running at a time (contract §3.4).
pub const TASKS_RUNNING_MAX: usize = 50;
/// Exec tasks remembered after their exit.
pub const TASKS_EXITED_MAX: usize = 500;
/// Output kept of one stream of one task, bytes; what is streamed has no bound.
pub const TASK_OUTPUT_MAX_BYTES: usize = 1 << 20;
/// Output kept of all tasks together, bytes: oldest exited tasks are forgotten first.
pub const TASKS_OUTPUT_MAX_BYTES: usize = 32 << 20;
/// One read of a task's output, bytes.
pub const TASK_READ_BYTES: usize = 16 << 10;
/// What is read of a pipe after its process exited, bytes (a pipe's largest capacity).
pub const TASK_DRAIN_MAX_BYTES: usize = 1 << 20;
/// How long a task is remembered after its exit if the caller names no time, s.
pub const TASK_TTL_DEFAULT_S: u64 = 300;
/// Longest time-to-live and timeout of a task, s.
pub const TASK_SECONDS_MAX: u64 = 30 * 86_400;
/// Subscribers of one task's output.
pub const TASK_SUBSCRIBERS_MAX: usize = 16;
/// Words of a command.
pub const TASK_ARGS_MAX: usize = 4096;

/// Longest path, bytes.
pub const PATH_MAX_BYTES: usize = 4095;
/// Entries in one listing (contract §3.2).
pub const LIST_ENTRIES_MAX: usize = 50_000;
/// Depth of a listing if the caller names none, and the most it may name.
pub const LIST_DEPTH_DEFAULT: usize = 20;
/// Deepest listing.
pub const LIST_DEPTH_MAX: usize = 64;
/// File contents in one listing, bytes.
pub const LIST_CONTENT_MAX_BYTES: u64 = 50 << 20;
/// Directory entries looked at in one listing, shown or not.
pub const LIST_VISITED_MAX: usize = 1_000_000;
/// Glob patterns of one request or one `.gitignore`.
pub const PATTERNS_MAX: usize = 1000;
/// Longest glob pattern, bytes.
pub const PATTERN_MAX_BYTES: usize = 256;
/// How long a listing may take.
pub const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest file, or range of lines of one, that a read returns, bytes.
pub const READ_MAX_BYTES: u64 = 16 << 20;
/// Deepest tree that delete removes.
pub const DELETE_DEPTH_MAX: usize = 512;

/// Deepest tree in an archive: each level holds a descriptor.
pub const ARCHIVE_DEPTH_MAX: usize = 256;
/// How long the next piece of an archive that is put back may take.
pub const ARCHIVE_PIECE_WAIT: Duration = Duration::from_secs(60);
/// How long a device or port may take to appear at boot.
pub const DEVICE_WAIT: Duration = Duration::from_secs(10);
/// Longest pause between two attempts to connect to vmctl again.
pub const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long a resized disk may take to show its size.
pub const DISK_SIZE_WAIT: Duration = Duration::from_secs(2);
/// Processes have this long between SIGTERM and SIGKILL.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);
/// How long file systems may take to be let go.
pub const UNMOUNT_WAIT: Duration = Duration::from_secs(2);
/// How long a machine with a vsock stays after its last word, so that it gets out.
pub const DOWN_WAIT: Duration = Duration::from_millis(500);
/// Life of the agent's TLS certificate: the longest a workspace runs without a restart.
pub const LEAF_TTL: Duration = Duration::from_secs(397 * 86_400);
/// Longest JSON of an identity block, bytes.
pub const IDENTITY_MAX_BYTES: usize = 64 << 10;
/// Longest `message` of a `failed`, characters.
pub const FAILURE_MESSAGE_MAX_CHARS: usize = 256;

const _: () = assert!(TASK_OUTPUT_MAX_BYTES * 2 < TASKS_OUTPUT_MAX_BYTES);
const _: () = assert!(LIST_DEPTH_DEFAULT <= LIST_DEPTH_MAX);
