//! Whoever can write to the host's disk, against each kind of object as it rests: a disk, saved
//! memory, the disk of a snapshot, each made and opened by the functions of the process. What changes
//! a byte that is read is refused; what changes none has no effect. Nothing else comes of it.

use std::collections::BTreeSet;

use api::ErrorCode;
use model::Purpose;

use super::attack::{copy_page, flip, replace, swap};
use super::*;
use crate::format::{self, open_or_format};
use crate::grant::Grant;
use crate::image;
use crate::limits::{HEADER_COVERED_BYTES, JOURNAL_BYTES, NOTE_AREA_BYTES, TOP_NODES};
use crate::sidecar::layout::{JOURNAL_AT, NodeId};

const MUTATIONS: u64 = 10_000;
/// Size of each volume: the note's, and two leaves behind it.
const BYTES: u64 = NOTE_AREA_BYTES + (2 << 20);
const NOTE: &str = "a note";
/// Runs of sectors that are written, in bytes of the volume: at its ends and across a leaf's edge.
const WRITTEN: [(u64, u64); 4] = [
    (NOTE_AREA_BYTES, 8 * 4096),
    ((2 << 20) - 4 * 4096, 8 * 4096),
    ((2 << 20) + (300 << 10), 3 * 4096),
    (BYTES - 5 * 4096, 5 * 4096),
];

/// Pages of superblocks.
const SUPERBLOCKS: u64 = 2;

/// The file that is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Volume,
    Tags,
}

/// Where in it, by what is there.
const REGIONS: [(Part, &str, u64, u64); 13] = {
    use Part::{Tags, Volume};
    let data = DATA_OFFSET_BYTES;
    let journal = JOURNAL_AT + JOURNAL_BYTES;
    let top = 8 << 20;
    let middle = top + TOP_NODES as u64 * 8192;
    let leaves = (40 << 20) + (128 << 10);
    [
        (Volume, "primary header", 0, 16 << 10),
        (Volume, "secondary header", 16 << 10, 16 << 10),
        (Volume, "keyslot", 32 << 10, 252 << 10),
        (Volume, "padding", 284 << 10, data - (284 << 10)),
        (Volume, "note", data, 4096),
        (Volume, "sectors", data, BYTES),
        (Tags, "superblocks", 0, 8192),
        (Tags, "gap", 8192, JOURNAL_AT - 8192),
        (Tags, "journal", JOURNAL_AT, JOURNAL_BYTES),
        (Tags, "gap behind the journal", journal, top - journal),
        (Tags, "nodes of level 2", top, 8192),
        (Tags, "nodes of level 1", middle, 8192),
        (Tags, "leaves", leaves, 4 * 8192),
    ]
};

/// An object at the end of its making, and what somebody may have kept of it on the way.
struct Object {
    purpose: Purpose,
    key: [u8; 32],
    machine: Machine,
    anchor: Option<Anchor>,
    plain: Vec<u8>,
    earlier: Vec<Machine>,
    /// Pages of each file that are read.
    read: BTreeMap<Part, BTreeSet<u64>>,
}

impl Object {
    fn new(purpose: Purpose, key: u8, dice: &mut Dice) -> Self {
        let power = Power::default();
        let machine = Machine {
            data: Store::new(512, &power),
            tags: Store::new(512, &power),
            power,
        };
        let key = [key; 32];
        let (data, tags) = (machine.data.clone(), Some(machine.tags.clone()));
        let text = text(purpose, key, 1);
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let volume = if purpose.is_image() {
            format::begin(data, tags, &grant, BYTES, |_| Ok(())).unwrap()
        } else {
            open_or_format(data, tags, None, &grant, true, BYTES).unwrap()
        };
        let mut earlier = vec![machine.copy()];
        let mut plain = vec![0; usize::try_from(BYTES).unwrap()];
        for round in 0..4 {
            for (at, len) in WRITTEN {
                let bytes: Vec<u8> = (0..len / 4096).flat_map(|_| dice.sector()).collect();
                volume.write(at, &mut bytes.clone()).unwrap();
                plain[usize::try_from(at).unwrap()..][..bytes.len()].copy_from_slice(&bytes);
            }
            volume.sync().unwrap();
            earlier.push(machine.copy());
            if round % 2 == 1 && !purpose.is_image() {
                volume.close().unwrap();
                earlier.push(machine.copy());
            }
        }
        if purpose.is_image() {
            image::note_write(&volume, NOTE).unwrap();
            volume.sync().unwrap();
            // Its note is there, and it was not closed.
            earlier.push(machine.copy());
        } else {
            volume.write(0, &mut dice.sector()).unwrap();
        }
        volume.close().unwrap();
        volume.read(0, &mut plain[..4096]).unwrap();
        let anchor = (purpose == Purpose::Disk).then(|| anchor(&volume.report()));
        let mut object = Self {
            purpose,
            key,
            machine,
            anchor,
            plain,
            earlier,
            read: BTreeMap::new(),
        };
        object.find_what_is_read();
        object
    }

    /// Which pages are read: those whose loss is refused. They must be what the format says.
    fn find_what_is_read(&mut self) {
        let volume: BTreeSet<u64> = pages(0, HEADER_COVERED_BYTES as u64)
            .chain(pages(DATA_OFFSET_BYTES, BYTES))
            .collect();
        let mut tags = BTreeSet::new();
        let there: Vec<u64> = self.machine.tags.state().live.keys().copied().collect();
        for page in there {
            let machine = self.machine.copy();
            let was = machine.tags.state().live.remove(&page);
            let is_blank = was.is_some_and(|page| *page == [0; PAGE]);
            if !is_blank && self.verdict(&machine) != Verdict::NoEffect {
                tags.insert(page);
            }
        }
        // A disk without its newest superblock is what a crash before that one leaves: its journal
        // has the same state. An image was closed before it was kept.
        let superblocks = tags.iter().filter(|page| **page < SUPERBLOCKS).count();
        assert_eq!(superblocks, usize::from(self.purpose.is_image()));
        let mut nodes = BTreeSet::new();
        for (at, len) in WRITTEN.into_iter().chain([(0, 4096)]) {
            for sector in at / 4096..(at + len) / 4096 {
                let mut node = Some(NodeId::of(sector));
                while let Some(id) = node {
                    nodes.insert(id);
                    node = id.parent();
                }
            }
        }
        for id in &nodes {
            let slots = [false, true].map(|slot| id.offset(slot) / PAGE as u64);
            let read = slots.iter().filter(|page| tags.contains(page)).count();
            assert_eq!(read, 1, "one slot of {id:?}");
        }
        assert_eq!(tags.len(), superblocks + nodes.len(), "and nothing else");
        self.read = BTreeMap::from([(Part::Volume, volume), (Part::Tags, tags)]);
    }

    /// As the process opens it, and reads all of it.
    fn verdict(&self, machine: &Machine) -> Verdict {
        let text = text(self.purpose, self.key, 9);
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let grant = Grant {
            anchor: self.anchor.clone(),
            ..grant
        };
        let (data, tags) = (machine.data.clone(), machine.tags.clone());
        let opened = if self.purpose.is_image() {
            // As casemate-volumes opens it.
            image::open(data.to_read(), tags.to_read(), &grant)
                .map(|(volume, note)| (volume, note == NOTE))
        } else {
            open_or_format(data, Some(tags), None, &grant, false, BYTES).map(|v| (v, true))
        };
        let (volume, note_is_its_own) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let code = error.code();
                let typed = [
                    ErrorCode::DiskTampered,
                    // The file is longer than the disk that is asked for.
                    ErrorCode::DiskCorrupt,
                    // It has no note: it was never finished.
                    ErrorCode::MemoryStale,
                ];
                assert!(typed.contains(&code), "{error}");
                return Verdict::AtOpen(code);
            }
        };
        let mut now = vec![0; self.plain.len()];
        for (at, page) in (0..).step_by(64 << 10).zip(now.chunks_mut(64 << 10)) {
            if let Err(error) = volume.read(at, page) {
                let error = DiskError::io("reading")(error);
                assert_eq!(error.code(), ErrorCode::DiskTampered);
                assert!(volume.report().refused > 0, "an alarm");
                return Verdict::AtRead;
            }
        }
        if now == self.plain && note_is_its_own && volume.size_bytes() == BYTES {
            Verdict::NoEffect
        } else {
            Verdict::Accepted
        }
    }

    /// What of that differs from what it was.
    fn differs(&self, machine: &Machine) -> Differs {
        let parts = [
            (Part::Volume, &self.machine.data, &machine.data),
            (Part::Tags, &self.machine.tags, &machine.tags),
        ];
        let mut superblocks = false;
        for (part, was, now) in parts {
            let (was, now) = (was.state(), now.state());
            let blank: Page = Arc::new([0; PAGE]);
            let page = |state: &State, n| state.live.get(&n).unwrap_or(&blank).clone();
            let changed = |n: u64| page(&was, n) != page(&now, n);
            let cut = part == Part::Volume && was.length != now.length;
            if cut || self.read[&part].iter().any(|n| changed(*n)) {
                return Differs::Read;
            }
            superblocks |= part == Part::Tags && (0..SUPERBLOCKS).any(changed);
        }
        if superblocks && !self.purpose.is_image() {
            Differs::Superblocks
        } else {
            Differs::Unread
        }
    }
}

/// What an attack changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Differs {
    /// Something that is read.
    Read,
    /// Of a disk, its superblocks alone: the same state from its journal, or refused.
    Superblocks,
    /// Nothing that is ever read.
    Unread,
}

fn text(purpose: Purpose, key: [u8; 32], run: u64) -> String {
    let disk = purpose == Purpose::Disk;
    let grant = api::kms::Grant {
        workspace: "ws_0123456789abcdef".parse().unwrap(),
        start_id: "st_0123456789abcdef".parse().unwrap(),
        run,
        anchor: None,
        purpose,
        disk_key: hex::encode(key),
        identity_seed: "1b".repeat(if disk { 32 } else { 0 }),
        config_digest: "2c".repeat(32),
        mint_key: "3d".repeat(32),
        gateway_key: "4e".repeat(32),
        edge_key: "5f".repeat(32),
    };
    serde_json::to_string(&grant).unwrap()
}

fn pages(at: u64, len: u64) -> impl Iterator<Item = u64> {
    at / PAGE as u64..(at + len) / PAGE as u64
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    AtOpen(ErrorCode),
    AtRead,
    NoEffect,
    Accepted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    BitFlipped,
    PageZeroed,
    PageGarbage,
    PagesSwapped,
    PageOfEarlier,
    PageOfAnother,
    CutOff,
    Extended,
    FileOfEarlier,
    FileOfAnother,
    BothOfEarlier,
    BothOfAnother,
    BothOfDifferentEarlier,
    SuperblocksExchanged,
}

const CHANGES: [Change; 14] = [
    Change::BitFlipped,
    Change::PageZeroed,
    Change::PageGarbage,
    Change::PagesSwapped,
    Change::PageOfEarlier,
    Change::PageOfAnother,
    Change::CutOff,
    Change::Extended,
    Change::FileOfEarlier,
    Change::FileOfAnother,
    Change::BothOfEarlier,
    Change::BothOfAnother,
    Change::BothOfDifferentEarlier,
    Change::SuperblocksExchanged,
];

/// Changes `machine`, a copy of the object's; where, for the table.
fn attack(
    object: &Object,
    another: &Object,
    machine: &Machine,
    change: Change,
    dice: &mut Dice,
) -> &'static str {
    let (part, region, at, len) = REGIONS[dice.below(REGIONS.len() as u64) as usize];
    let file = |machine: &Machine| match part {
        Part::Volume => machine.data.clone(),
        Part::Tags => machine.tags.clone(),
    };
    let earlier = |dice: &mut Dice| {
        let n = dice.below(object.earlier.len() as u64) as usize;
        object.earlier[n].copy()
    };
    let whole = match part {
        Part::Volume => "volume",
        Part::Tags => "tags",
    };
    let target = file(machine);
    // A page of the region that holds something, or any.
    let page = |dice: &mut Dice| {
        let all: Vec<u64> = pages(at, len).collect();
        let there: Vec<u64> = {
            let state = target.state();
            let all = all.iter().filter(|p| state.live.contains_key(p));
            all.copied().collect()
        };
        let of = if there.is_empty() || dice.one_in(8) {
            all
        } else {
            there
        };
        of[dice.below(of.len() as u64) as usize]
    };
    let put = |page: u64, bytes: [u8; PAGE]| {
        target.state().live.insert(page, Arc::new(bytes));
    };
    match change {
        Change::BitFlipped => flip(&target, page(dice) * PAGE as u64, PAGE as u64, dice),
        Change::PageZeroed => {
            let page = page(dice);
            target.state().live.remove(&page);
        }
        Change::PageGarbage => put(page(dice), dice.sector()),
        Change::PagesSwapped => swap(&target, page(dice), page(dice)),
        Change::PageOfEarlier => copy_page(&file(&earlier(dice)), &target, page(dice)),
        Change::PageOfAnother => copy_page(&file(&another.machine), &target, page(dice)),
        Change::CutOff => {
            let length = target.state().length;
            target.set_len(dice.below(length) / 512 * 512).unwrap();
            return whole;
        }
        Change::Extended => {
            let length = target.state().length.next_multiple_of(PAGE as u64);
            put(length / PAGE as u64, dice.sector());
            target.state().length = length + PAGE as u64;
            return whole;
        }
        Change::FileOfEarlier => {
            replace(&target, &file(&earlier(dice)));
            return whole;
        }
        Change::FileOfAnother => {
            replace(&target, &file(&another.machine));
            return whole;
        }
        Change::BothOfEarlier => {
            let old = earlier(dice);
            replace(&machine.data, &old.data);
            replace(&machine.tags, &old.tags);
            return "both";
        }
        Change::BothOfAnother => {
            replace(&machine.data, &another.machine.data);
            replace(&machine.tags, &another.machine.tags);
            return "both";
        }
        Change::BothOfDifferentEarlier => {
            replace(&machine.data, &earlier(dice).data);
            replace(&machine.tags, &earlier(dice).tags);
            return "both";
        }
        Change::SuperblocksExchanged => {
            swap(&machine.tags, 0, 1);
            return "superblocks";
        }
    }
    region
}

#[test]
fn i26_ten_thousand_changes_of_disks_memory_and_snapshots_are_refused() {
    let seed = 0x5eed_0026;
    println!("seed={seed:#x}");
    let mut dice = Dice(seed);
    // Of each kind two, under different keys; the last is another's, of the first's kind.
    let kinds = [
        Purpose::Disk,
        Purpose::Memory,
        Purpose::SnapshotDisk,
        Purpose::SnapshotMemory,
    ];
    let objects: Vec<Object> = (1..)
        .zip(kinds.into_iter().chain([Purpose::Disk]))
        .map(|(key, purpose)| Object::new(purpose, key, &mut dice))
        .collect();
    for object in &objects {
        let whole = object.verdict(&object.machine.copy());
        assert_eq!(whole, Verdict::NoEffect, "{:?}", object.purpose);
    }
    let mut table: BTreeMap<(String, Change, &str), [u64; 3]> = BTreeMap::new();
    let (mut n, mut refused, mut unread) = (0_u64, 0, 0);
    while refused < MUTATIONS {
        n += 1;
        let object = &objects[(n % 4) as usize];
        let another = &objects[((n % 4) + 1 + dice.below(4)) as usize % objects.len()];
        let change = CHANGES[dice.below(CHANGES.len() as u64) as usize];
        let machine = object.machine.copy();
        let place = attack(object, another, &machine, change, &mut dice);
        let differs = object.differs(&machine);
        let verdict = object.verdict(&machine);
        let about = format!(
            "{:?} {change:?} of {place} n={n}: {verdict:?}",
            object.purpose
        );
        let column = match verdict {
            Verdict::AtOpen(_) => 0,
            Verdict::AtRead => 1,
            Verdict::NoEffect => 2,
            Verdict::Accepted => panic!("{about}"),
        };
        match differs {
            Differs::Read => assert!(column < 2, "{about}"),
            Differs::Superblocks => {}
            Differs::Unread => assert_eq!(column, 2, "{about}"),
        }
        if column < 2 {
            refused += 1;
        } else {
            unread += 1;
        }
        let row = (format!("{:?}", object.purpose), change, place);
        table.entry(row).or_default()[column] += 1;
    }
    println!(
        "{:<15} {:<23} {:<23} {:>7} {:>7} {:>7}",
        "object", "change", "of", "at open", "at read", "unread"
    );
    for ((object, change, place), [at_open, at_read, none]) in &table {
        let change = format!("{change:?}");
        println!("{object:<15} {change:<23} {place:<23} {at_open:>7} {at_read:>7} {none:>7}");
    }
    println!(
        "{refused} changes of what is read: all refused; {unread} of bytes that nothing reads: none had an effect"
    );
}

/// A file that is longer or shorter opens nothing, not even the part that is whole.
#[test]
fn i26_an_image_is_of_the_size_that_it_was_kept_with() {
    let mut dice = Dice(0x1_2345);
    let object = Object::new(Purpose::Memory, 7, &mut dice);
    for length in [0, 4096, DATA_OFFSET_BYTES, DATA_OFFSET_BYTES + BYTES - 4096] {
        let machine = object.machine.copy();
        machine.data.set_len(length).unwrap();
        let verdict = object.verdict(&machine);
        assert_eq!(
            verdict,
            Verdict::AtOpen(ErrorCode::DiskTampered),
            "{length}"
        );
    }
    let machine = object.machine.copy();
    machine.data.state().length += 4096;
    let verdict = object.verdict(&machine);
    assert_eq!(verdict, Verdict::AtOpen(ErrorCode::DiskTampered));
}
