//! Bounds of warden, with their units. Those of jails are `jail::limits`.

use std::time::Duration;

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

/// The disk process says hello within this.
pub const HELLO_WAIT: Duration = Duration::from_secs(10);
/// The disk process opens, or formats, a volume within this.
pub const READY_WAIT: Duration = Duration::from_secs(60);
/// A disk process makes what was flushed durable, and says so, within this.
pub const ANCHOR_WAIT: Duration = Duration::from_secs(10);
/// Words of an ended disk process that are read.
pub const ANCHORS_MAX: usize = 16;
/// vmctl takes a descriptor within this.
pub const VMCTL_WAIT: Duration = Duration::from_secs(5);
/// A disk process flushes and exits within this, or is killed.
pub const DISK_CLOSE_WAIT: Duration = Duration::from_secs(5);
/// Making an empty file system takes no longer than this.
pub const MKFS_WAIT: Duration = Duration::from_secs(60);
