//! For `cargo xtask bench disk`: serves a file over FUSE at a path, to measure with and without
//! cipher and integrity. No sandbox, no grant, no limits, no identity in front: never for data that
//! matters.
//!
//! `serve encrypted|plain BACKING FROM MOUNTPOINT`: BACKING (and BACKING.tags) becomes a copy of
//! the file FROM; MOUNTPOINT is a file. Says `ready`, and serves until its standard input ends.

#![allow(unsafe_code)] // FUSE_DEV_IOC_CLONE.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use disk::backing::{Backing, DataFile, next_data, next_hole};
use disk::bucket::Limiter;
use disk::fuse::{Content, Serving, Worker};
use disk::limits::{BYTES_PER_S, DATA_OFFSET_BYTES, OPS_PER_S, REQUEST_MAX_BYTES, WORKERS};
use disk::luks2::VolumeKey;
use disk::sidecar::{Keys, Sidecar};
use disk::volume::Volume;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, backing, from, at] = &args[..] else {
        return Err("usage: serve encrypted|plain BACKING FROM MOUNTPOINT".into());
    };
    let from = File::open(from)?;
    let size_bytes = from.metadata()?.len();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let tags = format!("{backing}.tags");
    let file = options.open(backing)?;
    let direct = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(backing)?;
    let backing = DataFile::new(file, Some(direct));
    backing.set_len(DATA_OFFSET_BYTES + size_bytes)?;
    match kind.as_str() {
        "encrypted" => {
            let keys = || Keys::derive(&[7; 32]);
            let sectors = size_bytes / 4096;
            Sidecar::create(options.open(&tags)?.into(), keys()?, sectors, 1)?.finish(&backing)?;
            let tags = File::options().read(true).write(true).open(tags)?;
            let sidecar = Sidecar::open(tags.into(), &backing, keys()?, sectors, 2, None)?;
            let key = VolumeKey::random();
            let volume = Volume::with_sidecar(backing, sidecar, &key, size_bytes)?;
            let draining = volume.clone();
            std::thread::spawn(move || draining.drain_as_due());
            serve(&from, Path::new(at), || Encrypted(volume.clone()))
        }
        "plain" => {
            let backing = Arc::new(backing);
            let plain = || Plain(Arc::clone(&backing), size_bytes);
            serve(&from, Path::new(at), plain)
        }
        other => Err(format!("no kind {other:?}").into()),
    }
}

fn serve<C: Content + Send + 'static>(
    from: &File,
    at: &Path,
    content: impl Fn() -> C,
) -> Result<(), Box<dyn Error>> {
    copy(from, &content())?;
    let open = || File::options().read(true).write(true).open("/dev/fuse");
    let first = open()?;
    let options = format!(
        "fd={},rootmode=100000,user_id=0,group_id=0",
        first.as_raw_fd()
    );
    let options = std::ffi::CString::new(options)?;
    mount("bench", at, "fuse", MountFlags::empty(), Some(&*options))?;
    let limiter = Limiter::new(*BYTES_PER_S.end(), *OPS_PER_S.end());
    let serving = Arc::new(Serving::new(None, limiter));
    let mut queues = vec![first];
    while queues.len() < WORKERS {
        let more = open()?;
        let source = u32::try_from(queues[0].as_raw_fd())?;
        // SAFETY: the call reads one u32, which outlives it; both descriptors are open.
        let done = unsafe { libc::ioctl(more.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const source) };
        if done != 0 {
            return Err(io::Error::last_os_error().into());
        }
        queues.push(more);
    }
    for queue in queues {
        let mut worker = Worker::new(Arc::new(queue), content(), Arc::clone(&serving));
        std::thread::spawn(move || worker.serve());
    }
    println!("ready");
    let _asked_to_end = io::stdin().read(&mut [0])?;
    unmount(at, UnmountFlags::DETACH)?;
    Ok(())
}

/// Copies what is no hole.
fn copy(from: &File, to: &impl Content) -> io::Result<()> {
    let mut buf = vec![0; REQUEST_MAX_BYTES];
    let mut at = 0;
    while let Some(begin) = next_data(from, at)? {
        at = begin;
        let end = next_hole(from, at)?;
        while at < end {
            let n = usize::try_from(end - at).map_or(buf.len(), |left| left.min(buf.len()));
            from.read_exact_at(&mut buf[..n], at)?;
            to.write(at, &mut buf[..n])?;
            at += n as u64;
        }
    }
    to.sync()
}

/// What a read at the end of `size_bytes` gets of `len`.
fn within(size_bytes: u64, offset: u64, len: usize) -> usize {
    let left = size_bytes.saturating_sub(offset);
    usize::try_from(left).map_or(len, |left| left.min(len))
}

/// A volume as it is.
struct Encrypted(Volume<DataFile>);

impl Content for Encrypted {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let n = within(self.0.size_bytes(), offset, buf.len());
        self.0.read(offset, &mut buf[..n]).map(|()| n)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// The same file at the same place without a cipher, locks or holes: the least there can be.
struct Plain(Arc<DataFile>, u64);

impl Content for Plain {
    fn size_bytes(&self) -> u64 {
        self.1
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let n = within(self.1, offset, buf.len());
        Backing::read_at(&*self.0, DATA_OFFSET_BYTES + offset, &mut buf[..n]).map(|()| n)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        Backing::write_at(&*self.0, DATA_OFFSET_BYTES + offset, data)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(DATA_OFFSET_BYTES + offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}
