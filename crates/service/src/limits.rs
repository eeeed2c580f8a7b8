//! Bounds of what daemons share.

/// Connections that one RPC socket serves at once.
pub const RPC_CONNECTIONS_MAX: usize = 256;
/// Largest configuration file, bytes.
pub const CONFIG_MAX_BYTES: u64 = 64 << 10;
/// Largest trust file, bytes.
pub const TRUST_MAX_BYTES: u64 = 256 << 10;
/// How long a drain waits for requests in flight.
pub const DRAIN_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// Disk bandwidth of a workspace, bytes/s: what the disk process takes.
pub const DISK_BYTES_PER_S: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 40;
/// Disk operations/s of a workspace: what the disk process takes.
pub const DISK_OPS_PER_S: std::ops::RangeInclusive<u64> = 10..=100_000_000;
