//! The agent as `/init` of a real machine, driven over its port as vmctl drives it.
//!
//! Ignored by default, since it needs a kernel, modules, a base image and a built agent:
//! `GUEST_VM=dir cargo test -p casemate-guest --test vm -- --ignored --nocapture`, where `dir`
//! holds `vmlinux`, `modules/` with `order`, `base.erofs` and `casemate-guest`. `CASEMATE_KERNEL`
//! names another kernel, one that has everything built in: `cargo xtask kernel` makes it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use api::agent::{FromGuest, IDENTITY_MAGIC, ToGuest, tls_name};
use api::mint::TokenState;
use seal::sign::{Signed, SigningKey};
use seal::tls::Identity;
use seal::tls::tokio_rustls::TlsConnector;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const WS: &str = "ws_0123456789abcdef";
const ACCOUNT: &str = "acct_0123456789abcdef";

struct Vm {
    child: Child,
    port: BufReader<UnixStream>,
    edge_port: u16,
    serial: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vm {
    fn boot(given: &Path, dir: &Path, disk: &Path) -> Self {
        let path = dir.join("agent.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let edge_port = free.local_addr().unwrap().port();
        drop(free);
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-no-reboot",
                "-m",
                "256",
            ])
            .args([
                "-M",
                "microvm,x-option-roms=off,acpi=on,auto-kernel-cmdline=off",
            ])
            .args([
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-bios",
                "qboot.rom",
                "-append",
            ])
            .arg(format!(
                "console=ttyS0 panic=-1 rdinit=/init tsc_early_khz={}",
                host_khz()
            ))
            .args([
                "-serial",
                &format!("file:{}", dir.join("serial.log").display()),
            ])
            .arg("-kernel")
            .arg(other_kernel().unwrap_or_else(|| given.join("vmlinux")))
            .arg("-initrd")
            .arg(dir.join("initramfs.cpio"))
            .args(["-drive", &drive("base", &given.join("base.erofs"), "on")])
            .args(["-drive", &drive("disk", disk, "off")])
            .args(["-device", "virtio-blk-device,drive=base"])
            .args(["-device", "virtio-blk-device,drive=disk"])
            .args(["-device", "virtio-serial-device,max_ports=2"])
            .args([
                "-chardev",
                &format!("socket,id=agent,path={}", path.display()),
            ])
            .args([
                "-device",
                "virtserialport,chardev=agent,name=casemate.agent,nr=1",
            ])
            .args([
                "-netdev",
                &format!("user,id=n,hostfwd=tcp:127.0.0.1:{edge_port}-:9991"),
            ])
            .args(["-device", "virtio-net-device,netdev=n"])
            .spawn()
            .unwrap();
        let (port, _) = listener.accept().unwrap();
        port.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let port = BufReader::new(port);
        Self {
            child,
            port,
            edge_port,
            serial: dir.join("serial.log"),
        }
    }

    fn say(&mut self, message: &ToGuest) {
        let mut line = serde_json::to_vec(message).unwrap();
        line.push(b'\n');
        self.port.get_mut().write_all(&line).unwrap();
    }

    fn hear(&mut self) -> FromGuest {
        let mut line = String::new();
        let read = self.port.read_line(&mut line);
        read.unwrap_or_else(|e| panic!("{e}: {}", fs::read_to_string(&self.serial).unwrap()));
        serde_json::from_str(&line).unwrap()
    }
}

/// A kernel that needs no modules, in place of the one that is given.
fn other_kernel() -> Option<PathBuf> {
    std::env::var_os("CASEMATE_KERNEL").map(PathBuf::from)
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

fn initramfs(given: &Path, dir: &Path) {
    let tree = dir.join("initramfs");
    let _ = fs::remove_dir_all(&tree);
    let modules = tree.join("lib/modules/casemate");
    fs::create_dir_all(&modules).unwrap();
    let given_modules = fs::read_dir(given.join("modules")).unwrap().flatten();
    for entry in given_modules.filter(|_| other_kernel().is_none()) {
        fs::copy(entry.path(), modules.join(entry.file_name())).unwrap();
    }
    fs::copy(given.join("casemate-guest"), tree.join("init")).unwrap();
    let pack = format!(
        "cd {} && find . | cpio -o -H newc --quiet > {}",
        tree.display(),
        dir.join("initramfs.cpio").display()
    );
    assert!(
        Command::new("sh")
            .args(["-c", &pack])
            .status()
            .unwrap()
            .success()
    );
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

#[tokio::test]
#[ignore = "needs a kernel and an image: see the head of this file"]
async fn a_machine_boots_rehearses_attaches_serves_and_ends_clean() {
    let given = PathBuf::from(std::env::var("GUEST_VM").unwrap());
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    initramfs(&given, dir);
    let disk = disk(dir);
    let mut started = Instant::now();
    let mut lap = move |what: &str| {
        println!("{what}: {:?}", started.elapsed());
        started = Instant::now();
    };
    for start in ["first", "second"] {
        let mut vm = Vm::boot(&given, dir, &disk);
        let heard = vm.hear();
        lap("booted");
        let serial = || fs::read_to_string(dir.join("serial.log")).unwrap_or_default();
        assert!(
            matches!(heard, FromGuest::Booted { .. }),
            "{heard:?} {}",
            serial()
        );
        for _ in 0..2 {
            vm.say(&ToGuest::Rehearse);
            let heard = vm.hear();
            assert_eq!(heard, FromGuest::Rehearsed, "{}", serial());
            lap("rehearsed");
        }
        vm.say(&attach());
        let heard = vm.hear();
        lap("up");
        assert!(matches!(heard, FromGuest::Up(_)), "{heard:?} {}", serial());
        let task = exec(vm.edge_port, "true").await;
        lap("first exec");
        assert_eq!(task["exit_code"], 0, "{task}");
        let script = "hostname; pwd; cat /root/cmd /root/kept; echo kept >/root/kept; id -u; \
                      echo $A; ls /; cat /proc/mounts; ls -la /proc/1/fd; ps ax; cat /etc/machine-id; \
                      date -u; ip a; ip r; unshare -Ur id -u; mount; ls /run /tmp; dmesg | tail -5; df -h";
        let task = exec(vm.edge_port, script).await;
        println!(
            "{}\n{}",
            task["stdout"].as_str().unwrap(),
            task["stderr"].as_str().unwrap()
        );
        let out = task["stdout"].as_str().unwrap();
        assert!(out.starts_with("box\n/root\nran\n"), "{out}");
        assert_eq!(out.contains("ran\nkept\n"), start == "second");
        lap("second exec");
        for _ in 0..5 {
            exec(vm.edge_port, "true").await;
            lap("exec again");
        }
        vm.say(&ToGuest::Shutdown);
        assert_eq!(vm.hear(), FromGuest::Down);
        lap("down");
        vm.child.wait().unwrap();
        lap("off");
        let (disk, check) = (disk.display(), dir.join("check.img"));
        let check = check.display();
        let fsck = format!(
            "dd if={disk} of={check} bs=1M skip=1 status=none conv=sparse &&
             dumpe2fs -h {check} 2>/dev/null | grep 'Filesystem' && e2fsck -fn {check}"
        );
        let fsck = Command::new("sh").args(["-c", &fsck]).output().unwrap();
        let text = String::from_utf8_lossy(&fsck.stdout).into_owned();
        println!("{text}{}", String::from_utf8_lossy(&fsck.stderr));
        assert!(fsck.status.success() && !text.contains("recover"), "{text}");
    }
}
