//! Where ciphertext rests. A trait, so that tests can put a power cut there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

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
