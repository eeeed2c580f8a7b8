//! Checkpoints of C2SP tlog-checkpoint: a signed note over a log's origin, size and root.
//!
//! A log that has been pruned says so in an extension line, `min-index <N>`, under the same
//! signature: without it a missing prefix is a fault, so nobody but the log's key can make one
//! look like expiry.

use crate::limits::{CHECKPOINT_EXTENSIONS_MAX, HASH_BYTES, NAME_BYTES_MAX, TREE_SIZE_MAX};
use crate::merkle::Hash;
use crate::note::{Note, NoteError, Signature, SignatureType, Signed, Verifier};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use seal::sign::{SigningKey, VerifyingKey};

/// Starts the extension line of a pruned log.
const MIN_INDEX_PREFIX: &str = "min-index ";

/// What a log states: its name, how many entries it has, and their root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log's name.
    pub origin: String,
    /// How many entries the tree has, pruned ones included.
    pub size: u64,
    /// The root of the tree.
    pub root: Hash,
    /// Entries below this index may be gone. 0 when the log was never pruned.
    pub min_index: u64,
    /// Other extension lines: opaque, not empty, no newline inside.
    pub extensions: Vec<String>,
}

/// A checkpoint whose log signature was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// What the log states.
    pub checkpoint: Checkpoint,
    /// Which of the trusted witnesses cosigned it, and when; each at most once.
    pub cosignatures: Vec<Signed>,
}

/// Why a checkpoint was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The note around it is malformed, or not signed as it must be.
    #[error("open checkpoint: {0}")]
    Note(#[from] NoteError),
    /// The note's text is not a checkpoint.
    #[error("parse checkpoint: {0}")]
    Malformed(&'static str),
    /// It is another log's.
    #[error("open checkpoint: it is of log {got}, not of {expected}; check which log was asked")]
    Origin {
        /// The log asked for.
        expected: String,
        /// The log that stated this.
        got: String,
    },
}

impl Checkpoint {
    /// A checkpoint of a log that was never pruned.
    pub fn new(origin: &str, size: u64, root: Hash) -> Checkpoint {
        Checkpoint {
            origin: origin.to_string(),
            size,
            root,
            min_index: 0,
            extensions: Vec::new(),
        }
    }

    /// The note text: origin, size, root and extension lines.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] when a field can't stand in its line.
    pub fn body(&self) -> Result<String, CheckpointError> {
        let mut body = format!(
            "{}\n{}\n{}\n",
            self.origin,
            self.size,
            STANDARD.encode(self.root)
        );
        if self.min_index > 0 {
            body.push_str(&format!("{MIN_INDEX_PREFIX}{}\n", self.min_index));
        }
        for line in &self.extensions {
            body.push_str(line);
            body.push('\n');
        }
        // Whatever would not read back as this very checkpoint is not signed.
        if Checkpoint::parse(&body)? != *self {
            return Err(CheckpointError::Malformed("a field does not fit its line"));
        }
        Ok(body)
    }

    /// Parses a note text. Nothing of it is trustworthy before the note is verified.
    ///
    /// # Errors
    /// [`CheckpointError::Malformed`] for anything but the form that [`Checkpoint::body`] writes.
    pub fn parse(body: &str) -> Result<Checkpoint, CheckpointError> {
        let malformed = CheckpointError::Malformed;
        let body = body
            .strip_suffix('\n')
            .ok_or(malformed("it does not end in a newline"))?;
        let mut lines = body.split('\n');
        let (Some(origin), Some(size), Some(root)) = (lines.next(), lines.next(), lines.next())
        else {
            return Err(malformed("it has fewer than three lines"));
        };
        if origin.is_empty() || origin.len() > NAME_BYTES_MAX {
            return Err(malformed("the origin is empty or longer than 255 bytes"));
        }
        if origin.contains(|c: char| c.is_whitespace() || c.is_control() || c == '+') {
            return Err(malformed(
                "the origin has a space, a control character or '+'",
            ));
        }
        let size = decimal(size)
            .filter(|size| *size <= TREE_SIZE_MAX)
            .ok_or(malformed(
                "the size is not a plain decimal number within the bound",
            ))?;
        let root = hash_parse(root).ok_or(malformed("the root is not 32 bytes in base64"))?;
        let mut checkpoint = Checkpoint::new(origin, size, root);
        for (i, line) in lines.enumerate() {
            if i >= CHECKPOINT_EXTENSIONS_MAX {
                return Err(malformed("it has more than 16 extension lines"));
            }
            if line.is_empty() || line.bytes().any(|b| b < 0x20) {
                return Err(malformed(
                    "an extension line is empty or has a control character",
                ));
            }
            match line.strip_prefix(MIN_INDEX_PREFIX) {
                Some(number) if i == 0 => {
                    checkpoint.min_index =
                        decimal(number)
                            .filter(|min| *min > 0 && *min <= size)
                            .ok_or(malformed("the minimum index is not within the tree"))?;
                }
                Some(_) => return Err(malformed("min-index is not the first extension line")),
                None => checkpoint.extensions.push(line.to_string()),
            }
        }
        Ok(checkpoint)
    }

    /// Signs the checkpoint with the log's key; the key's name is the origin.
    ///
    /// # Errors
    /// [`CheckpointError`] when a field can't stand in its line.
    pub fn sign(&self, log_key: &SigningKey) -> Result<Note, CheckpointError> {
        let body = self.body()?;
        let signature = Signature::ed25519(&body, &self.origin, log_key)?;
        let mut note = Note::new(body)?;
        note.add(signature)?;
        Ok(note)
    }

    /// Opens the checkpoint that the log `origin` signed with `log_key`, and verifies the
    /// cosignatures of those `witnesses` that made one.
    ///
    /// # Errors
    /// [`CheckpointError`] when it is malformed, of another log, not signed by the log, or a
    /// trusted witness's line on it is wrong.
    pub fn open(
        bytes: &[u8],
        origin: &str,
        log_key: &VerifyingKey,
        witnesses: &[Verifier],
    ) -> Result<Opened, CheckpointError> {
        let note = Note::parse(bytes)?;
        let log = Verifier::new(origin, SignatureType::Ed25519, *log_key)?;
        note.verify(std::slice::from_ref(&log))?;
        let checkpoint = Checkpoint::parse(note.text())?;
        if checkpoint.origin != origin {
            let expected = origin.to_string();
            return Err(CheckpointError::Origin {
                expected,
                got: checkpoint.origin,
            });
        }
        let cosignatures = match note.verify(witnesses) {
            Ok(signed) => signed,
            Err(NoteError::NoTrustedSignature) => Vec::new(),
            Err(wrong) => return Err(wrong.into()),
        };
        Ok(Opened {
            checkpoint,
            cosignatures,
        })
    }
}

/// A hash from its one canonical base64 text.
pub(crate) fn hash_parse(text: &str) -> Option<Hash> {
    if text.len() != HASH_BYTES.div_ceil(3) * 4 {
        return None;
    }
    STANDARD.decode(text).ok()?.try_into().ok()
}

/// A number in plain decimal: digits only, no leading zero.
fn decimal(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::merkle::leaf_hash;
    use crate::testing::{signing_key, witness};
    use proptest::prelude::*;

    const ORIGIN: &str = "casemate.local/lab/host";

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            min_index: 256,
            extensions: vec!["policy 7".into()],
            ..Checkpoint::new(ORIGIN, 1_000, leaf_hash(b"root"))
        }
    }

    #[test]
    fn the_specifications_example_parses() {
        let body = "example.com/behind-the-sofa\n20852163\n\
                    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n";
        let parsed = Checkpoint::parse(body).unwrap();
        assert_eq!(
            (parsed.origin.as_str(), parsed.size),
            ("example.com/behind-the-sofa", 20852163)
        );
        assert_eq!(parsed.body().unwrap(), body);
    }

    #[test]
    fn signed_and_cosigned_it_opens() {
        let key = signing_key(1);
        let mut note = checkpoint().sign(&key).unwrap();
        let (witness_key, verifier) = witness(2);
        let text = note.text().to_string();
        let cosignature =
            Signature::cosign_v1(&text, verifier.name(), &witness_key, 1_700_000_000).unwrap();
        note.add(cosignature).unwrap();
        let bytes = note.encode();
        let opened = Checkpoint::open(
            bytes.as_bytes(),
            ORIGIN,
            &key.public(),
            std::slice::from_ref(&verifier),
        )
        .unwrap();
        assert_eq!(opened.checkpoint, checkpoint());
        assert_eq!(opened.cosignatures.len(), 1);
        assert_eq!(opened.cosignatures[0].time_s, Some(1_700_000_000));
        // A witness nobody trusts changes nothing; neither does it stand in for the log.
        let other = witness(3).1;
        let opened = Checkpoint::open(bytes.as_bytes(), ORIGIN, &key.public(), &[other]).unwrap();
        assert!(opened.cosignatures.is_empty());
        let wrong = signing_key(4).public();
        assert!(Checkpoint::open(bytes.as_bytes(), ORIGIN, &wrong, &[verifier]).is_err());
    }

    #[test]
    fn another_logs_checkpoint_is_refused() {
        let key = signing_key(1);
        let bytes = checkpoint().sign(&key).unwrap().encode();
        let other = "casemate.local/lab/api";
        assert!(Checkpoint::open(bytes.as_bytes(), other, &key.public(), &[]).is_err());
        // Signed under our name, but stating another origin.
        let body = Checkpoint {
            origin: other.into(),
            ..checkpoint()
        }
        .body()
        .unwrap();
        let mut note = Note::new(body.clone()).unwrap();
        note.add(Signature::ed25519(&body, ORIGIN, &key).unwrap())
            .unwrap();
        assert!(matches!(
            Checkpoint::open(note.encode().as_bytes(), ORIGIN, &key.public(), &[]),
            Err(CheckpointError::Origin { .. })
        ));
    }

    #[test]
    fn other_spellings_are_refused() {
        let root = "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=";
        let bad_root = "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2J=";
        for body in [
            "".into(),
            format!("o\n1\n{root}"),
            format!("\n1\n{root}\n"),
            format!("a b\n1\n{root}\n"),
            format!("o\n01\n{root}\n"),
            format!("o\n+1\n{root}\n"),
            format!("o\n-1\n{root}\n"),
            format!("o\n\n{root}\n"),
            format!("o\n9223372036854775807\n{root}\n"),
            format!("o\n1\n{bad_root}\n"),
            format!("o\n1\n{root}=\n"),
            "o\n1\n\n".into(),
            format!("o\n1\n{root}\n\n"),
            format!("o\n1\n{root}\nmin-index 0\n"),
            format!("o\n1\n{root}\nmin-index 2\n"),
            format!("o\n1\n{root}\nx\nmin-index 1\n"),
            format!("o\n1\n{root}\n{}", "x\n".repeat(17)),
        ] {
            assert!(Checkpoint::parse(&body).is_err(), "{body:?}");
        }
        let smuggling = Checkpoint {
            extensions: vec!["a\nb".into()],
            ..checkpoint()
        };
        assert!(smuggling.sign(&signing_key(1)).is_err());
        let smuggling = Checkpoint {
            extensions: vec!["min-index 9".into()],
            ..checkpoint()
        };
        assert!(smuggling.sign(&signing_key(1)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails(body in "[a-z0-9=/+ \\n]{0,200}") {
            if let Ok(parsed) = Checkpoint::parse(&body) {
                prop_assert_eq!(parsed.body().unwrap(), body);
            }
        }

        #[test]
        fn a_flipped_bit_closes_it(at in any::<usize>(), bit in 0u8..8) {
            let key = signing_key(1);
            let mut bytes = checkpoint().sign(&key).unwrap().encode().into_bytes();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Checkpoint::open(&bytes, ORIGIN, &key.public(), &[]).is_err());
        }
    }
}
