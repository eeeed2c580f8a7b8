//! `/init` of the disk baseline of `cargo xtask bench disk`: a VM without Casemate around it that
//! runs the same `dd` as a workspace, on ext4 on `/dev/vdb`, and says on the agent's port what it
//! printed. Lines are `w …`, `f …` (flushed), `r …` and, last, `end`.

use std::io::Write as _;
use std::os::unix::fs::chroot;
use std::path::Path;
use std::process::Command;

const RUNS: usize = 3;

fn main() {
    guest::init::stdio_open();
    let said = run();
    let name = std::fs::read_dir("/sys/class/virtio-ports")
        .and_then(|mut ports| ports.next().expect("the machine has one port"))
        .expect("it has a name")
        .file_name();
    let mut port = std::fs::OpenOptions::new()
        .write(true)
        .open(Path::new("/dev").join(name))
        .expect("it can be opened");
    let text = said.unwrap_or_else(|e| format!("failed: {e}\n"));
    port.write_all(format!("{text}end\n").as_bytes())
        .expect("the port takes it");
    loop {
        std::thread::park();
    }
}

fn run() -> Result<String, Box<dyn std::error::Error>> {
    guest::boot::prepare()?;
    guest::boot::base_mount()?;
    let base = Path::new(guest::boot::BASE);
    let flags = rustix::mount::MountFlags::NOATIME;
    let to = base.join("mnt");
    rustix::mount::mount("/dev/vdb", &to, "ext4", flags, Some(c"discard"))?;
    for dir in ["dev", "sys"] {
        rustix::mount::mount_bind(Path::new("/").join(dir), base.join(dir))?;
    }
    chroot(base)?;
    std::env::set_current_dir("/")?;
    let mut said = String::new();
    for _ in 0..RUNS {
        for (mark, words) in [
            (
                "w",
                "if=/dev/zero of=/mnt/file bs=1M count=256 oflag=direct",
            ),
            (
                "f",
                "if=/dev/zero of=/mnt/file bs=1M count=256 oflag=direct conv=fsync",
            ),
            ("r", "if=/mnt/file of=/dev/null bs=1M iflag=direct"),
        ] {
            let out = Command::new("/usr/bin/dd")
                .args(words.split(' '))
                .output()?;
            let text = String::from_utf8_lossy(&out.stderr).into_owned();
            let last = text.lines().last().unwrap_or("nothing");
            said += &format!("{mark} {last}\n");
            // What was written is on the medium before the next begins.
            rustix::fs::sync();
        }
        std::fs::remove_file("/mnt/file")?;
    }
    Ok(said)
}
