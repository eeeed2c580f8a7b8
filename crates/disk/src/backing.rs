//! Where ciphertext rests. A trait, so that tests can put a power cut there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use crate::limits::{DIRECT_MIN_BYTES, SECTOR_BYTES};

/// A sparse file of ciphertext. Offsets are bytes from its start.
pub trait Backing: Send + Sync {
    /// Fills `buf`; what lies beyond the end reads as zeros.
    ///
    /// # Errors
    /// The kernel's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `buf`. It is durable after the next [`Backing::sync`].
    ///
    /// # Errors
    /// The kernel's, `ENOSPC` among them; a part may be written then.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Makes a range a hole that reads as zeros, keeping the length.
    ///
    /// # Errors
    /// The kernel's.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Asks the store to begin writing what is only in memory, and waits for nothing. It promises
    /// nothing: what fails on the way is said by the next [`Backing::sync`].
    fn write_out(&self) {}
    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The kernel's; what was written before may be lost, whatever a later call answers.
    fn sync(&self) -> io::Result<()>;
    /// Length in bytes.
    ///
    /// # Errors
    /// The kernel's.
    fn length(&self) -> io::Result<u64>;
    /// Cuts or extends (with a hole) to `len` bytes.
    ///
    /// # Errors
    /// The kernel's.
    fn set_len(&self, len: u64) -> io::Result<()>;
}

impl Backing for File {
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match FileExt::read_at(self, buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write_all_at(buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(self, flags, offset, len)?)
    }

    fn write_out(&self) {
        // SAFETY: takes numbers only, and the descriptor is open as long as `self` is. From 0 to 0
        // means the whole file. Its error is not lost: the kernel keeps it for the next fdatasync.
        let _kept =
            unsafe { libc::sync_file_range(self.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(self, rustix::fs::SeekFrom::End(0))?)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
}

/// A file of ciphertext that is read through the host's page cache, and written past it where that is
/// worth a wait for the device: whoever writes much does not fill the cache with what the guest's own
/// has already, and a neighbour's flush does not wait for it.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    /// The same file, opened with `O_DIRECT`.
    direct: Option<File>,
}

impl DataFile {
    /// `direct` is the same file opened with `O_DIRECT`, where its file system has that.
    #[must_use]
    pub fn new(file: File, direct: Option<File>) -> Self {
        Self { file, direct }
    }

    /// The file, through the page cache.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl From<File> for DataFile {
    fn from(file: File) -> Self {
        Self::new(file, None)
    }
}

impl Backing for DataFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        Backing::read_at(&self.file, offset, buf)
    }

    /// The kernel keeps both ways in step: what the cache has of the range is written before, and
    /// let go after.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let aligned = buf.as_ptr().align_offset(SECTOR_BYTES) == 0
            && offset.is_multiple_of(SECTOR_BYTES as u64)
            && buf.len().is_multiple_of(SECTOR_BYTES);
        match &self.direct {
            Some(direct) if aligned && buf.len() >= DIRECT_MIN_BYTES => {
                match direct.write_all_at(buf, offset) {
                    // Its alignment is another's than ours.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                        self.file.write_all_at(buf, offset)
                    }
                    written => written,
                }
            }
            _ => self.file.write_all_at(buf, offset),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.punch(offset, len)
    }

    fn write_out(&self) {
        self.file.write_out();
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Backing::set_len(&self.file, len)
    }
}

/// Where the first data at or behind `from` begins, if there is any (`SEEK_DATA`).
///
/// # Errors
/// The kernel's.
pub fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the data at `from` ends (`SEEK_HOLE`).
///
/// # Errors
/// The kernel's.
pub fn next_hole(file: &File, from: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(from))?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::OpenOptionsExt as _;

    const FILE_BYTES: usize = 256 << 10;

    #[repr(C, align(4096))]
    struct Aligned([u8; FILE_BYTES]);

    /// Beside the executable: where temporary files are may be memory.
    fn file() -> (tempfile::NamedTempFile, DataFile) {
        let exe = std::env::current_exe().unwrap();
        let named = tempfile::NamedTempFile::new_in(exe.parent().unwrap()).unwrap();
        let mut options = File::options();
        options.write(true).custom_flags(libc::O_DIRECT);
        let direct = options.open(named.path()).unwrap();
        let data = DataFile::new(named.reopen().unwrap(), Some(direct));
        (named, data)
    }

    /// Whether a page is in the page cache.
    fn is_cached(file: &DataFile, offset: i64) -> bool {
        let mut page = [0u8; SECTOR_BYTES];
        let to = libc::iovec {
            iov_base: page.as_mut_ptr().cast(),
            iov_len: page.len(),
        };
        let (fd, now) = (file.file().as_raw_fd(), libc::RWF_NOWAIT);
        // SAFETY: one buffer of the length that is said, which outlives the call.
        unsafe { libc::preadv2(fd, &raw const to, 1, offset, now) == SECTOR_BYTES as isize }
    }

    #[test]
    fn long_runs_leave_nothing_in_the_page_cache_and_short_ones_wait_there() {
        let ((_named, file), bytes) = (file(), Box::new(Aligned([7; FILE_BYTES])));
        let long = &bytes.0[..DIRECT_MIN_BYTES];
        file.write_at(0, long).unwrap();
        assert!(!is_cached(&file, 0));
        file.write_at(0, &bytes.0[..SECTOR_BYTES]).unwrap();
        assert!(is_cached(&file, 0));
        // What can't go past it goes through it.
        file.write_at(1 << 20, &bytes.0[1..=DIRECT_MIN_BYTES])
            .unwrap();
        assert!(is_cached(&file, 1 << 20));
        // And what it has goes out of date nowhere.
        file.write_at(0, &[8; SECTOR_BYTES]).unwrap();
        file.write_at(0, long).unwrap();
        let mut read = [0; SECTOR_BYTES];
        file.read_at(0, &mut read).unwrap();
        assert_eq!(read, [7; SECTOR_BYTES]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn is_an_array_of_bytes_whichever_way_it_is_written(
            writes in proptest::collection::vec((0..64usize, 1..64usize, any::<bool>(), 1u8..), 1..20),
        ) {
            let ((_named, file), mut bytes) = (file(), Box::new(Aligned([0; FILE_BYTES])));
            let mut model = vec![0; FILE_BYTES];
            for (at, sectors, aligned, byte) in writes {
                let (at, len) = (at * SECTOR_BYTES, sectors * SECTOR_BYTES);
                let len = len.min(FILE_BYTES - at);
                let from = usize::from(!aligned);
                let data = &mut bytes.0[from..(from + len).min(FILE_BYTES)];
                data.fill(byte);
                file.write_at(at as u64, data).unwrap();
                model[at..at + data.len()].fill(byte);
                let mut read = vec![0xff; FILE_BYTES];
                file.read_at(0, &mut read).unwrap();
                prop_assert!(read == model);
            }
        }
    }
}
