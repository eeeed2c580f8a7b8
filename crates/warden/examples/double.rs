//! Stands in for the programs that warden starts, in its own tests; which one, its name says.
//!
//! As the VMM it tries what it is told over the agent channel, a line at a time; as vmctl it joins
//! that channel to host's socket and takes the disk's descriptor; as a disk it is a FUSE server of
//! one file that opens once.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

use rustix::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

fn main() {
    let name = std::env::args().next().unwrap();
    match name.as_str() {
        "casemate-vmctl" => vmctl(),
        "casemate-disk" => disk(),
        _ => vmm(),
    }
}

fn inherited<T: From<OwnedFd>>(fd: RawFd) -> T {
    // SAFETY: inherited, and taken once.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}

/// `list DIR`, `read PATH`, `write PATH`, `ids`, `call NR ARG0 ARG1`: answers one line each.
fn vmm() {
    let channel: UnixStream = inherited(4);
    let mut out = channel.try_clone().unwrap();
    for line in BufReader::new(channel).lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let verb = words.next().unwrap();
        let arg = words.next().unwrap_or("");
        let answer = match verb {
            "list" => match std::fs::read_dir(arg) {
                Ok(d) => {
                    let mut names: Vec<_> = d
                        .map(|e| e.unwrap().file_name().into_string().unwrap())
                        .collect();
                    names.sort();
                    names.join(" ")
                }
                Err(e) => format!("error {}", e.raw_os_error().unwrap()),
            },
            "read" => match File::open(arg).and_then(|mut f| f.read(&mut [0u8; 16])) {
                Ok(n) => format!("ok {n}"),
                Err(e) => format!("error {}", e.raw_os_error().unwrap()),
            },
            "write" => match std::fs::OpenOptions::new()
                .write(true)
                .open(arg)
                .and_then(|mut f| f.write(b"x"))
            {
                Ok(n) => format!("ok {n}"),
                Err(e) => format!("error {}", e.raw_os_error().unwrap()),
            },
            "make" => match std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(arg)
            {
                Ok(_) => "ok".into(),
                Err(e) => format!("error {}", e.raw_os_error().unwrap()),
            },
            "ids" => format!(
                "{} {} {}",
                rustix::process::getuid().as_raw(),
                rustix::process::getgid().as_raw(),
                std::process::id()
            ),
            "exit" => std::process::exit(3),
            "save" => {
                let mut state: File = inherited(6);
                state.write_all(b"device state").unwrap();
                let _ = rustix::fd::IntoRawFd::into_raw_fd(state);
                "ok".into()
            }
            "say" => {
                eprintln!("\x1b[31m{arg}");
                "ok".into()
            }
            "call" => {
                let mut n = || words.next().unwrap_or("0").parse::<libc::c_long>().unwrap();
                let (a, b, c) = (n(), n(), n());
                // SAFETY: the arguments are numbers; this process holds nothing that matters.
                let r = unsafe { libc::syscall(arg.parse().unwrap(), a, b, c) };
                format!(
                    "{r} {}",
                    std::io::Error::last_os_error().raw_os_error().unwrap()
                )
            }
            _ => "what?".into(),
        };
        writeln!(out, "{answer}").unwrap();
    }
}

fn vmctl() {
    let agent: UnixStream = inherited(4);
    let host: UnixListener = inherited(5);
    let warden: UnixListener = inherited(6);
    std::thread::spawn(move || {
        for stream in warden.incoming() {
            let stream = stream.unwrap();
            use std::os::fd::AsFd as _;
            let (_, fds) = jail::channel::recv(stream.as_fd(), 4096).unwrap();
            let reply = api::rpc::Reply::new(1, Ok(true));
            api::rpc::blocking::write_frame(&mut &stream, &reply).unwrap();
            // Kept open, as the VMM would.
            for file in fds {
                let _ = rustix::fd::IntoRawFd::into_raw_fd(file);
            }
        }
    });
    for stream in host.incoming() {
        let stream = stream.unwrap();
        let (mut from, mut to) = (stream.try_clone().unwrap(), agent.try_clone().unwrap());
        let (mut back, mut out) = (agent.try_clone().unwrap(), stream);
        std::thread::spawn(move || {
            let mut byte = [0u8; 256];
            while let Ok(n @ 1..) = back.read(&mut byte) {
                if out.write_all(&byte[..n]).is_err() {
                    break;
                }
            }
            let _ = out.shutdown(std::net::Shutdown::Both);
        });
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    }
}

fn disk() {
    // SAFETY: inherited from warden, open for the whole life of the process.
    let control = unsafe { BorrowedFd::borrow_raw(3) };
    let say = |text: String| {
        rustix::net::send(control, text.as_bytes(), rustix::net::SendFlags::empty()).unwrap();
    };
    let hear = || {
        let (bytes, fds) = jail::channel::recv(control, 64 << 10).unwrap();
        (String::from_utf8_lossy(&bytes).into_owned(), fds)
    };
    std::thread::spawn(|| fuse(inherited(4)));
    say(format!(
        r#"{{"type":"hello","hpke_pub":"{}"}}"#,
        "ab".repeat(32)
    ));
    let (open, fds) = hear();
    if !open.contains("open") {
        return;
    }
    let (grant, _) = hear();
    if grant.contains("close") {
        return;
    }
    if grant.contains("refuse") || grant.is_empty() {
        say(r#"{"type":"failed","code":"disk_corrupt","message":"as asked"}"#.into());
        return;
    }
    let mut backing = File::from(fds.into_iter().next().unwrap());
    backing.write_all(b"a volume").unwrap();
    say(format!(
        r#"{{"type":"ready","size_bytes":1048576,"state":{{"run":1,"batch":0,"root":"{}"}}}}"#,
        "5a".repeat(32)
    ));
    // A statement as the real one makes it, but for its MAC; one batch further each time.
    let anchor = |batch: u32| {
        let (root, mac) = ("5a".repeat(32), "6b".repeat(32));
        say(format!(
            r#"{{"type":"anchor","statement":{{"workspace":"ws_00000000000000aa","anchor":{{"run":1,"batch":{batch},"root":"{root}"}},"mac":"{mac}"}},"refused":0}}"#
        ));
    };
    for batch in 1.. {
        let (said, _) = hear();
        if said.contains("anchor") {
            anchor(batch);
        }
        if said.contains("close") {
            anchor(batch);
            std::process::exit(0);
        }
        if said.is_empty() {
            // Warden is gone; the guest is not.
            std::thread::park();
        }
    }
}

/// INIT, GETATTR, OPEN, FLUSH, RELEASE; anything else is ENOSYS.
fn fuse(mut dev: File) {
    let mut request = vec![0u8; 1 << 20];
    let mut opened = false;
    while let Ok(n) = dev.read(&mut request) {
        let u32_at = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (opcode, unique) = (u32_at(4), request[8..16].to_vec());
        assert!(n >= 40);
        let mut error = 0i32;
        let mut body = Vec::new();
        match opcode {
            26 => {
                body.extend(7u32.to_ne_bytes());
                body.extend(31u32.to_ne_bytes());
                body.extend(0u32.to_ne_bytes());
                body.extend(0u32.to_ne_bytes());
                body.extend(12u16.to_ne_bytes());
                body.extend(9u16.to_ne_bytes());
                body.extend(131072u32.to_ne_bytes());
                body.resize(64, 0);
            }
            3 => {
                body.extend([0u8; 16]);
                for v in [1u64, 1 << 20, 2048, 0, 0, 0] {
                    body.extend(v.to_ne_bytes());
                }
                body.extend([0u8; 12]);
                for v in [0o100600u32, 1, 0, 0, 0, 4096, 0] {
                    body.extend(v.to_ne_bytes());
                }
            }
            14 if !opened => {
                opened = true;
                body.resize(16, 0);
            }
            14 => error = -libc::EBUSY,
            25 | 18 => {}
            2 => continue,
            _ => error = -libc::ENOSYS,
        }
        if error != 0 {
            body.clear();
        }
        let mut out = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        out.extend(error.to_ne_bytes());
        out.extend(unique);
        out.extend(body);
        let _ = dev.write_all(&out);
    }
}
