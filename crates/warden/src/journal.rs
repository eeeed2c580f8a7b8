//! The journal: one small file per slot, replaced before each step, that names all that the slot
//! has or is about to get.
//!
//! Life of an entry: written `begin` before anything exists; then before each step with that
//! step's name; removed when nothing is left. It is not synced: after a power cut no process, tap
//! or group exists, and an entry that is torn, stale or missing only means "sweep by name".

use crate::fault::{At, Result};
use crate::layout::{read_small, remove, write_small};
use api::disk::Anchored;
use api::warden::{ImageId, NetRates, Open, Slot, SlotState, Start, VmOpened};
use jail::process::Proc;
use model::{Purpose, StartId, WorkspaceId};
use net::Rules;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use vmm::driver::Driver;

/// What warden is about to do on a slot, or, for the two resting states, what it has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing exists yet.
    Begin,
    /// Memory to wake from waits for its key; there is no VM.
    MemoryWaits,
    /// Control groups, then tap and firewall entries.
    Net,
    /// VMM, vmctl and disk process wait in their jails.
    Jailed,
    /// Rests: all of them run; no volume.
    Open,
    /// The disk's backing file.
    DiskBegin,
    /// The disk process has it and waits for its key.
    DiskWaits,
    /// The grant goes to it.
    DiskGrant,
    /// The volume is open and kept; what memory was saved beside it goes.
    Spend,
    /// vmctl learns of it.
    DiskReady,
    /// Rests: the disk is with the VMM.
    DiskAttached,
    /// Rests: memory of it is being kept.
    Saving,
    /// A template is measured and moved into place.
    Seal,
    /// All of it goes.
    Close,
}

impl Step {
    /// Whether a warden that starts takes the slot over as it is.
    #[must_use]
    pub fn rests(self) -> bool {
        matches!(self, Self::Open | Self::DiskAttached | Self::Saving)
    }
}

/// A slot's entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of this format.
    pub v: u32,
    /// The slot.
    pub slot: u16,
    /// The step.
    pub step: Step,
    /// How the VM came up.
    pub how: Start,
    /// The image.
    pub image: ImageId,
    /// Memory, MiB.
    pub memory_mb: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Which VMM.
    #[serde(default)]
    pub driver: Driver,
    /// The VMM.
    pub vmm: Option<Proc>,
    /// vmctl.
    pub vmctl: Option<Proc>,
    /// The disk process.
    pub disk: Option<Proc>,
    /// The key that it made.
    pub hpke_pub: Option<String>,
    /// The digest of what it runs.
    pub measurement: Option<String>,
    /// The workspace whose disk it is.
    pub workspace: Option<WorkspaceId>,
    /// The start.
    pub start_id: Option<StartId>,
    /// The disk's file is being made.
    pub fresh: bool,
    /// What the disk said last.
    pub anchor: Option<Anchored>,
    /// The process of the memory that it was woken from.
    #[serde(default)]
    pub woken: Option<Proc>,
    /// The process that memory is being saved to, and what it becomes.
    #[serde(default)]
    pub saving: Option<(Proc, Purpose)>,
    /// What the firewall lets in.
    pub open: Vec<Open>,
    /// How fast.
    #[serde(default)]
    pub rates: NetRates,
    /// A process of it died.
    pub dead: bool,
}

impl Record {
    /// What the firewall holds for it.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let (open, rates) = (self.open.clone(), self.rates);
        Rules { open, rates }
    }

    /// One of a slot that has nothing yet.
    #[must_use]
    pub fn new(slot: u16, how: Start, image: ImageId, memory_mb: u32, cpus: u32) -> Self {
        Self {
            v: 1,
            slot,
            step: Step::Begin,
            how,
            image,
            memory_mb,
            cpus,
            driver: Driver::Qemu,
            vmm: None,
            vmctl: None,
            disk: None,
            hpke_pub: None,
            measurement: None,
            workspace: None,
            start_id: None,
            fresh: false,
            anchor: None,
            woken: None,
            saving: None,
            open: vec![],
            rates: NetRates::default(),
            dead: false,
        }
    }

    /// What Status shows of it.
    #[must_use]
    pub fn view(&self, net: VmOpened) -> Slot {
        let pid = |p: Option<Proc>| p.map_or(0, |p| p.pid);
        Slot {
            slot: self.slot,
            workspace: self.workspace.clone(),
            start_id: self.start_id.clone(),
            state: match self.step {
                _ if self.dead || self.step >= Step::Seal => SlotState::Dead,
                Step::MemoryWaits => SlotState::MemoryWaits,
                Step::DiskAttached | Step::Saving => SlotState::DiskAttached,
                s if s >= Step::DiskBegin => SlotState::DiskWaits,
                _ => SlotState::Open,
            },
            how: self.how,
            image: self.image.clone(),
            memory_mb: self.memory_mb,
            cpus: self.cpus,
            vmm_pid: pid(self.vmm),
            disk_pid: self.disk.map(|d| d.pid),
            vmctl_pid: pid(self.vmctl),
            net,
        }
    }
}

/// The directory of entries.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// The journal in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Replaces the slot's entry.
    ///
    /// # Errors
    /// The file's.
    pub fn write(&self, record: &Record) -> Result {
        let text = serde_json::to_string(record).at("write the journal of slot", record.slot)?;
        write_small(&self.path(record.slot), &text, 0o600, false)
    }

    /// Removes the slot's entry.
    ///
    /// # Errors
    /// The file's.
    pub fn remove(&self, slot: u16) -> Result {
        remove(&self.path(slot).with_extension("tmp"))?;
        remove(&self.path(slot))
    }

    /// All entries; `None` for one that can't be read.
    ///
    /// # Errors
    /// The directory's.
    pub fn read(&self) -> Result<Vec<(u16, Option<Record>)>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&self.dir).at("read", self.dir.display())? {
            let path = entry.at("read", self.dir.display())?.path();
            let slot = path
                .file_stem()
                .and_then(|s| s.to_str())
                .and_then(|s| s.parse().ok());
            match slot {
                Some(slot) if path.extension().is_some_and(|e| e == "json") => {
                    all.push((slot, parse(slot, &path)));
                }
                _ => remove(&path)?,
            }
        }
        Ok(all)
    }

    fn path(&self, slot: u16) -> PathBuf {
        self.dir.join(format!("{slot}.json"))
    }
}

fn parse(slot: u16, path: &Path) -> Option<Record> {
    let text = read_small(path).ok()??;
    serde_json::from_str(&text)
        .ok()
        .filter(|r: &Record| r.v == 1 && r.slot == slot)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const STEPS: [Step; 5] = [
        Step::Begin,
        Step::Open,
        Step::DiskWaits,
        Step::DiskAttached,
        Step::Close,
    ];

    fn read(text: &[u8]) -> Vec<(u16, Option<Record>)> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("7.json"), text).unwrap();
        Journal::new(dir.path().into()).read().unwrap()
    }

    proptest! {
        #[test]
        fn what_is_no_entry_is_an_unknown_slot(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(read(&text), vec![(7, None)]);
        }

        #[test]
        fn an_entry_comes_back_and_a_torn_one_does_not(step in 0..STEPS.len(), port: u16, cut in 1usize..50) {
            let dir = tempfile::tempdir().unwrap();
            let journal = Journal::new(dir.path().into());
            let record = Record {
                step: STEPS[step],
                driver: if port % 2 == 0 { Driver::Firecracker } else { Driver::Qemu },
                vmm: Some(Proc { pid: 1, start: 2 }),
                workspace: Some(WorkspaceId::from_bytes([1; 8])),
                fresh: true,
                saving: Some((Proc { pid: 3, start: 4 }, Purpose::Memory)),
                open: vec![Open { source: api::warden::Source::Slot(3), port }],
                rates: NetRates { bytes_per_s: u64::MAX, packets_per_s: port.into() },
                ..Record::new(7, Start::Cold, "0".repeat(64), 256, 1)
            };
            journal.write(&record).unwrap();
            prop_assert_eq!(journal.read().unwrap(), vec![(7, Some(record))]);
            let text = std::fs::read(dir.path().join("7.json")).unwrap();
            prop_assert_eq!(read(&text[..text.len() - cut]), vec![(7, None)]);
        }
    }
}
