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

/// Largest FUSE read or write, bytes: what a guest's largest request is, so that it is one.
pub const REQUEST_MAX_BYTES: usize = 512 << 10;
/// What the kernel may read around a page of saved memory that is touched, bytes. What it reads too
/// much of is decrypted for nothing, while the guest waits.
pub const READAHEAD_MAX_BYTES: u32 = 64 << 10;
/// Sectors that are read, checked and decrypted, or encrypted and tagged, in one go.
pub const RUN_SECTORS: usize = 16;
/// What a start reads before the first sector, bytes: both headers and keyslot 0. A tag covers it.
pub const HEADER_COVERED_BYTES: usize = 284 << 10;
/// A node of the tree of tags, bytes.
pub const NODE_BYTES: usize = 4096;
/// Tags in a node.
pub const NODE_FANOUT: usize = 256;
/// Tags in the superblock: each covers 64 GiB.
pub const TOP_NODES: usize = 16;
/// Leaves of the tree kept in memory; each covers 1 MiB.
pub const LEAVES_CACHED_MAX: usize = 512;
/// Sectors that are answered and wait for their batch; half as many are worth one.
pub const BUFFER_SECTORS: usize = 2048;
/// Memory that a flushed buffer keeps, bytes.
pub const BUFFER_KEPT_BYTES: usize = 256 << 10;
/// The journal of the sidecar, bytes: a checkpoint waits until all is on the medium, and this is
/// room for some 600 MiB of writes between two of them.
pub const JOURNAL_BYTES: u64 = 4 << 20;
/// So much of the journal is written ahead, bytes: a sync of a batch then does not have to wait for
/// the file system's own journal, and with it for the data of all its files.
pub const JOURNAL_AHEAD_BYTES: u64 = 1 << 20;
/// Tags in one batch of the journal.
pub const BATCH_ENTRIES_MAX: usize = BUFFER_SECTORS;
/// Sectors whose ciphertext a batch may carry.
pub const CARRIED_SECTORS_MAX: usize = 16;
/// Tags that are in the journal and not yet in the tree.
pub const CHANGES_MAX: usize = 128 << 10;
/// Smallest range that becomes a hole at once, sectors: smaller ones are written as zeros, which
/// costs no sync.
pub const HOLE_MIN_SECTORS: u64 = 256;
/// Threads that serve requests.
pub const WORKERS: usize = 2;
/// Ranges that can be locked at once; more callers wait.
pub const RANGES_MAX: usize = 8;
/// Requests that the kernel may have under way at once.
pub const BACKGROUND_MAX: u16 = 64;

/// After so many bytes written the kernel is asked to begin writing them to the disk: then a flush
/// has little left to wait for, and one workspace holds little of the host's unwritten memory.
pub const WRITE_OUT_BYTES: u64 = 4 << 20;

/// The shortest run of sectors that is written past the page cache, bytes: a shorter one is not worth a
/// wait for the device.
pub const DIRECT_MIN_BYTES: usize = 128 << 10;

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
/// The area of a note in front of an image, bytes.
pub const NOTE_AREA_BYTES: u64 = 1 << 20;
/// Longest note, bytes: one sector with its head.
pub const NOTE_MAX_BYTES: usize = SECTOR_BYTES - 12;
/// Largest identity block, magic and length included, bytes.
pub const IDENTITY_MAX_BYTES: usize = 64 << 10;

const _: () = assert!(
    VOLUME_MAX_MB as usize <= TOP_NODES * NODE_FANOUT * NODE_FANOUT,
    "the superblock's tags cover the largest volume: a leaf has 1 MiB"
);
const _: () = assert!(JOURNAL_BYTES.is_multiple_of(JOURNAL_AHEAD_BYTES));
const _: () = assert!(HEADER_COVERED_BYTES as u64 <= DATA_OFFSET_BYTES);
const _: () = assert!(DATA_OFFSET_BYTES.is_multiple_of(SECTOR_BYTES as u64));
const _: () = assert!(REQUEST_MAX_BYTES.is_multiple_of(SECTOR_BYTES));
const _: () = assert!(VOLUME_OFFSET_BYTES.is_multiple_of(SECTOR_BYTES as u64));
const _: () = assert!((IDENTITY_MAX_BYTES as u64) < VOLUME_OFFSET_BYTES);
const _: () = assert!(BURST_NS <= 1_000_000_000);
const _: () = assert!(WORKERS <= RANGES_MAX);

/// Descriptors: first those that the process is started with.
pub const STDERR_FD: i32 = 2;
/// The socketpair to warden.
pub const CONTROL_FD: i32 = 3;
/// `/dev/fuse`, with the mount.
pub const FUSE_FD: i32 = 4;
/// Another open `/dev/fuse`, joined to the mount (`FUSE_DEV_IOC_CLONE`) or to be: the second
/// worker's own queue. May be absent.
pub const FUSE_CLONE_FD: i32 = 5;
/// The backing file. Sent by warden, as is what follows; the numbers are the lowest that are free.
pub const BACKING_FD: i32 = 6;
/// The sidecar.
pub const TAGS_FD: i32 = 7;
/// A disk's backing file once more, opened with `O_DIRECT`, where there is that. An image has none.
pub const DIRECT_FD: i32 = 8;
/// What a new volume is filled from: a template, or the volume of an image. Later, the volume of
/// the image that the disk is copied to. May be absent.
pub const BESIDE_FD: i32 = 9;
/// That image's sidecar.
pub const BESIDE_TAGS_FD: i32 = 10;
/// Most descriptors that come with one message.
pub const SENT_FDS_MAX: usize = 5;
