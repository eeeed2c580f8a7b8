//! Integrity of a disk on the way that ships: warden, casemate-volumes, the real disk process in
//! its jail; only the VMM and vmctl are doubles. Needs root.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::ErrorCode;
use api::disk::Anchored;
use api::kms::{Anchor, Attestation, Grant};
use api::warden::{DiskOpened, Op, SlotState, Start};
use base64::Engine as _;
use jail::process::Proc;
use rustix::fd::OwnedFd;
use seal::sign::Signed;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use warden::{Machine, Warden};
use world::*;

const SLOT: u16 = 5;
const OTHER: &str = "ws_00000000000000ee";
/// Where the volume begins in what the VMM sees, bytes.
const VOLUME: u64 = 1 << 20;
/// Where its ciphertext begins at rest, bytes.
const AT_REST: u64 = 16 << 20;
const SECTOR: u64 = 4096;

/// A machine, with the test in the place of host and KMS.
struct Bench {
    world: World,
    w: Arc<Warden>,
    run: u64,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        let example = Path::new(LAUNCHER).parent().unwrap().join("examples/disk");
        std::fs::copy(example, world.dir.join("programs/casemate-disk")).unwrap();
        let w = world.open(None);
        Self { world, w, run: 0 }
    }

    /// Starts the workspace's disk under that anchor; the file that its VMM would have.
    fn start(&mut self, workspace: &str, anchor: Option<&Anchor>) -> Result<File, ErrorCode> {
        self.run += 1;
        self.w
            .answer(self.world.vm_open(SLOT, Start::Cold))
            .unwrap();
        let started = self.start_steps(workspace, anchor);
        if started.is_err() {
            self.w.answer(Op::SlotClose { slot: SLOT }).unwrap();
            self.world.assert_clean();
        }
        started
    }

    fn start_steps(&self, workspace: &str, anchor: Option<&Anchor>) -> Result<File, ErrorCode> {
        let Op::DiskOpen {
            slot,
            start_id,
            purpose,
            nonce,
            disk_mb,
            bytes_per_s,
            ops_per_s,
            pids,
            from,
            ..
        } = disk_open(SLOT)
        else {
            unreachable!()
        };
        let open = Op::DiskOpen {
            slot,
            workspace: workspace.parse().unwrap(),
            start_id,
            purpose,
            nonce,
            disk_mb,
            bytes_per_s,
            ops_per_s,
            pids,
            from,
        };
        let opened = self.w.answer(open).map_err(|e| e.code)?;
        let opened: DiskOpened = serde_json::from_value(opened).unwrap();
        let machine = Machine::load(&self.world.layout).unwrap();
        let said: Attestation = Signed::parse(opened.attestation)
            .unwrap()
            .verify(&machine.key.public(), api::context::ATTESTATION)
            .unwrap();
        // Each workspace has a key of its own.
        let disk_key = hex::encode(seal::hash::sha256(workspace.as_bytes()));
        let grant = Grant {
            workspace: workspace.parse().unwrap(),
            start_id: START.parse().unwrap(),
            run: self.run,
            anchor: anchor.cloned(),
            purpose: model::Purpose::Disk,
            disk_key,
            identity_seed: "1b".repeat(32),
            config_digest: "2c".repeat(32),
            mint_key: "3d".repeat(32),
            gateway_key: "4e".repeat(32),
            edge_key: "5f".repeat(32),
        };
        let sealed = seal::hpke::seal(
            &said.hpke_pub.parse().unwrap(),
            api::context::RELEASE.as_bytes(),
            &[0x0d; 32],
            &serde_json::to_vec(&grant).unwrap(),
        );
        let grant = Op::DiskGrant {
            slot: SLOT,
            sealed: base64::engine::general_purpose::STANDARD.encode(sealed),
            aad: "0d".repeat(32),
            from: None,
        };
        self.w.answer(grant).map_err(|e| e.code)?;
        Ok(self.file())
    }

    /// What vmctl keeps for the VMM: the one file of a mount that is attached nowhere.
    fn file(&self) -> File {
        let vmctl = status(&self.w).slots[0].vmctl_pid;
        let fds = std::fs::read_dir(format!("/proc/{vmctl}/fd")).unwrap();
        let fd = fds
            .map(|e| e.unwrap())
            .find(|e| std::fs::read_link(e.path()).is_ok_and(|to| to == Path::new("/")))
            .unwrap();
        let fd = fd.file_name().to_str().unwrap().parse().unwrap();
        let handle = Proc::of(vmctl).unwrap().handle().unwrap();
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let file: OwnedFd = rustix::process::pidfd_getfd(handle.pidfd(), fd, flags).unwrap();
        file.into()
    }

    fn anchor(&self, end: bool) -> Option<Anchored> {
        let asked = self.w.answer(Op::DiskAnchor { slot: SLOT, end }).unwrap();
        serde_json::from_value(asked).unwrap()
    }

    /// As host does; the disk's last word.
    fn stop(&self) -> Anchored {
        let last = self.anchor(true);
        assert_eq!(status(&self.w).slots[0].state, SlotState::Dead);
        assert_eq!(
            self.anchor(true),
            last,
            "asked again, after an answer was lost"
        );
        self.w.answer(Op::SlotClose { slot: SLOT }).unwrap();
        self.world.assert_clean();
        last.unwrap()
    }

    fn dir(&self, workspace: &str) -> PathBuf {
        self.world
            .dir
            .join(jail::VOLUMES)
            .join(format!("{workspace}.disk"))
    }

    /// Both files of the workspace's disk, as they are now.
    fn copy(&self, workspace: &str) -> [Vec<u8>; 2] {
        let dir = self.dir(workspace);
        ["volume", "tags"].map(|f| sparse_read(&dir.join(f)))
    }

    /// Puts these files there, as somebody would who writes to the machine's disk.
    fn put(&self, workspace: &str, files: &[Vec<u8>; 2]) {
        let dir = self.dir(workspace);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        for (name, bytes) in ["volume", "tags"].into_iter().zip(files) {
            sparse_write(&dir.join(name), bytes);
        }
        for path in [dir.clone(), dir.join("volume"), dir.join("tags")] {
            let (uid, gid) = (jail::limits::VOLUMES_UID, jail::limits::VOLUMES_UID);
            std::os::unix::fs::chown(path, Some(uid), Some(gid)).unwrap();
        }
    }
}

/// Everything here lies in the first 128 MiB; the rest of a sidecar is a hole of 8 GiB.
fn sparse_read(path: &Path) -> Vec<u8> {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len().min(128 << 20);
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn sparse_write(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (at, page) in (0u64..).step_by(4096).zip(bytes.chunks(4096)) {
        if page.iter().any(|b| *b != 0) {
            file.write_all_at(page, at).unwrap();
        }
    }
}

fn write(file: &File, sector: u64, byte: u8) {
    file.write_all_at(&[byte; SECTOR as usize], VOLUME + sector * SECTOR)
        .unwrap();
}

fn read(file: &File, sector: u64) -> std::io::Result<u8> {
    let mut bytes = [0; SECTOR as usize];
    file.read_exact_at(&mut bytes, VOLUME + sector * SECTOR)?;
    assert!(
        bytes.iter().all(|b| *b == bytes[0]),
        "a sector of two states"
    );
    Ok(bytes[0])
}

/// Sectors behind what the file system's template fills.
const SECTORS: std::ops::Range<u64> = 12_000..12_032;

#[test]
fn a_disk_that_was_changed_at_rest_is_refused_and_says_so() {
    in_netns(|| {
        let mut b = Bench::new();
        let file = b.start(WORKSPACE, None).unwrap();
        SECTORS.for_each(|s| write(&file, s, 1));
        drop(file);
        let first = b.stop();
        let old = b.copy(WORKSPACE);
        let file = b.start(WORKSPACE, Some(&first.statement.anchor)).unwrap();
        SECTORS.for_each(|s| write(&file, s, 2));
        file.sync_data().unwrap();
        drop(file);
        let last = b.stop();
        assert_eq!(last.refused, 0);
        let now = b.copy(WORKSPACE);
        let file = b.start(OTHER, None).unwrap();
        drop(file);
        b.stop();
        let others = b.copy(OTHER);

        let flip = |file: &[u8], at: u64| {
            let mut file = file.to_vec();
            file[usize::try_from(at).unwrap()] ^= 0x10;
            file
        };
        let cut = |file: &[u8], len: u64| file[..usize::try_from(len).unwrap()].to_vec();
        let [volume, tags] = &now;
        let both_superblocks = flip(&flip(tags, 100), 4096 + 100);
        let cases: Vec<(&str, [Vec<u8>; 2])> = vec![
            ("both rolled back", old.clone()),
            ("the sidecar rolled back", [volume.clone(), old[1].clone()]),
            ("another workspace's", others.clone()),
            (
                "another workspace's volume",
                [others[0].clone(), tags.clone()],
            ),
            (
                "another workspace's sidecar",
                [volume.clone(), others[1].clone()],
            ),
            (
                "the volume cut off",
                [cut(volume, AT_REST + 4096), tags.clone()],
            ),
            ("the sidecar cut off", [volume.clone(), cut(tags, 4096)]),
            ("an empty sidecar", [volume.clone(), vec![]]),
            ("two empty files", [vec![], vec![]]),
            ("the header flipped", [flip(volume, 40), tags.clone()]),
            (
                "the keyslot flipped",
                [flip(volume, 40 << 10), tags.clone()],
            ),
            (
                "the superblocks flipped",
                [volume.clone(), both_superblocks],
            ),
        ];
        for (what, files) in &cases {
            b.put(WORKSPACE, files);
            let refused = b.start(WORKSPACE, Some(&last.statement.anchor)).map(drop);
            assert_eq!(refused, Err(ErrorCode::DiskTampered), "{what}");
        }
        // A part or all of it gone: no new disk is made in its place.
        for part in ["volume", "tags", ""] {
            b.put(WORKSPACE, &now);
            let path = b.dir(WORKSPACE).join(part);
            if part.is_empty() {
                std::fs::remove_dir_all(path).unwrap();
            } else {
                std::fs::remove_file(path).unwrap();
            }
            let refused = b.start(WORKSPACE, Some(&last.statement.anchor)).map(drop);
            assert_eq!(refused, Err(ErrorCode::DiskTampered), "{part:?} removed");
        }

        // What is found only where it is read is not answered, and counted.
        let touched = AT_REST + 12_003 * SECTOR;
        let swapped = {
            let mut volume = volume.clone();
            let at = |sector: u64| usize::try_from(AT_REST + sector * SECTOR).unwrap();
            let (a, b) = (at(12_003), at(12_004));
            let (left, right) = volume.split_at_mut(b);
            left[a..a + 4096].swap_with_slice(&mut right[..4096]);
            volume
        };
        for (what, volume) in [
            ("the volume rolled back", old[0].clone()),
            ("a bit of a sector flipped", flip(volume, touched + 9)),
            ("two sectors swapped", swapped),
        ] {
            b.put(WORKSPACE, &[volume, tags.clone()]);
            let file = b.start(WORKSPACE, Some(&last.statement.anchor)).unwrap();
            let refused = read(&file, 12_003).unwrap_err().raw_os_error();
            assert_eq!(refused, Some(libc::EIO), "{what}");
            assert_eq!(b.anchor(false).unwrap().refused, 1, "{what}");
            drop(file);
            b.stop();
        }

        b.put(WORKSPACE, &now);
        let file = b.start(WORKSPACE, Some(&last.statement.anchor)).unwrap();
        assert!(SECTORS.into_iter().all(|s| read(&file, s).unwrap() == 2));
        drop(file);
        b.stop();
    });
}

#[test]
fn a_killed_disk_starts_again_with_all_that_was_flushed_and_never_below_its_anchor() {
    in_netns(|| {
        let mut b = Bench::new();
        let mut anchor: Option<Anchor> = None;
        let mut flushed = 0;
        for round in 1..=8u8 {
            let file = b.start(WORKSPACE, anchor.as_ref()).unwrap();
            for s in SECTORS {
                let found = read(&file, s).unwrap();
                assert!(found >= flushed, "{found} of {flushed} in round {round}");
            }
            SECTORS.for_each(|s| write(&file, s, round));
            file.sync_data().unwrap();
            flushed = round;
            if round % 2 == 0 {
                // Anchored in the middle: what follows may be lost, this may not.
                anchor = b.anchor(false).map(|a| a.statement.anchor);
            }
            // Written over and over while it dies, at any moment.
            let disk = status(&b.w).slots[0].disk_pid.unwrap();
            let writer = std::thread::spawn(move || {
                let mut times = 0u32;
                loop {
                    let bytes = [round; SECTOR as usize];
                    let at = VOLUME + (12_000 + u64::from(times) % 4_000) * SECTOR;
                    let flush = times % 7 == 6 && file.sync_data().is_err();
                    if flush || file.write_all_at(&bytes, at).is_err() {
                        return;
                    }
                    times += 1;
                }
            });
            for _ in 0..u32::from(round) * 50 {
                std::thread::yield_now();
            }
            assert!(Proc::of(disk).unwrap().handle().unwrap().kill(SOON));
            writer.join().unwrap();
            until("the slot is dead", || {
                status(&b.w).slots[0].state == SlotState::Dead
            });
            // A state before the last anchor is not accepted, whoever killed it.
            let said = b.anchor(true).map(|a| a.statement.anchor);
            assert_eq!(said, anchor.clone().filter(|_| round % 2 == 0));
            b.w.answer(Op::SlotClose { slot: SLOT }).unwrap();
        }
    });
}
