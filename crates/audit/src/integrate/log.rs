//! One class's tree: from durable segments to tiles and a signed checkpoint.
//!
//! ```text
//!  segments ──▶ grow ──▶ files: temp, fsync; rename ──▶ read back ──▶ follows from the last one?
//!                                                                              │ sign
//!  answer ◀── fsync directory ◀── rename checkpoint ◀── fsync directories, checkpoint's temp
//! ```
//!
//! What is synced in one step is synced at once: a receipt costs about four journal commits, that of
//! the batch among them.
//!
//! Killed anywhere, it computes the same again from the segments and the last checkpoint.

use super::tiles::Tiles;
use crate::disk::Disk;
use crate::limits::{CYCLE_ENTRIES_MAX, NAMED_MAX};
use crate::segment::{self, Next, SegmentError, Start};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use seal::sign::SigningKey;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::grow::{Grower, TileFile};
use tlog::leaf::Leaf;
use tlog::limits::NOTE_BYTES_MAX;
use tlog::merkle::{consistency_proof, consistency_verify, inclusion_proof};
use tlog::tile::TileHashes;
use tlog::verify::CHECKPOINT_PATH;

/// Where a log is, and what signs it.
pub struct Source {
    /// The disk.
    pub disk: Disk,
    /// The log's directory.
    pub dir: PathBuf,
    /// The directory of the class's segments.
    pub segments: PathBuf,
    /// The class.
    pub class: Class,
    /// The installation's name.
    pub installation: String,
    /// The log's key.
    pub key: SigningKey,
}

/// What an integration came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Integrated {
    /// How many entries are in the tree, durably.
    pub size: u64,
    /// The checkpoint over them, a signed note.
    pub checkpoint: String,
    /// The audit path of each entry asked for, in order; each hash in base64.
    pub proofs: Vec<Vec<String>>,
}

/// Why a log can't be opened or grown.
#[derive(Debug, thiserror::Error)]
pub enum IntegrateError {
    /// The file system failed.
    #[error("log {class}: {what} {path}: {source}")]
    Io {
        /// The log.
        class: Class,
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The log on disk is not what it should be.
    #[error(
        "log {class}: {what}; nothing more is signed. Run `casemate audit verify`, and restore the log from a backup"
    )]
    Damaged {
        /// The log.
        class: Class,
        /// What is wrong.
        what: String,
    },
    /// A segment is not what was written.
    #[error("log {class}: {path}: {source}")]
    Segment {
        /// The log.
        class: Class,
        /// The segment.
        path: PathBuf,
        /// What is wrong.
        source: SegmentError,
    },
}

/// A log, open for growing.
pub struct Log {
    source: Source,
    grower: Grower,
    checkpoint: Checkpoint,
    note: String,
    /// Where in the segments the next entry is, once found.
    at: Option<Cursor>,
    /// Directories whose own names are known to be durable.
    named: BTreeSet<PathBuf>,
}

#[derive(Clone)]
struct Cursor {
    path: PathBuf,
    offset: u64,
    index: u64,
}

/// Makes the directory and the empty checkpoint of a log that never had an entry.
///
/// # Errors
/// The file system's, or a name that no origin can have.
pub fn create(
    disk: &Disk,
    dir: &Path,
    class: Class,
    installation: &str,
    key: &SigningKey,
) -> anyhow::Result<()> {
    disk.dir_create(dir)?;
    disk.dir_sync(dir.parent().unwrap_or(dir))?;
    disk.dir_create(&dir.join("tmp"))?;
    disk.dir_sync(dir)?;
    let checkpoint = Checkpoint::new(&class.origin(installation)?, 0, tlog::merkle::empty_root());
    let temp = dir.join("tmp").join(CHECKPOINT_PATH);
    disk.file_write(&temp, checkpoint.sign(key)?.encode().as_bytes())?;
    disk.rename(&temp, &dir.join(CHECKPOINT_PATH))?;
    disk.dir_sync(dir)?;
    Ok(())
}

impl Log {
    /// Opens the log and checks that its files lead to its last checkpoint.
    ///
    /// # Errors
    /// [`IntegrateError::Damaged`] when they do not, or there is no checkpoint.
    pub fn open(source: Source) -> Result<Log, IntegrateError> {
        let class = source.class;
        let damaged = |what: String| IntegrateError::Damaged { class, what };
        let path = source.dir.join(CHECKPOINT_PATH);
        let bytes = service::files::read_bounded(&path, NOTE_BYTES_MAX as u64)
            .map_err(|e| damaged(format!("{} can't be read: {e}", path.display())))?;
        let origin = class
            .origin(&source.installation)
            .map_err(|e| damaged(e.to_string()))?;
        let checkpoint = Checkpoint::open(&bytes, &origin, &source.key.public(), &[])
            .map_err(|e| damaged(e.to_string()))?
            .checkpoint;
        let grower = Grower::load(checkpoint.size, &Tiles::new(&source.dir))
            .map_err(|e| damaged(e.to_string()))?;
        if grower.root() != checkpoint.root {
            return Err(damaged(
                "its tiles lead to another root than its checkpoint's".into(),
            ));
        }
        let note = String::from_utf8(bytes).map_err(|e| damaged(e.to_string()))?;
        Ok(Log {
            source,
            grower,
            checkpoint,
            note,
            at: None,
            named: BTreeSet::new(),
        })
    }

    /// How many entries are in the tree.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.checkpoint.size
    }

    /// Integrates all entries below `size`, which are durable, and proves those at `receipts`.
    ///
    /// # Errors
    /// [`IntegrateError`]; the log is as its last checkpoint says, and may be asked again.
    pub fn integrate(&mut self, size: u64, receipts: &[u64]) -> Result<Integrated, IntegrateError> {
        while self.size() < size {
            if let Err(e) = self.cycle(size) {
                // In memory it may have grown further than on disk.
                let files = Tiles::new(&self.source.dir);
                if let Ok(grower) = Grower::load(self.size(), &files) {
                    self.grower = grower;
                }
                self.at = None;
                return Err(e);
            }
        }
        let files = Tiles::new(&self.source.dir);
        let nodes = TileHashes::new(&files, self.size());
        let proofs = receipts
            .iter()
            .map(|index| {
                let proof = inclusion_proof(*index, self.size(), &nodes)
                    .map_err(|e| self.damaged(e.to_string()))?;
                Ok(proof.iter().map(|hash| STANDARD.encode(hash)).collect())
            })
            .collect::<Result<_, IntegrateError>>()?;
        Ok(Integrated {
            size: self.size(),
            checkpoint: self.note.clone(),
            proofs,
        })
    }

    /// Takes in some entries and publishes the checkpoint over them.
    fn cycle(&mut self, size: u64) -> Result<(), IntegrateError> {
        if self.grower.size() != self.size() {
            return Err(self.damaged("it could not be read again after an error".into()));
        }
        self.read(size)?;
        let files = self.grower.take();
        let dir = self.source.dir.clone();
        let dirs = self
            .write(&files)
            .map_err(|(path, e)| self.io("write", &path, e))?;
        let stored = Tiles::new(&dir);
        for file in &files {
            let read = tlog::tile::TileSource::tile(&stored, &file.tile);
            if read.ok().flatten().as_ref() != Some(&file.bytes) {
                return Err(self.damaged(format!("{} reads back differently", file.tile)));
            }
        }
        let next = Checkpoint {
            size: self.grower.size(),
            root: self.grower.root(),
            ..self.checkpoint.clone()
        };
        let follows =
            consistency_proof(self.size(), next.size, &TileHashes::new(&stored, next.size))
                .map_err(|e| e.to_string())
                .and_then(|proof| {
                    let (old, new) = (&self.checkpoint, &next);
                    consistency_verify(old.size, new.size, &old.root, &new.root, &proof)
                        .map_err(|e| e.to_string())
                });
        follows.map_err(|e| {
            self.damaged(format!(
                "the new tree does not follow from the last one: {e}"
            ))
        })?;
        let note = next
            .sign(&self.source.key)
            .map_err(|e| self.damaged(e.to_string()))?
            .encode();
        self.publish(dirs, &note)
            .map_err(|(path, e)| self.io("publish", &path, e))?;
        self.checkpoint = next;
        self.note = note;
        remove_partial(&dir, &files);
        Ok(())
    }

    /// Adds entries of the segments to the tree in memory: whole batches, to `size` at most.
    fn read(&mut self, size: u64) -> Result<(), IntegrateError> {
        let class = self.source.class;
        let end = size.min(self.size() + CYCLE_ENTRIES_MAX);
        let mut at = match self.at.take() {
            Some(at) => at,
            None => self.find()?,
        };
        while self.grower.size() < end {
            let bytes = match segment::read_from(&at.path, at.offset) {
                // Append forgets a segment once all of it is integrated, and a next one is there.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    at = self.next_segment(&at)?;
                    continue;
                }
                bytes => bytes.map_err(|e| self.io("read", &at.path, e))?,
            };
            let mut rest = bytes.as_slice();
            while self.grower.size() < end {
                let fail = |source| IntegrateError::Segment {
                    class,
                    path: at.path.clone(),
                    source,
                };
                let Next::Batch(batch) = segment::next(class, at.index, rest).map_err(fail)? else {
                    break; // What is torn was not called durable; it is looked at again.
                };
                for (index, leaf) in (batch.first_index..).zip(&batch.leaves) {
                    // After a restart the first batch may be in the tree in part.
                    if index < self.grower.size() {
                        continue;
                    }
                    if !Leaf::decode(leaf).is_ok_and(|l| l.class == class) {
                        return Err(self.damaged(format!(
                            "{}: entry {index} is no entry of this log",
                            at.path.display()
                        )));
                    }
                    self.grower
                        .append(leaf)
                        .map_err(|e| self.damaged(e.to_string()))?;
                }
                at.index += batch.leaves.len() as u64;
                at.offset += batch.bytes as u64;
                rest = &rest[batch.bytes..];
            }
            if self.grower.size() >= end {
                break;
            }
            at = self.next_segment(&at)?;
        }
        self.at = Some(at);
        Ok(())
    }

    /// Where in the segments the entry that comes next is, or would be.
    fn find(&self) -> Result<Cursor, IntegrateError> {
        let dir = &self.source.segments;
        let segments = segment::list(dir).map_err(|e| self.io("list", dir, e))?;
        let (first, path) = segments
            .into_iter()
            .rfind(|(first, _)| *first <= self.size())
            .ok_or_else(|| {
                self.damaged(format!(
                    "the segments begin after entry {}: this log is older than it was",
                    self.size()
                ))
            })?;
        let mut at = self.start(first, path)?;
        let bytes =
            segment::read_from(&at.path, at.offset).map_err(|e| self.io("read", &at.path, e))?;
        let mut rest = bytes.as_slice();
        while at.index < self.size() {
            let class = self.source.class;
            let fail = |source| IntegrateError::Segment {
                class,
                path: at.path.clone(),
                source,
            };
            match segment::next(class, at.index, rest).map_err(fail)? {
                Next::Batch(batch) if at.index + batch.leaves.len() as u64 <= self.size() => {
                    at.index += batch.leaves.len() as u64;
                    at.offset += batch.bytes as u64;
                    rest = &rest[batch.bytes..];
                }
                Next::Batch(_) => break,
                Next::End | Next::Torn => {
                    return Err(self.damaged(format!(
                        "the segments end at entry {}, the published log at {}",
                        at.index,
                        self.size()
                    )));
                }
            }
        }
        Ok(at)
    }

    fn next_segment(&self, at: &Cursor) -> Result<Cursor, IntegrateError> {
        let path = self.source.segments.join(segment::name(at.index));
        if path == at.path || !path.exists() {
            return Err(self.damaged(format!("the segments end at entry {}", at.index)));
        }
        self.start(at.index, path)
    }

    /// The place of a segment's first batch.
    fn start(&self, first: u64, path: PathBuf) -> Result<Cursor, IntegrateError> {
        let class = self.source.class;
        let bytes = segment::read_from(&path, 0).map_err(|e| self.io("read", &path, e))?;
        let (start, offset) =
            Start::decode(class, &bytes).map_err(|source| IntegrateError::Segment {
                class,
                path: path.clone(),
                source,
            })?;
        if start.first_index != first {
            return Err(self.damaged(format!("{}: its name is another one's", path.display())));
        }
        Ok(Cursor {
            path,
            offset: offset as u64,
            index: first,
        })
    }

    /// Writes new files; returns the directories to sync before their names are durable. On an error
    /// also says which file.
    fn write(&self, files: &[TileFile]) -> Result<BTreeSet<PathBuf>, (PathBuf, io::Error)> {
        let Source { disk, dir, .. } = &self.source;
        let mut sync = BTreeSet::new();
        let mut places = Vec::new();
        for (n, file) in files.iter().enumerate() {
            let path = dir.join(file.tile.path());
            let parent = path.parent().unwrap_or(dir).to_owned();
            for dir in self.unnamed(&parent) {
                disk.dir_create(dir).map_err(|e| (dir.to_owned(), e))?;
                sync.extend(dir.parent().map(Path::to_owned));
            }
            sync.insert(parent);
            places.push((dir.join("tmp").join(format!("tile-{n}")), path, &file.bytes));
        }
        disk.each(&places, |(temp, _, bytes)| {
            disk.file_write(temp, bytes).map_err(|e| (temp.clone(), e))
        })?;
        for (temp, path, _) in places {
            disk.rename(&temp, &path).map_err(|e| (path, e))?;
        }
        Ok(sync)
    }

    /// Makes the names of new files durable, and only then replaces the checkpoint.
    fn publish(&mut self, dirs: BTreeSet<PathBuf>, note: &str) -> Result<(), (PathBuf, io::Error)> {
        let Source { disk, dir, .. } = &self.source;
        let temp = dir.join("tmp").join(CHECKPOINT_PATH);
        let paths: Vec<&PathBuf> = dirs.iter().chain([&temp]).collect();
        disk.each(&paths, |path| {
            let synced = if **path == temp {
                disk.file_write(path, note.as_bytes())
            } else {
                disk.dir_sync(path)
            };
            synced.map_err(|e| ((*path).clone(), e))
        })?;
        let path = dir.join(CHECKPOINT_PATH);
        disk.rename(&temp, &path)
            .and_then(|()| disk.dir_sync(dir))
            .map_err(|e| (path, e))?;
        if self.named.len() > NAMED_MAX {
            self.named.clear();
        }
        self.named.extend(dirs);
        Ok(())
    }

    /// `dir` and those above it, from the top, whose names are not known to be durable: they may be
    /// missing, or made by a process that was killed.
    fn unnamed<'a>(&self, dir: &'a Path) -> Vec<&'a Path> {
        let mut out: Vec<&Path> = dir
            .ancestors()
            .take_while(|d| *d != self.source.dir && !self.named.contains(*d))
            .collect();
        out.reverse();
        out
    }

    fn damaged(&self, what: String) -> IntegrateError {
        IntegrateError::Damaged {
            class: self.source.class,
            what,
        }
    }

    fn io(&self, what: &'static str, path: &Path, source: io::Error) -> IntegrateError {
        IntegrateError::Io {
            class: self.source.class,
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// Removes the partial files that full ones have replaced. Nothing depends on it.
fn remove_partial(dir: &Path, files: &[TileFile]) {
    for file in files.iter().filter(|f| !f.tile.is_partial()) {
        let mut path = dir.join(file.tile.path()).into_os_string();
        path.push(".p");
        let _ = std::fs::remove_dir_all(path);
    }
}
