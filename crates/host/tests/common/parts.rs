//! What the doubles say the same of every slot.

use api::warden::VmOpened;
use model::{Purpose, WorkspaceId};
use std::time::{Duration, Instant};

/// What the doubles attest: the nonce, for which object.
pub(super) fn attestation(nonce: &str, purpose: Purpose, workspace: &WorkspaceId) -> String {
    format!("{nonce}|{}|{workspace}", purpose.label())
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
