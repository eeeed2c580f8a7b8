//! What KMS, mint and host do for a workspace's VM, with keys of the test.

use super::{START, WORKSPACE, World, disk_open};
use api::agent::{Attach, GuestConfig};
use api::mint::TokenState;
use api::vmctl;
use api::warden::{DiskOpened, Op, VmOpened};
use seal::hpke::PublicKey;
use seal::sign::{Signed, SigningKey};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use warden::{Machine, Warden};

/// Opens the slot's disk and grants it its key: what the guest is to be told then.
pub fn start(world: &World, w: &Arc<Warden>, slot: u16, net: &VmOpened, run: u64) -> Attach {
    let opened: DiskOpened = serde_json::from_value(
        w.answer(disk_open(slot))
            .unwrap_or_else(|e| panic!("{e:?}")),
    )
    .unwrap();
    let machine = Machine::load(&world.layout).unwrap();
    let said: api::kms::Attestation = Signed::parse(opened.attestation)
        .unwrap()
        .verify(&machine.key.public(), api::context::ATTESTATION)
        .unwrap();
    let mint = SigningKey::from_seed(&[7; 32]);
    let identity = SigningKey::from_seed(&[9; 32]);
    let config = serde_json::to_string(&GuestConfig {
        workspace: WORKSPACE.parse().unwrap(),
        hostname: "test".into(),
        env: vec![],
        cmd: vec![],
    })
    .unwrap();
    let hex = |b: &[u8]| -> String { b.iter().map(|b| format!("{b:02x}")).collect() };
    let grant = serde_json::json!({
        "workspace": WORKSPACE, "start_id": START, "run": run,
        "disk_key": hex(&[3; 32]), "identity_seed": hex(&[9; 32]),
        "config_digest": hex(&seal::hash::sha256(config.as_bytes())),
        "mint_key": mint.public().to_string(), "gateway_key": mint.public().to_string(),
        "edge_key": identity.public().to_string(),
    });
    let to: PublicKey = said.hpke_pub.parse().unwrap();
    let sealed = seal::hpke::seal(
        &to,
        api::context::RELEASE.as_bytes(),
        &[0x0d; 32],
        &serde_json::to_vec(&grant).unwrap(),
    );
    let sealed = base64(&sealed);
    let op = Op::DiskGrant {
        slot,
        sealed,
        aad: hex(&[0x0d; 32]),
        from: None,
    };
    w.answer(op).unwrap_or_else(|e| panic!("{e:?}"));
    let state = TokenState {
        workspace: WORKSPACE.parse().unwrap(),
        account: "acct_00000000000000cc".parse().unwrap(),
        epoch: 1,
        raw_hash: hex(&[5; 32]),
        enabled: true,
        gone: false,
        identity_pub: identity.public().to_string(),
        seq: 1,
    };
    Attach {
        time_unix_ns: std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        config,
        token_state: Signed::new(&mint, api::context::TOKEN_STATE, &state)
            .as_str()
            .into(),
        ip: net.ip.clone(),
        prefix: net.prefix,
        gateway: net.gateway.clone(),
    }
}

/// Asks the slot's vmctl.
pub fn ask<T: DeserializeOwned>(world: &World, slot: u16, op: &vmctl::Op) -> T {
    let socket = world.layout.vmctl().join(format!("{slot}.sock"));
    api::rpc::blocking::call(&socket, "test", op, Duration::from_secs(150))
        .unwrap_or_else(|e| panic!("{op:?}: {e:?}"))
}

/// What `cargo xtask image` made.
pub fn artifacts() -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("artifacts");
    [built, "/var/lib/casemate/artifacts".into()]
        .into_iter()
        .find(|p| p.join("kernel").exists())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let n = chunk
            .iter()
            .chain([&0, &0])
            .take(3)
            .fold(0u32, |n, b| n << 8 | u32::from(*b));
        for i in 0..4 {
            let digit = DIGITS[(n >> (18 - 6 * i) & 63) as usize] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}
