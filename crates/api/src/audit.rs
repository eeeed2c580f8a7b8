//! The audit log's append socket, and the entry that every process writes.
//!
//! The append side can't read: the only thing that comes back is where the entry went, and, if
//! asked, the proof that it is there.

use model::{AccountId, HostId, ObjectId, Purpose, StartId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// A retention class; each has its own log (LOG-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Control-plane API calls, 90 days.
    Api,
    /// Host audit: keys, elevation, control-plane changes; 1 year.
    Host,
    /// Flow metadata, 30 days.
    Flow,
    /// Metering, 90 days.
    Metering,
    /// Security alerts, 2 years.
    Security,
}

impl Class {
    /// All classes.
    pub const ALL: [Class; 5] = [
        Self::Api,
        Self::Host,
        Self::Flow,
        Self::Metering,
        Self::Security,
    ];

    /// The class's name, as in paths and origins.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Host => "host",
            Self::Flow => "flow",
            Self::Metering => "metering",
            Self::Security => "security",
        }
    }
}

/// Before or after the act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Written before the act; if it can't be, the act does not happen.
    Intent,
    /// Written after it.
    Outcome,
    /// Something that happened by itself.
    Fact,
}

/// The lease that an intent asks for: what the KMS will release a key against.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The host that will run it.
    pub host: HostId,
    /// This start and no other.
    pub start_id: StartId,
    /// What the key is for.
    pub purpose: Purpose,
    /// 32 random bytes, hex; used once.
    pub nonce: String,
    /// When the lease ends, ms since the epoch; at most 60 s after the entry.
    pub exp_ms: u64,
    /// SHA-256 of the guest's config, hex.
    pub config_digest: String,
    /// Which object of that purpose; none: the disk, of which a workspace has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectId>,
    /// What else the same act opens, each once and for a process of its own; at most
    /// [`LEASE_ALSO_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<Object>,
}

/// Objects in a lease beside its own.
pub const LEASE_ALSO_MAX: usize = 3;

/// What has a key of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Whose it is.
    pub workspace: WorkspaceId,
    /// What it is.
    pub purpose: Purpose,
    /// Which one; none for a disk, and only for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<ObjectId>,
}

impl Lease {
    /// Everything that the lease opens, its own object first.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let own = Object {
            workspace: self.workspace.clone(),
            purpose: self.purpose,
            id: self.object.clone(),
        };
        std::iter::once(own).chain(self.also.iter().cloned())
    }
}

/// What an entry says. Never holds content of a workspace, a secret or a request body (SEE-3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Noun first: `workspace.create`, `kms.release`.
    pub event: String,
    /// Intent, outcome or fact.
    pub phase: Phase,
    /// The request id that ties entries of one request together.
    pub request_id: String,
    /// The account concerned, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<AccountId>,
    /// Who: an API key id, `operator`, or `internal:<what>`.
    pub actor: String,
    /// On what: an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// The signed assertion or policy that authorises it, whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// The lease that it asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// `ok` or an error code, for outcomes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// A few more facts, small and typed by the event.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// An entry as it is sealed into the log: the append process adds who wrote it, from the
/// socket's peer credentials, so that no process can write in another's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamped {
    /// The process that wrote it: `control`, `kms`, `mint`, …
    pub process: String,
    /// What it wrote.
    pub entry: Entry,
}

/// A request to the append socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Appends one entry; the answer comes when it is durable ([`Appended`]).
    Append {
        /// The log.
        class: Class,
        /// The entry.
        entry: Box<Entry>,
        /// Wait until it is integrated, and return the proof.
        want_receipt: bool,
    },
    /// Public keys that entries of coming days are sealed to; the KMS only. Answer: `true`.
    DayKeys {
        /// The keys; at most 5 × 400.
        keys: Vec<DayKey>,
    },
    /// The public key that an account's entries are sealed to; the KMS only. Answer: `true`.
    AccountKey {
        /// The account.
        account: AccountId,
        /// X25519 public key, hex.
        public: String,
    },
}

/// The public key of a class and day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayKey {
    /// The class.
    pub class: Class,
    /// Days since 1970-01-01 UTC.
    pub day: u32,
    /// X25519 public key, hex.
    pub public: String,
}

/// Where an entry went.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Appended {
    /// Its index in the class's log.
    pub index: u64,
    /// Its time, ms since the epoch, by the log's clock.
    pub time_ms: u64,
    /// The proof (`tlog::receipt::Receipt`), if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<serde_json::Value>,
}

/// A request to the reader's socket, which has its own identity (LOG-4); root only. Each read of
/// entries is itself an entry (`audit.read`, class security) before anything is opened.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum ReadOp {
    /// The integrated size of a log. Answer: [`LogHead`].
    Head {
        /// The log.
        class: Class,
    },
    /// Opens entries. Answer: [`ReadEntries`].
    Entries {
        /// The log.
        class: Class,
        /// First index.
        from: u64,
        /// How many; at most 256.
        count: u32,
        /// Why, for the log; 1 to 256 characters.
        reason: String,
    },
}

/// Answer to [`ReadOp::Head`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogHead {
    /// Entries that are integrated.
    pub size: u64,
    /// The signed checkpoint, as text; empty for a log that never had an entry.
    pub checkpoint: String,
}

/// Answer to [`ReadOp::Entries`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadEntries {
    /// The entries, in order; fewer than asked for at the end of the log, or when the answer is full.
    pub entries: Vec<ReadEntry>,
    /// Why some could not be opened, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
}

/// One entry that was read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReadEntry {
    /// Its index.
    pub index: u64,
    /// Its time, ms since the epoch.
    pub time_ms: u64,
    /// What it says; nothing when its key is destroyed or the KMS is sealed.
    pub stamped: Option<Stamped>,
    /// The leaf as the log holds it, base64, when it could not be opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaf: Option<String>,
}
