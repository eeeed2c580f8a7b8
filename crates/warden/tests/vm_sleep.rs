//! Sleep, wake, snapshot, restore and fork of a real guest in warden's own jails.
//!
//! Needs artifacts (`cargo xtask image`) in `target/artifacts` or on the machine; says so and
//! passes where there are none.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::agent::{Attach, Up, Wake, tls_name};
use api::mint::TokenState;
use api::vmctl;
use api::warden::{
    Attested, DiskOpened, Memory, MemoryEnd, Object, Op, Sealed, SlotState, Snapshot, Start,
    VmOpened,
};
use api::{Error, ErrorCode};
use model::{Purpose, WorkspaceId};
use seal::sign::{Signed, SigningKey};
use seal::tls::rustls::ClientConnection;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use warden::Warden;
use warden::journal::Step;
use world::life::artifacts;
use world::release::{config, key_of, release, seed_of};
use world::*;

const MEMORY_MB: u32 = 256;
const DISK_MB: u32 = 64;
const TOKEN: &str = "a raw token";
const OTHER: &str = "ws_00000000000000ab";
const SNAPSHOT: &str = "obj_00000000000000dd";

/// An installation with its warden, and what KMS, mint and host are to it.
struct Machines {
    world: World,
    warden: Option<Arc<Warden>>,
    runs: AtomicU64,
}

impl Machines {
    fn new(artifacts: &Path) -> Self {
        let world = World::with_artifacts(artifacts);
        let warden = Some(world.open(None));
        Self {
            world,
            warden,
            runs: AtomicU64::new(1),
        }
    }

    /// Another warden in the place of this one, which may be told to die at a step.
    fn restart(&mut self, fail_at: Option<Step>) {
        self.warden = None;
        self.warden = Some(self.world.open(fail_at));
    }

    fn try_ask<T: DeserializeOwned>(&self, op: Op) -> Result<T, Error> {
        let answer = self.warden.as_ref().unwrap().answer(op)?;
        Ok(serde_json::from_value(answer).unwrap())
    }

    fn ask<T: DeserializeOwned>(&self, op: Op) -> T {
        self.try_ask(op).unwrap_or_else(|e| panic!("{e:?}"))
    }

    fn vm<T: DeserializeOwned>(&self, slot: u16, op: &vmctl::Op) -> Result<T, Error> {
        let socket = self.world.layout.vmctl().join(format!("{slot}.sock"));
        api::rpc::blocking::call(&socket, "test", op, Duration::from_secs(150))
    }

    fn release(&self, attestation: &str) -> Sealed {
        let run = self.runs.fetch_add(1, Ordering::SeqCst);
        release(&self.world, attestation, run)
    }

    /// The disk of `workspace` on a slot that waits for it, filled `from` a snapshot or not.
    fn disk(&self, slot: u16, workspace: &str, from: Option<&str>) -> Result<(), Error> {
        let opened: DiskOpened = self.try_ask(Op::DiskOpen {
            slot,
            workspace: workspace.parse().unwrap(),
            start_id: START.parse().unwrap(),
            purpose: Purpose::Disk,
            nonce: "0c".repeat(32),
            disk_mb: DISK_MB,
            bytes_per_s: 1 << 30,
            ops_per_s: 100_000,
            pids: 0,
            from: from.map(|w| Snapshot {
                workspace: w.parse().unwrap(),
                id: SNAPSHOT.parse().unwrap(),
            }),
        })?;
        assert_eq!(opened.from.is_some(), from.is_some());
        let Sealed { sealed, aad } = self.release(&opened.attestation);
        let from = opened.from.map(|a| self.release(&a));
        self.try_ask::<bool>(Op::DiskGrant {
            slot,
            sealed,
            aad,
            from,
        })
        .map(|_| ())
    }

    /// A workspace that runs, cold.
    fn start(&self, slot: u16, workspace: &str, from: Option<&str>) {
        let net: VmOpened = self.ask(Op::VmOpen {
            slot,
            how: Start::Cold,
            image: self.world.image.clone(),
            memory_mb: MEMORY_MB,
            cpus: 1,
        });
        self.vm::<vmctl::Status>(slot, &vmctl::Op::PrepareNow)
            .unwrap();
        self.disk(slot, workspace, from).unwrap();
        self.open(slot);
        let workspace: WorkspaceId = workspace.parse().unwrap();
        let attach = Box::new(Attach {
            time_unix_ns: unix_ns(),
            config: config(&workspace),
            token_state: token_state(&workspace),
            ip: net.ip,
            prefix: net.prefix,
            gateway: net.gateway,
        });
        let wait_ms = 60_000;
        self.vm::<Up>(slot, &vmctl::Op::Attach { attach, wait_ms })
            .unwrap();
    }

    fn open(&self, slot: u16) {
        self.ask::<bool>(Op::NetSet {
            slot,
            open: vec![edge(9990), edge(9991)],
            rates: api::warden::NetRates::default(),
        });
    }

    fn memory_open(&self, slot: u16, purpose: Purpose, save: bool) -> Result<Sealed, Error> {
        let attested: Attested = self.try_ask(Op::MemoryOpen {
            slot,
            workspace: WORKSPACE.parse().unwrap(),
            start_id: START.parse().unwrap(),
            purpose,
            nonce: "0c".repeat(32),
            save,
            id: purpose.is_by_id().then(|| SNAPSHOT.parse().unwrap()),
            size_mb: None,
        })?;
        Ok(self.release(&attested.attestation))
    }

    fn memory_grant(&self, slot: u16, Sealed { sealed, aad }: Sealed) -> Result<Memory, Error> {
        self.try_ask(Op::MemoryGrant { slot, sealed, aad })
    }

    /// Saves the memory of the slot's workspace, up to what becomes of it.
    fn save(&self, slot: u16, purpose: Purpose) {
        let key = self.memory_open(slot, purpose, true).unwrap();
        self.memory_grant(slot, key).unwrap();
        let saved: vmctl::Status = self.vm(slot, &vmctl::Op::MemorySave).unwrap();
        assert_eq!(saved.vm, vmctl::VmState::Paused);
    }

    fn sleep(&self, slot: u16) {
        self.save(slot, Purpose::Memory);
        let end = MemoryEnd::Sleep;
        self.ask::<bool>(Op::MemoryEnd { slot, end });
    }

    /// Wakes it, up to the guest; or where and why not.
    fn wake(&self, slot: u16, purpose: Purpose, from: Option<&str>) -> Result<(), Error> {
        let key = self.memory_open(slot, purpose, false)?;
        let memory = self.memory_grant(slot, key)?;
        assert_eq!((memory.memory_mb, memory.cpus), (MEMORY_MB, 1));
        assert_eq!(memory.image, self.world.image);
        self.disk(slot, WORKSPACE, from)?;
        let wake = Box::new(Wake {
            time_unix_ns: unix_ns(),
            token_state: token_state(&WORKSPACE.parse().unwrap()),
            ip: memory.net.ip,
            prefix: memory.net.prefix,
            gateway: memory.net.gateway,
        });
        let wait_ms = 60_000;
        self.vm::<Up>(slot, &vmctl::Op::Wake { wake, wait_ms })?;
        self.open(slot);
        Ok(())
    }

    fn objects(&self) -> Vec<Purpose> {
        let workspace = WORKSPACE.parse().unwrap();
        let objects: Vec<Object> = self.ask(Op::Objects { workspace });
        assert!(objects.iter().all(|o| o.bytes > 0));
        objects.into_iter().map(|o| o.purpose).collect()
    }

    fn address(&self, slot: u16, port: u16) -> SocketAddr {
        let net = status(self.warden.as_ref().unwrap()).slots;
        let ip = net.iter().find(|s| s.slot == slot).unwrap().net.ip.clone();
        SocketAddr::new(ip.parse().unwrap(), port)
    }

    /// The TLS key that the guest shows the edge.
    fn tls_key(&self, slot: u16) -> Vec<u8> {
        let workspace: WorkspaceId = WORKSPACE.parse().unwrap();
        let edge = seal::tls::Identity::new(key_of(8));
        let leaf = edge.leaf("edge.test", Duration::from_secs(600)).unwrap();
        let guest = SigningKey::from_seed(&seed_of(&workspace)).public();
        let config = seal::tls::client_config(&guest, Some(leaf), seal::tls::HTTP1).unwrap();
        let name = tls_name(&workspace).try_into().unwrap();
        let mut tls = ClientConnection::new(config, name).unwrap();
        let to = self.address(slot, 9991);
        let certificate = as_uid(EDGE_UID, move || {
            let mut stream = TcpStream::connect_timeout(&to, SOON).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            while tls.is_handshaking() {
                tls.complete_io(&mut stream).unwrap();
            }
            tls.peer_certificates().unwrap()[0].to_vec()
        });
        // A P-256 key in a certificate: the curve's name, a string of 66 bytes, none of them unused.
        let before = b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00\x04";
        let at = certificate.windows(before.len()).position(|w| w == before);
        let key = &certificate[at.unwrap() + before.len()..];
        key[..64].to_vec()
    }

    /// What a shell in the guest prints.
    fn sh(&self, slot: u16, script: &str) -> String {
        let to = self.address(slot, 9990);
        let body = serde_json::json!({"cmd": [script]}).to_string();
        let request = format!(
            "POST /exec HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        let answer = as_uid(EDGE_UID, move || {
            let mut stream = TcpStream::connect_timeout(&to, SOON).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(" 200 "), "{answer}");
        // One chunk or none: the JSON begins at its brace.
        let json = &body[body.find('{').unwrap()..=body.rfind('}').unwrap()];
        let task: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(task["exit_code"], 0, "{script}: {task}");
        task["stdout"].as_str().unwrap().trim().to_owned()
    }

    fn close(&self, slot: u16) {
        self.ask::<bool>(Op::SlotClose { slot });
    }
}

fn token_state(workspace: &WorkspaceId) -> String {
    let state = TokenState {
        workspace: workspace.clone(),
        account: "acct_00000000000000cc".parse().unwrap(),
        epoch: 1,
        raw_hash: hex::encode(seal::hash::sha256(TOKEN.as_bytes())),
        enabled: true,
        gone: false,
        identity_pub: SigningKey::from_seed(&seed_of(workspace))
            .public()
            .to_string(),
        seq: 1,
    };
    Signed::new(&key_of(7), api::context::TOKEN_STATE, &state)
        .as_str()
        .into()
}

fn unix_ns() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64
}

#[test]
fn a_workspace_sleeps_encrypted_and_wakes_where_it_was() {
    let Some(artifacts) = artifacts() else { return };
    in_netns(move || {
        let mut m = Machines::new(&artifacts);
        m.start(1, WORKSPACE, None);
        // In memory alone, and on the disk but not flushed.
        let canary = "canary-5f1c0a2b";
        m.sh(
            1,
            &format!("echo {canary} > /dev/shm/mark; echo kept > /root/mark"),
        );
        m.sh(1, "sleep 100000 > /dev/null 2>&1 & echo $! > /dev/shm/pid");
        let entropy = m.sh(1, "head -c 16 /dev/urandom | od -An -tx1");
        m.sleep(1);
        assert_eq!(m.objects(), [Purpose::Disk, Purpose::Memory]);
        m.world.assert_clean();
        assert!(
            !holds(&m.world.dir, canary),
            "memory lies in clear somewhere"
        );
        // Asleep, it outlives a warden. Another slot, so another address.
        m.restart(None);
        m.wake(2, Purpose::Memory, None).unwrap();
        assert_eq!(m.objects(), [Purpose::Disk], "woken once");
        assert_eq!(
            m.sh(2, "cat /dev/shm/mark /root/mark"),
            format!("{canary}\nkept")
        );
        m.sh(2, "kill -0 $(cat /dev/shm/pid)");
        let drift = m.sh(2, "date +%s").parse::<u64>().unwrap();
        assert!(
            drift.abs_diff(unix_ns() / 1_000_000_000) < 30,
            "the clock is late"
        );
        assert_ne!(entropy, m.sh(2, "head -c 16 /dev/urandom | od -An -tx1"));
        // It sleeps again, from memory that it was woken from, and is adopted by another warden.
        m.restart(None);
        assert_eq!(
            status(m.warden.as_ref().unwrap()).slots[0].state,
            SlotState::DiskAttached
        );
        m.sleep(2);
        m.wake(1, Purpose::Memory, None).unwrap();
        assert_eq!(m.sh(1, "cat /dev/shm/mark"), canary);
        let grace_ms = 30_000;
        m.vm::<vmctl::Status>(1, &vmctl::Op::Shutdown { grace_ms })
            .unwrap();
        m.close(1);
        m.world.assert_clean();
        // A wake of nothing; a plain start of the disk that a woken guest wrote.
        let none = m.wake(1, Purpose::Memory, None).unwrap_err();
        assert_eq!(none.code, ErrorCode::NotFound);
        m.start(1, WORKSPACE, None);
        assert_eq!(m.sh(1, "cat /root/mark"), "kept");
        m.close(1);
        m.world.assert_clean();
    });
}

#[test]
fn memory_is_not_woken_beside_another_state_of_the_disk_or_changed() {
    let Some(artifacts) = artifacts() else { return };
    in_netns(move || {
        let m = Machines::new(&artifacts);
        m.start(1, WORKSPACE, None);
        m.save(1, Purpose::Memory);
        let (slot, end) = (1, MemoryEnd::Keep);
        m.ask::<bool>(Op::MemoryEnd { slot, end });
        // It goes on: the disk is another one from here on.
        m.vm::<vmctl::Status>(1, &vmctl::Op::Resume).unwrap();
        m.sh(1, "echo more > /root/more; sync");
        m.close(1);
        let stale = m.wake(1, Purpose::Memory, None).unwrap_err();
        assert_eq!(stale.code, ErrorCode::MemoryStale, "{stale:?}");
        m.close(1);
        assert_eq!(
            m.objects(),
            [Purpose::Disk, Purpose::Memory],
            "nothing was used up"
        );
        // A start without it uses it up.
        m.start(1, WORKSPACE, None);
        assert_eq!(m.objects(), [Purpose::Disk]);
        assert_eq!(m.sh(1, "cat /root/more"), "more");
        m.sleep(1);
        // Garbage in the place of it, and of its sidecar's end.
        let dir = m
            .world
            .dir
            .join(jail::VOLUMES)
            .join(format!("{WORKSPACE}.memory"));
        // An image has one superblock, its first, which is in the second slot.
        for (file, at) in [("tags", 4096 + 100), ("volume", 100)] {
            let path = dir.join(file);
            let bytes = std::fs::read(&path).unwrap();
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            let refused = m.wake(1, Purpose::Memory, None);
            let code = refused.map_or_else(|e| e.code, |()| ErrorCode::Internal);
            assert!(
                matches!(code, ErrorCode::DiskTampered | ErrorCode::MemoryStale),
                "{code:?}"
            );
            m.close(1);
            std::fs::write(&path, &bytes).unwrap();
        }
        // A bit of each 16 KiB behind the note: what the VMM stumbles over is told with the disk's last word.
        let path = dir.join("volume");
        let mut changed = std::fs::read(&path).unwrap();
        for at in ((16 << 20) + (16 << 10)..changed.len()).step_by(16 << 10) {
            changed[at] ^= u8::from(changed[at] != 0);
        }
        std::fs::write(&path, &changed).unwrap();
        m.wake(1, Purpose::Memory, None).unwrap_err();
        let (slot, end) = (1, true);
        let said: Option<api::disk::Anchored> = m.ask(Op::DiskAnchor { slot, end });
        assert!(said.unwrap().refused > 0);
        m.close(1);
        m.world.assert_clean();
    });
}

#[test]
fn a_snapshot_is_restored_again_and_again_and_a_fork_outlives_its_source() {
    let Some(artifacts) = artifacts() else { return };
    in_netns(move || {
        let m = Machines::new(&artifacts);
        m.start(1, WORKSPACE, None);
        m.sh(1, "echo then > /root/mark; echo then > /dev/shm/mark; sync");
        let mut keys = BTreeSet::from([m.tls_key(1)]);
        m.vm::<vmctl::Status>(1, &vmctl::Op::Pause).unwrap();
        let (slot, start_id) = (1, START.parse().unwrap());
        let nonce = "0c".repeat(32);
        let attested: Attested = m.ask(Op::SnapshotDiskOpen {
            slot,
            start_id,
            nonce,
        });
        let Sealed { sealed, aad } = m.release(&attested.attestation);
        m.ask::<bool>(Op::SnapshotDiskGrant {
            slot,
            id: SNAPSHOT.parse().unwrap(),
            sealed,
            aad,
        });
        m.save(1, Purpose::SnapshotMemory);
        let end = MemoryEnd::Keep;
        m.ask::<bool>(Op::MemoryEnd { slot, end });
        m.vm::<vmctl::Status>(1, &vmctl::Op::Resume).unwrap();
        m.sh(1, "echo now > /root/mark; echo now > /dev/shm/mark; sync");
        m.close(1);
        let all = [
            Purpose::Disk,
            Purpose::SnapshotDisk,
            Purpose::SnapshotMemory,
        ];
        for _ in 0..2 {
            m.wake(2, Purpose::SnapshotMemory, Some(WORKSPACE)).unwrap();
            // The agent's generator lies in that memory, as it did then.
            assert!(keys.insert(m.tls_key(2)), "one TLS key twice");
            assert_eq!(m.sh(2, "cat /root/mark /dev/shm/mark"), "then\nthen");
            m.sh(2, "echo later > /root/mark; sync");
            assert_eq!(m.objects(), all, "a snapshot is not used up");
            m.close(2);
        }
        // Its memory beside the disk as it is now, which is none of the snapshot's.
        let stale = m.wake(2, Purpose::SnapshotMemory, None).unwrap_err();
        assert_eq!(stale.code, ErrorCode::MemoryStale);
        m.close(2);
        // A fork: another workspace, with a key and an identity of its own.
        m.start(3, OTHER, Some(WORKSPACE));
        assert_eq!(
            m.sh(3, "cat /root/mark; hostname"),
            format!("then\n{}", OTHER.replace('_', "-"))
        );
        m.sh(3, "test ! -e /dev/shm/mark; echo forked > /root/mark; sync");
        m.close(3);
        m.ask::<bool>(Op::DiskErase {
            workspace: WORKSPACE.parse().unwrap(),
        });
        assert_eq!(m.objects(), []);
        m.start(3, OTHER, None);
        assert_eq!(m.sh(3, "cat /root/mark"), "forked");
        m.close(3);
        m.world.assert_clean();
    });
}

/// Whether any file below `dir` holds the text.
fn holds(dir: &Path, text: &str) -> bool {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .any(|e| {
            let path = e.path();
            let kind = e.file_type().unwrap();
            if kind.is_dir() {
                return holds(&path, text);
            }
            kind.is_file() && {
                let bytes = std::fs::read(&path).unwrap_or_default();
                bytes.windows(text.len()).any(|w| w == text.as_bytes())
            }
        })
}
