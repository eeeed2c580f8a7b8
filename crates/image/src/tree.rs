//! The image's tree, put together in memory: no name of an image ever reaches a file system of
//! this machine while it is unpacked, so there is nothing that a name could escape to.
//!
//! Layers are applied as overlayfs would show them: an entry replaces what is below it, a whiteout
//! removes what *lower* layers have, whatever its place in the archive.
//!
//! Must never follow a link that the same layer made, and never climb above the root.

use crate::error::{Code, Refusal};
use crate::limits::{DEPTH_MAX, LINKS_FOLLOWED_MAX, NAME_MAX_BYTES, PATH_MAX_BYTES};
use crate::tar::{Entry, Kind};
use std::collections::BTreeMap;

type Result<T> = std::result::Result<T, Refusal>;

/// Index of a node.
pub type Id = usize;

/// The root.
pub const ROOT: Id = 0;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Owner, mode, times and attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// s since the epoch.
    pub mtime: u64,
    /// By full name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A directory's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// What it is of.
    pub id: Id,
    /// The layer that made it or, for a directory, put something below it last.
    layer: usize,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Children by name.
    Dir(BTreeMap<Vec<u8>, Child>),
    /// Contents in the spool.
    File {
        /// Where they start.
        at: u64,
        /// Their length, bytes.
        len: u64,
    },
    /// Where it leads.
    Symlink(Vec<u8>),
    /// A named pipe.
    Fifo,
}

/// A file, directory or link.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it is.
    pub body: Body,
    /// What it is like.
    pub meta: Meta,
    /// The layer that made it, or gave it its metadata.
    pub layer: usize,
}

/// A tree that layers are applied to.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    layer: usize,
}

impl Default for Tree {
    fn default() -> Self {
        let root = Node {
            body: Body::Dir(BTreeMap::new()),
            meta: Meta {
                mode: 0o755,
                ..Meta::default()
            },
            layer: 0,
        };
        Self {
            nodes: vec![root],
            layer: 0,
        }
    }
}

/// Where a path ends: directory and last name; none for the root itself.
type Place<'a> = (Id, Option<&'a [u8]>);

impl Tree {
    /// Begins with layer `n`; the first is 1, what `complete` adds is of 0.
    pub fn layer_begin(&mut self, n: usize) {
        self.layer = n;
    }

    /// The node.
    #[must_use]
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Applies an entry; a file's contents are in the spool from `at` on.
    ///
    /// # Errors
    /// See [`Code`]; each names the path.
    pub fn apply(&mut self, entry: &Entry, at: u64) -> Result<()> {
        self.apply_at(entry, at).map_err(|r| r.at(&entry.path))
    }

    fn apply_at(&mut self, entry: &Entry, at: u64) -> Result<()> {
        if entry.kind == Kind::Device {
            let what = "a device node or socket";
            return Err(Refusal::new(Code::Device, what));
        }
        let names = names(&entry.path)?;
        if let Some(last) = names.last().filter(|n| n.starts_with(WHITEOUT)) {
            return self.whiteout(&names[..names.len() - 1], last, entry);
        }
        if names.iter().any(|n| n.starts_with(WHITEOUT)) {
            return Err(Refusal::new(Code::Whiteout, "an entry below a whiteout"));
        }
        let meta = Meta {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattrs(entry)?,
        };
        let (dir, name) = self.place(&names, true)?;
        let Some(name) = name else {
            if entry.kind != Kind::Dir {
                return Err(Refusal::new(Code::PathInvalid, "the root is a directory"));
            }
            self.nodes[ROOT].meta = meta;
            return Ok(());
        };
        let old = self.child(dir, name);
        // A directory may come after its contents, or twice.
        if let Some(old) = old.filter(|o| entry.kind == Kind::Dir && self.is_dir(o.id)) {
            self.nodes[old.id].meta = meta;
            self.nodes[old.id].layer = self.layer;
            self.touch(dir, name);
            return Ok(());
        }
        if old.is_some_and(|o| o.layer == self.layer) {
            let why = "the layer has this path twice";
            return Err(Refusal::new(Code::Duplicate, why));
        }
        let body = match entry.kind {
            Kind::Dir => Body::Dir(BTreeMap::new()),
            Kind::File => Body::File {
                at,
                len: entry.size,
            },
            Kind::Symlink => Body::Symlink(symlink(&entry.link)?),
            Kind::Fifo => Body::Fifo,
            Kind::Link => return self.link(dir, name, &entry.link),
            Kind::Device => return Err(Refusal::new(Code::Device, "a device node")),
        };
        let id = self.add(body, meta);
        self.put(dir, name, id);
        Ok(())
    }

    /// Adds what every workspace needs and an image may lack: the directories where the agent
    /// mounts the kernel's file systems, and those that programs take for granted.
    ///
    /// # Errors
    /// [`Code::MountPoint`] where one is something else: the agent would mount elsewhere.
    pub fn complete(&mut self) -> Result<()> {
        self.layer = 0;
        for (name, mode) in [
            (b"proc".as_slice(), 0o555),
            (b"sys", 0o555),
            (b"dev", 0o755),
            (b"run", 0o755),
            (b"tmp", 0o1777),
            (b"etc", 0o755),
            (b"root", 0o700),
        ] {
            match self.child(ROOT, name) {
                Some(child) if self.is_dir(child.id) => {}
                Some(_) => {
                    let what = "it must be a directory";
                    return Err(Refusal::new(Code::MountPoint, what).at(name));
                }
                None => {
                    let id = self.add(
                        Body::Dir(BTreeMap::new()),
                        Meta {
                            mode,
                            ..Meta::default()
                        },
                    );
                    self.put(ROOT, name, id);
                }
            }
        }
        for name in [b"pts".as_slice(), b"shm"] {
            let dev = self.child(ROOT, b"dev").map_or(ROOT, |c| c.id);
            let child = self.child(dev, name);
            if child.is_some_and(|c| !self.is_dir(c.id)) {
                let path = [b"dev/", name].concat();
                return Err(Refusal::new(Code::MountPoint, "it must be a directory").at(&path));
            }
        }
        Ok(())
    }

    /// Every path with its node, parents first, in the order of names.
    ///
    /// # Errors
    /// What `visit` says.
    pub fn walk(&self, mut visit: impl FnMut(&[u8], Id) -> Result<()>) -> Result<()> {
        // A stack of its own: depth is bounded, but not by what a thread's stack holds.
        let mut stack = vec![(Vec::new(), ROOT)];
        while let Some((path, id)) = stack.pop() {
            visit(&path, id)?;
            if let Body::Dir(children) = &self.nodes[id].body {
                for (name, child) in children.iter().rev() {
                    let mut below = path.clone();
                    below.push(b'/');
                    below.extend(name);
                    stack.push((below, child.id));
                }
            }
        }
        Ok(())
    }

    fn link(&mut self, dir: Id, name: &[u8], target: &[u8]) -> Result<()> {
        let names = names(target).map_err(|r| {
            let what = format!("a hard link to {}: {}", crate::error::show(target), r.why);
            Refusal::new(r.code, what)
        })?;
        let missing = |why: &str| {
            let what = format!("a hard link to {}, which {why}", crate::error::show(target));
            Refusal::new(Code::LinkMissing, what)
        };
        let place = self.find(&names)?;
        let id = place.ok_or_else(|| missing("is not there"))?;
        if self.is_dir(id) {
            return Err(missing("is a directory"));
        }
        self.put(dir, name, id);
        Ok(())
    }

    fn whiteout(&mut self, parents: &[&[u8]], name: &[u8], entry: &Entry) -> Result<()> {
        let wrong = |why: &str| Err(Refusal::new(Code::Whiteout, why));
        if entry.kind != Kind::File || entry.size != 0 {
            return wrong("a whiteout is an empty file");
        }
        if parents.iter().any(|n| n.starts_with(WHITEOUT)) {
            return wrong("a whiteout below a whiteout");
        }
        if name == OPAQUE {
            let Some(dir) = self.directory(parents, false)? else {
                return Ok(()); // Nothing is below it.
            };
            self.clear(dir);
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") || hidden.starts_with(WHITEOUT) {
            return wrong("what it hides is no name");
        }
        let Some(dir) = self.directory(parents, false)? else {
            return Ok(());
        };
        let Some(child) = self.child(dir, hidden) else {
            return Ok(());
        };
        if child.layer == self.layer {
            // Removed and made anew by this layer: only what it added stays.
            self.clear(child.id);
        } else {
            self.remove(dir, hidden);
        }
        Ok(())
    }

    /// Removes what lower layers put into a directory.
    fn clear(&mut self, dir: Id) {
        let Body::Dir(children) = &self.nodes[dir].body else {
            return;
        };
        for (name, child) in children.clone() {
            if child.layer == self.layer {
                self.clear(child.id);
            } else {
                self.remove(dir, &name);
            }
        }
    }

    /// The directory and the name that these names lead to. Directories that are missing are made.
    fn place<'a>(&mut self, names: &[&'a [u8]], make: bool) -> Result<Place<'a>> {
        let Some((last, parents)) = names.split_last() else {
            return Ok((ROOT, None));
        };
        let dir = self.directory(parents, make)?;
        Ok((dir.unwrap_or(ROOT), Some(last)))
    }

    /// The directory that these names lead to, through links of lower layers.
    fn directory(&mut self, names: &[&[u8]], make: bool) -> Result<Option<Id>> {
        let mut way: Vec<(Id, Vec<u8>)> = Vec::new();
        let mut here = ROOT;
        let mut rest: Vec<Vec<u8>> = names.iter().rev().map(|n| n.to_vec()).collect();
        let mut followed = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                // Only in a symlink's text; names of entries have none.
                let above = way.pop().ok_or_else(|| {
                    let what = "a symbolic link on the way leads above the root";
                    Refusal::new(Code::PathTraversal, what)
                })?;
                here = above.0;
                continue;
            }
            let child = match self.child(here, &name) {
                Some(child) => child,
                // A link's text may name it; an entry may not.
                None if make && name.starts_with(WHITEOUT) => {
                    let what = "a symbolic link on the way leads below a whiteout";
                    return Err(Refusal::new(Code::Whiteout, what));
                }
                None if make => {
                    let meta = Meta {
                        mode: 0o755,
                        ..Meta::default()
                    };
                    let id = self.add(Body::Dir(BTreeMap::new()), meta);
                    self.put(here, &name, id)
                }
                None => return Ok(None),
            };
            match &self.nodes[child.id].body {
                Body::Dir(_) => {
                    if make {
                        self.touch(here, &name);
                    }
                    way.push((here, name));
                    here = child.id;
                    if way.len() > DEPTH_MAX {
                        return Err(too_deep());
                    }
                }
                Body::Symlink(target) if child.layer != self.layer => {
                    followed += 1;
                    if followed > LINKS_FOLLOWED_MAX {
                        let what = "too many symbolic links on the way";
                        return Err(Refusal::new(Code::ThroughSymlink, what));
                    }
                    if target.starts_with(b"/") {
                        way.clear();
                        here = ROOT;
                    }
                    let parts = target.split(|b| *b == b'/');
                    let parts = parts.filter(|p| !p.is_empty() && *p != b".");
                    rest.extend(parts.rev().map(<[u8]>::to_vec));
                }
                Body::Symlink(_) => {
                    let what = "an entry below a symbolic link that the same layer made";
                    return Err(Refusal::new(Code::ThroughSymlink, what));
                }
                Body::File { .. } | Body::Fifo => {
                    let what = "an entry below a file";
                    return Err(Refusal::new(Code::ThroughSymlink, what));
                }
            }
        }
        Ok(Some(here))
    }

    /// The node at these names; its last name is not followed.
    fn find(&mut self, names: &[&[u8]]) -> Result<Option<Id>> {
        let Some((last, parents)) = names.split_last() else {
            return Ok(Some(ROOT));
        };
        let dir = self.directory(parents, false)?;
        Ok(dir.and_then(|d| self.child(d, last)).map(|c| c.id))
    }

    fn is_dir(&self, id: Id) -> bool {
        matches!(self.nodes[id].body, Body::Dir(_))
    }

    fn child(&self, dir: Id, name: &[u8]) -> Option<Child> {
        match &self.nodes[dir].body {
            Body::Dir(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn add(&mut self, body: Body, meta: Meta) -> Id {
        self.nodes.push(Node {
            body,
            meta,
            layer: self.layer,
        });
        self.nodes.len() - 1
    }

    fn put(&mut self, dir: Id, name: &[u8], id: Id) -> Child {
        self.remove(dir, name);
        let child = Child {
            id,
            layer: self.layer,
        };
        if let Body::Dir(children) = &mut self.nodes[dir].body {
            children.insert(name.to_vec(), child);
        }
        child
    }

    /// Notes that this layer has something below this entry.
    fn touch(&mut self, dir: Id, name: &[u8]) {
        let layer = self.layer;
        if let Body::Dir(children) = &mut self.nodes[dir].body
            && let Some(child) = children.get_mut(name)
        {
            child.layer = layer;
        }
    }

    fn remove(&mut self, dir: Id, name: &[u8]) {
        if let Body::Dir(children) = &mut self.nodes[dir].body {
            children.remove(name);
        }
    }
}

/// The parts of an entry's name.
fn names(path: &[u8]) -> Result<Vec<&[u8]>> {
    if path.len() > PATH_MAX_BYTES {
        let what = format!("a path of {} bytes; at most {PATH_MAX_BYTES}", path.len());
        return Err(Refusal::new(Code::PathTooLong, what));
    }
    if path.is_empty() || path.contains(&0) {
        return Err(Refusal::new(Code::PathInvalid, "an empty name, or a NUL"));
    }
    if path[0] == b'/' {
        return Err(Refusal::new(Code::PathAbsolute, "the name starts with /"));
    }
    let mut names = Vec::new();
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(Refusal::new(Code::PathTraversal, "the name has ..")),
            _ if name.len() > NAME_MAX_BYTES => {
                let what = format!("a name of {} bytes; at most {NAME_MAX_BYTES}", name.len());
                return Err(Refusal::new(Code::PathTooLong, what));
            }
            _ => names.push(name),
        }
    }
    if names.len() > DEPTH_MAX {
        return Err(too_deep());
    }
    Ok(names)
}

fn too_deep() -> Refusal {
    let what = format!("deeper than {DEPTH_MAX} directories");
    Refusal::new(Code::PathTooLong, what)
}

/// A symlink's text is data: only its length and NULs matter here, since nothing on this machine
/// ever follows it.
fn symlink(target: &[u8]) -> Result<Vec<u8>> {
    if target.is_empty() || target.contains(&0) || target.len() > PATH_MAX_BYTES {
        let what = "a symbolic link to nothing, or one too long";
        return Err(Refusal::new(Code::PathInvalid, what));
    }
    Ok(target.to_vec())
}

/// What is taken of the extended attributes. `trusted.overlay.*` in a base would be instructions
/// to the workspace's overlay, so all of `trusted.` is refused; `security.capability` is the
/// policy's business.
fn xattrs(entry: &Entry) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut kept = Vec::new();
    for (name, value) in &entry.xattrs {
        // Labels of a system that the guest does not run.
        if name == b"security.selinux" || name == b"security.ima" {
            continue;
        }
        let user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
        if !(user || name == b"security.capability") || name.len() > NAME_MAX_BYTES {
            let what = format!("extended attribute {}", crate::error::show(name));
            return Err(Refusal::new(Code::Xattr, what));
        }
        kept.push((name.clone(), value.clone()));
    }
    // One order: the same files are the same image.
    kept.sort();
    Ok(kept)
}
