//! `/init` of the disk baseline of `cargo xtask bench disk`: a VM without Casemate around it that
//! does the same as this program does in a workspace, on ext4 on `/dev/vdb`, and says its figures on
//! the agent's port; last, `end`.
//!
//! `baseline FILE`, in a workspace: the same on FILE, said on the standard output. Lines are
//! `METRIC VALUE`: MB/s of direct I/O of 1 MiB in sequence, 4 KiB reads per second at random places.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const RUNS: usize = 3;
const FILE_BYTES: u64 = 256 << 20;
const PIECE_BYTES: usize = 1 << 20;
/// How long random reads go on.
const READING: Duration = Duration::from_secs(1);
/// Threads that read, each one at a time.
const DEPTHS: [(&str, usize); 2] = [("iops_depth_1", 1), ("iops", 8)];
const BLOCK_BYTES: usize = 4096;

fn main() {
    if let Some(file) = std::env::args().nth(1) {
        let figures = figures(Path::new(&file));
        print!("{}", figures.expect("the file can be written and read"));
        return;
    }
    guest::init::stdio_open();
    let said = run();
    let name = std::fs::read_dir("/sys/class/virtio-ports")
        .and_then(|mut ports| ports.next().expect("the machine has one port"))
        .expect("it has a name")
        .file_name();
    let mut port = File::options()
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
    std::fs::create_dir_all("/mnt")?;
    let flags = rustix::mount::MountFlags::NOATIME;
    rustix::mount::mount("/dev/vdb", "/mnt", "ext4", flags, Some(c"discard"))?;
    Ok(figures(Path::new("/mnt/file"))?)
}

fn figures(path: &Path) -> io::Result<String> {
    let mut said = String::new();
    for _ in 0..RUNS {
        for (metric, flush) in [("write", false), ("durable_write", true)] {
            said += &format!("{metric} {:.1}\n", write(path, flush)?);
            // What was written is on the medium before the next begins.
            rustix::fs::sync();
        }
        // The second time, a host that keeps what was read has it.
        for metric in ["read", "reread"] {
            said += &format!("{metric} {:.1}\n", read(path)?);
        }
        for (metric, threads) in DEPTHS {
            said += &format!("{metric} {:.0}\n", random(path, threads)?);
        }
    }
    std::fs::remove_file(path)?;
    Ok(said)
}

/// MB/s of writing the file anew.
fn write(path: &Path, flush: bool) -> io::Result<f64> {
    let mut piece = Piece::new(PIECE_BYTES);
    // Neither zeros, which may become holes, nor anything to compute on the way.
    for (byte, n) in piece.bytes().iter_mut().zip(0u32..) {
        *byte = (n.wrapping_mul(0x9e37_79b1) >> 24) as u8;
    }
    let file = direct()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    let began = Instant::now();
    for at in (0..FILE_BYTES).step_by(PIECE_BYTES) {
        file.write_all_at(piece.bytes(), at)?;
    }
    if flush {
        file.sync_all()?;
    }
    Ok(mb_per_s(began))
}

/// MB/s of reading it.
fn read(path: &Path) -> io::Result<f64> {
    let mut piece = Piece::new(PIECE_BYTES);
    let file = direct().read(true).open(path)?;
    let began = Instant::now();
    for at in (0..FILE_BYTES).step_by(PIECE_BYTES) {
        file.read_exact_at(piece.bytes(), at)?;
    }
    Ok(mb_per_s(began))
}

/// Reads of 4 KiB per second at random places, past the page cache.
fn random(path: &Path, threads: usize) -> io::Result<f64> {
    let file = direct().read(true).open(path)?;
    let (end, began) = (AtomicBool::new(false), Instant::now());
    let read = |seed: usize| -> io::Result<u64> {
        let mut block = Piece::new(BLOCK_BYTES);
        let (mut place, mut count) = (seed as u64, 0);
        while !end.load(Ordering::Relaxed) {
            // Knuth's MMIX generator; its high bits are good enough.
            place = place
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = (place >> 20) % (FILE_BYTES / BLOCK_BYTES as u64) * BLOCK_BYTES as u64;
            file.read_exact_at(block.bytes(), at)?;
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
    Ok(counts?.iter().sum::<u64>() as f64 / began.elapsed().as_secs_f64())
}

fn mb_per_s(began: Instant) -> f64 {
    FILE_BYTES as f64 / 1e6 / began.elapsed().as_secs_f64()
}

fn direct() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.custom_flags(libc::O_DIRECT);
    options
}

/// Bytes at a page boundary, as direct I/O takes them.
struct Piece {
    bytes: Vec<u8>,
    from: usize,
    len: usize,
}

impl Piece {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK_BYTES];
        let from = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Self { bytes, from, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + self.len]
    }
}
