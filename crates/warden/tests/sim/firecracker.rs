//! A double of Firecracker, for the real jail: a program of its own, which the test compiles as the
//! real one is, static. It listens where it is told, takes the driver's requests, and does to files,
//! sockets and the tap what the real one does, so that what the jail lacks shows. It runs no guest,
//! and it does not judge requests: `crates/vmm/tests/sim` does.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

/// The version that it says it is.
const VERSION: &str = env!("CASEMATE_PIN");
const TUNSETIFF: u64 = 0x4004_54ca;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

/// What it holds, as the real one does until its end.
#[derive(Default)]
struct Vmm {
    state: &'static str,
    memory_mib: u64,
    disk: Option<File>,
    tap: Option<File>,
    vsock: Option<UnixListener>,
    held: Vec<File>,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let at = args.iter().position(|a| a == "--api-sock").unwrap();
    let listener = UnixListener::bind(&args[at + 1]).unwrap();
    let (mut api, _) = listener.accept().unwrap();
    let mut vmm = Vmm {
        state: "Not started",
        ..Vmm::default()
    };
    // It has threads, as the real one.
    std::thread::Builder::new()
        .name("fc_vcpu 0".into())
        .spawn(std::thread::park)
        .unwrap();
    let mut buffer = Vec::new();
    while let Some((method, path, body)) = next(&mut api, &mut buffer) {
        let answer = match vmm.answer(&method, &path, &body) {
            Ok(None) => "HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n".into(),
            Ok(Some(text)) => whole(200, &text),
            Err(e) => whole(400, &format!("{{\"fault_message\":\"{path}: {e}\"}}")),
        };
        api.write_all(answer.as_bytes()).unwrap();
    }
}

fn whole(status: u16, text: &str) -> String {
    let length = text.len();
    format!("HTTP/1.1 {status} \r\nContent-Length: {length}\r\n\r\n{text}")
}

/// The next request; none when the client left.
fn next(api: &mut UnixStream, buffer: &mut Vec<u8>) -> Option<(String, String, String)> {
    loop {
        let text = String::from_utf8_lossy(buffer).into_owned();
        if let Some((head, rest)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|l| l.strip_prefix("Content-Length: ")?.parse().ok())
                .unwrap_or(0);
            if rest.len() >= length {
                let mut words = head.split(' ');
                let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
                let body = rest[..length].to_owned();
                buffer.drain(..head.len() + 4 + length);
                return Some((method, path, body));
            }
        }
        let mut chunk = [0; 4096];
        match api.read(&mut chunk) {
            Ok(0) | Err(_) => return None,
            Ok(n) => buffer.extend_from_slice(&chunk[..n]),
        }
    }
}

/// The value of a field: the bodies are the driver's, whose texts hold no quotes.
fn field<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = body.split_once(&format!("\"{name}\":"))?;
    Some(match rest.strip_prefix('"') {
        Some(text) => text.split('"').next()?,
        None => rest.split([',', '}']).next()?,
    })
}

fn read(path: &str) -> std::io::Result<File> {
    let mut file = File::open(path)?;
    file.read_exact(&mut [0])?;
    Ok(file)
}

impl Vmm {
    fn answer(&mut self, method: &str, path: &str, body: &str) -> std::io::Result<Option<String>> {
        let text = |name| field(body, name).ok_or(std::io::ErrorKind::InvalidInput);
        match (method, path) {
            ("GET", "/") => {
                let state = self.state;
                return Ok(Some(format!(
                    "{{\"id\":\"vm\",\"state\":\"{state}\",\"vmm_version\":\"{VERSION}\",\"app_name\":\"Firecracker\"}}"
                )));
            }
            ("PUT", "/machine-config") => {
                self.memory_mib = text("mem_size_mib")?.parse().map_err(std::io::Error::other)?;
            }
            ("PUT", "/boot-source") => {
                for name in ["kernel_image_path", "initrd_path"] {
                    read(text(name)?)?;
                }
            }
            ("PUT", "/drives/base") => self.held.push(read(text("path_on_host")?)?),
            ("PUT", "/drives/disk") => self.disk(text("path_on_host")?)?,
            ("PATCH", "/drives/disk") if body.contains("path_on_host") => {
                self.disk(text("path_on_host")?)?;
                // A volume is behind it by now.
                let disk = self.disk.as_mut().unwrap();
                disk.seek(SeekFrom::Start(0))?;
                disk.read_exact(&mut [0; 4096])?;
            }
            ("PUT", "/network-interfaces/net") => self.tap(text("host_dev_name")?)?,
            ("PUT", "/vsock") => self.vsock = Some(UnixListener::bind(text("uds_path")?)?),
            ("PUT", "/serial") => self.held.push(
                File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(text("serial_out_path")?)?,
            ),
            ("PUT", "/actions") => {
                let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
                self.held.push(kvm);
                self.state = "Running";
            }
            ("PUT", "/snapshot/create") => {
                let paths = format!("{VERSION}\n{}\n", self.memory_mib);
                let mut state = File::options();
                state.write(true).create(true).truncate(true);
                let state = state.open(text("snapshot_path")?)?;
                (&state).write_all(paths.as_bytes())?;
                state.sync_all()?;
                let mut memory = File::options();
                memory.write(true).create(true).truncate(false);
                let memory = memory.open(text("mem_file_path")?)?;
                memory.set_len(self.memory_mib << 20)?;
                (&memory).write_all(b"a guest's memory")?;
                memory.sync_all()?;
            }
            ("PUT", "/snapshot/load") => {
                read(text("snapshot_path")?)?;
                self.held.push(read(text("backend_path")?)?);
                // What a state remembers, under the jail's names.
                self.held.push(read("/image/base.erofs")?);
                self.disk("/disk/volume")?;
                self.tap("tap0")?;
                self.vsock = Some(UnixListener::bind("/vmm/vsock")?);
            }
            _ => {}
        }
        Ok(None)
    }

    fn disk(&mut self, path: &str) -> std::io::Result<()> {
        let mut disk = File::options().read(true).write(true).open(path)?;
        if disk.seek(SeekFrom::End(0))? == 0 {
            return Err(std::io::Error::other("an empty disk"));
        }
        self.disk = Some(disk);
        Ok(())
    }

    fn tap(&mut self, name: &str) -> std::io::Result<()> {
        let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
        // ifreq: the name, 16 bytes; IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
        let mut request = [0u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
        if unsafe { ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        self.tap = Some(tap);
        Ok(())
    }
}
