//! What a workspace is asked to be.

use crate::limits;
use serde::{Deserialize, Serialize};

/// How long a workspace's disk lives (DSK-6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The disk survives stop, start and host reboot.
    Permanent,
    /// The disk lives from launch to deletion.
    Temporary,
}

/// The power state that is wanted of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// A VM runs, with the disk attached.
    Running,
    /// A VM holds its memory and uses no CPU.
    Paused,
    /// No VM; disk and memory are ciphertext.
    Asleep,
    /// No VM; the disk is ciphertext.
    Stopped,
    /// Nothing of it is left.
    Deleted,
}

/// What a released key is for; each purpose has its own subkey.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The workspace's disk.
    #[default]
    Disk,
    /// The memory of a workspace that is asleep.
    Memory,
    /// The disk in a snapshot.
    SnapshotDisk,
    /// The memory in a snapshot.
    SnapshotMemory,
    /// An archive of files.
    Archive,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Disk,
        Self::Memory,
        Self::SnapshotDisk,
        Self::SnapshotMemory,
        Self::Archive,
    ];

    /// Whether a workspace has several, each by its id: archives, and the parts of snapshots, of which
    /// one is made beside the one that stands.
    #[must_use]
    pub fn is_by_id(self) -> bool {
        match self {
            Self::SnapshotDisk | Self::SnapshotMemory | Self::Archive => true,
            Self::Disk | Self::Memory => false,
        }
    }

    /// Whether it is of memory or a disk at one moment: of each kind the last stands.
    #[must_use]
    pub fn is_image(self) -> bool {
        match self {
            Self::Memory | Self::SnapshotDisk | Self::SnapshotMemory => true,
            Self::Disk | Self::Archive => false,
        }
    }

    /// The name that goes into key derivation; never change one.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Memory => "memory",
            Self::SnapshotDisk => "snapshot-disk",
            Self::SnapshotMemory => "snapshot-memory",
            Self::Archive => "archive",
        }
    }
}

/// When a workspace that stopped by itself is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum RestartPolicy {
    /// Never.
    #[serde(rename = "no", alias = "never")]
    No,
    /// Whatever the reason.
    #[default]
    #[serde(rename = "always")]
    Always,
    /// After a failure only.
    #[serde(rename = "on-failure")]
    OnFailure,
    /// As `always`: what its owner stopped is never started by itself, under either name.
    #[serde(rename = "unless-stopped")]
    UnlessStopped,
}

impl RestartPolicy {
    /// The values, for messages.
    pub const VALUES: &str = "no, never, always, on-failure, unless-stopped";

    /// The word of the contract.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Always => "always",
            Self::OnFailure => "on-failure",
            Self::UnlessStopped => "unless-stopped",
        }
    }
}

/// What happens to a workspace that nobody uses; at least one of the two is not 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idle {
    /// Its memory goes to disk after this, seconds; 0 is never.
    pub suspend_after_s: u64,
    /// It is stopped after this, seconds; 0 is never.
    pub stop_after_s: u64,
}

/// What happens when a time-to-live ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum TtlAction {
    /// Stop; may be started again.
    #[default]
    Stop,
    /// Keep memory, use no CPU.
    Pause,
    /// Save memory to disk.
    Suspend,
    /// Delete.
    Remove,
}

/// A workspace's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Disk, MiB.
    pub disk_size_mb: u32,
}

impl Resources {
    /// The first field that is out of bounds, with the bounds.
    ///
    /// # Errors
    /// A sentence for the user that names the field.
    pub fn check(&self) -> Result<(), String> {
        let one = |name: &str, v: u32, r: &std::ops::RangeInclusive<u32>| {
            if r.contains(&v) {
                Ok(())
            } else {
                Err(format!(
                    "{name} must be between {} and {}, not {v}",
                    r.start(),
                    r.end()
                ))
            }
        };
        one("cpus", self.cpus, &limits::CPUS)?;
        one("memory_mb", self.memory_mb, &limits::MEMORY_MB)?;
        one("disk_size_mb", self.disk_size_mb, &limits::DISK_MB)
    }
}

impl Default for Resources {
    /// One CPU, 256 MiB of memory, 8 GiB of disk: the pool's own size.
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mb: 256,
            disk_size_mb: 8_192,
        }
    }
}
