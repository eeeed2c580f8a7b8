//! The disk's double: stops at the n-th step, and knows what a power cut leaves.
#![allow(clippy::unwrap_used)]

use super::Disk;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What the double knows.
pub(crate) struct Double {
    /// Steps until it stops; `None` never.
    left: Option<u64>,
    pub(crate) steps: u64,
    nodes: Vec<Node>,
    live: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, usize>,
    rng: u64,
}

struct Node {
    dir: bool,
    synced: Vec<u8>,
}

pub(crate) fn stopped() -> io::Error {
    io::Error::other("the process was killed here")
}

impl Disk {
    /// A disk that stops after `left` steps; `seed` decides where it tears.
    pub(crate) fn doubled(left: Option<u64>, seed: u64) -> (Disk, Arc<Mutex<Double>>) {
        let double = Arc::new(Mutex::new(Double {
            left,
            steps: 0,
            nodes: Vec::new(),
            live: BTreeMap::new(),
            durable: BTreeMap::new(),
            rng: seed | 1,
        }));
        (
            Disk {
                double: Some(Arc::clone(&double)),
            },
            double,
        )
    }

    pub(super) fn tell(&self, what: impl FnOnce(&mut Double)) {
        if let Some(d) = &self.double {
            what(&mut d.lock().unwrap());
        }
    }

    /// How much of a write gets there when the process is killed at it.
    pub(super) fn tear<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let mut d = self.double.as_ref()?.lock().unwrap();
        (d.left == Some(0)).then(|| {
            let len = d.random() % (bytes.len() as u64 + 1);
            &bytes[..usize::try_from(len).unwrap()]
        })
    }
}

impl Double {
    pub(super) fn step(&mut self) -> io::Result<()> {
        self.steps += 1;
        match &mut self.left {
            None => Ok(()),
            Some(0) => Err(stopped()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    /// Lets it go on, as a new process does; it stops after `left` steps again.
    pub(crate) fn restart(&mut self, left: Option<u64>) {
        self.left = left;
        self.steps = 0;
    }

    pub(super) fn created(&mut self, path: &Path, dir: bool) {
        self.nodes.push(Node {
            dir,
            synced: Vec::new(),
        });
        self.live.insert(path.to_owned(), self.nodes.len() - 1);
    }

    pub(super) fn synced(&mut self, path: &Path) {
        let node = self.live[path];
        self.nodes[node].synced = std::fs::read(path).unwrap();
    }

    pub(super) fn renamed(&mut self, from: &Path, to: &Path) {
        let node = self.live.remove(from).unwrap();
        self.live.insert(to.to_owned(), node);
    }

    pub(super) fn removed(&mut self, path: &Path) {
        self.live.remove(path);
    }

    pub(super) fn dir_synced(&mut self, dir: &Path) {
        let inside = |path: &Path| path.parent() == Some(dir);
        self.durable.retain(|path, _| !inside(path));
        let now = self.live.iter().filter(|(path, _)| inside(path));
        self.durable
            .extend(now.map(|(path, node)| (path.clone(), *node)));
    }

    /// Leaves what a power cut leaves: what was synced, and, if `some`, a part of the rest. All that
    /// the double saw must be in `dirs`.
    pub(crate) fn power_cut(&mut self, dirs: &[&Path], some: bool) {
        let mut after: BTreeMap<PathBuf, usize> = BTreeMap::new();
        let mut paths: Vec<PathBuf> = self
            .live
            .keys()
            .chain(self.durable.keys())
            .cloned()
            .collect();
        paths.sort();
        paths.dedup();
        for path in paths {
            let lucky = some && self.random().is_multiple_of(2);
            let from = if lucky { &self.live } else { &self.durable };
            if let Some(node) = from.get(&path) {
                after.insert(path, *node);
            }
        }
        let mut contents = BTreeMap::new();
        for (path, node) in &after {
            if self.nodes[*node].dir {
                continue;
            }
            let mut bytes = self.nodes[*node].synced.clone();
            let live = self.live.iter().find(|(_, n)| *n == node);
            let live = live
                .and_then(|(p, _)| std::fs::read(p).ok())
                .unwrap_or_default();
            if some && live.len() > bytes.len() {
                let tail = live[bytes.len()..].to_vec();
                let keep = usize::try_from(self.random()).unwrap_or(0) % (tail.len() + 1);
                bytes.extend_from_slice(&tail[..keep]);
                if self.random().is_multiple_of(2) {
                    bytes.resize(live.len(), 0);
                }
            }
            contents.insert(path.clone(), bytes);
        }
        for dir in dirs {
            let _ = std::fs::remove_dir_all(dir);
        }
        let reachable = |path: &Path| {
            path.ancestors()
                .skip(1)
                .all(|a| !dirs.iter().any(|d| a.starts_with(d)) || after.contains_key(a))
        };
        let mut kept = BTreeMap::new();
        for (path, node) in &after {
            if !reachable(path) {
                continue;
            }
            if self.nodes[*node].dir {
                std::fs::create_dir_all(path).unwrap();
            } else {
                std::fs::write(path, &contents[path]).unwrap();
                self.nodes[*node].synced = contents[path].clone();
            }
            kept.insert(path.clone(), *node);
        }
        self.live = kept.clone();
        self.durable = kept;
    }

    /// xorshift64: repeatable from the seed.
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng
    }
}
