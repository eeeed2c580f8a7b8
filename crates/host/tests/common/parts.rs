//! What the doubles say the same of every slot.

use super::State;
use api::warden::{Object, VmOpened};
use model::{ObjectId, Purpose, WorkspaceId};
use std::time::{Duration, Instant};

/// What the doubles attest: the nonce, for which object.
pub(super) fn attestation(nonce: &str, purpose: Purpose, workspace: &WorkspaceId) -> String {
    format!("{nonce}|{}|{workspace}", purpose.label())
}

/// Whether there is such an archive or part of a snapshot.
pub(super) fn is_there(s: &State, of: &WorkspaceId, purpose: Purpose, id: &ObjectId) -> bool {
    s.objects
        .contains(&(of.clone(), purpose.label(), id.clone()))
}

/// What of the workspace is at rest beside its disk.
pub(super) fn at_rest(s: &State, workspace: &WorkspaceId) -> Vec<Object> {
    let object = |purpose, id| Object {
        purpose,
        id,
        bytes: 1,
    };
    let by_id = s.objects.iter().filter(|(w, ..)| w == workspace);
    let purpose = |label| Purpose::ALL.into_iter().find(|p| p.label() == label);
    let by_id = by_id.map(|(_, label, id)| object(purpose(*label).unwrap(), Some(id.clone())));
    let memory = s
        .memory
        .get(workspace)
        .map(|_| object(Purpose::Memory, None));
    memory.into_iter().chain(by_id).collect()
}

pub(super) fn close(s: &mut State, slot: u16) {
    if let Some(x) = s.slots.remove(&slot) {
        let _ = x.vmctl.send(true);
    }
}

pub(super) fn net(slot: u16) -> VmOpened {
    VmOpened {
        ip: format!("10.117.0.{}", slot + 2),
        prefix: 16,
        gateway: "10.117.0.1".into(),
        mac: "02:00:0a:75:00:02".into(),
    }
}

/// Polls until something is there.
pub async fn until<T>(what: &str, mut f: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(v) = f().await {
            return v;
        }
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
