#![allow(clippy::unwrap_used)]
use super::*;
use crate::testing::{signing_key, witness};
use proptest::prelude::*;

const TEXT: &str = "casemate.local/lab/host\n7\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n";

fn log_verifier(name: &str, seed: u8) -> Verifier {
    Verifier::new(name, SignatureType::Ed25519, signing_key(seed).public()).unwrap()
}

/// TEXT signed by the log "log.example" with key 1 and cosigned by witness 2.
fn signed() -> Note {
    let mut note = Note::new(TEXT.into()).unwrap();
    note.add(Signature::ed25519(TEXT, "log.example", &signing_key(1)).unwrap())
        .unwrap();
    let (key, verifier) = witness(2);
    note.add(Signature::cosign_v1(TEXT, verifier.name(), &key, 1_679_315_147).unwrap())
        .unwrap();
    note
}

#[test]
fn a_note_of_go_verifies() {
    // From golang.org/x/mod/sumdb/note.
    let verifier =
        Verifier::parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
            .unwrap();
    let bytes = "If you think cryptography is the answer to your problem,\n\
        then you don't know what your problem is.\n\
        \n\
        — PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
    let note = Note::parse(bytes.as_bytes()).unwrap();
    assert_eq!(
        note.verify(std::slice::from_ref(&verifier)).unwrap()[0].name,
        "PeterNeumann"
    );
    assert_eq!(note.encode(), bytes);
    assert_eq!(
        verifier.encode(),
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    );
}

#[test]
fn log_and_witness_both_count_once() {
    let note = Note::parse(signed().encode().as_bytes()).unwrap();
    assert_eq!(note, signed());
    let trusted = [log_verifier("log.example", 1), witness(2).1];
    let signed = note.verify(&trusted).unwrap();
    assert_eq!(
        signed.iter().map(|s| s.time_s).collect::<Vec<_>>(),
        [None, Some(1_679_315_147)]
    );
    let doubled = format!("{}{}", note.encode(), note.signatures()[0].line());
    let doubled = Note::parse(doubled.as_bytes()).unwrap();
    assert_eq!(doubled.verify(&trusted).unwrap().len(), 2);
}

#[test]
fn a_wrong_signature_of_one_trusted_key_refuses_the_note() {
    let mut text = signed().encode();
    text = text.replacen("\n7\n", "\n8\n", 1);
    let note = Note::parse(text.as_bytes()).unwrap();
    let trusted = [log_verifier("log.example", 1), witness(2).1];
    assert!(matches!(
        note.verify(&trusted),
        Err(NoteError::BadSignature(_))
    ));
}

#[test]
fn unknown_keys_are_ignored_even_under_a_known_name() {
    let note = signed();
    assert_eq!(note.verify(&[]), Err(NoteError::NoTrustedSignature));
    assert_eq!(
        note.verify(&[
            log_verifier("log.example", 9),
            log_verifier("other.example", 1)
        ]),
        Err(NoteError::NoTrustedSignature)
    );
    // A log's signature does not count as its cosignature, nor the other way round.
    let as_witness = Verifier::new(
        "log.example",
        SignatureType::CosignatureV1,
        signing_key(1).public(),
    );
    assert_eq!(
        note.verify(&[as_witness.unwrap()]),
        Err(NoteError::NoTrustedSignature)
    );
}

#[test]
fn a_cosignature_binds_its_time() {
    let (key, verifier) = witness(2);
    let mut signature = Signature::cosign_v1(TEXT, verifier.name(), &key, 5).unwrap();
    signature.bytes[7] = 6;
    let mut note = Note::new(TEXT.into()).unwrap();
    note.add(signature).unwrap();
    assert!(note.verify(&[verifier]).is_err());
}

#[test]
fn malformed_notes_are_refused() {
    let good = signed().encode();
    for bad in [
        String::new(),
        "\n\n".into(),
        TEXT.into(),
        format!("{TEXT}\n"),
        good.trim_end().into(),
        format!("{good}\n"),
        format!("{good}x"),
        good.replace('\u{2014}', "-"),
        good.replace("log.example ", "log.example  "),
        good.replace("log.example", "log+example"),
        good.replace("log.example", "log\u{a0}example"),
        good.replace("log.example", "log\rexample"),
        good.replace("\n7\n", "\n7\t\n"),
        good.replace("=\n", "\n"),
        format!("{TEXT}\n\u{2014} a AAAA\n"),
        format!("{TEXT}\n\u{2014} a AAAAAA==\n"),
        format!(
            "{TEXT}\n{}",
            "\u{2014} a AAAAAAA=\n".repeat(NOTE_SIGNATURES_MAX + 1)
        ),
        format!("{}\n{good}", "x".repeat(NOTE_BYTES_MAX)),
    ] {
        assert!(Note::parse(bad.as_bytes()).is_err(), "{bad:?}");
    }
    assert!(Note::parse(&[0xff; 40]).is_err());
    assert!(Note::new("no newline".into()).is_err());
}

#[test]
fn bad_verifier_keys_are_refused() {
    let good = log_verifier("log.example", 1).encode();
    assert_eq!(Verifier::parse(&good).unwrap().encode(), good);
    let witness_key = witness(2).1.encode();
    assert_eq!(
        Verifier::parse(&witness_key).unwrap().kind(),
        SignatureType::CosignatureV1
    );
    for bad in [
        "",
        "a",
        "a+b",
        "a+b+c",
        &good[1..],
        &good[..good.len() - 4],
        &format!("{good}A"),
    ] {
        assert!(Verifier::parse(bad).is_err(), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_parse_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Note::parse(&bytes);
    }

    #[test]
    fn what_parses_encodes_back(
        text in "[ -~\\n]{0,60}", name in "[!-~]{1,10}", sig in proptest::collection::vec(any::<u8>(), 5..40),
    ) {
        let line = format!("\u{2014} {name} {}\n", STANDARD.encode(&sig));
        let whole = format!("{text}\n\n{line}");
        if let Ok(note) = Note::parse(whole.as_bytes()) {
            prop_assert_eq!(note.encode(), whole);
        }
    }

    #[test]
    fn a_flipped_bit_never_verifies_fully(at in any::<usize>(), bit in 0u8..8) {
        let mut bytes = signed().encode().into_bytes();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let trusted = [log_verifier("log.example", 1), witness(2).1];
        let fully = Note::parse(&bytes)
            .and_then(|note| note.verify(&trusted))
            .is_ok_and(|signed| signed.len() == 2);
        prop_assert!(!fully);
    }
}
