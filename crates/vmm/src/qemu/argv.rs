//! QEMU's command line, one reason per word.
//!
//! The same machine must come out at build, restore and cold boot, or the template's state does
//! not fit: what differs is only where the memory lives, and that a restored VM gets no kernel.

use crate::limits::{CPUS_MAX, DISK_MAX_BYTES, MEMORY_MAX_MIB, MEMORY_MIN_MIB};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The MAC address that every guest comes up with: it is part of the template's state. The agent
/// sets the one that goes with its IP address before it opens the network; warden pins that.
pub const GUEST_MAC: &str = "02:00:0a:75:00:02";
/// The control socket, connected.
pub const QMP_FD: i32 = 3;
/// The agent channel's socket, connected.
pub const AGENT_FD: i32 = 4;
/// The tap.
pub const TAP_FD: i32 = 5;
/// The devices' state: read-only to restore and to wake, write-only (not read-write) to build.
pub const STATE_FD: i32 = 6;

/// Where the state's descriptor is found: the file protocol takes an fdset.
pub(crate) const STATE_URI: &str = "file:/dev/fdset/6";
const STATE_FDSET: i32 = 6;
/// The fdset that the workspace's disk comes in by.
pub(crate) const DISK_FDSET: i32 = 7;
/// Where saved memory has its pages, bytes from the file's start. Before them lie the devices'
/// state and, a MiB ahead, the head of QEMU's own format (mapped-ram), which nothing reads back.
pub(crate) const SAVED_PAGES_BYTES: u64 = SAVED_STREAM_BYTES + (1 << 20);
/// Where that format's stream begins, bytes.
pub(crate) const SAVED_STREAM_BYTES: u64 = 16 << 20;
/// The fdset that the file for memory comes in by.
pub(crate) const SAVED_FDSET: i32 = 8;
/// Most memory that can be saved, MiB: above it the head of QEMU's format, a bit a page, is longer
/// than a MiB.
pub const SAVED_MAX_MIB: u32 = 32_000;

/// Where QEMU finds that file.
pub(crate) fn saved_name() -> String {
    format!("/dev/fdset/{SAVED_FDSET}")
}

/// Size of the file for a VM of so much memory, MiB: the pages, and room for the states around.
#[must_use]
pub fn saved_mib(memory_mib: u32) -> u32 {
    memory_mib.saturating_add(48)
}

/// The raw node under the guest's second disk.
pub(crate) const DISK_NODE: &str = "disk";

/// The translator's memory, MiB; when it is full QEMU throws all of it away and begins anew. A
/// pooled VM fills 46, one that ran Python 72.
pub const TRANSLATOR_MIB: u64 = 256;

/// How the VM comes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// From a template.
    Template,
    /// Cold, with memory of its own.
    Cold,
    /// Cold, with memory in the file that becomes the template's.
    Build,
    /// On memory that a VM was saved with.
    Wake,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// QEMU's translator.
    Tcg,
    /// The kernel; only where [`crate::kvm::probe`] said yes.
    Kvm,
}

/// The guest's one network link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Net {
    /// [`TAP_FD`].
    Tap,
    /// To nowhere: the same device, for tests and measurements.
    Nowhere,
}

/// Where QEMU finds its files. It opens nothing else by name.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The base image.
    pub image: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its first file system, with the agent.
    pub initramfs: PathBuf,
    /// The template's memory: 0444 to restore; writable to build.
    pub memory: PathBuf,
    /// Saved memory to wake from.
    pub saved: PathBuf,
    /// Directory with `qboot.rom`.
    pub firmware: PathBuf,
}

impl Paths {
    /// As warden lays the jail out.
    #[must_use]
    pub fn jail() -> Self {
        Self {
            image: "/image/base.erofs".into(),
            kernel: "/kernel/vmlinux".into(),
            initramfs: "/kernel/initramfs.cpio".into(),
            memory: "/template/memory".into(),
            saved: "/saved/memory".into(),
            firmware: "/usr/share/qemu".into(),
        }
    }
}

/// One VM.
#[derive(Debug, Clone)]
pub struct Spec {
    /// How it comes up.
    pub how: How,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// What runs it.
    pub accel: Accel,
    /// Its link.
    pub net: Net,
    /// Its files.
    pub paths: Paths,
}

/// QEMU's arguments for `spec`, without the program's name. Memory and CPUs are clamped to the
/// crate's limits.
#[must_use]
pub fn argv(spec: &Spec) -> Vec<OsString> {
    let memory_mib = spec.memory_mib.clamp(MEMORY_MIN_MIB, MEMORY_MAX_MIB);
    let cpus = spec.cpus.clamp(1, CPUS_MAX);
    let mut a = Args::default();

    // Only what is named here.
    a.flag("-nodefaults").flag("-no-user-config");
    a.opt("-display", "none");
    // A reset ends the VMM: the guest reboots after a panic only.
    a.flag("-no-reboot");
    // Wait for vmctl.
    a.flag("-S");

    match spec.accel {
        Accel::Tcg => a
            .opt(
                "-accel",
                format!("tcg,thread=multi,tb-size={TRANSLATOR_MIB}"),
            )
            // Without the flags that make guests copy and clear memory by single string
            // instructions: the translator does those byte by byte.
            .opt("-cpu", "max,-erms,-fsrm"),
        // Nested hosts refuse MSR 0x10a.
        Accel::Kvm => a
            .opt("-accel", "kvm")
            .opt("-cpu", "host,-arch-capabilities"),
    };
    // A state that describes itself in JSON is of no use here, and a VM that was woken dies of an
    // assertion when it saves one.
    // ACPI: Debian's kernel finds virtio-mmio by it only. The PIT stays on: clocks calibrate
    // against it.
    a.opt(
        "-machine",
        "microvm,x-option-roms=off,acpi=on,isa-serial=off,auto-kernel-cmdline=off,\
         memory-backend=ram,suppress-vmdesc=on",
    );
    a.opt("-L", &spec.paths.firmware);
    // With ACPI the default firmware is SeaBIOS, which can't boot a kernel without option ROMs.
    a.opt("-bios", "qboot.rom");
    a.opt("-smp", smp(spec.accel, cpus));
    a.opt("-m", format!("{memory_mib}M"));
    match spec.how {
        How::Cold => a.opt(
            "-object",
            format!("memory-backend-ram,id=ram,size={memory_mib}M"),
        ),
        How::Build => a.opt_path(
            "-object",
            format!("memory-backend-file,id=ram,size={memory_mib}M,share=on,mem-path="),
            &spec.paths.memory,
        ),
        // `readonly` without `rom=off` would turn the guest's RAM into ROM.
        How::Template => a.opt_path(
            "-object",
            format!(
                "memory-backend-file,id=ram,size={memory_mib}M,share=off,readonly=on,rom=off,\
                 mem-path="
            ),
            &spec.paths.memory,
        ),
        // As the template's: its pages are read, and decrypted, when they are touched.
        How::Wake => a.opt_path(
            "-object",
            format!(
                "memory-backend-file,id=ram,size={memory_mib}M,share=off,readonly=on,rom=off,\
                 offset={SAVED_PAGES_BYTES},mem-path="
            ),
            &spec.paths.saved,
        ),
    };
    if spec.how == How::Wake {
        // What saved the state says nothing of its configuration, so nothing is expected.
        a.opt("-global", "migration.send-configuration=off");
    }
    match spec.how {
        How::Template | How::Wake => a.opt("-incoming", "defer"),
        How::Cold | How::Build => a
            .opt("-kernel", &spec.paths.kernel)
            .opt("-initrd", &spec.paths.initramfs)
            .opt("-append", append(spec.accel, cpus)),
    };
    if spec.how != How::Cold {
        a.opt("-add-fd", format!("fd={STATE_FD},set={STATE_FDSET}"));
    }

    a.opt("-chardev", format!("socket,id=qmp,fd={QMP_FD}"));
    a.opt("-mon", "chardev=qmp,mode=control");

    // Devices in this order: /dev/vda, /dev/vdb, the agent's port, eth0.
    a.opt_path(
        "-blockdev",
        "driver=file,node-name=base-file,read-only=on,locking=off,filename=".into(),
        &spec.paths.image,
    );
    a.opt(
        "-blockdev",
        "driver=raw,node-name=base,file=base-file,read-only=on",
    );
    a.opt("-device", "virtio-blk-device,drive=base");
    // A disk of zeroes until the workspace's comes.
    a.opt(
        "-blockdev",
        format!("driver=null-co,node-name=disk-none,read-zeroes=on,size={DISK_MAX_BYTES}"),
    );
    a.opt(
        "-blockdev",
        format!("driver=raw,node-name={DISK_NODE},file=disk-none"),
    );
    // Errors go to the guest: nobody is there to continue a stopped VM.
    a.opt(
        "-device",
        format!("virtio-blk-device,drive={DISK_NODE},rerror=report,werror=report"),
    );
    a.opt("-chardev", format!("socket,id=agent,fd={AGENT_FD}"));
    a.opt("-device", "virtio-serial-device,max_ports=2");
    a.opt(
        "-device",
        format!(
            "virtserialport,chardev=agent,nr=1,name={}",
            api::agent::PORT_NAME
        ),
    );
    match spec.net {
        Net::Tap => a.opt("-netdev", format!("tap,id=net,fd={TAP_FD},vhost=off")),
        Net::Nowhere => a.opt("-netdev", "hubport,id=net,hubid=0"),
    };
    a.opt(
        "-device",
        format!("virtio-net-device,netdev=net,mac={GUEST_MAC}"),
    );
    a.0
}

/// One virtual CPU has room for another beside it. Without, the translator takes the guest's `lock`
/// instructions for plain ones, and with them the barrier before Linux' virtio drivers look whether
/// a device, which is another thread of the host, wants to be told: a disk may wait for ever for a
/// word that neither sends. KVM's guests have the CPU's own.
fn smp(accel: Accel, cpus: u32) -> String {
    match (accel, cpus) {
        (Accel::Tcg, 1) => "1,maxcpus=2,sockets=2,cores=1,threads=1".into(),
        _ => cpus.to_string(),
    }
}

/// The kernel's command line.
fn append(accel: Accel, cpus: u32) -> String {
    let mut text = "console=null quiet panic=-1 rdinit=/init".to_owned();
    // Else a mount or an address waits for timer ticks until every CPU was seen idle.
    text.push_str(" rcupdate.rcu_expedited=1");
    // Under the translator the guest's time-stamp counter is the host's. A guest that measures
    // it against the PIT on a busy host may fail, and then waits for ever; one that watches it by
    // timer ticks, which come late there, gives it up for a clock of 4 ms.
    if let (Accel::Tcg, Some(khz)) = (accel, crate::tsc::khz()) {
        text.push_str(&format!(" tsc_early_khz={khz} tsc=reliable"));
    }
    // The other one of `smp` never comes: locks against it are not needed.
    text.push_str(&format!(" nr_cpus={cpus}"));
    text
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.into());
        self
    }

    fn opt(&mut self, name: &str, value: impl Into<OsString>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.into());
        self
    }

    /// QEMU ends a value at a comma and takes two for one.
    fn opt_path(&mut self, name: &str, head: String, path: &Path) -> &mut Self {
        let mut value = OsString::from(head);
        let mut first = true;
        for part in std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).split(|b| *b == b',') {
            if !first {
                value.push(",,");
            }
            first = false;
            value.push::<&std::ffi::OsStr>(std::os::unix::ffi::OsStrExt::from_bytes(part));
        }
        self.opt(name, value)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn text(how: How) -> Vec<String> {
        argv(&Spec {
            how,
            memory_mib: 256,
            cpus: 1,
            accel: Accel::Tcg,
            net: Net::Tap,
            paths: Paths::jail(),
        })
        .into_iter()
        .map(|a| a.into_string().unwrap())
        .collect()
    }

    /// The devices must be the same, or a template's state does not fit.
    #[test]
    fn all_ways_up_build_one_machine() {
        let machine = |how| -> Vec<String> {
            text(how)
                .windows(2)
                .filter(|w| {
                    [
                        "-machine",
                        "-device",
                        "-cpu",
                        "-smp",
                        "-m",
                        "-bios",
                        "-blockdev",
                        "-chardev",
                        "-netdev",
                    ]
                    .contains(&w[0].as_str())
                })
                .map(|w| w.join(" "))
                .collect()
        };
        assert_eq!(machine(How::Cold), machine(How::Build));
        assert_eq!(machine(How::Cold), machine(How::Template));
        assert_eq!(machine(How::Cold), machine(How::Wake));
    }

    #[test]
    fn a_template_is_mapped_private_and_read_only() {
        let a = text(How::Template).join(" ");
        assert!(a.contains("share=off,readonly=on,rom=off,mem-path=/template/memory"));
        assert!(!a.contains("-kernel /"));
        let b = text(How::Build).join(" ");
        assert!(b.contains("share=on,mem-path=/template/memory"));
    }

    #[test]
    fn commas_in_paths_are_doubled() {
        let mut a = Args::default();
        a.opt_path("-object", "x=".into(), Path::new("/a,b,,c"));
        assert_eq!(a.0[1], "x=/a,,b,,,,c");
    }

    #[test]
    fn one_cpu_of_the_translator_has_room_for_another() {
        for (accel, cpus, wanted) in [
            (Accel::Tcg, 1, "1,maxcpus=2,sockets=2,cores=1,threads=1"),
            (Accel::Tcg, 2, "2"),
            (Accel::Kvm, 1, "1"),
        ] {
            assert_eq!(smp(accel, cpus), wanted);
        }
    }

    #[test]
    fn numbers_are_clamped() {
        let a = argv(&Spec {
            how: How::Cold,
            memory_mib: 0,
            cpus: 1_000_000,
            accel: Accel::Kvm,
            net: Net::Nowhere,
            paths: Paths::jail(),
        });
        assert!(a.contains(&"128M".into()));
        assert!(a.contains(&"64".into()));
    }
}
