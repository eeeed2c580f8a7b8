//! Which accelerator runs guests here, and what follows from it.

use crate::fault::{At, Result};
use crate::plan;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Memory that TCG may use for translated code: the VMM's own bound, MiB.
const TRANSLATOR_MB: u64 = 1024;

/// The driver of the VMM.
#[derive(Debug, Clone)]
pub struct Vmm {
    /// /dev/kvm truly runs guests.
    pub kvm: bool,
    /// Which accelerator, and why.
    pub accel_why: String,
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
    /// once per boot and VMM, as a file in `state` remembers.
    ///
    /// # Errors
    /// When there is no VMM in the installation at `root`.
    pub fn probe(root: &Path, state: &Path) -> Result<Self> {
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
            return Ok(Self {
                kvm,
                accel_why: why,
            });
        }
        let vmm::kvm::Probe { usable: kvm, why } = vmm::kvm::probe(&program, state);
        let accel_why = why.clone();
        let text = serde_json::to_string(&Probed { key, kvm, why });
        // A torn one is asked for again.
        text.map_err(std::io::Error::other)
            .and_then(|text| std::fs::write(&cache, text))
            .at("write", cache.display())?;
        Ok(Self { kvm, accel_why })
    }

    /// Memory for translated code, MiB.
    #[must_use]
    pub fn translator_mb(&self) -> u64 {
        if self.kvm { 0 } else { TRANSLATOR_MB }
    }
}
