//! Bounds of warden, with their units.

use std::time::Duration;

/// First uid (and gid) of VMMs; slot i runs as this + i.
pub const VMM_UID: u32 = 900_000;
/// First uid of disk processes.
pub const DISK_UID: u32 = 910_000;
/// First uid of vmctl processes.
pub const VMCTL_UID: u32 = 920_000;
/// The uid that formats the empty ext4 templates.
pub const MKFS_UID: u32 = 929_999;

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 16;
/// Requests at once, over all connections.
pub const IN_FLIGHT_MAX: usize = 64;
/// Open ports of one slot.
pub const OPEN_MAX: usize = 64;
/// Longest sealed grant, bytes of base64.
pub const SEALED_MAX_BYTES: usize = 16 << 10;
/// Largest small file that warden reads (journals, manifests, keys), bytes.
pub const SMALL_FILE_MAX_BYTES: u64 = 64 << 10;
/// Bytes kept of what a VMM writes to stderr (one pipe's buffer).
pub const STDERR_MAX_BYTES: usize = 4 << 10;

/// The jail is set up, or its process has exec'ed, within this.
pub const JAIL_WAIT: Duration = Duration::from_secs(10);
/// The disk process says hello within this.
pub const HELLO_WAIT: Duration = Duration::from_secs(10);
/// The disk process opens, or formats, a volume within this.
pub const READY_WAIT: Duration = Duration::from_secs(60);
/// vmctl takes a descriptor within this.
pub const VMCTL_WAIT: Duration = Duration::from_secs(5);
/// A disk process flushes and exits within this, or is killed.
pub const DISK_CLOSE_WAIT: Duration = Duration::from_secs(5);
/// A killed process is gone within this; one that waits for a dead disk is not.
pub const KILL_WAIT: Duration = Duration::from_secs(2);
/// Making an empty file system takes no longer than this.
pub const MKFS_WAIT: Duration = Duration::from_secs(60);

/// Memory of the VMM and vmctl besides the guest's own, MiB.
pub const VMM_OVERHEAD_MB: u64 = 128;
/// Memory of one disk process, MiB.
pub const DISK_MEMORY_MB: u64 = 128;
/// Memory the kernel must not take from a disk process (cgroup v2), MiB.
pub const DISK_MEMORY_MIN_MB: u64 = 16;
/// Threads of a VMM (its pool for file I/O alone may have 64) and its vmctl, besides virtual CPUs.
pub const PIDS_MAX: u64 = 128;
/// Open files of a jailed process.
pub const NOFILE_MAX: u64 = 256;
/// Number of the executable's descriptor while a jail is set up: above [`NOFILE_MAX`], so that
/// nothing in the jail can ever hold a descriptor of that number again.
pub const EXE_FD: i32 = 1023;
/// Largest state file of a template, bytes.
pub const STATE_MAX_BYTES: u64 = 64 << 20;

const _: () = assert!(VMM_UID + model::limits::SLOTS_MAX as u32 <= DISK_UID);
const _: () = assert!(DISK_UID + model::limits::SLOTS_MAX as u32 <= VMCTL_UID);
const _: () = assert!(VMCTL_UID + model::limits::SLOTS_MAX as u32 <= MKFS_UID);
const _: () = assert!(EXE_FD as u64 >= NOFILE_MAX);
