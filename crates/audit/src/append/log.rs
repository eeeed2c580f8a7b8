//! One class's log as the append process sees it: numbers, seals, makes durable. Nothing of it is
//! ever read but at the start, to number on.
//!
//! ```text
//!  drafts ──▶ number, seal ──▶ one write ──▶ one fdatasync ──▶ answers
//!                                 │
//!                                 └─ segment full: start the next one (temp, fsync, rename, fsync)
//! ```
//!
//! After a failed write or sync nobody knows what is on the disk: the log refuses everything until
//! the process starts anew and looks.

use super::keys::Keys;
use super::sealer::{SealRefused, Sealed, Sealer};
use crate::disk::Disk;
use crate::limits::{
    BATCH_BYTES_SOFT, BATCH_ENTRIES_MAX, CLOCK_STEP_REPORT_MS, SEGMENT_BYTES_SOFT, SEGMENT_TAGS_MAX,
};
use crate::segment::{self, Next, SegmentError, Start};
use model::AccountId;
use seal::secret::SecretBytes;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tlog::class::Class;
use tlog::leaf::{ACCOUNT_SEQ_FIRST, Leaf, Opening, account_tag, day_of};

/// What is to be appended.
#[derive(Clone)]
pub struct Draft {
    /// The account it concerns.
    pub account: Option<AccountId>,
    /// The stamped entry, JSON.
    pub payload: Vec<u8>,
}

/// An entry that is durable.
pub struct Placed {
    /// Its index.
    pub index: u64,
    /// Its time, ms since the epoch.
    pub time_ms: u64,
    /// Its bytes.
    pub leaf: Vec<u8>,
    /// What it commits to.
    pub opening: Opening,
}

/// What became of one commit.
pub struct Committed {
    /// One result per draft, in order; a refused one took no place.
    pub placed: Vec<Result<Placed, SealRefused>>,
    /// The wall clock stepped back by so many ms since the last commit.
    pub stepped_back_ms: Option<u64>,
}

/// Why a log can't be opened, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system failed.
    #[error("audit log {class}: {what} {path}: {source}")]
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
    /// A segment is not what was written.
    #[error("audit log {class}: {path}: {source}")]
    Segment {
        /// The log.
        class: Class,
        /// The segment.
        path: PathBuf,
        /// What is wrong.
        source: SegmentError,
    },
    /// An entry in a segment is no leaf.
    #[error(
        "audit log {class}: {path}: entry {index} is damaged; restore the segment from a backup"
    )]
    Leaf {
        /// The log.
        class: Class,
        /// The segment.
        path: PathBuf,
        /// The entry.
        index: u64,
    },
    /// A write failed earlier.
    #[error("audit log {0}: a write failed before; the process must start anew")]
    Broken(Class),
}

/// One class's segments, open for appending.
pub struct Log {
    disk: Disk,
    class: Class,
    dir: PathBuf,
    blinding: SecretBytes<32>,
    sealer: Sealer,
    /// What the next entry goes on from; its `first_index` is the next entry's index.
    now: Start,
    /// The wall clock as last seen, to notice a step back.
    wall_ms: u64,
    file: File,
    path: PathBuf,
    bytes: u64,
    broken: bool,
}

impl Log {
    /// Opens the segments in `dir`, cutting off a torn end, or starts the first one.
    ///
    /// # Errors
    /// [`LogError`] when a segment is damaged anywhere else.
    pub fn open(
        disk: Disk,
        dir: &Path,
        class: Class,
        blinding: SecretBytes<32>,
    ) -> Result<Log, LogError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| LogError::Io {
                class,
                what,
                path,
                source,
            }
        };
        let parent = dir.parent().unwrap_or(Path::new("."));
        disk.dir_create(dir)
            .and_then(|()| disk.dir_sync(parent))
            .map_err(io("make", dir))?;
        let mut now = Start {
            class,
            first_index: 0,
            time_ms: 0,
            seqs: BTreeMap::new(),
        };
        let segments = segment::list(dir).map_err(io("list", dir))?;
        if segments.is_empty() {
            segment_start(&disk, dir, &now).map_err(io("start a segment in", dir))?;
        }
        let mut last = (dir.join(segment::name(0)), 0);
        for (i, (first, path)) in segments.iter().enumerate() {
            let fail = |source| LogError::Segment {
                class,
                path: path.clone(),
                source,
            };
            let bytes = segment::read_from(path, 0).map_err(io("read", path))?;
            let (start, mut at) = Start::decode(class, &bytes).map_err(fail)?;
            if start.first_index != *first {
                return Err(fail(SegmentError::Start("its name is another one's")));
            }
            if i == 0 {
                now = start;
            } else if start != now {
                return Err(fail(SegmentError::Index {
                    expected: now.first_index,
                    got: *first,
                }));
            }
            loop {
                match segment::next(class, now.first_index, &bytes[at..]).map_err(fail)? {
                    Next::Batch(batch) => {
                        for leaf in &batch.leaves {
                            now.follow(leaf).ok_or_else(|| LogError::Leaf {
                                class,
                                path: path.clone(),
                                index: now.first_index,
                            })?;
                        }
                        at += batch.bytes;
                    }
                    Next::End => break,
                    Next::Torn if i + 1 == segments.len() => {
                        tracing::warn!(%class, index = now.first_index, bytes = bytes.len() - at,
                            "a batch that was never answered is cut off");
                        disk.cut(path, at as u64).map_err(io("cut", path))?;
                        break;
                    }
                    Next::Torn => {
                        return Err(fail(SegmentError::Damaged {
                            index: now.first_index,
                        }));
                    }
                }
            }
            last = (path.clone(), at as u64);
        }
        let (path, bytes) = last;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(io("open", &path))?;
        // What a killed process wrote last may be in memory only.
        disk.data_sync(&file, &path).map_err(io("sync", &path))?;
        disk.dir_sync(dir).map_err(io("sync", dir))?;
        let bytes = if bytes == 0 {
            file.metadata().map_err(io("stat", &path))?.len()
        } else {
            bytes
        };
        Ok(Log {
            disk,
            class,
            dir: dir.to_owned(),
            blinding,
            sealer: Sealer::new(class),
            wall_ms: now.time_ms,
            now,
            file,
            path,
            bytes,
            broken: false,
        })
    }

    /// How many entries are durable.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.now.first_index
    }

    /// Seals and appends drafts, in order, and makes them durable together. At most
    /// [`BATCH_ENTRIES_MAX`] drafts.
    ///
    /// # Errors
    /// [`LogError`]: none of them is known to be durable, and the log takes no more.
    pub fn commit(
        &mut self,
        drafts: Vec<Draft>,
        keys: &Keys,
        wall_ms: u64,
        at: Instant,
    ) -> Result<Committed, LogError> {
        if self.broken {
            return Err(LogError::Broken(self.class));
        }
        assert!(drafts.len() <= BATCH_ENTRIES_MAX);
        let stepped_back_ms = self
            .wall_ms
            .checked_sub(wall_ms)
            .filter(|ms| *ms > CLOCK_STEP_REPORT_MS);
        self.wall_ms = wall_ms;
        let mut placed = Vec::with_capacity(drafts.len());
        let (mut leaves, mut body): (Vec<Vec<u8>>, usize) = (Vec::new(), 0);
        for draft in drafts {
            let entry = self.leaf(draft, keys, wall_ms, at);
            if let Ok(entry) = &entry {
                body += entry.leaf.len() + 2;
                leaves.push(entry.leaf.clone());
            }
            placed.push(entry);
            if body >= BATCH_BYTES_SOFT {
                self.write(&leaves)?;
                leaves.clear();
                body = 0;
            }
        }
        if !leaves.is_empty() {
            self.write(&leaves)?;
        }
        Ok(Committed {
            placed,
            stepped_back_ms,
        })
    }

    /// Starts the next segment if this one is full. Call it after the answers are sent.
    ///
    /// # Errors
    /// [`LogError`]; the log takes no more.
    pub fn rotate_if_full(&mut self) -> Result<(), LogError> {
        if self.bytes < SEGMENT_BYTES_SOFT {
            return Ok(());
        }
        self.rotate()
    }

    /// Starts the next segment.
    ///
    /// # Errors
    /// [`LogError`]; the log takes no more.
    pub fn rotate(&mut self) -> Result<(), LogError> {
        if self.broken {
            return Err(LogError::Broken(self.class));
        }
        if self.path == self.dir.join(segment::name(self.now.first_index)) {
            return Ok(()); // Nothing in it yet.
        }
        let path = segment_start(&self.disk, &self.dir, &self.now)
            .map_err(|e| self.failed("start a segment after", e))?;
        self.file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|e| self.failed("open the segment after", e))?;
        self.bytes = self
            .file
            .metadata()
            .map_err(|e| self.failed("stat", e))?
            .len();
        self.path = path;
        Ok(())
    }

    /// Removes the segments that hold nothing at or above `integrated`; the last one stays.
    ///
    /// # Errors
    /// [`LogError`]; harmless, the next call removes them.
    pub fn forget(&mut self, integrated: u64) -> Result<(), LogError> {
        let io = |e| self.io_error("remove an integrated segment of", e);
        let segments = segment::list(&self.dir).map_err(io)?;
        for pair in segments.windows(2) {
            let [(_, path), (next, _)] = pair else {
                continue;
            };
            if *next > integrated {
                break;
            }
            self.disk.remove(path).map_err(io)?;
        }
        Ok(())
    }

    /// Forgets batch keys whose life is over.
    pub fn purge(&mut self, at: Instant) {
        self.sealer.purge(at);
    }

    /// Seals a draft, and numbers it if that went well.
    fn leaf(
        &mut self,
        draft: Draft,
        keys: &Keys,
        wall_ms: u64,
        at: Instant,
    ) -> Result<Placed, SealRefused> {
        let time_ms = wall_ms.max(self.now.time_ms);
        let day = day_of(time_ms);
        let opening = Opening {
            salt: seal::random::bytes(),
            payload: draft.payload,
        };
        let Sealed {
            wrap_class,
            wrap_account,
            sealed,
        } = self
            .sealer
            .seal(keys, draft.account.as_ref(), day, &opening, at)?;
        let tag = account_tag(
            self.blinding.expose(),
            self.class,
            draft.account.as_ref().map_or("", AccountId::as_str),
        );
        let account_seq = match self.now.seqs.get(&tag) {
            Some(next) => *next,
            None if self.now.seqs.len() >= SEGMENT_TAGS_MAX => return Err(SealRefused::Accounts),
            None => ACCOUNT_SEQ_FIRST,
        };
        let leaf = Leaf {
            class: self.class,
            time_ms,
            account_tag: tag,
            account_seq,
            commitment: opening.commitment(),
            day,
            wrap_class,
            wrap_account,
            sealed,
        }
        .encode()?;
        let index = self.now.first_index;
        self.now.seqs.insert(tag, account_seq + 1);
        self.now.time_ms = time_ms;
        self.now.first_index += 1;
        Ok(Placed {
            index,
            time_ms,
            leaf,
            opening,
        })
    }

    /// Makes the leaves that were numbered last durable.
    fn write(&mut self, leaves: &[Vec<u8>]) -> Result<(), LogError> {
        let first_index = self.now.first_index - leaves.len() as u64;
        let bytes = segment::batch_encode(self.class, first_index, leaves);
        self.disk
            .append(&self.file, &bytes)
            .map_err(|e| self.failed("append to", e))?;
        // Before the next batch too: two unsynced ones could come back in any order.
        self.disk
            .data_sync(&self.file, &self.path)
            .map_err(|e| self.failed("sync", e))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn failed(&mut self, what: &'static str, source: io::Error) -> LogError {
        self.broken = true;
        self.io_error(what, source)
    }

    fn io_error(&self, what: &'static str, source: io::Error) -> LogError {
        LogError::Io {
            class: self.class,
            what,
            path: self.path.clone(),
            source,
        }
    }
}

impl Start {
    /// Takes in the entry that follows; `None` if it is none of this log, or does not follow.
    fn follow(&mut self, leaf: &[u8]) -> Option<()> {
        let leaf = Leaf::decode(leaf).ok()?;
        let next = self
            .seqs
            .get(&leaf.account_tag)
            .copied()
            .unwrap_or(ACCOUNT_SEQ_FIRST);
        if leaf.class != self.class || leaf.account_seq != next || leaf.time_ms < self.time_ms {
            return None;
        }
        self.seqs.insert(leaf.account_tag, next + 1);
        self.time_ms = leaf.time_ms;
        self.first_index += 1;
        Some(())
    }
}

/// Writes a segment's start and makes it and its name durable.
fn segment_start(disk: &Disk, dir: &Path, start: &Start) -> io::Result<PathBuf> {
    let temp = dir.join(".start.tmp");
    let path = dir.join(segment::name(start.first_index));
    disk.file_write(&temp, &start.encode())?;
    disk.rename(&temp, &path)?;
    disk.dir_sync(dir)?;
    Ok(path)
}
