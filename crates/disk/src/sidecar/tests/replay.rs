//! An attacker who cuts the power whenever they like and has kept the platter of any earlier moment:
//! what opens is a state since the last anchor, as if the power had been cut then, or nothing. With
//! the files as the power cut left them, nothing that was flushed is lost.

use super::attack::{copy_page, replace};
use super::crash::{Disk, SECTORS, Sector};
use super::*;

/// What each sector may be: what it was when the disk was anchored, and all that was written since,
/// also in states that were given up.
type Since = BTreeMap<u64, Vec<[u8; SECTOR_BYTES]>>;

/// What the attacker puts in the place of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Forged {
    /// Both of one earlier moment.
    Both,
    /// One of an earlier moment beside the other of now.
    One,
    /// Each of a moment of its own.
    Mixed,
    /// Single pages of an earlier moment.
    Pages,
}

struct Attack {
    disk: Disk,
    shelf: Vec<Machine>,
    since: Since,
    /// Accepted whole, accepted in part (some sector refused), refused.
    counts: [u64; 3],
    /// States that were opened although they are older than now.
    went_back: u64,
}

impl Attack {
    fn new(dice: &mut Dice) -> Self {
        let disk = Disk::new(dice);
        let shelf = vec![disk.machine.copy()];
        let since = versions(&disk.model);
        Self {
            disk,
            shelf,
            since,
            counts: [0; 3],
            went_back: 0,
        }
    }

    /// The guest works and is anchored now and then, until the power goes.
    fn live(&mut self, dice: &mut Dice) {
        let operations = 1 + dice.below(30) as usize;
        if dice.one_in(2) {
            self.disk.machine.power.lasts(Some(operations));
        }
        for _ in 0..operations {
            let anchored = self.disk.anchor.clone();
            let powered = self.disk.step(dice);
            if self.disk.anchor != anchored {
                self.since = versions(&self.disk.model);
            }
            for (spot, sector) in &self.disk.model {
                let known = self.since.get_mut(spot).unwrap();
                for version in &sector.versions {
                    if !known.contains(version) {
                        known.push(*version);
                    }
                }
            }
            if !powered {
                break;
            }
            if dice.one_in(4) {
                // With any part of what is not synced: a copy is as good as a cut.
                self.shelf.push(self.platter(dice));
            }
        }
    }

    /// What the power cut leaves.
    fn platter(&self, dice: &mut Dice) -> Machine {
        let left = *self.disk.machine.power.0.lock().unwrap();
        let platter = self.disk.machine.cut(dice);
        self.disk.machine.power.lasts(left);
        platter
    }

    fn forge(&self, honest: &Machine, dice: &mut Dice) -> (Forged, Machine) {
        let all = [Forged::Both, Forged::One, Forged::Mixed, Forged::Pages];
        let forged = all[dice.below(4) as usize];
        let pick =
            |dice: &mut Dice| self.shelf[dice.below(self.shelf.len() as u64) as usize].copy();
        let machine = honest.copy();
        let old = pick(dice);
        match forged {
            Forged::Both => {
                replace(&machine.data, &old.data);
                replace(&machine.tags, &old.tags);
            }
            Forged::One if dice.one_in(2) => replace(&machine.data, &old.data),
            Forged::One => replace(&machine.tags, &old.tags),
            Forged::Mixed => {
                replace(&machine.data, &old.data);
                replace(&machine.tags, &pick(dice).tags);
            }
            Forged::Pages => {
                for _ in 0..=dice.below(6) {
                    let (from, to) = if dice.one_in(2) {
                        (&old.data, &machine.data)
                    } else {
                        (&old.tags, &machine.tags)
                    };
                    let pages: Vec<u64> = from.state().live.keys().copied().collect();
                    copy_page(from, to, pages[dice.below(pages.len() as u64) as usize]);
                }
            }
        }
        // What was put there is on the platter.
        (forged, machine.copy())
    }

    /// Opens what was forged; whether it goes on from there.
    fn offer(&mut self, forged: Forged, machine: Machine, dice: &mut Dice) -> bool {
        self.disk.run += 1;
        let anchor = &self.disk.anchor;
        let sidecar = match machine.open(SECTORS, self.disk.run, Some(anchor)) {
            Ok(sidecar) => sidecar,
            Err(refused) => {
                assert_eq!(refused.code(), api::ErrorCode::DiskTampered, "{refused}");
                self.counts[2] += 1;
                return false;
            }
        };
        let opened = sidecar.report().generation;
        assert!(opened >= anchor.generation, "{opened:?} below the anchor");
        let mut now = BTreeMap::new();
        for (spot, may_be) in &self.since {
            if let Ok(content) = read(&sidecar, &machine.data, *spot) {
                assert!(
                    may_be.contains(&content),
                    "{forged:?}: sector {spot} is older than the anchor, or was never written"
                );
                now.insert(*spot, vec![content]);
            }
        }
        let whole = now.len() == self.since.len();
        assert_eq!(
            whole,
            sidecar.report().refused == 0,
            "each refusal is an alarm"
        );
        self.counts[usize::from(!whole)] += 1;
        let newest =
            |spot: &u64, was: &Sector| now.get(spot).map(|v| v[0]) == was.versions.last().copied();
        let is_old = self.disk.model.iter().any(|(spot, was)| !newest(spot, was));
        self.went_back += u64::from(is_old);
        if !whole || dice.one_in(2) {
            return false;
        }
        self.disk.machine = machine;
        self.disk.sidecar = sidecar;
        for (spot, versions) in now {
            self.disk.model.get_mut(&spot).unwrap().versions = versions;
        }
        true
    }

    /// Opens the files as the power cut left them.
    fn go_on(&mut self, honest: Machine) {
        self.disk.run += 1;
        let anchor = Some(&self.disk.anchor);
        self.disk.sidecar = honest.open(SECTORS, self.disk.run, anchor).unwrap();
        self.disk.machine = honest;
        assert_eq!(self.disk.sidecar.report().refused, 0);
        for (spot, sector) in &mut self.disk.model {
            let now = read(&self.disk.sidecar, &self.disk.machine.data, *spot).unwrap();
            assert!(
                sector.versions.contains(&now),
                "sector {spot} lost what was flushed"
            );
            sector.versions = vec![now];
        }
    }
}

fn versions(model: &BTreeMap<u64, Sector>) -> Since {
    let of = |(spot, sector): (&u64, &Sector)| (*spot, sector.versions.clone());
    model.iter().map(of).collect()
}

#[test]
fn i26_who_cuts_the_power_and_brings_old_files_gets_no_state_older_than_the_anchor() {
    let cuts_wanted = 10_000;
    let (mut cuts, mut disks, mut counts, mut went_back) = (0, 0_u64, [0; 3], 0);
    while cuts < cuts_wanted {
        disks += 1;
        let seed = 0xa77a_c4e5 ^ (disks * 0x1_0001);
        println!("seed={seed:#x}");
        let mut dice = Dice(seed);
        let mut attack = Attack::new(&mut dice);
        for _ in 0..60 {
            attack.live(&mut dice);
            let honest = attack.platter(&mut dice);
            honest.power.lasts(None);
            let (forged, machine) = attack.forge(&honest, &mut dice);
            if !attack.offer(forged, machine, &mut dice) {
                attack.go_on(honest);
            }
            cuts += 1;
        }
        for (all, of) in counts.iter_mut().zip(attack.counts) {
            *all += of;
        }
        went_back += attack.went_back;
    }
    let [whole, part, refused] = counts;
    println!(
        "{cuts} power cuts with old files on {disks} disks: {refused} refused when opened, {part} in \
         part when read, {whole} opened as a state since the anchor ({went_back} older than the \
         newest); 0 older than the anchor, 0 flushed sectors lost with the true files"
    );
    assert!(refused > cuts / 4 && went_back > cuts / 100);
}
