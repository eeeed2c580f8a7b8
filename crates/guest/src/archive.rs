//! Archives: a tar of files of the workspace, said on the agent's channel piece by piece, while the
//! workspace runs on; or asked for, piece by piece, and put back.
//!
//! Only what lies on the workspace's own root is in it: of another file system (`/proc`, `/dev/shm`)
//! its directory alone. Symlinks are entries and are never followed below a path that was asked for;
//! a file that changes meanwhile is as long as it was when it was opened.
//!
//! Must never follow a link out of the root, or go on once nobody wants the archive.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use api::agent::{ARCHIVE_CHUNK_BYTES, FromGuest};
use base64::Engine as _;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};

use crate::channel::Sender;
use crate::fsroot::FsRoot;
use crate::limits::{ARCHIVE_DEPTH_MAX, ARCHIVE_PIECE_WAIT, FAILURE_MESSAGE_MAX_CHARS};
use crate::put_back::put_back;
use crate::tar::Tar;

/// The archive that is wanted; one at a time.
#[derive(Debug, Default)]
pub struct Archives {
    /// Counts what was asked for and what was stopped: an archive goes on while it stands.
    turn: Arc<AtomicU64>,
    /// Where the pieces of one that is put back go.
    pieces: Mutex<Option<(u64, SyncSender<Vec<u8>>)>>,
}

/// What is asked for.
#[derive(Debug)]
pub struct Wanted {
    /// What its messages are marked with.
    pub number: u64,
    /// Absolute paths.
    pub paths: Vec<String>,
    /// Absolute paths that are left out, with all below them.
    pub exclude: Vec<String>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// A path that was asked for.
    #[error("path {0} is not there, or not on the workspace's disk")]
    Path(usize),
    /// What is said does not arrive, or nobody wants it any more.
    #[error("the archive: {0}")]
    Out(#[from] io::Error),
}

impl Archives {
    /// Begins one, in a thread of its own; it ends any other.
    pub fn begin(&self, wanted: Wanted, root: Arc<FsRoot>, sender: Sender) {
        let number = wanted.number;
        self.spawn(number, sender, move |sender, goes_on| {
            say(&wanted, &root, sender, goes_on);
        });
    }

    /// Puts one back, in a thread of its own; it ends any other.
    pub fn put_back(&self, number: u64, root: Arc<FsRoot>, sender: Sender) {
        let (pieces, from) = sync_channel(1);
        self.spawn(number, sender, move |sender, goes_on| {
            let asked = Asked {
                number,
                sender,
                goes_on,
                from,
                piece: Vec::new(),
                at: 0,
            };
            let done = put_back(asked, &root).map_err(ArchiveError::Out);
            // What was put back outlasts what may come.
            rustix::fs::sync();
            ended(sender, number, goes_on, done);
        });
        *self.pieces() = Some((number, pieces));
    }

    /// Takes the next piece of the one that is put back; of any other it is passed over.
    pub fn piece(&self, number: u64, data: &str) {
        let pieces = self.pieces();
        let Some((_, to)) = pieces.as_ref().filter(|(of, _)| *of == number) else {
            return;
        };
        let piece = base64::engine::general_purpose::STANDARD.decode(data);
        // One is asked for at a time: there is room, or nobody takes it.
        let _ = to.try_send(piece.unwrap_or_default());
    }

    /// Ends what is under way.
    pub fn stop(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
        *self.pieces() = None;
    }

    fn pieces(&self) -> std::sync::MutexGuard<'_, Option<(u64, SyncSender<Vec<u8>>)>> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(
        &self,
        number: u64,
        sender: Sender,
        work: impl FnOnce(&Sender, &dyn Fn() -> bool) + Send + 'static,
    ) {
        self.stop();
        let turn = self.turn.load(Ordering::Acquire);
        let now = Arc::clone(&self.turn);
        let goes_on = move || now.load(Ordering::Acquire) == turn;
        let own = sender.clone();
        let begun = std::thread::Builder::new()
            .name("archive".into())
            .spawn(move || work(&own, &goes_on));
        if let Err(e) = begun {
            failed(&sender, number, &ArchiveError::Out(e));
        }
    }
}

/// The bytes of an archive, asked for piece by piece.
struct Asked<'a> {
    number: u64,
    sender: &'a Sender,
    goes_on: &'a dyn Fn() -> bool,
    from: Receiver<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Asked<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            if !(self.goes_on)() {
                return Err(io::Error::other("nobody wants it any more"));
            }
            let number = self.number;
            self.sender.send(&FromGuest::ArchiveNext { number })?;
            let piece = self.from.recv_timeout(ARCHIVE_PIECE_WAIT);
            self.piece = piece.map_err(io::Error::other)?;
            self.at = 0;
        }
        let n = into.len().min(self.piece.len() - self.at);
        into[..n].copy_from_slice(&self.piece[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// Says the whole archive, and how it ended.
fn say(wanted: &Wanted, root: &FsRoot, sender: &Sender, goes_on: &dyn Fn() -> bool) {
    let number = wanted.number;
    let out = Pieces::new(|piece: &[u8]| {
        if !goes_on() {
            return Err(io::Error::other("nobody wants it any more"));
        }
        let data = base64::engine::general_purpose::STANDARD.encode(piece);
        sender.send(&FromGuest::ArchiveData { number, data })
    });
    ended(sender, number, goes_on, write(wanted, root, out));
}

/// Says what came of it, to whoever still wants it.
fn ended(
    sender: &Sender,
    number: u64,
    goes_on: &dyn Fn() -> bool,
    done: Result<(u64, u64), ArchiveError>,
) {
    match done {
        _ if !goes_on() => {}
        Ok((entries, skipped)) => {
            let done = FromGuest::ArchiveDone {
                number,
                entries,
                skipped,
            };
            // When the port is gone there is nobody to tell.
            let _ = sender.send(&done);
        }
        Err(e) => failed(sender, number, &e),
    }
}

fn failed(sender: &Sender, number: u64, e: &ArchiveError) {
    let (path, full) = match e {
        ArchiveError::Path(n) => (u32::try_from(*n).ok(), false),
        ArchiveError::Out(e) => (None, e.kind() == io::ErrorKind::StorageFull),
    };
    let message = e.to_string();
    let failed = FromGuest::ArchiveFailed {
        number,
        path,
        full,
        message: message.chars().take(FAILURE_MESSAGE_MAX_CHARS).collect(),
    };
    let _ = sender.send(&failed);
}

/// Writes the tar of what is wanted; how many entries it has, and what could not be read.
///
/// # Errors
/// [`ArchiveError`].
pub fn write<W: Write>(wanted: &Wanted, root: &FsRoot, out: W) -> Result<(u64, u64), ArchiveError> {
    let paths: Vec<Vec<u8>> = wanted.paths.iter().map(|path| plain(path)).collect();
    let top = root.open("/", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let device = rustix::fs::fstat(&top).map_err(io::Error::from)?.st_dev;
    let mut walk = Walk {
        tar: Tar::new(out),
        exclude: wanted.exclude.iter().map(|path| plain(path)).collect(),
        device,
        entries: 0,
        skipped: 0,
    };
    for (n, (path, text)) in paths.iter().zip(&wanted.paths).enumerate() {
        let twice = paths[..n].contains(path);
        if twice
            || paths
                .iter()
                .any(|other| other != path && is_below(path, other))
        {
            continue;
        }
        if path.is_empty() {
            walk.directory(&top, b"", 0)?;
            continue;
        }
        let gone = |_| ArchiveError::Path(n);
        let parent = root.open_parent(text).map_err(gone)?;
        let (parent, name) = parent.ok_or(ArchiveError::Path(n))?;
        let name = CString::new(name.as_bytes()).map_err(|_| ArchiveError::Path(n))?;
        let there = stat_at(&parent, &name).map_err(|_| ArchiveError::Path(n))?;
        let is_dir = FileType::from_raw_mode(there.st_mode).is_dir();
        // Only a directory's device is the root's own: a file has that of where it lies.
        let held = rustix::fs::fstat(&parent).is_ok_and(|stat| stat.st_dev == device);
        if !held || (is_dir && there.st_dev != device) {
            return Err(ArchiveError::Path(n));
        }
        let above = &path[..path.len() - name.to_bytes().len() - 1];
        walk.child(&parent, &name, above, 0)?;
    }
    walk.tar.finish()?.flush()?;
    Ok((walk.entries, walk.skipped))
}

/// Without `/` at its end or twice in a row; the root is empty.
fn plain(path: &str) -> Vec<u8> {
    let parts = path.split('/').filter(|part| !part.is_empty());
    parts
        .flat_map(|part| [b"/", part.as_bytes()].concat())
        .collect()
}

/// Whether `path` is `other` or below it.
fn is_below(path: &[u8], other: &[u8]) -> bool {
    let rest = path.strip_prefix(other);
    rest.is_some_and(|rest| rest.first().is_none_or(|b| *b == b'/'))
}

struct Walk<W> {
    tar: Tar<W>,
    exclude: Vec<Vec<u8>>,
    /// The root's own file system.
    device: u64,
    entries: u64,
    skipped: u64,
}

impl<W: Write> Walk<W> {
    /// What is in a directory, by name.
    fn directory(&mut self, directory: &OwnedFd, path: &[u8], depth: usize) -> io::Result<()> {
        let Ok(entries) = Dir::read_from(directory) else {
            self.skipped += 1;
            return Ok(());
        };
        let mut names: Vec<CString> = entries
            .flatten()
            .map(|entry| entry.file_name().to_owned())
            .filter(|name| name.as_c_str() != c"." && name.as_c_str() != c"..")
            .collect();
        names.sort_unstable();
        for name in names {
            self.child(directory, &name, path, depth)?;
        }
        Ok(())
    }

    /// One entry of the directory at `path`, with all below it.
    fn child(
        &mut self,
        directory: &OwnedFd,
        name: &CStr,
        path: &[u8],
        depth: usize,
    ) -> io::Result<()> {
        let path = [path, b"/", name.to_bytes()].concat();
        if self.exclude.iter().any(|other| is_below(&path, other)) {
            return Ok(());
        }
        let Ok(stat) = stat_at(directory, name) else {
            return Ok(()); // It went away.
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind.is_dir() {
            let name_in = [&path[1..], b"/"].concat();
            self.entries += u64::from(self.tar.entry(&name_in, &stat, b"")?);
            if stat.st_dev != self.device {
                return Ok(());
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            return match open_at(directory, name, flags) {
                Ok(inner) if depth < ARCHIVE_DEPTH_MAX => self.directory(&inner, &path, depth + 1),
                _ => {
                    self.skipped += 1;
                    Ok(())
                }
            };
        }
        let name_in = &path[1..];
        let (written, whole) = if kind.is_file() {
            match open_file(directory, name) {
                Some((file, stat)) => (true, self.tar.file(name_in, &stat, file)?),
                None => (false, false),
            }
        } else {
            let target = match rustix::fs::readlinkat(directory, name, Vec::new()) {
                Ok(target) => target.into_bytes(),
                Err(_) => Vec::new(), // It is no link.
            };
            let written = self.tar.entry(name_in, &stat, &target)?;
            (written, written)
        };
        self.entries += u64::from(written);
        self.skipped += u64::from(!whole);
        Ok(())
    }
}

/// A regular file, and what it is now that it is open.
fn open_file(directory: &OwnedFd, name: &CStr) -> Option<(File, Stat)> {
    let file = open_at(directory, name, OFlags::RDONLY).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let is_file = FileType::from_raw_mode(stat.st_mode).is_file();
    is_file.then(|| (File::from(file), stat))
}

fn stat_at(directory: impl AsFd, name: &CStr) -> rustix::io::Result<Stat> {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// Opens an entry itself: no link, and nothing that waits for another end.
fn open_at(directory: impl AsFd, name: &CStr, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

/// Cuts what is written into pieces of [`ARCHIVE_CHUNK_BYTES`].
struct Pieces<F> {
    say: F,
    piece: Vec<u8>,
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Pieces<F> {
    fn new(say: F) -> Self {
        let piece = Vec::with_capacity(ARCHIVE_CHUNK_BYTES);
        Self { say, piece }
    }
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Pieces<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(ARCHIVE_CHUNK_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == ARCHIVE_CHUNK_BYTES {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            (self.say)(&self.piece)?;
            self.piece.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::Path;

    fn world() -> (tempfile::TempDir, FsRoot) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        write("home/a", "first\n");
        write("home/b/c", "second\n");
        write("home/b/not/d", "third\n");
        write("home/bnot", "fourth\n");
        write("etc/e", "fifth\n");
        let long = "x".repeat(120);
        write(&format!("home/{long}/{long}"), "long\n");
        symlink("../../secret", root.join("home/out")).unwrap();
        symlink(&long, root.join("home/long")).unwrap();
        let mode = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(root.join("home/a"), mode).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, root.join("home/fifo"), Mode::RUSR).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("home/sock")).unwrap();
        let opened = FsRoot::open_directory(&root).unwrap();
        (dir, opened)
    }

    fn archive(
        root: &FsRoot,
        paths: &[&str],
        exclude: &[&str],
    ) -> Result<(Vec<u8>, u64, u64), ArchiveError> {
        let texts = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect();
        let wanted = Wanted {
            number: 1,
            paths: texts(paths),
            exclude: texts(exclude),
        };
        let mut out = Vec::new();
        let (entries, skipped) = write(&wanted, root, &mut out)?;
        Ok((out, entries, skipped))
    }

    /// What the system's tar says of it.
    fn tar(args: &[&str], bytes: &[u8], at: &Path) -> String {
        let file = at.join("t.tar");
        std::fs::write(&file, bytes).unwrap();
        let out = std::process::Command::new("tar")
            .arg("-C")
            .arg(at)
            .args(args)
            .arg("-f")
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.is_empty(), "{said}");
        String::from_utf8(out.stdout).unwrap()
    }

    #[test]
    fn a_tar_holds_what_was_asked_for_and_another_program_reads_it() {
        let (dir, root) = world();
        let (bytes, entries, skipped) = archive(&root, &["/home/"], &["/home/b/not"]).unwrap();
        let listed = tar(&["-t"], &bytes, dir.path());
        let long = "x".repeat(120);
        let mut want = vec![
            "home/".to_owned(),
            "home/a".into(),
            "home/b/".into(),
            "home/b/c".into(),
            "home/bnot".into(),
            "home/fifo".into(),
            "home/long".into(),
            "home/out".into(),
            format!("home/{long}/"),
            format!("home/{long}/{long}"),
        ];
        want.sort_unstable();
        let mut have: Vec<_> = listed.lines().map(str::to_owned).collect();
        have.sort_unstable();
        assert_eq!(have, want);
        // The socket is in no tar.
        assert_eq!((entries, skipped), (want.len() as u64, 1));

        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        tar(&["-xp"], &bytes, &out);
        let text = |path: &str| std::fs::read_to_string(out.join(path)).unwrap();
        assert_eq!(text("home/a"), "first\n");
        assert_eq!(text("home/b/c"), "second\n");
        assert_eq!(text(&format!("home/{long}/{long}")), "long\n");
        let link = |path: &str| std::fs::read_link(out.join(path)).unwrap();
        assert_eq!(link("home/out"), Path::new("../../secret"), "not followed");
        assert_eq!(link("home/long"), Path::new(&long));
        let mode = std::fs::metadata(out.join("home/a")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o7777, 0o640);
    }

    #[test]
    fn everything_is_in_it_once_and_a_path_that_is_not_there_is_named() {
        let (dir, root) = world();
        let list = |paths: &[&str], exclude: &[&str]| {
            let (bytes, ..) = archive(&root, paths, exclude).unwrap();
            let listed = tar(&["-t"], &bytes, dir.path());
            listed.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let all = list(&["/"], &[]);
        assert!(all.contains(&"etc/e".to_owned()) && all.contains(&"home/b/not/d".to_owned()));
        assert_eq!(list(&["/home", "/", "//home/a", "/home"], &[]), all);
        assert_eq!(
            list(&["/home/a", "/etc/e", "/home/a"], &[]),
            ["home/a", "etc/e"]
        );
        assert_eq!(list(&["/home/b"], &["/home"]), Vec::<String>::new());
        assert_eq!(list(&["/home/out"], &[]), ["home/out"]);
        for (n, paths) in [
            (1, &["/home", "/none"][..]),
            (0, &["/home/a/x"]),
            (0, &["/home/out/x"]),
            (0, &["/home/.."]),
        ] {
            let refused = archive(&root, paths, &[]).unwrap_err();
            assert!(
                matches!(refused, ArchiveError::Path(m) if m == n),
                "{paths:?}: {refused}"
            );
        }
    }

    #[test]
    fn a_path_through_a_link_stays_inside() {
        let (dir, root) = world();
        symlink("/home", dir.path().join("root/link")).unwrap();
        symlink("/..", dir.path().join("root/up")).unwrap();
        let (bytes, ..) = archive(&root, &["/link/a"], &[]).unwrap();
        assert_eq!(tar(&["-t"], &bytes, dir.path()), "link/a\n");
        let refused = archive(&root, &["/up/secret"], &[]).unwrap_err();
        assert!(matches!(refused, ArchiveError::Path(0)));
    }

    #[test]
    fn pieces_are_whole_sectors_but_for_the_last() {
        let mut pieces = Vec::new();
        let mut out = Pieces::new(|piece: &[u8]| {
            pieces.push(piece.to_vec());
            Ok(())
        });
        let all: Vec<u8> = (0..3 * ARCHIVE_CHUNK_BYTES + 5).map(|n| n as u8).collect();
        for part in all.chunks(1000) {
            out.write_all(part).unwrap();
        }
        out.flush().unwrap();
        out.flush().unwrap();
        drop(out);
        let lengths: Vec<usize> = pieces.iter().map(Vec::len).collect();
        let whole = ARCHIVE_CHUNK_BYTES;
        assert_eq!(lengths, [whole, whole, whole, 5]);
        assert_eq!(pieces.concat(), all);
    }
}
