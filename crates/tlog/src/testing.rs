//! What the tests of several modules share: keys, leaves, logs in memory.
#![allow(clippy::unwrap_used)]

use crate::checkpoint::Checkpoint;
use crate::class::Class;
use crate::grow::Grower;
use crate::leaf::{Leaf, Opening, account_tag, day_of};
use crate::merkle::ReadError;
use crate::note::{SignatureType, Verifier};
use crate::tile::{Tile, TileSource};
use crate::verify::LogReader;
use seal::sign::SigningKey;
use std::collections::BTreeMap;

pub(crate) const ORIGIN: &str = "casemate.local/lab/host";
pub(crate) const CLASS: Class = Class::Host;
/// The time of the first entry that [`Log`] appends.
pub(crate) const TIME_MS: u64 = 1_790_000_000_000;

pub(crate) fn signing_key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

pub(crate) fn witness(seed: u8) -> (SigningKey, Verifier) {
    let key = signing_key(seed);
    let name = format!("witness.example/w{seed}");
    let verifier = Verifier::new(&name, SignatureType::CosignatureV1, key.public()).unwrap();
    (key, verifier)
}

/// A leaf whose "sealed" bytes are a stand-in: nothing in this crate opens them.
pub(crate) fn leaf_with(
    class: Class,
    account: u8,
    time_ms: u64,
    account_seq: u64,
    payload: &[u8],
) -> (Leaf, Opening) {
    let opening = Opening {
        salt: [account ^ 0x5a; 32],
        payload: payload.to_vec(),
    };
    let leaf = Leaf {
        class,
        time_ms,
        account_tag: account_tag(&[3; 32], class, &format!("acc_{account}")),
        account_seq,
        commitment: opening.commitment(),
        day: day_of(time_ms),
        wrap_class: vec![1; 48],
        wrap_account: vec![2; 48],
        sealed: [&[9; 28][..], &opening.plaintext().unwrap()].concat(),
    };
    (leaf, opening)
}

/// A log directory in memory.
#[derive(Clone, Default)]
pub(crate) struct Files(pub(crate) BTreeMap<String, Vec<u8>>);

impl TileSource for Files {
    fn tile(&self, tile: &Tile) -> Result<Option<Vec<u8>>, ReadError> {
        Ok(self.0.get(&tile.path()).cloned())
    }
}

impl LogReader for Files {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.0.get(path).cloned()
    }

    fn list(&self) -> Vec<String> {
        self.0
            .keys()
            .filter(|path| path.starts_with("tile/"))
            .cloned()
            .collect()
    }
}

/// A growing log in memory.
#[derive(Clone)]
pub(crate) struct Log {
    pub(crate) files: Files,
    pub(crate) grower: Grower,
    pub(crate) key: SigningKey,
    seqs: BTreeMap<u8, u64>,
}

impl Log {
    pub(crate) fn new() -> Log {
        let mut log = Log {
            files: Files::default(),
            grower: Grower::empty(),
            key: signing_key(1),
            seqs: BTreeMap::new(),
        };
        log.publish(0);
        log
    }

    /// A log of `size` entries of three accounts, published at its end.
    pub(crate) fn of(size: u64) -> Log {
        let mut log = Log::new();
        for _ in 0..size {
            log.append_next();
        }
        log.publish(0);
        log
    }

    pub(crate) fn append_next(&mut self) -> (Leaf, Opening) {
        let i = self.grower.size();
        let account = (i % 3) as u8;
        let seq = self.seqs.entry(account).or_default();
        let payload = format!("payload {i}");
        let (leaf, opening) = leaf_with(CLASS, account, TIME_MS + i * 10, *seq, payload.as_bytes());
        *seq += 1;
        self.append(&leaf);
        (leaf, opening)
    }

    pub(crate) fn append(&mut self, leaf: &Leaf) {
        self.grower.append(&leaf.encode().unwrap()).unwrap();
    }

    /// Writes the changed files and a checkpoint.
    pub(crate) fn publish(&mut self, min_index: u64) {
        for file in self.grower.take() {
            self.files.0.insert(file.tile.path(), file.bytes);
        }
        let checkpoint = Checkpoint {
            min_index,
            ..Checkpoint::new(ORIGIN, self.grower.size(), self.grower.root())
        };
        self.files.0.insert(
            "checkpoint".into(),
            checkpoint.sign(&self.key).unwrap().encode().into(),
        );
    }
}
