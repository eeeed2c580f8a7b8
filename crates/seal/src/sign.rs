//! Ed25519 signatures (RFC 8032) and [`Signed`], a document with its signature in one ASCII word.
//!
//! Must never verify a document of one kind as another: the signature of a [`Signed`] covers
//! `context || 0x00 || payload`, and `context` is a constant of the code, not of the document.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::encoding::AsBigEndian;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::limits::SIGNED_MAX_BYTES;
use crate::{SealError, hash, hexkey, json, random};

/// A private Ed25519 key. Clones share one key, wiped when the last one goes.
#[derive(Clone)]
pub struct SigningKey(Arc<Ed25519KeyPair>);

impl SigningKey {
    /// A fresh key.
    #[must_use]
    pub fn generate() -> Self {
        Self::from_seed(&Zeroizing::new(random::bytes()))
    }

    /// The key of this seed (RFC 8032's 32-byte private key).
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).expect("each 32 bytes are a seed");
        Self(Arc::new(pair))
    }

    /// The seed, for storing it sealed.
    #[must_use]
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        let seed = self.0.seed().expect("the pair was made from a seed");
        let bytes = seed.as_be_bytes().expect("a seed is bytes already");
        let mut out = Zeroizing::new([0; 32]);
        out.copy_from_slice(bytes.as_ref());
        out
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> VerifyingKey {
        let bytes = self.0.public_key().as_ref();
        VerifyingKey(
            bytes
                .try_into()
                .expect("an Ed25519 public key has 32 bytes"),
        )
    }

    /// Signs `message` as it stands. Prefer [`Signed::new`]: it says what kind of thing is signed.
    #[must_use]
    pub fn sign_raw(&self, message: &[u8]) -> [u8; 64] {
        let signature = self.0.sign(message);
        signature
            .as_ref()
            .try_into()
            .expect("an Ed25519 signature has 64 bytes")
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().key_id())
    }
}

/// A public Ed25519 key; in text and JSON 64 lowercase hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VerifyingKey([u8; 32]);

hexkey::hex_key!(VerifyingKey, "Ed25519 public key");

impl VerifyingKey {
    /// Takes 32 bytes.
    ///
    /// # Errors
    /// If they are no curve point, or one of small order (anybody could sign for such a key).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealError> {
        let wrong = |why| SealError::Malformed {
            what: "Ed25519 public key",
            why,
        };
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| wrong("must have 32 bytes"))?;
        if is_small_order(&bytes) {
            return Err(wrong("is of small order: it proves nothing"));
        }
        Ok(Self(bytes))
    }

    /// Names the key: the first 8 hex digits of its SHA-256. A hint for finding the key, no proof.
    #[must_use]
    pub fn key_id(&self) -> String {
        hex::encode(&hash::sha256(&self.0)[..4])
    }

    /// Checks a signature over `message` as it stands.
    ///
    /// # Errors
    /// [`SealError::Signature`] if it does not hold.
    pub fn verify_raw(&self, message: &[u8], signature: &[u8]) -> Result<(), SealError> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(message, signature)
            .map_err(|_| SealError::Signature {
                what: "Ed25519 signature",
            })
    }
}

/// Whether the encoding is of a point of order 1, 2, 4 or 8 (in any accepted encoding; the sign
/// bit is left out of the comparison).
fn is_small_order(bytes: &[u8; 32]) -> bool {
    // y coordinates, little-endian: 0, 1, p-1, p, p+1 and the two of order 8 (RFC 7748's curve;
    // the list libsodium holds too).
    const Y8A: [u8; 32] = [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98,
        0xf0, 0xd5, 0xdf, 0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53,
        0xfc, 0x05,
    ];
    const Y8B: [u8; 32] = [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67,
        0x0f, 0x2a, 0x20, 0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac,
        0x03, 0x7a,
    ];
    let mut y = *bytes;
    y[31] &= 0x7f;
    let middle_is = |value: u8| y[1..31].iter().all(|b| *b == value);
    let near_zero = y[0] <= 1 && middle_is(0) && y[31] == 0;
    let near_p = (0xec..=0xee).contains(&y[0]) && middle_is(0xff) && y[31] == 0x7f;
    near_zero || near_p || y == Y8A || y == Y8B
}

/// A signed document: `v1.<key id>.<base64url payload>.<base64url signature>`, at most 16 KiB.
///
/// One document has one text: [`Signed::digest`] therefore names it, and it can be compared,
/// stored and logged as a whole. Its form is checked on every way in; its signature only by
/// [`Signed::verify`].
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Signed(String);

const VERSION: &str = "v1";
const SIGNED: &str = "signed document";

impl Signed {
    /// Signs `payload` as a document of the kind `context`, e.g. `"casemate lease v1"`.
    ///
    /// # Panics
    /// If the payload can't be JSON or makes more than 16 KiB: a bug where the payload's size is
    /// bounded by its type. Where it is not, use [`Signed::try_new`].
    #[must_use]
    pub fn new(key: &SigningKey, context: &'static str, payload: &impl Serialize) -> Self {
        match Self::try_new(key, context, payload) {
            Ok(signed) => signed,
            Err(error) => panic!("signing a {context:?}: {error}"),
        }
    }

    /// Like [`Signed::new`].
    ///
    /// # Errors
    /// If the payload can't be JSON or makes more than 16 KiB.
    pub fn try_new(
        key: &SigningKey,
        context: &'static str,
        payload: &impl Serialize,
    ) -> Result<Self, SealError> {
        let payload =
            json::to_vec(payload).map_err(|why| SealError::Malformed { what: SIGNED, why })?;
        json::parse_strict(&payload).map_err(|why| SealError::Malformed { what: SIGNED, why })?;
        let signature = key.sign_raw(&message(context, &payload));
        let text = format!(
            "{VERSION}.{}.{}.{}",
            key.public().key_id(),
            URL_SAFE_NO_PAD.encode(&payload),
            URL_SAFE_NO_PAD.encode(signature),
        );
        if text.len() > SIGNED_MAX_BYTES {
            return Err(SealError::TooLarge {
                what: SIGNED,
                max_bytes: SIGNED_MAX_BYTES,
            });
        }
        Ok(Self(text))
    }

    /// Takes a text if it has the form of a signed document. Proves nothing about the signature.
    ///
    /// # Errors
    /// If the form is wrong.
    pub fn parse(text: impl Into<String>) -> Result<Self, SealError> {
        let text = text.into();
        Parts::of(&text)?;
        Ok(Self(text))
    }

    /// The payload, if `key` signed it as a document of the kind `context`.
    ///
    /// # Errors
    /// [`SealError::Signature`] if not; [`SealError::Malformed`] if it did, but the payload is not
    /// a `T`.
    pub fn verify<T: DeserializeOwned>(
        &self,
        key: &VerifyingKey,
        context: &'static str,
    ) -> Result<T, SealError> {
        let parts = Parts::of(&self.0)?;
        if parts.key_id != key.key_id() {
            return Err(SealError::Signature { what: SIGNED });
        }
        key.verify_raw(&message(context, &parts.payload), &parts.signature)
            .map_err(|_| SealError::Signature { what: SIGNED })?;
        json::parse_as(&parts.payload).map_err(|why| SealError::Malformed { what: SIGNED, why })
    }

    /// The key id it claims: which key to verify with.
    #[must_use]
    pub fn key_id(&self) -> &str {
        self.0
            .split('.')
            .nth(1)
            .expect("the form was checked when it was made")
    }

    /// SHA-256 of the text: the document's name.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        hash::sha256(self.0.as_bytes())
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The decoded parts of a signed document.
struct Parts<'a> {
    key_id: &'a str,
    payload: Vec<u8>,
    signature: [u8; 64],
}

impl<'a> Parts<'a> {
    fn of(text: &'a str) -> Result<Self, SealError> {
        let wrong = |why| SealError::Malformed { what: SIGNED, why };
        if text.len() > SIGNED_MAX_BYTES {
            return Err(SealError::TooLarge {
                what: SIGNED,
                max_bytes: SIGNED_MAX_BYTES,
            });
        }
        let mut words = text.split('.');
        let (Some(version), Some(key_id), Some(payload), Some(signature), None) = (
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
        ) else {
            return Err(wrong("must have four parts"));
        };
        if version != VERSION {
            return Err(wrong("has a version this program does not know"));
        }
        if key_id.len() != 8
            || !key_id
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(wrong("its key id must be 8 lowercase hex digits"));
        }
        // This engine refuses padding and non-zero trailing bits: one text per value.
        let decode = |word| {
            URL_SAFE_NO_PAD
                .decode(word)
                .map_err(|_| wrong("must be canonical base64url"))
        };
        let signature = decode(signature)?
            .try_into()
            .map_err(|_| wrong("its signature must have 64 bytes"))?;
        Ok(Self {
            key_id,
            payload: decode(payload)?,
            signature,
        })
    }
}

fn message(context: &'static str, payload: &[u8]) -> Vec<u8> {
    assert!(
        !context.is_empty() && !context.contains('\0'),
        "a context is a plain name"
    );
    [context.as_bytes(), &[0], payload].concat()
}

impl fmt::Display for Signed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Signed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Who holds a document may use it, so a log gets its name only.
        write!(
            f,
            "Signed({} sha256:{})",
            self.key_id(),
            hex::encode(&self.digest()[..8])
        )
    }
}

impl FromStr for Signed {
    type Err = SealError;

    fn from_str(text: &str) -> Result<Self, SealError> {
        Self::parse(text)
    }
}

impl Serialize for Signed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Signed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Self::parse(text).map_err(serde::de::Error::custom)
    }
}
