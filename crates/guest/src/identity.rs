//! The identity block at the front of the disk: how the guest learns whose it is.
//!
//! `"CMIDENT1" | u32 BE length | JSON | zeros`, synthesised by the disk process for one start.
//! Must never be read through the page cache: in a pooled VM that could hold the bytes of the
//! device that was there before.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use api::agent::{IDENTITY_MAGIC, IdentityBlock};
use model::{StartId, WorkspaceId};
use seal::Zeroizing;
use seal::sign::VerifyingKey;

use crate::limits::IDENTITY_MAX_BYTES;

/// The guest's identity for one start; the secrets are wiped when dropped.
pub struct Identity {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// The start.
    pub start_id: StartId,
    /// Fresh random bytes for the kernel's generator.
    pub seed: Zeroizing<[u8; 64]>,
    /// Seed of the guest's Ed25519 identity.
    pub identity_seed: Zeroizing<[u8; 32]>,
    /// SHA-256 of the config.
    pub config_digest: [u8; 32],
    /// Verifies token states.
    pub mint_key: VerifyingKey,
    /// Verifies gateway tokens.
    pub gateway_key: VerifyingKey,
    /// The edge: the only TLS client.
    pub edge_key: VerifyingKey,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The device can't be read.
    #[error("reading the identity area of {device}: {source}")]
    Read {
        /// Which device.
        device: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// What is there is no identity block.
    #[error("the identity area is malformed: {0}")]
    Malformed(&'static str),
}

/// Bytes read of the area: magic, length and the longest block, in whole sectors.
const AREA_BYTES: usize = 17 * 4096;
const HEAD_BYTES: usize = 12;
const _: () = assert!(AREA_BYTES >= HEAD_BYTES + IDENTITY_MAX_BYTES);

/// Memory that O_DIRECT can read into.
#[repr(C, align(4096))]
struct Area([u8; AREA_BYTES]);

/// Reads the identity at the front of `device`, past the page cache.
///
/// # Errors
/// If it can't be read or is malformed.
pub fn read(device: &Path) -> Result<(Identity, File), IdentityError> {
    let failed = |source: std::io::Error| IdentityError::Read {
        device: device.display().to_string(),
        source,
    };
    let disk = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
        .open(device)
        .map_err(failed)?;
    let mut area = Box::new(Area([0; AREA_BYTES]));
    let read = rustix::io::pread(disk.as_fd(), &mut area.0, 0).map_err(|e| failed(e.into()));
    let identity = read.and_then(|len| parse(&area.0[..len]));
    seal::Zeroize::zeroize(&mut area.0);
    Ok((identity?, disk))
}

/// Parses the identity area.
///
/// # Errors
/// [`IdentityError::Malformed`]; the text never quotes the area.
pub fn parse(area: &[u8]) -> Result<Identity, IdentityError> {
    use IdentityError::Malformed;
    let (head, rest) = area
        .split_at_checked(HEAD_BYTES)
        .ok_or(Malformed("shorter than its head"))?;
    let (magic, len) = head.split_at(IDENTITY_MAGIC.len());
    if magic != IDENTITY_MAGIC {
        return Err(Malformed("no magic: is this the workspace's disk?"));
    }
    let len = u32::from_be_bytes(len.try_into().map_err(|_| Malformed("length"))?) as usize;
    if len > IDENTITY_MAX_BYTES {
        return Err(Malformed("longer than 64 KiB"));
    }
    let json = rest.get(..len).ok_or(Malformed("cut short"))?;
    let block: IdentityBlock =
        serde_json::from_slice(json).map_err(|_| Malformed("its JSON is not an identity block"))?;
    let (seed, identity_seed) = (
        Zeroizing::new(block.seed),
        Zeroizing::new(block.identity_seed),
    );
    let key = |hex: &str, why| VerifyingKey::from_hex(hex).map_err(|_| Malformed(why));
    Ok(Identity {
        workspace: block.workspace,
        start_id: block.start_id,
        seed: hex_secret(&seed, "seed must be 64 bytes in hex")?,
        identity_seed: hex_secret(&identity_seed, "identity_seed must be 32 bytes in hex")?,
        config_digest: *hex_secret(
            &block.config_digest,
            "config_digest must be 32 bytes in hex",
        )?,
        mint_key: key(&block.mint_key, "mint_key is no Ed25519 key")?,
        gateway_key: key(&block.gateway_key, "gateway_key is no Ed25519 key")?,
        edge_key: key(&block.edge_key, "edge_key is no Ed25519 key")?,
    })
}

fn hex_secret<const N: usize>(
    text: &str,
    why: &'static str,
) -> Result<Zeroizing<[u8; N]>, IdentityError> {
    let mut out = Zeroizing::new([0; N]);
    hex::decode_to_slice(text, out.as_mut_slice()).map_err(|_| IdentityError::Malformed(why))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn area(json: &[u8]) -> Vec<u8> {
        let mut area = IDENTITY_MAGIC.to_vec();
        area.extend_from_slice(&u32::try_from(json.len()).unwrap().to_be_bytes());
        area.extend_from_slice(json);
        area.resize(area.len().max(4096), 0);
        area
    }

    fn block() -> serde_json::Value {
        let key = |seed| {
            seal::sign::SigningKey::from_seed(&[seed; 32])
                .public()
                .to_hex()
        };
        serde_json::json!({
            "workspace": "ws_0123456789abcdef", "start_id": "st_0123456789abcdef",
            "seed": "ab".repeat(64), "identity_seed": "cd".repeat(32),
            "config_digest": "ef".repeat(32),
            "mint_key": key(1), "gateway_key": key(2), "edge_key": key(3),
        })
    }

    #[test]
    fn a_good_block_is_taken() {
        let identity = parse(&area(block().to_string().as_bytes())).unwrap();
        assert_eq!(identity.workspace.as_str(), "ws_0123456789abcdef");
        assert_eq!(*identity.seed, [0xab; 64]);
        assert_eq!(*identity.identity_seed, [0xcd; 32]);
        assert_eq!(identity.config_digest, [0xef; 32]);
    }

    #[test]
    fn bad_blocks_are_refused() {
        let with = |name: &str, value: serde_json::Value| {
            let mut block = block();
            block[name] = value;
            area(block.to_string().as_bytes())
        };
        for bad in [
            vec![],
            vec![0; 4096],
            area(b"")[..11].to_vec(),
            area(b"{}"),
            with("extra", 1.into()),
            with("seed", "ab".into()),
            with("seed", "zz".repeat(64).into()),
            with("workspace", "../..".into()),
            with("mint_key", "00".repeat(32).into()),
            [&IDENTITY_MAGIC[..], &u32::MAX.to_be_bytes(), &[0; 100]].concat(),
            [&IDENTITY_MAGIC[..], &65536u32.to_be_bytes(), &[b' '; 100]].concat(),
        ] {
            assert!(parse(&bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic: bool) {
            let area = if magic { area(&bytes) } else { bytes };
            prop_assert!(parse(&area).is_err());
        }
    }
}
