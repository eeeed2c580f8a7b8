//! Saved memory as a woken jail has it: behind the file system of casemate-disk, whose code serves it
//! on threads of the test's, over a file of the test's.

use super::LAUNCHER;
use disk::bucket::Limiter;
use disk::fuse::{Serving, Worker};
use disk::limits::{BYTES_PER_S, OPS_PER_S};
use disk::luks2::VolumeKey;
use disk::object::Object;
use disk::volume::Volume;
use jail::ask::OpenFor;
use jail::limits::VMM_UID;
use jail::mount;
use jail::process::Launcher;
use rustix::fd::OwnedFd;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// Note, devices' state and some pages, MiB.
const SIZE_MB: u64 = 20;

/// Whether that is such a file at rest, which must not change.
pub fn is_at_rest(path: &Path) -> bool {
    let name = path.file_name().and_then(|n| n.to_str());
    name.is_some_and(|n| n.starts_with("saved-"))
}

/// Mount and state, as warden has them for a VMM of `slot` that is to be woken.
pub fn served(root: &Path, slot: u16) -> [OwnedFd; 2] {
    let key = VolumeKey::random();
    let path = root.join(format!("saved-{slot}"));
    let _of_the_last_one = std::fs::remove_file(&path);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let size_bytes = SIZE_MB << 20;
    let new = Volume::new(file.unwrap(), &key, size_bytes).unwrap();
    new.write(0, &mut vec![b'v'; 64 << 10]).unwrap();
    new.sync().unwrap();
    // As warden gives it: to be read.
    let volume = Volume::new(File::open(&path).unwrap(), &key, size_bytes).unwrap();

    let uid = VMM_UID + u32::from(slot);
    let mounted = mount::of(uid).unwrap();
    let limiter = Limiter::new(*BYTES_PER_S.end(), *OPS_PER_S.end());
    let serving = Arc::new(Serving::new(Some(uid), limiter));
    let device = Arc::new(File::from(mounted.server));
    let mut worker = Worker::new(device, Object::memory(volume, true), serving);
    std::thread::spawn(move || worker.serve());
    let launcher = Launcher {
        program: LAUNCHER.into(),
        root: root.into(),
    };
    let again = mounted.mount.try_clone().unwrap();
    let state = launcher.open_mount(slot, OpenFor::Wake, again).unwrap();
    [mounted.mount, state]
}
