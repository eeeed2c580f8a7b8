//! The KMS's socket. No operation returns a key: what leaves is sealed to an attested process.

use crate::mint::PolicyAct;
use model::{AccountId, HostId, ObjectId, Purpose, StartId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// What an intent of one event may release.
#[derive(Debug, Clone, Copy)]
pub struct Backing {
    /// The event.
    pub event: &'static str,
    /// Keys of the workspace that the intent is about.
    pub own: &'static [Purpose],
    /// Keys of another workspace of the same account.
    pub source: &'static [Purpose],
    /// The act of a standing policy that may stand in for a client's assertion.
    pub policy: Option<PolicyAct>,
    /// The act makes the images that it names; any other opens those that are there.
    pub begins: bool,
}

const fn backing(
    event: &'static str,
    own: &'static [Purpose],
    policy: Option<PolicyAct>,
) -> Backing {
    Backing {
        event,
        own,
        source: &[],
        policy,
        begins: false,
    }
}

/// Of an act that makes images.
const fn making(
    event: &'static str,
    own: &'static [Purpose],
    policy: Option<PolicyAct>,
) -> Backing {
    Backing {
        begins: true,
        ..backing(event, own, policy)
    }
}

/// Every event that backs a release; no other does.
pub const BACKINGS: &[Backing] = &[
    backing(CREATE_EVENT, &[Purpose::Disk], None),
    backing("workspace.start", &[Purpose::Disk], None),
    backing(
        "workspace.restart",
        &[Purpose::Disk],
        Some(PolicyAct::Restart),
    ),
    making(
        "workspace.sleep",
        &[Purpose::Memory],
        Some(PolicyAct::Sleep),
    ),
    backing(
        "workspace.wake",
        &[Purpose::Disk, Purpose::Memory],
        Some(PolicyAct::Wake),
    ),
    making(
        "workspace.snapshot",
        &[Purpose::SnapshotDisk, Purpose::SnapshotMemory],
        None,
    ),
    backing(
        "workspace.restore",
        &[
            Purpose::Disk,
            Purpose::SnapshotDisk,
            Purpose::SnapshotMemory,
        ],
        None,
    ),
    Backing {
        event: "workspace.fork",
        own: &[Purpose::Disk],
        source: &[Purpose::SnapshotDisk],
        policy: None,
        begins: false,
    },
    backing("workspace.archive", &[Purpose::Archive], None),
    backing("workspace.archive_restore", &[Purpose::Archive], None),
];

/// What an intent of `event` may release; none: nothing.
#[must_use]
pub fn backing_of(event: &str) -> Option<&'static Backing> {
    BACKINGS.iter().find(|b| b.event == event)
}

/// The event of an intent that makes a workspace's key.
pub const CREATE_EVENT: &str = "workspace.create";

/// A request to the KMS.
#[derive(Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Makes the workspace's key. `receipt` proves an intent `workspace.create` under a client's
    /// assertion; the account is the assertion's. Answer: [`KeyCreated`]. Idempotent per workspace
    /// and account.
    WorkspaceKeyCreate {
        /// Receipt of the intent.
        receipt: serde_json::Value,
    },
    /// The workspace's snapshot of this id stands: those that stood before are opened no more. Of one
    /// that was never begun, nothing. Answer: `true`.
    SnapshotKeep {
        /// The workspace.
        workspace: WorkspaceId,
        /// The snapshot.
        object: ObjectId,
    },
    /// Releases a workspace's subkeys, sealed to the attested process. Answer: [`Released`].
    Release {
        /// Receipt of the intent that holds the lease.
        receipt: serde_json::Value,
        /// Signed [`Attestation`].
        attestation: String,
    },
    /// Notes how far a workspace's disk has got: from now on no older copy of it opens. A late
    /// statement changes nothing. Answer: [`Anchor`], as it stands now.
    Anchor {
        /// What the disk process said.
        statement: AnchorStatement,
    },
    /// Destroys the workspace's key: record erased, epoch punctured. A closing act. Answer:
    /// [`Destroyed`]. Idempotent.
    Destroy {
        /// The workspace.
        workspace: WorkspaceId,
        /// The client's assertion or the standing policy that allows it.
        authority: String,
    },
    /// Answer: [`Status`].
    Status,
    /// Opens a KMS that is sealed by a passphrase; root only. Answer: [`Status`].
    Unseal {
        /// The passphrase.
        passphrase: String,
    },
    /// New epoch now: re-wraps what lives, destroys the old epoch's secret; root only.
    /// Answer: [`Status`].
    Rotate,
    /// Opens the wrapped batch keys of log entries, for the audit reader only; logged.
    /// Answer: the batch keys, hex, in order.
    LogOpen {
        /// The class.
        class: crate::audit::Class,
        /// Day of the entries.
        day: u32,
        /// The leaves' `wrap_class` fields, base64; at most 64.
        wraps: Vec<String>,
        /// Why, for the log.
        reason: String,
    },
}

impl Op {
    /// The operation's name, as on the wire.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::WorkspaceKeyCreate { .. } => "workspace_key_create",
            Self::Release { .. } => "release",
            Self::Anchor { .. } => "anchor",
            Self::SnapshotKeep { .. } => "snapshot_keep",
            Self::Destroy { .. } => "destroy",
            Self::Status => "status",
            Self::Unseal { .. } => "unseal",
            Self::Rotate => "rotate",
            Self::LogOpen { .. } => "log_open",
        }
    }
}

/// The name only: fields may hold a passphrase or a confidential receipt.
impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Answer to [`Op::WorkspaceKeyCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyCreated {
    /// Signed [`Identity`].
    pub identity: String,
}

/// What the KMS says of a workspace's identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Its account.
    pub account: AccountId,
    /// Ed25519 public key of its guest's identity, hex.
    pub identity_pub: String,
    /// Version of the workspace's key.
    pub key_version: u32,
}

/// What warden says of a process that asks for a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attestation {
    /// The machine.
    pub host: HostId,
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The start.
    pub start_id: StartId,
    /// What for.
    pub purpose: Purpose,
    /// The lease's nonce.
    pub nonce: String,
    /// X25519 public key that the process made, hex.
    pub hpke_pub: String,
    /// SHA-256 of its executable, hex.
    pub measurement: String,
    /// When, ms since the epoch.
    pub time_ms: u64,
}

/// Answer to [`Op::Release`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Released {
    /// HPKE ciphertext of a [`Grant`], base64.
    pub sealed: String,
    /// Its associated data, hex: SHA-256 of the receipt's leaf.
    pub aad: String,
}

/// What a release holds. Exists in clear only in the KMS and in the attested process.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The start.
    pub start_id: StartId,
    /// The start's number: its intent's place in the log and 1, so that a later start has a higher
    /// one.
    pub run: u64,
    /// How far the disk had got; none: it was never anchored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<Anchor>,
    /// What the key is for.
    #[serde(default)]
    pub purpose: Purpose,
    /// The object's key: HKDF(workspace key, purpose, object, version), 32 bytes, hex. Of an image,
    /// the object has the number of the act that began it.
    pub disk_key: String,
    /// Seed of the guest's Ed25519 identity, 32 bytes, hex; empty but for a disk.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub identity_seed: String,
    /// SHA-256 of the guest's config, from the lease.
    pub config_digest: String,
    /// Mint's key, for token states; hex.
    pub mint_key: String,
    /// Mint's gateway-token key; hex.
    pub gateway_key: String,
    /// The edge's identity key; hex.
    pub edge_key: String,
}

/// A state of a disk: of two, the one of the later start, then the one with more batches is newer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    /// Number of the start that wrote it.
    pub run: u64,
    /// Batches in the disk's life.
    pub batch: u64,
    /// The chain over them, 32 bytes, hex.
    pub root: String,
}

/// What a disk process says of its disk. Only it and the KMS have the key: HKDF-SHA-256 of the
/// disk's key, salt [`crate::context::ANCHOR`], info `key`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnchorStatement {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The state.
    pub anchor: Anchor,
    /// HMAC-SHA-256 of [`AnchorStatement::covered`], hex.
    pub mac: String,
}

impl AnchorStatement {
    /// The bytes that the MAC covers.
    #[must_use]
    pub fn covered(workspace: &WorkspaceId, anchor: &Anchor) -> Vec<u8> {
        // Ids, numbers and hex hold no `|`.
        let Anchor { run, batch, root } = anchor;
        format!(
            "{}|{workspace}|{run}|{batch}|{root}",
            crate::context::ANCHOR
        )
        .into_bytes()
    }
}

/// Answer to [`Op::Destroy`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Destroyed {
    /// Signed [`Erasure`].
    pub receipt: String,
}

/// The erasure receipt (DSK-4, KMS-4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Erasure {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Versions of its key that existed.
    pub key_versions: u32,
    /// SHA-256 of the wrapped key record that was erased, hex.
    pub record_digest: String,
    /// The last epoch whose root could have unwrapped it; its secret is destroyed.
    pub epoch_destroyed: u64,
    /// The epoch now.
    pub epoch_now: u64,
    /// When, ms since the epoch.
    pub time_ms: u64,
}

impl Erasure {
    /// Whether the statement is one of an erasure: what its signature can't say. A verifier needs
    /// nothing but this and the signature (context [`crate::context::ERASURE`], key `kms.pub`).
    ///
    /// # Errors
    /// What contradicts an erasure.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.epoch_now <= self.epoch_destroyed {
            return Err("the epoch that could open the key is still in force");
        }
        if self.key_versions == 0 {
            return Err("no version of a key is named");
        }
        if self.record_digest.len() != 64
            || !self
                .record_digest
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err("record_digest is no SHA-256 in hex");
        }
        Ok(())
    }
}

/// How the KMS is unsealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unseal {
    /// A file beside the ciphertext: a first run, not protection (KMS-2 is `not_yet`).
    File,
    /// A passphrase that an operator types.
    Passphrase,
}

/// The KMS's state, without secrets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// No key is to be had until it is unsealed.
    pub sealed: bool,
    /// How it is unsealed.
    pub unseal: Unseal,
    /// The epoch.
    pub epoch: u64,
    /// Living workspace keys.
    pub workspace_keys: u64,
    /// Releases since it started.
    pub releases: u64,
    /// Refusals since it started.
    pub refusals: u64,
}
