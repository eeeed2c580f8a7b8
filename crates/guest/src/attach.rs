//! From "the disk is there" to a workspace. The order is a matter of safety:
//!
//! 1. clock, identity, config digest: whose this is, and that it is what the lease says;
//! 2. the kernel's generator is reseeded **before any key is made**, and the agent's own draws anew from
//!    it: twins of one template, and two restores of one snapshot, differ;
//! 3. partition, ext4, overlay, names;
//! 4. network last: nothing can arrive before the verifiers are there.
//!
//! Must never go on after a failed step, or keep the seeds longer than it needs them.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::agent::{Attach, GuestConfig, StepTime, VOLUME_OFFSET_BYTES, Wake, tls_name};
use model::WorkspaceId;
use rustix::fs::Mode;
use rustix::mount::MountFlags;
use seal::random::Generation;
use seal::tls::rustls::ServerConfig;

use crate::auth::{Auth, state_verify};
use crate::boot::{BASE, BootError, mount, step};
use crate::identity::{self, Identity, IdentityError};
use crate::launch::Launcher;
use crate::limits::{DISK_SIZE_WAIT, LEAF_TTL};
use crate::net::{self, Address};
use crate::rootfs;
use crate::sys;

/// Where the workspace's disk is mounted in the agent's namespace.
pub const DISK: &str = "/disk";
const ROOT_NEW: &str = "/root-new";
/// What the workspace sees as its kernel's boot id.
const BOOT_ID: &str = "/boot-id";
/// The newest token state this workspace has seen: a host can't bring back an older one.
pub const TOKEN_STATE: &str = "/disk/casemate/token-state";

/// A whole disk and its first partition, which an attach adds.
pub struct Device {
    /// The disk's path.
    pub disk: String,
    /// The partition's path.
    pub partition: String,
}

impl Device {
    /// The workspace's disk.
    #[must_use]
    pub fn workspace() -> Self {
        Self {
            disk: "/dev/vdb".into(),
            partition: "/dev/vdb1".into(),
        }
    }
}

/// Why there is no workspace.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A field of the request.
    #[error("attach: {0}")]
    Request(&'static str),
    /// The identity block.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The config is not the one that the lease names.
    #[error("the config's digest is not the identity block's")]
    ConfigDigest,
    /// The token state is not mint's for this workspace and this identity.
    #[error("the token state is not this workspace's")]
    TokenState,
    /// The kernel refused a step.
    #[error(transparent)]
    Step(#[from] BootError),
    /// The TLS key or certificate could not be made.
    #[error("making the TLS certificate: {0}")]
    Tls(#[from] seal::SealError),
}

impl AttachError {
    /// One word for the host.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Request(_) => "attach_invalid",
            Self::Identity(_) => "identity_unreadable",
            Self::ConfigDigest => "config_mismatch",
            Self::TokenState => "token_state_invalid",
            Self::Step(_) => "attach_failed",
            Self::Tls(_) => "tls_failed",
        }
    }
}

/// A workspace that is ready to be served.
pub struct Workspace {
    /// Auth and files; the task table is made by the runtime.
    pub auth: Auth,
    /// The signed token state, if the disk does not hold it yet.
    pub unkept: Option<String>,
    /// The workspace's files.
    pub files: Arc<crate::fsroot::FsRoot>,
    /// Starts its processes.
    pub launcher: Launcher,
    /// For the edge's listener.
    pub tls: Arc<ServerConfig>,
    /// Runs once it is up.
    pub cmd: Vec<String>,
    /// What took how long.
    pub laps: Laps,
}

/// Becomes the workspace on `device`. A rehearsal calls this too, in namespaces of its own.
///
/// # Errors
/// Which step failed; the machine is of no further use then.
pub fn attach(attach: &Attach, device: &Device) -> Result<Workspace, AttachError> {
    let mut laps = Laps::begin();
    let address =
        Address::parse(&attach.ip, attach.prefix, &attach.gateway).map_err(AttachError::Request)?;
    clock_set(attach.time_unix_ns)?;
    laps.lap("clock");
    let (identity, disk) = identity::read(Path::new(&device.disk))?;
    let config = config_check(&attach.config, &identity)?;
    laps.lap("identity");
    let reseeded = reseed(&identity.seed)?;
    laps.lap("reseed");
    let tls = tls_config(&identity, &reseeded)?;
    laps.lap("tls");
    let grows_to = partition_add(&disk)?;
    drop(disk);
    laps.lap("partition");
    disk_mount(&device.partition, grows_to)?;
    reserve_release();
    laps.lap("mount");
    let (auth, kept) = auth(&identity, &attach.token_state)?;
    laps.lap("token_state");
    let boot_id = boot_id_file(&reseeded).map_err(step("writing the boot id"))?;
    let root = rootfs::assemble(&rootfs::Parts {
        base: Path::new(BASE),
        disk: Path::new(DISK),
        boot_id: &boot_id,
        at: Path::new(ROOT_NEW),
    })?;
    laps.lap("root");
    names_set(&root.files, &config.hostname, &address)?;
    reserve_keep();
    laps.lap("names");
    net::configure(&address).map_err(step("configuring eth0"))?;
    laps.lap("network");
    Ok(Workspace {
        auth,
        unkept: (!kept).then(|| attach.token_state.clone()),
        files: Arc::new(root.files),
        launcher: Launcher::new(Some(root.namespace), &config.env),
        tls,
        cmd: config.cmd,
        laps,
    })
}

/// Goes on as the workspace `of` after a sleep: its clock, and its address on the link that it has
/// now; the generators are reseeded and the TLS key made anew, as memory that is woken twice would
/// else repeat them. Nothing can arrive until it has said that it is up.
///
/// # Errors
/// Which step failed; the machine is of no further use then.
pub fn wake(
    wake: &Wake,
    device: &Device,
    of: &WorkspaceId,
    laps: &mut Laps,
) -> Result<Arc<ServerConfig>, AttachError> {
    let address =
        Address::parse(&wake.ip, wake.prefix, &wake.gateway).map_err(AttachError::Request)?;
    clock_set(wake.time_unix_ns)?;
    laps.lap("clock");
    let (identity, _) = identity::read(Path::new(&device.disk))?;
    if identity.workspace != *of {
        return Err(AttachError::Request("the disk is another workspace's"));
    }
    laps.lap("identity");
    let reseeded = reseed(&identity.seed)?;
    laps.lap("reseed");
    let tls = tls_config(&identity, &reseeded)?;
    laps.lap("tls");
    net::renew(&address).map_err(step("configuring eth0"))?;
    laps.lap("network");
    Ok(tls)
}

/// How long each step of an attach took, by the monotonic clock: the other one is being set.
pub struct Laps {
    last: Instant,
    steps: Vec<StepTime>,
}

impl Laps {
    /// From now.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            last: Instant::now(),
            steps: Vec::new(),
        }
    }

    /// Ends the step `name`.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        let us = now.duration_since(self.last).as_micros();
        self.steps.push(StepTime {
            name: name.into(),
            us: u32::try_from(us).unwrap_or(u32::MAX),
        });
        self.last = now;
    }

    /// The steps, in order.
    #[must_use]
    pub fn steps(self) -> Vec<StepTime> {
        self.steps
    }
}

/// Sets the machine's clock.
///
/// # Errors
/// If the kernel refuses the time.
pub fn clock_set(unix_ns: u64) -> Result<(), BootError> {
    let time = rustix::time::Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(unix_ns % 1_000_000_000).unwrap_or(0),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)
        .map_err(|e| step("setting the clock")(e.into()))
}

/// Both generators were reseeded for this life: whoever makes a key asks for it (I-16).
struct Reseeded(());

/// The kernel's generator first, then the agent's own, which draws its seed from that. Only where no
/// other thread speaks TLS.
fn reseed(seed: &[u8; 64]) -> Result<Reseeded, BootError> {
    sys::random_reseed(seed).map_err(step("reseeding the kernel's generator"))?;
    let own = Generation::of_process().map_err(step("reseeding the agent's generator"))?;
    own.next();
    Ok(Reseeded(()))
}

/// The certificate's private key is fresh for each start and stays in this process.
fn tls_config(identity: &Identity, _: &Reseeded) -> Result<Arc<ServerConfig>, AttachError> {
    let issuer = seal::tls::Identity::from_seed(&identity.identity_seed);
    let leaf = issuer.leaf(&tls_name(&identity.workspace), LEAF_TTL)?;
    Ok(seal::tls::server_config(
        leaf,
        Some(identity.edge_key),
        seal::tls::HTTP1,
    )?)
}

/// A file with a boot id of this start's own: the kernel's is in the template, the same for all.
fn boot_id_file(_: &Reseeded) -> io::Result<PathBuf> {
    let mut id: [u8; 16] = seal::random::bytes();
    // RFC 9562: version 4, variant 10.
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    let hex = hex::encode(id);
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    let path = Path::new(BOOT_ID);
    fs::write(path, parts.join("-") + "\n")?;
    Ok(path.to_owned())
}

fn config_check(text: &str, identity: &Identity) -> Result<GuestConfig, AttachError> {
    let digest = seal::hash::sha256(text.as_bytes());
    if !seal::hash::ct_eq(&digest, &identity.config_digest) {
        return Err(AttachError::ConfigDigest);
    }
    let config: GuestConfig = serde_json::from_str(text)
        .map_err(|_| AttachError::Request("config is not a guest config"))?;
    if config.workspace != identity.workspace {
        return Err(AttachError::Request("config is another workspace's"));
    }
    let hostname = config.hostname.as_bytes();
    let label = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-';
    if !(1..=63).contains(&hostname.len()) || !hostname.iter().all(label) {
        return Err(AttachError::Request("hostname must be an RFC 1123 label"));
    }
    Ok(config)
}

/// Starts from the newer of the host's token state and the one on the disk; whether that is the
/// one on the disk.
fn auth(identity: &Identity, given: &str) -> Result<(Auth, bool), AttachError> {
    let state = |signed: &str| state_verify(&identity.workspace, &identity.mint_key, signed);
    let new = state(given).map_err(|_| AttachError::TokenState)?;
    let public = seal::tls::Identity::from_seed(&identity.identity_seed).public();
    if new.identity_pub != public.to_hex() {
        return Err(AttachError::TokenState);
    }
    let stored = fs::read_to_string(TOKEN_STATE).unwrap_or_default();
    let (newest, kept) = match state(&stored) {
        Ok(held) if held.seq > new.seq => ((held, stored), true),
        held => {
            let kept = held.is_ok_and(|h| h.seq == new.seq);
            ((new, given.to_owned()), kept)
        }
    };
    let (workspace, mint, gateway) = (
        identity.workspace.clone(),
        identity.mint_key,
        identity.gateway_key,
    );
    Ok((Auth::of(workspace, mint, gateway, newest), kept))
}

/// A workspace that filled its disk must still start, or its owner could never make room: what
/// can't be written stays as the last start left it.
fn unless_full(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(e) if e.kind() == io::ErrorKind::StorageFull => Ok(()),
        other => other,
    }
}

/// Room that the workspace can't use up: without any, the overlay comes up read-only at the next
/// start. It is let go when the disk is full, and taken again once the root stands.
const RESERVE: &str = "/disk/reserve";
const RESERVE_BYTES: u64 = 256 << 10;

fn reserve_release() {
    let full = rustix::fs::statvfs(DISK)
        .is_ok_and(|v| v.f_bavail.saturating_mul(v.f_frsize) < RESERVE_BYTES || v.f_favail < 16);
    if full {
        // None there: then this start does without.
        let _ = fs::remove_file(RESERVE);
    }
}

fn reserve_keep() {
    let Ok(file) = File::create_new(RESERVE) else {
        return;
    };
    let none = rustix::fs::FallocateFlags::empty();
    if rustix::fs::fallocate(&file, none, 0, RESERVE_BYTES).is_err() {
        // The owner makes room first; the next start tries again.
        let _ = fs::remove_file(RESERVE);
    }
}

/// Keeps a token state for the next start.
///
/// # Errors
/// The kernel's answer.
pub fn token_state_store(path: &Path, signed: &str) -> io::Result<()> {
    if fs::read(path).is_ok_and(|held| held == signed.as_bytes()) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    io::Write::write_all(&mut file, signed.as_bytes())?;
    fs::rename(&temporary, path)
}

/// Makes the volume behind the identity area a partition; gives its length, bytes, if that is more
/// than its file system has.
fn partition_add(device: &File) -> Result<Option<u64>, BootError> {
    let (length_bytes, ext4) = sizes_wait(device).map_err(step("reading the size of the disk"))?;
    sys::partition_add(device, VOLUME_OFFSET_BYTES, length_bytes)
        .map_err(step("adding the disk's partition"))?;
    Ok((length_bytes - ext4.bytes >= ext4.block_bytes).then_some(length_bytes))
}

/// What a mount does before anybody asks for it, on the one CPU that the rest of the start needs:
/// the bitmap of each block group is read, or made, and checked.
const EXT4_OPTIONS: &CStr = c"discard,no_prefetch_block_bitmaps";

/// Mounts the volume's ext4, and lets it grow.
fn disk_mount(partition: &str, grows_to: Option<u64>) -> Result<(), BootError> {
    let flags = MountFlags::NOATIME | MountFlags::NODEV;
    mount(
        partition,
        "ext4",
        Path::new(DISK),
        flags,
        Some(EXT4_OPTIONS),
    )
    .map_err(step(format!("mounting {partition} (ext4)")))?;
    if let Some(length_bytes) = grows_to {
        grow(length_bytes);
    }
    Ok(())
}

/// What a file system says of its size.
struct Ext4 {
    bytes: u64,
    block_bytes: u64,
}

/// The volume's length, bytes, once it can hold the file system on it (after a late attach the
/// kernel may need a moment to see it); and that file system's size.
fn sizes_wait(device: &File) -> io::Result<(u64, Ext4)> {
    let deadline = Instant::now() + DISK_SIZE_WAIT;
    loop {
        let size_bytes = sys::device_size(device)?;
        let ext4 = ext4_size(device)?;
        let need_bytes = VOLUME_OFFSET_BYTES.saturating_add(ext4.bytes);
        if size_bytes >= need_bytes && size_bytes > VOLUME_OFFSET_BYTES {
            return Ok((size_bytes - VOLUME_OFFSET_BYTES, ext4));
        }
        if Instant::now() > deadline {
            let what = format!("has {size_bytes} bytes, its file system needs {need_bytes}");
            return Err(io::Error::other(what));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Size of the ext4 on the volume, from its superblock.
fn ext4_size(device: &File) -> io::Result<Ext4> {
    #[repr(C, align(4096))]
    struct Block([u8; 4096]);
    let mut block = Box::new(Block([0; 4096]));
    device.read_exact_at(&mut block.0, VOLUME_OFFSET_BYTES)?;
    let superblock = &block.0[1024..2048];
    let word = |at: usize| {
        let bytes = [
            superblock[at],
            superblock[at + 1],
            superblock[at + 2],
            superblock[at + 3],
        ];
        u64::from(u32::from_le_bytes(bytes))
    };
    if superblock[0x38..0x3a] != [0x53, 0xef] {
        return Err(io::Error::other("there is no ext4 on it"));
    }
    let (blocks_low, block_size_log, blocks_high) = (word(0x04), word(0x18), word(0x150));
    let blocks = if word(0x60) & 0x80 == 0 {
        blocks_low
    } else {
        blocks_high << 32 | blocks_low
    };
    if block_size_log > 6 {
        return Err(io::Error::other("its ext4 has an impossible block size"));
    }
    let block_bytes = 1024 << block_size_log;
    Ok(Ext4 {
        bytes: blocks.saturating_mul(block_bytes),
        block_bytes,
    })
}

/// Lets the file system grow into a disk that has become larger; in the background, as it works
/// without too.
fn grow(length_bytes: u64) {
    let Ok(disk) = File::open(DISK) else { return };
    let Ok(stat) = rustix::fs::fstatvfs(&disk) else {
        return;
    };
    let blocks = length_bytes / stat.f_frsize.max(1);
    std::thread::spawn(move || sys::ext4_resize(&disk, blocks));
}

/// Hostname, hosts, resolver and machine id.
fn names_set(
    files: &crate::fsroot::FsRoot,
    hostname: &str,
    address: &Address,
) -> Result<(), BootError> {
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|e| step("setting the hostname")(e.into()))?;
    let hosts = format!(
        "127.0.0.1 localhost\n{} {hostname}\n",
        if address.ip == Ipv4Addr::UNSPECIFIED {
            Ipv4Addr::LOCALHOST
        } else {
            address.ip
        }
    );
    let mode = Mode::from_raw_mode(0o644);
    for (path, content) in [
        ("/etc/hostname", format!("{hostname}\n")),
        ("/etc/hosts", hosts),
        (
            "/etc/resolv.conf",
            format!("nameserver {}\n", address.gateway),
        ),
    ] {
        unless_full(files.replace_if_changed(path, content.as_bytes(), mode))
            .map_err(step(format!("writing {path}")))?;
    }
    // The base image's is everybody's, and one on a disk that began as a copy is another's; this
    // workspace gets its own at its first start. The note, which stands outside of its root, says
    // whose the disk is, once the id is its own; a disk without one is not a copy.
    let note = Path::new(DISK).join("name");
    let was = fs::read_to_string(&note).ok();
    let has = fs::symlink_metadata(Path::new(DISK).join("upper/etc/machine-id")).is_ok();
    if !has || was.as_ref().is_some_and(|w| w != hostname) {
        let id = format!("{}\n", hex::encode(seal::random::bytes::<16>()));
        let mode = Mode::from_raw_mode(0o444);
        unless_full(files.replace("/etc/machine-id", id.as_bytes(), mode))
            .map_err(step("writing /etc/machine-id"))?;
    }
    if was.as_deref() != Some(hostname) {
        unless_full(fs::write(&note, hostname)).map_err(step("noting whose the disk is"))?;
    }
    Ok(())
}

/// The machine's memory.
pub(crate) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use seal::sign::SigningKey;

    fn identity(config: &str) -> Identity {
        let key = |n| SigningKey::from_seed(&[n; 32]).public();
        Identity {
            workspace: "ws_0123456789abcdef".parse().unwrap(),
            start_id: "st_0123456789abcdef".parse().unwrap(),
            seed: [7; 64].into(),
            identity_seed: [3; 32].into(),
            config_digest: seal::hash::sha256(config.as_bytes()),
            mint_key: key(1),
            gateway_key: key(2),
            edge_key: key(4),
        }
    }

    /// A key can't be made without the proof of a reseed, which outside of this test only the reseed
    /// gives; and twins, equal in all that the host gave them, then have different keys.
    #[test]
    fn i16_a_key_needs_a_reseed() {
        let identity = identity("");
        assert!(tls_config(&identity, &Reseeded(())).is_ok());
        let issuer = seal::tls::Identity::from_seed(&identity.identity_seed);
        let leaf = || issuer.leaf("x", LEAF_TTL).unwrap();
        assert_ne!(leaf().1.secret_der(), leaf().1.secret_der());
    }

    #[test]
    fn the_config_is_the_leases_or_none() {
        let config = |change: &str, value: serde_json::Value| {
            let mut config = serde_json::json!({"workspace": "ws_0123456789abcdef",
                "hostname": "box", "env": [], "cmd": []});
            config[change] = value;
            config.to_string()
        };
        let good = config("env", serde_json::json!(["A=b"]));
        assert_eq!(
            config_check(&good, &identity(&good)).unwrap().hostname,
            "box"
        );
        let other = config_check(&good, &identity("other")).unwrap_err();
        assert_eq!(other.code(), "config_mismatch");
        for bad in [
            config("workspace", "ws_ffffffffffffffff".into()),
            config("hostname", "".into()),
            config("hostname", "a b".into()),
            config("hostname", "a/../b".into()),
            config("hostname", "x".repeat(64).into()),
            config("more", 1.into()),
            "{".into(),
        ] {
            assert!(config_check(&bad, &identity(&bad)).is_err(), "{bad}");
        }
    }
}
