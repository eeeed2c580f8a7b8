//! `/init` of the disk baseline of `cargo xtask bench disk`: a VM without Casemate around it that
//! runs the same `dd` as a workspace, on ext4 on `/dev/vdb`, and says on the agent's port what it
//! printed. Lines are `w …`, `f …` (flushed), `r …`, those of [`reads`], and, last, `end`.
//!
//! `baseline reads FILE`, in a workspace: those lines alone, on the standard output.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, chroot};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const RUNS: usize = 3;
/// How long random reads go on.
const READING: Duration = Duration::from_secs(2);
/// Threads that read, by the mark of their line.
const DEPTHS: [(&str, usize); 2] = [("1", 1), ("8", 8)];
const BLOCK_BYTES: usize = 4096;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let ["reads", file] = args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        print!("{}", reads(Path::new(file)).expect("the file can be read"));
        return;
    }
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
        said += &reads(Path::new("/mnt/file"))?;
        std::fs::remove_file("/mnt/file")?;
    }
    Ok(said)
}

/// Reads 4 KiB at random places past the page cache, each thread one at a time: lines
/// `DEPTH READS_PER_S`.
fn reads(path: &Path) -> io::Result<String> {
    let mut said = String::new();
    for (mark, threads) in DEPTHS {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        let blocks = file.metadata()?.len() / BLOCK_BYTES as u64;
        let (end, began) = (AtomicBool::new(false), Instant::now());
        let read = |seed: usize| -> io::Result<u64> {
            let mut block = Box::new(Block([0; BLOCK_BYTES]));
            let (mut place, mut count) = (seed as u64, 0);
            while !end.load(Ordering::Relaxed) {
                // Knuth's MMIX generator; its high bits are good enough.
                place = place
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let at = (place >> 20) % blocks * BLOCK_BYTES as u64;
                file.read_exact_at(&mut block.0, at)?;
                count += 1;
            }
            Ok(count)
        };
        let counts: io::Result<Vec<u64>> = std::thread::scope(|scope| {
            let read = &read;
            let threads: Vec<_> = (0..threads)
                .map(|seed| scope.spawn(move || read(seed)))
                .collect();
            std::thread::sleep(READING);
            end.store(true, Ordering::Relaxed);
            let joined = threads.into_iter().map(|t| t.join().expect("it reads"));
            joined.collect()
        });
        let per_s = counts?.iter().sum::<u64>() as f64 / began.elapsed().as_secs_f64();
        said += &format!("{mark} {per_s:.0}\n");
    }
    Ok(said)
}

/// What direct I/O takes.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);
