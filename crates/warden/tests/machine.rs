//! Warden on a real kernel, with doubles for the programs it starts. Needs root.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::ErrorCode;
use api::warden::{Counters, DiskOpened, Op, SlotState, Start, VmOpened};
use vmm::driver::Driver;
use warden::{Machine, Vmm};
use world::*;

#[test]
fn i14_a_vmm_is_alone_in_its_jail() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        let net: VmOpened =
            serde_json::from_value(w.answer(world.vm_open(3, Start::Cold)).unwrap()).unwrap();
        assert_eq!(
            (net.ip.as_str(), net.gateway.as_str(), net.prefix),
            ("10.117.0.5", "10.117.0.1", 16)
        );
        assert_eq!(net.mac, "02:00:0a:75:00:05");
        let mut vmm = world.probe(3);
        assert_eq!(vmm.ask("ids"), "900003 900003 1");
        for dir in ["/", "/dev", "/kernel"] {
            assert_eq!(
                vmm.ask(&format!("list {dir}")),
                format!("error {}", libc::EACCES)
            );
        }
        assert_eq!(vmm.ask("read /image/base.erofs"), "ok 8");
        assert_eq!(
            vmm.ask("read /proc/1/root"),
            format!("error {}", libc::ENOENT)
        );
        for closed in [
            "/image/base.erofs",
            "/kernel/vmlinux",
            "/usr/bin/qemu-system-x86_64",
        ] {
            assert!(
                vmm.ask(&format!("write {closed}")).starts_with("error"),
                "{closed}"
            );
        }
        for dir in ["/x", "/dev/x", "/usr/x"] {
            assert!(
                vmm.ask(&format!("make {dir}")).starts_with("error"),
                "{dir}"
            );
        }
        let slot = &status(&w).slots[0];
        assert_eq!(slot.state, SlotState::Open);
        let proc =
            |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", slot.vmm_pid)).unwrap();
        let names = |dir: &str| {
            let dir = std::fs::read_dir(format!("/proc/{}/root/{dir}", slot.vmm_pid)).unwrap();
            let mut names: Vec<_> = dir
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names.join(" ")
        };
        assert_eq!(names("/"), "dev image kernel lib lib64 usr");
        assert_eq!(names("/dev"), "null urandom zero");
        assert_eq!(names("/kernel"), "initramfs.cpio vmlinux");
        let facts = proc("status");
        for fact in [
            "Uid:\t900003\t900003\t900003\t900003",
            "Gid:\t900003\t900003\t900003\t900003",
            "Groups:\t \n",
            "CapInh:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "CapAmb:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
            "SigBlk:\t0000000000000000",
        ] {
            assert!(facts.contains(fact), "{fact:?} in {facts}");
        }
        assert_eq!(
            proc("uid_map").split_whitespace().collect::<Vec<_>>(),
            ["900003", "900003", "1"]
        );
        for ns in ["user", "pid", "net", "mnt", "ipc", "uts", "cgroup"] {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{ns}")).unwrap();
            assert_ne!(of(&slot.vmm_pid.to_string()), of("thread-self"), "{ns}");
        }
        let limits = proc("limits");
        for (limit, max) in [
            ("core file size", "0"),
            ("open files", "256"),
            ("locked memory", "0"),
        ] {
            let line = limits.lines().find(|l| l.contains(limit)).unwrap();
            assert!(line.split_whitespace().any(|w| w == max), "{line}");
        }
        let fds = std::fs::read_dir(format!("/proc/{}/fd", slot.vmm_pid)).unwrap();
        // The double keeps a second copy of its channel.
        assert_eq!(fds.count(), 3 + 3 + 1);
        assert!(proc("cgroup").contains("/slot-3/vm"), "{}", proc("cgroup"));
        assert_eq!(
            std::fs::read_dir(format!("/proc/{}/net/dev_snmp6", slot.vmm_pid))
                .map_or(0, Iterator::count),
            1
        );

        // vmctl: no capability, no privilege to gain, an empty network.
        let facts = std::fs::read_to_string(format!("/proc/{}/status", slot.vmctl_pid)).unwrap();
        for fact in [
            "Uid:\t920003\t920003",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "NoNewPrivs:\t1",
        ] {
            assert!(facts.contains(fact), "{fact:?} in {facts}");
        }
        assert!(
            w.answer(world.vm_open(3, Start::Cold))
                .is_err_and(|e| e.code == ErrorCode::Conflict)
        );
        for _ in 0..2 {
            w.answer(Op::SlotClose { slot: 3 }).unwrap();
        }
        world.assert_clean();
    });
}

#[test]
fn kvm_is_in_the_jail_where_it_is_used() {
    if !std::path::Path::new("/dev/kvm").exists() {
        return;
    }
    in_netns(|| {
        let world = World::new();
        let w = world.open_with(
            Vmm {
                kvm: true,
                driver: Driver::Qemu,
                why: "as asked".into(),
                pinned: None,
            },
            None,
        );
        w.answer(world.vm_open(0, Start::Cold)).unwrap();
        let mut vmm = world.probe(0);
        // Opens, though it is root's outside; no such device can be read.
        assert_eq!(vmm.ask("read /dev/kvm"), format!("error {}", libc::EINVAL));
        w.answer(Op::SlotClose { slot: 0 }).unwrap();
        world.assert_clean();
    });
}

#[test]
fn a_call_outside_the_list_kills_the_vmm() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        for (call, args) in [
            (libc::SYS_socket, "2 1 0"),
            (libc::SYS_execve, "0 0 0"),
            (libc::SYS_ptrace, "0 1 0"),
            (libc::SYS_unshare, "268435456 0 0"),
            (libc::SYS_kill, "1 9 0"),
            (libc::SYS_clone, "17 0 0"),
            (libc::SYS_ioctl, "5 21521 0"),
            (libc::SYS_prctl, "4 1 0"),
            (libc::SYS_userfaultfd, "0 0 0"),
            (libc::SYS_process_vm_readv, "1 0 0"),
        ] {
            w.answer(world.vm_open(0, Start::Cold)).unwrap();
            assert_eq!(
                world.probe(0).try_ask(&format!("call {call} {args}")),
                None,
                "{call}"
            );
            until("the slot is dead", || {
                status(&w).slots[0].state == SlotState::Dead
            });
            w.answer(Op::SlotClose { slot: 0 }).unwrap();
        }
        w.answer(world.vm_open(0, Start::Cold)).unwrap();
        let mut vmm = world.probe(0);
        for (call, _) in jail::seccomp::ABSENT {
            assert_eq!(
                vmm.ask(&format!("call {call} 0 0 0")),
                format!("-1 {}", libc::ENOSYS)
            );
        }
        for (advice, _) in jail::seccomp::ABSENT_ADVICE {
            let call = format!("call {} 0 0 {advice}", libc::SYS_madvise);
            assert_eq!(vmm.ask(&call), format!("-1 {}", libc::ENOSYS));
        }
        let call = format!("call {} 0 0 {}", libc::SYS_madvise, libc::MADV_DONTNEED);
        let answer = vmm.ask(&call);
        assert!(answer.starts_with("0 "), "{answer}");
        // The one exec is over: nothing can have that descriptor's number again.
        let answer = vmm.ask(&format!("call {} 1023 0 0", libc::SYS_execveat));
        assert!(answer.starts_with("-1"), "{answer}");
        assert_eq!(
            vmm.ask(&format!("call {} 0 300 0", libc::SYS_dup2)),
            format!("-1 {}", libc::EBADF)
        );
        w.answer(Op::SlotClose { slot: 0 }).unwrap();
        world.assert_clean();
    });
}

#[test]
fn a_disk_is_attested_granted_and_kept() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        w.answer(world.vm_open(1, Start::Cold)).unwrap();
        let too_few = w.answer(disk_open_bound(1, 127)).unwrap_err();
        assert!(
            too_few.message.contains("pids must be between 128"),
            "{too_few}"
        );
        let opened = w.answer(disk_open_bound(1, 300)).unwrap();
        let opened: DiskOpened = serde_json::from_value(opened).unwrap();
        assert!(opened.fresh);
        let machine = Machine::load(&world.layout).unwrap();
        let signed = seal::sign::Signed::parse(opened.attestation).unwrap();
        let said: api::kms::Attestation = signed
            .verify(&machine.key.public(), api::context::ATTESTATION)
            .unwrap();
        let program = std::fs::read(world.dir.join("programs/casemate-disk")).unwrap();
        let digest: String = seal::hash::sha256(&program)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(said.measurement, digest);
        assert_eq!((said.host, said.hpke_pub), (machine.host, "ab".repeat(32)));
        assert_eq!(
            (said.workspace.as_str(), said.start_id.as_str()),
            (WORKSPACE, START)
        );
        assert_eq!(status(&w).slots[0].state, SlotState::DiskWaits);

        // One disk, one slot.
        w.answer(world.vm_open(2, Start::Cold)).unwrap();
        assert!(
            w.answer(disk_open(2))
                .is_err_and(|e| e.code == ErrorCode::Conflict)
        );
        assert!(
            w.answer(Op::DiskErase {
                workspace: WORKSPACE.parse().unwrap()
            })
            .is_err()
        );

        w.answer(disk_grant(1)).unwrap_or_else(|e| panic!("{e:?}"));
        let view = status(&w).slots[0].clone();
        assert_eq!(view.state, SlotState::DiskAttached);
        let disk = view.disk_pid.unwrap();
        let facts = std::fs::read_to_string(format!("/proc/{disk}/status")).unwrap();
        for fact in [
            "Uid:\t910001\t910001",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
            "NoNewPrivs:\t1",
        ] {
            assert!(facts.contains(fact), "{fact:?} in {facts}");
        }
        let adj = std::fs::read_to_string(format!("/proc/{disk}/oom_score_adj")).unwrap();
        assert!(
            adj.trim() == "-900"
                || status(&w)
                    .weakened
                    .iter()
                    .any(|w| w.contains("SYS_RESOURCE"))
        );
        let counters: Counters =
            serde_json::from_value(w.answer(Op::Counters { slot: 1 }).unwrap()).unwrap();
        assert!(
            counters.memory_bytes > 0 && counters.cpu_ns > 0 && counters.disk_bytes > 0,
            "{counters:?}"
        );
        // As many threads as were asked for; the other slot's VM, of nobody yet, has the default.
        assert_eq!(pids_max(&world, 1), (300, following(&w, 300)));
        assert_eq!(pids_max(&world, 2), (129, 129));
        // Granting twice, or to a slot without a disk, is refused.
        assert!(w.answer(disk_grant(1)).is_err());
        assert!(w.answer(disk_grant(2)).is_err());

        for slot in [1, 2] {
            w.answer(Op::SlotClose { slot }).unwrap();
        }
        world.assert_clean();
        let file = world.disk().join("volume");
        assert_eq!(std::fs::read(&file).unwrap(), b"a volume");
        w.answer(world.vm_open(1, Start::Cold)).unwrap();
        let opened: DiskOpened = serde_json::from_value(w.answer(disk_open(1)).unwrap()).unwrap();
        assert!(!opened.fresh);
        w.answer(Op::SlotClose { slot: 1 }).unwrap();
        for _ in 0..2 {
            w.answer(Op::DiskErase {
                workspace: WORKSPACE.parse().unwrap(),
            })
            .unwrap();
        }
        assert!(!file.exists());
        world.assert_clean();
    });
}

#[test]
fn a_death_marks_the_slot_and_ends_the_rest() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        for victim in ["vmm", "vmctl", "disk"] {
            w.answer(world.vm_open(7, Start::Cold)).unwrap();
            w.answer(disk_open(7)).unwrap();
            w.answer(disk_grant(7)).unwrap();
            let slot = status(&w).slots[0].clone();
            let pid = match victim {
                "vmm" => slot.vmm_pid,
                "vmctl" => slot.vmctl_pid,
                _ => slot.disk_pid.unwrap(),
            };
            kill(pid);
            until("the slot is dead", || {
                status(&w).slots[0].state == SlotState::Dead
            });
            for other in [slot.vmm_pid, slot.disk_pid.unwrap()] {
                until("the others are gone", || {
                    jail::process::Proc::of(other).is_none()
                });
            }
            assert!(w.answer(disk_open(7)).is_err());
            w.answer(Op::SlotClose { slot: 7 }).unwrap();
            world.assert_clean();
        }
    });
}

#[test]
fn a_refused_grant_ends_the_vm_and_leaves_no_volume() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        w.answer(world.vm_open(7, Start::Cold)).unwrap();
        w.answer(disk_open(7)).unwrap();
        let grant = Op::DiskGrant {
            slot: 7,
            sealed: "refuse".into(),
            aad: "0d".repeat(32),
            from: None,
        };
        assert!(
            w.answer(grant)
                .is_err_and(|e| e.code == ErrorCode::DiskCorrupt)
        );
        assert_eq!(status(&w).slots[0].state, SlotState::Dead);
        w.answer(Op::SlotClose { slot: 7 }).unwrap();
        world.assert_clean();
        assert!(!world.disk().exists());
    });
}

#[test]
fn a_template_is_what_was_sealed_or_nothing() {
    in_netns(|| {
        let world = World::new();
        let w = world.open(None);
        let missing = w.answer(world.vm_open(0, Start::Template)).unwrap_err();
        assert_eq!(missing.code, ErrorCode::NotFound);
        // A build that saved nothing is no template.
        w.answer(world.vm_open(0, Start::Build)).unwrap();
        assert!(
            w.answer(Op::TemplateSeal { slot: 0 })
                .is_err_and(|e| e.code == ErrorCode::Conflict)
        );
        world.assert_clean();

        w.answer(world.vm_open(0, Start::Build)).unwrap();
        let mut vmm = world.probe(0);
        assert_eq!(vmm.ask("write /template/memory"), "ok 1");
        assert_eq!(vmm.ask("save"), "ok");
        assert!(w.answer(disk_open(0)).is_err(), "a build gets no disk");
        w.answer(Op::TemplateSeal { slot: 0 }).unwrap();
        assert_eq!(status(&w).templates, [(world.image.clone(), 128, 1)]);
        world.assert_clean();

        w.answer(world.vm_open(1, Start::Template)).unwrap();
        let mut vmm = world.probe(1);
        assert_eq!(vmm.ask("read /template/memory"), "ok 16");
        assert!(vmm.ask("write /template/memory").starts_with("error"));
        assert_eq!(
            vmm.ask("read /kernel/vmlinux"),
            format!("error {}", libc::ENOENT)
        );
        w.answer(Op::SlotClose { slot: 1 }).unwrap();

        let templates = world.layout.state().join("templates");
        let dir = std::fs::read_dir(templates)
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        for file in ["state", "memory"] {
            let path = dir.join(file);
            let before = std::fs::read(&path).unwrap();
            let mut after = before.clone();
            after[3] ^= 1;
            std::fs::write(&path, &after).unwrap();
            let refused = w.answer(world.vm_open(1, Start::Template)).unwrap_err();
            assert!(
                refused.detail.unwrap().contains("not what was sealed"),
                "{file}"
            );
            std::fs::write(&path, &before).unwrap();
        }
        w.answer(world.vm_open(1, Start::Template)).unwrap();
        w.answer(Op::SlotClose { slot: 1 }).unwrap();
        // Another kernel, another template.
        std::fs::write(world.layout.artifacts().join("kernel/vmlinux"), "another").unwrap();
        assert!(w.answer(world.vm_open(1, Start::Template)).is_err());
        assert!(status(&w).templates.is_empty());
        world.assert_clean();
    });
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
