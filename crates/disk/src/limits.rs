//! Bounds of this crate, with units in the names.

use api::agent::VOLUME_OFFSET_BYTES;

/// One sector: the unit of the cipher, of holes and of the backing file, bytes.
pub const SECTOR_BYTES: usize = 4096;
/// Where the ciphertext begins in the backing file, bytes. LUKS2's usual 16 MiB.
pub const DATA_OFFSET_BYTES: u64 = 16 << 20;
/// Largest volume, MiB.
pub const VOLUME_MAX_MB: u32 = *model::limits::DISK_MB.end();
/// Where the ciphertext begins in a LUKS1 export, bytes: behind eight keyslots, aligned to 1 MiB.
pub const LUKS1_DATA_OFFSET_BYTES: u64 = 2 << 20;
/// Size of each of the two copies of the LUKS2 header, JSON included, bytes.
pub const HEADER_BYTES: usize = 16 << 10;
/// Most PBKDF2 iterations that a header may ask for: it is read before it is trusted.
pub const PBKDF2_MAX_ITERATIONS: u32 = 100_000;
/// Salts in a header, bytes.
pub const SALT_MAX_BYTES: usize = 64;

/// Largest FUSE read or write, bytes.
pub const REQUEST_MAX_BYTES: usize = 1 << 20;
/// Threads that serve requests.
pub const WORKERS: usize = 2;
/// Ranges that can be locked at once; more callers wait.
pub const RANGES_MAX: usize = 8;
/// Requests that the kernel may have under way at once.
pub const BACKGROUND_MAX: u16 = 64;

/// How much of a second a rate limit may be ahead, ns. At most one second (DSK-5).
pub const BURST_NS: u64 = 100_000_000;
/// Allowed limits of bandwidth, bytes/s.
pub const BYTES_PER_S: std::ops::RangeInclusive<u64> = 64 << 10..=1 << 40;
/// Allowed limits of operations/s.
pub const OPS_PER_S: std::ops::RangeInclusive<u64> = 1..=100_000_000;

/// Memory for keys and key schedules, bytes: a keyslot's stripes take 250 KiB of it once.
pub const SECRET_HEAP_BYTES: usize = 1 << 20;
/// Largest sealed grant, bytes.
pub const GRANT_MAX_BYTES: usize = 16 << 10;
/// Largest identity block, magic and length included, bytes.
pub const IDENTITY_MAX_BYTES: usize = 64 << 10;

const _: () = assert!(DATA_OFFSET_BYTES.is_multiple_of(SECTOR_BYTES as u64));
const _: () = assert!(REQUEST_MAX_BYTES.is_multiple_of(SECTOR_BYTES));
const _: () = assert!(VOLUME_OFFSET_BYTES.is_multiple_of(SECTOR_BYTES as u64));
const _: () = assert!((IDENTITY_MAX_BYTES as u64) < VOLUME_OFFSET_BYTES);
const _: () = assert!(BURST_NS <= 1_000_000_000);
const _: () = assert!(WORKERS <= RANGES_MAX);

/// Descriptors that the process is started with.
pub const STDERR_FD: i32 = 2;
/// The socketpair to warden.
pub const CONTROL_FD: i32 = 3;
/// The backing file.
pub const BACKING_FD: i32 = 4;
/// `/dev/fuse`, with the mount.
pub const FUSE_FD: i32 = 5;
/// The template of a new volume; may be absent.
pub const TEMPLATE_FD: i32 = 6;
/// Another open `/dev/fuse`, joined to the mount (`FUSE_DEV_IOC_CLONE`) or to be: the second
/// worker's own queue. May be absent.
pub const FUSE_CLONE_FD: i32 = 7;
