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

/// Firecracker where KVM truly runs a guest and the operator put the pinned executable there; QEMU
/// everywhere else, and where the operator took it away again.
#[must_use]
pub fn choose(kvm: &Probe, firecracker: &Found) -> Choice {
    let qemu = |why: String| Choice {
        driver: Driver::Qemu,
        why: format!("QEMU, {}; {why}", kvm.why),
    };
    if !kvm.usable {
        return qemu("Firecracker has no other way to run a guest than KVM".into());
    }
    match firecracker {
        Found::Absent => qemu(format!(
            "no Firecracker at {} among the artifacts: docs/operate/drivers.md says how it gets there",
            pin::ARTIFACT
        )),
        Found::Other(sha256) => qemu(format!(
            "{} is not Firecracker {} but has the SHA-256 {sha256}; the pinned one has {}",
            pin::ARTIFACT,
            pin::VERSION,
            pin::SHA256
        )),
        Found::Pinned => Choice {
            driver: Driver::Firecracker,
            why: format!(
                "Firecracker {}, {}; none of this project's own guests has run under it on hardware \
                 yet, and upstream promises patches for it until {} (docs/operate/drivers.md)",
                pin::VERSION,
                kvm.why,
                pin::SUPPORT_ENDS
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_and_the_reason() {
        let kvm = |usable| Probe {
            usable,
            why: if usable { "KVM: ran" } else { "TCG: crawls" }.into(),
        };
        let (pinned, other) = (Found::of(Some(pin::SHA256)), Found::of(Some("00")));
        let (qemu, firecracker) = (Driver::Qemu, Driver::Firecracker);
        for (usable, found, driver, why) in [
            (
                false,
                &pinned,
                qemu,
                "QEMU, TCG: crawls; Firecracker has no",
            ),
            (
                false,
                &Found::Absent,
                qemu,
                "QEMU, TCG: crawls; Firecracker has no",
            ),
            (
                true,
                &Found::Absent,
                qemu,
                "QEMU, KVM: ran; no Firecracker at",
            ),
            (true, &other, qemu, "has the SHA-256 00"),
            (true, &pinned, firecracker, "Firecracker 1."),
        ] {
            let choice = choose(&kvm(usable), found);
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
