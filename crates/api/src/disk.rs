//! The channel between warden and a disk process: one JSON message a packet, over a
//! SOCK_SEQPACKET pair.

use crate::kms::AnchorStatement;
use serde::{Deserialize, Serialize};

/// To the disk process.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToDisk {
    /// The volume, and how fast it may be. With this come, in this order, its backing file, its
    /// sidecar and, if there is one, the template that a new volume is filled from (SCM_RIGHTS). No
    /// answer.
    Open {
        /// Size of the volume, MiB.
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
    },
    /// Make all that the guest flushed durable, and say how far that is. Answer:
    /// [`FromDisk::Anchor`].
    Anchor,
    /// Flush, say how far that is, exit.
    Close,
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
    },
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
    /// Reads that were refused since the start, because what is at rest is not what was written.
    pub refused: u64,
    /// The first sector that was, of 4096 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_refused: Option<u64>,
}
