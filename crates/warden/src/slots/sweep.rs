//! The start of a warden: what one before it left is taken over or removed.

use super::{Slot, Warden, lock};
use crate::fault::{At, Result, log};
use crate::journal::{Record, Step};
use crate::layout::remove;
use api::Error;
use api::warden::Start;
use jail::limits::KILL_WAIT;
use std::collections::BTreeMap;
use volumes::serving::{self, Disk};

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
                self.publish(&s.record)?;
                *lock(&self.cell(slot)) = Some(s);
                continue;
            }
            let saving = record.saving.map(|(proc, _)| proc);
            let all = [record.vmm, record.disk, record.vmctl, record.woken, saving];
            for proc in all.into_iter().flatten() {
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
        serving::ext4_forget(&self.config.layout.state())?;
        lock(&self.volumes).sweep_new()
    }

    fn adopt(&self, record: &Record) -> Option<Slot> {
        // What memory that was being woken goes with, the warden before this one knew alone.
        let wakes = record.how == Start::Wake && record.step == Step::Open;
        if !record.step.rests() || record.dead || wakes {
            return None;
        }
        let mut record = record.clone();
        if record.step == Step::Saving {
            record.step = Step::DiskAttached;
        }
        // What was being saved is begun again: vmctl has let go of a file that nobody serves by then.
        if let Some((proc, _)) = record.saving.take() {
            let handle = proc.handle();
            let _ = handle.is_some_and(|h| h.kill(KILL_WAIT));
        }
        let woken = match record.woken {
            Some(woken) => Some(Disk::adopt(woken.handle()?)),
            None => None,
        };
        let (vmm, vmctl) = (record.vmm?.handle()?, record.vmctl?.handle()?);
        let disk = match (record.step, record.disk) {
            (_, Some(disk)) => Some(Disk::adopt(disk.handle()?)),
            (Step::Open, None) => None,
            _ => return None,
        };
        let disks = [&disk, &woken].into_iter().flatten().map(|d| &d.handle);
        for handle in disks.chain([&vmm, &vmctl]) {
            self.watch.add(record.slot, handle).ok()?;
        }
        Some(Slot {
            record,
            vmm,
            vmctl,
            disk,
            woken,
            beside: None,
            saving: None,
            stderr: None,
        })
    }
}
