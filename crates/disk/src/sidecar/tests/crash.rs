//! Power cuts at any operation, with any part of what was not synced lost.

use std::time::{Duration, Instant};

use super::super::place;
use super::*;

/// Two leaves' worth and a bit, so that a hole may be a whole leaf.
pub(super) const SECTORS: u64 = 600;
/// The sectors that are written: around the leaves' edges.
const SPOTS: [u64; 48] = {
    let mut spots = [0; 48];
    let mut at = 0;
    while at < 48 {
        spots[at] = [0, 250, 508, 560][at / 12] + (at % 12) as u64;
        at += 1;
    }
    spots
};

/// What a sector may be.
#[derive(Clone)]
pub(super) struct Sector {
    /// The last is what a read must give; the first is what was flushed.
    pub(super) versions: Vec<[u8; SECTOR_BYTES]>,
}

pub(super) struct Disk {
    pub(super) machine: Machine,
    pub(super) sidecar: Sidecar<Store>,
    pub(super) model: BTreeMap<u64, Sector>,
    pub(super) run: u64,
    pub(super) anchor: Anchor,
}

impl Disk {
    pub(super) fn new(dice: &mut Dice) -> Self {
        let machine = Machine::new(SECTORS);
        let sidecar = machine.create(SECTORS, 1);
        let mut model = BTreeMap::new();
        for spot in SPOTS {
            model.insert(
                spot,
                Sector {
                    versions: vec![[0; SECTOR_BYTES]],
                },
            );
        }
        for spot in &SPOTS[..9] {
            let content = dice.sector();
            write(&sidecar, &machine.data, *spot, &[content]).unwrap();
            model.insert(
                *spot,
                Sector {
                    versions: vec![content],
                },
            );
        }
        sidecar.finish(&machine.data).unwrap();
        let anchor = anchor(&sidecar.report());
        Self {
            machine,
            sidecar,
            model,
            run: 1,
            anchor,
        }
    }

    /// One operation; whether there was power for it.
    pub(super) fn step(&mut self, dice: &mut Dice) -> bool {
        let data = &self.machine.data;
        match dice.below(20) {
            0..10 => {
                let at = dice.below(SPOTS.len() as u64) as usize;
                let most = SPOTS[at..]
                    .iter()
                    .zip(SPOTS[at]..)
                    .take_while(|(a, b)| **a == *b)
                    .count();
                let n = 1 + dice.below(most as u64) as usize;
                let content: Vec<_> = (0..n).map(|_| dice.sector()).collect();
                for (spot, content) in SPOTS[at..].iter().zip(&content) {
                    self.model.get_mut(spot).unwrap().versions.push(*content);
                }
                write(&self.sidecar, data, SPOTS[at], &content).is_ok()
            }
            10..15 => self.flushed(|disk| disk.sidecar.sync(&disk.machine.data)),
            15 => self.flushed(|disk| disk.sidecar.close(&disk.machine.data)),
            16 => {
                let (first, count) = [(0, 256), (256, 256), (250, 270), (0, SECTORS), (508, 3)]
                    [dice.below(5) as usize];
                for (_, sector) in self.model.range_mut(first..first + count) {
                    sector.versions.push([0; SECTOR_BYTES]);
                }
                self.sidecar.punch(data, first, count).is_ok()
            }
            17 => {
                let report = self.sidecar.anchor(data);
                if let Ok(report) = &report {
                    self.anchor = anchor(report);
                }
                report.is_ok()
            }
            18 => self.sidecar.drain_if_due(data).is_ok(),
            _ => {
                let spot = SPOTS[dice.below(SPOTS.len() as u64) as usize];
                match read(&self.sidecar, data, spot) {
                    Ok(now) => {
                        assert!(now == *self.model[&spot].versions.last().unwrap());
                        true
                    }
                    Err(_) => false,
                }
            }
        }
    }

    fn flushed(&mut self, run: impl Fn(&Self) -> io::Result<()>) -> bool {
        let done = run(self).is_ok();
        if done {
            for sector in self.model.values_mut() {
                sector.versions.drain(..sector.versions.len() - 1);
            }
        }
        done
    }

    /// The power goes; the disk is opened again and must be whole.
    fn cut(&mut self, dice: &mut Dice) {
        self.machine = self.machine.cut(dice);
        // Opening may lose its power too, anywhere.
        while dice.one_in(3) {
            self.run += 1;
            self.machine.power.lasts(Some(dice.below(12) as usize));
            let _ = self.machine.open(SECTORS, self.run, Some(&self.anchor));
            self.machine = self.machine.cut(dice);
        }
        self.run += 1;
        self.sidecar = self
            .machine
            .open(SECTORS, self.run, Some(&self.anchor))
            .unwrap();
        assert_eq!(self.sidecar.report().refused, 0, "a false alarm");
        for (spot, sector) in &mut self.model {
            let now = read(&self.sidecar, &self.machine.data, *spot).unwrap();
            assert!(
                sector.versions.contains(&now),
                "sector {spot} is neither what was flushed nor what was written since"
            );
            sector.versions = vec![now];
        }
    }
}

/// I-10 and I-26: what was flushed is there; what is accepted was written; no false alarm.
#[test]
fn i26_a_power_cut_at_any_moment_loses_nothing_flushed_and_alarms_nobody() {
    let cuts_wanted = 6_000;
    let (mut cuts, mut disks) = (0, 0);
    while cuts < cuts_wanted {
        disks += 1;
        let seed = 0x9e37_79b9_7f4a_7c15 ^ (disks * 0x1_0001);
        println!("seed={seed:#x}");
        let mut dice = Dice(seed);
        let mut disk = Disk::new(&mut dice);
        for _ in 0..40 {
            let operations = dice.below(60) as usize;
            if dice.one_in(2) {
                disk.machine.power.lasts(Some(operations));
            }
            for _ in 0..operations {
                if !disk.step(&mut dice) {
                    break;
                }
            }
            disk.cut(&mut dice);
            cuts += 1;
        }
    }
    println!("{cuts} power cuts on {disks} disks: 0 lost, 0 false alarms");
}

/// A long life fills the journal, the changes and both superblocks many times over.
#[test]
fn a_long_life_without_cuts_ends_clean_and_is_opened_without_a_write() {
    let mut dice = Dice(77);
    let mut disk = Disk::new(&mut dice);
    for _ in 0..3_000 {
        assert!(disk.step(&mut dice));
    }
    disk.sidecar.close(&disk.machine.data).unwrap();
    let end = disk.sidecar.report();
    disk.machine.power.lasts(Some(0));
    let again = disk.machine.open(SECTORS, 9, Some(&anchor(&end))).unwrap();
    assert_eq!(again.report(), end);
    for (spot, sector) in &disk.model {
        let now = read(&again, &disk.machine.data, *spot).unwrap();
        assert!(now == *sector.versions.last().unwrap());
    }
}

/// Nobody flushes, and the buffer is never full: the thread beside brings it out.
#[test]
fn what_is_written_goes_out_by_itself() {
    let machine = Machine::new(SECTORS);
    let sidecar = machine.create(SECTORS, 1);
    sidecar.finish(&machine.data).unwrap();
    let sidecar = Arc::new(sidecar);
    let (draining, data) = (Arc::clone(&sidecar), machine.data.clone());
    // Ends with the test's process.
    std::thread::spawn(move || draining.drain_as_due(&data));
    let half = vec![[7; SECTOR_BYTES]; 12];
    for at in [0, 100, 200] {
        let before = sidecar.report().generation;
        write(&sidecar, &machine.data, at, &half).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while sidecar.report().generation == before {
            assert!(Instant::now() < deadline, "nobody drains");
            std::thread::yield_now();
        }
        let mut at_rest = [0; SECTOR_BYTES];
        machine.data.read_at(place(at), &mut at_rest).unwrap();
        assert_eq!(at_rest, [7; SECTOR_BYTES]);
    }
    write(&sidecar, &machine.data, 300, &half[..11]).unwrap();
    assert_eq!(sidecar.buffers().active.len(), 11, "less waits for a flush");
}
