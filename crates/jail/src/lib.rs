//! Jails: what each kind of process is given, and the launcher that starts it so.
//!
//! ```text
//! warden ── Ask{kind, numbers} + descriptors ──▶ casemate-jail ── builds the kind's root, clones
//!   ▲                                                │
//!   └────────────── (pid, pidfd) ◀───────────────────┘ child: waits for `go`, drops all, exec
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`ask`] | the closed set of kinds, and what comes with each |
//! | [`plan`] | what is in each kind's root, its user, its limits |
//! | [`launch`] | the launcher: namespaces, root, privileges, Landlock, exec |
//! | [`seccomp`] | the system calls of each VMM, each with its reason |
//! | [`named`], [`tap`] | what a VMM needs that takes names and no descriptors |
//! | [`vmm`] | which accelerator there is |
//! | [`mount`] | the file system of a disk process |
//! | [`process`], [`cgroup`], [`channel`] | warden's side: spawning, holding, ending |
//!
//! Must never: take a path, a command, a user or a limit from an [`ask::Ask`]; run anything before
//! whoever asked has said `go`; leave the child a capability that its kind does not name.
#![allow(unsafe_code)]

pub mod ask;
pub mod cgroup;
pub mod channel;
pub mod ends;
pub mod fault;
mod files;
pub mod launch;
pub mod limits;
pub mod mount;
pub mod named;
pub mod plan;
pub mod process;
pub mod seccomp;
pub mod small;
pub mod tap;
pub mod vmm;

pub use files::open_beneath;
pub use launch::main;

/// Kernel, images, VMMs, below an installation's root.
pub const ARTIFACTS: &str = "var/lib/casemate/artifacts";
/// Where QEMU and its libraries are, below an installation's root.
pub const CLOSURE: &str = "var/lib/casemate/artifacts/closure";
/// What is at rest of workspaces, below an installation's root: casemate-volumes' own.
pub const VOLUMES: &str = "var/lib/casemate/volumes";
/// An empty directory of root's, for building roots on, below an installation's root.
pub const SCRATCH: &str = "run/casemate/warden/root";

/// What of a jail this kernel can't do, a line each.
#[must_use]
pub fn weakened() -> Vec<String> {
    let mut weak = Vec::new();
    // SAFETY: with no attribute and the version flag the call only returns a number.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            1u32,
        )
    };
    if abi < 6 {
        weak.push(format!("Landlock ABI {abi} (6 is needed): a VMM's signals and abstract sockets are kept in by namespaces only"));
    }
    let caps = rustix::thread::capabilities(None).map(|c| c.effective);
    if !caps.is_ok_and(|c| c.contains(rustix::thread::CapabilitySet::SYS_RESOURCE)) {
        weak.push(
            "no CAP_SYS_RESOURCE: the out-of-memory killer may take a disk process first; \
             limits.pids bounds a VMM by its control group, and not above 128 and its CPUs"
                .into(),
        );
    }
    weak
}
