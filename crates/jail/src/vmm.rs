//! Which VMM runs guests here, on what, and what follows from it.

use crate::fault::{At, Result};
use crate::plan;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use vmm::driver::{Choice, Driver, Found, choose};
use vmm::firecracker::pin::SHA256;
use vmm::kvm::Probe;

/// Memory that TCG may use for translated code: the VMM's own bound, MiB.
const TRANSLATOR_MB: u64 = 1024;

/// The VMM.
#[derive(Debug, Clone)]
pub struct Vmm {
    /// Its driver.
    pub driver: Driver,
    /// /dev/kvm truly runs guests.
    pub kvm: bool,
    /// Which driver and accelerator, and why.
    pub why: String,
    /// SHA-256 of the one executable that is started; `None`: what lies there.
    pub pinned: Option<String>,
}

/// What a probe found, and for what: another boot or another VMM asks again.
#[derive(serde::Serialize, serde::Deserialize)]
struct Probed {
    key: String,
    kvm: bool,
    why: String,
}

impl Vmm {
    /// Finds out which accelerator runs guests here, by running one (trusted, 64 KiB, no devices);
    /// once per boot and VMM, as a file in `state` remembers. `firecracker` is what lies at
    /// [`vmm::firecracker::pin::ARTIFACT`].
    ///
    /// # Errors
    /// When there is no VMM in the installation at `root`.
    pub fn probe(root: &Path, state: &Path, firecracker: &Found) -> Result<Self> {
        let probe = Self::accelerator(root, state)?;
        let Choice { driver, why } = choose(&probe, firecracker);
        let pinned = match driver {
            Driver::Qemu => None,
            Driver::Firecracker => Some(SHA256.into()),
        };
        Ok(Self {
            driver,
            kvm: probe.usable,
            why,
            pinned,
        })
    }

    fn accelerator(root: &Path, state: &Path) -> Result<Probe> {
        let program = root.join(format!("{}{}", crate::CLOSURE, plan::VMM));
        let file = std::fs::metadata(&program).at("find", program.display())?;
        let boot =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").at("read", "the boot id")?;
        let version = [file.ino(), file.size(), file.mtime_nsec().cast_unsigned()];
        let key = format!("{} {version:?} {}", boot.trim(), file.mtime());
        let cache = state.join("accel.json");
        let text = std::fs::read_to_string(&cache).unwrap_or_default();
        let known = serde_json::from_str::<Probed>(&text).ok();
        if let Some(Probed { kvm, why, .. }) = known.filter(|p| p.key == key) {
            return Ok(Probe { usable: kvm, why });
        }
        let probe = vmm::kvm::probe(&program, state);
        let text = serde_json::to_string(&Probed {
            key,
            kvm: probe.usable,
            why: probe.why.clone(),
        });
        // A torn one is asked for again.
        text.map_err(std::io::Error::other)
            .and_then(|text| std::fs::write(&cache, text))
            .at("write", cache.display())?;
        Ok(probe)
    }

    /// Whether an executable of this SHA-256 (lowercase hex) may be started.
    ///
    /// # Errors
    /// It was replaced since it was chosen.
    pub fn check(&self, sha256: &str) -> Result {
        if self.pinned.as_deref().is_none_or(|pin| pin == sha256) {
            return Ok(());
        }
        let name = plan::executable(self.driver);
        Err(api::Error::internal(format!(
            "{name} among the artifacts was replaced (SHA-256 {sha256}); put the pinned one back, or restart warden"
        )))
    }

    /// Memory for translated code, MiB.
    #[must_use]
    pub fn translator_mb(&self) -> u64 {
        if self.kvm { 0 } else { TRANSLATOR_MB }
    }
}
