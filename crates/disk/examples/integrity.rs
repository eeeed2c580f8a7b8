//! What integrity costs, without a VMM: `cargo run --release -p casemate-disk --example integrity DIR`.
//!
//! Each line is measured with and without a sidecar on files in DIR: MB/s of requests of 1 MiB
//! (written, then synced; read from the page cache), reads of 4 KiB at random places per second on
//! one thread, and the time to open.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Instant;

use disk::backing::Backing;
use disk::limits::DATA_OFFSET_BYTES;
use disk::luks2::VolumeKey;
use disk::sidecar::{Keys, Sidecar};
use disk::volume::Volume;

const SIZE_BYTES: u64 = 8 << 30;
const WRITTEN_BYTES: u64 = 512 << 20;
const REQUEST_BYTES: usize = 1 << 20;
const READS: u64 = 100_000;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args_os().nth(1).ok_or("which directory?")?;
    let dir = Path::new(&dir);
    let key = VolumeKey::random();
    let open = |name: &str| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(dir.join(name))
    };
    for round in 0..3 {
        for tags in [false, true] {
            let data = open("integrity.data")?;
            data.set_len(0)?;
            data.set_len(DATA_OFFSET_BYTES + SIZE_BYTES)?;
            let mut run = 1;
            let volume = if tags {
                let keys = Keys::derive(&[7; 32])?;
                let sidecar =
                    Sidecar::create(open("integrity.tags")?, keys, SIZE_BYTES / 4096, run)?;
                sidecar.finish(&data)?;
                reopened(open, &key, &mut run)?
            } else {
                Volume::new(data, &key, SIZE_BYTES)?
            };
            let name = if tags { "tags" } else { "none" };
            println!("{round} {name} write_mb_per_s {:.0}", write(&volume)?);
            println!("{round} {name} read_mb_per_s {:.0}", read(&volume)?);
            println!("{round} {name} random_4k_per_s {:.0}", random(&volume)?);
            println!("{round} {name} flushed_4k_per_s {:.0}", flushed(&volume)?);
            volume.close()?;
            if tags {
                let start = Instant::now();
                let volume = reopened(open, &key, &mut run)?;
                println!("{round} {name} open_us {}", start.elapsed().as_micros());
                println!(
                    "{round} {name} random_4k_per_s_cold_tags {:.0}",
                    random(&volume)?
                );
            }
        }
    }
    std::fs::remove_file(dir.join("integrity.data"))?;
    std::fs::remove_file(dir.join("integrity.tags"))?;
    Ok(())
}

fn reopened(
    open: impl Fn(&str) -> std::io::Result<File>,
    key: &VolumeKey,
    run: &mut u64,
) -> Result<Volume<File>, Box<dyn Error>> {
    *run += 1;
    let (data, keys) = (open("integrity.data")?, Keys::derive(&[7; 32])?);
    let sidecar = Sidecar::open(
        open("integrity.tags")?,
        &data,
        keys,
        SIZE_BYTES / 4096,
        *run,
        None,
    )?;
    Ok(Volume::with_sidecar(data, sidecar, key, SIZE_BYTES)?)
}

fn write<B: Backing>(volume: &Volume<B>) -> std::io::Result<f64> {
    let mut data = vec![0x5a; REQUEST_BYTES];
    let start = Instant::now();
    for at in (0..WRITTEN_BYTES).step_by(REQUEST_BYTES) {
        volume.write(at, &mut data)?;
    }
    volume.sync()?;
    Ok(WRITTEN_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64())
}

fn read<B: Backing>(volume: &Volume<B>) -> std::io::Result<f64> {
    let mut data = vec![0; REQUEST_BYTES];
    let start = Instant::now();
    for at in (0..WRITTEN_BYTES).step_by(REQUEST_BYTES) {
        volume.read(at, &mut data)?;
    }
    Ok(WRITTEN_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64())
}

fn random<B: Backing>(volume: &Volume<B>) -> std::io::Result<f64> {
    let mut data = [0; 4096];
    let mut place = 1u64;
    let start = Instant::now();
    for _ in 0..READS {
        place = place
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        volume.read((place >> 20) % (WRITTEN_BYTES / 4096) * 4096, &mut data)?;
    }
    Ok(READS as f64 / start.elapsed().as_secs_f64())
}

fn flushed<B: Backing>(volume: &Volume<B>) -> std::io::Result<f64> {
    const FLUSHES: u64 = 100;
    let start = Instant::now();
    for n in 0..FLUSHES {
        volume.write(n * 4096 * 37, &mut [n as u8; 4096])?;
        volume.sync()?;
    }
    Ok(FLUSHES as f64 / start.elapsed().as_secs_f64())
}
