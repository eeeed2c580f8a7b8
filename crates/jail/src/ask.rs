//! What warden may ask the launcher for: a kind and its numbers. Descriptors come beside it, first
//! `groups` of them `cgroup.procs` files to join, then those of the kind, in this order:
//!
//! | kind | descriptors |
//! |---|---|
//! | vmm | image, stderr, QMP, agent channel, tap (Firecracker: none, and what it connects to goes out by the first channel); cold and build: kernel, initramfs; template and build: memory, state; wake: the mount of saved memory, state |
//! | vmctl | executable, QMP, agent channel, host's listener, warden's listener |
//! | disk | executable, warden's end of its channel (kept for the next warden), its own end, `/dev/fuse` twice |
//! | net | executable, its end of the channel |
//! | volumes | executable, its end of the channel |
//! | mkfs | the file |
//! | open_mount | the mount |
//! | give_mount | the VMM's pidfd, the mount |
//! | settle | the VMM's pidfd |

use api::warden::Start;
use model::limits as bounds;
use serde::{Deserialize, Serialize};
use vmm::driver::Driver;

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// How many of the descriptors are control groups to join.
    pub groups: usize,
    /// What is started.
    pub kind: Kind,
}

/// The closed set of kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// A VMM.
    Vmm {
        /// The slot.
        slot: u16,
        /// How its guest comes up.
        how: Start,
        /// Memory, MiB.
        memory_mb: u32,
        /// Virtual CPUs.
        cpus: u32,
        /// Which VMM.
        driver: Driver,
        /// Whether it has /dev/kvm.
        kvm: bool,
    },
    /// Its vmctl.
    Vmctl {
        /// The slot.
        slot: u16,
        /// How its guest comes up.
        how: Start,
        /// Which VMM it is that it controls.
        driver: Driver,
        /// Memory, MiB.
        memory_mb: u32,
        /// Virtual CPUs.
        cpus: u32,
        /// The user whose requests it answers.
        host_uid: u32,
    },
    /// A slot's disk process.
    Disk {
        /// The slot.
        slot: u16,
    },
    /// The owner of taps and firewall, in the fabric's network namespace.
    Net {
        /// The guests' network, as an IPv4 address.
        base: u32,
        /// The user whose connections may reach guests.
        edge_uid: u32,
    },
    /// The owner of the files at rest.
    Volumes,
    /// mke2fs, on an empty file.
    Mkfs,
    /// Nothing is run: the mount's one file is opened as the slot's VMM, and sent back.
    OpenMount {
        /// The slot.
        slot: u16,
        /// For what.
        access: OpenFor,
    },
    /// Nothing is run: the mount goes into the jail of a VMM that takes no descriptors.
    GiveMount {
        /// The slot.
        slot: u16,
    },
    /// Nothing is run: such a VMM was prepared; its disk goes where it opens it next, the tap that it
    /// has opened to warden's network namespace.
    Settle {
        /// The slot.
        slot: u16,
    },
}

/// What a mount's file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenFor {
    /// As a guest's disk: reading and writing, past the page cache.
    Disk,
    /// To save memory: writing only, so that whoever passes it on can't read it.
    Save,
    /// To wake: reading only.
    Wake,
}

impl Kind {
    /// For messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vmm { .. } => "the VMM",
            Self::Vmctl { .. } => "vmctl",
            Self::Disk { .. } => "the disk",
            Self::Net { .. } => "casemate-net",
            Self::Volumes => "casemate-volumes",
            Self::Mkfs => "mke2fs",
            Self::OpenMount { .. } | Self::GiveMount { .. } => "the disk's file",
            Self::Settle { .. } => "the disk and the tap",
        }
    }

    /// Whether the numbers are within their bounds: the launcher does not take warden's word.
    ///
    /// # Errors
    /// The number that is not.
    pub fn check(&self) -> Result<(), String> {
        let (slot, numbers) = match *self {
            Self::Vmm {
                slot,
                memory_mb,
                cpus,
                ..
            } => (slot, Some((memory_mb, cpus))),
            Self::Vmctl {
                slot,
                memory_mb,
                cpus,
                ..
            } => (slot, Some((memory_mb, cpus))),
            Self::Disk { slot }
            | Self::OpenMount { slot, .. }
            | Self::GiveMount { slot }
            | Self::Settle { slot } => (slot, None),
            Self::Net { .. } | Self::Volumes | Self::Mkfs => (0, None),
        };
        if slot >= bounds::SLOTS_MAX {
            return Err(format!("slot {slot}: out of bounds"));
        }
        match numbers {
            Some((memory_mb, _)) if !bounds::MEMORY_MB.contains(&memory_mb) => {
                Err(format!("memory_mb {memory_mb}: out of bounds"))
            }
            Some((_, cpus)) if !bounds::CPUS.contains(&cpus) => {
                Err(format!("cpus {cpus}: out of bounds"))
            }
            _ => Ok(()),
        }
    }
}

/// What the launcher tells warden.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The child waits; its pidfd came with this (or the opened file did).
    Ready {
        /// The child, as warden sees it.
        pid: u32,
    },
    /// It could not; at which step and why.
    Failed(String),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_text_is_in_a_request() {
        let kind = Kind::Vmm {
            slot: 1,
            how: Start::Cold,
            memory_mb: 256,
            cpus: 1,
            driver: Driver::Qemu,
            kvm: false,
        };
        let text = serde_json::to_string(&Ask { groups: 4, kind }).unwrap();
        assert_eq!(serde_json::from_str::<Ask>(&text).unwrap().kind, kind);
        for extra in [r#""path":"/etc""#, r#""argv":["sh"]"#, r#""id":0"#] {
            let text = text.replacen("\"slot\"", &format!("{extra},\"slot\""), 1);
            assert!(serde_json::from_str::<Ask>(&text).is_err(), "{text}");
        }
        let slot = bounds::SLOTS_MAX;
        assert!(Kind::Disk { slot }.check().is_err());
        let (slot, access) = (slot - 1, OpenFor::Wake);
        assert!(Kind::OpenMount { slot, access }.check().is_ok());
    }

    proptest! {
        #[test]
        fn survives_any_request(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Ask>(&bytes);
        }

        #[test]
        fn numbers_out_of_bounds_are_refused(slot: u16, memory_mb: u32, cpus: u32) {
            let (how, driver) = (Start::Cold, Driver::Firecracker);
            let kind = Kind::Vmm { slot, how, memory_mb, cpus, driver, kvm: true };
            let within = slot < bounds::SLOTS_MAX
                && bounds::MEMORY_MB.contains(&memory_mb)
                && bounds::CPUS.contains(&cpus);
            prop_assert_eq!(kind.check().is_ok(), within);
        }
    }
}
