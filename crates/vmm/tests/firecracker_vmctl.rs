//! The real vmctl, in its own sandbox, between a double of Firecracker's API and one of the guest.
#![allow(clippy::unwrap_used)]

mod sim;

use api::agent::{Attach, FromGuest, ToGuest, Up};
use api::rpc::blocking::{call, read_frame, write_frame};
use api::rpc::{Reply, Request, VERSION, decode};
use api::vmctl::{Op, Status, VmState, WardenOp};
use api::{Error, ErrorCode};
use serde_json::json;
use sim::firecracker::{Fault, Server, State};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const WAIT: Duration = Duration::from_secs(60);

struct Vm {
    vmctl: Child,
    server: Option<Server>,
    dir: tempfile::TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Ended by itself is good; the double ends with the connection.
        let _ = self.vmctl.kill();
        let _ = self.vmctl.wait();
        drop(self.server.take());
    }
}

impl Vm {
    fn open(how: &str, fault: Option<(usize, Fault)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (server, control) = Server::start(fault);
        server.seen.lock().unwrap().files = false;
        let listen = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
        let (from, helper) = UnixStream::pair().unwrap();
        send(&helper, control, listen("agent_1024"));
        let ends: [OwnedFd; 4] = [
            from.into(),
            helper.into(),
            listen("host").into(),
            listen("warden").into(),
        ];
        Self {
            vmctl: spawn(how, &ends),
            server: Some(server),
            dir,
        }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn ask<A: serde::de::DeserializeOwned>(&self, op: &Op) -> Result<A, Error> {
        call(&self.at("host"), "req_test", op, WAIT)
    }

    /// A request of warden's.
    fn tell(&self, op: WardenOp) -> Result<bool, Error> {
        let mut s = UnixStream::connect(self.at("warden")).unwrap();
        s.set_read_timeout(Some(WAIT)).unwrap();
        let request = Request {
            v: VERSION,
            id: 1,
            request_id: "req_test".into(),
            body: op,
        };
        write_frame(&mut s, &request).unwrap();
        let frame = read_frame(&mut s).unwrap().unwrap();
        decode::<Reply<bool>>(&frame).unwrap().into_result()
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    /// Waits until the VMM is so.
    fn until(&self, state: State) {
        let deadline = Instant::now() + WAIT;
        while self.server().state() != state {
            assert!(Instant::now() < deadline, "it is never {state:?}");
            std::thread::yield_now();
        }
    }
}

/// As the helper in the VMM's jail does.
fn send(to: &UnixStream, control: UnixStream, agent: UnixListener) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut buffer = SendAncillaryBuffer::new(&mut space);
    let fds = [control.as_fd(), agent.as_fd()];
    assert!(buffer.push(SendAncillaryMessage::ScmRights(&fds)));
    let word = [std::io::IoSlice::new(b"vmm")];
    sendmsg(to, &word, &mut buffer, SendFlags::empty()).unwrap();
}

/// Starts vmctl with `ends` as 3, 4, 5, 6; a shell moves them, since a child of ours can't without
/// unsafe code.
fn spawn(how: &str, ends: &[OwnedFd; 4]) -> Child {
    // Inheritable for a moment: no other test may start a program meanwhile.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // Out of the way of the numbers that are to be.
    let high = ends
        .each_ref()
        .map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 20).unwrap());
    let mut script = String::from("exec \"$@\"");
    for (n, fd) in high.iter().enumerate() {
        rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty()).unwrap();
        script.push_str(&format!(" {}<&{1} {1}<&-", n + 3, fd.as_raw_fd()));
    }
    Command::new("/bin/bash")
        .args(["-c", &script, "bash"])
        .arg(Path::new(env!("CARGO_BIN_EXE_casemate-vmctl")))
        .args(["--slot", "1", "--how", how, "--host-uid", "0"])
        .args(["--driver", "firecracker"])
        .args(["--memory-mib", "256", "--cpus", "2"])
        .spawn()
        .unwrap()
}

/// The guest's agent, where Firecracker's vsock comes out.
struct Guest(BufReader<UnixStream>);

impl Guest {
    fn connect(vm: &Vm) -> Self {
        let s = UnixStream::connect(vm.at("agent_1024")).unwrap();
        s.set_read_timeout(Some(WAIT)).unwrap();
        Self(BufReader::new(s))
    }

    fn hear(&mut self) -> ToGuest {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn say(&mut self, message: &FromGuest) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.0.get_mut().write_all(&line).unwrap();
    }
}

fn attach() -> Op {
    let attach = json!({
        "time_unix_ns": 1, "config": "{}", "token_state": "", "ip": "10.117.0.3", "prefix": 16,
        "gateway": "10.117.0.1",
    });
    let attach: Attach = serde_json::from_value(attach).unwrap();
    Op::Attach {
        attach: Box::new(attach),
        wait_ms: 60_000,
    }
}

/// From the pool to the end; `guest` is at hand once it has connected.
fn workspace(vm: &Vm, guest: impl FnOnce() -> Guest + Send) {
    let disk = vm.tell(WardenOp::DiskReady {
        size_bytes: 64 << 20,
    });
    assert_eq!(disk.unwrap_err().code, ErrorCode::Conflict, "no disk yet");
    assert!(vm.tell(WardenOp::DiskMounted).unwrap());
    assert_eq!(
        vm.ask::<Up>(&attach()).unwrap_err().code,
        ErrorCode::Conflict
    );
    assert!(
        vm.tell(WardenOp::DiskReady {
            size_bytes: 64 << 20
        })
        .unwrap()
    );
    let mut guest = std::thread::scope(|s| {
        let t = s.spawn(|| {
            vm.until(State::Running);
            let mut guest = guest();
            assert!(matches!(guest.hear(), ToGuest::Attach(_)));
            guest.say(&FromGuest::Up(Up {
                kernel: "6.1".into(),
                steps: Vec::new(),
            }));
            guest
        });
        let up: Up = vm.ask(&attach()).unwrap();
        assert_eq!(up.kernel, "6.1");
        t.join().unwrap()
    });
    let disk = vm.server().body("PATCH", "/drives/disk");
    assert_eq!(
        disk,
        json!({"drive_id": "disk", "path_on_host": "/disk/volume"})
    );

    let status: Status = vm.ask(&Op::Pause).unwrap();
    assert_eq!(
        (status.vm, vm.server().state()),
        (VmState::Paused, State::Paused)
    );
    let status: Status = vm.ask(&Op::Resume).unwrap();
    assert_eq!(
        (status.vm, vm.server().state()),
        (VmState::Running, State::Running)
    );
    assert!(matches!(guest.hear(), ToGuest::Clock { .. }));

    let status: Status = std::thread::scope(|s| {
        let t = s.spawn(|| {
            assert_eq!(guest.hear(), ToGuest::Shutdown);
            guest.say(&FromGuest::Down);
        });
        let status = vm.ask(&Op::Shutdown { grace_ms: 60_000 });
        t.join().unwrap();
        status.unwrap()
    });
    assert_eq!(status.vm, VmState::Exited);
    assert_eq!(status.reason.as_deref(), Some("shutdown"));
    assert_eq!(vm.server().state(), State::Paused, "its CPUs run on");
    assert_eq!(vm.server().seen.lock().unwrap().refused, [""; 0]);
}

#[test]
fn a_cold_start_to_its_end() {
    let vm = Vm::open("cold", None);
    let mut guest = Guest::connect(&vm);
    std::thread::scope(|s| {
        s.spawn(|| {
            guest.say(&FromGuest::Booted {
                version: "1".into(),
            });
            assert_eq!(guest.hear(), ToGuest::Rehearse);
            guest.say(&FromGuest::Rehearsed);
        });
        let status: Status = vm.ask(&Op::Prepare).unwrap();
        assert_eq!(status.vm, VmState::Pooled);
    });
    assert_eq!(vm.server().state(), State::Paused);
    assert!(
        UnixStream::connect(vm.at("agent_1024")).is_err(),
        "a second connection is heard"
    );
    workspace(&vm, || guest);
}

/// A restored guest connects when it runs; what it is to be told waits for it.
#[test]
fn a_restore_to_its_end() {
    let vm = Vm::open("template", None);
    // The state of a template, as the double keeps it.
    let devices = json!({"drives": ["base", "disk"], "nets": ["net"]}).to_string();
    vm.server().seen.lock().unwrap().template = Some(devices);
    let status: Status = vm.ask(&Op::PrepareNow).unwrap();
    assert_eq!(
        (status.vm, vm.server().state()),
        (VmState::Pooled, State::Paused)
    );
    workspace(&vm, || Guest::connect(&vm));
}

/// A VMM that dies or lies ends the workspace, typed, and nothing is asked of it again.
#[test]
fn a_vmm_that_fails() {
    for fault in [
        Fault::Die,
        Fault::SayAndDie(b"HTTP/1.1 204 \r\n".to_vec()),
        Fault::Say(b"HTTP/1.1 200 \r\n\r\n".to_vec()),
        Fault::Say(vec![0; 1 << 16]),
    ] {
        let vm = Vm::open("cold", Some((3, fault)));
        let e = vm.ask::<Status>(&Op::Prepare).unwrap_err();
        assert_eq!(e.code, ErrorCode::VmUnavailable);
        let status: Status = vm.ask(&Op::Status).unwrap();
        assert_eq!(status.vm, VmState::Exited);
        assert_eq!(status.reason.as_deref(), Some("failed"));
        assert_eq!(vm.server().seen.lock().unwrap().requests.len(), 3);
    }
}
