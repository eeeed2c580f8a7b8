#![allow(clippy::unwrap_used)]
use super::*;
use crate::note::{Note, Signature};
use crate::testing::{CLASS, Files, Log, ORIGIN, TIME_MS, leaf_with, signing_key, witness};
use crate::tile::tiles_prunable;
use expect_test::expect;
use proptest::prelude::*;
use std::sync::LazyLock;

fn expected(key: &VerifyingKey) -> Expected<'_> {
    Expected {
        origin: ORIGIN,
        class: CLASS,
        log_key: key,
        witnesses: &[],
        witnesses_min: 0,
        known: &[],
    }
}

fn check(files: &Files) -> Report {
    verify(files, &expected(&signing_key(1).public()))
}

fn kinds(report: &Report) -> Vec<FaultKind> {
    let mut kinds: Vec<FaultKind> = report.faults.iter().map(|f| f.kind).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

/// 1,000 entries, pruned below 300.
fn pruned() -> Log {
    let mut log = Log::of(1_000);
    log.publish(300);
    for tile in tiles_prunable(0, 300, 1_000) {
        log.files.0.remove(&tile.path());
    }
    log
}

#[test]
fn clean_logs_of_all_shapes_are_clean() {
    for size in [0, 1, 255, 256, 257, 512, 700, 66_000] {
        let report = check(&Log::of(size).files);
        assert!(report.is_clean(), "{size}: {:?}", report.faults);
        assert_eq!(report.entries, size);
        assert_eq!(report.accounts, size.min(3));
        assert_eq!(report.notices, []);
    }
}

#[test]
fn a_log_grown_in_steps_keeps_its_old_partial_tiles_and_is_clean() {
    let mut log = Log::new();
    for step in [1, 3, 250, 10, 400] {
        for _ in 0..step {
            log.append_next();
        }
        log.publish(0);
    }
    assert!(check(&log.files).is_clean());
    let stale = "tile/0/000.p/4";
    log.files.0.get_mut(stale).unwrap()[40] ^= 1;
    let report = check(&log.files);
    assert_eq!(kinds(&report), [FaultKind::Flip]);
    assert_eq!(report.faults[0].path, stale);
}

#[test]
fn a_pruned_log_is_clean_and_still_bound_by_its_root() {
    let mut log = pruned();
    let report = check(&log.files);
    assert!(report.is_clean(), "{:?}", report.faults);
    assert_eq!(report.entries, 1_000 - 256);
    // The hash of the pruned bundle is in a retained tile: it can't be changed either.
    log.files.0.get_mut("tile/1/000.p/3").unwrap()[0] ^= 1;
    assert_eq!(kinds(&check(&log.files)), [FaultKind::BadRoot]);
}

#[test]
fn a_log_pruned_to_its_end_is_clean_and_grows_on() {
    for size in [256, 1_000, 1_024] {
        let mut log = Log::of(size);
        log.publish(size);
        for tile in tiles_prunable(0, size, size) {
            log.files.0.remove(&tile.path());
        }
        let report = check(&log.files);
        assert!(report.is_clean(), "{size}: {:?}", report.faults);
        assert_eq!(report.entries, size % 256);
        for _ in 0..300 {
            log.append_next();
        }
        log.publish(size);
        let report = check(&log.files);
        assert!(report.is_clean(), "{size}: {:?}", report.faults);
    }
}

#[test]
fn a_prefix_that_was_not_pruned_is_missing() {
    let mut log = Log::of(1_000);
    log.files.0.remove("tile/entries/000");
    assert_eq!(kinds(&check(&log.files)), [FaultKind::Missing]);
}

#[test]
fn leftovers_and_strangers_are_told() {
    let mut log = Log::of(1_000);
    log.publish(300);
    let report = check(&log.files);
    assert_eq!(kinds(&report), [FaultKind::NotPruned]);
    let mut log = Log::of(10);
    log.files.0.insert("tile/0/0001".into(), vec![]);
    assert_eq!(kinds(&check(&log.files)), [FaultKind::Unexpected]);
}

#[test]
fn the_guilty_file_is_named() {
    let mut log = Log::of(1_000);
    log.files.0.get_mut("tile/entries/001").unwrap()[200] ^= 1;
    let report = check(&log.files);
    assert!(
        report.faults.iter().all(|f| f.path == "tile/entries/001"),
        "{:?}",
        report.faults
    );
    assert_eq!(report.faults.last().unwrap().kind, FaultKind::Flip);
    assert_eq!(report.faults.last().unwrap().entry, Some(256));

    let mut log = Log::of(1_000);
    log.files.0.get_mut("tile/0/001").unwrap()[64] ^= 1;
    let report = check(&log.files);
    assert_eq!(report.faults.len(), 1, "{:?}", report.faults);
    assert_eq!(report.faults[0].path, "tile/0/001");
    assert_eq!(report.faults[0].entry, Some(258));
}

#[test]
fn an_omitted_entry_leaves_a_gap_even_if_the_log_itself_omits_it() {
    let mut log = Log::new();
    for (seq, time) in [(0, 0), (1, 1), (3, 2), (3, 3)] {
        log.append(&leaf_with(CLASS, 1, TIME_MS + time, seq, b"").0);
    }
    log.publish(0);
    let report = check(&log.files);
    let found: Vec<_> = report.faults.iter().map(|f| (f.kind, f.entry)).collect();
    assert_eq!(
        found,
        [
            (FaultKind::SeqGap, Some(2)),
            (FaultKind::SeqRepeat, Some(3))
        ]
    );

    let mut log = Log::new();
    log.append(&leaf_with(CLASS, 1, TIME_MS, 1, b"").0);
    log.publish(0);
    assert_eq!(kinds(&check(&log.files)), [FaultKind::SeqGap]);
}

#[test]
fn wrong_times_days_classes_and_leaves_are_told() {
    let mut log = Log::new();
    log.append(&leaf_with(CLASS, 1, TIME_MS, 0, b"").0);
    log.append(&leaf_with(CLASS, 1, TIME_MS - TIME_BACKSTEP_MAX_MS, 1, b"").0);
    log.publish(0);
    assert!(check(&log.files).is_clean());
    log.append(&leaf_with(CLASS, 1, TIME_MS - TIME_BACKSTEP_MAX_MS - 1, 2, b"").0);
    let mut leaf = leaf_with(CLASS, 1, TIME_MS, 3, b"").0;
    leaf.day += 2;
    log.append(&leaf);
    log.append(&leaf_with(Class::Api, 1, TIME_MS, 0, b"").0);
    log.grower.append(b"no leaf").unwrap();
    log.publish(0);
    let found: Vec<_> = check(&log.files)
        .faults
        .iter()
        .map(|f| (f.kind, f.entry))
        .collect();
    assert_eq!(
        found,
        [
            (FaultKind::TimeBack, Some(2)),
            (FaultKind::DayOff, Some(3)),
            (FaultKind::WrongClass, Some(4)),
            (FaultKind::BadLeaf, Some(5)),
        ]
    );
}

#[test]
fn witnesses_and_earlier_checkpoints_are_demanded() {
    let mut log = Log::of(100);
    let early = log.files.clone();
    for _ in 0..500 {
        log.append_next();
    }
    log.publish(0);
    let key = log.key.public();
    let open = |files: &Files| {
        Checkpoint::open(&files.0["checkpoint"], ORIGIN, &key, &[])
            .unwrap()
            .checkpoint
    };
    let known = [open(&early), open(&log.files)];
    let with_known = Expected {
        known: &known,
        ..expected(&key)
    };
    assert!(verify(&log.files, &with_known).is_clean());
    assert_eq!(kinds(&verify(&early, &with_known)), [FaultKind::Rollback]);
    // The old checkpoint put back into the grown directory.
    let mut set_back = log.files.clone();
    set_back
        .0
        .insert("checkpoint".into(), early.0["checkpoint"].clone());
    assert!(
        verify(&set_back, &expected(&key))
            .notices
            .iter()
            .all(|n| n.kind == FaultKind::Ahead)
    );
    assert_eq!(
        kinds(&verify(&set_back, &with_known)),
        [FaultKind::Rollback]
    );
    // Another history under the same key: all of it consistent, but not what was seen.
    let mut forged = Log::new();
    forged.append(&leaf_with(CLASS, 7, TIME_MS, 0, b"forged").0);
    for _ in 0..700 {
        forged.append_next();
    }
    forged.publish(0);
    assert!(!verify(&forged.files, &with_known).is_clean());
    assert_eq!(
        kinds(&verify(&forged.files, &with_known)),
        [FaultKind::Fork]
    );
    // Witnesses.
    let (witness_key, verifier) = witness(5);
    let witnesses = [verifier];
    let witnessed = Expected {
        witnesses: &witnesses,
        witnesses_min: 1,
        ..expected(&key)
    };
    assert_eq!(
        kinds(&verify(&log.files, &witnessed)),
        [FaultKind::TooFewWitnesses]
    );
    let mut note = Note::parse(&log.files.0["checkpoint"]).unwrap();
    let text = note.text().to_string();
    note.add(Signature::cosign_v1(&text, witnesses[0].name(), &witness_key, 1).unwrap())
        .unwrap();
    log.files
        .0
        .insert("checkpoint".into(), note.encode().into());
    assert!(verify(&log.files, &witnessed).is_clean());
}

#[test]
fn a_checkpoint_that_does_not_open_is_not_clean() {
    let mut log = Log::of(3);
    assert!(!verify(&log.files, &expected(&signing_key(2).public())).is_clean());
    let key = log.key.public();
    let other = Expected {
        origin: "casemate.local/lab/api",
        ..expected(&key)
    };
    assert!(!verify(&log.files, &other).is_clean());
    log.files.0.remove("checkpoint");
    assert_eq!(kinds(&check(&log.files)), [FaultKind::Missing]);
}

#[test]
fn a_checkpoint_over_an_absurd_size_ends_soon() {
    let mut log = Log::of(3);
    let huge = Checkpoint::new(ORIGIN, 1 << 61, [0; 32])
        .sign(&log.key)
        .unwrap();
    log.files
        .0
        .insert("checkpoint".into(), huge.encode().into());
    let report = check(&log.files);
    assert!(!report.is_clean() && report.faults.len() <= FAULTS_MAX);
}

#[test]
fn a_consistent_rewrite_without_the_logs_key_is_found() {
    let honest = Log::of(700);
    let rewrite = |skip: Option<u64>, size: u64| {
        let mut forged = Log::new();
        for i in 0..size {
            let time = TIME_MS + i * 10;
            let (mut leaf, _) = leaf_with(CLASS, (i % 3) as u8, time, i / 3, b"");
            leaf.commitment[0] ^= u8::from(skip == Some(i));
            forged.append(&leaf);
        }
        forged.publish(0);
        forged
            .files
            .0
            .insert("checkpoint".into(), honest.files.0["checkpoint"].clone());
        forged.files
    };
    // Every tile fits the forged entries; only the signed root does not.
    assert_eq!(kinds(&check(&rewrite(Some(5), 700))), [FaultKind::BadRoot]);
    // The tail cut off, tiles and all.
    let report = check(&rewrite(None, 600));
    assert!(
        kinds(&report).contains(&FaultKind::Missing),
        "{:?}",
        report.faults
    );
    // The whole log signed again with the forger's own key.
    let mut forged = Log::of(700);
    forged.key = signing_key(66);
    forged.publish(0);
    assert_eq!(kinds(&check(&forged.files)), [FaultKind::BadSignature]);
}

#[test]
fn the_directory_is_frozen() {
    let log = Log::of(300);
    let files: Vec<String> = log
        .files
        .0
        .iter()
        .filter(|(path, _)| *path != "checkpoint")
        .map(|(path, bytes)| {
            let sum = hex::encode(seal::hash::sha256(bytes));
            format!("{path} {} {}", bytes.len(), &sum[..16])
        })
        .collect();
    let checkpoint = String::from_utf8(log.files.0["checkpoint"].clone()).unwrap();
    expect![[r#"
        tile/0/000 8192 4e21dfd2c0cc19ac
        tile/0/001.p/44 1408 98549f3e46ff6f8c
        tile/1/000.p/1 32 a7eae87b71680f4d
        tile/entries/000 67218 47fe32e62041f056
        tile/entries/001.p/44 11572 a943b192913955ac

        casemate.local/lab/host
        300
        k4f19SLrWMUoSLjshr7gcJrPrSBNSgxeOLZHDyGkl8Q=

        — casemate.local/lab/host 7XEncCf47ZxJqrn/U/8snIitthDUSyLRBM43m0jD74cSi25OK2p2IqXsx3pO9uG18myAGlRPKnSMSAKExnNUcoVM+Q8=
    "#]].assert_eq(&format!("{}\n\n{checkpoint}", files.join("\n")));
}

/// The logs that are mutated below: small, full-tile and pruned ones, without stale partials.
static VICTIMS: LazyLock<Vec<Files>> = LazyLock::new(|| {
    vec![
        Log::of(5).files,
        Log::of(256).files,
        Log::of(700).files,
        pruned().files,
    ]
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    #[test]
    fn every_mutation_of_a_log_directory_is_found(
        victim in 0usize..4, file in any::<usize>(), kind in 0u8..7,
        at in any::<usize>(), other in any::<usize>(), byte in any::<u8>(), bit in 0u8..8,
    ) {
        let mut files = VICTIMS[victim].clone();
        let paths: Vec<String> = files.0.keys().cloned().collect();
        let (path, second) = (&paths[file % paths.len()], &paths[other % paths.len()]);
        let before = files.0.clone();
        let bytes = files.0.get_mut(path).unwrap();
        let len = bytes.len();
        match kind {
            0 => bytes[at % len] ^= 1 << bit,
            1 => bytes[at % len] = byte,
            2 => bytes.truncate(at % len),
            3 => bytes.push(byte),
            4 => { bytes.remove(at % len); }
            5 => { files.0.remove(path); }
            _ => {
                // Swap two files.
                let a = files.0[path].clone();
                let b = files.0.insert(second.clone(), a).unwrap();
                files.0.insert(path.clone(), b);
            }
        }
        prop_assume!(files.0 != before);
        let report = check(&files);
        prop_assert!(!report.is_clean(), "{} of {path} went unnoticed", kind);
    }
}
