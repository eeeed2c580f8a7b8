//! The one Firecracker that is run: this file is the only place that names a version.
//!
//! Why not a later one: 1.16.0 and 1.16.1 hold back all that goes to the guest over vsock once a
//! VM was paused and resumed (upstream's issue 6074, mended by its pull request 6100, which no
//! release had on the day of the pin). A workspace would neither come up nor shut down. When a
//! release has it, this file and the field sets of `tests/sim` change together.
//!
//! Looked at for this version: CVE-2026-5747 (an out-of-bounds write by virtio-pci; mended in
//! 1.15.1, and PCI stays off), CVE-2026-1386 (the jailer followed a symbolic link; its jailer is
//! not used), CVE-2019-18960 (vsock, long mended).

/// Its version.
pub const VERSION: &str = "1.15.1";
/// SHA-256 of `firecracker-v1.15.1-x86_64`, the executable in upstream's release archive.
pub const SHA256: &str = "7e8b57e88c459396d4680d83dcdd8c7f72305447cb55b11f4ac98ad70a3f7825";
/// SHA-256 of that archive, `firecracker-v1.15.1-x86_64.tgz`.
pub const ARCHIVE_SHA256: &str = "d4a32ab2322d887ca1bc4a4e7afa9cc35393e6362dfc2b3becb389d362e4275a";
/// Where its archive is.
pub const ARCHIVE: &str = "https://github.com/firecracker-microvm/firecracker/releases/download/v1.15.1/firecracker-v1.15.1-x86_64.tgz";
/// Where its makers say what was wrong with it: to be read before the version changes, and when
/// `doctor` is asked on a schedule.
pub const ADVISORIES: &str =
    "https://github.com/firecracker-microvm/firecracker/security/advisories";
/// From this day on, upstream promises no patch for it.
pub const SUPPORT_ENDS: &str = "2026-09-09";
/// Where the executable lies among the artifacts.
pub const ARTIFACT: &str = "firecracker/firecracker";
