//! The channel between vmctl and the guest's agent: newline-delimited JSON over virtio-serial or
//! vsock, at most [`CHANNEL_MESSAGE_MAX_BYTES`](crate::limits::CHANNEL_MESSAGE_MAX_BYTES) a message.
//! What comes from the guest is hostile. No secret of ours travels here: those come in the identity
//! block of the disk. An archive does, in clear, between the guest and vmctl, which has a file
//! behind a disk process.

use serde::{Deserialize, Serialize};

/// From the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromGuest {
    /// The agent runs; the base image is mounted and verified.
    Booted {
        /// The agent's version.
        version: String,
    },
    /// Mount and exec were rehearsed; nothing of it is left.
    Rehearsed,
    /// Disk mounted, identity taken, ports open.
    Up(Up),
    /// It could not.
    Failed {
        /// One word.
        code: String,
        /// At most 256 characters.
        message: String,
    },
    /// File systems are synced and unmounted; power may go.
    Down,
    /// The next bytes of an archive's tar.
    ArchiveData {
        /// Which archive.
        number: u64,
        /// Base64 of at most [`ARCHIVE_CHUNK_BYTES`].
        data: String,
    },
    /// The tar is whole, or all of it was put back.
    ArchiveDone {
        /// Which archive.
        number: u64,
        /// Files, directories and links in it.
        entries: u64,
        /// What could not be read, or put back.
        skipped: u64,
    },
    /// The archive that is put back: say the next bytes.
    ArchiveNext {
        /// Which archive.
        number: u64,
    },
    /// It could not be.
    ArchiveFailed {
        /// Which archive.
        number: u64,
        /// The path that is to blame, by its place in what was asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<u32>,
        /// The workspace's disk is full.
        #[serde(default)]
        full: bool,
        /// At most 256 characters.
        message: String,
    },
}

/// The guest is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Up {
    /// The guest's kernel release.
    pub kernel: String,
    /// What the start took inside, step by step; at most [`STEPS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepTime>,
}

/// Most steps that [`Up`] tells of.
pub const STEPS_MAX: usize = 32;

/// How long one step of a start took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepTime {
    /// Its name: one word.
    pub name: String,
    /// µs.
    pub us: u32,
}

/// To the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToGuest {
    /// Rehearse what a start does, on memory-backed stand-ins, so that code is translated and
    /// caches are warm in the template and the pool.
    Rehearse,
    /// The disk is there: become the workspace.
    Attach(Attach),
    /// It was asleep, or is what a snapshot kept: take a fresh seed from the identity block, set
    /// clock, address and token state, then say `up`.
    Wake(Wake),
    /// The machine's clock, after a pause.
    Clock {
        /// ns since the epoch.
        time_unix_ns: u64,
    },
    /// End processes, sync, unmount, say `down`.
    Shutdown,
    /// Send a tar of these files, while the workspace runs on.
    Archive {
        /// What its messages are marked with.
        number: u64,
        /// Absolute paths in the workspace.
        paths: Vec<String>,
        /// Absolute paths that are left out, with all below them.
        exclude: Vec<String>,
    },
    /// Put back the files of an archive, whose bytes come for each [`FromGuest::ArchiveNext`].
    Unarchive {
        /// What its messages are marked with.
        number: u64,
    },
    /// The next bytes of that archive.
    ArchiveData {
        /// Which archive.
        number: u64,
        /// Base64 of at most [`ARCHIVE_CHUNK_BYTES`]; none: that was all.
        data: String,
    },
    /// Nobody wants an archive any more.
    ArchiveStop,
}

/// Bytes of a tar in one message: whole sectors of a disk, and as base64 with its frame less than
/// [`CHANNEL_MESSAGE_MAX_BYTES`](crate::limits::CHANNEL_MESSAGE_MAX_BYTES).
pub const ARCHIVE_CHUNK_BYTES: usize = 11 * 4096;

const _: () =
    assert!(ARCHIVE_CHUNK_BYTES.div_ceil(3) * 4 + 256 < crate::limits::CHANNEL_MESSAGE_MAX_BYTES);

/// What the agent is told when its disk is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// ns since the epoch.
    pub time_unix_ns: u64,
    /// The config's exact text ([`GuestConfig`]); its SHA-256 must be the identity block's
    /// `config_digest`.
    pub config: String,
    /// Signed `mint::TokenState`.
    pub token_state: String,
    /// IPv4 address.
    pub ip: String,
    /// Prefix length.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: String,
}

/// What the agent is told when its memory was woken. The config is the one that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wake {
    /// ns since the epoch.
    pub time_unix_ns: u64,
    /// Signed `mint::TokenState`.
    pub token_state: String,
    /// IPv4 address: maybe another than before.
    pub ip: String,
    /// Prefix length.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: String,
}

/// The guest's config. The lease in the log holds its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// The workspace.
    pub workspace: model::WorkspaceId,
    /// RFC 1123 label.
    pub hostname: String,
    /// `K=V`.
    pub env: Vec<String>,
    /// A command to run once the workspace is up; empty for none.
    pub cmd: Vec<String>,
}

/// The identity block at the front of the disk, synthesised by `disk` for one start.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityBlock {
    /// The workspace.
    pub workspace: model::WorkspaceId,
    /// The start.
    pub start_id: model::StartId,
    /// 64 fresh random bytes, hex.
    pub seed: String,
    /// Seed of the guest's Ed25519 identity, 32 bytes hex.
    pub identity_seed: String,
    /// SHA-256 of the config, hex.
    pub config_digest: String,
    /// Mint's key, for token states; hex.
    pub mint_key: String,
    /// Mint's gateway-token key; hex.
    pub gateway_key: String,
    /// The edge's identity key; hex.
    pub edge_key: String,
}

/// First bytes of the identity area.
pub const IDENTITY_MAGIC: &[u8; 8] = b"CMIDENT1";
/// The identity area's size: the volume begins here, bytes.
pub const VOLUME_OFFSET_BYTES: u64 = 1 << 20;

/// Where the edge brings a guest its token state, over the mTLS of [`model::limits::PORT_AGENT_TLS`]:
/// `{"signed": …}`.
pub const TOKEN_STATE_PATH: &str = "/casemate/v1/token-state";
/// Name of the agent's virtio-serial port.
pub const PORT_NAME: &str = "casemate.agent";
/// The vsock port of the host, where there is no virtio-serial.
pub const VSOCK_PORT: u32 = 1024;

/// The DNS name in a workspace's TLS certificate.
#[must_use]
pub fn tls_name(workspace: &model::WorkspaceId) -> String {
    format!(
        "{}.ws.casemate.internal",
        workspace.as_str().replace('_', "-")
    )
}
