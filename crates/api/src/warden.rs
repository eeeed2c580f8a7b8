//! Warden's socket: root, behind a closed enum of ids and numbers. No field here becomes a path
//! or a command.

use model::{HostId, ObjectId, Purpose, StartId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// An image's id: SHA-256 of the erofs file, hex.
pub type ImageId = String;

/// A request to warden.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Answer: [`Status`].
    Status,
    /// Makes slot `slot`: netns, tap, jail, cgroup, VMM (not running a guest yet) and vmctl.
    /// Answer: [`VmOpened`].
    VmOpen {
        /// The slot; must be free.
        slot: u16,
        /// Restore a template, boot cold, or boot to build a template.
        how: Start,
        /// The image.
        image: ImageId,
        /// Memory, MiB.
        memory_mb: u32,
        /// Virtual CPUs.
        cpus: u32,
    },
    /// After a build VM saved itself: measures the files, makes them read-only and root's, and
    /// signs the manifest. Closes the slot. Answer: `true`.
    TemplateSeal {
        /// The build slot.
        slot: u16,
    },
    /// Spawns the workspace's disk process on the slot and attests it. Answer: [`DiskOpened`].
    DiskOpen {
        /// The slot; must hold a VM without a disk.
        slot: u16,
        /// The workspace.
        workspace: WorkspaceId,
        /// The start.
        start_id: StartId,
        /// What the key is for.
        purpose: Purpose,
        /// The lease's nonce, 32 bytes hex.
        nonce: String,
        /// Size of the volume, MiB.
        disk_mb: u32,
        /// Disk bandwidth, bytes/s.
        bytes_per_s: u64,
        /// Disk operations/s.
        ops_per_s: u64,
        /// Processes and threads of the VMM; 0 is warden's own bound.
        #[serde(default)]
        pids: u32,
        /// Begin the disk anew, as a copy of this snapshot's: its own to restore, another's to fork.
        /// What the disk was is gone once the grant is answered.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Snapshot>,
    },
    /// Gives the disk process its sealed grant; it opens (or, if the disk is new, formats) the
    /// volume; the file goes to vmctl. Answer: `true`.
    DiskGrant {
        /// The slot.
        slot: u16,
        /// `kms::Released::sealed`.
        sealed: String,
        /// `kms::Released::aad`.
        aad: String,
        /// The same for the disk that it is a copy of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Sealed>,
    },
    /// Has the slot's disk process attested for a copy of its disk, the snapshot's. The VM must be
    /// paused until it is granted. Answer: [`Attested`].
    SnapshotDiskOpen {
        /// The slot; must have its disk.
        slot: u16,
        /// The lease's start.
        start_id: StartId,
        /// The lease's nonce, 32 bytes hex.
        nonce: String,
    },
    /// Gives it the copy's key: the disk as it stands is encrypted again into a `snapshot_disk` beside
    /// those that there are. Answer, once that is durable: `true`.
    SnapshotDiskGrant {
        /// The slot.
        slot: u16,
        /// The snapshot's id.
        id: ObjectId,
        /// `kms::Released::sealed`.
        sealed: String,
        /// `kms::Released::aad`.
        aad: String,
    },
    /// Spawns a process on the slot that serves memory of the workspace, or an archive of its files,
    /// and attests it. Answer: [`Attested`].
    MemoryOpen {
        /// The slot; to save, and for an archive, it must have its disk; to wake, it must be free.
        slot: u16,
        /// The workspace; to save, the slot's.
        workspace: WorkspaceId,
        /// The lease's start.
        start_id: StartId,
        /// `memory`, `snapshot_memory` or `archive`.
        purpose: Purpose,
        /// The lease's nonce, 32 bytes hex.
        nonce: String,
        /// Make a new image. Otherwise wake from the one that is there, or read the archive.
        save: bool,
        /// Which snapshot or archive; of memory there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<ObjectId>,
        /// What an archive that is made may hold, MiB; with such a one only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_mb: Option<u32>,
    },
    /// Gives that process its sealed grant. To save: a new image is made and vmctl has its file
    /// (`vmctl::Op::MemorySave`, `vmctl::Op::Archive`). To read an archive: vmctl has its file
    /// (`vmctl::Op::Unarchive`). To wake: the image is opened, and the slot's VM is made on it
    /// as by [`Op::VmOpen`]; its disk comes next. Answer: [`Memory`].
    MemoryGrant {
        /// The slot.
        slot: u16,
        /// `kms::Released::sealed`.
        sealed: String,
        /// `kms::Released::aad`.
        aad: String,
    },
    /// Ends a save, or the reading of an archive. Answer, once it is durable: `true`.
    MemoryEnd {
        /// The slot.
        slot: u16,
        /// What becomes of what was saved.
        end: MemoryEnd,
    },
    /// Removes one of the workspace's objects. Idempotent. Answer: `true`.
    ObjectErase {
        /// The workspace.
        workspace: WorkspaceId,
        /// The object; must not be on a slot. Of a snapshot, a VM that was restored from it reads on.
        purpose: Purpose,
        /// Which snapshot or archive.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<ObjectId>,
    },
    /// What of a workspace is at rest on this machine. Answer: `Vec<`[`Object`]`>`.
    Objects {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// Replaces the slot's firewall triples, atomically. Answer: `true`.
    NetSet {
        /// The slot.
        slot: u16,
        /// What is open; nothing else is.
        open: Vec<Open>,
        /// How fast.
        #[serde(default)]
        rates: NetRates,
    },
    /// How far the slot's disk has got, for the KMS; of a slot that is dead: what was said last.
    /// Answer: `Option<`[`crate::disk::Anchored`]`>`.
    DiskAnchor {
        /// The slot.
        slot: u16,
        /// End VMM and disk first, so that it is the last word; the slot is dead then.
        end: bool,
    },
    /// Ends everything on the slot: disk, VMM, vmctl, tap, rules, cgroup. Idempotent.
    /// Answer: `true`.
    SlotClose {
        /// The slot.
        slot: u16,
    },
    /// Removes the workspace's disk file. Idempotent. Answer: `true`.
    DiskErase {
        /// The workspace; must not be on a slot.
        workspace: WorkspaceId,
    },
    /// Answer: [`Counters`].
    Counters {
        /// The slot.
        slot: u16,
    },
}

/// How a VM comes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// From the template of (VMM, kernel, image, memory, cpus).
    Template,
    /// Cold boot.
    Cold,
    /// Cold boot with shared memory, to be saved as the template.
    Build,
    /// From saved memory: by [`Op::MemoryGrant`] only.
    Wake,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Whose.
    pub workspace: WorkspaceId,
    /// Its id.
    pub id: ObjectId,
}

/// What becomes of saved memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryEnd {
    /// It becomes the workspace's image, and the slot is closed: from then on the workspace sleeps.
    Sleep,
    /// It becomes the memory of the snapshot, or the archive, of its id; the VM stays as it is.
    Keep,
    /// Nothing; the VM stays as it is.
    Drop,
}

/// A sealed grant.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    /// `kms::Released::sealed`.
    pub sealed: String,
    /// `kms::Released::aad`.
    pub aad: String,
}

/// Bounds of a slot's network, each way; 0 is no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetRates {
    /// Bytes/s.
    pub bytes_per_s: u64,
    /// Packets/s.
    pub packets_per_s: u64,
}

/// Who may send to a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The edge.
    Edge,
    /// The workspace on this slot.
    Slot(u16),
}

/// One opened (source, port).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Open {
    /// From whom.
    pub source: Source,
    /// To which TCP port.
    pub port: u16,
}

/// Answer to [`Op::VmOpen`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmOpened {
    /// The guest's IPv4 address.
    pub ip: String,
    /// Prefix length of its network.
    pub prefix: u8,
    /// Its gateway.
    pub gateway: String,
    /// Its MAC address.
    pub mac: String,
}

/// Answer to [`Op::DiskOpen`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskOpened {
    /// Signed `kms::Attestation`.
    pub attestation: String,
    /// There was no disk file yet.
    pub fresh: bool,
    /// Signed `kms::Attestation` of the same process for the snapshot's disk that this one will be
    /// a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// Answer to [`Op::MemoryOpen`] and [`Op::SnapshotDiskOpen`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attested {
    /// Signed `kms::Attestation`.
    pub attestation: String,
}

/// Answer to [`Op::MemoryGrant`]: of what VM the memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Its image.
    pub image: ImageId,
    /// Its memory, MiB.
    pub memory_mb: u32,
    /// Its virtual CPUs.
    pub cpus: u32,
    /// The slot's network.
    pub net: VmOpened,
}

/// Something of a workspace that is at rest here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// What it is.
    pub purpose: Purpose,
    /// Which snapshot or archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ObjectId>,
    /// What it takes up, bytes.
    pub bytes: u64,
}

/// What a slot holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The slot.
    pub slot: u16,
    /// The workspace, once a disk is there.
    pub workspace: Option<WorkspaceId>,
    /// The start.
    pub start_id: Option<StartId>,
    /// How far it is.
    pub state: SlotState,
    /// How it came up.
    pub how: Start,
    /// The image.
    pub image: ImageId,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The VMM's process id on the host; 0 while there is none yet ([`SlotState::MemoryWaits`]).
    pub vmm_pid: u32,
    /// The disk process's.
    pub disk_pid: Option<u32>,
    /// vmctl's.
    pub vmctl_pid: u32,
    /// The guest's address.
    pub net: VmOpened,
}

/// How far a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    /// A VM without identity.
    Open,
    /// The disk process waits for its key.
    DiskWaits,
    /// The disk is with the VMM.
    DiskAttached,
    /// Memory to wake from waits for its key; there is no VM yet.
    MemoryWaits,
    /// Something of it died; close it.
    Dead,
}

/// Answer to [`Op::Status`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// This machine.
    pub host: HostId,
    /// `v1` or `v2`.
    pub cgroup: String,
    /// The accelerator in use and why: `tcg: /dev/kvm runs no guest here`.
    #[serde(default)]
    pub accel: String,
    /// Slots in use.
    pub slots: Vec<Slot>,
    /// Templates that are sealed, as (image, memory MiB, cpus).
    pub templates: Vec<(ImageId, u32, u32)>,
    /// What of the jail this kernel can't do, one line each; empty is good.
    pub weakened: Vec<String>,
}

/// Answer to [`Op::Counters`]. Numbers only: nothing of what was sent (SEE-2, SEE-4).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets towards the guest that the firewall dropped.
    pub in_dropped_packets: u64,
    /// Packets from the guest that the firewall dropped.
    pub out_dropped_packets: u64,
    /// Packets towards the guest that were above its rates.
    #[serde(default)]
    pub in_limited_packets: u64,
    /// Packets from the guest that were above its rates.
    #[serde(default)]
    pub out_limited_packets: u64,
    /// Packets handed to the tap towards the guest.
    pub in_packets: u64,
    /// Packets from the guest.
    pub out_packets: u64,
    /// CPU time of all that the slot runs (VMM, vmctl, disk), ns.
    pub cpu_ns: u64,
    /// Memory of the VMM and its vmctl, bytes.
    pub memory_bytes: u64,
    /// Bytes allocated to the disk file.
    pub disk_bytes: u64,
}
