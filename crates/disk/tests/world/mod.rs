//! A disk process as warden runs it, and the far ends of what it is given.
#![allow(
    clippy::unwrap_used,
    dead_code,
    missing_docs,
    unreachable_pub,
    unsafe_code
)]

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::disk::{Anchored, FromDisk, ToDisk};
use api::kms::Anchor;
use base64::Engine as _;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};

pub const UID: u32 = 900_123;
pub const DISK_UID: u32 = 910_123;
pub const SIZE_MB: u64 = 64;
pub const VOLUME: u64 = 1 << 20;
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const DISK_KEY: [u8; 32] = [0x11; 32];

/// A start's number: a later one is higher.
pub static RUN: AtomicU64 = AtomicU64::new(1);

/// The two files of a disk.
pub struct AtRest {
    pub volume: File,
    pub tags: File,
}

impl std::ops::Deref for AtRest {
    type Target = File;

    fn deref(&self) -> &File {
        &self.volume
    }
}

pub fn at_rest() -> AtRest {
    at_rest_in(tempfile::tempfile().unwrap())
}

pub fn at_rest_in(volume: File) -> AtRest {
    let tags = tempfile::tempfile().unwrap();
    AtRest { volume, tags }
}

/// A running disk process and the far ends of what it was given.
pub struct Disk {
    pub child: Child,
    pub control: Option<OwnedFd>,
    pub mount: Option<OwnedFd>,
}

/// How it is started.
#[derive(Clone)]
pub struct Plan {
    pub bytes_per_s: u64,
    pub ops_per_s: u64,
    pub format: bool,
    pub second_queue: SecondQueue,
    pub disk_key: [u8; 32],
    pub anchor: Option<Anchor>,
}

/// What descriptor 5 is.
#[derive(Clone, Copy)]
pub enum SecondQueue {
    None,
    ToJoin,
    Joined,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            bytes_per_s: 1 << 40,
            ops_per_s: 100_000_000,
            format: false,
            second_queue: SecondQueue::ToJoin,
            disk_key: DISK_KEY,
            anchor: None,
        }
    }
}

impl Disk {
    pub fn spawn(plan: &Plan) -> Self {
        let kind = SocketType::SEQPACKET;
        let (control, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let fuse = open_fuse();
        let mount = fuse_mount(&fuse);
        let second = match plan.second_queue {
            SecondQueue::None => None,
            SecondQueue::ToJoin => Some(open_fuse()),
            SecondQueue::Joined => Some(clone_queue(&fuse)),
        };
        let given = [
            (3, theirs.as_raw_fd()),
            (4, fuse.as_raw_fd()),
            (5, second.as_ref().map_or(-1, AsRawFd::as_raw_fd)),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_casemate-disk"));
        command
            .arg("--uid")
            .arg(UID.to_string())
            .uid(DISK_UID)
            .gid(DISK_UID);
        // SAFETY: only calls that are safe after a fork: fcntl, dup2 and close.
        unsafe {
            command.pre_exec(move || {
                // First out of the way, so that no number is taken from another one.
                let high = given.map(|(_, fd)| libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100));
                for ((to, _), from) in given.into_iter().zip(high) {
                    if from < 0 {
                        libc::close(to);
                    } else if libc::dup2(from, to) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self {
            child,
            control: Some(control),
            mount: Some(mount),
        }
    }

    /// Spawned and granted its key; its answer.
    pub fn start(backing: &AtRest, template: Option<&File>, plan: &Plan) -> (Self, FromDisk) {
        let disk = Self::spawn(plan);
        let FromDisk::Hello { hpke_pub } = disk.receive() else {
            panic!("no hello")
        };
        disk.send_files(backing, template, plan);
        disk.send(&grant(&hpke_pub, plan));
        let answer = disk.receive();
        (disk, answer)
    }

    pub fn started(backing: &AtRest, template: Option<&File>, plan: &Plan) -> Self {
        let (disk, answer) = Self::start(backing, template, plan);
        match answer {
            FromDisk::Ready { size_bytes, .. } => assert_eq!(size_bytes, VOLUME + (SIZE_MB << 20)),
            other => panic!("{other:?}"),
        }
        disk
    }

    pub fn send(&self, message: &ToDisk) {
        let text = serde_json::to_vec(message).unwrap();
        rustix::net::send(self.control(), &text, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn send_files(&self, backing: &AtRest, template: Option<&File>, plan: &Plan) {
        let text = serde_json::to_vec(&ToDisk::Open {
            content: api::disk::Content::Disk,
            size_mb: SIZE_MB.try_into().unwrap(),
            bytes_per_s: plan.bytes_per_s,
            ops_per_s: plan.ops_per_s,
        })
        .unwrap();
        let direct = direct(&backing.volume);
        let files: Vec<_> = [
            Some(&backing.volume),
            Some(&backing.tags),
            Some(&direct),
            template,
        ]
        .into_iter()
        .flatten()
        .map(AsFd::as_fd)
        .collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        assert!(with.push(SendAncillaryMessage::ScmRights(&files)));
        let (to, text) = (self.control(), [IoSlice::new(&text)]);
        rustix::net::sendmsg(to, &text, &mut with, SendFlags::NOSIGNAL).unwrap();
    }

    pub fn control(&self) -> &OwnedFd {
        self.control.as_ref().unwrap()
    }

    pub fn receive(&self) -> FromDisk {
        let mut buf = vec![0; 65_536];
        let mut wait = [PollFd::new(self.control(), PollFlags::IN)];
        let deadline = rustix::time::Timespec::try_from(DEADLINE).unwrap();
        assert_eq!(
            poll(&mut wait, Some(&deadline)).unwrap(),
            1,
            "no message in time"
        );
        let (_, len) = rustix::net::recv(self.control(), &mut buf[..], RecvFlags::empty()).unwrap();
        assert!(len > 0, "the process is gone");
        serde_json::from_slice(&buf[..len]).unwrap()
    }

    /// Opens the file as the VMM's user, in a thread of its own with that user's ids.
    pub fn open(&self) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.mount.as_ref().unwrap().as_raw_fd());
        as_uid(UID, move || {
            File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_CLOEXEC)
                .open(path)
        })
    }

    /// Its last word.
    pub fn close(mut self) -> Anchored {
        self.send(&ToDisk::Close);
        let status = wait(&mut self.child);
        assert!(status.success(), "{status}");
        self.anchored()
    }

    pub fn anchored(&self) -> Anchored {
        match self.receive() {
            FromDisk::Anchor(said) => said,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The same file, past the page cache.
pub fn direct(file: &File) -> File {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = File::options();
    options.write(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

pub fn wait(child: &mut Child) -> std::process::ExitStatus {
    // SAFETY: a new descriptor for our own child.
    let pidfd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, child.id(), 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(i32::try_from(fd).unwrap())
    };
    let mut events = [PollFd::new(&pidfd, PollFlags::IN)];
    let deadline = rustix::time::Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(
        poll(&mut events, Some(&deadline)).unwrap(),
        1,
        "it does not end"
    );
    child.wait().unwrap()
}

/// Runs `work` on a thread whose user is `uid`; the process stays root.
pub fn as_uid<T: Send + 'static>(uid: u32, work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(move || {
        // SAFETY: the raw calls change this thread's ids only (libc's would change all threads').
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setresgid, uid, uid, uid), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
        }
        work()
    })
    .join()
    .unwrap()
}

pub fn open_fuse() -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap()
        .into()
}

pub fn fuse_mount(fuse: &OwnedFd) -> OwnedFd {
    let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (name, value) in [
        ("source", "casemate-test".to_owned()),
        ("fd", fuse.as_raw_fd().to_string()),
        ("rootmode", "100000".to_owned()),
        ("user_id", UID.to_string()),
        ("group_id", UID.to_string()),
    ] {
        rustix::mount::fsconfig_set_string(&fs, name, value).unwrap();
    }
    rustix::mount::fsconfig_create(&fs).unwrap();
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap()
}

pub fn clone_queue(fuse: &OwnedFd) -> OwnedFd {
    let clone = open_fuse();
    let source = fuse.as_raw_fd();
    // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, which outlives the call.
    let done = unsafe { libc::ioctl(clone.as_raw_fd(), 0x8004_e500, &raw const source) };
    assert_eq!(done, 0);
    clone
}

pub fn grant(hpke_pub: &str, plan: &Plan) -> ToDisk {
    let grant = serde_json::to_vec(&api::kms::Grant {
        workspace: "ws_0123456789abcdef".parse().unwrap(),
        start_id: "st_0123456789abcdef".parse().unwrap(),
        run: RUN.fetch_add(1, Ordering::SeqCst),
        anchor: plan.anchor.clone(),
        purpose: model::Purpose::Disk,
        disk_key: hex::encode(plan.disk_key),
        identity_seed: "1b".repeat(32),
        config_digest: "2c".repeat(32),
        mint_key: "3d".repeat(32),
        gateway_key: "4e".repeat(32),
        edge_key: "5f".repeat(32),
    })
    .unwrap();
    let (to, aad) = (seal::hpke::PublicKey::from_hex(hpke_pub).unwrap(), [9; 32]);
    let sealed = seal::hpke::seal(&to, api::context::RELEASE.as_bytes(), &aad, &grant);
    ToDisk::Grant {
        sealed: base64::engine::general_purpose::STANDARD.encode(sealed),
        aad: hex::encode(aad),
        format: plan.format,
        from: None,
    }
}

pub fn fresh() -> Plan {
    Plan {
        format: true,
        ..Plan::default()
    }
}

pub fn file_with(content: &[(u64, &[u8])], len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    for (offset, bytes) in content {
        file.write_all_at(bytes, *offset).unwrap();
    }
    file
}

pub fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    file.read_exact_at(&mut out, offset).unwrap();
    out
}

pub fn holds(file: &File, needle: &[u8]) -> bool {
    let all = read(file, 0, file.metadata().unwrap().len() as usize);
    all.windows(needle.len()).any(|window| window == needle)
}
