//! The calls host makes: to warden, to the KMS, and to the vmctl of each slot.
//!
//! Must never carry a path, a command or a key: ids and numbers, and ciphertext it can't open.

use crate::limits::{
    ATTACH_CALL_MAX, ATTACH_WAIT_MS, GRANT_CALL_MAX, PREPARE_CALL_MAX, SHUTDOWN_CALL_MAX,
    SHUTDOWN_GRACE_MS, SLOT_CALL_MAX, TEMPLATE_CALL_MAX,
};
use api::agent::{Attach, Up};
use api::audit::Lease;
use api::host::Desired;
use api::rpc::Client;
use api::{kms, vmctl, warden};
use model::WorkspaceId;
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
    ) -> api::Result<warden::DiskOpened> {
        let op = warden::Op::DiskOpen {
            slot,
            workspace: desired.workspace.clone(),
            start_id: lease.start_id.clone(),
            purpose: lease.purpose,
            nonce: lease.nonce.clone(),
            disk_mb: desired.resources.disk_size_mb,
            bytes_per_s: desired.disk_bytes_per_s,
            ops_per_s: desired.disk_ops_per_s,
            pids: desired.pids,
            from: None,
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

    pub(crate) async fn disk_grant(&self, slot: u16, key: kms::Released) -> api::Result<bool> {
        let op = warden::Op::DiskGrant {
            slot,
            sealed: key.sealed,
            aad: key.aad,
            from: None,
        };
        self.warden
            .call_within("internal:host", &op, GRANT_CALL_MAX)
            .await
    }

    pub(crate) async fn net_set(
        &self,
        slot: u16,
        (open, rates): (Vec<warden::Open>, warden::NetRates),
    ) -> api::Result<bool> {
        let op = warden::Op::NetSet { slot, open, rates };
        self.warden.call("internal:host", &op).await
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
