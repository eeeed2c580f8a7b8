//! The calls host makes: to warden, to the KMS, and to the vmctl of each slot.
//!
//! Must never carry a path, a command or a key: ids and numbers, and ciphertext it can't open.

use crate::limits::{
    ANCHOR_CALL_MAX, ARCHIVE_CALL_MAX, ARCHIVE_WAIT_MS, ATTACH_CALL_MAX, ATTACH_WAIT_MS,
    GRANT_CALL_MAX, PREPARE_CALL_MAX, SAVE_CALL_MAX, SHUTDOWN_CALL_MAX, SHUTDOWN_GRACE_MS,
    SLOT_CALL_MAX, TEMPLATE_CALL_MAX,
};
use api::agent::{Attach, Up, Wake};
use api::audit::Lease;
use api::disk::Anchored;
use api::host::Desired;
use api::kms::AnchorStatement;
use api::rpc::Client;
use api::{kms, vmctl, warden};
use model::{ObjectId, Purpose, WorkspaceId};
use service::paths::Paths;
use std::path::PathBuf;

/// The processes host talks to.
#[derive(Clone)]
pub struct Peers {
    warden: Client,
    kms: Client,
    vmctl: PathBuf,
}

impl Peers {
    /// Those of this installation.
    #[must_use]
    pub fn new(paths: &Paths) -> Self {
        Self {
            warden: Client::new(paths.socket("warden", "warden")),
            kms: Client::new(paths.socket("kms", "kms")),
            vmctl: paths.run().join("vmctl"),
        }
    }

    /// What warden has.
    pub(crate) async fn status(&self) -> api::Result<warden::Status> {
        self.warden.call("internal:host", &warden::Op::Status).await
    }

    pub(crate) async fn vm_open(
        &self,
        slot: u16,
        how: warden::Start,
        shape: &crate::fleet::Shape,
    ) -> api::Result<warden::VmOpened> {
        let op = warden::Op::VmOpen {
            slot,
            how,
            image: shape.image.clone(),
            memory_mb: shape.memory_mb,
            cpus: shape.cpus,
        };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    pub(crate) async fn template_seal(&self, slot: u16) -> api::Result<bool> {
        let op = warden::Op::TemplateSeal { slot };
        self.warden
            .call_within("internal:host", &op, TEMPLATE_CALL_MAX)
            .await
    }

    pub(crate) async fn slot_close(&self, slot: u16) -> api::Result<bool> {
        let op = warden::Op::SlotClose { slot };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    pub(crate) async fn disk_open(
        &self,
        slot: u16,
        lease: &Lease,
        desired: &Desired,
        from: Option<warden::Snapshot>,
    ) -> api::Result<warden::DiskOpened> {
        let op = warden::Op::DiskOpen {
            slot,
            workspace: desired.workspace.clone(),
            start_id: lease.start_id.clone(),
            purpose: Purpose::Disk,
            nonce: lease.nonce.clone(),
            disk_mb: desired.resources.disk_size_mb,
            bytes_per_s: desired.disk_bytes_per_s,
            ops_per_s: desired.disk_ops_per_s,
            pids: desired.pids,
            from,
        };
        self.warden
            .call_within(lease.start_id.as_str(), &op, GRANT_CALL_MAX)
            .await
    }

    pub(crate) async fn key_release(
        &self,
        lease: &Lease,
        receipt: &serde_json::Value,
        attestation: &str,
    ) -> api::Result<kms::Released> {
        let op = kms::Op::Release {
            receipt: receipt.clone(),
            attestation: attestation.to_owned(),
        };
        self.kms.call(lease.start_id.as_str(), &op).await
    }

    pub(crate) async fn disk_grant(
        &self,
        slot: u16,
        key: kms::Released,
        from: Option<kms::Released>,
    ) -> api::Result<bool> {
        // A copy is made before the answer.
        let within = if from.is_some() {
            SAVE_CALL_MAX
        } else {
            GRANT_CALL_MAX
        };
        let op = warden::Op::DiskGrant {
            slot,
            sealed: key.sealed,
            aad: key.aad,
            from: from.map(|k| warden::Sealed {
                sealed: k.sealed,
                aad: k.aad,
            }),
        };
        self.warden.call_within("internal:host", &op, within).await
    }

    pub(crate) async fn copy_open(
        &self,
        slot: u16,
        lease: &Lease,
    ) -> api::Result<warden::Attested> {
        let op = warden::Op::SnapshotDiskOpen {
            slot,
            start_id: lease.start_id.clone(),
            nonce: lease.nonce.clone(),
        };
        self.warden
            .call_within(lease.start_id.as_str(), &op, GRANT_CALL_MAX)
            .await
    }

    pub(crate) async fn copy_grant(
        &self,
        slot: u16,
        id: ObjectId,
        key: kms::Released,
    ) -> api::Result<bool> {
        let op = warden::Op::SnapshotDiskGrant {
            slot,
            id,
            sealed: key.sealed,
            aad: key.aad,
        };
        self.warden
            .call_within("internal:host", &op, SAVE_CALL_MAX)
            .await
    }

    pub(crate) async fn memory_open(
        &self,
        slot: u16,
        lease: &Lease,
        (purpose, id): (Purpose, Option<ObjectId>),
        save: bool,
        size_mb: Option<u32>,
    ) -> api::Result<warden::Attested> {
        let op = warden::Op::MemoryOpen {
            slot,
            workspace: lease.workspace.clone(),
            start_id: lease.start_id.clone(),
            purpose,
            nonce: lease.nonce.clone(),
            save,
            id,
            size_mb,
        };
        self.warden
            .call_within(lease.start_id.as_str(), &op, GRANT_CALL_MAX)
            .await
    }

    pub(crate) async fn memory_grant(
        &self,
        slot: u16,
        key: kms::Released,
    ) -> api::Result<warden::Memory> {
        let op = warden::Op::MemoryGrant {
            slot,
            sealed: key.sealed,
            aad: key.aad,
        };
        self.warden
            .call_within("internal:host", &op, GRANT_CALL_MAX)
            .await
    }

    pub(crate) async fn memory_end(&self, slot: u16, end: warden::MemoryEnd) -> api::Result<bool> {
        let op = warden::Op::MemoryEnd { slot, end };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    pub(crate) async fn object_erase(
        &self,
        workspace: &WorkspaceId,
        purpose: Purpose,
        id: Option<ObjectId>,
    ) -> api::Result<bool> {
        let op = warden::Op::ObjectErase {
            workspace: workspace.clone(),
            purpose,
            id,
        };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    pub(crate) async fn objects(
        &self,
        workspace: &WorkspaceId,
    ) -> api::Result<Vec<warden::Object>> {
        let op = warden::Op::Objects {
            workspace: workspace.clone(),
        };
        self.warden.call("internal:host", &op).await
    }

    pub(crate) async fn net_set(
        &self,
        slot: u16,
        (open, rates): (Vec<warden::Open>, warden::NetRates),
    ) -> api::Result<bool> {
        let op = warden::Op::NetSet { slot, open, rates };
        self.warden.call("internal:host", &op).await
    }

    /// How far the slot's disk has got; with `end`, its last word.
    pub(crate) async fn disk_anchor(&self, slot: u16, end: bool) -> api::Result<Option<Anchored>> {
        let op = warden::Op::DiskAnchor { slot, end };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    /// The snapshot stands; the KMS forgets those that stood before.
    pub(crate) async fn snapshot_keep(
        &self,
        workspace: &WorkspaceId,
        object: &ObjectId,
    ) -> api::Result<bool> {
        let op = kms::Op::SnapshotKeep {
            workspace: workspace.clone(),
            object: object.clone(),
        };
        self.kms.call("internal:host", &op).await
    }

    pub(crate) async fn anchor(&self, statement: &AnchorStatement) -> api::Result<kms::Anchor> {
        let op = kms::Op::Anchor {
            statement: statement.clone(),
        };
        self.kms
            .call_within("internal:host", &op, ANCHOR_CALL_MAX)
            .await
    }

    pub(crate) async fn disk_erase(&self, workspace: &WorkspaceId) -> api::Result<bool> {
        let op = warden::Op::DiskErase {
            workspace: workspace.clone(),
        };
        self.warden
            .call_within("internal:host", &op, SLOT_CALL_MAX)
            .await
    }

    pub(crate) async fn counters(&self, slot: u16) -> api::Result<warden::Counters> {
        self.warden
            .call("internal:host", &warden::Op::Counters { slot })
            .await
    }

    pub(crate) async fn vm_status(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot)
            .call("internal:host", &vmctl::Op::Status)
            .await
    }

    pub(crate) async fn vm_prepare(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot)
            .call_within("internal:host", &vmctl::Op::Prepare, PREPARE_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_prepare_now(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot)
            .call_within("internal:host", &vmctl::Op::PrepareNow, PREPARE_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_save(&self, slot: u16) -> api::Result<bool> {
        self.vm(slot)
            .call_within("internal:host", &vmctl::Op::Save, TEMPLATE_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_attach(&self, slot: u16, attach: Attach) -> api::Result<Up> {
        let op = vmctl::Op::Attach {
            attach: Box::new(attach),
            wait_ms: ATTACH_WAIT_MS,
        };
        self.vm(slot)
            .call_within("internal:host", &op, ATTACH_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_wake(&self, slot: u16, wake: Wake) -> api::Result<Up> {
        let op = vmctl::Op::Wake {
            wake: Box::new(wake),
            wait_ms: ATTACH_WAIT_MS,
        };
        self.vm(slot)
            .call_within("internal:host", &op, ATTACH_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_memory_save(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot)
            .call_within("internal:host", &vmctl::Op::MemorySave, SAVE_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_archive(
        &self,
        slot: u16,
        archive: Option<&api::host::Archive>,
    ) -> api::Result<vmctl::Archived> {
        let wait_ms = ARCHIVE_WAIT_MS;
        let op = match archive {
            Some(archive) => vmctl::Op::Archive {
                paths: archive.paths.clone(),
                exclude: archive.exclude.clone(),
                max_bytes: u64::from(archive.max_mb) << 20,
                wait_ms,
            },
            None => vmctl::Op::Unarchive { wait_ms },
        };
        self.vm(slot)
            .call_within("internal:host", &op, ARCHIVE_CALL_MAX)
            .await
    }

    pub(crate) async fn vm_pause(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot).call("internal:host", &vmctl::Op::Pause).await
    }

    pub(crate) async fn vm_resume(&self, slot: u16) -> api::Result<vmctl::Status> {
        self.vm(slot)
            .call("internal:host", &vmctl::Op::Resume)
            .await
    }

    pub(crate) async fn vm_shutdown(&self, slot: u16) -> api::Result<vmctl::Status> {
        let op = vmctl::Op::Shutdown {
            grace_ms: SHUTDOWN_GRACE_MS,
        };
        self.vm(slot)
            .call_within("internal:host", &op, SHUTDOWN_CALL_MAX)
            .await
    }

    /// A fresh client: the next VM of the slot has another vmctl behind the same path.
    fn vm(&self, slot: u16) -> Client {
        Client::new(self.vmctl.join(format!("{slot}.sock")))
    }
}
