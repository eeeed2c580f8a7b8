//! Bounds of the host daemon, with their units.

use std::time::Duration;

/// Longest wait that [`api::host::Op::Apply`] grants, ms.
pub const APPLY_WAIT_MAX_MS: u64 = 120_000;
/// Longest wait that [`api::host::Op::Changes`] grants, ms.
pub const CHANGES_WAIT_MAX_MS: u64 = 30_000;
/// Most states in one answer to [`api::host::Op::Changes`].
pub const CHANGES_MAX: usize = 1_000;
/// Deleted workspaces that the feed remembers.
pub const TOMBSTONES_MAX: usize = 4_096;
/// Workspaces of one host, running or not.
pub const WORKSPACES_MAX: usize = 65_536;
/// Largest desired-state file, bytes.
pub const DESIRED_MAX_BYTES: u64 = 256 << 10;
/// Largest image manifest, bytes.
pub const MANIFEST_MAX_BYTES: u64 = 1 << 20;
/// Largest file of an anchor statement, bytes.
pub const ANCHOR_MAX_BYTES: u64 = 4 << 10;
/// Images in the manifest.
pub const IMAGES_MAX: usize = 256;
/// Shapes waiting for their template.
pub const TEMPLATES_WANTED_MAX: usize = 16;

/// How often the machine is looked at for VMs that went away.
pub const WATCH_EVERY: Duration = Duration::from_millis(400);
/// Unanswered calls to a vmctl in a row after which its VM counts as lost.
pub const VMCTL_SILENT_MAX: u32 = 5;
/// Pause before a step that can't be given up is tried again.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often a running disk is asked how far it has got.
pub const ANCHOR_EVERY: Duration = Duration::from_secs(60);
/// Pause before an anchor that the KMS did not take is tried again.
pub const ANCHOR_RETRY_AFTER: Duration = Duration::from_secs(2);
/// Longest wait for the KMS to take an anchor: a stop waits for it.
pub const ANCHOR_CALL_MAX: Duration = Duration::from_secs(2);
/// Longest pause between two looks at pool and templates.
pub const TEND_EVERY: Duration = Duration::from_secs(5);
/// The pool is refilled, and a template wanted by a start is built, this long after the start took
/// its VM: at once they would take the CPUs that the start needs. An empty pool does not wait.
pub const TEND_AFTER_CLAIM: Duration = Duration::from_millis(500);
/// Pause before a template that could not be built is tried again.
pub const TEMPLATE_RETRY_AFTER: Duration = Duration::from_secs(60);
/// How long the guest may take to shut down, ms.
pub const SHUTDOWN_GRACE_MS: u64 = 5_000;
/// How long the guest's agent may take to come up, ms.
pub const ATTACH_WAIT_MS: u64 = 60_000;

/// How long the guest may take to write an archive, ms. Control gives up before.
pub const ARCHIVE_WAIT_MS: u64 = 300_000;

/// Longest wait for warden to open or close a slot.
pub const SLOT_CALL_MAX: Duration = Duration::from_secs(30);
/// Longest wait for a restore or a cold boot.
pub const PREPARE_CALL_MAX: Duration = Duration::from_secs(120);
/// Longest wait for a template to be saved or measured.
pub const TEMPLATE_CALL_MAX: Duration = Duration::from_secs(120);
/// Longest wait for the disk to open, or to be formatted.
pub const GRANT_CALL_MAX: Duration = Duration::from_secs(60);
/// Longest wait for memory to be saved, or for a disk to be copied: at most
/// [`model::limits::MEMORY_MB`] of one and [`model::limits::DISK_MB`] of the other.
pub const SAVE_CALL_MAX: Duration = Duration::from_secs(1_800);
/// Longest wait for an archive: what the guest is granted, and its sync.
pub const ARCHIVE_CALL_MAX: Duration = Duration::from_secs(330);
/// Longest wait for a shutdown beyond its grace.
pub const SHUTDOWN_CALL_MAX: Duration = Duration::from_secs(20);
/// Longest wait for the agent beyond what it is granted.
pub const ATTACH_CALL_MAX: Duration = Duration::from_secs(65);

const _: () = assert!(SHUTDOWN_CALL_MAX.as_millis() > SHUTDOWN_GRACE_MS as u128);
const _: () = assert!(ARCHIVE_CALL_MAX.as_millis() > ARCHIVE_WAIT_MS as u128);
const _: () = assert!(ATTACH_CALL_MAX.as_millis() > ATTACH_WAIT_MS as u128);
const _: () = assert!(ATTACH_WAIT_MS <= 120_000 && SHUTDOWN_GRACE_MS <= 60_000);
