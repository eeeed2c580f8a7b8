//! Takes the files out of an archive again, each in the place of the one that is there.
//!
//! A file is written beside and put in its place when it is whole; what is not in the archive stays.
//! Every path is resolved inside the workspace's root, whatever the archive says.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};

use crate::fsroot::FsRoot;
use crate::untar::{Head, Kind, Untar};

/// Puts back all of a tar: how many entries were, and how many could not be.
///
/// # Errors
/// The reader's, `InvalidData` for what is no tar, `StorageFull`; what was put back by then stays.
pub fn put_back(from: impl Read, root: &FsRoot) -> io::Result<(u64, u64)> {
    let mut tar = Untar::new(from);
    let (mut entries, mut skipped) = (0, 0);
    while let Some(head) = tar.next_entry()? {
        match entry(root, &head, &mut tar) {
            Ok(()) => entries += 1,
            Err(Refused::Entry) => skipped += 1,
            Err(Refused::All(e)) => return Err(e),
        }
    }
    Ok((entries, skipped))
}

enum Refused {
    /// This one.
    Entry,
    /// Every other as well.
    All(io::Error),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::All(e),
            _ => Self::Entry,
        }
    }
}

impl From<rustix::io::Errno> for Refused {
    fn from(e: rustix::io::Errno) -> Self {
        io::Error::from(e).into()
    }
}

fn entry(root: &FsRoot, head: &Head, content: &mut impl Read) -> Result<(), Refused> {
    let name = std::str::from_utf8(&head.name).map_err(|_| Refused::Entry)?;
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| matches!(*part, "." | "..")) {
        return Err(Refused::Entry);
    }
    let path = format!("/{}", parts.join("/"));
    let dir = path
        .rfind('/')
        .filter(|at| *at > 0)
        .map_or("/", |at| &path[..at]);
    let open = Mode::from_raw_mode(0o755);
    root.create_dir_all(dir, open)?;
    match &head.kind {
        Kind::Directory => {
            root.create_dir_all(&path, open)?;
            attributes(&itself(root, &path)?, head)
        }
        Kind::File(size) => {
            let mut staged = root.stage(&path, Mode::RUSR | Mode::WUSR)?;
            let copied = copy(content, &mut staged.file, *size)?;
            if copied != *size {
                return Err(Refused::All(io::ErrorKind::UnexpectedEof.into()));
            }
            attributes(&staged.file, head)?;
            Ok(staged.commit()?)
        }
        Kind::Symlink(target) => in_place(root, &path, |parent, name| {
            rustix::fs::symlinkat(&target[..], parent, name)?;
            let [uid, gid] = owner(head);
            let no_follow = AtFlags::SYMLINK_NOFOLLOW;
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            rustix::fs::chownat(parent, name, owner.0, owner.1, no_follow)?;
            rustix::fs::utimensat(parent, name, &times(head), no_follow)
        }),
        Kind::Fifo => {
            in_place(root, &path, |parent, name| {
                rustix::fs::mkfifoat(parent, name, Mode::RUSR | Mode::WUSR)
            })?;
            attributes(&itself(root, &path)?, head)
        }
        Kind::Other => Err(Refused::Entry),
    }
}

/// The entry itself, whatever it is; a link in its place is refused: what it leads to is another.
fn itself(root: &FsRoot, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW;
    root.open(path, flags, Mode::empty())
}

/// Copies so many bytes; errors of the reader end all, of the writer this one.
fn copy(from: &mut impl Read, to: &mut impl io::Write, size: u64) -> Result<u64, Refused> {
    let mut buffer = vec![0; 64 << 10];
    let mut copied = 0;
    while copied < size {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Refused::All(e)),
        };
        to.write_all(&buffer[..n])?;
        copied += n as u64;
    }
    Ok(copied)
}

/// Makes something beside `path` and puts it in its place.
fn in_place(
    root: &FsRoot,
    path: &str,
    make: impl Fn(&OwnedFd, &OsString) -> rustix::io::Result<()>,
) -> Result<(), Refused> {
    let (parent, name) = root.open_parent(path)?.ok_or(Refused::Entry)?;
    let random = hex::encode(seal::random::bytes::<8>());
    let beside = OsString::from(format!(".casemate-{random}.tmp"));
    let made = make(&parent, &beside)
        .and_then(|()| rustix::fs::renameat(&parent, &beside, &parent, &name));
    if made.is_err() {
        // If even that fails, an entry of ours is left, which is the least of the troubles.
        let _ = rustix::fs::unlinkat(&parent, &beside, AtFlags::empty());
    }
    Ok(made?)
}

/// Owner, mode and time of what is open.
fn attributes(of: impl AsFd, head: &Head) -> Result<(), Refused> {
    let [uid, gid] = owner(head);
    rustix::fs::fchown(&of, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    // After the owner: that takes setuid away.
    rustix::fs::fchmod(&of, Mode::from_raw_mode(head.mode))?;
    Ok(rustix::fs::futimens(&of, &times(head))?)
}

/// The last number is none that can be an owner: it would change nothing.
fn owner(head: &Head) -> [u32; 2] {
    [head.uid, head.gid].map(|id| if id == u32::MAX { 0 } else { id })
}

fn times(head: &Head) -> Timestamps {
    let at = Timespec {
        tv_sec: head.mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: at,
        last_modification: at,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::archive::{Wanted, write};
    use proptest::prelude::*;
    use rustix::fs::CWD;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::path::Path;

    fn world() -> (tempfile::TempDir, FsRoot) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let root = FsRoot::open_directory(&dir.path().join("root")).unwrap();
        (dir, root)
    }

    fn archive(root: &FsRoot) -> Vec<u8> {
        let wanted = Wanted {
            number: 1,
            paths: vec!["/".into()],
            exclude: vec![],
        };
        let mut out = Vec::new();
        write(&wanted, root, &mut out).unwrap();
        out
    }

    #[test]
    fn what_was_archived_is_there_again_and_the_rest_stays() {
        let (dir, from) = world();
        let at = |path: &str| dir.path().join("root").join(path);
        let long = "n".repeat(150);
        std::fs::create_dir_all(at("a").join(&long)).unwrap();
        std::fs::write(at("a/x"), "first").unwrap();
        std::fs::write(at("a").join(&long).join(&long), vec![7; 100_000]).unwrap();
        std::fs::set_permissions(at("a/x"), std::fs::Permissions::from_mode(0o4750)).unwrap();
        symlink("/nowhere/else", at("a/link")).unwrap();
        rustix::fs::mkfifoat(CWD, at("fifo"), Mode::RUSR).unwrap();
        let tar = archive(&from);

        let (other, to) = world();
        let there = |path: &str| other.path().join("root").join(path);
        std::fs::create_dir(there("a")).unwrap();
        std::fs::write(there("a/x"), "changed").unwrap();
        std::fs::write(there("a/link"), "was a file").unwrap();
        std::fs::write(there("a/stays"), "").unwrap();
        let (entries, skipped) = put_back(&tar[..], &to).unwrap();
        assert_eq!((entries, skipped), (6, 0));
        assert_eq!(std::fs::read_to_string(there("a/x")).unwrap(), "first");
        let (was, is) = (
            at("a/x").metadata().unwrap(),
            there("a/x").metadata().unwrap(),
        );
        assert_eq!(
            (is.mode(), is.uid(), is.mtime()),
            (was.mode(), was.uid(), was.mtime())
        );
        assert_eq!(
            std::fs::read_link(there("a/link")).unwrap(),
            Path::new("/nowhere/else")
        );
        let large = std::fs::read(there("a").join(&long).join(&long)).unwrap();
        assert_eq!(large, vec![7; 100_000]);
        assert!(there("a/stays").exists() && there("fifo").exists());
        let beside = std::fs::read_dir(there("a")).unwrap().flatten();
        assert_eq!(beside.filter(|e| e.path().extension().is_some()).count(), 0);
        // Once more, over itself.
        assert_eq!(put_back(&tar[..], &to).unwrap(), (6, 0));
    }

    #[test]
    fn another_program_s_tar_is_put_back_too() {
        let (dir, root) = world();
        std::fs::create_dir_all(dir.path().join("in/d")).unwrap();
        std::fs::write(dir.path().join("in/d/f"), "text").unwrap();
        let out = std::process::Command::new("tar")
            .args(["--format=pax", "-cf", "-", "-C"])
            .arg(dir.path())
            .arg("in")
            .output()
            .unwrap();
        let (entries, skipped) = put_back(&out.stdout[..], &root).unwrap();
        assert_eq!((entries, skipped), (3, 0));
        let text = std::fs::read_to_string(dir.path().join("root/in/d/f"));
        assert_eq!(text.unwrap(), "text");
    }

    #[test]
    fn nothing_is_put_outside_of_the_root() {
        let (dir, root) = world();
        symlink("/../..", dir.path().join("root/up")).unwrap();
        let (from_dir, from) = world();
        std::fs::create_dir(from_dir.path().join("root/up")).unwrap();
        std::fs::write(from_dir.path().join("root/up/x"), "x").unwrap();
        put_back(&archive(&from)[..], &root).unwrap();
        assert!(!dir.path().join("x").exists());
        assert!(
            dir.path().join("root/x").exists(),
            "the link leads to the root itself"
        );
        let mut evil = archive(&from);
        // The first header's name, with its checksum made anew.
        for name in [&b"../x"[..], b"a/../../x"] {
            evil[..100].fill(0);
            evil[..name.len()].copy_from_slice(name);
            evil[148..156].fill(b' ');
            let sum: u64 = evil[..512].iter().map(|b| u64::from(*b)).sum();
            evil[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let (_, skipped) = put_back(&evil[..], &root).unwrap();
            assert_eq!(skipped, 1);
        }
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn a_tar_that_is_cut_off_or_flipped_is_an_error() {
        let (dir, from) = world();
        std::fs::write(dir.path().join("root/x"), vec![1; 3_000]).unwrap();
        let tar = archive(&from);
        let (_other, to) = world();
        for cut in [0, 100, 512, 700, 3_500, tar.len() - 1024] {
            assert!(put_back(&tar[..cut], &to).is_err(), "{cut}");
        }
        let mut flipped = tar;
        flipped[0] ^= 1;
        let e = put_back(&flipped[..], &to).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn any_change_is_survived_inside_the_root(at: usize, with: u8, sums: bool) {
            let (dir, from) = world();
            std::fs::write(dir.path().join("root").join("y".repeat(120)), "text").unwrap();
            symlink("/z", dir.path().join("root/link")).unwrap();
            let mut tar = archive(&from);
            let at = at % tar.len();
            tar[at] = with;
            if sums {
                for block in tar.chunks_mut(512) {
                    block[148..156].fill(b' ');
                    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
            let (other, to) = world();
            let _ = put_back(&tar[..], &to);
            prop_assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
        }
    }
}
