//! The JSON metadata: what is written, and the one shape that is read back.
//!
//! A header is read before anything about it is trusted, so nothing in it chooses an algorithm:
//! each field must be what this program writes; numbers that may differ have bounds.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use model::WorkspaceId;
use serde::{Deserialize, Serialize};

use super::keyslot::{AREA_CIPHER, STRIPES, STRIPES_BYTES};
use crate::DiskError;
use crate::limits::{
    DATA_OFFSET_BYTES, HEADER_BYTES, PBKDF2_MAX_ITERATIONS, SALT_MAX_BYTES, SECTOR_BYTES,
};

/// Where keyslot 0's stripes lie, bytes.
pub(super) const AREA_OFFSET_BYTES: u64 = 2 * HEADER_BYTES as u64;
const AREA_BYTES: u64 = (STRIPES_BYTES as u64).next_multiple_of(SECTOR_BYTES as u64);
/// From here to the data lies room for the integrity sidecar's root: no keyslot goes there.
const RESERVED_OFFSET_BYTES: u64 = 8 << 20;
const KEYSLOTS_BYTES: u64 = RESERVED_OFFSET_BYTES - AREA_OFFSET_BYTES;
/// Version of our token: of the volume's format beyond LUKS2.
const TOKEN_VERSION: u32 = 1;
const ITERATIONS: u32 = 1000;
const CIPHER: &str = "aes-xts-plain64";
const KEY_BYTES: u32 = 64;

const _: () = assert!(AREA_OFFSET_BYTES + AREA_BYTES <= RESERVED_OFFSET_BYTES);
const _: () = assert!(RESERVED_OFFSET_BYTES < DATA_OFFSET_BYTES);

/// What a header says about how to open the volume.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    pub(super) workspace: WorkspaceId,
    pub(super) area_offset_bytes: u64,
    pub(super) slot: Pbkdf2,
    pub(super) digest: Pbkdf2,
    pub(super) digest_of_key: [u8; 32],
}

/// Salt and work of a PBKDF2-SHA-256.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pbkdf2 {
    pub(crate) salt: Vec<u8>,
    pub(crate) iterations: u32,
}

impl Pbkdf2 {
    /// A fresh salt of 32 bytes.
    pub(crate) fn fresh() -> Self {
        Self {
            salt: seal::random::bytes::<32>().to_vec(),
            iterations: ITERATIONS,
        }
    }
}

impl Metadata {
    /// The JSON text.
    pub(super) fn encode(&self) -> Vec<u8> {
        let zero = || "0".to_owned();
        let json = Json {
            keyslots: one(Keyslot {
                kind: "luks2".to_owned(),
                key_size: KEY_BYTES,
                af: Af {
                    kind: "luks1".to_owned(),
                    stripes: STRIPES,
                    hash: "sha256".to_owned(),
                },
                area: Area {
                    kind: "raw".to_owned(),
                    offset: self.area_offset_bytes.to_string(),
                    size: AREA_BYTES.to_string(),
                    encryption: AREA_CIPHER.to_owned(),
                    key_size: KEY_BYTES,
                },
                kdf: Kdf {
                    kind: "pbkdf2".to_owned(),
                    hash: "sha256".to_owned(),
                    iterations: self.slot.iterations,
                    salt: BASE64.encode(&self.slot.salt),
                },
            }),
            tokens: one(Token {
                kind: "casemate".to_owned(),
                keyslots: vec![zero()],
                version: Some(TOKEN_VERSION),
                workspace: Some(self.workspace.as_str().to_owned()),
            }),
            segments: one(Segment {
                kind: "crypt".to_owned(),
                offset: DATA_OFFSET_BYTES.to_string(),
                size: "dynamic".to_owned(),
                iv_tweak: zero(),
                encryption: CIPHER.to_owned(),
                sector_size: SECTOR_BYTES as u32,
            }),
            digests: one(Digest {
                kind: "pbkdf2".to_owned(),
                keyslots: vec![zero()],
                segments: vec![zero()],
                hash: "sha256".to_owned(),
                iterations: self.digest.iterations,
                salt: BASE64.encode(&self.digest.salt),
                digest: BASE64.encode(self.digest_of_key),
            }),
            config: Config {
                json_size: (HEADER_BYTES - 4096).to_string(),
                keyslots_size: KEYSLOTS_BYTES.to_string(),
            },
        };
        serde_json::to_vec(&json).expect("strings and numbers are JSON")
    }

    /// Reads and checks the JSON text of a header.
    pub(super) fn decode(text: &[u8]) -> Result<Self, DiskError> {
        let wrong = |field, why| DiskError::Metadata { field, why };
        let json: Json = serde_json::from_slice(text)
            .map_err(|_| wrong("JSON", "it is not what this program writes"))?;
        let slot = only(&json.keyslots, "keyslots")?;
        let token = json
            .tokens
            .values()
            .find(|token| token.kind == "casemate")
            .ok_or(wrong(
                "tokens",
                "none is of type casemate: not a volume of ours",
            ))?;
        let segment = only(&json.segments, "segments")?;
        let digest = only(&json.digests, "digests")?;
        let area_offset_bytes = number(&slot.area.offset, "keyslots.area.offset")?;
        let area_bytes = number(&slot.area.size, "keyslots.area.size")?;
        let area_fits = area_offset_bytes >= AREA_OFFSET_BYTES
            && area_bytes >= STRIPES_BYTES as u64
            && area_offset_bytes
                .checked_add(area_bytes)
                .is_some_and(|end| end <= RESERVED_OFFSET_BYTES);
        let version = token.version.unwrap_or(0);
        let checks = [
            (
                "tokens.version",
                version == TOKEN_VERSION,
                "of a version this program does not know",
            ),
            ("keyslots.type", slot.kind == "luks2", "must be luks2"),
            (
                "keyslots.key_size",
                slot.key_size == KEY_BYTES,
                "must be 64",
            ),
            ("keyslots.af.type", slot.af.kind == "luks1", "must be luks1"),
            (
                "keyslots.af.stripes",
                slot.af.stripes == STRIPES,
                "must be 4000",
            ),
            (
                "keyslots.af.hash",
                slot.af.hash == "sha256",
                "must be sha256",
            ),
            ("keyslots.area.type", slot.area.kind == "raw", "must be raw"),
            (
                "keyslots.area.encryption",
                slot.area.encryption == AREA_CIPHER,
                "not ours",
            ),
            (
                "keyslots.area.key_size",
                slot.area.key_size == KEY_BYTES,
                "must be 64",
            ),
            (
                "keyslots.area",
                area_fits,
                "must lie between the headers and 8 MiB",
            ),
            (
                "keyslots.kdf.type",
                slot.kdf.kind == "pbkdf2",
                "must be pbkdf2",
            ),
            (
                "keyslots.kdf.hash",
                slot.kdf.hash == "sha256",
                "must be sha256",
            ),
            ("segments.type", segment.kind == "crypt", "must be crypt"),
            (
                "segments.offset",
                segment.offset == DATA_OFFSET_BYTES.to_string(),
                "must be 16 MiB",
            ),
            (
                "segments.size",
                segment.size == "dynamic",
                "must be dynamic",
            ),
            ("segments.iv_tweak", segment.iv_tweak == "0", "must be 0"),
            (
                "segments.encryption",
                segment.encryption == CIPHER,
                "must be aes-xts-plain64",
            ),
            (
                "segments.sector_size",
                segment.sector_size as usize == SECTOR_BYTES,
                "must be 4096",
            ),
            ("digests.type", digest.kind == "pbkdf2", "must be pbkdf2"),
            ("digests.hash", digest.hash == "sha256", "must be sha256"),
        ];
        if let Some((field, _, why)) = checks.into_iter().find(|(_, holds, _)| !holds) {
            return Err(wrong(field, why));
        }
        let digest_of_key = BASE64
            .decode(&digest.digest)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(wrong("digests.digest", "must be 32 bytes of base64"))?;
        Ok(Self {
            workspace: token
                .workspace
                .as_deref()
                .and_then(|id| id.parse().ok())
                .ok_or(wrong("tokens.workspace", "must be a workspace's id"))?,
            area_offset_bytes,
            slot: pbkdf2(&slot.kdf.salt, slot.kdf.iterations, "keyslots.kdf")?,
            digest: pbkdf2(&digest.salt, digest.iterations, "digests")?,
            digest_of_key,
        })
    }
}

fn pbkdf2(salt: &str, iterations: u32, field: &'static str) -> Result<Pbkdf2, DiskError> {
    let wrong = |why| DiskError::Metadata { field, why };
    let salt = BASE64
        .decode(salt)
        .map_err(|_| wrong("its salt is not base64"))?;
    if !(8..=SALT_MAX_BYTES).contains(&salt.len()) {
        return Err(wrong("its salt must be 8 to 64 bytes"));
    }
    if !(1..=PBKDF2_MAX_ITERATIONS).contains(&iterations) {
        return Err(wrong("its iterations must be 1 to 100000"));
    }
    Ok(Pbkdf2 { salt, iterations })
}

/// The object's only member, which must be called "0".
fn only<'a, T>(map: &'a BTreeMap<String, T>, field: &'static str) -> Result<&'a T, DiskError> {
    match (map.len(), map.get("0")) {
        (1, Some(value)) => Ok(value),
        _ => Err(DiskError::Metadata {
            field,
            why: "must be exactly one, called 0",
        }),
    }
}

fn one<T>(value: T) -> BTreeMap<String, T> {
    BTreeMap::from([("0".to_owned(), value)])
}

/// LUKS2 writes 64-bit numbers as decimal strings.
fn number(text: &str, field: &'static str) -> Result<u64, DiskError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or(DiskError::Metadata {
            field,
            why: "must be a decimal number",
        })
}

#[derive(Serialize, Deserialize)]
struct Json {
    keyslots: BTreeMap<String, Keyslot>,
    tokens: BTreeMap<String, Token>,
    segments: BTreeMap<String, Segment>,
    digests: BTreeMap<String, Digest>,
    config: Config,
}

#[derive(Serialize, Deserialize)]
struct Keyslot {
    #[serde(rename = "type")]
    kind: String,
    key_size: u32,
    af: Af,
    area: Area,
    kdf: Kdf,
}

#[derive(Serialize, Deserialize)]
struct Af {
    #[serde(rename = "type")]
    kind: String,
    stripes: u32,
    hash: String,
}

#[derive(Serialize, Deserialize)]
struct Area {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    encryption: String,
    key_size: u32,
}

#[derive(Serialize, Deserialize)]
struct Kdf {
    #[serde(rename = "type")]
    kind: String,
    hash: String,
    iterations: u32,
    salt: String,
}

/// `cryptsetup token import` may add tokens of other types: only their type is looked at.
#[derive(Serialize, Deserialize)]
struct Token {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    version: Option<u32>,
    workspace: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Segment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    iv_tweak: String,
    encryption: String,
    sector_size: u32,
}

#[derive(Serialize, Deserialize)]
struct Digest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

#[derive(Serialize, Deserialize)]
struct Config {
    json_size: String,
    keyslots_size: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Metadata {
        Metadata {
            workspace: "ws_0123456789abcdef".parse().unwrap(),
            area_offset_bytes: AREA_OFFSET_BYTES,
            slot: Pbkdf2::fresh(),
            digest: Pbkdf2::fresh(),
            digest_of_key: [3; 32],
        }
    }

    #[test]
    fn reads_what_it_writes() {
        let metadata = sample();
        assert_eq!(Metadata::decode(&metadata.encode()).unwrap(), metadata);
    }

    #[test]
    fn refuses_each_field_that_is_not_ours() {
        let text = String::from_utf8(sample().encode()).unwrap();
        for (from, to, field) in [
            ("\"stripes\":4000", "\"stripes\":1", "keyslots.af.stripes"),
            (
                "\"iterations\":1000",
                "\"iterations\":100001",
                "keyslots.kdf",
            ),
            ("\"iterations\":1000", "\"iterations\":0", "keyslots.kdf"),
            (
                "\"offset\":\"32768\"",
                "\"offset\":\"16384\"",
                "keyslots.area",
            ),
            (
                "\"offset\":\"32768\"",
                "\"offset\":\"18446744073709551615\"",
                "keyslots.area",
            ),
            (
                "\"offset\":\"32768\"",
                "\"offset\":\"-1\"",
                "keyslots.area.offset",
            ),
            (
                "\"offset\":\"32768\"",
                "\"offset\":\"+1\"",
                "keyslots.area.offset",
            ),
            (
                "\"size\":\"258048\"",
                "\"size\":\"255999\"",
                "keyslots.area",
            ),
            (
                "\"offset\":\"16777216\"",
                "\"offset\":\"0\"",
                "segments.offset",
            ),
            (
                "\"iv_tweak\":\"0\"",
                "\"iv_tweak\":\"1\"",
                "segments.iv_tweak",
            ),
            (
                "\"sector_size\":4096",
                "\"sector_size\":512",
                "segments.sector_size",
            ),
            ("\"version\":1", "\"version\":2", "tokens.version"),
            ("\"type\":\"casemate\"", "\"type\":\"other\"", "tokens"),
            (
                "ws_0123456789abcdef",
                "ws_../../etc/passwd",
                "tokens.workspace",
            ),
            ("\"segments\":{\"0\"", "\"segments\":{\"1\"", "segments"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Metadata::decode(text.replacen(from, to, 1).as_bytes()).unwrap_err();
            match error {
                DiskError::Metadata { field: found, .. } => assert_eq!(found, field, "{to}"),
                other => panic!("{to}: {other}"),
            }
        }
    }

    proptest! {
        #[test]
        fn survives_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Metadata::decode(&bytes).is_err());
        }

        #[test]
        fn survives_any_change(at in 0usize..1100, with: u8) {
            let mut text = sample().encode();
            let at = at % text.len();
            text[at] = with;
            let _any = Metadata::decode(&text);
        }
    }
}
