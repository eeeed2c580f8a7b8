//! Bounds of what warden waits for, with their units.

use std::time::Duration;

/// A disk process says hello within this.
pub const HELLO_WAIT: Duration = Duration::from_secs(10);
/// It opens, or formats, a volume within this.
pub const READY_WAIT: Duration = Duration::from_secs(60);
/// It makes what was flushed durable, and says so, within this.
pub const ANCHOR_WAIT: Duration = Duration::from_secs(10);
/// Words of an ended one that are read.
pub const ANCHORS_MAX: usize = 16;
/// It copies a disk within this: 200 GiB at 350 MB/s.
pub const COPY_WAIT: Duration = Duration::from_secs(600);
/// It flushes and exits within this, or is killed.
pub const DISK_CLOSE_WAIT: Duration = Duration::from_secs(5);
/// Making an empty file system takes no longer than this.
pub const MKFS_WAIT: Duration = Duration::from_secs(60);
