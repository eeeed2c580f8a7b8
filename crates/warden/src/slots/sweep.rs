//! The start of a warden: what one before it left is taken over or removed.

use super::{Slot, Warden, lock};
use crate::diskproc::Disk;
use crate::fault::{At, Result, log};
use crate::journal::{Record, Step};
use crate::layout::remove;
use api::Error;
use jail::limits::KILL_WAIT;
use std::collections::BTreeMap;

impl Warden {
    /// Adopts slots that rest with all their processes; removes everything else.
    pub(super) fn sweep(&self) -> Result {
        let mut adopted = BTreeMap::new();
        for (slot, record) in self.journal.read()? {
            let Some(record) = record else { continue };
            if let Some(s) = self.adopt(&record) {
                adopted.insert(slot, record.rules());
                if let Some(workspace) = &record.workspace {
                    lock(&self.in_use).insert(workspace.clone());
                }
                self.publish(&record)?;
                *lock(&self.cell(slot)) = Some(s);
                continue;
            }
            for proc in [record.vmm, record.disk, record.vmctl]
                .into_iter()
                .flatten()
            {
                if let Some(handle) = proc.handle() {
                    let _ = handle.kill(KILL_WAIT);
                }
            }
        }
        let kept = adopted.clone();
        lock(&self.net).stands(adopted)?;
        for group in self.cgroups.list() {
            let slot = group.rsplit_once('-').and_then(|(_, n)| n.parse().ok());
            if !slot.is_some_and(|s| kept.contains_key(&s)) && !self.cgroups.remove(&group) {
                return Err(Error::internal(format!(
                    "a process in control group {group} can't be killed"
                )));
            }
        }
        for (slot, record) in self.journal.read()? {
            if kept.contains_key(&slot) {
                continue;
            }
            log(
                "sweep",
                serde_json::json!({"slot": slot, "step": record.as_ref().map(|r| r.step)}),
            );
            self.journal.remove(slot)?;
        }
        for dir in [
            self.config.layout.vmctl(),
            self.config.layout.state().join("build"),
        ] {
            for entry in std::fs::read_dir(&dir).at("read", dir.display())?.flatten() {
                let name = entry.file_name();
                let slot = name
                    .to_str()
                    .and_then(|n| n.split('.').next())
                    .and_then(|n| n.parse().ok());
                if !slot.is_some_and(|s| kept.contains_key(&s)) {
                    remove(&entry.path())?;
                }
            }
        }
        lock(&self.volumes).sweep_new()
    }

    fn adopt(&self, record: &Record) -> Option<Slot> {
        if !record.step.rests() || record.dead {
            return None;
        }
        let (vmm, vmctl) = (record.vmm?.handle()?, record.vmctl?.handle()?);
        let disk = match (record.step, record.disk) {
            (_, Some(disk)) => Some(Disk::adopt(disk.handle()?)),
            (Step::Open, None) => None,
            _ => return None,
        };
        let watched = [Some(&vmm), Some(&vmctl), disk.as_ref().map(|d| &d.handle)];
        for handle in watched.into_iter().flatten() {
            self.watch.add(record.slot, handle).ok()?;
        }
        Some(Slot {
            record: record.clone(),
            vmm,
            vmctl,
            disk,
            stderr: None,
        })
    }
}
