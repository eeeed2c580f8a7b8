//! A strict reader of tar streams: ustar, pax and GNU's long names, read in the one way in which
//! every reader reads them. What readers could disagree about is refused: that is where archives
//! hide entries (a pax size that is not the header's, sparse maps, data after the end).
//!
//! Must never allocate by a length that the archive says without its bound.

use crate::error::{Code, Refusal};
use crate::limits::{PATH_MAX_BYTES, TAR_HEADER_MAX_BYTES, XATTR_MAX_BYTES, XATTRS_MAX};
use std::io::{self, Read};

type Result<T> = std::result::Result<T, Refusal>;

const BLOCK: usize = 512;
/// Largest size that eleven octal digits hold, bytes.
const OCTAL_MAX: u64 = 0o77_777_777_777;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file; its contents follow.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A hard link.
    Link,
    /// A named pipe.
    Fifo,
    /// A character device, block device or socket.
    Device,
}

/// One entry.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name as it is written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change, s since the epoch; 0 if before it.
    pub mtime: u64,
    /// Length of the contents, bytes.
    pub size: u64,
    /// Where a link leads.
    pub link: Vec<u8>,
    /// Extended attributes by full name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries, one after the other.
pub struct Reader<R> {
    inner: R,
    /// Of the current entry.
    left: u64,
    padding: u64,
    done: bool,
}

/// What headers before an entry say of it.
#[derive(Default)]
struct Extra {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pax: bool,
}

impl<R: Read> Reader<R> {
    /// A reader of this stream.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            left: 0,
            padding: 0,
            done: false,
        }
    }

    /// The next entry; what was left of the last one's contents is passed over.
    ///
    /// # Errors
    /// See [`Code`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.pass()?;
        let mut extra = Extra::default();
        loop {
            let Some(header) = self.header()? else {
                if extra.pax || extra.path.is_some() || extra.link.is_some() {
                    return Err(malformed("a header of an entry that does not follow"));
                }
                return Ok(None);
            };
            let size = number(&header[124..136], "size")?;
            match header[156] {
                b'x' => {
                    if extra.pax {
                        return Err(malformed("two pax headers for one entry"));
                    }
                    extra.pax = true;
                    let bytes = self.small(size)?;
                    extra.records(&bytes)?;
                }
                b'g' => {
                    let bytes = self.small(size)?;
                    for record in Records(&bytes) {
                        // What `git archive` writes. Others change entries far away.
                        if record?.0 != b"comment" {
                            return Err(unsupported("a global pax header"));
                        }
                    }
                }
                b'L' => once(&mut extra.path, self.long(size)?)?,
                b'K' => once(&mut extra.link, self.long(size)?)?,
                _ => return self.entry(&header, size, extra).map(Some),
            }
        }
    }

    /// Reads contents of the current entry; 0 at their end.
    ///
    /// # Errors
    /// The stream's, and a stream that ends too soon.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let max = usize::try_from(self.left).unwrap_or(usize::MAX);
        let len = buf.len().min(max);
        if len == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buf[..len])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }

    /// Reads to the stream's end: nothing but zeros may follow the last entry.
    ///
    /// # Errors
    /// If something does.
    pub fn finish(mut self) -> Result<R> {
        let mut buf = [0; 16 << 10];
        loop {
            let n = self.inner.read(&mut buf).map_err(stream)?;
            if n == 0 {
                return Ok(self.inner);
            }
            if buf[..n].iter().any(|b| *b != 0) {
                return Err(malformed("data after the archive's end"));
            }
        }
    }

    fn entry(&mut self, header: &[u8; BLOCK], size: u64, extra: Extra) -> Result<Entry> {
        let kind = match header[156] {
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::Link,
            b'2' => Kind::Symlink,
            b'3' | b'4' => Kind::Device,
            b'5' => Kind::Dir,
            b'6' => Kind::Fifo,
            b'S' => return Err(unsupported("a sparse file").at(&name(header))),
            other => {
                let what = format!("an entry of type {:?}", char::from(other));
                return Err(unsupported(&what).at(&name(header)));
            }
        };
        let path = match extra.path {
            Some(path) => path,
            None => name(header),
        };
        let at = |r: Refusal| r.at(&path);
        let size = match extra.size {
            // Readers differ in which one they take: only a size that the header can't hold.
            Some(pax) if pax != size && !(pax > OCTAL_MAX && size == 0) => {
                let what = format!("the pax header says {pax} bytes, the header {size}");
                return Err(at(malformed(&what)));
            }
            Some(pax) => pax,
            None => size,
        };
        if kind != Kind::File && size != 0 {
            return Err(at(malformed("an entry without contents has a size")));
        }
        let id = |field: &[u8], pax: Option<u64>, what: &str| -> Result<u32> {
            let value = match pax {
                Some(value) => value,
                None => number(field, what)?,
            };
            // The largest one means "none" to chown(2).
            let fits = u32::try_from(value).ok().filter(|v| *v != u32::MAX);
            fits.ok_or_else(|| malformed(&format!("{what} {value} is none")))
        };
        let mode = number(&header[100..108], "mode").map_err(at)?;
        let mtime = match extra.mtime {
            Some(mtime) => mtime,
            None => number_or_negative(&header[136..148]).map_err(at)?,
        };
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(Entry {
            kind,
            // The rest of the field is the kind again, in some writers' archives.
            mode: u16::try_from(mode & 0o7777).unwrap_or_default(),
            uid: id(&header[108..116], extra.uid, "uid").map_err(at)?,
            gid: id(&header[116..124], extra.gid, "gid").map_err(at)?,
            mtime,
            size,
            link: extra.link.unwrap_or_else(|| text(&header[157..257])),
            xattrs: extra.xattrs,
            path,
        })
    }

    /// A header with the right checksum; none at the archive's end.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        if self.done {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        if !self.fill(&mut block)? {
            // Some writers leave the two blocks of zeros out.
            self.done = true;
            return Ok(None);
        }
        if block.iter().all(|b| *b == 0) {
            self.done = true;
            if self.fill(&mut block)? && block.iter().any(|b| *b != 0) {
                return Err(malformed("data after the archive's end"));
            }
            return Ok(None);
        }
        if block[257..262] != *b"ustar" {
            return Err(malformed("a header without the ustar magic"));
        }
        let said = number(&block[148..156], "checksum")?;
        let sum = |range: &[u8]| range.iter().map(|b| u64::from(*b)).sum::<u64>();
        if said != sum(&block[..148]) + 8 * u64::from(b' ') + sum(&block[156..]) {
            return Err(malformed("a header's checksum is wrong"));
        }
        Ok(Some(block))
    }

    /// Fills the block; false if the stream ended before it.
    fn fill(&mut self, block: &mut [u8]) -> Result<bool> {
        let mut at = 0;
        while at < block.len() {
            match self.inner.read(&mut block[at..]) {
                Ok(0) if at == 0 => return Ok(false),
                Ok(0) => return Err(malformed("the archive ends within a block")),
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(stream(e)),
            }
        }
        Ok(true)
    }

    /// Passes over what is left of the current entry.
    fn pass(&mut self) -> Result<()> {
        let mut left = self.left + std::mem::take(&mut self.padding);
        self.left = 0;
        let mut buf = [0; 16 << 10];
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
            let n = self.inner.read(&mut buf[..want]).map_err(stream)?;
            if n == 0 {
                return Err(malformed("the archive ends within an entry"));
            }
            left -= n as u64;
        }
        Ok(())
    }

    /// Contents of an entry that says something of the next one.
    fn small(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > TAR_HEADER_MAX_BYTES {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("a header of {size} bytes; at most {TAR_HEADER_MAX_BYTES}"),
            ));
        }
        let len = usize::try_from(size).unwrap_or_default();
        let mut bytes = vec![0; len.next_multiple_of(BLOCK)];
        if !bytes.is_empty() && !self.fill(&mut bytes)? {
            return Err(malformed("the archive ends within a header"));
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    /// A GNU long name: ends with one NUL.
    fn long(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > PATH_MAX_BYTES as u64 + 1 {
            return Err(Refusal::new(
                Code::PathTooLong,
                format!("a name of {size} bytes; at most {PATH_MAX_BYTES}"),
            ));
        }
        let mut bytes = self.small(size)?;
        if bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(bytes)
    }
}

impl Extra {
    fn records(&mut self, bytes: &[u8]) -> Result<()> {
        for record in Records(bytes) {
            let (key, value) = record?;
            let decimal = || -> Result<u64> {
                let text = std::str::from_utf8(value).ok();
                text.filter(|t| t.bytes().all(|b| b.is_ascii_digit()))
                    .and_then(|t| t.parse().ok())
                    .ok_or_else(|| malformed("a pax record is no decimal number"))
            };
            match key {
                b"path" => once(&mut self.path, value.to_vec())?,
                b"linkpath" => once(&mut self.link, value.to_vec())?,
                b"size" => once(&mut self.size, decimal()?)?,
                b"uid" => once(&mut self.uid, decimal()?)?,
                b"gid" => once(&mut self.gid, decimal()?)?,
                b"mtime" => once(&mut self.mtime, time(value)?)?,
                _ if key.starts_with(b"GNU.sparse.") => return Err(unsupported("a sparse file")),
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        self.xattr(name, value)?;
                    }
                    // Others (times of access, names of owners, comments) change nothing here.
                }
            }
        }
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        let wrong = |why: &str| Refusal::new(Code::Xattr, why);
        if self.xattrs.iter().any(|(n, _)| n == name) {
            return Err(wrong("an extended attribute comes twice"));
        }
        self.xattrs.push((name.to_vec(), value.to_vec()));
        let bytes: usize = self.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
        if self.xattrs.len() > XATTRS_MAX || bytes > XATTR_MAX_BYTES {
            return Err(wrong(&format!(
                "a file may have {XATTRS_MAX} extended attributes of {XATTR_MAX_BYTES} bytes"
            )));
        }
        Ok(())
    }
}

/// pax records: `LENGTH KEY=VALUE\n`, the length being the whole record's.
struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = Result<(&'a [u8], &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_none() {
            self.0 = &[];
        }
        Some(record.ok_or_else(|| malformed("a pax record is malformed")))
    }
}

impl<'a> Records<'a> {
    fn record(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let space = self.0.iter().take(10).position(|b| *b == b' ')?;
        let digits = std::str::from_utf8(&self.0[..space]).ok()?;
        if digits.starts_with('0') || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let len: usize = digits.parse().ok()?;
        let record = self.0.get(space + 1..len)?;
        self.0 = &self.0[len..];
        let record = record.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        if equals == 0 {
            return None;
        }
        Some((&record[..equals], &record[equals + 1..]))
    }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<()> {
    if slot.is_some() {
        return Err(malformed("a header says one thing of an entry twice"));
    }
    *slot = Some(value);
    Ok(())
}

/// Name and prefix of a header.
fn name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = text(&header[..100]);
    // GNU's own format keeps times in the prefix.
    if header[257..265] == *b"ustar  \0" || header[345] == 0 {
        return name;
    }
    let mut path = text(&header[345..500]);
    path.push(b'/');
    path.extend(name);
    path
}

fn text(field: &[u8]) -> Vec<u8> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    field[..end].to_vec()
}

/// Octal digits, or GNU's base 256.
fn number(field: &[u8], what: &str) -> Result<u64> {
    let wrong = || malformed(&format!("the header's {what} is no number"));
    match field.first() {
        Some(0x80) => {
            let (high, low) = field.split_at(field.len().saturating_sub(8));
            let mut bytes = [0; 8];
            bytes[8 - low.len()..].copy_from_slice(low);
            if high.is_empty() {
                bytes[0] = 0; // The mark itself.
            }
            if high.iter().skip(1).any(|b| *b != 0) || bytes[0] & 0x80 != 0 {
                return Err(wrong());
            }
            Ok(u64::from_be_bytes(bytes))
        }
        Some(0x81..) => Err(wrong()),
        _ => {
            let digits = field.trim_ascii_start();
            let end = digits
                .iter()
                .position(|b| matches!(b, 0 | b' '))
                .unwrap_or(digits.len());
            if digits[end..].iter().any(|b| !matches!(b, 0 | b' ')) {
                return Err(wrong());
            }
            let mut value = 0u64;
            for digit in &digits[..end] {
                if !(b'0'..=b'7').contains(digit) {
                    return Err(wrong());
                }
                value = value * 8 + u64::from(digit - b'0');
            }
            Ok(value)
        }
    }
}

/// A time: before the epoch is the epoch.
fn number_or_negative(field: &[u8]) -> Result<u64> {
    if field.first() == Some(&0xff) {
        return Ok(0);
    }
    number(field, "mtime").map(in_range)
}

/// `SECONDS[.FRACTION]`; the fraction is dropped.
fn time(value: &[u8]) -> Result<u64> {
    let wrong = || malformed("a pax time is malformed");
    let text = std::str::from_utf8(value).map_err(|_| wrong())?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !seconds
        .bytes()
        .chain(fraction.bytes())
        .all(|b| b.is_ascii_digit())
    {
        return Err(wrong());
    }
    let seconds: u64 = seconds.parse().map_err(|_| wrong())?;
    Ok(if negative { 0 } else { in_range(seconds) })
}

/// Times that ext4 can hold.
fn in_range(seconds: u64) -> u64 {
    seconds.min(u64::from(u32::MAX))
}

fn malformed(why: &str) -> Refusal {
    Refusal::new(Code::TarMalformed, why)
}

fn unsupported(what: &str) -> Refusal {
    Refusal::new(Code::TarUnsupported, format!("{what} is not taken"))
}

/// What the reader below says: a refusal that it carries, or a stream that ends.
pub(crate) fn stream(e: io::Error) -> Refusal {
    match e.downcast::<Refusal>() {
        Ok(refusal) => refusal,
        Err(e) => malformed(&format!("the stream can't be read: {e}")),
    }
}
