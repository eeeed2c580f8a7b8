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

/// Slots (VMs at once, pooled ones included) of one host.
pub const SLOTS_MAX: u16 = 4_096;

const _: () = assert!(
    SLOTS_MAX <= 65_000,
    "a slot must fit the /16 of guest addresses"
);
