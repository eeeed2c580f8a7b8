//! Bounds of the public contract, with their units.

/// Virtual CPUs of a workspace.
pub const CPUS: std::ops::RangeInclusive<u32> = 1..=32;
/// Memory of a workspace, MiB.
pub const MEMORY_MB: std::ops::RangeInclusive<u32> = 128..=65_536;
/// Disk of a workspace, MiB.
pub const DISK_MB: std::ops::RangeInclusive<u32> = 64..=204_800;
/// Longest workspace name, characters.
pub const NAME_MAX_CHARS: usize = 255;
/// Slug length, characters.
pub const SLUG_CHARS: std::ops::RangeInclusive<usize> = 3..=128;
/// Most entries in `ingress_ports`.
pub const INGRESS_PORTS_MAX: usize = 50;
/// Most environment variables of a workspace.
pub const ENV_MAX: usize = 256;
/// Longest environment variable `K=V`, bytes.
pub const ENV_ITEM_MAX_BYTES: usize = 8_192;

/// The guest agent's mTLS port, for the edge.
pub const PORT_AGENT_TLS: u16 = 9991;
/// The guest agent's raw-token port, for private links.
pub const PORT_AGENT_RAW: u16 = 9990;

/// Network bandwidth of a workspace, each way, bytes/s.
pub const NET_BYTES_PER_S: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 33;
/// Network packets/s of a workspace, each way.
pub const NET_PACKETS_PER_S: std::ops::RangeInclusive<u64> = 100..=100_000_000;
/// Processes and threads that the VMM of a workspace may have on the machine.
pub const PIDS: std::ops::RangeInclusive<u32> = 128..=65_536;

/// Time-to-live, seconds: up to 366 days.
pub const TTL_S: std::ops::RangeInclusive<u64> = 1..=366 * 86_400;
/// Restarts in a row that an owner may allow.
pub const MAX_RESTARTS: std::ops::RangeInclusive<u32> = 0..=1_000;
/// Shortest `suspend_after` that is not 0, seconds.
pub const SUSPEND_AFTER_MIN_S: u64 = 120;
/// Shortest `stop_after` that is not 0, seconds.
pub const STOP_AFTER_MIN_S: u64 = 3_600;

/// Archives of a workspace. Together they take up as much as its disk, at most.
pub const ARCHIVES_MAX: usize = 16;
/// Longest version of an archive, characters.
pub const ARCHIVE_VERSION_MAX_CHARS: usize = 64;
/// Paths of an archive, and as many to leave out.
pub const ARCHIVE_PATHS_MAX: usize = 64;
/// All of them, bytes: they travel in one message to the guest, and stay in the archive's record.
pub const ARCHIVE_PATHS_MAX_BYTES: usize = 4 << 10;

/// Slots (VMs at once, pooled ones included) of one host.
pub const SLOTS_MAX: u16 = 4_096;

const _: () = assert!(
    SLOTS_MAX <= 65_000,
    "a slot must fit the /16 of guest addresses"
);
