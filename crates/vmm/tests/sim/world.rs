//! A Firecracker to drive: the double, or a real one that `CASEMATE_FIRECRACKER` names.

use super::firecracker::{Fault, Server};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmm::Error;
use vmm::firecracker::{Firecracker, Limits, Paths, Spec, argv};
use vmm::qemu::How;

pub const WAIT: Duration = Duration::from_secs(60);

/// The real one, or why there is none.
pub fn real() -> Result<PathBuf, String> {
    let path = std::env::var_os("CASEMATE_FIRECRACKER").ok_or("CASEMATE_FIRECRACKER is not set")?;
    if !rustix::process::geteuid().is_root() {
        return Err("a tap needs root".into());
    }
    if std::fs::File::open("/dev/kvm").is_err() {
        return Err("/dev/kvm does not open".into());
    }
    if !artifacts().join("kernel/vmlinux").exists() {
        return Err("there is no kernel among the artifacts".into());
    }
    Ok(path.into())
}

pub fn artifacts() -> PathBuf {
    std::env::var_os("CASEMATE_ARTIFACTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/artifacts"),
        PathBuf::from,
    )
}

/// What is at the other end of the API's socket.
pub enum Peer {
    Double(Server),
    Real(Child),
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Self::Real(child) = self {
            // Ended by itself is good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A directory as a jail has it, and the API in it.
pub struct World {
    // Dropped in this order: the double's thread ends with its connection.
    pub control: Option<UnixStream>,
    pub peer: Peer,
    pub spec: Spec,
    pub dir: tempfile::TempDir,
}

/// A double, and a real one if there is one.
pub fn worlds(how: How, template: &Path) -> Vec<World> {
    let mut worlds = vec![double(how, template, None)];
    match real() {
        Ok(program) => worlds.push(World::real(&program, how, template)),
        Err(why) => eprintln!("skipped the real Firecracker: {why}"),
    }
    worlds
}

pub fn double(how: How, template: &Path, fault: Option<(usize, Fault)>) -> World {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), how, template, false);
    let (server, control) = Server::start(fault);
    World {
        control: Some(control),
        peer: Peer::Double(server),
        spec,
        dir,
    }
}

pub fn spec(dir: &Path, how: How, template: &Path, real: bool) -> Spec {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let kernel = |name: &str| {
        let path = artifacts().join("kernel").join(name);
        path.to_str().unwrap().to_owned()
    };
    for name in ["image", "kernel", "initramfs"] {
        std::fs::write(at(name), vec![0; 4096]).unwrap();
    }
    let placeholder = std::fs::File::create(at("disk")).unwrap();
    placeholder.set_len(vmm::limits::DISK_MAX_BYTES).unwrap();
    let pick = |name: &str, file: &str| if real { kernel(file) } else { at(name) };
    Spec {
        how,
        memory_mib: 128,
        cpus: 1,
        tap: true,
        limits: Limits::default(),
        paths: Paths {
            control: at("api.sock"),
            image: at("image"),
            disk: at("disk"),
            kernel: pick("kernel", "vmlinux"),
            initramfs: pick("initramfs", "initramfs.cpio"),
            memory: template.join("memory").to_str().unwrap().into(),
            state: template.join("state").to_str().unwrap().into(),
            vsock: at("vsock"),
        },
    }
}

impl World {
    pub fn real(program: &Path, how: How, template: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), how, template, true);
        // A network of its own, since it makes its tap.
        let mut child = Command::new("unshare")
            .arg("--net")
            .arg(program)
            .args(argv(&spec.paths))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + WAIT;
        let control = loop {
            match UnixStream::connect(&spec.paths.control) {
                Ok(s) => break s,
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
            assert_eq!(child.try_wait().unwrap(), None, "it ended");
            std::thread::yield_now();
        };
        Self {
            control: Some(control),
            peer: Peer::Real(child),
            spec,
            dir,
        }
    }

    pub fn greet(&mut self) -> Result<Firecracker, Error> {
        Firecracker::new(self.control.take().unwrap(), self.spec.clone())
    }

    /// As warden does by moving a mount: the path is another file from now on.
    pub fn disk_comes(&self) {
        let new = self.dir.path().join("new");
        let file = std::fs::File::create(&new).unwrap();
        file.set_len(64 << 20).unwrap();
        std::fs::rename(&new, &self.spec.paths.disk).unwrap();
    }

    pub fn server(&self) -> &Server {
        match &self.peer {
            Peer::Double(s) => s,
            Peer::Real(_) => panic!("the real one can't be looked into"),
        }
    }

    /// The files that the process has open, where there is a process.
    pub fn open_files(&self) -> Vec<PathBuf> {
        let Peer::Real(child) = &self.peer else {
            return Vec::new();
        };
        let fds = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
        fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .collect()
    }
}
