//! The offline verifier: recomputes a whole log from its entries.
//!
//! It trusts one thing, the log's public key (and those of witnesses), and recomputes all else:
//! every leaf hash from the entry bundles, every tile from the leaf hashes, the root from the
//! tiles. It then reads what the entries say: accounts' sequence numbers without gaps, times that
//! do not run backwards, the right class and day.
//!
//! When the root does not come out, it tries again from the stored leaf hashes, so as to say
//! whether the entries or the hashes were changed.
//!
//! Must never do IO (it reads through [`LogReader`]), stop at the first fault, or report a log
//! clean that it could not read in full.

use crate::checkpoint::{Checkpoint, CheckpointError, Opened};
use crate::class::Class;
use crate::grow::Edge;
use crate::leaf::{ACCOUNT_SEQ_FIRST, Leaf, day_of};
use crate::limits::{FAULTS_MAX, HASH_BYTES, TILE_LEVEL_MAX, TILE_WIDTH, TIME_BACKSTEP_MAX_MS};
use crate::merkle::{Hash, ReadError, leaf_hash};
use crate::note::{NoteError, Signed, Verifier};
use crate::tile::{Kind, Tile, TileError, TileSource, hashes_encode};
use seal::sign::VerifyingKey;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// Path of the checkpoint below a log's directory.
pub const CHECKPOINT_PATH: &str = "checkpoint";

/// Gives the files of a log directory, or of a copy of one.
pub trait LogReader {
    /// The bytes of the file at `path`, relative to the log's directory; `None` when there is no
    /// such file or it can't be read.
    fn read(&self, path: &str) -> Option<Vec<u8>>;

    /// The paths of all files below `tile/`, relative to the log's directory.
    fn list(&self) -> Vec<String>;
}

/// What the log is expected to be.
#[derive(Clone, Debug)]
pub struct Expected<'a> {
    /// The log's origin.
    pub origin: &'a str,
    /// The class of its entries.
    pub class: Class,
    /// The log's public key.
    pub log_key: &'a VerifyingKey,
    /// Witnesses whose cosignatures count.
    pub witnesses: &'a [Verifier],
    /// How many of them must have cosigned.
    pub witnesses_min: usize,
    /// Checkpoints of this log seen earlier and trusted: the log must still contain them.
    pub known: &'a [Checkpoint],
}

/// What verification found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The log's statement; `None` when it could not be opened, and nothing else was checked then.
    pub checkpoint: Option<Checkpoint>,
    /// The witnesses that cosigned it.
    pub cosignatures: Vec<Signed>,
    /// How many entries were read and checked.
    pub entries: u64,
    /// How many tiles of hashes were recomputed and compared.
    pub tiles: u64,
    /// How many accounts have entries.
    pub accounts: u64,
    /// Time of the first entry read, milliseconds since the epoch.
    pub first_time_ms: Option<u64>,
    /// Latest time of any entry read, milliseconds since the epoch.
    pub last_time_ms: Option<u64>,
    /// The first [`FAULTS_MAX`] faults.
    pub faults: Vec<Fault>,
    /// How many faults there are; verification ends early beyond [`FAULTS_MAX`].
    pub faults_total: usize,
    /// What is no fault but should be known.
    pub notices: Vec<Fault>,
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of fault.
    pub kind: FaultKind,
    /// The file it shows in.
    pub path: String,
    /// The entry it concerns, if it concerns one.
    pub entry: Option<u64>,
    /// What was found, in words.
    pub detail: String,
}

/// The kinds of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultKind {
    /// A file that must be there is absent or unreadable.
    Missing,
    /// A file ends before its content does.
    Truncate,
    /// A file goes on after its content.
    Excess,
    /// Bytes are not those that the log once held.
    Flip,
    /// The checkpoint is malformed or another log's.
    BadCheckpoint,
    /// The log's or a trusted witness's signature is wrong or absent.
    BadSignature,
    /// Fewer trusted witnesses cosigned than required.
    TooFewWitnesses,
    /// The entries and tiles lead to another root than the checkpoint's.
    BadRoot,
    /// A checkpoint seen earlier is not in this log: its past was rewritten.
    Fork,
    /// The log is smaller than a checkpoint seen earlier.
    Rollback,
    /// An entry is no leaf that this release can read.
    BadLeaf,
    /// An entry belongs to another class's log.
    WrongClass,
    /// An account's sequence numbers skip: entries were omitted.
    SeqGap,
    /// An account's sequence numbers repeat or run backwards.
    SeqRepeat,
    /// Time runs backwards by more than the tolerance.
    TimeBack,
    /// An entry is sealed under the key of another day than its own.
    DayOff,
    /// A file that no log has.
    Unexpected,
    /// A file that should have been pruned.
    NotPruned,
    /// Notice: a file beyond the checkpoint. The log was copied while it grew, or the checkpoint
    /// was set back.
    Ahead,
    /// Notice: an earlier checkpoint lies in the pruned part and can't be compared.
    Unchecked,
}

/// Verifies the log behind `reader` in full.
pub fn verify(reader: &impl LogReader, expected: &Expected<'_>) -> Report {
    let mut run = Run {
        reader,
        expected,
        report: Report::default(),
    };
    if let Some(checkpoint) = run.checkpoint_check() {
        run.tree_check(&checkpoint);
        run.files_check(&checkpoint);
        run.report.checkpoint = Some(checkpoint);
    }
    run.report
}

impl Report {
    /// Whether the checkpoint was opened and nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.checkpoint.is_some() && self.faults_total == 0
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.kind, self.path)?;
        if let Some(entry) = self.entry {
            write!(f, ", entry {entry}")?;
        }
        write!(f, ": {}", self.detail)
    }
}

/// One verification under way.
struct Run<'a, R> {
    reader: &'a R,
    expected: &'a Expected<'a>,
    report: Report,
}

/// What the entries read so far say.
#[derive(Default)]
struct Story {
    /// The next sequence number of each account.
    next_seq: HashMap<[u8; 32], u64>,
    /// Whether all entries from the log's first on were read.
    unbroken: bool,
    /// The latest time so far.
    latest_ms: u64,
}

/// Where leaf hashes are taken from.
#[derive(Clone, Copy, PartialEq)]
enum Leaves {
    /// Recomputed from the entry bundles.
    Entries,
    /// Read from the stored tiles of level 0.
    Tiles,
}

/// What one pass over the tree came to.
#[derive(Default)]
struct Pass {
    /// The root; `None` when a part was unreadable.
    root: Option<Hash>,
    tiles: u64,
    faults: Vec<Fault>,
}

impl<R: LogReader> Run<'_, R> {
    fn fault(&mut self, fault: Fault) {
        self.report.faults_total += 1;
        if self.report.faults.len() < FAULTS_MAX {
            self.report.faults.push(fault);
        }
    }

    fn is_hopeless(&self) -> bool {
        self.report.faults_total >= FAULTS_MAX
    }

    fn checkpoint_check(&mut self) -> Option<Checkpoint> {
        let fault = |kind, detail: String| Fault {
            kind,
            path: CHECKPOINT_PATH.into(),
            entry: None,
            detail,
        };
        let Some(bytes) = self.reader.read(CHECKPOINT_PATH) else {
            self.fault(fault(
                FaultKind::Missing,
                "the log has no readable checkpoint".into(),
            ));
            return None;
        };
        let Expected {
            origin,
            log_key,
            witnesses,
            ..
        } = *self.expected;
        let Opened {
            checkpoint,
            cosignatures,
        } = match Checkpoint::open(&bytes, origin, log_key, witnesses) {
            Ok(opened) => opened,
            Err(error) => {
                use NoteError::{BadSignature, NoTrustedSignature};
                let kind = match &error {
                    CheckpointError::Note(BadSignature(_) | NoTrustedSignature) => {
                        FaultKind::BadSignature
                    }
                    _ => FaultKind::BadCheckpoint,
                };
                self.fault(fault(kind, error.to_string()));
                return None;
            }
        };
        if cosignatures.len() < self.expected.witnesses_min {
            let detail = format!(
                "{} trusted witnesses cosigned, {} must have",
                cosignatures.len(),
                self.expected.witnesses_min
            );
            self.fault(fault(FaultKind::TooFewWitnesses, detail));
        }
        for known in self
            .expected
            .known
            .iter()
            .filter(|k| k.origin == checkpoint.origin)
        {
            if known.size > checkpoint.size {
                let detail = format!(
                    "{} entries, but it once had {}",
                    checkpoint.size, known.size
                );
                self.fault(fault(FaultKind::Rollback, detail));
            }
            if known.min_index > checkpoint.min_index {
                let detail = "the minimum index was set back".to_string();
                self.fault(fault(FaultKind::Rollback, detail));
            }
        }
        self.report.cosignatures = cosignatures;
        Some(checkpoint)
    }

    /// Reads every retained entry, recomputes every retained tile and the root.
    fn tree_check(&mut self, checkpoint: &Checkpoint) {
        self.entries_check(checkpoint);
        if self.is_hopeless() {
            return;
        }
        let from_entries = self.pass(checkpoint, Leaves::Entries);
        self.report.tiles = from_entries.tiles;
        if from_entries.root == Some(checkpoint.root) {
            from_entries.faults.into_iter().for_each(|f| self.fault(f));
            self.known_check(checkpoint, Leaves::Entries);
            return;
        }
        // The entries are not what was signed. Are the stored leaf hashes?
        let from_tiles = self.pass(checkpoint, Leaves::Tiles);
        if from_tiles.root == Some(checkpoint.root) {
            from_tiles.faults.into_iter().for_each(|f| self.fault(f));
            self.entries_against_tiles(checkpoint);
            self.known_check(checkpoint, Leaves::Tiles);
            return;
        }
        from_entries.faults.into_iter().for_each(|f| self.fault(f));
        let detail = match from_entries.root {
            Some(root) => format!(
                "the entries lead to root {}, the checkpoint says {}",
                hex::encode(root),
                hex::encode(checkpoint.root)
            ),
            None => "parts are unreadable, the root could not be recomputed".into(),
        };
        let path = CHECKPOINT_PATH.into();
        self.fault(Fault {
            kind: FaultKind::BadRoot,
            path,
            entry: None,
            detail,
        });
    }

    /// Reads the bundles: are they whole, and what do the entries say?
    fn entries_check(&mut self, checkpoint: &Checkpoint) {
        let mut story = Story {
            unbroken: checkpoint.min_index == 0,
            ..Story::default()
        };
        for bundle in bundles(checkpoint) {
            if self.is_hopeless() {
                return;
            }
            let path = bundle.path();
            let Some(bytes) = self.reader.read(&path) else {
                let detail = "the bundle is not there or can't be read".into();
                self.fault(Fault {
                    kind: FaultKind::Missing,
                    path,
                    entry: None,
                    detail,
                });
                story.interrupt();
                continue;
            };
            match bundle.bundle_decode(&bytes) {
                Ok(entries) => {
                    for (index, entry) in (bundle.start_index()..).zip(entries) {
                        self.entry_check(&path, index, entry, &mut story);
                    }
                }
                Err(error) => {
                    self.fault(Fault {
                        kind: decode_fault(&error, bundle),
                        path,
                        entry: None,
                        detail: error.to_string(),
                    });
                    story.interrupt();
                }
            }
        }
        self.report.accounts = story.next_seq.len() as u64;
        self.report.last_time_ms = self.report.first_time_ms.map(|_| story.latest_ms);
    }

    fn entry_check(&mut self, path: &str, index: u64, entry: &[u8], story: &mut Story) {
        self.report.entries += 1;
        let fault = |kind, detail: String| Fault {
            kind,
            path: path.to_string(),
            entry: Some(index),
            detail,
        };
        let leaf = match Leaf::decode(entry) {
            Ok(leaf) => leaf,
            Err(error) => return self.fault(fault(FaultKind::BadLeaf, error.to_string())),
        };
        if leaf.class != self.expected.class {
            let detail = format!("it is of class {}", leaf.class);
            self.fault(fault(FaultKind::WrongClass, detail));
        }
        let first_seen = story.unbroken.then_some(ACCOUNT_SEQ_FIRST);
        let next = story
            .next_seq
            .get(&leaf.account_tag)
            .copied()
            .or(first_seen);
        if let Some(next) = next.filter(|next| *next != leaf.account_seq) {
            let tag = hex::encode(&leaf.account_tag[..8]);
            let kind = if leaf.account_seq > next {
                FaultKind::SeqGap
            } else {
                FaultKind::SeqRepeat
            };
            let detail = format!(
                "account {tag}…: number {} follows, not {next}",
                leaf.account_seq
            );
            self.fault(fault(kind, detail));
        }
        story
            .next_seq
            .insert(leaf.account_tag, leaf.account_seq.saturating_add(1));
        if leaf.time_ms.saturating_add(TIME_BACKSTEP_MAX_MS) < story.latest_ms {
            let back = story.latest_ms - leaf.time_ms;
            self.fault(fault(
                FaultKind::TimeBack,
                format!("{back} ms before an earlier entry"),
            ));
        }
        if leaf.day.abs_diff(day_of(leaf.time_ms)) > 1 {
            let detail = format!("day {} at a time of day {}", leaf.day, day_of(leaf.time_ms));
            self.fault(fault(FaultKind::DayOff, detail));
        }
        story.latest_ms = story.latest_ms.max(leaf.time_ms);
        self.report.first_time_ms.get_or_insert(leaf.time_ms);
    }

    /// Recomputes all retained tiles and the root from `leaves`, and compares the stored tiles.
    fn pass(&self, checkpoint: &Checkpoint, leaves: Leaves) -> Pass {
        let mut pass = Pass::default();
        let mut edge = match self.edge_first(checkpoint) {
            Ok(edge) => edge,
            Err(error) => {
                pass.faults.push(Fault {
                    kind: FaultKind::Missing,
                    path: error.subject.clone(),
                    entry: None,
                    detail: format!("the pruned part's hashes can't be read: {}", error.reason),
                });
                return pass;
            }
        };
        for bundle in bundles(checkpoint) {
            let Some(hashes) = self.leaf_hashes(bundle, leaves) else {
                return pass; // Reported by entries_check, or below as a tile that is missing.
            };
            for hash in hashes {
                edge.append(hash, |tile, hashes| {
                    self.tile_compare(tile, hashes, &mut pass)
                });
            }
            if pass.faults.len() >= FAULTS_MAX {
                return pass;
            }
        }
        for level in 0..=TILE_LEVEL_MAX {
            if let Some((tile, hashes)) = edge.partial(level) {
                self.tile_compare(tile, hashes, &mut pass);
            }
        }
        assert_eq!(
            edge.size(),
            checkpoint.size,
            "the bundles add up to the tree"
        );
        pass.root = Some(edge.root());
        pass
    }

    /// The edge before the first retained bundle: the only hashes that are not recomputed. They
    /// are bound by the root, like all others.
    fn edge_first(&self, checkpoint: &Checkpoint) -> Result<Edge, ReadError> {
        let first = checkpoint.min_index / u64::from(TILE_WIDTH) * u64::from(TILE_WIDTH);
        Edge::load(first, checkpoint.size, &Stored(self.reader))
    }

    /// The leaf hashes below one bundle. Of a bundle that can't be read, the stored ones do: its
    /// fault is known, and the rest of the tree can still be checked.
    fn leaf_hashes(&self, bundle: Tile, leaves: Leaves) -> Option<Vec<Hash>> {
        if leaves == Leaves::Entries
            && let Some(bytes) = self.reader.read(&bundle.path())
            && let Ok(entries) = bundle.bundle_decode(&bytes)
        {
            return Some(entries.into_iter().map(leaf_hash).collect());
        }
        let tile = Tile::new(Kind::Hashes(0), bundle.index(), bundle.width())
            .expect("a tile has the coordinates of the bundle below it");
        tile.hashes_decode(&self.reader.read(&tile.path())?).ok()
    }

    fn tile_compare(&self, tile: Tile, hashes: &[Hash], pass: &mut Pass) {
        pass.tiles += 1;
        let path = tile.path();
        let mut fault = |kind, entry, detail: &str| {
            pass.faults.push(Fault {
                kind,
                path: path.clone(),
                entry,
                detail: detail.into(),
            });
        };
        let Some(stored) = self.reader.read(&path) else {
            return fault(
                FaultKind::Missing,
                None,
                "the tile is not there or can't be read",
            );
        };
        let expected = hashes_encode(hashes);
        if stored.len() < expected.len() {
            fault(FaultKind::Truncate, None, "the tile has too few bytes");
        } else if stored.len() > expected.len() {
            fault(FaultKind::Excess, None, "the tile has too many bytes");
        } else if let Some(at) = stored.iter().zip(&expected).position(|(a, b)| a != b) {
            let first = tile.index() * u64::from(TILE_WIDTH) + (at / HASH_BYTES) as u64;
            let entry = matches!(tile.kind(), Kind::Hashes(0)).then_some(first);
            fault(
                FaultKind::Flip,
                entry,
                "a hash is not that of what lies below it",
            );
        }
    }

    /// The tiles are what was signed, the entries are not: says which.
    fn entries_against_tiles(&mut self, checkpoint: &Checkpoint) {
        for bundle in bundles(checkpoint) {
            let entries = self.leaf_hashes(bundle, Leaves::Entries);
            let tiles = self.leaf_hashes(bundle, Leaves::Tiles);
            let (Some(entries), Some(tiles)) = (entries, tiles) else {
                continue;
            };
            for (i, (entry, tile)) in entries.iter().zip(&tiles).enumerate() {
                if entry != tile {
                    self.fault(Fault {
                        kind: FaultKind::Flip,
                        path: bundle.path(),
                        entry: Some(bundle.start_index() + i as u64),
                        detail: "the entry is not the one that was logged".into(),
                    });
                }
            }
        }
    }

    /// Do earlier checkpoints still stand? Runs on leaves that lead to the signed root.
    fn known_check(&mut self, checkpoint: &Checkpoint, leaves: Leaves) {
        let mut known: BTreeMap<u64, Vec<Hash>> = BTreeMap::new();
        for earlier in self
            .expected
            .known
            .iter()
            .filter(|k| k.origin == checkpoint.origin)
        {
            known.entry(earlier.size).or_default().push(earlier.root);
        }
        known.retain(|size, _| *size <= checkpoint.size);
        if known.is_empty() {
            return;
        }
        let Ok(mut edge) = self.edge_first(checkpoint) else {
            return;
        };
        let first = edge.size();
        for size in known.keys().filter(|size| **size < first) {
            self.report.notices.push(Fault {
                kind: FaultKind::Unchecked,
                path: CHECKPOINT_PATH.into(),
                entry: None,
                detail: format!("the checkpoint of size {size} lies in the pruned part"),
            });
        }
        let mut faults = Vec::new();
        let mut compare = |edge: &Edge| {
            let roots = known
                .get(&edge.size())
                .map(Vec::as_slice)
                .unwrap_or_default();
            if roots.iter().any(|root| *root != edge.root()) {
                faults.push(Fault {
                    kind: FaultKind::Fork,
                    path: CHECKPOINT_PATH.into(),
                    entry: None,
                    detail: format!("the root at size {} was another one", edge.size()),
                });
            }
        };
        compare(&edge);
        for bundle in bundles(checkpoint) {
            for hash in self.leaf_hashes(bundle, leaves).unwrap_or_default() {
                edge.append(hash, |_, _| {});
                compare(&edge);
            }
        }
        faults.into_iter().for_each(|f| self.fault(f));
    }

    /// Are there files that no log of this size and minimum index has?
    fn files_check(&mut self, checkpoint: &Checkpoint) {
        for path in self.reader.list() {
            if self.is_hopeless() {
                return;
            }
            let fault = |kind, detail: &str| Fault {
                kind,
                path: path.clone(),
                entry: None,
                detail: detail.into(),
            };
            let Ok(tile) = Tile::parse(&path) else {
                self.fault(fault(FaultKind::Unexpected, "no tile has such a path"));
                continue;
            };
            if tile.end_index() <= checkpoint.min_index {
                self.fault(fault(
                    FaultKind::NotPruned,
                    "it ends below the minimum index",
                ));
                continue;
            }
            match Tile::at(tile.kind(), tile.index(), checkpoint.size) {
                Some(current) if current == tile => {} // Compared already.
                Some(current) if tile.width() < current.width() => {
                    if let Some(detail) = self.stale_check(tile, current) {
                        self.fault(fault(FaultKind::Flip, detail));
                    }
                }
                _ => {
                    let notice = fault(FaultKind::Ahead, "it goes beyond the checkpoint");
                    if self.report.notices.len() < FAULTS_MAX {
                        self.report.notices.push(notice);
                    }
                }
            }
        }
    }

    /// A partial tile of an earlier, smaller tree must be the beginning of the current one.
    fn stale_check(&self, stale: Tile, current: Tile) -> Option<&'static str> {
        let now = self.reader.read(&current.path())?;
        let Some(then) = self.reader.read(&stale.path()) else {
            return Some("it can't be read");
        };
        let whole = match stale.kind() {
            Kind::Entries => stale.bundle_decode(&then).is_ok(),
            Kind::Hashes(_) => stale.hashes_decode(&then).is_ok(),
        };
        (!whole || !now.starts_with(&then)).then_some("it is not the beginning of the current tile")
    }
}

impl Story {
    /// Some entries could not be read: what follows can't be compared with what went before.
    fn interrupt(&mut self) {
        self.next_seq.clear();
        self.unbroken = false;
    }
}

/// Tiles through the verifier's reader.
struct Stored<'a, R>(&'a R);

impl<R: LogReader> TileSource for Stored<'_, R> {
    fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.0.read(&tile.path()))
    }
}

/// The bundles that a log with this checkpoint must have.
fn bundles(checkpoint: &Checkpoint) -> impl Iterator<Item = Tile> + use<> {
    let first = checkpoint.min_index / u64::from(TILE_WIDTH);
    let end = checkpoint.size.div_ceil(u64::from(TILE_WIDTH));
    let size = checkpoint.size;
    (first..end).filter_map(move |index| Tile::at(Kind::Entries, index, size))
}

fn decode_fault(error: &TileError, bundle: Tile) -> FaultKind {
    match error {
        TileError::Bundle { entry, .. } if *entry >= usize::from(bundle.width()) => {
            FaultKind::Excess
        }
        _ => FaultKind::Truncate,
    }
}

#[cfg(test)]
mod tests;
