//! The KMS's part, with keys of the test: a key for each workspace and purpose.

use super::World;
use api::agent::GuestConfig;
use api::kms::{Attestation, Grant};
use api::warden::Sealed;
use base64::Engine as _;
use model::{Purpose, WorkspaceId};
use seal::sign::{Signed, SigningKey};
use warden::Machine;

const AAD: [u8; 32] = [0x0d; 32];

/// What the KMS answers to this attestation; `run` grows with each.
pub fn release(world: &World, attestation: &str, run: u64) -> Sealed {
    let machine = Machine::load(&world.layout).unwrap();
    let said: Attestation = Signed::parse(attestation.to_owned())
        .unwrap()
        .verify(&machine.key.public(), api::context::ATTESTATION)
        .unwrap();
    let key = seal::hash::sha256(format!("{}{:?}", said.workspace, said.purpose).as_bytes());
    let is_disk = said.purpose == Purpose::Disk;
    let identity_seed = is_disk.then(|| hex::encode(seed_of(&said.workspace)));
    let config = config(&said.workspace);
    let grant = Grant {
        workspace: said.workspace,
        start_id: said.start_id,
        run,
        anchor: None,
        purpose: said.purpose,
        disk_key: hex::encode(key),
        identity_seed: identity_seed.unwrap_or_default(),
        config_digest: hex::encode(seal::hash::sha256(config.as_bytes())),
        mint_key: key_of(7).public().to_string(),
        gateway_key: key_of(7).public().to_string(),
        edge_key: key_of(8).public().to_string(),
    };
    let clear = serde_json::to_vec(&grant).unwrap();
    let to = said.hpke_pub.parse().unwrap();
    let sealed = seal::hpke::seal(&to, api::context::RELEASE.as_bytes(), &AAD, &clear);
    Sealed {
        sealed: base64::engine::general_purpose::STANDARD.encode(sealed),
        aad: hex::encode(AAD),
    }
}

/// Mint's (7) and the edge's (8).
pub fn key_of(n: u8) -> SigningKey {
    SigningKey::from_seed(&[n; 32])
}

/// Of each workspace's identity.
pub fn seed_of(workspace: &WorkspaceId) -> [u8; 32] {
    seal::hash::sha256(workspace.as_str().as_bytes())
}

/// The guest's.
pub fn config(workspace: &WorkspaceId) -> String {
    serde_json::to_string(&GuestConfig {
        workspace: workspace.clone(),
        hostname: workspace.as_str().replace('_', "-"),
        env: vec![],
        cmd: vec![],
    })
    .unwrap()
}
