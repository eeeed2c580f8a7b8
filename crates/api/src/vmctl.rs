//! vmctl's sockets: one VM's control channel, behind a closed enum. Nothing here reads guest
//! memory, and no caller's text reaches the VMM.

use serde::{Deserialize, Serialize};

/// A request to vmctl, from host.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Answer: [`Status`].
    Status,
    /// Brings the guest to "agent answers, rehearsed, no identity, stopped": restores the
    /// template or boots, as the VM was opened. Answer: [`Status`].
    Prepare,
    /// As [`Op::Prepare`], without the rehearsal: for a VM that is attached at once.
    PrepareNow,
    /// Saves the template to the files the VM was opened with, and stops for good (build VMs
    /// only). Answer: `true`.
    Save,
    /// Attaches the disk that warden handed over, continues the guest and waits until its agent
    /// is up. Answer: [`crate::agent::Up`].
    Attach {
        /// What the agent is told.
        attach: Box<crate::agent::Attach>,
        /// How long the agent may take, ms; at most 120,000.
        wait_ms: u64,
    },
    /// Stops the virtual CPUs, and writes memory and the devices' state to the file that warden
    /// handed over (`warden::Op::MemoryGrant`). The workspace is paused afterwards, also when it
    /// fails; [`Op::Resume`] continues it. Answer, once it is durable: [`Status`].
    MemorySave,
    /// Has the guest write a tar of its files to the file that warden handed over
    /// (`warden::Op::MemoryGrant`). The workspace runs on. Answer, once it is durable:
    /// [`Archived`].
    Archive {
        /// Absolute paths in the workspace: what it holds. At most
        /// [`model::limits::ARCHIVE_PATHS_MAX`], as is what follows.
        paths: Vec<String>,
        /// Absolute paths that it leaves out, with all below them.
        exclude: Vec<String>,
        /// Largest tar, bytes.
        max_bytes: u64,
        /// How long it may take, ms; at most 600,000.
        wait_ms: u64,
    },
    /// Has the guest put back the files of the tar in that file, each in the place of the one that is
    /// there. Answer: [`Archived`].
    Unarchive {
        /// How long it may take, ms; at most 600,000.
        wait_ms: u64,
    },
    /// Continues the memory that the VM was opened with, on the disk that warden handed over, and
    /// waits until its agent says that it is up. In the place of [`Op::Prepare`] and
    /// [`Op::Attach`]. Answer: [`crate::agent::Up`].
    Wake {
        /// What the agent is told.
        wake: Box<crate::agent::Wake>,
        /// How long the agent may take, ms; at most 120,000.
        wait_ms: u64,
    },
    /// Stops the virtual CPUs. Answer: [`Status`].
    Pause,
    /// Continues them. Answer: [`Status`].
    Resume,
    /// Asks the guest to shut down, waits `grace_ms`, then ends the VMM. Answer: [`Status`].
    Shutdown {
        /// At most 60,000 ms; 0 ends it at once.
        grace_ms: u64,
    },
}

/// A message from warden on the second socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum WardenOp {
    /// Keep the file whose descriptor comes with this (SCM_RIGHTS). Answer: `true`.
    DiskFd,
    /// The file lies where the VMM opens it by name, in its jail: for a VMM that takes no
    /// descriptors, in place of [`Self::DiskFd`]. Answer: `true`.
    DiskMounted,
    /// A volume is behind that file now: [`Op::Attach`] may use it. Answer: `true`.
    DiskReady {
        /// Size of the file, bytes.
        size_bytes: u64,
    },
    /// Keep the file whose descriptor comes with this: memory is saved to it, once
    /// ([`Op::MemorySave`]), or a tar of files is written or read ([`Op::Archive`],
    /// [`Op::Unarchive`]). It can be written and not read, or read and not written. Answer: `true`.
    MemoryFd,
    /// Let go of that file. Answer: `true`.
    MemoryDrop,
}

/// How far the VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Nothing ran yet.
    Created,
    /// Restored or booted, rehearsed, stopped, without identity.
    Pooled,
    /// A workspace runs.
    Running,
    /// A workspace, stopped with its memory.
    Paused,
    /// The guest is gone.
    Exited,
}

/// Answer to [`Op::Archive`] and [`Op::Unarchive`]. All but the first is the guest's word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archived {
    /// Bytes of the tar that were written or read.
    pub bytes: u64,
    /// Files, directories and links in it.
    pub entries: u64,
    /// What could not be read, or put back.
    pub skipped: u64,
}

/// Answer to [`Op::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// How far the VM is.
    pub vm: VmState,
    /// Why it exited, if it did: `shutdown`, `panic`, `reset`, `lost`, `failed` (to come up),
    /// `saved` (a template).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
