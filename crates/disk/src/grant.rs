//! The grant: what the KMS released to this process, and to it alone.
//!
//! Texts are borrowed from the opened message, which its owner wipes: JSON strings without
//! escapes need no copy, and one with an escape is refused.

use api::context;
use model::{Purpose, StartId, WorkspaceId};
use seal::Zeroizing;
use seal::hpke::{self, SecretKey};
use serde::Deserialize;

use crate::DiskError;
use crate::limits::GRANT_MAX_BYTES;
use crate::luks2::DiskKey;
use crate::sidecar::Anchor;
use crate::sidecar::layout::Generation;

/// [`api::kms::Grant`], borrowed.
pub struct Grant<'a> {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The start.
    pub start_id: StartId,
    /// The start's number.
    pub run: u64,
    /// The least state that may be opened; none: the disk was never anchored.
    pub anchor: Option<Anchor>,
    /// What the key is for.
    pub purpose: Purpose,
    /// The object's key.
    pub disk_key: DiskKey,
    /// For the identity block, as hex; empty but for a disk.
    pub(crate) identity_seed: &'a str,
    pub(crate) config_digest: &'a str,
    pub(crate) mint_key: &'a str,
    pub(crate) gateway_key: &'a str,
    pub(crate) edge_key: &'a str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Json<'a> {
    workspace: WorkspaceId,
    start_id: StartId,
    run: u64,
    #[serde(default)]
    anchor: Option<JsonAnchor<'a>>,
    #[serde(default)]
    purpose: Purpose,
    disk_key: &'a str,
    #[serde(default)]
    identity_seed: &'a str,
    config_digest: &'a str,
    mint_key: &'a str,
    gateway_key: &'a str,
    edge_key: &'a str,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonAnchor<'a> {
    run: u64,
    batch: u64,
    root: &'a str,
}

/// Opens the sealed grant of `api::disk::ToDisk::Grant`.
///
/// # Errors
/// [`DiskError::Grant`]: not base64 or hex, too large, or not sealed to `key`.
pub fn open(key: &SecretKey, sealed: &str, aad: &str) -> Result<Zeroizing<Vec<u8>>, DiskError> {
    use base64::Engine as _;
    let wrong = |why| DiskError::Grant { why };
    if sealed.len() > GRANT_MAX_BYTES {
        return Err(wrong("sealed: longer than 16 KiB"));
    }
    let sealed = base64::engine::general_purpose::STANDARD
        .decode(sealed)
        .map_err(|_| wrong("sealed: not base64"))?;
    let mut digest = [0; 32];
    hex::decode_to_slice(aad, &mut digest).map_err(|_| wrong("aad: not 32 bytes of hex"))?;
    hpke::open(key, context::RELEASE.as_bytes(), &digest, &sealed)
        .map_err(|_| wrong("sealed: not sealed to this process, or changed on the way"))
}

impl<'a> Grant<'a> {
    /// Reads the opened message.
    ///
    /// # Errors
    /// [`DiskError::Grant`], without a word of its content.
    pub fn parse(text: &'a [u8]) -> Result<Self, DiskError> {
        let json: Json<'a> = serde_json::from_slice(text).map_err(|_| DiskError::Grant {
            why: "its content is not a grant",
        })?;
        let keys = [
            json.config_digest,
            json.mint_key,
            json.gateway_key,
            json.edge_key,
            json.disk_key,
        ];
        let seed_fits = match json.purpose {
            Purpose::Disk => is_hex_32(json.identity_seed),
            _ => json.identity_seed.is_empty(),
        };
        if !seed_fits || !keys.into_iter().all(is_hex_32) {
            return Err(DiskError::Grant {
                why: "its keys must be 64 lowercase hex digits each",
            });
        }
        let anchor = json.anchor.map(JsonAnchor::read).transpose()?;
        let mut disk_key = DiskKey::zeroed();
        hex::decode_to_slice(json.disk_key, disk_key.expose_mut()).expect("checked: 64 digits");
        Ok(Self {
            workspace: json.workspace,
            start_id: json.start_id,
            run: json.run,
            anchor,
            purpose: json.purpose,
            disk_key,
            identity_seed: json.identity_seed,
            config_digest: json.config_digest,
            mint_key: json.mint_key,
            gateway_key: json.gateway_key,
            edge_key: json.edge_key,
        })
    }
}

impl JsonAnchor<'_> {
    fn read(self) -> Result<Anchor, DiskError> {
        let mut root = [0; 32];
        let wrong = DiskError::Grant {
            why: "its anchor's root must be 64 lowercase hex digits",
        };
        if !is_hex_32(self.root) || hex::decode_to_slice(self.root, &mut root).is_err() {
            return Err(wrong);
        }
        let (run, batch) = (self.run, self.batch);
        Ok(Anchor {
            generation: Generation { run, batch },
            root,
        })
    }
}

fn is_hex_32(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> String {
        serde_json::to_string(&api::kms::Grant {
            workspace: "ws_0123456789abcdef".parse().unwrap(),
            start_id: "st_0123456789abcdef".parse().unwrap(),
            run: 7,
            anchor: Some(api::kms::Anchor {
                run: 6,
                batch: 5,
                root: "6a".repeat(32),
            }),
            purpose: Purpose::Disk,
            disk_key: "0a".repeat(32),
            identity_seed: "1b".repeat(32),
            config_digest: "2c".repeat(32),
            mint_key: "3d".repeat(32),
            gateway_key: "4e".repeat(32),
            edge_key: "5f".repeat(32),
        })
        .unwrap()
    }

    #[test]
    fn opens_only_what_was_sealed_to_it_and_says_nothing_of_the_content() {
        use base64::Engine as _;
        let key = SecretKey::generate();
        let (aad, info) = ([7; 32], context::RELEASE.as_bytes());
        let sealed = hpke::seal(&key.public(), info, &aad, sample().as_bytes());
        let sealed = base64::engine::general_purpose::STANDARD.encode(sealed);
        let opened = open(&key, &sealed, &hex::encode(aad)).unwrap();
        let grant = Grant::parse(&opened).unwrap();
        assert_eq!(grant.disk_key.expose(), &[0x0a; 32]);
        let (run, batch) = (6, 5);
        let want = Anchor {
            generation: Generation { run, batch },
            root: [0x6a; 32],
        };
        assert_eq!((grant.run, grant.anchor), (7, Some(want)));

        assert!(open(&SecretKey::generate(), &sealed, &hex::encode(aad)).is_err());
        assert!(open(&key, &sealed, &hex::encode([8; 32])).is_err());
        assert!(open(&key, &"A".repeat(GRANT_MAX_BYTES + 1), "").is_err());
        let error = Grant::parse(sample().replace("0a0a", "0A0A").as_bytes())
            .err()
            .unwrap();
        assert!(!error.to_string().contains("0A0A"), "{error}");
    }

    proptest! {
        #[test]
        fn survives_any_change(at: usize, with: u8) {
            let mut text = sample().into_bytes();
            let at = at % text.len();
            text[at] = with;
            if let Err(error) = Grant::parse(&text) {
                prop_assert_eq!(error.code(), api::ErrorCode::KeyRefused);
            }
        }
    }
}
