//! The tree of tags: nodes are loaded when needed, checked against the tag above them, and
//! written to the slot that the durable tree does not use.
//!
//! A node's tag has its slot in the lowest bit. A node without a tag (zeros) is empty: nothing
//! rests at its place. The cache holds nodes by their tag, so it can't be stale.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use seal::tag::Tagger;

use super::changes::Changes;
use super::layout::NodeId;
use super::{NODE_DOMAIN, Tag};
use crate::backing::Backing;
use crate::limits::{LEAVES_CACHED_MAX, NODE_BYTES, NODE_FANOUT, TOP_NODES};

/// The tags in a node.
pub(super) type Node = [Tag; NODE_FANOUT];
/// The tags of the highest nodes.
pub(super) type Top = [Tag; TOP_NODES];

const NONE: Tag = [0; 16];
const EMPTY: Node = [NONE; NODE_FANOUT];

/// A node that is not what its tag says, or a read that failed.
#[derive(Debug)]
pub(super) enum TreeError {
    /// The kernel's.
    Io(io::Error),
    /// The file holds something else at the node's place.
    Tampered(NodeId),
}

impl From<io::Error> for TreeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Nodes that were loaded and checked.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Cached>);

#[derive(Debug, Default)]
struct Cached {
    /// Levels 1 and 2: few.
    upper: HashMap<NodeId, (Tag, Arc<Node>)>,
    /// Each leaf has one place to be.
    leaves: Vec<Option<(NodeId, Tag, Arc<Node>)>>,
}

impl Cache {
    fn lock(&self) -> MutexGuard<'_, Cached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: NodeId, tag: Tag) -> Option<Arc<Node>> {
        let cached = self.lock();
        if id.level > 0 {
            let (known, node) = cached.upper.get(&id)?;
            return (*known == tag).then(|| Arc::clone(node));
        }
        match cached.leaves.get(leaf_place(id))? {
            Some((known, its, node)) if (*known, *its) == (id, tag) => Some(Arc::clone(node)),
            _ => None,
        }
    }

    fn put(&self, id: NodeId, tag: Tag, node: Arc<Node>) {
        let mut cached = self.lock();
        if id.level > 0 {
            cached.upper.insert(id, (tag, node));
            return;
        }
        let place = leaf_place(id);
        if cached.leaves.len() <= place {
            cached.leaves.resize(place + 1, None);
        }
        cached.leaves[place] = Some((id, tag, node));
    }
}

fn leaf_place(id: NodeId) -> usize {
    usize::try_from(id.index % LEAVES_CACHED_MAX as u64).expect("below the bound")
}

/// One thread's view of the durable tree under `top`.
pub(super) struct Tree<'a, B> {
    pub(super) file: &'a B,
    pub(super) tagger: &'a Tagger,
    pub(super) cache: &'a Cache,
    pub(super) top: &'a Top,
}

impl<B: Backing> Tree<'_, B> {
    /// The tags of sectors from `first` on.
    ///
    /// # Errors
    /// A node that can't be read or is not what it was.
    pub(super) fn tags(&self, first: u64, out: &mut [Tag]) -> Result<(), TreeError> {
        let mut at = first;
        let mut out = out;
        while !out.is_empty() {
            let leaf = NodeId::of(at);
            let from = usize::try_from(at % NODE_FANOUT as u64).expect("below the fan-out");
            let n = out.len().min(NODE_FANOUT - from);
            let (now, rest) = out.split_at_mut(n);
            now.copy_from_slice(&self.node(leaf)?[from..from + n]);
            (at, out) = (at + n as u64, rest);
        }
        Ok(())
    }

    /// Whether no sector of the range has a tag.
    ///
    /// # Errors
    /// As [`Tree::tags`].
    pub(super) fn is_empty(&self, first: u64, count: u64) -> Result<bool, TreeError> {
        let mut leaf = NodeId::of(first);
        while count > 0 && leaf.index * leaf.sectors() < first + count {
            let above = leaf.parent().expect("a leaf has one");
            if self.tag(above)? == NONE {
                leaf.index = (above.index + 1) * NODE_FANOUT as u64;
                continue;
            }
            if self.tag(leaf)? != NONE {
                let start = leaf.index * leaf.sectors();
                let (from, to) = (
                    first.max(start),
                    (first + count).min(start + leaf.sectors()),
                );
                let at = |sector: u64| usize::try_from(sector - start).expect("in the leaf");
                if self.node(leaf)?[at(from)..at(to)]
                    .iter()
                    .any(|tag| *tag != NONE)
                {
                    return Ok(false);
                }
            }
            leaf.index += 1;
        }
        Ok(true)
    }

    /// Writes the nodes that `changes` touch to their free slots, and answers the new top. The
    /// tree that was there stays whole; nothing is synced.
    ///
    /// # Errors
    /// The file's; a node that is not what it was.
    pub(super) fn apply(&self, changes: &Changes) -> Result<Top, TreeError> {
        let mut draft = Draft {
            tree: self,
            top: *self.top,
            upper: BTreeMap::new(),
        };
        for hole in changes.holes() {
            draft.clear_whole(hole.start, hole.end)?;
        }
        for id in changes.leaves() {
            let mut leaf = if changes.is_hole(id) {
                EMPTY
            } else {
                *self.node(id)?
            };
            changes.overlay(id.index * id.sectors(), &mut leaf);
            let tag = self.store(id, &leaf)?;
            draft.set(id, tag)?;
        }
        draft.finish()
    }

    fn node(&self, id: NodeId) -> Result<Arc<Node>, TreeError> {
        let tag = self.tag(id)?;
        if tag == NONE {
            return Ok(Arc::new(EMPTY));
        }
        if let Some(node) = self.cache.get(id, tag) {
            return Ok(node);
        }
        let mut node = EMPTY;
        let slot = slot_of(&tag);
        self.file
            .read_at(id.offset(slot), node.as_flattened_mut())?;
        if !seal::hash::ct_eq(&self.node_tag(id, &node, slot), &tag) {
            return Err(TreeError::Tampered(id));
        }
        let node = Arc::new(node);
        self.cache.put(id, tag, Arc::clone(&node));
        Ok(node)
    }

    /// What the durable tree says of a node.
    fn tag(&self, id: NodeId) -> Result<Tag, TreeError> {
        match id.parent() {
            None => Ok(self.top[id.place()]),
            Some(parent) => Ok(self.node(parent)?[id.place()]),
        }
    }

    /// Writes a node to the slot that the durable tree does not use.
    fn store(&self, id: NodeId, node: &Node) -> Result<Tag, TreeError> {
        if *node == EMPTY {
            return Ok(NONE);
        }
        let slot = !slot_of(&self.tag(id)?);
        self.file.write_at(id.offset(slot), node.as_flattened())?;
        let tag = self.node_tag(id, node, slot);
        self.cache.put(id, tag, Arc::new(*node));
        Ok(tag)
    }

    fn node_tag(&self, id: NodeId, node: &Node, slot: bool) -> Tag {
        let number = id.index << 2 | u64::from(id.level);
        let mut tag = self.tagger.tag(NODE_DOMAIN, number, node.as_flattened());
        tag[15] = tag[15] & 0xfe | u8::from(slot);
        tag
    }
}

fn slot_of(tag: &Tag) -> bool {
    tag[15] & 1 == 1
}

/// The upper nodes of a tree to be.
struct Draft<'a, 't, B> {
    tree: &'a Tree<'t, B>,
    top: Top,
    upper: BTreeMap<NodeId, Box<Node>>,
}

impl<B: Backing> Draft<'_, '_, B> {
    /// Empties the nodes whose sectors all lie in the range.
    fn clear_whole(&mut self, start: u64, end: u64) -> Result<(), TreeError> {
        let (leaf, above) = (
            NodeId::of(0).sectors(),
            NodeId { level: 1, index: 0 }.sectors(),
        );
        let mut at = start.next_multiple_of(leaf);
        while at + leaf <= end {
            if at.is_multiple_of(above) && at + above <= end {
                let id = NodeId {
                    level: 1,
                    index: at / above,
                };
                self.upper.insert(id, Box::new(EMPTY));
                at += above;
            } else {
                self.set(NodeId::of(at), NONE)?;
                at += leaf;
            }
        }
        Ok(())
    }

    fn set(&mut self, id: NodeId, tag: Tag) -> Result<(), TreeError> {
        let Some(parent) = id.parent() else {
            self.top[id.place()] = tag;
            return Ok(());
        };
        if !self.upper.contains_key(&parent) {
            let node = Box::new(*self.tree.node(parent)?);
            self.upper.insert(parent, node);
        }
        if let Some(node) = self.upper.get_mut(&parent) {
            node[id.place()] = tag;
        }
        Ok(())
    }

    /// Level by level: a level's nodes are done when those below them are.
    fn finish(mut self) -> Result<Top, TreeError> {
        while let Some((id, node)) = self.upper.pop_first() {
            let tag = self.tree.store(id, &node)?;
            self.set(id, tag)?;
        }
        Ok(self.top)
    }
}

const _: () = assert!(NODE_BYTES == NODE_FANOUT * 16);
