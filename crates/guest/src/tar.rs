//! Writes a tar: POSIX ustar, with pax records where its fields are too small.
//!
//! What is written is read by any tar. Names are relative (`root/a`, for `/root/a`), as are its
//! directories with a `/` at their end; owners are numbers.

use std::io::{self, Read, Write};

use rustix::fs::{FileType, Stat};

/// One block, bytes.
const BLOCK: usize = 512;
/// Longest name of a header without a pax record, bytes.
const NAME_BYTES: usize = 100;
/// Largest number in eleven octal digits.
const OCTAL_11_MAX: u64 = 0o777_7777_7777;
/// Largest number in seven octal digits.
const OCTAL_7_MAX: u64 = 0o777_7777;

/// A tar on its way to `out`.
pub struct Tar<W> {
    out: W,
}

impl<W: Write> Tar<W> {
    /// An empty one.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Everything but a regular file: a directory, a symlink (`target`), a device, a FIFO. Whether it
    /// can be in a tar: a socket can't.
    ///
    /// # Errors
    /// The output's.
    pub fn entry(&mut self, name: &[u8], stat: &Stat, target: &[u8]) -> io::Result<bool> {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => b'5',
            FileType::Symlink => b'2',
            FileType::CharacterDevice => b'3',
            FileType::BlockDevice => b'4',
            FileType::Fifo => b'6',
            _ => return Ok(false),
        };
        self.header(name, stat, kind, 0, target)?;
        Ok(true)
    }

    /// A regular file of as many bytes as `stat` says, whatever has become of it since: what is
    /// missing is zeros. Whether nothing was missing.
    ///
    /// # Errors
    /// The output's.
    pub fn file(&mut self, name: &[u8], stat: &Stat, content: impl Read) -> io::Result<bool> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.header(name, stat, b'0', size, b"")?;
        let mut content = content.take(size);
        let mut buffer = vec![0; 64 << 10];
        let mut left = size;
        while left > 0 {
            let n = match content.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            self.out.write_all(&buffer[..n])?;
            left -= n as u64;
        }
        let whole = left == 0;
        buffer.fill(0);
        while left > 0 {
            let n = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            self.out.write_all(&buffer[..n])?;
            left -= n as u64;
        }
        self.pad(size)?;
        Ok(whole)
    }

    /// Its end: two blocks of zeros.
    ///
    /// # Errors
    /// The output's.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }

    fn header(
        &mut self,
        name: &[u8],
        stat: &Stat,
        kind: u8,
        size: u64,
        target: &[u8],
    ) -> io::Result<()> {
        let mut records = Vec::new();
        if name.len() > NAME_BYTES {
            record(&mut records, "path", name);
        }
        if target.len() > NAME_BYTES {
            record(&mut records, "linkpath", target);
        }
        let (uid, gid) = (u64::from(stat.st_uid), u64::from(stat.st_gid));
        for (key, number, max) in [
            ("size", size, OCTAL_11_MAX),
            ("uid", uid, OCTAL_7_MAX),
            ("gid", gid, OCTAL_7_MAX),
        ] {
            if number > max {
                record(&mut records, key, number.to_string().as_bytes());
            }
        }
        let mtime = u64::try_from(stat.st_mtime).ok();
        if mtime.is_none_or(|seconds| seconds > OCTAL_11_MAX) {
            record(&mut records, "mtime", stat.st_mtime.to_string().as_bytes());
        }
        if !records.is_empty() {
            let mut block = Block::new(b"././@PaxHeader", b'x', records.len() as u64);
            block.octal(100, 7, 0o644);
            self.out.write_all(&block.done())?;
            self.out.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        let mut block = Block::new(name, kind, size);
        block.octal(100, 7, u64::from(stat.st_mode & 0o7777));
        block.octal(108, 7, uid);
        block.octal(116, 7, gid);
        block.octal(136, 11, mtime.unwrap_or(0));
        block.bytes(157, NAME_BYTES, target);
        if matches!(kind, b'3' | b'4') {
            block.octal(329, 7, u64::from(rustix::fs::major(stat.st_rdev)));
            block.octal(337, 7, u64::from(rustix::fs::minor(stat.st_rdev)));
        }
        self.out.write_all(&block.done())
    }

    /// Fills the last block of `size` bytes.
    fn pad(&mut self, size: u64) -> io::Result<()> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if over > 0 {
            self.out.write_all(&[0; BLOCK][over..])?;
        }
        Ok(())
    }
}

struct Block([u8; BLOCK]);

impl Block {
    fn new(name: &[u8], kind: u8, size: u64) -> Self {
        let mut block = Self([0; BLOCK]);
        block.bytes(0, NAME_BYTES, name);
        block.octal(124, 11, size);
        block.0[156] = kind;
        block.0[257..265].copy_from_slice(b"ustar\x0000");
        block
    }

    /// Text of at most `max` bytes; what is longer is in a pax record.
    fn bytes(&mut self, at: usize, max: usize, text: &[u8]) {
        let n = text.len().min(max);
        self.0[at..at + n].copy_from_slice(&text[..n]);
    }

    /// A number in so many octal digits; one that is too large is in a pax record.
    fn octal(&mut self, at: usize, digits: usize, mut number: u64) {
        for place in (at..at + digits).rev() {
            self.0[place] = b'0' + (number & 7) as u8;
            number >>= 3;
        }
    }

    /// With its checksum: the sum of its bytes, with spaces in the checksum's place.
    fn done(mut self) -> [u8; BLOCK] {
        self.0[148..156].fill(b' ');
        let sum = self.0.iter().map(|b| u64::from(*b)).sum();
        self.octal(148, 6, sum);
        self.0[154] = 0;
        self.0
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_record_counts_its_own_length() {
        for n in [1, 80, 88, 89, 90, 91, 92, 980, 990, 4095] {
            let mut records = Vec::new();
            record(&mut records, "path", &vec![b'a'; n]);
            let text = String::from_utf8(records).unwrap();
            let length: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(length, text.len());
        }
    }

    #[test]
    fn what_a_file_lost_meanwhile_is_zeros_and_what_it_gained_is_left_out() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1000).unwrap();
        let stat = rustix::fs::fstat(&file).unwrap();
        for (have, whole) in [(0, false), (999, false), (1000, true), (5000, true)] {
            let mut tar = Tar::new(Vec::new());
            assert_eq!(tar.file(b"x", &stat, &vec![7; have][..]).unwrap(), whole);
            let out = tar.finish().unwrap();
            assert_eq!(out.len(), BLOCK + 1024 + 2 * BLOCK);
            let sevens = out[BLOCK..].iter().filter(|b| **b == 7).count();
            assert_eq!(sevens, have.min(1000));
        }
    }

    proptest! {
        #[test]
        fn every_name_makes_whole_blocks(name in proptest::collection::vec(1u8.., 1..300)) {
            let dir = tempfile::tempdir().unwrap();
            let stat = rustix::fs::stat(dir.path()).unwrap();
            let mut tar = Tar::new(Vec::new());
            prop_assert!(tar.entry(&name, &stat, b"").unwrap());
            prop_assert!(tar.finish().unwrap().len().is_multiple_of(BLOCK));
        }
    }
}
