//! A writer of erofs: the on-disk format of Linux's `fs/erofs/erofs_fs.h`, uncompressed.
//!
//! One's own, since Debian 12's `mkfs.erofs` takes only a directory of this machine: with names,
//! owners and links of a hostile image in it, that directory would need a user namespace and a
//! race-free unpacker. Here names never leave memory. `fsck.erofs` and the kernel are the oracles.
//!
//! ```text
//! block 0      superblock at 1,024
//! block 1 …    inodes (64 bytes each): attributes, and the contents' last part if it fits
//! then         contents, each from a block's start
//! ```
//!
//! The same tree is the same bytes: no time of making, no random id, inodes in the order of names.

use crate::tree::{Body, Id, ROOT, Tree};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

const BLOCK: u64 = 4_096;
const BLOCK_BITS: u8 = 12;
const SLOT: u64 = 32;
const INODE: u64 = 64;
const MAGIC: u32 = 0xE0F5_E1E2;
const DIRENT: usize = 12;
/// `EROFS_FEATURE_COMPAT_MTIME`.
const COMPAT_MTIME: u32 = 0x2;
const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const S_IFDIR: u16 = 0o040_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;
const S_IFIFO: u16 = 0o010_000;

/// Namespaces of attributes by the format's number.
const PREFIXES: &[(u8, &[u8])] = &[(1, b"user."), (4, b"trusted."), (6, b"security.")];

/// Where one inode and its contents are.
struct Inode {
    node: Id,
    parent: Id,
    links: u32,
    size: u64,
    xattrs: Vec<u8>,
    /// Of the inode, bytes from the image's start.
    at: u64,
    /// The first block of the contents that are not inline.
    block: u32,
    /// The contents' last part follows the inode.
    inline: bool,
}

impl Inode {
    fn tail(&self) -> u64 {
        if self.inline { self.size % BLOCK } else { 0 }
    }

    fn blocks(&self) -> u64 {
        (self.size - self.tail()).div_ceil(BLOCK)
    }

    fn nid(&self) -> u64 {
        self.at / SLOT
    }
}

/// Writes the tree, with the files' contents from `spool`, to `out`; gives the image's length,
/// bytes.
///
/// # Errors
/// The files'; [`io::ErrorKind::InvalidInput`] for a tree beyond what the format holds.
pub fn write(tree: &Tree, spool: &File, out: &mut impl Write) -> io::Result<u64> {
    let mut inodes = collect(tree)?;
    let (meta_end, end) = lay_out(&mut inodes)?;
    let nids: HashMap<Id, u64> = inodes.iter().map(|i| (i.node, i.nid())).collect();
    let mut out = Counted { inner: out, at: 0 };
    out.write_all(&superblock(&inodes, end)?)?;
    for (number, inode) in (1..).zip(&inodes) {
        out.zeros(inode.at - out.at)?;
        out.write_all(&header(tree, inode, number)?)?;
        out.write_all(&inode.xattrs)?;
        if inode.tail() > 0 {
            contents(tree, &nids, inode, spool, &mut out, true)?;
        }
    }
    out.zeros(meta_end - out.at)?;
    for inode in &inodes {
        if inode.blocks() > 0 {
            contents(tree, &nids, inode, spool, &mut out, false)?;
            out.zeros(out.at.next_multiple_of(BLOCK) - out.at)?;
        }
    }
    if out.at != end {
        return Err(io::Error::other("the image is not as long as laid out"));
    }
    Ok(end)
}

/// Each inode once, parents first, in the order of names.
fn collect(tree: &Tree) -> io::Result<Vec<Inode>> {
    let mut inodes: Vec<Inode> = Vec::new();
    let mut seen: HashMap<Id, usize> = HashMap::new();
    let mut stack = vec![(ROOT, ROOT)];
    while let Some((id, parent)) = stack.pop() {
        if let Some(index) = seen.get(&id) {
            inodes[*index].links += 1;
            continue;
        }
        let node = tree.node(id);
        let (size, links) = match &node.body {
            Body::Dir(children) => {
                let below = |c: &&crate::tree::Child| matches!(tree.node(c.id).body, Body::Dir(_));
                let dirs = children.values().filter(below).count();
                stack.extend(children.values().rev().map(|c| (c.id, id)));
                let bytes = dir_bytes(&dir_entries(tree, &HashMap::new(), id, parent)).len();
                (bytes as u64, u32::try_from(dirs + 2).unwrap_or(u32::MAX))
            }
            Body::File { len, .. } => (*len, 1),
            Body::Symlink(target) => (target.len() as u64, 1),
            Body::Fifo => (0, 1),
        };
        seen.insert(id, inodes.len());
        inodes.push(Inode {
            node: id,
            parent,
            links,
            size,
            xattrs: xattr_bytes(&node.meta.xattrs)?,
            at: 0,
            block: 0,
            inline: false,
        });
    }
    Ok(inodes)
}

/// Gives each inode its place; where the inodes end, and the image.
fn lay_out(inodes: &mut [Inode]) -> io::Result<(u64, u64)> {
    let mut at = BLOCK;
    for inode in inodes.iter_mut() {
        let head = INODE + inode.xattrs.len() as u64;
        let tail = inode.size % BLOCK;
        // What follows an inode must not cross a block's end.
        inode.inline = tail > 0 && head + tail <= BLOCK;
        let len = head + inode.tail();
        at = at.next_multiple_of(SLOT);
        if at % BLOCK + len > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inode.at = at;
        at += len;
    }
    let meta_end = at.next_multiple_of(BLOCK);
    let mut end = meta_end;
    for inode in inodes {
        if inode.blocks() > 0 {
            inode.block = u32::try_from(end / BLOCK).map_err(|_| too_large())?;
            end += inode.blocks() * BLOCK;
        }
    }
    Ok((meta_end, end))
}

fn superblock(inodes: &[Inode], end: u64) -> io::Result<Vec<u8>> {
    let mut block = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
    let sb = &mut block[1_024..1_152];
    sb[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    sb[8..12].copy_from_slice(&COMPAT_MTIME.to_le_bytes());
    sb[12] = BLOCK_BITS;
    let root = u16::try_from(inodes.first().map_or(0, Inode::nid)).map_err(|_| too_large())?;
    sb[14..16].copy_from_slice(&root.to_le_bytes());
    sb[16..24].copy_from_slice(&(inodes.len() as u64).to_le_bytes());
    let blocks = u32::try_from(end / BLOCK).map_err(|_| too_large())?;
    sb[36..40].copy_from_slice(&blocks.to_le_bytes());
    // Inodes are counted from block 0. No id, no name, no time: see the head of this file.
    Ok(block)
}

fn header(tree: &Tree, inode: &Inode, number: u32) -> io::Result<[u8; 64]> {
    let node = tree.node(inode.node);
    let kind = match node.body {
        Body::Dir(_) => S_IFDIR,
        Body::File { .. } => S_IFREG,
        Body::Symlink(_) => S_IFLNK,
        Body::Fifo => S_IFIFO,
    };
    // Links have no permissions of their own: 0777, as Linux shows them.
    let mode = if kind == S_IFLNK {
        0o777
    } else {
        node.meta.mode
    };
    let layout = if inode.inline { INLINE } else { PLAIN };
    let xattr_count = match inode.xattrs.len() {
        0 => 0,
        len => u16::try_from((len - 12) / 4 + 1).map_err(|_| too_large())?,
    };
    let mut h = [0; 64];
    h[0..2].copy_from_slice(&(1 | layout << 1).to_le_bytes());
    h[2..4].copy_from_slice(&xattr_count.to_le_bytes());
    h[4..6].copy_from_slice(&(kind | mode).to_le_bytes());
    h[8..16].copy_from_slice(&inode.size.to_le_bytes());
    h[16..20].copy_from_slice(&inode.block.to_le_bytes());
    h[20..24].copy_from_slice(&number.to_le_bytes());
    h[24..28].copy_from_slice(&node.meta.uid.to_le_bytes());
    h[28..32].copy_from_slice(&node.meta.gid.to_le_bytes());
    h[32..40].copy_from_slice(&node.meta.mtime.to_le_bytes());
    h[44..48].copy_from_slice(&inode.links.to_le_bytes());
    Ok(h)
}

/// Writes an inode's contents: the last part only, or all before it.
fn contents(
    tree: &Tree,
    nids: &HashMap<Id, u64>,
    inode: &Inode,
    spool: &File,
    out: &mut impl Write,
    tail: bool,
) -> io::Result<()> {
    let cut = inode.size - inode.tail();
    let range = if tail { cut..inode.size } else { 0..cut };
    let of = |bytes: &[u8], out: &mut dyn Write| {
        let start = usize::try_from(range.start).map_err(io::Error::other)?;
        let end = usize::try_from(range.end).map_err(io::Error::other)?;
        let part = bytes.get(start..end);
        out.write_all(part.ok_or_else(|| io::Error::other("contents shorter than laid out"))?)
    };
    match &tree.node(inode.node).body {
        Body::Dir(_) => {
            let bytes = dir_bytes(&dir_entries(tree, nids, inode.node, inode.parent));
            of(&bytes, out)
        }
        Body::Symlink(target) => of(target, out),
        Body::Fifo => Ok(()),
        Body::File { at, .. } => {
            let mut buf = vec![0; 256 << 10];
            let (mut from, end) = (at + range.start, at + range.end);
            while from < end {
                let len = usize::try_from(end - from)
                    .unwrap_or(usize::MAX)
                    .min(buf.len());
                spool.read_exact_at(&mut buf[..len], from)?;
                out.write_all(&buf[..len])?;
                from += len as u64;
            }
            Ok(())
        }
    }
}

struct DirEntry<'a> {
    name: &'a [u8],
    nid: u64,
    kind: u8,
}

/// A directory's entries in the order of their names' bytes, as the kernel searches them.
fn dir_entries<'a>(
    tree: &'a Tree,
    nids: &HashMap<Id, u64>,
    id: Id,
    parent: Id,
) -> Vec<DirEntry<'a>> {
    let entry = |name: &'a [u8], id: Id| DirEntry {
        name,
        nid: nids.get(&id).copied().unwrap_or_default(),
        kind: match tree.node(id).body {
            Body::File { .. } => 1,
            Body::Dir(_) => 2,
            Body::Fifo => 5,
            Body::Symlink(_) => 7,
        },
    };
    let mut entries = vec![entry(b".", id), entry(b"..", parent)];
    if let Body::Dir(children) = &tree.node(id).body {
        entries.extend(children.iter().map(|(name, child)| entry(name, child.id)));
    }
    entries.sort_by(|a, b| a.name.cmp(b.name));
    entries
}

/// Blocks of entries, each followed by its names; the last one is as long as it must be.
fn dir_bytes(entries: &[DirEntry<'_>]) -> Vec<u8> {
    let block = usize::try_from(BLOCK).unwrap_or_default();
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        out.resize(out.len().next_multiple_of(block), 0);
        let mut len = 0;
        let fits = rest.iter().take_while(|e| {
            len += DIRENT + e.name.len();
            len <= block
        });
        let (here, after) = rest.split_at(fits.count());
        let mut name_at = here.len() * DIRENT;
        for entry in here {
            out.extend(entry.nid.to_le_bytes());
            // Below the block's length.
            out.extend(u16::try_from(name_at).unwrap_or_default().to_le_bytes());
            out.extend([entry.kind, 0]);
            name_at += entry.name.len();
        }
        for entry in here {
            out.extend(entry.name);
        }
        rest = after;
    }
    out
}

/// Attributes as they stand behind an inode.
fn xattr_bytes(xattrs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<Vec<u8>> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let mut out = vec![0; 12];
    for (name, value) in xattrs {
        let known = PREFIXES
            .iter()
            .find_map(|(n, prefix)| Some((*n, name.strip_prefix(*prefix)?)));
        let (number, rest) = known.ok_or_else(too_large)?;
        out.push(u8::try_from(rest.len()).map_err(|_| too_large())?);
        out.push(number);
        let len = u16::try_from(value.len()).map_err(|_| too_large())?;
        out.extend(len.to_le_bytes());
        out.extend(rest);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    Ok(out)
}

fn too_large() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "the tree is beyond what the format holds",
    )
}

/// Knows how much was written.
struct Counted<W> {
    inner: W,
    at: u64,
}

impl<W: Write> Counted<W> {
    fn zeros(&mut self, mut len: u64) -> io::Result<()> {
        const ZEROS: [u8; 4_096] = [0; 4_096];
        while len > 0 {
            let n = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write_all(&ZEROS[..n])?;
            len -= n as u64;
        }
        Ok(())
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
