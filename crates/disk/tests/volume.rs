//! The volume against a plain vector, with power cuts: a backing store that loses, in any
//! combination and down to 512 bytes, what was not synced.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use disk::DiskError;
use disk::backing::Backing;
use disk::format::{self, open_or_format};
use disk::grant::Grant;
use disk::limits::{DATA_OFFSET_BYTES, SECTOR_BYTES};
use disk::luks2::VolumeKey;
use disk::volume::Volume;
use proptest::prelude::*;

const SECTORS: usize = 12;
const SIZE: usize = SECTORS * SECTOR_BYTES;
const UNIT: u64 = 512;

type Units = HashMap<u64, [u8; UNIT as usize]>;

/// Memory with a volatile cache in front.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    durable: Units,
    live: Units,
    len: u64,
    pending: Vec<(u64, Option<[u8; UNIT as usize]>)>,
    /// Operations that still succeed; the rest fail as if the power were gone.
    left: Option<usize>,
}

impl Store {
    fn failing_after(operations: usize) -> Self {
        let store = Self::default();
        store.0.lock().unwrap().left = Some(operations);
        store
    }

    /// What is on the platter after the power went: of what was pending, the parts that `kept`
    /// says, still in order.
    fn cut(&self, mut kept: impl FnMut() -> bool) -> Self {
        let state = self.0.lock().unwrap();
        let mut durable = state.durable.clone();
        for (unit, data) in &state.pending {
            // Punching is the file system's, which does it by blocks.
            if kept() {
                match data {
                    Some(data) => drop(durable.insert(*unit, *data)),
                    None => {
                        for unit in *unit..*unit + SECTOR_BYTES as u64 / UNIT {
                            durable.remove(&unit);
                        }
                    }
                }
            }
        }
        let live = durable.clone();
        Self(Arc::new(Mutex::new(State {
            durable,
            live,
            len: state.len,
            ..State::default()
        })))
    }

    /// Sectors that hold nothing durable.
    fn holes(&self) -> Vec<bool> {
        let state = self.0.lock().unwrap();
        let per_sector = SECTOR_BYTES as u64 / UNIT;
        let first = DATA_OFFSET_BYTES / UNIT;
        (0..SECTORS as u64)
            .map(|sector| {
                let units = first + sector * per_sector..first + (sector + 1) * per_sector;
                !units
                    .into_iter()
                    .any(|unit| state.durable.contains_key(&unit))
            })
            .collect()
    }

    fn operation(&self) -> io::Result<std::sync::MutexGuard<'_, State>> {
        let mut state = self.0.lock().unwrap();
        match &mut state.left {
            Some(0) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(left) => {
                *left -= 1;
                Ok(state)
            }
            None => Ok(state),
        }
    }
}

fn units(offset: u64, len: u64) -> std::ops::Range<u64> {
    assert!(offset.is_multiple_of(UNIT) && len.is_multiple_of(UNIT));
    offset / UNIT..(offset + len) / UNIT
}

impl Backing for Store {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.operation()?;
        for (unit, out) in units(offset, buf.len() as u64).zip(buf.chunks_exact_mut(UNIT as usize))
        {
            out.copy_from_slice(state.live.get(&unit).unwrap_or(&[0; UNIT as usize]));
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut state = self.operation()?;
        for (unit, data) in units(offset, buf.len() as u64).zip(buf.chunks_exact(UNIT as usize)) {
            let data: [u8; UNIT as usize] = data.try_into().unwrap();
            state.live.insert(unit, data);
            state.pending.push((unit, Some(data)));
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.operation()?;
        for unit in units(offset, len) {
            state.live.remove(&unit);
            if (unit * UNIT).is_multiple_of(SECTOR_BYTES as u64) {
                state.pending.push((unit, None));
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.operation()?;
        state.durable = state.live.clone();
        state.pending.clear();
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.operation()?;
        state.len = len;
        if len == 0 {
            state.live.clear();
            state.durable.clear();
            state.pending.clear();
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: usize, len: usize, byte: u8 },
    Zero { at: usize, len: usize },
    Read { at: usize, len: usize },
    Sync,
    PowerCut { kept: Vec<bool> },
}

fn step() -> impl Strategy<Value = Step> {
    let sizes = prop_oneof![0usize..700, Just(SECTOR_BYTES), 0usize..5 * SECTOR_BYTES];
    let places = prop_oneof![
        0..SIZE,
        (0..SECTORS).prop_map(|sector| sector * SECTOR_BYTES)
    ];
    let span = (places, sizes).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    prop_oneof![
        4 => (span.clone(), 1u8..).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        2 => span.clone().prop_map(|(at, len)| Step::Zero { at, len }),
        2 => span.prop_map(|(at, len)| Step::Read { at, len }),
        1 => Just(Step::Sync),
        1 => proptest::collection::vec(any::<bool>(), 1..50)
            .prop_map(|kept| Step::PowerCut { kept }),
    ]
}

/// What a plain disk would hold, and which bytes may be lost with the power.
struct Model {
    bytes: Vec<u8>,
    synced: Vec<u8>,
    touched: Vec<bool>,
}

impl Model {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            synced: bytes.clone(),
            touched: vec![false; bytes.len()],
            bytes,
        }
    }

    fn set(&mut self, at: usize, content: impl ExactSizeIterator<Item = u8>) {
        let len = content.len();
        self.touched[at..at + len].fill(true);
        self.bytes.splice(at..at + len, content);
    }
}

fn all_of<B: Backing>(volume: &Volume<B>) -> Vec<u8> {
    let mut out = vec![0; SIZE];
    volume.read(0, &mut out).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn i10_is_a_disk_also_after_a_power_cut(steps in proptest::collection::vec(step(), 1..40)) {
        let key = VolumeKey::random();
        let mut store = Store::default();
        let mut volume = Volume::new(store.clone(), &key, SIZE as u64).unwrap();
        let mut model = Model::new(vec![0; SIZE]);
        for step in steps {
            match step {
                Step::Write { at, len, byte } => {
                    let content = (0..len).map(|index| byte.wrapping_add(index as u8));
                    let mut data: Vec<u8> = content.clone().collect();
                    volume.write(at as u64, &mut data).unwrap();
                    model.set(at, content);
                }
                Step::Zero { at, len } => {
                    volume.zero(at as u64, len as u64).unwrap();
                    model.set(at, (0..len).map(|_| 0));
                }
                Step::Read { at, len } => {
                    let mut data = vec![0xee; len];
                    volume.read(at as u64, &mut data).unwrap();
                    prop_assert!(data == model.bytes[at..at + len]);
                }
                Step::Sync => {
                    volume.sync().unwrap();
                    model = Model::new(model.bytes);
                }
                Step::PowerCut { kept } => {
                    let holes = store.holes();
                    let mut kept = kept.into_iter().cycle();
                    store = store.cut(|| kept.next().unwrap());
                    volume = Volume::new(store.clone(), &key, SIZE as u64).unwrap();
                    let now = all_of(&volume);
                    for (sector, hole) in holes.into_iter().enumerate() {
                        let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                        // The first write of a hole may be torn: then its rest is no hole any more
                        // but not written either.
                        let torn_hole = hole && model.touched[range.clone()].contains(&true);
                        for at in range {
                            prop_assert!(
                                torn_hole || model.touched[at] || now[at] == model.synced[at],
                                "byte {at} was synced and is lost"
                            );
                        }
                    }
                    model = Model::new(now);
                }
            }
        }
        prop_assert!(all_of(&volume) == model.bytes);
    }

    /// A new volume, with the power cut after each operation and any part of what was pending
    /// lost: it is a whole volume, or none, and then formatting again makes it one.
    #[test]
    fn a_new_volume_is_whole_or_none(
        operations in 0usize..14,
        kept in proptest::collection::vec(any::<bool>(), 1..80),
    ) {
        let template = tempfile::tempfile().unwrap();
        template.set_len(SIZE as u64).unwrap();
        template.write_all_at(&[0x5a; 10_000], 3 * SECTOR_BYTES as u64).unwrap();
        let mut want = vec![0; SIZE];
        template.read_exact_at(&mut want, 0).unwrap();
        let text = grant();
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let open = |store: Store, template: Option<&File>, format| {
            open_or_format(store, None, template, &grant, format, SIZE as u64)
        };

        let store = Store::failing_after(operations);
        let finished = open(store.clone(), Some(&template), true).is_ok();
        let mut kept = kept.into_iter().cycle();
        let store = store.cut(|| kept.next().unwrap());
        match open(store.clone(), None, false) {
            Ok(volume) => prop_assert!(all_of(&volume) == want),
            Err(error) => {
                prop_assert!(!finished, "{error}");
                let none = matches!(error, DiskError::NoHeader | DiskError::Header { .. });
                prop_assert!(none, "{error}");
                let volume = open(store, Some(&template), true).unwrap();
                prop_assert!(all_of(&volume) == want);
            }
        }
    }

    /// An image: begun, written, synced and closed, with the power cut after any operation of either
    /// file. Closed it is whole; before that nothing of it is taken for what it is not.
    #[test]
    fn a_begun_volume_is_whole_once_closed_and_none_before(
        data_operations in 0usize..24,
        tag_operations in 0usize..10,
        synced in any::<bool>(),
        kept in proptest::collection::vec(any::<bool>(), 1..80),
    ) {
        let text = grant();
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let data = Store::failing_after(data_operations);
        let tags = Store::failing_after(tag_operations);
        let want: Vec<u8> = (0..SIZE).map(|i| (i / 700) as u8 + 1).collect();
        let made = || -> Result<(), DiskError> {
            let size = SIZE as u64;
            let volume = format::begin(data.clone(), Some(tags.clone()), &grant, size, |_| Ok(()))?;
            for (at, part) in (0..).step_by(3 * SECTOR_BYTES).zip(want.chunks(3 * SECTOR_BYTES)) {
                volume.write(at as u64, &mut part.to_vec()).map_err(DiskError::io("writing"))?;
                if synced {
                    volume.sync().map_err(DiskError::io("syncing"))?;
                }
            }
            volume.close().map_err(DiskError::io("closing"))
        };
        let closed = made().is_ok();
        let mut kept = kept.into_iter().cycle();
        let [data, tags] = [data, tags].map(|store| store.cut(|| kept.next().unwrap()));
        let text = grant_of(2);
        let grant = Grant::parse(text.as_bytes()).unwrap();
        match format::open(data, Some(tags), &grant, SIZE as u64) {
            Ok(volume) => {
                let mut all = vec![0; SIZE];
                match volume.read(0, &mut all) {
                    Ok(()) => prop_assert!(all == want),
                    // Its superblock came before its tags: what they do not fit is refused.
                    Err(error) => prop_assert!(!closed, "{error}"),
                }
            }
            Err(error) => prop_assert!(!closed, "{error}"),
        }
    }
}

#[test]
fn after_a_failed_sync_nothing_is_promised_any_more() {
    let key = VolumeKey::random();
    let store = Store::failing_after(2);
    let volume = Volume::new(store.clone(), &key, SIZE as u64).unwrap();
    volume.write(0, &mut [1; SECTOR_BYTES]).unwrap();
    assert!(volume.sync().is_err());
    store.0.lock().unwrap().left = None;
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(volume.sync()), Some(libc::EIO));
    assert_eq!(
        errno(volume.write(0, &mut [1; SECTOR_BYTES])),
        Some(libc::EIO)
    );
    assert_eq!(errno(volume.zero(0, 1)), Some(libc::EIO));
    assert!(volume.read(0, &mut [0; 10]).is_ok());
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let key = VolumeKey::random();
    let new = |store: &Store, size| Volume::new(store.clone(), &key, size).map(drop);
    let store = Store::default();
    for size in [
        0,
        1,
        4095,
        u64::MAX,
        u64::MAX / SECTOR_BYTES as u64 * SECTOR_BYTES as u64,
    ] {
        assert!(
            matches!(new(&store, size), Err(DiskError::Size { .. })),
            "{size}"
        );
    }
    new(&store, 8192).unwrap();
    new(&store, 16_384).unwrap();
    assert!(
        matches!(new(&store, 8192), Err(DiskError::Size { .. })),
        "disks don't shrink"
    );
}

#[test]
fn threads_on_one_sector_do_not_undo_each_other() {
    let key = VolumeKey::random();
    let volume = Volume::new(Store::default(), &key, SIZE as u64).unwrap();
    std::thread::scope(|scope| {
        for part in 0..8usize {
            let volume = volume.clone();
            scope.spawn(move || {
                for round in 0..50u8 {
                    let at = (part * 500) as u64;
                    volume.write(at, &mut [round ^ part as u8; 500]).unwrap();
                    let mut back = [0; 500];
                    volume.read(at, &mut back).unwrap();
                    assert_eq!(back, [round ^ part as u8; 500]);
                }
            });
        }
    });
}

fn grant() -> String {
    grant_of(1)
}

/// The grant of the start with that number.
fn grant_of(run: u64) -> String {
    let key = "11".repeat(32);
    format!(
        "{{\"workspace\":\"ws_0123456789abcdef\",\"start_id\":\"st_0123456789abcdef\",\
         \"run\":{run},\"disk_key\":\"{key}\",\"identity_seed\":\"{key}\",\"config_digest\":\"{key}\",\
         \"mint_key\":\"{key}\",\"gateway_key\":\"{key}\",\"edge_key\":\"{key}\"}}"
    )
}
