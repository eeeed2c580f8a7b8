//! The directory: `NAME/volume` and `NAME/tags` are an object, `NAME.new/…` one that is being made.
//!
//! ```text
//!   (none) ──open──▶ NAME.new ──keep: sync all, rename──▶ NAME
//!                       │                                   │ keep of another: exchange, remove
//!   (none) ◀──forget────┘        (none) ◀──erase: rename to NAME.new, remove
//! ```
//!
//! Of archives, and of the parts of snapshots, a workspace may have several, each by its id; they are
//! begun under one name: `WORKSPACE.archive.new`.
//!
//! A crash leaves `….new` at most, which is no object and is swept.

use crate::wire::{How, Name};
use api::warden::Object;
use api::{Error, ErrorCode};
use jail::fault::{At, Result};
use jail::open_beneath;
use model::{Purpose, WorkspaceId};
use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

const VOLUME: &str = "volume";
const SIDECAR: &str = "tags";

/// The directory of objects.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The objects in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Opens both files, the volume locked; whether they were begun.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] while another process has it; [`ErrorCode::NotFound`] when there is
    /// none to read; [`ErrorCode::DiskTampered`] when a part of it is missing.
    pub fn open(&self, of: &Name, how: How) -> Result<([OwnedFd; 2], bool)> {
        check(of)?;
        let name = of.to_string();
        let there = self.dir.join(&name).symlink_metadata().is_ok();
        let (access, lock) = match how {
            How::Read => (OFlags::RDONLY, FlockOperation::NonBlockingLockShared),
            How::Write | How::New => (OFlags::RDWR, FlockOperation::NonBlockingLockExclusive),
        };
        match (how, there) {
            (How::New, _) | (How::Write, false) => Ok((self.begin(&new(of))?, true)),
            (How::Read, false) => {
                let why = format!("there is no {of}");
                Err(Error::new(ErrorCode::NotFound, why))
            }
            (How::Read | How::Write, true) => {
                let files = self.files(&name, access).map_err(|e| missing(&name, &e))?;
                take(&files[0], lock)?;
                Ok((files, false))
            }
        }
    }

    /// Makes the one that was begun, whose volume has this inode, the object.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] when it was not begun; the files'.
    pub fn keep(&self, of: &Name, inode: u64) -> Result {
        check(of)?;
        let (name, new) = (of.to_string(), new(of));
        let inode_of = |dir: &str| {
            let volume = self.dir.join(dir).join(VOLUME);
            volume.symlink_metadata().map(|m| m.ino()).ok()
        };
        if inode_of(&new) == Some(inode) {
            for file in self.files(&new, OFlags::RDONLY).at("open", &new)? {
                rustix::fs::fsync(file).at("sync", &new)?;
            }
            sync(&self.dir.join(&new)).at("sync", &new)?;
            let (from, to) = (self.dir.join(&new), self.dir.join(&name));
            let how = if to.symlink_metadata().is_ok() {
                RenameFlags::EXCHANGE
            } else {
                RenameFlags::NOREPLACE
            };
            rustix::fs::renameat_with(CWD, from, CWD, to, how).at("keep", &name)?;
            sync(&self.dir).at("sync the directory of", &name)?;
        } else if inode_of(&name) != Some(inode) {
            let why = format!("{of} was not begun, or was begun anew");
            return Err(Error::new(ErrorCode::Conflict, why));
        }
        // The one before, if there was one.
        self.forget_new(of)
    }

    /// Removes the one that was begun. None is as good.
    ///
    /// # Errors
    /// The files'.
    pub fn forget_new(&self, of: &Name) -> Result {
        self.remove(&new(of))
    }

    /// Removes each that was begun and that no process holds.
    ///
    /// # Errors
    /// The directory's.
    pub fn sweep_new(&self) -> Result {
        let entries = std::fs::read_dir(&self.dir).at("read", self.dir.display())?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|n| n.ends_with(".new")) else {
                continue;
            };
            let lock = FlockOperation::NonBlockingLockExclusive;
            let held = self.volume(name).is_some_and(|v| take(&v, lock).is_err());
            if !held {
                self.remove(name)?;
            }
        }
        Ok(())
    }

    /// Removes one object of the workspace, or all. None is as good.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] while a process has one of them: nothing is removed then. A part of a
    /// snapshot goes all the same: a VM that was restored from it reads on.
    pub fn erase(&self, workspace: &WorkspaceId, of: Option<&Name>) -> Result {
        let names = match of {
            Some(of) if matches!(of.object, Purpose::SnapshotDisk | Purpose::SnapshotMemory) => {
                return self.spend(of);
            }
            // Of an archive that is being made beside it, nothing.
            Some(of) => check(of).map(|()| vec![of.to_string(), gone(of)])?,
            None => self.names(workspace)?,
        };
        let mut held = Vec::new();
        for volume in names.iter().filter_map(|name| self.volume(name)) {
            take(&volume, FlockOperation::NonBlockingLockExclusive)?;
            held.push(volume);
        }
        for name in &names {
            if name.ends_with(".new") {
                self.remove(name)?;
            } else {
                self.spend_name(name)?;
            }
        }
        sync(&self.dir).at("sync the directory of", workspace)
    }

    /// Removes the object, whoever has it open. None is as good.
    ///
    /// # Errors
    /// The files'.
    pub fn spend(&self, of: &Name) -> Result {
        check(of)?;
        self.spend_name(&of.to_string())
    }

    fn spend_name(&self, name: &str) -> Result {
        let gone = format!("{name}.new");
        self.remove(&gone)?;
        match std::fs::rename(self.dir.join(name), self.dir.join(&gone)) {
            Ok(()) => {
                sync(&self.dir).at("sync the directory of", name)?;
                self.remove(&gone)
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e).at("erase", name),
        }
    }

    /// Bytes that both files take up; 0 when there are none.
    #[must_use]
    pub fn bytes(&self, of: &Name) -> u64 {
        let dir = self.dir.join(of.to_string());
        let of = |file: &str| dir.join(file).symlink_metadata().map_or(0, |m| m.blocks());
        (of(VOLUME) + of(SIDECAR)) * 512
    }

    /// The objects that there are of the workspace, by name.
    ///
    /// # Errors
    /// The directory's.
    pub fn list(&self, workspace: &WorkspaceId) -> Result<Vec<Object>> {
        let names = self.names(workspace)?;
        let names = names.iter().filter_map(|n| Name::read(workspace, n));
        let object = |of: Name| Object {
            purpose: of.object,
            bytes: self.bytes(&of),
            id: of.id,
        };
        Ok(names.map(object).collect())
    }

    /// The directories that are the workspace's, kept or not.
    fn names(&self, workspace: &WorkspaceId) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.dir).at("read", self.dir.display())?;
        let ours = format!("{workspace}.");
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(&ours)).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Empty files beside what is there: what an interrupted making left is no object.
    fn begin(&self, new: &str) -> Result<[OwnedFd; 2]> {
        match std::fs::DirBuilder::new()
            .mode(0o700)
            .create(self.dir.join(new))
        {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e).at("make", new),
            _ => {}
        }
        let files = self
            .files(new, OFlags::RDWR | OFlags::CREATE)
            .at("make", new)?;
        take(&files[0], FlockOperation::NonBlockingLockExclusive)?;
        for file in &files {
            rustix::fs::ftruncate(file, 0).at("empty", new)?;
        }
        Ok(files)
    }

    fn files(&self, name: &str, flags: OFlags) -> std::io::Result<[OwnedFd; 2]> {
        let mode = if flags.contains(OFlags::CREATE) {
            0o600
        } else {
            0
        };
        let open = |file: &str| open_beneath(&self.dir, &format!("{name}/{file}"), flags, mode);
        Ok([open(VOLUME)?, open(SIDECAR)?])
    }

    fn volume(&self, name: &str) -> Option<OwnedFd> {
        open_beneath(&self.dir, &format!("{name}/{VOLUME}"), OFlags::RDONLY, 0).ok()
    }

    fn remove(&self, name: &str) -> Result {
        match std::fs::remove_dir_all(self.dir.join(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e).at("remove", name),
            _ => Ok(()),
        }
    }
}

/// Where it is begun.
fn new(of: &Name) -> String {
    gone(&Name::new(&of.workspace, of.object))
}

/// Where it is removed.
fn gone(of: &Name) -> String {
    format!("{of}.new")
}

fn check(of: &Name) -> Result {
    if of.is_object() {
        return Ok(());
    }
    let why = "an archive or a part of a snapshot has an id, and nothing else has";
    Err(Error::new(ErrorCode::ValidationError, why))
}

fn take(volume: &OwnedFd, how: FlockOperation) -> Result {
    rustix::fs::flock(volume, how).map_err(|_| {
        let why = "the workspace's disk is in use; stop it first";
        Error::new(ErrorCode::Conflict, why)
    })
}

/// Both files are made before either is kept, and removed after both are let go of.
fn missing(name: &str, why: &std::io::Error) -> Error {
    if why.kind() != ErrorKind::NotFound {
        return Error::internal(format!("open {name}: {why}"));
    }
    let message = "a part of the workspace's disk is missing: it was changed while it was at rest";
    Error::new(ErrorCode::DiskTampered, message).detail(format!("open {name}: {why}"))
}

fn sync(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use model::ObjectId;
    use std::fs::File;
    use std::io::Write as _;

    fn world() -> (tempfile::TempDir, Store, Name) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().into());
        let name = Name::disk(&WorkspaceId::from_bytes([7; 8]));
        (dir, store, name)
    }

    fn archive(name: &Name, n: usize) -> Name {
        by_id(name, Purpose::Archive, n)
    }

    fn by_id(name: &Name, object: Purpose, n: usize) -> Name {
        Name {
            id: Some(ObjectId::from_bytes([u8::try_from(n).unwrap(); 8])),
            ..Name::new(&name.workspace, object)
        }
    }

    fn inode(files: &[OwnedFd; 2]) -> u64 {
        rustix::fs::fstat(&files[0]).unwrap().st_ino
    }

    fn make(store: &Store, name: &Name, text: &str) -> u64 {
        let (files, fresh) = store.open(name, How::New).unwrap();
        assert!(fresh);
        for file in &files {
            let mut file = std::fs::File::from(file.try_clone().unwrap());
            file.write_all(text.as_bytes()).unwrap();
        }
        let inode = inode(&files);
        store.keep(name, inode).unwrap();
        inode
    }

    fn text(store: &Store, name: &Name) -> String {
        let (_, fresh) = store.open(name, How::Read).unwrap();
        assert!(!fresh);
        let dir = store.dir.join(name.to_string());
        let [volume, tags] = [VOLUME, SIDECAR].map(|f| std::fs::read_to_string(dir.join(f)));
        assert_eq!(volume.as_ref().unwrap(), &tags.unwrap());
        volume.unwrap()
    }

    fn there(store: &Store, name: &Name) -> Vec<Purpose> {
        let objects = store.list(&name.workspace).unwrap();
        objects.into_iter().map(|o| o.purpose).collect()
    }

    fn code<T>(result: Result<T>) -> ErrorCode {
        result.err().unwrap().code
    }

    #[test]
    fn what_is_spent_is_its_reader_s_alone_and_can_be_begun_anew() {
        let (dir, store, name) = world();
        make(&store, &name, "memory");
        let ([volume, _tags], _) = store.open(&name, How::Read).unwrap();
        store.spend(&name).unwrap();
        assert_eq!(there(&store, &name), []);
        assert_eq!(code(store.open(&name, How::Read)), ErrorCode::NotFound);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let read = std::io::read_to_string(std::fs::File::from(volume)).unwrap();
        assert_eq!(read, "memory");
        store.spend(&name).unwrap();
        make(&store, &name, "another");
        assert_eq!(text(&store, &name), "another");
    }

    #[test]
    fn what_was_begun_is_no_object_until_it_is_kept() {
        let (dir, store, name) = world();
        assert_eq!(code(store.open(&name, How::Read)), ErrorCode::NotFound);
        let (files, fresh) = store.open(&name, How::Write).unwrap();
        assert!(fresh);
        assert_eq!(there(&store, &name), []);
        assert_eq!(code(store.open(&name, How::Write)), ErrorCode::Conflict);
        let begun = inode(&files);
        drop(files);
        // Begun again, after a crash: what was in it is gone, and its inode stays.
        let (files, _) = store.open(&name, How::Write).unwrap();
        assert_eq!(inode(&files), begun);
        store.keep(&name, begun).unwrap();
        assert_eq!(there(&store, &name), [Purpose::Disk]);
        drop(files);
        let (_files, fresh) = store.open(&name, How::Write).unwrap();
        assert!(!fresh);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_takes_the_place_of_the_one_before_and_keeping_twice_is_keeping_once() {
        let (_dir, store, name) = world();
        make(&store, &name, "old");
        let (reader, _) = store.open(&name, How::Read).unwrap();
        let kept = make(&store, &name, "new");
        assert_eq!(text(&store, &name), "new");
        // The answer was lost: asked again, it does not bring the old one back.
        store.keep(&name, kept).unwrap();
        assert_eq!(text(&store, &name), "new");
        // Who reads the one before goes on.
        let mut old = String::new();
        let mut file = std::fs::File::from(reader.into_iter().next().unwrap());
        std::io::Read::read_to_string(&mut file, &mut old).unwrap();
        assert_eq!(old, "old");
        assert_eq!(code(store.keep(&name, 1)), ErrorCode::Conflict);
    }

    #[test]
    fn a_crash_after_the_exchange_is_finished_by_asking_again() {
        let (_dir, store, name) = world();
        make(&store, &name, "old");
        let (files, _) = store.open(&name, How::New).unwrap();
        let inode = inode(&files);
        let (from, to) = (store.dir.join(new(&name)), store.dir.join(name.to_string()));
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE).unwrap();
        store.keep(&name, inode).unwrap();
        drop(files);
        assert_eq!(text(&store, &name), "");
        assert!(!store.dir.join(new(&name)).exists());
    }

    #[test]
    fn neither_part_is_opened_without_the_other() {
        for part in [VOLUME, SIDECAR] {
            let (dir, store, name) = world();
            make(&store, &name, "x");
            std::fs::remove_file(dir.path().join(name.to_string()).join(part)).unwrap();
            for how in [How::Write, How::Read] {
                assert_eq!(code(store.open(&name, how)), ErrorCode::DiskTampered);
            }
        }
    }

    #[test]
    fn nothing_is_opened_through_a_link() {
        let (dir, store, name) = world();
        make(&store, &name, "x");
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "x").unwrap();
        let volume = dir.path().join(name.to_string()).join(VOLUME);
        std::fs::remove_file(&volume).unwrap();
        std::os::unix::fs::symlink(&secret, &volume).unwrap();
        assert_eq!(code(store.open(&name, How::Write)), ErrorCode::Internal);
    }

    #[test]
    fn a_sweep_leaves_what_a_process_holds() {
        let (_dir, store, name) = world();
        make(&store, &name, "x");
        let (held, _) = store.open(&name, How::New).unwrap();
        store.sweep_new().unwrap();
        assert!(store.dir.join(new(&name)).exists());
        drop(held);
        store.sweep_new().unwrap();
        assert!(!store.dir.join(new(&name)).exists());
        assert_eq!(text(&store, &name), "x");
    }

    #[test]
    fn an_erasure_takes_all_of_one_workspace_or_nothing() {
        let (dir, store, name) = world();
        let other = Name::disk(&WorkspaceId::from_bytes([8; 8]));
        make(&store, &other, "other");
        let all = [
            Purpose::Archive,
            Purpose::Archive,
            Purpose::Disk,
            Purpose::Memory,
            Purpose::SnapshotDisk,
            Purpose::SnapshotMemory,
        ];
        for (n, object) in all.into_iter().enumerate() {
            let of = if object.is_by_id() {
                by_id(&name, object, n)
            } else {
                Name::new(&name.workspace, object)
            };
            make(&store, &of, "x");
        }
        assert_eq!(there(&store, &name), all);
        assert!(store.bytes(&name) > 0);
        let (reader, _) = store.open(&name, How::Read).unwrap();
        assert_eq!(
            code(store.erase(&name.workspace, None)),
            ErrorCode::Conflict
        );
        assert_eq!(there(&store, &name), all);
        let memory = Name::new(&name.workspace, Purpose::Memory);
        store.erase(&name.workspace, Some(&memory)).unwrap();
        assert_eq!(there(&store, &name).len(), all.len() - 1);
        drop(reader);
        for _ in 0..2 {
            store.erase(&name.workspace, None).unwrap();
            assert_eq!(there(&store, &name), []);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(text(&store, &other), "other");
    }

    /// What a kill leaves of a snapshot that is being taken: the one before it, whole.
    #[test]
    fn a_snapshot_is_made_beside_the_one_before() {
        let (dir, store, name) = world();
        let kinds = [Purpose::SnapshotDisk, Purpose::SnapshotMemory];
        for kind in kinds {
            make(&store, &by_id(&name, kind, 1), "then");
        }
        make(&store, &by_id(&name, Purpose::SnapshotDisk, 2), "now");
        drop(store.open(&by_id(&name, Purpose::SnapshotMemory, 2), How::New));
        store.sweep_new().unwrap();
        for kind in kinds {
            assert_eq!(text(&store, &by_id(&name, kind, 1)), "then");
        }
        assert_eq!(store.list(&name.workspace).unwrap().len(), 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        // Another stands now: that goes from under a VM that was restored from it.
        let (reader, _) = store.open(&by_id(&name, kinds[1], 1), How::Read).unwrap();
        for kind in kinds {
            let of = by_id(&name, kind, 1);
            store.erase(&name.workspace, Some(&of)).unwrap();
        }
        assert_eq!(there(&store, &name), [Purpose::SnapshotDisk]);
        let [volume, _] = reader;
        let read = std::io::read_to_string(File::from(volume)).unwrap();
        assert_eq!(read, "then");
    }

    #[test]
    fn archives_are_each_its_own_and_one_is_made_at_a_time() {
        let (dir, store, name) = world();
        let (first, second) = (archive(&name, 1), archive(&name, 2));
        make(&store, &first, "first");
        let (begun, _) = store.open(&second, How::New).unwrap();
        let third = archive(&name, 3);
        assert_eq!(code(store.open(&third, How::New)), ErrorCode::Conflict);
        assert_eq!(there(&store, &name), [Purpose::Archive]);
        // One that is removed takes nothing of the one that is being made.
        store.erase(&name.workspace, Some(&first)).unwrap();
        assert_eq!(there(&store, &name), []);
        store.keep(&second, inode(&begun)).unwrap();
        drop(begun);
        assert_eq!(store.list(&name.workspace).unwrap()[0].id, second.id);
        drop(store.open(&third, How::New).unwrap());
        store.sweep_new().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        // A name without an id is no archive, and nothing else has one.
        let none = Name::new(&name.workspace, Purpose::Archive);
        let odd = Name {
            object: Purpose::Memory,
            ..first
        };
        for of in [none, odd] {
            assert_eq!(code(store.open(&of, How::New)), ErrorCode::ValidationError);
            let erased = store.erase(&of.workspace, Some(&of));
            assert_eq!(code(erased), ErrorCode::ValidationError);
        }
    }
}
