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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const LEASE: &str = "casemate lease v1";

    fn unhex<const N: usize>(text: &str) -> [u8; N] {
        hex::decode(text).unwrap().try_into().unwrap()
    }

    /// RFC 8032, 7.1, tests 1 to 3.
    #[test]
    fn signatures_are_rfc_8032s() {
        for (seed, public, message, signature) in [
            (
                "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
                "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
                "",
                "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555\
                 fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
            ),
            (
                "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
                "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
                "72",
                "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                 085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
            ),
            (
                "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
                "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
                "af82",
                "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac\
                 18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
            ),
        ] {
            let key = SigningKey::from_seed(&unhex(seed));
            let message = hex::decode(message).unwrap();
            assert_eq!(key.public().to_hex(), public);
            assert_eq!(hex::encode(*key.seed()), seed);
            assert_eq!(hex::encode(key.sign_raw(&message)), signature);
            key.public()
                .verify_raw(&message, &unhex::<64>(signature))
                .unwrap();
            assert!(
                key.public()
                    .verify_raw(b"other", &unhex::<64>(signature))
                    .is_err()
            );
        }
    }

    #[test]
    fn a_signature_with_s_beyond_the_group_order_is_refused() {
        let key = SigningKey::generate();
        let mut signature = key.sign_raw(b"m");
        // s + L verifies in a lax implementation: a second signature of the same message.
        let order: [u8; 32] =
            unhex("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010");
        let mut carry = 0;
        for (byte, add) in signature[32..].iter_mut().zip(order) {
            let sum = u16::from(*byte) + u16::from(add) + carry;
            *byte = sum as u8;
            carry = sum >> 8;
        }
        assert!(key.public().verify_raw(b"m", &signature).is_err());
        assert!(key.public().verify_raw(b"m", &signature[..63]).is_err());
        assert!(key.public().verify_raw(b"m", &[]).is_err());
    }

    #[test]
    fn keys_have_one_text_and_no_small_order() {
        let key = SigningKey::generate();
        let public = key.public();
        assert_eq!(VerifyingKey::from_hex(&public.to_hex()).unwrap(), public);
        assert_eq!(public.to_hex().parse::<VerifyingKey>().unwrap(), public);
        let json = serde_json::to_string(&public).unwrap();
        assert_eq!(serde_json::from_str::<VerifyingKey>(&json).unwrap(), public);
        assert_eq!(
            public.key_id(),
            hex::encode(&hash::sha256(public.as_bytes())[..4])
        );
        for bad in [
            "",
            "00",
            &public.to_hex().to_uppercase(),
            &format!("{public} "),
            &"g".repeat(64),
        ] {
            assert!(VerifyingKey::from_hex(bad).is_err() || bad == public.to_hex());
        }
        let point = |first: u8, rest: u8, last: u8| {
            let mut bytes = [rest; 32];
            (bytes[0], bytes[31]) = (first, last);
            bytes
        };
        for small in [
            point(0, 0, 0),
            point(0, 0, 0x80),
            point(1, 0, 0),
            point(1, 0, 0x80),
            point(0xec, 0xff, 0x7f),
            point(0xec, 0xff, 0xff),
            point(0xed, 0xff, 0x7f),
            point(0xee, 0xff, 0xff),
            unhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
            unhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85"),
            unhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
            unhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"),
        ] {
            assert!(
                VerifyingKey::from_bytes(&small).is_err(),
                "{}",
                hex::encode(small)
            );
        }
        assert_eq!(
            format!("{key:?}"),
            format!("SigningKey({})", public.key_id())
        );
    }

    #[test]
    fn a_document_of_one_kind_is_no_other() {
        let key = SigningKey::generate();
        let lease = Signed::new(&key, LEASE, &json!({"workspace": "ws_1"}));
        let read: Value = lease.verify(&key.public(), LEASE).unwrap();
        assert_eq!(read["workspace"], "ws_1");
        assert!(
            lease
                .verify::<Value>(&key.public(), "casemate receipt v1")
                .is_err()
        );
        assert!(
            lease
                .verify::<Value>(&SigningKey::generate().public(), LEASE)
                .is_err()
        );
        assert!(matches!(
            lease.verify::<u64>(&key.public(), LEASE),
            Err(SealError::Malformed { .. })
        ));
        assert_eq!(lease.digest(), hash::sha256(lease.as_str().as_bytes()));
        assert!(!format!("{lease:?}").contains(lease.as_str().split('.').nth(2).unwrap()));
        let json = serde_json::to_string(&lease).unwrap();
        assert_eq!(serde_json::from_str::<Signed>(&json).unwrap(), lease);
    }

    #[test]
    fn only_the_one_form_is_read() {
        let key = SigningKey::generate();
        let good = Signed::new(&key, LEASE, &"payload").to_string();
        let words: Vec<&str> = good.split('.').collect();
        let [version, kid, payload, signature] = words[..] else {
            panic!("four words")
        };
        for bad in [
            String::new(),
            "...".into(),
            format!("{good}."),
            format!("{good}.x"),
            format!(".{good}"),
            format!(" {good}"),
            format!("{good}\n"),
            format!("{good}="),
            format!("{version}.{kid}.{payload}"),
            format!("v2.{kid}.{payload}.{signature}"),
            format!("V1.{kid}.{payload}.{signature}"),
            format!("{version}.{}.{payload}.{signature}", &kid[1..]),
            format!("{version}.{kid}0.{payload}.{signature}"),
            format!("{version}.ABCDEF01.{payload}.{signature}"),
            format!("{version}.{kid}.{payload}=.{signature}"),
            format!("{version}.{kid}.{payload}+.{signature}"),
            format!("{version}.{kid}.{payload}.{}", &signature[1..]),
            // 64 bytes are 86 digits, of which the last carries two bits: B differs from A only
            // in bits that must be zero.
            format!("{version}.{kid}.{payload}.{}B", &signature[..85]),
            format!(
                "{version}.{kid}.{}.{signature}",
                "A".repeat(SIGNED_MAX_BYTES)
            ),
        ] {
            assert!(Signed::parse(bad.clone()).is_err(), "{bad}");
            assert!(serde_json::from_value::<Signed>(json!(bad)).is_err());
        }
        // Well-formed, but signed as something else or with other words.
        let other = VerifyingKey::from_bytes(&[2; 32]).unwrap().key_id();
        let renamed = Signed::parse(format!("{version}.{other}.{payload}.{signature}")).unwrap();
        assert!(renamed.verify::<String>(&key.public(), LEASE).is_err());
    }

    #[test]
    fn a_signed_payload_with_duplicate_keys_or_too_long_is_refused() {
        let key = SigningKey::generate();
        let payload = br#"{"a":1,"a":2}"#;
        let text = format!(
            "v1.{}.{}.{}",
            key.public().key_id(),
            URL_SAFE_NO_PAD.encode(payload),
            URL_SAFE_NO_PAD.encode(key.sign_raw(&message(LEASE, payload))),
        );
        let signed = Signed::parse(text).unwrap();
        assert!(signed.verify::<Value>(&key.public(), LEASE).is_err());
        let long = "x".repeat(SIGNED_MAX_BYTES);
        assert!(matches!(
            Signed::try_new(&key, LEASE, &long),
            Err(SealError::TooLarge { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_change_of_the_text_is_refused(
            payload in proptest::collection::btree_map("[a-z]{1,4}", any::<i64>(), 0..5),
            at: prop::sample::Index,
            with in "[ -~]",
        ) {
            let key = SigningKey::from_seed(&[3; 32]);
            let signed = Signed::new(&key, LEASE, &payload);
            let back: std::collections::BTreeMap<String, i64> =
                signed.verify(&key.public(), LEASE).unwrap();
            prop_assert_eq!(back, payload);
            let text = signed.as_str();
            let at = at.index(text.len());
            let changed = format!("{}{with}{}", &text[..at], &text[at + 1..]);
            let inserted = format!("{}{with}{}", &text[..at], &text[at..]);
            for bad in [changed, inserted, text[..at].to_owned()] {
                if bad == text {
                    continue;
                }
                let verified = Signed::parse(bad)
                    .and_then(|signed| signed.verify::<Value>(&key.public(), LEASE));
                prop_assert!(verified.is_err());
            }
        }

        #[test]
        fn parsing_never_panics(text in "(v1)?[.a-f0-9A-Z_=-]{0,60}(\\.[a-zA-Z0-9_-]{86})?") {
            if let Ok(signed) = Signed::parse(text) {
                let key = SigningKey::from_seed(&[3; 32]).public();
                prop_assert!(signed.verify::<Value>(&key, LEASE).is_err());
            }
        }
    }
}
