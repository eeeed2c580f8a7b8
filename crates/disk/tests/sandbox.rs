//! The sandbox from inside: each forbidden act kills the process, which a child is there for.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

const ACT: &str = "CASEMATE_DISK_TEST_ACT";

/// Runs one act in a child of its own, behind the sandbox.
#[test]
fn i9_forbidden_acts_kill_and_allowed_ones_do_not() {
    for (act, killed) in [
        ("nothing", false),
        ("allocate", false),
        ("socket", true),
        ("open", true),
        ("thread", true),
        ("exec", true),
        ("duplicate", true),
        ("read-stdin", true),
        ("executable-memory", true),
        ("ptrace", true),
    ] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--test-threads=1"])
            .env(ACT, act)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(
            status.signal() == Some(libc::SIGSYS),
            killed,
            "{act}: {status}"
        );
    }
}

/// A worker that allocates and frees much lives, as the process is prepared; else it is killed.
#[test]
fn i9_a_thread_allocates_as_much_as_it_likes() {
    let beside =
        std::path::Path::new(env!("CARGO_BIN_EXE_casemate-disk")).with_file_name("examples");
    for (argument, signal) in [("prepared", None), ("unprepared", Some(libc::SIGSYS))] {
        let status = Command::new(beside.join("allocate"))
            .arg(argument)
            .status()
            .unwrap();
        assert_eq!(status.signal(), signal, "{argument}: {status}");
        assert_eq!(status.success(), signal.is_none(), "{argument}: {status}");
    }
}

/// Not a test by itself.
#[test]
#[ignore = "run by the test above"]
fn child() {
    let act = std::env::var(ACT).unwrap();
    let exe = std::env::current_exe().unwrap();
    disk::sandbox::enter().unwrap();
    match act.as_str() {
        "nothing" => {}
        "allocate" => assert_eq!(
            vec![1u8; 64 << 20]
                .iter()
                .map(|b| u64::from(*b))
                .sum::<u64>(),
            64 << 20
        ),
        "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "open" => drop(std::fs::File::open("/dev/null")),
        "thread" => drop(std::thread::Builder::new().spawn(|| {})),
        "exec" => drop(Command::new(exe).status()),
        "duplicate" => drop(rustix::io::dup(std::io::stdin())),
        "read-stdin" => drop(rustix::io::read(std::io::stdin(), &mut [0; 1])),
        "executable-memory" => executable_memory(),
        "ptrace" => drop(rustix::process::set_dumpable_behavior(
            rustix::process::DumpableBehavior::Dumpable,
        )),
        other => panic!("{other}"),
    }
    // Not back into the test harness, which does what the sandbox does not know.
    std::process::exit(0);
}

#[allow(unsafe_code)]
fn executable_memory() {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let protection = ProtFlags::READ | ProtFlags::EXEC;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let _mapped =
        unsafe { mmap_anonymous(std::ptr::null_mut(), 4096, protection, MapFlags::PRIVATE) };
}
