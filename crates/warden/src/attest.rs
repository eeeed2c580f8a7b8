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
            let seed = hex::encode(SigningKey::generate().seed().as_ref() as &[u8]);
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
        let mut key = seal::Zeroizing::new([0u8; 32]);
        hex::decode_to_slice(&seed, key.as_mut()).at("read", "attest.key")?;
        Ok(Self {
            key: SigningKey::from_seed(&key),
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
