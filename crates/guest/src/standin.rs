//! A stand-in for the workspace's disk at a rehearsal: identity area and an empty ext4 in memory,
//! behind a loop device that clears itself when it is unmounted.
//!
//! `standin.bin` holds the bytes of that file system that are not zero, as
//! `u32 LE offset | u32 LE length | bytes` again and again. It was made by
//! `truncate -s 12M f; mke2fs -q -F -t ext4 -b 4096 -m 0 -I 256 -J size=4 -N 64
//! -E lazy_itable_init=1,lazy_journal_init=1,nodiscard f`, the options of a workspace's disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use api::agent::VOLUME_OFFSET_BYTES;
use rustix::fs::MemfdFlags;

use crate::attach::Device;
use crate::limits::UNMOUNT_WAIT;
use crate::sys;

const PACKED: &[u8] = include_bytes!("standin.bin");
const SIZE_BYTES: u64 = 12 << 20;

/// Makes the stand-in with `identity` as its identity area. The device lasts as long as the file
/// that comes with it, or a mount of it.
///
/// # Errors
/// The kernel's answer.
pub fn standin(identity: &[u8]) -> io::Result<(Device, File)> {
    let memory = File::from(rustix::fs::memfd_create("standin", MemfdFlags::CLOEXEC)?);
    memory.set_len(VOLUME_OFFSET_BYTES + SIZE_BYTES)?;
    memory.write_all_at(identity, 0)?;
    unpack(&memory, VOLUME_OFFSET_BYTES)?;
    let control = File::open("/dev/loop-control")?;
    let disk = format!("/dev/loop{}", sys::loop_free(&control)?);
    let opened = File::options().read(true).write(true).open(&disk)?;
    sys::loop_configure(&opened, &memory)?;
    let partition = format!("{disk}p1");
    Ok((Device { disk, partition }, opened))
}

/// Waits until no loop device is in use: the kernel lets go of a mount namespace in its own time.
pub fn standin_gone_wait() {
    let used = || {
        let devices = std::fs::read_dir("/sys/block")
            .into_iter()
            .flatten()
            .flatten();
        // The directory is there only while a file is behind the device.
        devices
            .into_iter()
            .any(|device| device.path().join("loop").exists())
    };
    let deadline = Instant::now() + UNMOUNT_WAIT;
    while used() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn unpack(file: &File, offset: u64) -> io::Result<()> {
    let mut rest = PACKED;
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        let [a, b, c, d, e, f, g, h] = *head;
        let (at, len) = (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        );
        let bytes = tail
            .get(..len as usize)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        file.write_all_at(bytes, offset + u64::from(at))?;
        rest = &tail[len as usize..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_a_sound_file_system() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE_BYTES).unwrap();
        unpack(file.as_file(), 0).unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), SIZE_BYTES);
        let check = std::process::Command::new("e2fsck")
            .arg("-fn")
            .arg(file.path())
            .output();
        let Ok(check) = check else { return }; // No e2fsprogs here.
        assert!(check.status.success(), "{check:?}");
    }
}
