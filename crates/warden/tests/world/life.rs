//! What KMS, mint and host do for a workspace's VM, with keys of the test.

use super::{EDGE_UID, START, WORKSPACE, World, as_uid, disk_open, edge, status, until};
use api::agent::{Attach, GuestConfig};
use api::mint::TokenState;
use api::vmctl;
use api::warden::{DiskOpened, Op, SlotState, Start, VmOpened};
use seal::hpke::PublicKey;
use seal::sign::{Signed, SigningKey};
use serde::de::DeserializeOwned;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vmm::driver::Driver;
use warden::{Machine, Warden};

/// Memory of a real guest.
const MEMORY_MB: u32 = 256;

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

/// What `cargo xtask image` made: in the directory that `CASEMATE_ARTIFACTS` names, else among what
/// was built here, else on the machine.
pub fn artifacts() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("CASEMATE_ARTIFACTS") {
        return Some(named.into());
    }
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("artifacts");
    let there = [built, "/var/lib/casemate/artifacts".into()]
        .into_iter()
        .find(|p| p.join("kernel").exists());
    if there.is_none() {
        eprintln!("SKIPPED: no artifacts; run `cargo xtask image`");
    }
    there
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

/// A template, and a workspace that starts from it, cold, and from it again, with a real guest.
/// `open` opens its warden, again and again.
pub fn lives(world: &World, driver: Driver, open: impl Fn() -> Arc<Warden>) {
    let mut w = open();
    // Build.
    w.answer(vm_open(world, 0, Start::Build)).unwrap();
    ask::<vmctl::Status>(world, 0, &vmctl::Op::Prepare);
    ask::<bool>(world, 0, &vmctl::Op::Save);
    w.answer(Op::TemplateSeal { slot: 0 })
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(status(&w).templates.len(), 1);
    // Restored and cold, the same workspace after one another: its data stays.
    let mut run = 0;
    for (slot, how) in [(1, Start::Template), (2, Start::Cold), (1, Start::Template)] {
        let net: VmOpened =
            serde_json::from_value(w.answer(vm_open(world, slot, how)).unwrap()).unwrap();
        ask::<vmctl::Status>(world, slot, &vmctl::Op::Prepare);
        run += 1;
        let attach = start(world, &w, slot, &net, run);
        ask::<api::agent::Up>(
            world,
            slot,
            &vmctl::Op::Attach {
                attach: Box::new(attach),
                wait_ms: 60_000,
            },
        );
        let to = |port| SocketAddr::new(net.ip.parse().unwrap(), port);
        assert!(!dial(EDGE_UID, to(9991)), "closed until opened");
        w.answer(Op::NetSet {
            slot,
            open: vec![edge(9991)],
            rates: api::warden::NetRates::default(),
        })
        .unwrap();
        assert!(dial(EDGE_UID, to(9991)), "{how:?}");
        // Another warden takes over a workspace that runs.
        drop(w);
        w = open();
        let slots = status(&w).slots;
        assert_eq!((slots.len(), slots[0].state), (1, SlotState::DiskAttached));
        assert!(dial(EDGE_UID, to(9991)), "{how:?}");
        assert!(!dial(EDGE_UID, to(9990)));
        assert!(!dial(0, to(9991)), "root is not the edge");
        w.answer(Op::NetSet {
            slot,
            open: vec![],
            rates: api::warden::NetRates::default(),
        })
        .unwrap();
        assert!(!dial(EDGE_UID, to(9991)));
        ask::<vmctl::Status>(world, slot, &vmctl::Op::Pause);
        ask::<vmctl::Status>(world, slot, &vmctl::Op::Resume);
        ask::<vmctl::Status>(world, slot, &vmctl::Op::Shutdown { grace_ms: 30_000 });
        let disk = slots[0].disk_pid.unwrap();
        let ended = || jail::process::Proc::of(disk).is_none();
        if driver == Driver::Qemu {
            until("the disk ends with its VMM", ended);
        }
        // Firecracker does not end by itself.
        w.answer(Op::SlotClose { slot }).unwrap();
        until("the disk ends with its slot", ended);
        world.assert_clean();
    }
}

fn vm_open(world: &World, slot: u16, how: Start) -> Op {
    Op::VmOpen {
        slot,
        how,
        image: world.image.clone(),
        memory_mb: MEMORY_MB,
        cpus: 1,
    }
}

/// Whether `uid` gets a connection; a dropped packet is no answer, so there is a limit.
fn dial(uid: u32, to: SocketAddr) -> bool {
    as_uid(uid, move || {
        TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_ok()
    })
}
