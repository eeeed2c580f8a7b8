//! The agent as `/init` of a real machine, driven over its channel as vmctl drives it: a
//! virtio-serial port, and a real virtio-vsock, whose device is QEMU's with rust-vmm's
//! `vhost-device-vsock` behind it. That program's unix sockets are those of Firecracker.
//!
//! Needs artifacts: `cargo xtask image --out target/artifacts`, or a directory in
//! `CASEMATE_ARTIFACTS`; the vsock's half says so and passes where that program is not installed.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use api::agent::{FromGuest, IDENTITY_MAGIC, PORT_NAME, ToGuest, VSOCK_PORT, tls_name};
use api::mint::TokenState;
use seal::sign::{Signed, SigningKey};
use seal::tls::Identity;
use seal::tls::tokio_rustls::TlsConnector;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const WS: &str = "ws_0123456789abcdef";
const ACCOUNT: &str = "acct_0123456789abcdef";
/// A vsock device without vhost in the kernel: `cargo install --locked vhost-device-vsock`.
const BACKEND: &str = "vhost-device-vsock";

/// What the agent finds in its machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wire {
    /// QEMU's virtio-serial port.
    Port,
    /// A vsock whose connections come out of unix sockets, as Firecracker's do.
    Vsock,
}

struct Vm {
    qemu: Child,
    backend: Option<Child>,
    /// Hears the agent's connections.
    listener: UnixListener,
    port: BufReader<UnixStream>,
    edge_port: u16,
    serial: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in std::iter::once(&mut self.qemu).chain(&mut self.backend) {
            // Ended by itself is good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Vm {
    fn boot(wire: Wire, dir: &Path, disk: &Path) -> Self {
        let (kernel, initramfs, image) = artifacts();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let edge_port = free.local_addr().unwrap().port();
        drop(free);
        let vsock = dir.join("vsock");
        let at = match wire {
            Wire::Port => dir.join("agent.sock"),
            Wire::Vsock => dir.join(format!("vsock_{VSOCK_PORT}")),
        };
        for old in [&vsock, &at, &dir.join("backend.sock")] {
            let _ = fs::remove_file(old);
        }
        let listener = UnixListener::bind(&at).unwrap();
        let backend = (wire == Wire::Vsock).then(|| backend(dir, &vsock));
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-m", "256M", "-accel", "tcg", "-cpu", "max"])
            .args(["-object", "memory-backend-memfd,id=ram,size=256M,share=on"])
            .args(["-bios", "qboot.rom", "-M"])
            .arg("microvm,x-option-roms=off,acpi=on,auto-kernel-cmdline=off,memory-backend=ram")
            .args(["-global", "virtio-mmio.force-legacy=off", "-append"])
            .arg(format!(
                "console=ttyS0 panic=-1 rdinit=/init tsc_early_khz={}",
                host_khz()
            ))
            .args([
                "-serial",
                &format!("file:{}", dir.join("serial.log").display()),
            ])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-drive", &drive("base", &image, "on")])
            .args(["-drive", &drive("disk", disk, "off")])
            .args(["-device", "virtio-blk-device,drive=base"])
            .args(["-device", "virtio-blk-device,drive=disk"])
            .args([
                "-netdev",
                &format!("user,id=n,hostfwd=tcp:127.0.0.1:{edge_port}-:9991"),
            ])
            .args(["-device", "virtio-net-device,netdev=n", "-chardev"]);
        match wire {
            Wire::Port => qemu
                .arg(format!("socket,id=agent,path={}", at.display()))
                .args(["-device", "virtio-serial-device,max_ports=2", "-device"])
                .arg(format!(
                    "virtserialport,chardev=agent,name={PORT_NAME},nr=1"
                )),
            Wire::Vsock => qemu
                .arg(format!(
                    "socket,id=vsock,path={}",
                    dir.join("backend.sock").display()
                ))
                .args(["-device", "vhost-user-vsock-device,chardev=vsock"]),
        };
        let qemu = qemu.spawn().unwrap();
        let port = accept(&listener);
        Self {
            qemu,
            backend,
            listener,
            port,
            edge_port,
            serial: dir.join("serial.log"),
        }
    }

    /// Closes the agent's connection, as a restore does, and takes the next.
    fn reset(&mut self) {
        self.port
            .get_ref()
            .shutdown(std::net::Shutdown::Both)
            .unwrap();
        self.port = accept(&self.listener);
    }

    fn say(&mut self, message: &ToGuest) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.port.get_mut().write_all(&line).unwrap();
    }

    fn hear(&mut self) -> FromGuest {
        let mut line = String::new();
        let read = self.port.read_line(&mut line);
        read.unwrap_or_else(|e| panic!("{e}: {}", self.console()));
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}: {}", self.console()))
    }

    fn console(&self) -> String {
        fs::read_to_string(&self.serial).unwrap_or_default()
    }
}

/// The next connection, in bounded time.
fn accept(listener: &UnixListener) -> BufReader<UnixStream> {
    let wait = Duration::from_secs(120);
    assert!(
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(
                listener,
                rustix::event::PollFlags::IN
            )],
            Some(&wait.try_into().unwrap()),
        )
        .unwrap()
            > 0,
        "the agent did not connect"
    );
    let (port, _) = listener.accept().unwrap();
    port.set_read_timeout(Some(wait)).unwrap();
    BufReader::new(port)
}

/// The other half of the vsock device, a process; it is there when its socket is.
fn backend(dir: &Path, vsock: &Path) -> Child {
    let socket = dir.join("backend.sock");
    let mut child = Command::new(BACKEND)
        .arg("--guest-cid=3")
        .arg(format!("--socket={}", socket.display()))
        .arg(format!("--uds-path={}", vsock.display()))
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(child.try_wait().unwrap().is_none(), "{BACKEND} ended");
        std::thread::yield_now();
    }
    child
}

/// What `cargo xtask image` made: kernel, initramfs, base image.
fn artifacts() -> (PathBuf, PathBuf, PathBuf) {
    let dir = std::env::var_os("CASEMATE_ARTIFACTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/artifacts"),
        PathBuf::from,
    );
    let manifest = fs::read(dir.join("manifest.json"))
        .unwrap_or_else(|e| panic!("{}: {e}: run `cargo xtask image`", dir.display()));
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let image = manifest["images"][0]["id"].as_str().unwrap();
    (
        dir.join("kernel/vmlinux"),
        dir.join("kernel/initramfs.cpio"),
        dir.join(format!("images/{image}.erofs")),
    )
}

/// Under emulation the guest's TSC is the host's. Calibrating it by the PIT fails on a busy
/// machine, and the kernel then waits for ever.
fn host_khz() -> u64 {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = info
        .lines()
        .find(|line| line.starts_with("cpu MHz"))
        .unwrap();
    let mhz: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
    (mhz * 1000.0) as u64
}

fn drive(id: &str, file: &Path, readonly: &str) -> String {
    format!(
        "if=none,id={id},format=raw,readonly={readonly},file={}",
        file.display()
    )
}

fn key(n: u8) -> SigningKey {
    SigningKey::from_seed(&[n; 32])
}

fn config() -> String {
    json!({"workspace": WS, "hostname": "box", "env": ["A=b"], "cmd": ["sh", "-c", "echo ran >/root/cmd"]})
        .to_string()
}

fn disk(dir: &Path) -> PathBuf {
    let (disk, ext4) = (dir.join("disk.raw"), dir.join("ext4.img"));
    let script = format!(
        "set -e; rm -f {0} {1}; truncate -s 512M {1}; mkfs.ext4 -q -b 4096 -E nodiscard {1}
         truncate -s 513M {0}; dd if={1} of={0} bs=1M seek=1 conv=notrunc,sparse status=none",
        disk.display(),
        ext4.display()
    );
    assert!(
        Command::new("sh")
            .args(["-c", &script])
            .status()
            .unwrap()
            .success()
    );
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
    let file = fs::File::options().write(true).open(&disk).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &area, 0).unwrap();
    disk
}

fn attach() -> ToGuest {
    let state = TokenState {
        workspace: WS.parse().unwrap(),
        account: ACCOUNT.parse().unwrap(),
        epoch: 1,
        raw_hash: String::new(),
        enabled: true,
        gone: false,
        identity_pub: key(3).public().to_hex(),
        seq: 1,
    };
    ToGuest::Attach(api::agent::Attach {
        time_unix_ns: guest::clock::now_ms() * 1_000_000,
        config: config(),
        token_state: Signed::new(&key(1), api::context::TOKEN_STATE, &state).to_string(),
        ip: "10.0.2.15".into(),
        prefix: 24,
        gateway: "10.0.2.2".into(),
    })
}

async fn exec(port: u16, script: &str) -> serde_json::Value {
    let now_s = guest::clock::now_s();
    let claims = json!({"iss": "casemate", "sub": ACCOUNT, "aud": WS, "iat": now_s,
        "exp": now_s + 600, "jti": "x", "epoch": 1});
    let token = seal::jwt::sign(&key(2), &claims);
    let edge = Identity::new(key(4)).leaf("edge.casemate.internal", Duration::from_secs(600));
    let config = seal::tls::client_config(&key(3).public(), edge.ok(), seal::tls::HTTP1).unwrap();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap();
    let name = tls_name(&WS.parse().unwrap()).try_into().unwrap();
    let mut stream = TlsConnector::from(config)
        .connect(name, stream)
        .await
        .unwrap();
    let body = json!({"cmd": ["sh", "-c", script]}).to_string();
    let request = format!(
        "POST /exec HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

/// A workspace's two lives. Over a vsock the connection is reset wherever a restore may come, and
/// once more while the workspace runs.
async fn lives(wire: Wire) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    let disk = disk(dir);
    for start in ["first", "second"] {
        let mut vm = Vm::boot(wire, dir, &disk);
        let heard = vm.hear();
        assert!(matches!(heard, FromGuest::Booted { .. }), "{heard:?}");
        for _ in 0..2 {
            vm.say(&ToGuest::Rehearse);
            assert_eq!(vm.hear(), FromGuest::Rehearsed, "{}", vm.console());
            if wire == Wire::Vsock {
                vm.reset();
            }
        }
        vm.say(&attach());
        let heard = vm.hear();
        assert!(
            matches!(heard, FromGuest::Up(_)),
            "{heard:?} {}",
            vm.console()
        );
        let task = exec(vm.edge_port, "true").await;
        assert_eq!(task["exit_code"], 0, "{task}");
        let script = "hostname; pwd; cat /root/cmd; cat /root/kept; echo kept >/root/kept; id -u; \
                      echo $A; ls -A /sys/class/virtio-ports";
        let task = exec(vm.edge_port, script).await;
        let out = task["stdout"].as_str().unwrap();
        let kept = if start == "second" { "kept\n" } else { "" };
        let ports = if wire == Wire::Port { "vport" } else { "" };
        let expected = format!("box\n/root\nran\n{kept}0\nb\n{ports}");
        assert!(out.starts_with(&expected), "{out:?}, not {expected:?}");
        if wire == Wire::Vsock {
            assert_eq!(out, expected, "a port beside the vsock");
            vm.reset();
            // Answered on the new connection, and the workspace goes on.
            vm.say(&ToGuest::Rehearse);
            let heard = vm.hear();
            let twice = |code: &str| code == "already_attached";
            assert!(
                matches!(&heard, FromGuest::Failed { code, .. } if twice(code)),
                "{heard:?}"
            );
            assert_eq!(exec(vm.edge_port, "true").await["exit_code"], 0);
        }
        vm.say(&ToGuest::Shutdown);
        assert_eq!(vm.hear(), FromGuest::Down);
        vm.qemu.wait().unwrap();
        let (disk, check) = (disk.display(), dir.join("check.img"));
        let check = check.display();
        let fsck = format!(
            "dd if={disk} of={check} bs=1M skip=1 status=none conv=sparse && e2fsck -fn {check}"
        );
        let fsck = Command::new("sh").args(["-c", &fsck]).output().unwrap();
        let text = String::from_utf8_lossy(&fsck.stdout).into_owned();
        assert!(fsck.status.success() && !text.contains("recover"), "{text}");
    }
}

#[tokio::test]
async fn a_machine_boots_rehearses_attaches_serves_and_ends_clean() {
    lives(Wire::Port).await;
}

#[tokio::test]
async fn the_same_over_a_vsock_that_is_reset_again_and_again() {
    if Command::new(BACKEND).arg("--version").output().is_err() {
        eprintln!("SKIPPED: no {BACKEND}; run `cargo install --locked {BACKEND}`");
        return;
    }
    lives(Wire::Vsock).await;
}
