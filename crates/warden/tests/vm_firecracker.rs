//! The whole way from warden through the jail to Firecracker's API and vmctl, with the real jail,
//! vmctl and disk: a template is built, sealed and restored, workspaces get their disk, network,
//! pauses and ends. The guest is played by the test, at the other end of the vsock's socket. In
//! Firecracker's place is a double, and the real one too where `CASEMATE_FIRECRACKER` names it (of
//! the pinned version, static; root, `/dev/kvm`, artifacts). Where KVM truly runs a guest, that one
//! gets a real guest instead: the lives that `vm` leads under QEMU.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::agent::{FromGuest, ToGuest, Up};
use api::vmctl;
use api::warden::{Op, SlotState, Start, VmOpened};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;
use vmm::driver::Driver;
use warden::{Vmm, Warden};
use world::life::{ask, start};
use world::*;

/// The double, built once: it needs what rustc has, and nothing else.
fn double() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sim/firecracker.rs");
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join("firecracker-double");
    let new = built.with_extension(std::process::id().to_string());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let done = Command::new(rustc)
        .args([
            "--edition",
            "2024",
            "-C",
            "target-feature=+crt-static",
            "-o",
        ])
        .args([&new, &source])
        .env("CASEMATE_PIN", vmm::firecracker::pin::VERSION)
        .status();
    assert!(done.unwrap().success(), "the double does not compile");
    std::fs::rename(&new, &built).unwrap();
    built
}

/// The real one and the artifacts, and whether its guest is a real one too; or why there is none.
fn real() -> Result<(PathBuf, PathBuf, bool), String> {
    let path = std::env::var_os("CASEMATE_FIRECRACKER").ok_or("CASEMATE_FIRECRACKER is not set")?;
    let artifacts = life::artifacts().ok_or("there are no artifacts")?;
    std::fs::File::open("/dev/kvm").map_err(|e| format!("/dev/kvm: {e}"))?;
    let scratch = tempfile::tempdir().unwrap();
    let kvm = vmm::kvm::probe(Path::new("/usr/bin/qemu-system-x86_64"), scratch.path());
    eprintln!("{}", kvm.why);
    Ok((path.into(), artifacts, kvm.usable))
}

/// An installation with this Firecracker, and a warden that has chosen it.
struct Installation {
    world: World,
    vmm: Vmm,
}

impl Installation {
    fn new(firecracker: &Path, artifacts: Option<&Path>) -> Self {
        let mut world = World::with_programs();
        let dir = world.layout.artifacts().join("firecracker");
        std::fs::create_dir(&dir).unwrap();
        std::fs::copy(firecracker, dir.join("firecracker")).unwrap();
        for name in ["kernel/vmlinux", "kernel/initramfs.cpio"] {
            if let Some(artifacts) = artifacts {
                std::fs::copy(artifacts.join(name), world.layout.artifacts().join(name)).unwrap();
            }
        }
        if let Some(artifacts) = artifacts {
            world.image_copy(artifacts);
        }
        let program = std::fs::read(firecracker).unwrap();
        let pinned = Some(hex::encode(seal::hash::sha256(&program)));
        let vmm = Vmm {
            driver: Driver::Firecracker,
            kvm: true,
            why: "Firecracker, as asked".into(),
            pinned,
        };
        Self { world, vmm }
    }

    fn warden(&self) -> Arc<Warden> {
        self.world.open_with(self.vmm.clone(), None)
    }

    fn vmm_pid(&self, w: &Arc<Warden>, slot: u16) -> u32 {
        let slots = status(w).slots;
        slots.iter().find(|s| s.slot == slot).unwrap().vmm_pid
    }
}

/// The guest's agent, where its connection comes out in the VMM's jail.
struct Guest(BufReader<UnixStream>);

impl Guest {
    fn connect(vmm_pid: u32) -> Self {
        let at = format!("/proc/{vmm_pid}/root/vmm/vsock_1024");
        let end = Instant::now() + SOON;
        let s = loop {
            match UnixStream::connect(&at) {
                Ok(s) => break s,
                Err(e) => assert!(Instant::now() < end, "{at}: {e}"),
            }
            std::thread::yield_now();
        };
        s.set_read_timeout(Some(SOON)).unwrap();
        Self(BufReader::new(s))
    }

    fn hear(&mut self) -> ToGuest {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
    }

    fn say(&mut self, message: &FromGuest) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.0.get_mut().write_all(&line).unwrap();
    }

    fn booted(&mut self) {
        self.say(&FromGuest::Booted {
            version: "test".into(),
        });
    }

    fn rehearsed(&mut self) {
        assert_eq!(self.hear(), ToGuest::Rehearse);
        self.say(&FromGuest::Rehearsed);
    }
}

/// Prepares the slot's VM, with the test in its guest's place.
fn prepare(i: &Installation, w: &Arc<Warden>, slot: u16, how: Start) -> Guest {
    let pid = i.vmm_pid(w, slot);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| ask::<vmctl::Status>(&i.world, slot, &vmctl::Op::Prepare));
        let mut guest = Guest::connect(pid);
        if how != Start::Template {
            guest.booted();
        }
        guest.rehearsed();
        asked.join().unwrap();
        guest
    })
}

fn lives(firecracker: &Path, artifacts: Option<&Path>) {
    let i = Installation::new(firecracker, artifacts);
    let mut w = i.warden();
    w.answer(i.world.vm_open(0, Start::Build))
        .unwrap_or_else(|e| panic!("{e:?}"));
    drop(prepare(&i, &w, 0, Start::Build));
    ask::<bool>(&i.world, 0, &vmctl::Op::Save);
    w.answer(Op::TemplateSeal { slot: 0 })
        .unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(status(&w).templates.len(), 1);
    let starts = [(1, Start::Template), (2, Start::Cold), (1, Start::Template)];
    for ((slot, how), run) in starts.into_iter().zip(1..) {
        let net = w.answer(i.world.vm_open(slot, how));
        let net: VmOpened =
            serde_json::from_value(net.unwrap_or_else(|e| panic!("{e:?}"))).unwrap();
        assert!(
            !taps().contains(&format!("cm{slot}")),
            "before its VMM is prepared"
        );
        let mut guest = prepare(&i, &w, slot, how);
        let attach = start(&i.world, &w, slot, &net, run);
        assert!(taps().contains(&format!("cm{slot}")), "{:?}", taps());
        let attach = vmctl::Op::Attach {
            attach: Box::new(attach),
            wait_ms: 60_000,
        };
        let up = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask::<Up>(&i.world, slot, &attach));
            let told = guest.hear();
            assert!(matches!(told, ToGuest::Attach(_)), "{told:?}");
            guest.say(&FromGuest::Up(Up {
                kernel: "test".into(),
                steps: vec![],
            }));
            asked.join().unwrap()
        });
        assert_eq!(up.kernel, "test");
        let rules = |open| Op::NetSet {
            slot,
            open,
            rates: api::warden::NetRates::default(),
        };
        w.answer(rules(vec![edge(9991)])).unwrap();
        // Another warden takes over a workspace that runs.
        drop(w);
        w = i.warden();
        let slots = status(&w).slots;
        assert_eq!((slots.len(), slots[0].state), (1, SlotState::DiskAttached));
        ask::<vmctl::Status>(&i.world, slot, &vmctl::Op::Pause);
        ask::<vmctl::Status>(&i.world, slot, &vmctl::Op::Resume);
        assert!(matches!(guest.hear(), ToGuest::Clock { .. }));
        let disk = slots[0].disk_pid.unwrap();
        w.answer(Op::SlotClose { slot }).unwrap();
        until("the disk ends with its VMM", || {
            jail::process::Proc::of(disk).is_none()
        });
        i.world.assert_clean();
    }
}

/// The devices of this network namespace.
fn taps() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text
        .lines()
        .filter_map(|l| Some(l.split_once(':')?.0.trim().into()));
    names.collect()
}

#[test]
fn a_workspace_from_template_to_teardown() {
    in_netns(|| {
        lives(&double(), None);
        match real() {
            Ok((program, artifacts, false)) => lives(&program, Some(&artifacts)),
            Ok((program, artifacts, true)) => {
                let i = Installation::new(&program, Some(&artifacts));
                life::lives(&i.world, Driver::Firecracker, || i.warden());
            }
            Err(why) => eprintln!("skipped the real Firecracker: {why}"),
        }
    });
}
