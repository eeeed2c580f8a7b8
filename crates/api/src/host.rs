//! Host's socket: from desired to actual state of one machine's workspaces.

use crate::warden::ImageId;
use model::{HostId, ObjectId, Power, Resources, StartId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// A request to host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Records the desired state (a lower `generation` than the last is refused) and waits up to
    /// `wait_ms` for it to become actual; control only. Answer: [`Actual`].
    Apply {
        /// What is wanted.
        desired: Box<Desired>,
        /// At most 120,000 ms.
        wait_ms: u64,
    },
    /// Answer: [`Actual`].
    Get {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// Answer: `Vec<Actual>`.
    List,
    /// States that changed after `since`, waiting up to `wait_ms`; control and edge.
    /// Answer: [`Changes`].
    Changes {
        /// The last `seq` the caller has; 0 for all.
        since: u64,
        /// At most 30,000 ms.
        wait_ms: u64,
    },
    /// Counters of a running workspace. Answer: [`crate::warden::Counters`].
    Counters {
        /// The workspace.
        workspace: WorkspaceId,
    },
    /// What this host can run. Answer: [`Info`].
    Info,
    /// Workspaces that were used since the last such report; edge and control. Answer: `true`.
    Active {
        /// At most [`ACTIVE_MAX`]; those that this host does not know are ignored.
        workspaces: Vec<WorkspaceId>,
    },
    /// For how long workspaces were not used; control. Answer: `Vec<`[`Idle`]`>` of those that
    /// this host knows.
    Idle {
        /// At most [`ACTIVE_MAX`].
        workspaces: Vec<WorkspaceId>,
    },
    /// Somebody with the right to it asks for a workspace that has no VM: control sees it in
    /// [`Actual::wanted`], and decides. Of no effect where [`Desired::wakes`] is off; edge only.
    /// Answer: `true`.
    Want {
        /// The workspace.
        workspace: WorkspaceId,
    },
}

/// Workspaces in one [`Op::Active`] or [`Op::Idle`].
pub const ACTIVE_MAX: usize = 1_000;

/// For how long a workspace was not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idle {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Since its last use, start or resume, or since this host process began, ms of a monotonic
    /// clock.
    pub idle_ms: u64,
}

/// What control wants of a workspace.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Grows with every change.
    pub generation: u64,
    /// The power state.
    pub power: Power,
    /// The image.
    pub image: ImageId,
    /// The size.
    pub resources: Resources,
    /// Disk bandwidth, bytes/s.
    pub disk_bytes_per_s: u64,
    /// Disk operations/s.
    pub disk_ops_per_s: u64,
    /// Bounds of its network.
    #[serde(default)]
    pub net_rates: crate::warden::NetRates,
    /// Processes and threads of its VMM; 0 is warden's own bound.
    #[serde(default)]
    pub pids: u32,
    /// The guest config's exact text.
    pub config: String,
    /// The edge may reach the agent (`public_access`).
    pub public_access: bool,
    /// Ports of the contract's `ingress_ports`.
    pub ingress_ports: Vec<u16>,
    /// Receipt of the intent whose lease allows the next act: a start, which `Running` needs when no
    /// VM runs, a wake, a sleep, a snapshot or an archive. What the lease opens says which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<serde_json::Value>,
    /// That lease in clear: what host tells warden. The KMS compares it with the receipt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<crate::audit::Lease>,
    /// A request at its gateway may wake it.
    #[serde(default)]
    pub wakes: bool,
    /// What a lease for an archive is to make; none: that archive is put back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<Archive>,
    /// Its archives, that one included: any other is removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub archives: Vec<ObjectId>,
    /// Its snapshot; none but this and the next stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<ObjectId>,
    /// The snapshot that is being taken, to stand in the place of that once it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_next: Option<ObjectId>,
    /// Signed `mint::TokenState`; empty while key and tokens are being made: a start then waits
    /// with an attested disk.
    pub token_state: String,
}

/// An archive to make: a tar of files of a running workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    /// Absolute paths: what it holds.
    pub paths: Vec<String>,
    /// Absolute paths that it leaves out.
    pub exclude: Vec<String>,
    /// Largest tar, MiB.
    pub max_mb: u32,
}

/// An archive that was made or put back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archived {
    /// Its object.
    pub id: ObjectId,
    /// By which act.
    pub start_id: StartId,
    /// The tar.
    pub tar: crate::vmctl::Archived,
}

/// What is so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actual {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The generation of the desired state that this answers.
    pub generation: u64,
    /// How far it is.
    pub state: ActualState,
    /// The start, while a VM runs.
    pub start_id: Option<StartId>,
    /// The guest's address, while a VM runs.
    pub ip: Option<String>,
    /// The edge may reach the agent.
    pub public_access: bool,
    /// When the VM came up, ms since the epoch.
    pub since_ms: Option<u64>,
    /// How it came up: `pool`, `template`, `cold`, or from saved memory: `wake`, `restore`.
    pub started_from: Option<String>,
    /// Its memory is saved on this host.
    #[serde(default)]
    pub memory: bool,
    /// A request at its gateway may wake it.
    #[serde(default)]
    pub wakes: bool,
    /// Such a request waits, since the last change of what is wanted.
    #[serde(default)]
    pub wanted: bool,
    /// The snapshot that this host process took last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<ObjectId>,
    /// The archive that this host process made, or put back, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archived: Option<Archived>,
    /// What went wrong last.
    pub error: Option<crate::Error>,
}

/// How far a workspace is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActualState {
    /// No VM.
    Stopped,
    /// On its way up.
    Starting,
    /// The agent answers.
    Running,
    /// Memory kept, no CPU.
    Paused,
    /// No VM; its memory is saved.
    Asleep,
    /// On its way down.
    Stopping,
    /// The VM went away by itself.
    Crashed,
    /// A start failed; see `error`.
    Failed,
    /// Nothing is left on this host.
    Deleted,
}

/// Answer to [`Op::Changes`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Changes {
    /// Ask with this next.
    pub seq: u64,
    /// At most 1,000.
    pub states: Vec<Actual>,
}

/// An image that this host has.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Image {
    /// Its name: `python-3`.
    pub name: String,
    /// SHA-256 of its erofs file.
    pub id: ImageId,
    /// A line for people.
    pub description: String,
}

/// Answer to [`Op::Info`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// This machine.
    pub host: HostId,
    /// Images, by name.
    pub images: Vec<Image>,
    /// The accelerator in use and why.
    pub accel: String,
    /// Pooled VMs ready now.
    pub pool_ready: u32,
    /// Pooled VMs wanted.
    pub pool_wanted: u32,
    /// What of the isolation this machine weakens, one line each.
    pub weakened: Vec<String>,
}
