//! Reads a tar: what [`crate::tar`] writes, and as much of any other as that is.
//!
//! The tar was the workspace's own, but whoever is root in it may have made it say anything: every
//! length is bounded, every sum is checked.

use std::io::{self, Read};

use crate::limits::PATH_MAX_BYTES;

const BLOCK: usize = 512;
/// Largest pax header, bytes: two paths and some numbers.
const PAX_MAX_BYTES: u64 = 16 << 10;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes, which follow.
    File(u64),
    /// A directory.
    Directory,
    /// A symlink, to this.
    Symlink(Vec<u8>),
    /// A FIFO.
    Fifo,
    /// Anything else: passed over.
    Other,
}

/// The head of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its name, relative.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its mode: permissions alone.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, seconds since the epoch.
    pub mtime: i64,
    /// Bytes that follow, with those that fill the last block.
    left: u64,
}

/// A tar that is read.
pub struct Untar<R> {
    from: R,
    /// Of the entry's bytes: its own, and those that fill its last block.
    left: u64,
    fill: u64,
}

impl<R: Read> Untar<R> {
    /// Reads from there.
    pub fn new(from: R) -> Self {
        Self {
            from,
            left: 0,
            fill: 0,
        }
    }

    /// The next entry; none at the end. What was not read of the one before is passed over.
    ///
    /// # Errors
    /// `InvalidData` for what is no tar; the reader's.
    pub fn next_entry(&mut self) -> io::Result<Option<Head>> {
        self.skip()?;
        let mut pax = Pax::default();
        loop {
            let mut block = [0; BLOCK];
            self.from.read_exact(&mut block)?;
            if block.iter().all(|b| *b == 0) {
                return Ok(None);
            }
            let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
            let own: u64 = block[148..156].iter().map(|b| u64::from(*b)).sum();
            if octal(&block[148..156])? != sum - own + 8 * u64::from(b' ') {
                return Err(bad("a checksum is wrong"));
            }
            let size = octal(&block[124..136])?;
            if block[156] == b'x' {
                if size > PAX_MAX_BYTES {
                    return Err(bad("a pax header is too large"));
                }
                self.begin(size);
                let mut text = Vec::new();
                self.read_to_end(&mut text)?;
                if text.len() as u64 != size {
                    return Err(bad("it ends in a pax header"));
                }
                self.skip()?;
                pax = Pax::read(&text)?;
                continue;
            }
            let head = pax.head(&block, size)?;
            self.begin(head.left);
            return Ok(Some(head));
        }
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.fill = size.next_multiple_of(BLOCK as u64) - size;
    }

    /// Passes over what is left of the entry.
    fn skip(&mut self) -> io::Result<()> {
        let left = self.left + self.fill;
        (self.left, self.fill) = (0, 0);
        let passed = io::copy(&mut self.from.by_ref().take(left), &mut io::sink())?;
        if passed == left {
            return Ok(());
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// The bytes of the entry.
impl<R: Read> Read for Untar<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.left).map_or(into.len(), |left| left.min(into.len()));
        let n = self.from.read(&mut into[..n])?;
        self.left -= n as u64;
        Ok(n)
    }
}

/// What a pax header says of the entry that follows.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
}

impl Pax {
    fn read(mut text: &[u8]) -> io::Result<Self> {
        let mut pax = Self::default();
        while !text.is_empty() {
            let wrong = || bad("a pax record is malformed");
            let space = text.iter().position(|b| *b == b' ').ok_or_else(wrong)?;
            let length: usize = number(&text[..space])?;
            let record = text.get(space + 1..length).ok_or_else(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => pax.path = Some(value.to_vec()),
                b"linkpath" => pax.link = Some(value.to_vec()),
                b"size" => pax.size = Some(number(value)?),
                b"uid" => pax.uid = Some(number(value)?),
                b"gid" => pax.gid = Some(number(value)?),
                b"mtime" => {
                    // Whole seconds: a fraction is left out.
                    let whole = value.split(|b| *b == b'.').next().unwrap_or_default();
                    pax.mtime = Some(number(whole)?);
                }
                _ => {}
            }
            text = &text[length..];
        }
        Ok(pax)
    }

    fn head(self, block: &[u8; BLOCK], size: u64) -> io::Result<Head> {
        let text = |at: std::ops::Range<usize>| {
            let field = &block[at];
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            field[..end].to_vec()
        };
        let name = self.path.unwrap_or_else(|| {
            let (prefix, name) = (text(345..500), text(0..100));
            if prefix.is_empty() {
                name
            } else {
                [&prefix[..], b"/", &name].concat()
            }
        });
        let target = self.link.unwrap_or_else(|| text(157..257));
        if name.is_empty() || name.len() > PATH_MAX_BYTES || target.len() > PATH_MAX_BYTES {
            return Err(bad("a name is empty or too long"));
        }
        let id = |pax: Option<u32>, at: std::ops::Range<usize>| match pax {
            Some(id) => Ok(id),
            None => octal(&block[at]).map(|id| u32::try_from(id).unwrap_or(0)),
        };
        let size = self.size.unwrap_or(size);
        let (kind, left) = match block[156] {
            b'0' | 0 => (Kind::File(size), size),
            b'5' => (Kind::Directory, 0),
            b'2' => (Kind::Symlink(target), 0),
            b'6' => (Kind::Fifo, 0),
            _ => (Kind::Other, size),
        };
        if left > i64::MAX as u64 {
            return Err(bad("an entry is too large"));
        }
        let mtime = match self.mtime {
            Some(mtime) => mtime,
            None => i64::try_from(octal(&block[136..148])?).unwrap_or(0),
        };
        Ok(Head {
            name,
            kind,
            mode: u32::try_from(octal(&block[100..108])? & 0o7777).unwrap_or(0),
            uid: id(self.uid, 108..116)?,
            gid: id(self.gid, 116..124)?,
            mtime,
            left,
        })
    }
}

fn number<T: std::str::FromStr>(text: &[u8]) -> io::Result<T> {
    let text = std::str::from_utf8(text).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| bad("a number is none"))
}

/// Octal digits, to a space, NUL or the end.
fn octal(field: &[u8]) -> io::Result<u64> {
    let digits = field.iter().skip_while(|b| **b == b' ');
    let mut digits = digits.take_while(|b| !matches!(**b, b' ' | 0));
    digits.try_fold(0, |sum, b| match b {
        b'0'..=b'7' => Ok(sum << 3 | u64::from(b - b'0')),
        _ => Err(bad("a number is none")),
    })
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
