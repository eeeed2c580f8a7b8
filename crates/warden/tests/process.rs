//! Warden's death at each step of its journal, and the socket of the real program. Needs root.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::ErrorCode;
use api::rpc::blocking::{call, read_frame};
use api::warden::{Op, SlotState, Start, Status};
use jail::process::Proc;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use warden::Layout;
use warden::journal::Step;
use world::*;

/// Every step, in order.
const STEPS: [Step; 11] = [
    Step::Begin,
    Step::Net,
    Step::Jailed,
    Step::Open,
    Step::DiskBegin,
    Step::DiskWaits,
    Step::DiskGrant,
    Step::DiskReady,
    Step::DiskAttached,
    Step::Seal,
    Step::Close,
];

/// What each crash test does in a process of its own, until it dies at the step it was told.
#[test]
#[ignore = "run by the crash tests"]
fn victim() {
    let Ok(dir) = std::env::var("CMT_DIR") else {
        return;
    };
    let step = std::env::var("CMT_STEP").unwrap();
    let step: Option<Step> = serde_json::from_str(&step).unwrap();
    // As by SIGKILL: nothing is unwound, nothing dropped.
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let world = World::at(Path::new(&dir));
    let w = world.open(step);
    if step == Some(Step::Seal) {
        w.answer(world.vm_open(1, Start::Build)).unwrap();
        world.probe(1).ask("save");
        w.answer(Op::TemplateSeal { slot: 1 }).unwrap();
    }
    w.answer(world.vm_open(1, Start::Cold)).unwrap();
    w.answer(Op::NetSet {
        slot: 1,
        open: vec![edge(9991)],
        rates: api::warden::NetRates {
            bytes_per_s: 10_000_000,
            packets_per_s: 0,
        },
    })
    .unwrap();
    w.answer(disk_open_bound(1, 200)).unwrap();
    w.answer(disk_grant(1)).unwrap();
    if step.is_some() {
        w.answer(Op::SlotClose { slot: 1 }).unwrap();
    }
    std::process::abort();
}

fn run_victim(world: &World, step: Option<Step>) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "victim"])
        .env("CMT_DIR", &world.dir)
        .env("CMT_STEP", serde_json::to_string(&step).unwrap())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success(), "{step:?} was not reached");
}

#[test]
fn i12_a_warden_that_dies_at_any_step_leaves_nothing_or_a_slot_that_rests() {
    in_netns(|| {
        for step in STEPS {
            let world = World::new();
            run_victim(&world, Some(step));
            let record = world.layout.state().join("slots/1.json");
            let text = std::fs::read_to_string(&record).unwrap();
            assert!(
                text.contains(&serde_json::to_string(&step).unwrap()),
                "{step:?}: {text}"
            );
            let record: warden::journal::Record = serde_json::from_str(&text).unwrap();
            let w = world.open(None);
            let slots = status(&w).slots;
            if step.rests() {
                assert_eq!(slots.len(), 1, "{step:?}");
                let want = if step == Step::Open {
                    SlotState::Open
                } else {
                    SlotState::DiskAttached
                };
                assert_eq!(slots[0].state, want);
                let pid = slots[0].vmm_pid;
                assert!(Proc::of(pid).is_some());
                assert_eq!(world.probe(1).ask("ids"), "900001 900001 1");
                // An adopted slot is as good as one's own: also its deaths are seen.
                w.answer(Op::SlotClose { slot: 1 }).unwrap();
                until("it is gone", || Proc::of(pid).is_none());
            } else {
                assert!(slots.is_empty(), "{step:?}");
                for proc in [record.vmm, record.vmctl, record.disk]
                    .into_iter()
                    .flatten()
                {
                    until("it is gone", || proc.handle().is_none());
                }
            }
            world.assert_clean();
            let kept = world.disk().exists();
            // From `ready` on the volume is the workspace's, whatever happens.
            assert_eq!(
                kept,
                (Step::DiskReady..=Step::DiskAttached).contains(&step) || step == Step::Close,
                "{step:?}"
            );
            // And the slot works again.
            w.answer(world.vm_open(1, Start::Cold)).unwrap();
            w.answer(disk_open(1)).unwrap();
            w.answer(disk_grant(1)).unwrap();
            w.answer(Op::SlotClose { slot: 1 }).unwrap();
            world.assert_clean();
        }
    });
}

#[test]
fn an_adopted_slot_keeps_its_openings_and_bounds_and_notices_deaths() {
    in_netns(|| {
        let world = World::new();
        run_victim(&world, None);
        let w = world.open(None);
        let slot = status(&w).slots[0].clone();
        assert_eq!(slot.state, SlotState::DiskAttached);
        assert!(
            world.left().iter().any(|l| l.contains("9991")),
            "{:?}",
            world.left()
        );
        for set in ["bytes_in", "bytes_out"] {
            let set = ["list", "set", "inet", "casemate", set];
            let set = std::process::Command::new("nft")
                .args(set)
                .output()
                .unwrap();
            let set = String::from_utf8(set.stdout).unwrap();
            assert!(
                set.contains("limit rate over 10000000 bytes/second"),
                "{set}"
            );
        }
        assert_eq!(pids_max(&world, 1), (200, following(&w, 200)));
        assert!(
            w.answer(Op::DiskErase {
                workspace: WORKSPACE.parse().unwrap()
            })
            .is_err(),
            "in use"
        );
        kill(slot.disk_pid.unwrap());
        until("the slot is dead", || {
            status(&w).slots[0].state == SlotState::Dead
        });
        until("the VMM is gone", || Proc::of(slot.vmm_pid).is_none());
        w.answer(Op::SlotClose { slot: 1 }).unwrap();
        world.assert_clean();
        // What a stranger put into the journal's place is not believed.
        let slots = world.layout.state().join("slots");
        std::fs::write(slots.join("1.json"), "{\"v\":1").unwrap();
        std::fs::write(slots.join("x.tmp"), "").unwrap();
        let w2 = world.open(None);
        assert!(status(&w2).slots.is_empty());
        world.assert_clean();
    });
}

#[test]
fn i11_the_socket_refuses_strangers_and_nonsense() {
    in_netns(|| {
        let world = World::new();
        let uids = format!("{{\"host\":{HOST_UID},\"edge\":{EDGE_UID}}}");
        std::fs::write(world.layout.run().join("uids.json"), uids).unwrap();
        let mut daemon = Daemon::start(&world);
        let socket = daemon.socket.clone();
        let ask = move |uid: u32, json: &str| {
            let (socket, body) = (
                socket.clone(),
                serde_json::from_str::<serde_json::Value>(json).unwrap(),
            );
            as_uid(uid, move || {
                call::<_, serde_json::Value>(&socket, "req_1", &body, Duration::from_secs(20))
            })
        };
        let status: Status =
            serde_json::from_value(ask(HOST_UID, r#"{"op":"status"}"#).unwrap()).unwrap();
        assert!(status.slots.is_empty());
        for stranger in [EDGE_UID, 65_534, 900_001] {
            assert!(
                ask(stranger, r#"{"op":"status"}"#)
                    .is_err_and(|e| e.code == ErrorCode::Unavailable)
            );
        }
        let image = &world.image;
        for (bad, code) in [
            (r#"{"op":"shell","cmd":"id"}"#.into(), ErrorCode::BadRequest),
            (
                r#"{"op":"slot_close","slot":1,"path":"/etc"}"#.into(),
                ErrorCode::BadRequest,
            ),
            (
                r#"{"op":"slot_close","slot":65536}"#.into(),
                ErrorCode::BadRequest,
            ),
            (
                r#"{"op":"slot_close","slot":65535}"#.into(),
                ErrorCode::ValidationError,
            ),
            (
                r#"{"op":"slot_close","slot":4096}"#.into(),
                ErrorCode::ValidationError,
            ),
            (
                r#"{"op":"disk_erase","workspace":"../../etc/passwd"}"#.into(),
                ErrorCode::BadRequest,
            ),
            (
                r#"{"op":"disk_erase","workspace":"ws_00000000000000AA"}"#.into(),
                ErrorCode::BadRequest,
            ),
            (
                format!(
                    r#"{{"op":"vm_open","slot":0,"how":"cold","image":"../{}","memory_mb":128,"cpus":1}}"#,
                    &image[3..]
                ),
                ErrorCode::ValidationError,
            ),
            (
                format!(
                    r#"{{"op":"vm_open","slot":0,"how":"cold","image":"{}","memory_mb":128,"cpus":1}}"#,
                    "0".repeat(64)
                ),
                ErrorCode::NotFound,
            ),
            (
                format!(
                    r#"{{"op":"vm_open","slot":0,"how":"cold","image":"{image}","memory_mb":0,"cpus":1}}"#
                ),
                ErrorCode::ValidationError,
            ),
            (
                format!(
                    r#"{{"op":"vm_open","slot":0,"how":"cold","image":"{image}","memory_mb":128,"cpus":4096}}"#
                ),
                ErrorCode::ValidationError,
            ),
            (
                r#"{"op":"net_set","slot":0,"open":[{"source":"edge","port":0}]}"#.into(),
                ErrorCode::ValidationError,
            ),
            (
                r#"{"op":"net_set","slot":0,"open":[{"source":{"slot":0},"port":1}]}"#.into(),
                ErrorCode::ValidationError,
            ),
            (
                r#"{"op":"net_set","slot":0,"open":[{"source":"edge","port":1}]}"#.into(),
                ErrorCode::NotFound,
            ),
            (r#"{"op":"counters","slot":9}"#.into(), ErrorCode::NotFound),
            (
                format!(
                    r#"{{"op":"disk_grant","slot":0,"sealed":"","aad":"{}"}}"#,
                    "z".repeat(64)
                ),
                ErrorCode::ValidationError,
            ),
        ] {
            let answer = ask(0, &bad);
            assert!(
                answer.as_ref().is_err_and(|e| e.code == code),
                "{bad}: {answer:?}"
            );
        }
        // Frames that are none: the connection ends, the daemon does not.
        for bytes in [
            &[0xff, 0xff, 0xff, 0xff][..],
            &[0, 0, 0, 2, b'{', b'}'],
            &[0, 0, 0, 9, b'x'],
        ] {
            let mut s = UnixStream::connect(&daemon.socket).unwrap();
            s.set_read_timeout(Some(SOON)).unwrap();
            s.write_all(bytes).unwrap();
            s.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(read_frame(&mut s).is_ok_and(|f| f.is_none()) || bytes.len() > 4);
        }
        // Upgrades keep VMs, drains don't.
        let open = serde_json::to_string(&world.vm_open(5, Start::Cold)).unwrap();
        ask(HOST_UID, &open).unwrap();
        let status: Status = serde_json::from_value(ask(0, r#"{"op":"status"}"#).unwrap()).unwrap();
        let pid = status.slots[0].vmm_pid;
        daemon.stop();
        assert!(Proc::of(pid).is_some());
        let mut daemon = Daemon::start(&world);
        let status: Status = serde_json::from_value(ask(0, r#"{"op":"status"}"#).unwrap()).unwrap();
        assert_eq!(status.slots[0].vmm_pid, pid);
        std::fs::write(world.layout.own_run().join("drain"), "").unwrap();
        daemon.stop();
        assert!(Proc::of(pid).is_none());
        world.assert_clean();
    });
}

/// The real program, with doubles beside it.
struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    fn start(world: &World) -> Self {
        let program = world.dir.join("programs/casemate-warden");
        if !program.exists() {
            std::fs::copy(LAUNCHER, &program).unwrap();
        }
        let child = Command::new(program)
            .args(["--root", world.dir.to_str().unwrap(), "run"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let socket = Layout::new(&world.dir).own_run().join("warden.sock");
        until("the socket answers", || {
            UnixStream::connect(&socket).is_ok()
        });
        Self { child, socket }
    }

    fn stop(&mut self) {
        signal(self.child.id(), rustix::process::Signal::TERM);
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
