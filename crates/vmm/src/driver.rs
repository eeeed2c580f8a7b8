//! Which driver runs guests on this machine, and why: the operator's question to `doctor`.

use crate::firecracker::pin;
use crate::kvm::Probe;
use serde::{Deserialize, Serialize};

/// A driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Driver {
    /// [`crate::qemu`].
    #[default]
    Qemu,
    /// [`crate::firecracker`].
    Firecracker,
}

/// The drivers that warden starts. It has a jail for both; the guest's agent has no vsock yet.
pub const STARTED: &[Driver] = &[Driver::Qemu];

/// What lies at [`pin::ARTIFACT`] among the artifacts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// The pinned executable.
    Pinned,
    /// Another, of this SHA-256.
    Other(String),
}

impl Driver {
    /// As an argument of vmctl's.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        }
    }
}

impl Found {
    /// What a file of this SHA-256 (lowercase hex) is; `None` if there is no file.
    #[must_use]
    pub fn of(sha256: Option<&str>) -> Self {
        match sha256 {
            None => Self::Absent,
            Some(pin::SHA256) => Self::Pinned,
            Some(other) => Self::Other(other.to_owned()),
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The driver.
    pub driver: Driver,
    /// Which and why, for the operator.
    pub why: String,
}

/// Firecracker where KVM truly runs a guest, the pinned executable is there and warden starts it;
/// QEMU everywhere else.
#[must_use]
pub fn choose(kvm: &Probe, firecracker: &Found) -> Choice {
    choose_of(STARTED, kvm, firecracker)
}

fn choose_of(started: &[Driver], kvm: &Probe, firecracker: &Found) -> Choice {
    let qemu = |why: String| Choice {
        driver: Driver::Qemu,
        why: format!("QEMU, {}; {why}", kvm.why),
    };
    if !kvm.usable {
        return qemu("Firecracker has no other way to run a guest than KVM".into());
    }
    match firecracker {
        Found::Absent => qemu(format!(
            "no Firecracker at {} among the artifacts",
            pin::ARTIFACT
        )),
        Found::Other(sha256) => qemu(format!(
            "{} is not Firecracker {} but has the SHA-256 {sha256}; the pinned one has {}",
            pin::ARTIFACT,
            pin::VERSION,
            pin::SHA256
        )),
        Found::Pinned if !started.contains(&Driver::Firecracker) => qemu(format!(
            "Firecracker {} is there, but this version's guest has no vsock, which it needs",
            pin::VERSION
        )),
        Found::Pinned => Choice {
            driver: Driver::Firecracker,
            why: format!("Firecracker {}, {}", pin::VERSION, kvm.why),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_and_the_reason() {
        let both = &[Driver::Qemu, Driver::Firecracker][..];
        let kvm = |usable| Probe {
            usable,
            why: if usable { "KVM: ran" } else { "TCG: crawls" }.into(),
        };
        let other = Found::of(Some("00"));
        for (started, usable, found, driver, why) in [
            (
                both,
                false,
                &Found::Pinned,
                Driver::Qemu,
                "QEMU, TCG: crawls; Firecracker has no",
            ),
            (
                both,
                true,
                &Found::Absent,
                Driver::Qemu,
                "QEMU, KVM: ran; no Firecracker at",
            ),
            (both, true, &other, Driver::Qemu, "has the SHA-256 00"),
            (
                both,
                true,
                &Found::of(Some(pin::SHA256)),
                Driver::Firecracker,
                "Firecracker 1.",
            ),
            (
                &[Driver::Qemu],
                true,
                &Found::Pinned,
                Driver::Qemu,
                "guest has no vsock",
            ),
        ] {
            let choice = choose_of(started, &kvm(usable), found);
            assert_eq!(choice.driver, driver, "{choice:?}");
            assert!(choice.why.contains(why), "{choice:?}");
        }
    }

    /// The pin is a version and digests, and its links are of that version.
    #[test]
    fn the_pin_is_whole() {
        for digest in [pin::SHA256, pin::ARCHIVE_SHA256] {
            assert_eq!(digest.len(), 64);
            assert!(
                digest
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
            );
        }
        assert_eq!(pin::ARCHIVE.matches(pin::VERSION).count(), 2);
        assert!(pin::ADVISORIES.starts_with("https://"));
    }
}
