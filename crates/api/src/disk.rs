//! The channel between warden and a disk process: one JSON message a packet, over a
//! SOCK_SEQPACKET pair.

use crate::kms::{Anchor, AnchorStatement};
use crate::warden::Sealed;
use serde::{Deserialize, Serialize};

/// To the disk process.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToDisk {
    /// The volume, and how fast it may be. With this come, in this order, its backing file, its
    /// sidecar and, of a disk, the backing file once more, opened with `O_DIRECT` where there is
    /// that, and what a new volume is filled from: a template, or volume and sidecar of a
    /// snapshot's disk (SCM_RIGHTS). No answer.
    Open {
        /// What it is.
        #[serde(default)]
        content: Content,
        /// Size of the volume, MiB; of what is saved, any: it has its own.
        size_mb: u32,
        /// Bandwidth, bytes/s.
        bytes_per_s: u64,
        /// Operations/s.
        ops_per_s: u64,
    },
    /// The sealed `kms::Grant`.
    Grant {
        /// HPKE ciphertext, base64.
        sealed: String,
        /// Associated data, hex.
        aad: String,
        /// The backing file is new: make the volume.
        format: bool,
        /// The grant of the snapshot's disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Sealed>,
    },
    /// What a memory that is being saved comes back with; at most 4084 bytes. No answer: it counts
    /// once the process has said how far the volume is, at its end.
    Note {
        /// The text.
        note: String,
    },
    /// Copy the disk as it stands to a new image, whose volume and sidecar come with this. Its VM
    /// must be stopped. Answer: [`FromDisk::Copied`].
    Copy {
        /// The image's grant.
        key: Sealed,
        /// What it comes back with.
        note: String,
    },
    /// Make all that the guest flushed durable, and say how far that is. Answer:
    /// [`FromDisk::Anchor`].
    Anchor,
    /// Flush, say how far that is, exit.
    Close,
}

/// What a disk process serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// A disk, with an identity in front.
    #[default]
    Disk,
    /// A new image of memory, or a new archive.
    Saving,
    /// Memory to wake from, or an archive to read: read-only.
    Saved,
}

/// From the disk process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromDisk {
    /// It is in its sandbox and serves a file without a volume. Its ephemeral public key.
    Hello {
        /// X25519, hex.
        hpke_pub: String,
    },
    /// The volume is open, and behind the file.
    Ready {
        /// Size of the file as the VMM sees it, bytes.
        size_bytes: u64,
        /// The volume's state.
        state: Anchor,
        /// The note of the memory that is woken, or of the snapshot that the disk was filled from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// The copy is durable.
    Copied,
    /// How far the disk has got: asked for, or said at the end, whatever the reason.
    Anchor(Anchored),
    /// It could not.
    Failed {
        /// The code for the client.
        code: crate::ErrorCode,
        /// For the operator.
        message: String,
    },
}

/// A state of a disk that is durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchored {
    /// For the KMS.
    pub statement: AnchorStatement,
    /// Reads that were refused since the start, because what is at rest is not what was written; a
    /// disk's last word has those of the memory with it that its VM was woken from.
    pub refused: u64,
    /// The first sector that was, of 4096 bytes, of the disk or else of that memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_refused: Option<u64>,
}
