//! Signed notes of C2SP signed-note, and the witness cosignatures of C2SP tlog-cosignature.
//!
//! Two signature types are known: Ed25519 (0x01) for the log and `cosignature/v1` (0x04) for
//! witnesses. Lines of unknown keys are kept and ignored. Nothing of a note may be used before
//! [`Note::verify`] has succeeded.
//!
//! Must never accept a note one of whose trusted keys signed something else.

use crate::limits::{NAME_BYTES_MAX, NOTE_BYTES_MAX, NOTE_SIGNATURES_MAX};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use seal::hash::sha256;
use seal::sign::{SigningKey, VerifyingKey};

/// Starts each signature line: em dash, space.
const SIGNATURE_PREFIX: &str = "\u{2014} ";

/// A note: a text and the signatures under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    text: String,
    signatures: Vec<Signature>,
}

/// One signature line of a note, not yet verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    name: String,
    key_id: u32,
    bytes: Vec<u8>,
}

/// How a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignatureType {
    /// Plain Ed25519 over the text: what a log does.
    Ed25519,
    /// Ed25519 over `cosignature/v1`, a time and the text: what a witness does.
    CosignatureV1,
}

/// A trusted key under its name.
#[derive(Clone, Debug)]
pub struct Verifier {
    name: String,
    key_id: u32,
    kind: SignatureType,
    key: VerifyingKey,
}

/// A trusted key that signed a note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    /// The key's name.
    pub name: String,
    /// The key's id.
    pub key_id: u32,
    /// How it signed.
    pub kind: SignatureType,
    /// When, in seconds since the epoch; cosignatures only.
    pub time_s: Option<u64>,
}

/// Why a note, a key or a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// Longer than the bound.
    #[error("parse note: longer than {NOTE_BYTES_MAX} bytes")]
    TooLong,
    /// More signature lines than the bound.
    #[error("parse note: more than {NOTE_SIGNATURES_MAX} signatures")]
    TooManySignatures,
    /// Not a text, an empty line and signature lines.
    #[error("parse note: {0}")]
    Malformed(&'static str),
    /// A name that can't stand in a signature line.
    #[error("note key name: must be 1 to 255 bytes without spaces, control characters and '+'")]
    Name,
    /// Not `<name>+<key id>+<base64 key>` of a known type.
    #[error("parse verifier key: {0}; copy the key again from the log's or witness's operator")]
    VerifierKey(&'static str),
    /// A trusted key's signature is wrong.
    #[error("verify note: the signature of {0} is wrong; the text or the signature was changed")]
    BadSignature(String),
    /// None of the trusted keys signed.
    #[error("verify note: not signed by any trusted key; check which log this is and its key")]
    NoTrustedSignature,
}

impl Note {
    /// A note over `text`, not signed yet.
    ///
    /// # Errors
    /// [`NoteError::Malformed`] unless the text ends in a newline and has no control characters.
    pub fn new(text: String) -> Result<Note, NoteError> {
        text_check(&text)?;
        Ok(Note {
            text,
            signatures: Vec::new(),
        })
    }

    /// Parses a note without verifying it.
    ///
    /// # Errors
    /// [`NoteError`] for anything but a text, an empty line, and 1 to 32 signature lines.
    pub fn parse(bytes: &[u8]) -> Result<Note, NoteError> {
        if bytes.len() > NOTE_BYTES_MAX {
            return Err(NoteError::TooLong);
        }
        let note =
            std::str::from_utf8(bytes).map_err(|_| NoteError::Malformed("it is not UTF-8"))?;
        let split = note
            .rfind("\n\n")
            .ok_or(NoteError::Malformed("no empty line before the signatures"))?;
        let (text, lines) = (&note[..split + 1], &note[split + 2..]);
        text_check(text)?;
        let lines = lines.strip_suffix('\n').ok_or(NoteError::Malformed(
            "the last signature line has no newline",
        ))?;
        let mut signatures = Vec::new();
        for line in lines.split('\n') {
            if signatures.len() == NOTE_SIGNATURES_MAX {
                return Err(NoteError::TooManySignatures);
            }
            signatures.push(Signature::parse(line)?);
        }
        Ok(Note {
            text: text.to_string(),
            signatures,
        })
    }

    /// The note as text: what [`Note::parse`] reads.
    pub fn encode(&self) -> String {
        let mut out = format!("{}\n", self.text);
        for signature in &self.signatures {
            out.push_str(&signature.line());
        }
        out
    }

    /// The signed text, final newline included. Not to be used before [`Note::verify`].
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The signature lines, verified or not.
    pub fn signatures(&self) -> &[Signature] {
        &self.signatures
    }

    /// Adds a signature line; one of the same key is replaced.
    ///
    /// # Errors
    /// [`NoteError::TooManySignatures`] beyond the bound.
    pub fn add(&mut self, signature: Signature) -> Result<(), NoteError> {
        let same = |s: &Signature| s.name == signature.name && s.key_id == signature.key_id;
        self.signatures.retain(|s| !same(s));
        if self.signatures.len() == NOTE_SIGNATURES_MAX {
            return Err(NoteError::TooManySignatures);
        }
        self.signatures.push(signature);
        Ok(())
    }

    /// Verifies the signatures of all `trusted` keys that signed; each is returned once.
    ///
    /// # Errors
    /// [`NoteError::BadSignature`] when one of them is wrong, [`NoteError::NoTrustedSignature`]
    /// when there is none.
    pub fn verify(&self, trusted: &[Verifier]) -> Result<Vec<Signed>, NoteError> {
        let mut signed: Vec<Signed> = Vec::new();
        for signature in &self.signatures {
            let Some(verifier) = trusted
                .iter()
                .find(|v| v.key_id == signature.key_id && v.name == signature.name)
            else {
                continue;
            };
            let time_s = verifier
                .verify(&self.text, &signature.bytes)
                .ok_or_else(|| NoteError::BadSignature(verifier.name.clone()))?;
            let known = |s: &Signed| s.name == verifier.name && s.key_id == verifier.key_id;
            if !signed.iter().any(known) {
                signed.push(Signed {
                    name: verifier.name.clone(),
                    key_id: verifier.key_id,
                    kind: verifier.kind,
                    time_s,
                });
            }
        }
        if signed.is_empty() {
            Err(NoteError::NoTrustedSignature)
        } else {
            Ok(signed)
        }
    }
}

impl Signature {
    /// Signs `text` as a log does, under `name`.
    ///
    /// # Errors
    /// [`NoteError`] when the name or the text can't be signed.
    pub fn ed25519(text: &str, name: &str, key: &SigningKey) -> Result<Signature, NoteError> {
        text_check(text)?;
        let verifier = Verifier::new(name, SignatureType::Ed25519, key.public())?;
        let bytes = key.sign_raw(text.as_bytes()).to_vec();
        Ok(Signature {
            name: verifier.name,
            key_id: verifier.key_id,
            bytes,
        })
    }

    /// Cosigns `text` as a witness does, under `name`, at `time_s` seconds since the epoch.
    ///
    /// # Errors
    /// [`NoteError`] when the name or the text can't be signed.
    pub fn cosign_v1(
        text: &str,
        name: &str,
        key: &SigningKey,
        time_s: u64,
    ) -> Result<Signature, NoteError> {
        text_check(text)?;
        let verifier = Verifier::new(name, SignatureType::CosignatureV1, key.public())?;
        let mut bytes = time_s.to_be_bytes().to_vec();
        bytes.extend_from_slice(&key.sign_raw(cosigned_text(text, time_s).as_bytes()));
        Ok(Signature {
            name: verifier.name,
            key_id: verifier.key_id,
            bytes,
        })
    }

    /// The signer's claimed name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The signer's claimed key id.
    pub fn key_id(&self) -> u32 {
        self.key_id
    }

    /// One signature line, with or without its newline: what a witness answers with.
    ///
    /// # Errors
    /// [`NoteError`] for anything else.
    pub fn parse(line: &str) -> Result<Signature, NoteError> {
        let line = line.strip_suffix('\n').unwrap_or(line);
        if line.len() > NOTE_BYTES_MAX {
            return Err(NoteError::TooLong);
        }
        let malformed = NoteError::Malformed;
        let rest = line.strip_prefix(SIGNATURE_PREFIX).ok_or(malformed(
            "a signature line does not start with an em dash and a space",
        ))?;
        let (name, encoded) = rest
            .split_once(' ')
            .ok_or(malformed("a signature line has no signature"))?;
        name_check(name)?;
        let decoded = STANDARD
            .decode(encoded)
            .map_err(|_| malformed("a signature is not base64"))?;
        let (key_id, bytes) = decoded
            .split_first_chunk::<4>()
            .ok_or(malformed("a signature has no key id"))?;
        if bytes.is_empty() {
            return Err(malformed("a signature is empty"));
        }
        Ok(Signature {
            name: name.to_string(),
            key_id: u32::from_be_bytes(*key_id),
            bytes: bytes.to_vec(),
        })
    }

    /// The signature line, newline included.
    pub fn line(&self) -> String {
        let mut bytes = self.key_id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.bytes);
        format!(
            "{SIGNATURE_PREFIX}{} {}\n",
            self.name,
            STANDARD.encode(bytes)
        )
    }
}

impl SignatureType {
    /// The byte that signed-note assigns.
    pub const fn code(self) -> u8 {
        match self {
            SignatureType::Ed25519 => 0x01,
            SignatureType::CosignatureV1 => 0x04,
        }
    }
}

impl Verifier {
    /// A trusted key, its name and how it signs.
    ///
    /// # Errors
    /// [`NoteError::Name`] when the name can't stand in a signature line.
    pub fn new(name: &str, kind: SignatureType, key: VerifyingKey) -> Result<Verifier, NoteError> {
        name_check(name)?;
        let key_id = key_id(name, kind, &key);
        Ok(Verifier {
            name: name.to_string(),
            key_id,
            kind,
            key,
        })
    }

    /// The key's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key's id: the first 4 bytes of SHA-256(name || 0x0A || type || key).
    pub fn key_id(&self) -> u32 {
        self.key_id
    }

    /// How it signs.
    pub fn kind(&self) -> SignatureType {
        self.kind
    }

    /// The key as text: `<name>+<8 hex digits of the id>+<base64 of type and key>`.
    pub fn encode(&self) -> String {
        let mut bytes = vec![self.kind.code()];
        bytes.extend_from_slice(self.key.as_bytes());
        format!(
            "{}+{:08x}+{}",
            self.name,
            self.key_id,
            STANDARD.encode(bytes)
        )
    }

    /// Parses what [`Verifier::encode`] writes.
    ///
    /// # Errors
    /// [`NoteError::VerifierKey`] for another form, an unknown type or an id that does not match.
    pub fn parse(text: &str) -> Result<Verifier, NoteError> {
        let bad = NoteError::VerifierKey;
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(bad("it is not <name>+<id>+<key>"));
        };
        let decoded = STANDARD
            .decode(key)
            .map_err(|_| bad("the key is not base64"))?;
        let Some((code, key)) = decoded.split_first() else {
            return Err(bad("the key is empty"));
        };
        let kind = [SignatureType::Ed25519, SignatureType::CosignatureV1]
            .into_iter()
            .find(|k| k.code() == *code)
            .ok_or(bad("the key's type is unknown"))?;
        let key = VerifyingKey::from_bytes(key).map_err(|_| bad("it is no Ed25519 key"))?;
        let verifier = Verifier::new(name, kind, key)?;
        if format!("{:08x}", verifier.key_id) != id {
            return Err(bad("the id does not belong to this name and key"));
        }
        Ok(verifier)
    }

    /// `Some` if `bytes` is this key's signature over `text`; inside, the cosignature's time.
    fn verify(&self, text: &str, bytes: &[u8]) -> Option<Option<u64>> {
        match self.kind {
            SignatureType::Ed25519 => {
                self.key.verify_raw(text.as_bytes(), bytes).ok()?;
                Some(None)
            }
            SignatureType::CosignatureV1 => {
                let (time, signature) = bytes.split_first_chunk::<8>()?;
                let time_s = u64::from_be_bytes(*time);
                if time_s > i64::MAX as u64 {
                    return None;
                }
                self.key
                    .verify_raw(cosigned_text(text, time_s).as_bytes(), signature)
                    .ok()?;
                Some(Some(time_s))
            }
        }
    }
}

/// The id of a key: the first 4 bytes of SHA-256(name || 0x0A || type || key).
fn key_id(name: &str, kind: SignatureType, key: &VerifyingKey) -> u32 {
    let mut input = name.as_bytes().to_vec();
    input.extend_from_slice(&[b'\n', kind.code()]);
    input.extend_from_slice(key.as_bytes());
    let hash = sha256(&input);
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
}

/// What a `cosignature/v1` signs.
fn cosigned_text(text: &str, time_s: u64) -> String {
    format!("cosignature/v1\ntime {time_s}\n{text}")
}

fn name_check(name: &str) -> Result<(), NoteError> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || c == '+';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(bad) {
        return Err(NoteError::Name);
    }
    Ok(())
}

fn text_check(text: &str) -> Result<(), NoteError> {
    if text.len() > NOTE_BYTES_MAX {
        return Err(NoteError::TooLong);
    }
    if !text.ends_with('\n') {
        return Err(NoteError::Malformed("the text does not end in a newline"));
    }
    if text.bytes().any(|b| b < 0x20 && b != b'\n') {
        return Err(NoteError::Malformed("the text has a control character"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
