//! Tags that the journal has and the tree has not yet. The later word counts.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Tag;
use super::layout::NodeId;

/// Tags of sectors, and ranges that became holes before them.
#[derive(Debug, Default)]
pub(super) struct Changes {
    tags: BTreeMap<u64, Tag>,
    /// Start to end; they don't touch each other.
    holes: BTreeMap<u64, u64>,
}

impl Changes {
    /// A sector gets a tag.
    pub(super) fn set(&mut self, sector: u64, tag: Tag) {
        self.tags.insert(sector, tag);
    }

    /// Sectors become holes.
    pub(super) fn punch(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.tags.retain(|sector, _| !range.contains(sector));
        let (mut start, mut end) = (range.start, range.end);
        // At most one hole begins before this one and touches it; more may begin inside.
        while let Some((&from, &to)) = self.holes.range(..=end).next_back() {
            if to < start {
                break;
            }
            start = start.min(from);
            end = end.max(to);
            self.holes.remove(&from);
        }
        self.holes.insert(start, end);
    }

    /// Lays the changes over the tags of the sectors from `first` on.
    pub(super) fn overlay(&self, first: u64, tags: &mut [Tag]) {
        let end = first + tags.len() as u64;
        let at = |sector: u64| usize::try_from(sector - first).expect("within the slice");
        for (&from, &to) in self.holes.range(..end).rev() {
            if to <= first {
                break;
            }
            tags[at(from.max(first))..at(to.min(end))].fill([0; 16]);
        }
        for (&sector, tag) in self.tags.range(first..end) {
            tags[at(sector)] = *tag;
        }
    }

    /// How many there are to remember.
    pub(super) fn len(&self) -> usize {
        self.tags.len() + self.holes.len()
    }

    /// Whether a sector of the range has a tag here.
    pub(super) fn touch(&self, range: Range<u64>) -> bool {
        self.tags.range(range).any(|(_, tag)| *tag != [0; 16])
    }

    /// The holes.
    pub(super) fn holes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.holes.iter().map(|(&from, &to)| from..to)
    }

    /// Leaves that hold a changed tag but are not holes as a whole, in order.
    pub(super) fn leaves(&self) -> Vec<NodeId> {
        let span = NodeId::of(0).sectors();
        let mut leaves: Vec<u64> = self.tags.keys().map(|sector| sector / span).collect();
        for hole in self.holes() {
            let edges = [(hole.start, hole.start), (hole.end, hole.end - 1)];
            leaves.extend(
                edges
                    .iter()
                    .filter(|(edge, _)| !edge.is_multiple_of(span))
                    .map(|(_, sector)| sector / span),
            );
        }
        leaves.sort_unstable();
        leaves.dedup();
        leaves
            .into_iter()
            .map(|index| NodeId { level: 0, index })
            .collect()
    }

    /// Whether a node's sectors are all in one hole.
    pub(super) fn is_hole(&self, node: NodeId) -> bool {
        let (start, end) = (
            node.index * node.sectors(),
            (node.index + 1) * node.sectors(),
        );
        self.holes
            .range(..=start)
            .next_back()
            .is_some_and(|(_, &to)| to >= end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_an_array_of_tags(
            steps in proptest::collection::vec((any::<bool>(), 0..600u64, 0..400u64, 1u8..), 0..40),
            view in 0..900u64,
        ) {
            let (mut changes, mut model) = (Changes::default(), vec![[0xffu8; 16]; 1100]);
            for (punch, at, len, byte) in steps {
                if punch {
                    changes.punch(at..at + len);
                    model[at as usize..(at + len) as usize].fill([0; 16]);
                } else {
                    changes.set(at, [byte; 16]);
                    model[at as usize] = [byte; 16];
                }
            }
            let mut tags = vec![[0xff; 16]; 200];
            changes.overlay(view, &mut tags);
            prop_assert_eq!(&tags[..], &model[view as usize..view as usize + 200]);
            // Every leaf that differs is named, or a hole as a whole.
            for (index, leaf) in model[..1024].chunks(256).enumerate() {
                let id = NodeId { level: 0, index: index as u64 };
                let changed = leaf.iter().any(|tag| *tag != [0xff; 16]);
                prop_assert!(!changed || changes.is_hole(id) || changes.leaves().contains(&id));
            }
        }
    }
}
