//! Bounds of jails, with their units. Users are ranges that no other program has.

use std::time::Duration;

/// First uid (and gid) of VMMs; slot i runs as this + i.
pub const VMM_UID: u32 = 900_000;
/// First uid of disk processes.
pub const DISK_UID: u32 = 910_000;
/// First uid of vmctl processes.
pub const VMCTL_UID: u32 = 920_000;
/// The uid of the process that owns the files at rest.
pub const VOLUMES_UID: u32 = 929_997;
/// The uid of the process that owns taps and firewall.
pub const NET_UID: u32 = 929_998;
/// The uid that formats the empty ext4 templates.
pub const MKFS_UID: u32 = 929_999;

/// The jail is set up, or its process has exec'ed, within this.
pub const JAIL_WAIT: Duration = Duration::from_secs(10);
/// A VMM listens for its API's client within this.
pub const API_WAIT: Duration = Duration::from_secs(5);
/// How often it is asked: nothing tells when a socket begins to listen.
pub const API_POLL: Duration = Duration::from_millis(1);
/// A killed process is gone within this; one that waits for a dead disk is not.
pub const KILL_WAIT: Duration = Duration::from_secs(2);

/// Memory of the VMM and vmctl besides the guest's own, MiB.
pub const VMM_OVERHEAD_MB: u64 = 128;
/// Memory of one disk process, MiB: its own (a few), and the host's page cache of the volume's
/// ciphertext, which is charged to it and given back under pressure.
pub const DISK_MEMORY_MB: u64 = 512;
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
/// Bytes kept of what a VMM writes to stderr (one pipe's buffer).
pub const STDERR_MAX_BYTES: usize = 4 << 10;
/// Largest small file that warden reads (journals, manifests, keys), bytes.
pub const SMALL_FILE_MAX_BYTES: u64 = 64 << 10;
/// vmctl takes a descriptor within this.
pub const VMCTL_WAIT: Duration = Duration::from_secs(5);
/// Most descriptors in one message.
pub const FDS_MAX: usize = 48;
/// Longest request to the launcher, and longest answer, bytes.
pub const ASK_MAX_BYTES: usize = 4 << 10;

const _: () = assert!(VMM_UID + model::limits::SLOTS_MAX as u32 <= DISK_UID);
const _: () = assert!(DISK_UID + model::limits::SLOTS_MAX as u32 <= VMCTL_UID);
const _: () = assert!(VMCTL_UID + model::limits::SLOTS_MAX as u32 <= VOLUMES_UID);
const _: () = assert!(EXE_FD as u64 >= NOFILE_MAX);
