//! Whoever can write to the host's disk, against the tags: every change is refused when the disk
//! is opened or when the sector is read, or it changed nothing that is ever read.

use std::collections::HashMap;
use std::fmt;

use super::*;
use crate::limits::{HEADER_COVERED_BYTES, JOURNAL_BYTES};
use crate::sidecar::layout::{JOURNAL_AT, NodeId};

/// Three leaves of the first 256 MiB, two of the second: three levels of nodes.
const SECTORS: u64 = 100_000;
const SPOTS: u64 = 80;
const MUTATIONS: u64 = 10_000;

fn spot(index: u64) -> u64 {
    [0, 250, 600, 66_000, 99_900][(index / 16) as usize] + index % 16
}

/// A disk at one time.
#[derive(Clone)]
struct Image {
    machine: Machine,
    generation: Anchor,
}

/// A disk's life, with copies that an attacker took on the way.
struct Life {
    copies: Vec<Image>,
    /// The state that is attacked, and what it holds.
    end: Image,
    content: HashMap<u64, [u8; SECTOR_BYTES]>,
    anchor: Anchor,
    /// Whether it was closed; otherwise it has a journal.
    clean: bool,
}

impl Life {
    fn new(dice: &mut Dice, clean: bool) -> Self {
        let machine = Machine::new(SECTORS);
        let sidecar = machine.create(SECTORS, 1);
        let mut content = HashMap::new();
        for index in 0..SPOTS {
            let now = if index.is_multiple_of(5) {
                [0; SECTOR_BYTES]
            } else {
                dice.sector()
            };
            if !index.is_multiple_of(5) {
                write(&sidecar, &machine.data, spot(index), &[now]).unwrap();
            }
            content.insert(spot(index), now);
        }
        sidecar.finish(&machine.data).unwrap();
        let image = |sidecar: &Sidecar<Store>| Image {
            machine: machine.copy(),
            generation: anchor(&sidecar.anchor(&machine.data).unwrap()),
        };
        let mut copies = vec![image(&sidecar)];
        for round in 0..12 {
            for _ in 0..40 {
                let index = dice.below(SPOTS);
                if !index.is_multiple_of(5) {
                    let now = dice.sector();
                    write(&sidecar, &machine.data, spot(index), &[now]).unwrap();
                    content.insert(spot(index), now);
                }
            }
            sidecar.sync(&machine.data).unwrap();
            if round % 4 == 3 {
                sidecar.close(&machine.data).unwrap();
            }
            copies.push(image(&sidecar));
        }
        // Each sector is newer than in any copy: a copy of one is never the truth by chance.
        for index in (0..SPOTS).filter(|index| !index.is_multiple_of(5)) {
            let now = dice.sector();
            write(&sidecar, &machine.data, spot(index), &[now]).unwrap();
            content.insert(spot(index), now);
        }
        sidecar.sync(&machine.data).unwrap();
        let anchored = anchor(&sidecar.anchor(&machine.data).unwrap());
        if clean {
            sidecar.close(&machine.data).unwrap();
        }
        let end = image(&sidecar);
        Self {
            copies,
            end,
            content,
            anchor: anchored,
            clean,
        }
    }

    /// What a machine that holds `image` makes of it.
    fn verdict(&self, image: &Machine) -> Verdict {
        let sidecar = match image.open(SECTORS, 9, Some(&self.anchor)) {
            Ok(sidecar) => sidecar,
            Err(DiskError::Tampered { .. } | DiskError::Size { .. }) => return Verdict::AtOpen,
            Err(error) => panic!("refused, but not as tampered with: {error}"),
        };
        let mut verdict = Verdict::NoEffect;
        for (sector, want) in &self.content {
            match read(&sidecar, &image.data, *sector) {
                Ok(now) if now == *want => {}
                Ok(_) => return Verdict::Accepted,
                Err(_) => verdict = Verdict::AtRead,
            }
        }
        // A refused read is counted: that is the alarm.
        assert_eq!(verdict == Verdict::AtRead, sidecar.report().refused > 0);
        verdict
    }

    fn written(&self, dice: &mut Dice) -> u64 {
        loop {
            let index = dice.below(SPOTS);
            if !index.is_multiple_of(5) {
                return spot(index);
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Verdict {
    AtOpen,
    AtRead,
    NoEffect,
    Accepted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    SectorBitFlipped,
    SectorsSwapped,
    SectorOfOlderCopy,
    SectorMadeHole,
    HoleFilled,
    HeaderChanged,
    DataCutOff,
    DataRolledBack,
    SuperblocksChanged,
    NodeChanged,
    NodeOfOlderCopy,
    NodesSwapped,
    JournalChanged,
    JournalCutOff,
    SidecarCutOff,
    SidecarRolledBack,
    SidecarRemoved,
    SidecarAnywhere,
    BothRolledBack,
    SidecarSpliced,
}

impl Kind {
    const ALL: [Self; 20] = [
        Self::SectorBitFlipped,
        Self::SectorsSwapped,
        Self::SectorOfOlderCopy,
        Self::SectorMadeHole,
        Self::HoleFilled,
        Self::HeaderChanged,
        Self::DataCutOff,
        Self::DataRolledBack,
        Self::SuperblocksChanged,
        Self::NodeChanged,
        Self::NodeOfOlderCopy,
        Self::NodesSwapped,
        Self::JournalChanged,
        Self::JournalCutOff,
        Self::SidecarCutOff,
        Self::SidecarRolledBack,
        Self::SidecarRemoved,
        Self::SidecarAnywhere,
        Self::BothRolledBack,
        Self::SidecarSpliced,
    ];

    /// Bytes that nothing reads (a node's free slot, what an earlier lap left of the journal) may
    /// change without a word, and a copy may be of the same bytes. A journal that counts is left
    /// behind by a crash only.
    fn may_have_no_effect(self, life: &Life) -> bool {
        match self {
            Self::SidecarAnywhere | Self::NodeOfOlderCopy | Self::SidecarSpliced => true,
            Self::JournalChanged | Self::JournalCutOff => life.clean,
            _ => false,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{self:?}"))
    }
}

/// Changes `image` as `kind` says.
fn attack(life: &Life, image: &Machine, kind: Kind, dice: &mut Dice) {
    let (data, tags) = (&image.data, &image.tags);
    let sector = life.written(dice);
    let older = life.copies[dice.below(life.copies.len() as u64) as usize].clone();
    let page = |sector: u64| DATA_OFFSET_BYTES / PAGE as u64 + sector;
    let leaf = NodeId::of(sector);
    let node = match dice.below(3) {
        0 => leaf,
        1 => leaf.parent().unwrap(),
        _ => leaf.parent().unwrap().parent().unwrap(),
    };
    match kind {
        Kind::SectorBitFlipped => flip(data, page(sector) * PAGE as u64, PAGE as u64, dice),
        Kind::SectorsSwapped => {
            let other = loop {
                let other = life.written(dice);
                if other != sector {
                    break other;
                }
            };
            swap(data, page(sector), page(other));
        }
        Kind::SectorOfOlderCopy => copy_page(&older.machine.data, data, page(sector)),
        Kind::SectorMadeHole => drop(data.state().live.remove(&page(sector))),
        Kind::HoleFilled => flip(
            data,
            page(spot(dice.below(16) * 5)) * PAGE as u64,
            PAGE as u64,
            dice,
        ),
        Kind::HeaderChanged => flip(data, 0, HEADER_COVERED_BYTES as u64, dice),
        Kind::DataCutOff => {
            // Behind the last sector that is written.
            let end = DATA_OFFSET_BYTES + (1 + dice.below(99_915)) * PAGE as u64;
            data.set_len(end).unwrap();
        }
        Kind::DataRolledBack => replace(data, &older.machine.data),
        Kind::SuperblocksChanged => {
            for slot in 0..2 {
                flip(tags, slot * PAGE as u64, PAGE as u64, dice);
            }
        }
        Kind::NodeChanged => {
            for slot in [false, true] {
                flip(tags, node.offset(slot), PAGE as u64, dice);
            }
        }
        Kind::NodeOfOlderCopy => {
            for slot in [false, true] {
                copy_page(&older.machine.tags, tags, node.offset(slot) / PAGE as u64);
            }
        }
        Kind::NodesSwapped => {
            let mut other = NodeId {
                index: node.index ^ 1,
                ..node
            };
            if node.level == 0 {
                other = NodeId::of(spot((dice.below(5) * 16 + 32) % SPOTS));
                if other == node {
                    other = NodeId::of(spot(0));
                }
                if other == node {
                    other = NodeId::of(spot(79));
                }
            }
            for slot in [false, true] {
                for its in [false, true] {
                    swap(
                        tags,
                        node.offset(slot) / PAGE as u64,
                        other.offset(its) / PAGE as u64,
                    );
                }
            }
        }
        Kind::JournalChanged => {
            // The first batch: all behind it falls with it.
            flip(tags, JOURNAL_AT, 512, dice);
        }
        Kind::JournalCutOff => {
            let first = JOURNAL_AT / PAGE as u64;
            tags.state()
                .live
                .retain(|page, _| !(first..first + JOURNAL_BYTES / PAGE as u64).contains(page));
        }
        Kind::SidecarCutOff => {
            let end = dice.below(NodeId::of(0).offset(false) + 1);
            tags.set_len(end / 512 * 512).unwrap();
        }
        Kind::SidecarRolledBack => replace(tags, &older.machine.tags),
        Kind::SidecarRemoved => tags.set_len(0).unwrap(),
        Kind::SidecarAnywhere => {
            let pages: Vec<u64> = tags.state().live.keys().copied().collect();
            let page = pages[dice.below(pages.len() as u64) as usize];
            flip(tags, page * PAGE as u64, PAGE as u64, dice);
        }
        Kind::BothRolledBack => {
            replace(data, &older.machine.data);
            replace(tags, &older.machine.tags);
        }
        Kind::SidecarSpliced => {
            // An older superblock before the newest journal, or the other way round.
            let pages = if dice.one_in(2) {
                0..2
            } else {
                16..16 + JOURNAL_BYTES / PAGE as u64
            };
            for page in pages {
                copy_page(&older.machine.tags, tags, page);
            }
        }
    }
}

pub(super) fn flip(store: &Store, at: u64, len: u64, dice: &mut Dice) {
    let at = at + dice.below(len);
    let mut state = store.state();
    let page = state
        .live
        .entry(at / PAGE as u64)
        .or_insert_with(|| Arc::new([0; PAGE]));
    Arc::make_mut(page)[(at % PAGE as u64) as usize] ^= 1 << dice.below(8);
}

pub(super) fn swap(store: &Store, a: u64, b: u64) {
    let mut state = store.state();
    let (was_a, was_b) = (state.live.remove(&a), state.live.remove(&b));
    state.live.extend(was_a.map(|page| (b, page)));
    state.live.extend(was_b.map(|page| (a, page)));
}

pub(super) fn copy_page(from: &Store, to: &Store, page: u64) {
    let page_there = from.state().live.get(&page).cloned();
    let mut state = to.state();
    match page_there {
        Some(content) => drop(state.live.insert(page, content)),
        None => drop(state.live.remove(&page)),
    }
}

pub(super) fn replace(store: &Store, with: &Store) {
    let (pages, length) = {
        let state = with.state();
        (state.live.clone(), state.length)
    };
    let mut state = store.state();
    state.live = pages;
    state.length = length;
}

#[test]
fn i26_ten_thousand_changes_and_rollbacks_are_refused() {
    let seed = 0x5eed_0003;
    println!("seed={seed:#x}");
    let mut dice = Dice(seed);
    let lives = [Life::new(&mut dice, true), Life::new(&mut dice, false)];
    for life in &lives {
        assert_eq!(life.verdict(&life.end.machine.copy()), Verdict::NoEffect);
    }
    let mut table: BTreeMap<Kind, BTreeMap<Verdict, u64>> = BTreeMap::new();
    let (mut n, mut refused, mut unread) = (0, 0, 0);
    while refused < MUTATIONS {
        n += 1;
        let kind = Kind::ALL[(n % Kind::ALL.len() as u64) as usize];
        let life = &lives[dice.below(2) as usize];
        let image = life.end.machine.copy();
        attack(life, &image, kind, &mut dice);
        let verdict = life.verdict(&image);
        assert_ne!(verdict, Verdict::Accepted, "{kind} n={n}");
        assert!(
            verdict != Verdict::NoEffect || kind.may_have_no_effect(life),
            "{kind} n={n} clean={} passed unseen",
            life.clean
        );
        *table.entry(kind).or_default().entry(verdict).or_default() += 1;
        match verdict {
            Verdict::NoEffect => unread += 1,
            _ => refused += 1,
        }
    }
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>9}",
        "change", "at open", "at read", "unread", "accepted"
    );
    for (kind, counts) in &table {
        let count = |verdict| counts.get(&verdict).copied().unwrap_or(0);
        println!(
            "{kind:<28} {:>8} {:>8} {:>8} {:>9}",
            count(Verdict::AtOpen),
            count(Verdict::AtRead),
            count(Verdict::NoEffect),
            count(Verdict::Accepted)
        );
    }
    println!(
        "{refused} changes refused, 0 accepted; {unread} more were of bytes that nothing reads"
    );
}

/// What a crash leaves to an attacker: states since the anchor, and nothing else.
#[test]
fn i26_a_state_is_accepted_from_its_anchor_on_and_not_before() {
    let mut dice = Dice(0xa11c);
    let life = Life::new(&mut dice, false);
    for (n, copy) in life.copies.iter().enumerate() {
        let open = |at: &Anchor| copy.machine.copy().open(SECTORS, 9, Some(at)).map(drop);
        open(&copy.generation).unwrap();
        for later in life.copies[n + 1..].iter().chain([&life.end]) {
            let refused = open(&later.generation).unwrap_err();
            assert_eq!(refused.code(), api::ErrorCode::DiskTampered);
            assert!(refused.to_string().contains("rolled back"), "{refused}");
        }
        // The same generation with another past.
        let mut other = copy.generation.clone();
        other.root[0] ^= 1;
        assert!(open(&other).is_err());
    }
}

/// A branch that was given up can't come back: another start has a higher number from its first
/// batch on, however many batches the branch had.
#[test]
fn i26_a_given_up_branch_does_not_come_back() {
    let mut dice = Dice(0xb0b);
    let life = Life::new(&mut dice, false);
    let early = life.copies[5].machine.copy();
    let anchored = life.copies[5].generation.clone();
    // The attacker goes back to the anchor: allowed. That start goes on a little and is anchored.
    let sidecar = early.open(SECTORS, 2, Some(&anchored)).unwrap();
    write(&sidecar, &early.data, spot(1), &[dice.sector()]).unwrap();
    sidecar.sync(&early.data).unwrap();
    let now = anchor(&sidecar.anchor(&early.data).unwrap());
    assert!(now.generation.batch < life.anchor.generation.batch);
    // The branch has more batches and is refused all the same.
    let refused = life
        .end
        .machine
        .copy()
        .open(SECTORS, 3, Some(&now))
        .map(drop)
        .unwrap_err();
    assert!(refused.to_string().contains("rolled back"), "{refused}");
    // And a start's number is used once.
    assert!(matches!(
        early.open(SECTORS, 2, Some(&now)).map(drop),
        Err(DiskError::Grant { .. })
    ));
}
