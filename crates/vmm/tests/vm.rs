//! Real VMs under the real vmctl: a template built, restored, attached late, shut down; a cold
//! boot that gives the same answer; one whose guest has a vsock, as under Firecracker; a guest that
//! speaks garbage.
//!
//! Needs artifacts: `cargo xtask image --out target/artifacts`, or a directory in
//! `CASEMATE_ARTIFACTS`.
#![allow(clippy::unwrap_used)]

use api::agent::{IDENTITY_MAGIC, Up, VOLUME_OFFSET_BYTES};
use api::mint::TokenState;
use api::rpc::blocking::{call, read_frame};
use api::rpc::{Reply, Request, VERSION, decode, encode};
use api::vmctl::{Op, Status, VmState, WardenOp};
use api::{Error, ErrorCode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use seal::sign::{Signed, SigningKey};
use serde_json::json;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vmm::agent::Channel;
use vmm::qemu::argv::saved_mib;
use vmm::qemu::{Accel, How, Net, Paths, Qemu, Spec, argv};
use vmm::server::Server;

const WAIT: Duration = Duration::from_secs(150);
const WS: &str = "ws_0123456789abcdef";
/// The other half of QEMU's vsock device, whose unix sockets are those of Firecracker.
const VSOCK_BACKEND: &str = "vhost-device-vsock";
const DISK_BYTES: u64 = (64 << 20) + VOLUME_OFFSET_BYTES;

fn artifacts() -> PathBuf {
    let dir = std::env::var_os("CASEMATE_ARTIFACTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/artifacts"),
        PathBuf::from,
    );
    assert!(
        dir.join("manifest.json").exists(),
        "no artifacts in {}: run `cargo xtask image --out target/artifacts` as root",
        dir.display()
    );
    dir
}

fn paths(memory: &Path) -> Paths {
    let dir = artifacts();
    let text = std::fs::read_to_string(dir.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    let id = manifest["images"][0]["id"].as_str().unwrap();
    Paths {
        image: dir.join(format!("images/{id}.erofs")),
        kernel: dir.join("kernel/vmlinux"),
        initramfs: dir.join("kernel/initramfs.cpio"),
        memory: memory.to_owned(),
        saved: memory.with_file_name("saved"),
        firmware: dir.join("closure/usr/share/qemu"),
    }
}

/// Starts `program` with `fds` as 3, 4, …; a shell moves them, since a child of ours can't without
/// unsafe code.
fn spawn(program: &Path, args: &[std::ffi::OsString], fds: &[Option<BorrowedFd<'_>>]) -> Child {
    // Inheritable for a moment: no other test may start a program meanwhile.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut script = String::from("exec \"$@\"");
    for (n, fd) in fds.iter().enumerate() {
        if let Some(fd) = fd {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
            // Out of the way of the numbers that are to be.
            assert!(fd.as_raw_fd() > 6, "a low descriptor");
            script.push_str(&format!(" {}<&{1} {1}<&-", n + 3, fd.as_raw_fd()));
        }
    }
    let child = Command::new("/bin/bash")
        .args(["-c", &script, "bash"])
        .arg(program)
        .args(args)
        .spawn()
        .unwrap();
    for fd in fds.iter().flatten() {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).unwrap();
    }
    child
}

/// Lifts a descriptor above those that [`spawn`] hands out.
fn high(fd: impl Into<OwnedFd>) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(fd.into(), 20).unwrap()
}

/// A VMM, or a double of its guest, and a vmctl.
struct Vm {
    children: Vec<Child>,
    dir: tempfile::TempDir,
    /// The far end of the agent channel, where the guest is a double.
    guest: Option<UnixStream>,
    start: Instant,
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Ended by itself is good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Vm {
    /// `double`: the agent channel ends here, not in the VMM.
    fn open(how: How, template: &Path, double: bool) -> Self {
        let start = Instant::now();
        let dir = tempfile::tempdir().unwrap();
        let (qmp, qmp_far) = UnixStream::pair().unwrap();
        let (agent, agent_far) = UnixStream::pair().unwrap();
        let state = match how {
            How::Template => Some(std::fs::File::open(template.join("state")).unwrap()),
            How::Wake => Some(std::fs::File::open(template.join("saved")).unwrap()),
            How::Build => Some(std::fs::File::create(template.join("state")).unwrap()),
            How::Cold => None,
        };
        let spec = Spec {
            how,
            memory_mib: 256,
            cpus: 1,
            accel: Accel::Tcg,
            net: Net::Nowhere,
            paths: paths(&template.join("memory")),
        };
        let (guest, agent_end) = if double {
            (Some(agent_far), UnixStream::pair().unwrap().0)
        } else {
            (None, agent_far)
        };
        let ends = (high(qmp_far), high(agent_end), state.map(high));
        let qemu = spawn(
            Path::new("/usr/bin/qemu-system-x86_64"),
            &argv(&spec),
            &[
                Some(ends.0.as_fd()),
                Some(ends.1.as_fd()),
                None,
                ends.2.as_ref().map(AsFd::as_fd),
            ],
        );
        let word = match how {
            How::Template => "template",
            How::Cold => "cold",
            How::Build => "build",
            How::Wake => "wake",
        };
        let listen = |name: &str| high(UnixListener::bind(dir.path().join(name)).unwrap());
        let ends = [high(qmp), high(agent), listen("host"), listen("warden")];
        let ends: Vec<_> = ends.iter().map(|e| Some(e.as_fd())).collect();
        let vmctl = spawn(
            Path::new(env!("CARGO_BIN_EXE_casemate-vmctl")),
            &["--slot", "1", "--how", word, "--host-uid", "0"].map(Into::into),
            &ends,
        );
        Self {
            children: vec![qemu, vmctl],
            dir,
            guest,
            start,
        }
    }

    /// A cold VM whose guest has a vsock in the port's place, as under Firecracker, and vmctl's server
    /// in this process: the program takes a channel that listens from Firecracker's helper only.
    fn open_on_vsock(how: How) -> Self {
        let start = Instant::now();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let agent = UnixListener::bind(at("vsock_1024")).unwrap();
        let device = at("device");
        let mut backend = Command::new(VSOCK_BACKEND)
            .arg("--guest-cid=3")
            .arg(format!("--socket={}", device.display()))
            .arg(format!("--uds-path={}", at("vsock").display()))
            .spawn()
            .unwrap();
        while !device.exists() {
            assert!(
                backend.try_wait().unwrap().is_none(),
                "{VSOCK_BACKEND} ended"
            );
            std::thread::yield_now();
        }
        let spec = Spec {
            how,
            memory_mib: 256,
            cpus: 1,
            accel: Accel::Tcg,
            net: Net::Nowhere,
            paths: paths(&at("memory")),
        };
        let mut args = argv(&spec);
        let find = |args: &[OsString], head: &str| {
            let found = args
                .iter()
                .position(|a| a.to_str().unwrap().starts_with(head));
            found.unwrap_or_else(|| panic!("no {head}"))
        };
        let port = find(&args, "virtserialport");
        args.drain(port - 1..=port);
        // The device's other half sees the guest's memory.
        for (head, instead) in [
            (
                "memory-backend-ram",
                "memory-backend-memfd,id=ram,size=256M,share=on".to_owned(),
            ),
            (
                "socket,id=agent",
                format!("socket,id=agent,path={}", device.display()),
            ),
            (
                "virtio-serial-device",
                "vhost-user-vsock-device,chardev=agent".to_owned(),
            ),
        ] {
            let found = find(&args, head);
            args[found] = instead.into();
        }
        args.extend(["-global", "virtio-mmio.force-legacy=off"].map(Into::into));
        let (qmp, qmp_far) = UnixStream::pair().unwrap();
        let qmp_far = high(qmp_far);
        let qemu = spawn(
            Path::new("/usr/bin/qemu-system-x86_64"),
            &args,
            &[Some(qmp_far.as_fd())],
        );
        drop(qmp_far);
        let vm = vmm::vmctl::Vm::new(
            1,
            how,
            Qemu::new(qmp).unwrap(),
            Channel::listen(agent).unwrap(),
        );
        let listen = |name: &str| UnixListener::bind(at(name)).unwrap();
        let mut server = Server::new(1, vm, listen("host"), listen("warden"), 0).unwrap();
        // It ends with the test's process.
        std::thread::spawn(move || server.run());
        Self {
            children: vec![qemu, backend],
            dir,
            guest: None,
            start,
        }
    }

    /// CPU time of the VMM so far: what a busy machine does not stretch.
    fn cpu_ms(&self) -> u64 {
        let stat = format!("/proc/{}/stat", self.children[0].id());
        let stat = std::fs::read_to_string(stat).unwrap();
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks = |n: usize| fields[n].parse::<u64>().unwrap();
        (ticks(11) + ticks(12)) * 1000 / rustix::param::clock_ticks_per_second()
    }

    fn ask<A: serde::de::DeserializeOwned>(&self, op: &Op) -> Result<A, Error> {
        call(&self.dir.path().join("host"), "req_test", op, WAIT)
    }

    fn prepared(how: How, template: &Path) -> Self {
        Self::open(how, template, false).prepare(how)
    }

    fn prepare(self, how: How) -> Self {
        let vm = self;
        let status: Status = vm.ask(&Op::Prepare).unwrap();
        assert_eq!(status.vm, VmState::Pooled);
        let took = vm.start.elapsed();
        println!("{how:?}: prepared in {took:?}, {} ms of CPU", vm.cpu_ms());
        vm
    }

    fn disk(&self, path: &Path) {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap())
            .open(path)
            .unwrap();
        let ready = WardenOp::DiskReady {
            size_bytes: DISK_BYTES,
        };
        self.warden(WardenOp::DiskFd, &[file.as_fd()]);
        self.warden(ready, &[]);
    }

    /// Hands over an empty file for the workspace's memory, and has it saved.
    fn memory_save(&self, path: &Path) {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(u64::from(saved_mib(256)) << 20).unwrap();
        self.warden(WardenOp::MemoryFd, &[file.as_fd()]);
        let start = Instant::now();
        let status: Status = self.ask(&Op::MemorySave).unwrap();
        println!("saved in {:?}", start.elapsed());
        assert_eq!(status.vm, VmState::Paused);
        self.warden(WardenOp::MemoryDrop, &[]);
    }

    fn warden(&self, op: WardenOp, fds: &[BorrowedFd<'_>]) {
        {
            let mut s = UnixStream::connect(self.dir.path().join("warden")).unwrap();
            let request = encode(&Request {
                v: VERSION,
                id: 1,
                request_id: "req_test".into(),
                body: op,
            })
            .unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let io = [IoSlice::new(&request)];
            sendmsg(&s, &io, &mut control, SendFlags::empty()).unwrap();
            s.set_read_timeout(Some(WAIT)).unwrap();
            let frame = read_frame(&mut s).unwrap().unwrap();
            let kept: bool = decode::<Reply<bool>>(&frame)
                .unwrap()
                .into_result()
                .unwrap();
            assert!(kept);
        }
    }

    fn attach(&self, disk: &Path) -> Up {
        self.disk(disk);
        let (start, cpu_ms) = (Instant::now(), self.cpu_ms());
        let attach = Box::new(api::agent::Attach {
            time_unix_ns: 1_800_000_000_000_000_000,
            config: config(),
            token_state: token_state(),
            ip: "10.117.0.3".into(),
            prefix: 16,
            gateway: "10.117.0.1".into(),
        });
        let up = self.ask(&Op::Attach {
            attach,
            wait_ms: 60_000,
        });
        let cpu_ms = self.cpu_ms() - cpu_ms;
        println!("attach to up: {:?}, {cpu_ms} ms of CPU", start.elapsed());
        up.unwrap()
    }
}

fn key(n: u8) -> SigningKey {
    SigningKey::from_seed(&[n; 32])
}

fn config() -> String {
    json!({"workspace": WS, "hostname": "box", "env": [], "cmd": []}).to_string()
}

fn token_state() -> String {
    let state = TokenState {
        workspace: WS.parse().unwrap(),
        account: "acct_0123456789abcdef".parse().unwrap(),
        epoch: 1,
        raw_hash: String::new(),
        enabled: true,
        gone: false,
        identity_pub: key(3).public().to_hex(),
        seq: 1,
    };
    Signed::new(&key(1), api::context::TOKEN_STATE, &state).to_string()
}

/// An identity block and an empty ext4, in the clear.
fn disk(dir: &Path) -> PathBuf {
    let (disk, volume) = (dir.join("disk"), dir.join("volume"));
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    std::fs::File::create(&volume)
        .unwrap()
        .set_len(DISK_BYTES - VOLUME_OFFSET_BYTES)
        .unwrap();
    let status = Command::new("mkfs.ext4")
        .args(["-q", "-b", "4096"])
        .arg(&volume)
        .status()
        .unwrap();
    assert!(status.success());
    let bytes = std::fs::read(&volume).unwrap();
    file.write_all_at(&bytes, VOLUME_OFFSET_BYTES).unwrap();
    std::fs::remove_file(&volume).unwrap();
    let block = json!({
        "workspace": WS, "start_id": "st_0123456789abcdef", "seed": "ab".repeat(64),
        "identity_seed": "03".repeat(32),
        "config_digest": hex::encode(seal::hash::sha256(config().as_bytes())),
        "mint_key": key(1).public().to_hex(), "gateway_key": key(2).public().to_hex(),
        "edge_key": key(4).public().to_hex(),
    })
    .to_string();
    let mut area = IDENTITY_MAGIC.to_vec();
    area.extend_from_slice(&u32::try_from(block.len()).unwrap().to_be_bytes());
    area.extend_from_slice(block.as_bytes());
    file.write_all_at(&area, 0).unwrap();
    disk
}

/// A template in `dir`, as warden leaves it.
fn template(dir: &Path) {
    let vm = Vm::prepared(How::Build, dir);
    assert!(vm.ask::<bool>(&Op::Save).unwrap());
    assert_eq!(
        vm.ask::<Status>(&Op::Status).unwrap().reason.as_deref(),
        Some("saved")
    );
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    std::fs::set_permissions(dir.join("memory"), read_only).unwrap();
}

fn digest(path: &Path) -> [u8; 32] {
    seal::hash::sha256(&std::fs::read(path).unwrap())
}

#[test]
fn template_and_cold_boot_give_the_same_workspace() {
    let dir = tempfile::tempdir().unwrap();
    template(dir.path());
    let before = digest(&dir.path().join("memory"));
    let disk = disk(dir.path());
    let mut answers = Vec::new();
    for how in [How::Template, How::Cold, How::Template] {
        let vm = Vm::prepared(how, dir.path());
        let up = vm.attach(&disk);
        let paused: Status = vm.ask(&Op::Pause).unwrap();
        assert_eq!(paused.vm, VmState::Paused);
        let running: Status = vm.ask(&Op::Resume).unwrap();
        assert_eq!(running.vm, VmState::Running);
        let end: Status = vm.ask(&Op::Shutdown { grace_ms: 30_000 }).unwrap();
        assert_eq!(end.reason.as_deref(), Some("shutdown"));
        answers.push((up, end));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
    assert_eq!(
        before,
        digest(&dir.path().join("memory")),
        "the template was written to"
    );
}

#[test]
fn memory_that_was_saved_is_woken_beside_the_disk_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved");
    let disk = disk(dir.path());
    let vm = Vm::prepared(How::Cold, dir.path());
    vm.attach(&disk);
    // Saved, it can go on, and be saved again.
    vm.memory_save(&dir.path().join("first"));
    let running: Status = vm.ask(&Op::Resume).unwrap();
    assert_eq!(running.vm, VmState::Running);
    vm.memory_save(&saved);
    let end: Status = vm.ask(&Op::Shutdown { grace_ms: 0 }).unwrap();
    assert_eq!(end.reason.as_deref(), Some("shutdown"));
    drop(vm);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&saved.metadata().unwrap());
    assert!(blocks * 512 < 192 << 20, "pages of zeros were written");
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    std::fs::set_permissions(&saved, read_only).unwrap();
    let before = digest(&saved);

    let vm = Vm::open(How::Wake, dir.path(), false);
    vm.disk(&disk);
    let up: Up = vm
        .ask(&Op::Wake {
            wake: Box::new(api::agent::Wake {
                time_unix_ns: 1_900_000_000_000_000_000,
                token_state: token_state(),
                ip: "10.117.0.9".into(),
                prefix: 16,
                gateway: "10.117.0.1".into(),
            }),
            wait_ms: 60_000,
        })
        .unwrap();
    println!(
        "woken after {:?}, {} ms of CPU",
        vm.start.elapsed(),
        vm.cpu_ms()
    );
    assert!(!up.kernel.is_empty());
    vm.ask::<Status>(&Op::Pause).unwrap();
    vm.ask::<Status>(&Op::Resume).unwrap();
    let end: Status = vm.ask(&Op::Shutdown { grace_ms: 30_000 }).unwrap();
    assert_eq!(end.reason.as_deref(), Some("shutdown"));
    assert_eq!(before, digest(&saved), "what was saved was written to");
    // What the woken guest unmounted is a sound file system.
    let volume = dir.path().join("volume");
    let mut from = std::fs::File::open(&disk).unwrap();
    std::io::Seek::seek(&mut from, std::io::SeekFrom::Start(VOLUME_OFFSET_BYTES)).unwrap();
    std::io::copy(&mut from, &mut std::fs::File::create(&volume).unwrap()).unwrap();
    let checked = Command::new("e2fsck")
        .arg("-fn")
        .arg(&volume)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

/// All but the VMM is as under Firecracker: the agent connects, over a real vsock, to a socket that
/// vmctl's channel listens at, and is the same workspace.
#[test]
fn a_guest_with_a_vsock_is_the_same_workspace() {
    if Command::new(VSOCK_BACKEND)
        .arg("--version")
        .output()
        .is_err()
    {
        eprintln!("SKIPPED: no {VSOCK_BACKEND}; run `cargo install --locked {VSOCK_BACKEND}`");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path());
    let mut answers = Vec::new();
    for vm in [
        Vm::open_on_vsock(How::Cold),
        Vm::open(How::Cold, dir.path(), false),
    ] {
        let vm = vm.prepare(How::Cold);
        let up = vm.attach(&disk);
        let paused: Status = vm.ask(&Op::Pause).unwrap();
        assert_eq!(paused.vm, VmState::Paused);
        let running: Status = vm.ask(&Op::Resume).unwrap();
        assert_eq!(running.vm, VmState::Running);
        let end: Status = vm.ask(&Op::Shutdown { grace_ms: 30_000 }).unwrap();
        assert_eq!(end.reason.as_deref(), Some("shutdown"));
        answers.push((up, end));
    }
    assert_eq!(answers[0], answers[1]);
}

#[test]
fn a_guest_that_speaks_garbage_and_one_that_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Vm::open(How::Cold, dir.path(), true);
    let mut guest = vm.guest.take().unwrap();
    let double = std::thread::spawn(move || {
        guest
            .write_all(b"{\"type\":\"booted\",\"version\":\"0\"}\n")
            .unwrap();
        let mut line = String::new();
        let mut reader = BufReader::new(guest.try_clone().unwrap());
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "{\"type\":\"rehearse\"}\n");
        guest.write_all(b"\x00\xff{{{\n").unwrap();
        line
    });
    let e = vm.ask::<Status>(&Op::Prepare).unwrap_err();
    assert_eq!(e.code, ErrorCode::BadGateway, "{e:?}");
    double.join().unwrap();
    let status: Status = vm.ask(&Op::Status).unwrap();
    assert_eq!(status.reason.as_deref(), Some("failed"));

    // A VMM that is killed is noticed, and vmctl stays to say so.
    let mut vm = Vm::prepared(How::Cold, dir.path());
    vm.children[0].kill().unwrap();
    vm.children[0].wait().unwrap();
    let e = vm.ask::<Status>(&Op::Resume).unwrap_err();
    assert_eq!(e.code, ErrorCode::Conflict);
    let status: Status = vm.ask(&Op::Status).unwrap();
    assert_eq!(status.reason.as_deref(), Some("lost"));
}
