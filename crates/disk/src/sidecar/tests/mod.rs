//! Two files that lose, with the power, any of what was not synced, and a disk on them.
#![allow(clippy::unwrap_used)]

mod at_rest;
mod attack;
mod crash;
mod replay;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Anchor, Keys, Report, Sidecar};
use crate::DiskError;
use crate::backing::Backing;
use crate::limits::{DATA_OFFSET_BYTES, SECTOR_BYTES};

const PAGE: usize = 4096;

type Page = Arc<[u8; PAGE]>;
type Pages = BTreeMap<u64, Page>;

/// A file in memory with a volatile cache in front. A clone is the same file.
#[derive(Clone)]
struct Store(Arc<Mutex<State>>);

struct State {
    durable: Pages,
    live: Pages,
    length: u64,
    /// What a device writes whole, bytes.
    unit: usize,
    /// In order; `None`: a hole of a page.
    pending: Vec<(u64, Option<Vec<u8>>)>,
    power: Power,
    read_only: bool,
}

/// Operations that still succeed, of all files of a machine.
#[derive(Clone, Default)]
struct Power(Arc<Mutex<Option<usize>>>);

impl Power {
    fn lasts(&self, operations: Option<usize>) {
        *self.0.lock().unwrap() = operations;
    }

    fn take(&self) -> io::Result<()> {
        match &mut *self.0.lock().unwrap() {
            Some(0) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Store {
    fn new(unit: usize, power: &Power) -> Self {
        Self::of(Pages::new(), 0, unit, power)
    }

    fn of(pages: Pages, length: u64, unit: usize, power: &Power) -> Self {
        Self(Arc::new(Mutex::new(State {
            durable: pages.clone(),
            live: pages,
            length,
            unit,
            pending: Vec::new(),
            power: power.clone(),
            read_only: false,
        })))
    }

    /// What is on the platter after the power went.
    fn cut(&self, mut kept: impl FnMut() -> bool) -> Self {
        let state = self.state();
        let mut pages = state.durable.clone();
        for (at, data) in &state.pending {
            if kept() {
                change(&mut pages, *at, data.as_deref());
            }
        }
        Self::of(pages, state.length, state.unit, &state.power)
    }

    /// A copy of what a reader sees.
    fn copy(&self) -> Self {
        let state = self.state();
        Self::of(state.live.clone(), state.length, state.unit, &state.power)
    }

    /// The same, as a descriptor sees it that was opened for reading.
    fn to_read(&self) -> Self {
        let copy = self.copy();
        copy.state().read_only = true;
        copy
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        if state.read_only {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        state.power.take()?;
        Ok(state)
    }
}

fn change(pages: &mut Pages, at: u64, data: Option<&[u8]>) {
    let (page, from) = (at / PAGE as u64, (at % PAGE as u64) as usize);
    match data {
        None => drop(pages.remove(&page)),
        Some(data) => {
            let page = pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[from..from + data.len()].copy_from_slice(data);
        }
    }
}

impl Backing for Store {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        let mut at = offset;
        let mut buf = buf;
        while !buf.is_empty() {
            let from = (at % PAGE as u64) as usize;
            let n = buf.len().min(PAGE - from);
            let (now, rest) = buf.split_at_mut(n);
            match state.live.get(&(at / PAGE as u64)) {
                Some(page) => now.copy_from_slice(&page[from..from + n]),
                None => now.fill(0),
            }
            (at, buf) = (at + n as u64, rest);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut state = self.powered()?;
        let unit = state.unit;
        assert!(offset.is_multiple_of(unit as u64) && buf.len().is_multiple_of(unit));
        for (index, data) in buf.chunks(unit).enumerate() {
            let at = offset + (index * unit) as u64;
            change(&mut state.live, at, Some(data));
            state.pending.push((at, Some(data.to_vec())));
        }
        state.length = state.length.max(offset + buf.len() as u64);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.powered()?;
        assert!(offset.is_multiple_of(PAGE as u64) && len.is_multiple_of(PAGE as u64));
        for at in (offset..offset + len).step_by(PAGE) {
            if state.live.remove(&(at / PAGE as u64)).is_some() {
                state.pending.push((at, None));
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.powered()?;
        state.durable = state.live.clone();
        state.pending.clear();
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.state().length)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.powered()?;
        state.live.retain(|page, _| page * (PAGE as u64) < len);
        state.durable.retain(|page, _| page * (PAGE as u64) < len);
        state.length = len;
        Ok(())
    }
}

/// Repeatable choices.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.roll() >> 11) % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn sector(&mut self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        for chunk in bytes.chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.roll().to_le_bytes());
        }
        bytes
    }
}

/// Data file and sidecar on one machine.
#[derive(Clone)]
struct Machine {
    data: Store,
    tags: Store,
    power: Power,
}

impl Machine {
    fn new(sectors: u64) -> Self {
        let power = Power::default();
        let (data, tags) = (Store::new(SECTOR_BYTES, &power), Store::new(512, &power));
        data.set_len(DATA_OFFSET_BYTES + sectors * SECTOR_BYTES as u64)
            .unwrap();
        data.write_at(0, &[0x11; 32 << 10]).unwrap(); // Stands for the header.
        Self { data, tags, power }
    }

    fn copy(&self) -> Self {
        Self {
            data: self.data.copy(),
            tags: self.tags.copy(),
            power: self.power.clone(),
        }
    }

    fn cut(&self, dice: &mut Dice) -> Self {
        // All, none, or any part of what was pending.
        let kept = |mode: u64, dice: &mut Dice| match mode {
            0 => true,
            1 => false,
            _ => dice.one_in(2),
        };
        let (a, b) = (dice.below(4), dice.below(4));
        self.power.lasts(None);
        Self {
            data: self.data.cut(|| kept(a, dice)),
            tags: self.tags.cut(|| kept(b, dice)),
            power: self.power.clone(),
        }
    }

    fn create(&self, sectors: u64, run: u64) -> Sidecar<Store> {
        let mut sidecar = Sidecar::create(self.tags.clone(), keys(), sectors, run).unwrap();
        small(&mut sidecar);
        sidecar
    }

    fn open(
        &self,
        sectors: u64,
        run: u64,
        anchor: Option<&Anchor>,
    ) -> Result<Sidecar<Store>, DiskError> {
        let mut sidecar =
            Sidecar::open(self.tags.clone(), &self.data, keys(), sectors, run, anchor)?;
        small(&mut sidecar);
        Ok(sidecar)
    }
}

/// Bounds that a short test reaches.
fn small(sidecar: &mut Sidecar<Store>) {
    sidecar.buffer_sectors = 24;
    sidecar.changes_max = 150;
}

fn keys() -> Keys {
    Keys::derive(&[0x42; 32]).unwrap()
}

fn anchor(report: &Report) -> Anchor {
    Anchor {
        generation: report.generation,
        root: report.root,
    }
}

fn write(
    sidecar: &Sidecar<Store>,
    data: &Store,
    first: u64,
    sectors: &[[u8; SECTOR_BYTES]],
) -> io::Result<()> {
    sidecar.write(data, first, sectors.as_flattened())
}

fn read(sidecar: &Sidecar<Store>, data: &Store, sector: u64) -> io::Result<[u8; SECTOR_BYTES]> {
    let mut out = [0xee; SECTOR_BYTES];
    sidecar.read(data, sector, &mut out).map(|()| out)
}
