//! The identity area in front of the volume: what the guest becomes, synthesised for one start.
//!
//! It is made in secret memory and served from there; it never reaches the backing file.

use api::agent::{IDENTITY_MAGIC, VOLUME_OFFSET_BYTES};
use seal::secret::{SecretBuf, SecretBytes};
use serde::Serialize;

use crate::DiskError;
use crate::grant::Grant;
use crate::limits::IDENTITY_MAX_BYTES;

const SEED_BYTES: usize = 64;
const HEAD_BYTES: usize = IDENTITY_MAGIC.len() + 4;

/// The identity area's bytes; zeros behind those that are held.
#[derive(Debug)]
pub struct Identity {
    bytes: SecretBuf,
}

/// [`api::agent::IdentityBlock`] with its texts borrowed, so that none is copied about.
#[derive(Serialize)]
struct Block<'a> {
    workspace: &'a str,
    start_id: &'a str,
    seed: &'a str,
    identity_seed: &'a str,
    config_digest: &'a str,
    mint_key: &'a str,
    gateway_key: &'a str,
    edge_key: &'a str,
}

impl Identity {
    /// The identity of the grant's workspace for this start, with a fresh seed.
    ///
    /// # Errors
    /// [`DiskError::Grant`] if it is larger than its bound.
    pub fn new(grant: &Grant<'_>) -> Result<Self, DiskError> {
        let too_large = || DiskError::Grant {
            why: "its identity does not fit 64 KiB",
        };
        let seed = SecretBytes::<SEED_BYTES>::random();
        let mut seed_hex = SecretBytes::<{ 2 * SEED_BYTES }>::zeroed();
        hex::encode_to_slice(seed.expose(), seed_hex.expose_mut()).expect("two digits a byte");
        let block = Block {
            workspace: grant.workspace.as_str(),
            start_id: grant.start_id.as_str(),
            seed: std::str::from_utf8(seed_hex.expose()).expect("hex digits"),
            identity_seed: grant.identity_seed,
            config_digest: grant.config_digest,
            mint_key: grant.mint_key,
            gateway_key: grant.gateway_key,
            edge_key: grant.edge_key,
        };
        let mut bytes = SecretBuf::new(IDENTITY_MAX_BYTES);
        let (head, room) = bytes.expose_mut().split_at_mut(HEAD_BYTES);
        let mut rest = &mut *room;
        serde_json::to_writer(&mut rest, &block).map_err(|_| too_large())?;
        let len = IDENTITY_MAX_BYTES - HEAD_BYTES - rest.len();
        let len = u32::try_from(len).map_err(|_| too_large())?;
        head[..IDENTITY_MAGIC.len()].copy_from_slice(IDENTITY_MAGIC);
        head[IDENTITY_MAGIC.len()..].copy_from_slice(&len.to_be_bytes());
        Ok(Self { bytes })
    }

    /// Fills `buf` from `offset`, which with it lies within the area.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        assert!(offset + buf.len() as u64 <= VOLUME_OFFSET_BYTES);
        let held = self.bytes.expose();
        let from = usize::try_from(offset).map_or(held.len(), |offset| offset.min(held.len()));
        let n = (held.len() - from).min(buf.len());
        buf[..n].copy_from_slice(&held[from..from + n]);
        buf[n..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::grant::tests::sample;

    #[test]
    fn is_what_the_guest_reads() {
        let text = sample();
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let identity = Identity::new(&grant).unwrap();
        let mut area = vec![0xaa; 1 << 20];
        identity.read(0, &mut area);
        assert_eq!(&area[..8], IDENTITY_MAGIC);
        let len = u32::from_be_bytes(area[8..12].try_into().unwrap()) as usize;
        let block: api::agent::IdentityBlock = serde_json::from_slice(&area[12..12 + len]).unwrap();
        assert_eq!(block.workspace, grant.workspace);
        assert_eq!(block.start_id, grant.start_id);
        assert_eq!(block.identity_seed, grant.identity_seed);
        assert_eq!(block.edge_key, grant.edge_key);
        assert_eq!(hex::decode(&block.seed).unwrap().len(), SEED_BYTES);
        assert!(area[12 + len..].iter().all(|byte| *byte == 0));

        let mut part = [0xaa; 100];
        identity.read(7, &mut part);
        assert_eq!(part[..], area[7..107]);
        identity.read(IDENTITY_MAX_BYTES as u64 - 50, &mut part);
        assert_eq!(part, [0; 100]);
        identity.read((1 << 20) - 100, &mut part);
        assert_eq!(part, [0; 100]);
    }

    #[test]
    fn two_starts_have_two_seeds() {
        let text = sample();
        let grant = Grant::parse(text.as_bytes()).unwrap();
        let read = || {
            let mut area = vec![0; 1024];
            Identity::new(&grant).unwrap().read(0, &mut area);
            area
        };
        assert_ne!(read(), read());
    }
}
