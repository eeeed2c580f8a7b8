//! The machine's identity: its key, its id, and what it swears to.

use crate::fault::{At, Result};
use crate::layout::{Layout, make_dir, read_small, write_small};
use api::{Error, context, kms};
use model::{HostId, Purpose, StartId, WorkspaceId};
use seal::sign::{Signed, SigningKey};
use std::time::{SystemTime, UNIX_EPOCH};

/// This machine.
pub struct Machine {
    /// Its attestation key; also signs templates.
    pub key: SigningKey,
    /// Its id.
    pub host: HostId,
}

impl Machine {
    /// Makes the machine's key and id if there are none.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn init(layout: &Layout) -> Result<Self> {
        make_dir(&layout.state(), 0o700)?;
        let state = layout.state();
        if read_small(&state.join("attest.key"))?.is_none() {
            let seed = crate::layout::hex(SigningKey::generate().seed().as_ref());
            write_small(&state.join("attest.key"), &seed, 0o600, true)?;
        }
        if read_small(&state.join("host_id"))?.is_none() {
            let id = HostId::from_bytes(seal::random::bytes());
            write_small(&state.join("host_id"), id.as_str(), 0o644, true)?;
        }
        Self::load(layout)
    }

    /// Reads both.
    ///
    /// # Errors
    /// When `init` has not run, or a file is not what it was.
    pub fn load(layout: &Layout) -> Result<Self> {
        let read = |name: &str| {
            let path = layout.state().join(name);
            let bad = || {
                Error::internal(format!(
                    "{} is missing or damaged; run `casemate-warden init`",
                    path.display()
                ))
            };
            read_small(&path)?
                .map(|s| s.trim().to_owned())
                .ok_or_else(bad)
        };
        let seed = read("attest.key")?;
        let seed = unhex(&seed)
            .ok_or_else(|| Error::internal("attest.key is not 64 hexadecimal digits"))?;
        Ok(Self {
            key: SigningKey::from_seed(&seed),
            host: read("host_id")?.parse().at("read", "host_id")?,
        })
    }

    /// What `init` prints: the key that the others are to trust.
    #[must_use]
    pub fn trust(&self) -> serde_json::Value {
        serde_json::json!({"trust": {"hosts.json": {self.host.as_str(): self.key.public().to_string()}}})
    }

    /// Swears that a process which runs `measurement` made `hpke_pub`, here and for this start.
    ///
    /// # Errors
    /// When the clock is before 1970.
    pub fn attest(
        &self,
        workspace: &WorkspaceId,
        start_id: &StartId,
        purpose: Purpose,
        nonce: String,
        hpke_pub: String,
        measurement: String,
    ) -> Result<String> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .at("read", "the clock")?;
        let attestation = kms::Attestation {
            host: self.host.clone(),
            workspace: workspace.clone(),
            start_id: start_id.clone(),
            purpose,
            nonce,
            hpke_pub,
            measurement,
            time_ms: u64::try_from(now.as_millis()).at("read", "the clock")?,
        };
        let signed = Signed::try_new(&self.key, context::ATTESTATION, &attestation)
            .at("sign", "an attestation")?;
        Ok(signed.as_str().to_owned())
    }
}

/// What of the jail this kernel can't do.
#[must_use]
pub fn weakened(cgroup: &str) -> Vec<String> {
    let mut weak = Vec::new();
    // SAFETY: with no attribute and the version flag the call only returns a number.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            1u32,
        )
    };
    if abi < 6 {
        weak.push(format!("Landlock ABI {abi} (6 is needed): a VMM's signals and abstract sockets are kept in by namespaces only"));
    }
    if cgroup == "v1" {
        weak.push("cgroup v1: no memory.min for disk processes".into());
    }
    let caps = rustix::thread::capabilities(None).map(|c| c.effective);
    if !caps.is_ok_and(|c| c.contains(rustix::thread::CapabilitySet::SYS_RESOURCE)) {
        weak.push(
            "no CAP_SYS_RESOURCE: the out-of-memory killer may take a disk process first".into(),
        );
    }
    weak
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0u8; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_machine_is_made_once_and_its_key_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path());
        assert!(Machine::load(&layout).is_err());
        let first = Machine::init(&layout).unwrap().trust();
        assert_eq!(Machine::init(&layout).unwrap().trust(), first);
        let key = layout.state().join("attest.key");
        assert_eq!(
            std::fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        for damage in ["", "00", &"g".repeat(64), &"é".repeat(32)] {
            std::fs::write(&key, damage).unwrap();
            assert!(Machine::load(&layout).is_err(), "{damage:?}");
        }
    }
}
