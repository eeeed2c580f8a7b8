#![allow(clippy::unwrap_used)]
use super::*;
use crate::checkpoint::Checkpoint;
use crate::merkle::inclusion_proof;
use crate::testing::{CLASS, Log, ORIGIN, leaf_with, signing_key};
use crate::tile::TileHashes;
use proptest::prelude::*;
use std::sync::LazyLock;

const SIZE: u64 = 300;

struct World {
    key: VerifyingKey,
    receipts: Vec<Receipt>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let mut log = Log::new();
    let appended: Vec<_> = (0..SIZE).map(|_| log.append_next()).collect();
    log.publish(0);
    let nodes = TileHashes::new(&log.files, SIZE);
    let checkpoint = String::from_utf8(log.files.0["checkpoint"].clone()).unwrap();
    let receipts = (0..SIZE)
        .zip(&appended)
        .map(|(index, (leaf, opening))| {
            let proof = inclusion_proof(index, SIZE, &nodes).unwrap();
            Receipt::new(
                CLASS,
                index,
                &leaf.encode().unwrap(),
                opening,
                &proof,
                &checkpoint,
            )
        })
        .collect();
    World {
        key: log.key.public(),
        receipts,
    }
});

fn verify(receipt: &Receipt) -> Result<VerifiedReceipt, ReceiptError> {
    receipt.verify(&WORLD.key, ORIGIN)
}

#[test]
fn every_entry_has_a_receipt_that_verifies_after_the_wire() {
    for (index, receipt) in WORLD.receipts.iter().enumerate() {
        let json = serde_json::to_string(receipt).unwrap();
        let verified = verify(&serde_json::from_str(&json).unwrap()).unwrap();
        assert_eq!(verified.payload, format!("payload {index}").into_bytes());
        assert_eq!((verified.index, verified.size), (index as u64, SIZE));
        assert_eq!(verified.class, CLASS);
    }
}

#[test]
fn the_largest_receipt_fits_its_bound() {
    let receipt = Receipt {
        leaf: "A".repeat(LEAF_BYTES_MAX.div_ceil(3) * 4),
        opening: ReceiptOpening {
            salt: "A".repeat(44),
            payload: "A".repeat(PAYLOAD_BYTES_MAX.div_ceil(3) * 4),
        },
        proof: vec!["A".repeat(44); PROOF_HASHES_MAX],
        checkpoint: "\n".repeat(NOTE_BYTES_MAX),
        log: "metering".into(),
        index: u64::MAX,
    };
    let json = serde_json::to_string(&receipt).unwrap();
    assert!(
        json.len() <= crate::limits::RECEIPT_JSON_BYTES_MAX,
        "{}",
        json.len()
    );
}

#[test]
fn another_key_origin_or_class_is_refused() {
    let receipt = &WORLD.receipts[7];
    assert!(receipt.verify(&signing_key(9).public(), ORIGIN).is_err());
    assert!(
        receipt
            .verify(&WORLD.key, "casemate.local/other/host")
            .is_err()
    );
    assert!(
        receipt
            .verify(&WORLD.key, "casemate.local/lab/api")
            .is_err()
    );
    let renamed = Receipt {
        log: "api".into(),
        ..receipt.clone()
    };
    assert_eq!(verify(&renamed), Err(ReceiptError::OtherClass));
    assert!(
        renamed
            .verify(&WORLD.key, "casemate.local/lab/api")
            .is_err()
    );
}

#[test]
fn a_leaf_of_another_class_in_the_log_is_refused() {
    let (leaf, opening) = leaf_with(Class::Api, 0, 1, 0, b"x");
    let bytes = leaf.encode().unwrap();
    let checkpoint = Checkpoint::new(ORIGIN, 1, leaf_hash(&bytes));
    let note = checkpoint.sign(&signing_key(1)).unwrap().encode();
    let receipt = Receipt::new(CLASS, 0, &bytes, &opening, &[], &note);
    assert_eq!(verify(&receipt), Err(ReceiptError::OtherClass));
    // The other way round: a host leaf, said to be in the host's log, proved by the API's.
    let api = "casemate.local/lab/api";
    let (leaf, opening) = leaf_with(CLASS, 0, 1, 0, b"x");
    let bytes = leaf.encode().unwrap();
    let note = Checkpoint::new(api, 1, leaf_hash(&bytes))
        .sign(&signing_key(1))
        .unwrap()
        .encode();
    let receipt = Receipt::new(CLASS, 0, &bytes, &opening, &[], &note);
    assert_eq!(
        receipt.verify(&WORLD.key, api),
        Err(ReceiptError::OtherClass)
    );
}

#[test]
fn debug_output_shows_no_payload() {
    let receipt = &WORLD.receipts[3];
    let verified = verify(receipt).unwrap();
    let shown = format!("{receipt:?} {verified:?}");
    assert!(!shown.contains(&receipt.opening.payload) && !shown.contains("payload 3"));
}

/// Changes one character of a text to another one.
fn change(text: &mut String, at: usize, to: char) -> bool {
    let mut chars: Vec<char> = text.chars().collect();
    if chars.is_empty() {
        *text = to.to_string();
        return true;
    }
    let at = at % chars.len();
    let changed = chars[at] != to;
    chars[at] = to;
    *text = chars.into_iter().collect();
    changed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_changed_receipt_fails(
        pick in 0..SIZE as usize, field in 0u8..9, at in any::<usize>(),
        to in proptest::char::range('+', 'z'), other in any::<u64>(),
    ) {
        let mut receipt = WORLD.receipts[pick].clone();
        let stranger = &WORLD.receipts[(other % SIZE) as usize];
        let len = receipt.proof.len();
        let changed = match field {
            0 => change(&mut receipt.leaf, at, to),
            1 => change(&mut receipt.opening.salt, at, to),
            2 => change(&mut receipt.opening.payload, at, to),
            3 => change(&mut receipt.checkpoint, at, to),
            4 => change(&mut receipt.proof[at % len], at, to),
            5 => { receipt.proof.pop(); true }
            6 => { receipt.index = other; other != pick as u64 }
            7 => { receipt.proof.push(stranger.proof[0].clone()); true }
            _ => {
                receipt.leaf = stranger.leaf.clone();
                receipt.opening = stranger.opening.clone();
                other % SIZE != pick as u64
            }
        };
        prop_assume!(changed);
        prop_assert!(verify(&receipt).is_err());
    }
}

proptest! {
    #[test]
    fn hostile_receipts_never_panic(
        log in "(host|api|.{0,8})", index in any::<u64>(), leaf in ".{0,40}", salt in ".{0,50}",
        payload in ".{0,40}", proof in proptest::collection::vec(".{0,50}", 0..70), checkpoint in ".{0,80}",
    ) {
        let opening = ReceiptOpening { salt, payload };
        let receipt = Receipt { log, index, leaf, opening, proof, checkpoint };
        prop_assert!(verify(&receipt).is_err());
    }
}
