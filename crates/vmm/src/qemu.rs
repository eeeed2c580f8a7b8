//! The QEMU driver: `microvm`, with the template recipe.
//!
//! A template is the guest's memory in one file, mapped shared while it is built and private,
//! read-only afterwards, and the device state in another; `x-ignore-shared` keeps memory out of
//! the state on both sides. The workspace's disk is attached late: the guest's second disk is a
//! raw node over nothing, which is reopened over the disk's file while the virtual CPUs stand
//! still (`virtio-mmio` has no hot-plug, and a file node can't change its name).
//!
//! Memory is saved in two parts of one file: the devices' state alone (which is what Xen asks QEMU
//! for), then QEMU's `mapped-ram`, of which only the pages count: each has its own place, pages of
//! zeros are left out, and whoever wakes maps them, privately, where they lie.
//!
//! Must never build a command from a caller's text: [`argv`] takes numbers and closed enums,
//! [`qmp`] knows a dozen commands.

pub mod argv;
pub mod qmp;

pub use argv::{Accel, GUEST_MAC, How, Net, Paths, Spec, argv};

use crate::limits::{MEMORY_SAVE_MAX, MIGRATE_MAX, MIGRATE_POLL, QMP_COMMAND_MAX};
use crate::{DiskFile, Error, Event, Vmm};
use qmp::Qmp;
use serde_json::{Value, json};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// No bound of our own on how fast memory is saved, bytes/s: QEMU's is for networks.
const BANDWIDTH_ANY: u64 = 1 << 40;

/// One QEMU, through its control socket.
pub struct Qemu {
    qmp: Qmp,
}

impl Qemu {
    /// Greets the QEMU at the other end of `control`.
    ///
    /// # Errors
    /// It does not answer as QEMU does, in time.
    pub fn new(control: UnixStream) -> Result<Self, Error> {
        Ok(Self {
            qmp: Qmp::new(control)?,
        })
    }

    fn ignore_shared(&mut self) -> Result<(), Error> {
        self.qmp.command(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "x-ignore-shared", "state": true}]}),
        )?;
        Ok(())
    }

    /// Waits until the migration that `command` started is done.
    fn migrated(&mut self, command: &'static str, after: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + after;
        loop {
            let info = self.qmp.command("query-migrate", Value::Null)?;
            match info.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some(s @ ("failed" | "cancelled")) => {
                    let why = info.get("error-desc").and_then(Value::as_str).unwrap_or(s);
                    return Err(Error::Refused {
                        command,
                        why: crate::log::clean(why),
                    });
                }
                _ if Instant::now() >= deadline => {
                    return Err(Error::Timeout { command, after });
                }
                _ => std::thread::sleep(MIGRATE_POLL),
            }
        }
    }
}

impl Vmm for Qemu {
    fn restore(&mut self) -> Result<(), Error> {
        self.ignore_shared()?;
        self.qmp
            .command("migrate-incoming", json!({"uri": argv::STATE_URI}))?;
        self.migrated("migrate-incoming", MIGRATE_MAX)
    }

    fn save(&mut self) -> Result<(), Error> {
        self.ignore_shared()?;
        self.qmp
            .command("migrate", json!({"uri": argv::STATE_URI}))?;
        self.migrated("migrate", MIGRATE_MAX)
    }

    fn cont(&mut self) -> Result<(), Error> {
        self.qmp.command("cont", Value::Null).map(drop)
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.qmp.command("stop", Value::Null).map(drop)
    }

    fn disk_attach(&mut self, disk: &DiskFile, size_bytes: u64) -> Result<(), Error> {
        let DiskFile::Descriptor(disk) = disk else {
            return Err(Error::Refused {
                command: "add-fd",
                why: "QEMU takes its disk as a descriptor".into(),
            });
        };
        let file = json!({
            "driver": "file",
            "node-name": "disk-file",
            "filename": format!("/dev/fdset/{}", argv::DISK_FDSET),
            "aio": "threads",
            // One descriptor exists, and it is ours.
            "locking": "off",
            "discard": "unmap",
            "cache": {"direct": true},
        });
        let raw = json!({
            "driver": "raw",
            "node-name": argv::DISK_NODE,
            "file": "disk-file",
            "discard": "unmap",
            "cache": {"direct": true},
        });
        let commands = [
            ("add-fd", json!({"fdset-id": argv::DISK_FDSET})),
            ("blockdev-add", file),
            ("blockdev-reopen", json!({"options": [raw]})),
            // Tells the guest; the file has this size already.
            (
                "block_resize",
                json!({"node-name": argv::DISK_NODE, "size": size_bytes}),
            ),
        ];
        self.qmp.commands(&commands, disk.as_fd())
    }

    fn memory_save(&mut self, file: BorrowedFd<'_>) -> Result<(), Error> {
        let on = |name, state| json!({"capability": name, "state": state});
        let capabilities = [
            on("x-ignore-shared", false),
            on("mapped-ram", true),
            // Whole runs of pages in one write.
            on("multifd", true),
        ];
        let (set, file_name) = (argv::SAVED_FDSET, argv::saved_name());
        let commands = [
            ("add-fd", json!({"fdset-id": set})),
            // `live`: it keeps the disks, as the VM may go on.
            (
                "xen-save-devices-state",
                json!({"filename": file_name, "live": true}),
            ),
            (
                "migrate-set-capabilities",
                json!({"capabilities": capabilities}),
            ),
            (
                "migrate-set-parameters",
                json!({"multifd-channels": 1, "max-bandwidth": BANDWIDTH_ANY}),
            ),
        ];
        let saved = self.qmp.commands(&commands, file).and_then(|()| {
            let uri = format!("file:{file_name},offset={}", argv::SAVED_STREAM_BYTES);
            self.qmp.command("migrate", json!({"uri": uri}))?;
            self.migrated("migrate", MEMORY_SAVE_MAX)
        });
        // With it the VMM's last descriptor of the file goes.
        let closed = self.qmp.command("remove-fd", json!({"fdset-id": set}));
        saved.and(closed.map(drop))
    }

    fn wake(&mut self) -> Result<(), Error> {
        self.qmp
            .command("migrate-incoming", json!({"uri": argv::STATE_URI}))?;
        self.migrated("migrate-incoming", MIGRATE_MAX)?;
        // Else only running does it, and the guest must not run without its disk.
        self.qmp
            .command("blockdev-set-active", json!({"active": true}))?;
        Ok(())
    }

    fn quit(&mut self) -> Result<(), Error> {
        self.qmp.quit()
    }

    fn event(&mut self) -> Option<Event> {
        self.qmp.event()
    }

    fn control_fd(&self) -> BorrowedFd<'_> {
        self.qmp.fd()
    }
}

const _: () = assert!(QMP_COMMAND_MAX.as_millis() < MIGRATE_MAX.as_millis());
