//! The process: from its start to its end.
//!
//! ```text
//! secret heap ─▶ sandbox ─▶ serve nothing ─▶ hello ─▶ files ─▶ grant ─▶ open or format ─▶ ready
//!   ─▶ serve the volume ─▶ close, or the mount gone: sync, say how far, exit
//!       anchor, note, copy ─▶ ─┘
//! ```

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;

use api::disk::{Anchored, Content, FromDisk, ToDisk};
use api::kms::Anchor;
use api::warden::Sealed;
use model::Purpose;
use seal::Zeroizing;
use seal::hpke::SecretKey;
use seal::secret::{harden_process, install_secret_heap};

use crate::DiskError;
use crate::backing::DataFile;
use crate::bucket::Limiter;
use crate::control::Control;
use crate::format::{self, open_or_format};
use crate::fuse::{Content as _, End, Serving, Worker};
use crate::grant::{self, Grant};
use crate::identity::Identity;
use crate::image::{self, Way};
use crate::late::Late;
use crate::limits::{
    BACKING_FD, BESIDE_FD, BESIDE_TAGS_FD, BYTES_PER_S, CONTROL_FD, DIRECT_FD, FUSE_CLONE_FD,
    FUSE_FD, NOTE_AREA_BYTES, OPS_PER_S, SECRET_HEAP_BYTES, TAGS_FD, VOLUME_MAX_MB, WORKERS,
};
use crate::object::Object;
use crate::sandbox;
use crate::sidecar::Witness;
use crate::volume::Volume;

/// From the command line: nothing that is a workspace's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// Who may open the file; without it, whom the mount lets in (one uid, as warden made it).
    pub uid: Option<u32>,
}

impl Arguments {
    /// Reads nothing, or `--uid N`.
    ///
    /// # Errors
    /// [`DiskError::Protocol`], naming the argument.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, DiskError> {
        let wrong = |subject, why| DiskError::Protocol { subject, why };
        let mut args = args.into_iter();
        let uid = match args.next().as_deref() {
            None => return Ok(Self { uid: None }),
            Some("--uid") => args.next().and_then(|uid| uid.parse::<u32>().ok()),
            Some(_) => return Err(wrong("arguments", "only --uid")),
        };
        match (uid, args.next()) {
            (None | Some(u32::MAX), _) => Err(wrong("--uid", "needs the number of a user")),
            (_, Some(_)) => Err(wrong("arguments", "only --uid")),
            (uid, None) => Ok(Self { uid }),
        }
    }
}

/// Runs the process: returns when warden says so, is gone, or the mount is.
///
/// # Errors
/// Whatever kept it from serving or from making all durable; warden was told, if it was there.
pub fn run(args: impl IntoIterator<Item = String>) -> Result<(), DiskError> {
    sandbox::prepare();
    install_secret_heap(SECRET_HEAP_BYTES)?;
    harden_process()?;
    abort_on_panic();
    let arguments = Arguments::parse(args)?;
    let inherited = Inherited::take()?;
    let teller = Arc::new(Teller {
        control: Control::new(inherited.control),
        witness: OnceLock::new(),
    });
    let key = SecretKey::generate();
    let result = confined(&arguments, &teller, inherited.fuse, &key);
    if let Err(error) = &result {
        teller.control.send(&FromDisk::Failed {
            code: error.code(),
            message: error.to_string(),
        })?;
    }
    result
}

/// The life inside the sandbox: all that comes from outside is read here.
fn confined(
    arguments: &Arguments,
    teller: &Arc<Teller>,
    fuse: [Arc<File>; WORKERS],
    key: &SecretKey,
) -> Result<(), DiskError> {
    let control = &teller.control;
    let limiter = Limiter::new(*BYTES_PER_S.end(), *OPS_PER_S.end());
    let serving = Arc::new(Serving::new(arguments.uid, limiter));
    let content = Late::<Object<DataFile>>::default();
    for device in fuse {
        let serving = Arc::clone(&serving);
        start_worker(device, content.clone(), serving, Arc::clone(teller))?;
    }
    let drainer = start_drainer()?;
    sandbox::enter()?;
    control.send(&FromDisk::Hello {
        hpke_pub: key.public().to_hex(),
    })?;

    let Some(files) = receive_files(control)? else {
        return Ok(());
    };
    let Some(opened) = receive_grant(control, key)? else {
        return Ok(());
    };
    serving.limit(files.bytes_per_s, files.ops_per_s);
    let saving = files.content == Content::Saving;
    let (object, note) = open(files, &opened, teller, key)?;
    drop(opened);
    content.begin(object.clone());
    if !object.is_saved() {
        // It lives as long as the process does.
        let _there = drainer.send(object.volume().clone());
    }
    control.send(&FromDisk::Ready {
        size_bytes: object.size_bytes(),
        state: state(object.volume()),
        note,
    })?;
    let asked = loop {
        match control.receive_with_fds() {
            Ok(Some((ToDisk::Anchor, _))) => teller.anchor(&object)?,
            Ok(Some((ToDisk::Note { note }, _))) if saving => {
                image::note_write(object.volume(), &note)?;
            }
            Ok(Some((ToDisk::Copy { key: sealed, note }, files))) if !saving => {
                copy_out(
                    object.volume(),
                    files,
                    &grant::open(key, &sealed.sealed, &sealed.aad)?,
                    &note,
                )?;
                control.send(&FromDisk::Copied)?;
            }
            Ok(None | Some((ToDisk::Close, _))) => break Ok(()),
            Ok(Some(_)) => break Err(out_of_turn()),
            Err(error) => break Err(error),
        }
    };
    teller.end(&serving, &object)?;
    asked
}

/// Tells warden how far the disk has got.
struct Teller {
    control: Control,
    /// Once there is a key.
    witness: OnceLock<Witness>,
}

impl Teller {
    fn anchor(&self, object: &Object<DataFile>) -> Result<(), DiskError> {
        let report = object
            .volume()
            .anchor()
            .map_err(DiskError::io("syncing the volume"))?;
        let (Some(report), Some(witness)) = (report, self.witness.get()) else {
            return Ok(());
        };
        self.control.send(&FromDisk::Anchor(Anchored {
            statement: witness.statement(&report),
            refused: report.refused,
            first_refused: report.first_refused,
        }))
    }

    /// Shuts the gate, makes all durable and says how far that is.
    fn end(&self, serving: &Serving, object: &Object<DataFile>) -> Result<(), DiskError> {
        if object.is_saved() {
            // Nothing was written; but reads may have been refused.
            return self.anchor(object);
        }
        serving
            .close(object)
            .and_then(|()| object.volume().close())
            .map_err(DiskError::io("syncing the volume"))?;
        self.anchor(object)
    }
}

/// The file that the opened grant is for, and the note that came with it.
fn open(
    files: Files,
    opened: &Opened,
    teller: &Teller,
    key: &SecretKey,
) -> Result<(Object<DataFile>, Option<String>), DiskError> {
    let grant = Grant::parse(&opened.grant)?;
    let is_image = matches!(
        grant.purpose,
        Purpose::Memory | Purpose::SnapshotMemory | Purpose::Archive
    );
    let fits = match files.content {
        Content::Disk => grant.purpose == Purpose::Disk,
        Content::Saving => is_image && opened.format,
        Content::Saved => is_image && !opened.format,
    };
    if !fits {
        return Err(DiskError::Grant {
            why: "it is for something else than these files",
        });
    }
    let size_bytes = u64::from(files.size_mb) << 20;
    let (template, image) = match files.beside {
        Beside::Nothing => (None, None),
        Beside::Template(template) => (Some(template), None),
        Beside::Image(volume, tags) => (None, Some((volume, tags))),
    };
    let from = match (image, &opened.from) {
        (Some((volume, tags)), Some(sealed)) => Some(image_open(volume, tags, sealed, key)?),
        (None, None) => None,
        _ => return Err(out_of_turn()),
    };
    // A copy takes the place of the disk that the anchor is of: it is new under a later start.
    let anchor = grant.anchor.clone().filter(|_| from.is_none());
    let grant = Grant { anchor, ..grant };
    let (backing, tags) = (files.backing, DataFile::from(files.tags));
    let (volume, note) = match (files.content, from) {
        // None before it is closed: whoever writes it keeps it then, or not at all.
        (Content::Saving, _) => {
            let volume = format::begin(backing, Some(tags), &grant, size_bytes, |_| Ok(()))?;
            (volume, None)
        }
        (Content::Saved, _) => {
            let (volume, note) = image::open(backing, tags, &grant)?;
            (volume, Some(note))
        }
        (Content::Disk, Some((from, note))) if opened.format => {
            let copy = |to: &_| image::copy(&from, to, Way::FromImage);
            let volume = format::create(backing, Some(tags), &grant, size_bytes, copy)?;
            (volume, Some(note))
        }
        (Content::Disk, Some(_)) => return Err(out_of_turn()),
        (Content::Disk, None) => {
            let template = template.as_ref();
            let volume = open_or_format(
                backing,
                Some(tags),
                template,
                &grant,
                opened.format,
                size_bytes,
            )?;
            (volume, None)
        }
    };
    let witness = Witness::new(grant.disk_key.expose(), grant.workspace.clone());
    let _first = teller.witness.set(witness);
    let object = match files.content {
        Content::Disk => Object::new(Identity::new(&grant)?, volume),
        Content::Saving => Object::memory(volume, false),
        Content::Saved => Object::memory(volume, true),
    };
    Ok((object, note))
}

/// A snapshot's disk, and its note.
fn image_open(
    volume: File,
    tags: File,
    sealed: &Sealed,
    key: &SecretKey,
) -> Result<(Volume<DataFile>, String), DiskError> {
    let text = grant::open(key, &sealed.sealed, &sealed.aad)?;
    let grant = Grant::parse(&text)?;
    if grant.purpose != Purpose::SnapshotDisk {
        return Err(DiskError::Grant {
            why: "what the disk is filled from is no snapshot's disk",
        });
    }
    image::open(volume.into(), tags.into(), &grant)
}

/// Copies the disk, whose VM stands still, to the image in `files`.
fn copy_out(
    disk: &Volume<DataFile>,
    files: Vec<OwnedFd>,
    grant: &[u8],
    note: &str,
) -> Result<(), DiskError> {
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let grant = Grant::parse(grant)?;
    let mut files = files.into_iter().map(File::from);
    let (Some(volume), Some(tags)) = (files.next(), files.next()) else {
        return Err(out_of_turn());
    };
    if numbers[..] != [BESIDE_FD, BESIDE_TAGS_FD] || grant.purpose != Purpose::SnapshotDisk {
        return Err(out_of_turn());
    }
    let syncing = "syncing the disk to copy";
    // From here on all of it is in the file that is copied.
    disk.sync()
        .and_then(|()| disk.anchor())
        .map_err(DiskError::io(syncing))?;
    let size_bytes = disk.size_bytes() + NOTE_AREA_BYTES;
    let copy = |image: &_| {
        image::copy(disk, image, Way::ToImage)?;
        image::note_write(image, note)
    };
    format::create(volume.into(), Some(tags.into()), &grant, size_bytes, copy).map(drop)
}

fn state(volume: &Volume<DataFile>) -> Anchor {
    let report = volume.report();
    Anchor {
        run: report.generation.run,
        batch: report.generation.batch,
        root: hex::encode(report.root),
    }
}

/// What warden sent for the workspace that this process is to serve.
struct Files {
    content: Content,
    backing: DataFile,
    tags: File,
    beside: Beside,
    size_mb: u32,
    bytes_per_s: u64,
    ops_per_s: u64,
}

/// What a new volume is filled from.
enum Beside {
    Nothing,
    Template(File),
    /// A snapshot's disk: volume, sidecar.
    Image(File, File),
}

/// Waits for the files; `None` if the process is to end instead.
fn receive_files(control: &Control) -> Result<Option<Files>, DiskError> {
    let wrong = |subject, why| Err(DiskError::Protocol { subject, why });
    let (content, size_mb, bytes_per_s, ops_per_s, fds) = match control.receive_with_fds()? {
        None | Some((ToDisk::Close, _)) => return Ok(None),
        Some((
            ToDisk::Open {
                content,
                size_mb,
                bytes_per_s,
                ops_per_s,
            },
            fds,
        )) => (content, size_mb, bytes_per_s, ops_per_s, fds),
        Some(_) => return Err(out_of_turn()),
    };
    // The sandbox knows files by these numbers.
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let all = [BACKING_FD, TAGS_FD, DIRECT_FD, BESIDE_FD, BESIDE_TAGS_FD];
    let (count, why) = match content {
        Content::Disk => (3..=5, "must be three to five, of a disk"),
        Content::Saving | Content::Saved => (2..=2, "must be two, of memory"),
    };
    if !count.contains(&numbers.len()) || numbers[..] != all[..numbers.len()] {
        return wrong("files", why);
    }
    if !(1..=VOLUME_MAX_MB).contains(&size_mb) {
        return wrong("size_mb", "out of bounds");
    }
    if !BYTES_PER_S.contains(&bytes_per_s) {
        return wrong("bytes_per_s", "out of bounds");
    }
    if !OPS_PER_S.contains(&ops_per_s) {
        return wrong("ops_per_s", "out of bounds");
    }
    let mut fds = fds.into_iter().map(File::from);
    let (Some(backing), Some(tags)) = (fds.next(), fds.next()) else {
        return wrong("files", "none");
    };
    let backing = DataFile::new(backing, fds.next());
    let beside = match (fds.next(), fds.next()) {
        (None, _) => Beside::Nothing,
        (Some(template), None) => Beside::Template(template),
        (Some(volume), Some(tags)) => Beside::Image(volume, tags),
    };
    Ok(Some(Files {
        content,
        backing,
        tags,
        beside,
        size_mb,
        bytes_per_s,
        ops_per_s,
    }))
}

fn out_of_turn() -> DiskError {
    DiskError::Protocol {
        subject: "message from warden",
        why: "out of turn",
    }
}

/// A grant that was sealed to this process.
struct Opened {
    grant: Zeroizing<Vec<u8>>,
    format: bool,
    from: Option<Sealed>,
}

/// Waits for the grant; `None` if the process is to end instead.
fn receive_grant(control: &Control, key: &SecretKey) -> Result<Option<Opened>, DiskError> {
    match control.receive()? {
        None | Some(ToDisk::Close) => Ok(None),
        Some(ToDisk::Grant {
            sealed,
            aad,
            format,
            from,
        }) => Ok(Some(Opened {
            grant: grant::open(key, &sealed, &aad)?,
            format,
            from,
        })),
        Some(_) => Err(out_of_turn()),
    }
}

/// Starts a thread that serves.
fn start_worker(
    device: Arc<File>,
    content: Late<Object<DataFile>>,
    serving: Arc<Serving>,
    teller: Arc<Teller>,
) -> Result<(), DiskError> {
    start_confined("fuse", move || {
        let worker = Worker::new(device, content.clone(), Arc::clone(&serving));
        serve(worker, &content, &serving, &teller);
    })
}

/// Starts the thread that brings a volume's batches to its files; the volume comes later.
fn start_drainer() -> Result<mpsc::Sender<Volume<DataFile>>, DiskError> {
    let (sender, volumes) = mpsc::channel::<Volume<DataFile>>();
    start_confined("drain", move || {
        if let Ok(volume) = volumes.recv() {
            volume.drain_as_due();
        }
    })?;
    Ok(sender)
}

/// Starts a thread, inside its sandbox before anything comes from outside.
fn start_confined(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), DiskError> {
    let ended = |why: String| DiskError::Sandbox {
        operation: "thread",
        why,
    };
    let (confined_in, confined) = mpsc::channel();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let entered = sandbox::enter();
            let failed = entered.is_err();
            if confined_in.send(entered).is_err() || failed {
                return;
            }
            work();
        })
        .map_err(|why| ended(why.to_string()))?;
    confined.recv().map_err(|why| ended(why.to_string()))?
}

/// Serves until the mount is gone; then there is nothing left to do for the whole process.
fn serve(
    mut worker: Worker<Late<Object<DataFile>>>,
    content: &Late<Object<DataFile>>,
    serving: &Serving,
    teller: &Teller,
) {
    let result = match worker.serve() {
        Ok(End::Closed) => return, // Whoever closed it ends the process.
        Ok(End::MountGone) => Ok(()),
        Err(error) => Err(DiskError::io("serving")(error)),
    };
    let ended = content
        .get()
        .map_or(Ok(()), |object| teller.end(serving, object));
    let code = match result.and(ended) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("casemate-disk: {error}");
            1
        }
    };
    std::process::exit(code);
}

/// A panic is a bug: nothing more is written or answered. Its text is not printed, since it may
/// quote data.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        match info.location() {
            Some(at) => eprintln!("casemate-disk: bug at {}:{}", at.file(), at.line()),
            None => eprintln!("casemate-disk: bug"),
        }
        std::process::abort();
    }));
}

/// What warden started the process with.
struct Inherited {
    control: OwnedFd,
    /// The workers' queues: the same one twice if there is but one.
    fuse: [Arc<File>; WORKERS],
}

impl Inherited {
    /// Takes the inherited descriptors over and closes all others.
    fn take() -> Result<Self, DiskError> {
        close_from(FUSE_CLONE_FD + 1)?;
        let missing = |subject| DiskError::Protocol {
            subject,
            why: "missing",
        };
        let control = take_fd(CONTROL_FD).ok_or(missing("descriptor 3 (control)"))?;
        let fuse = take_fd(FUSE_FD).ok_or(missing("descriptor 4 (/dev/fuse)"))?;
        let second = match take_fd(FUSE_CLONE_FD) {
            Some(fd) => join_queue(fd, &fuse)?,
            // The same queue: its number must not be free, for the files that are sent.
            None => rustix::io::fcntl_dupfd_cloexec(&fuse, FUSE_CLONE_FD)
                .map(|fd| Arc::new(File::from(fd)))
                .map_err(|why| DiskError::io::<std::io::Error>("copying /dev/fuse")(why.into()))?,
        };
        Ok(Self {
            control,
            fuse: [Arc::new(File::from(fuse)), second],
        })
    }
}

fn take_fd(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: borrowed for one call, which only looks at the descriptor table.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(borrowed).ok()?;
    // SAFETY: it is open, and nobody else in this process owns it: the numbers from 3 on are
    // warden's to give, this is called once for each, and nothing was opened in between.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn close_from(first: RawFd) -> Result<(), DiskError> {
    let first = libc::c_uint::try_from(first).expect("a positive constant");
    // SAFETY: no descriptor from here on is owned by anything in this process yet.
    if unsafe { libc::close_range(first, libc::c_uint::MAX, 0) } == 0 {
        return Ok(());
    }
    Err(DiskError::io("closing stray descriptors")(
        std::io::Error::last_os_error(),
    ))
}

/// Makes `fd`, an open `/dev/fuse`, another queue of the mount behind `fuse`, if it is not yet one.
fn join_queue(fd: OwnedFd, fuse: &OwnedFd) -> Result<Arc<File>, DiskError> {
    const FUSE_DEV_IOC_CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);
    let source = u32::try_from(fuse.as_raw_fd()).expect("descriptors are not negative");
    // SAFETY: the call reads one u32, which outlives it; `fd` and `fuse` are open.
    let joined = unsafe {
        let call = rustix::ioctl::Setter::<FUSE_DEV_IOC_CLONE, u32>::new(source);
        rustix::ioctl::ioctl(&fd, call)
    };
    match joined {
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(Arc::new(File::from(fd))), // INVAL: it is one.
        Err(error) => Err(DiskError::io("joining the second /dev/fuse to the mount")(
            error,
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nothing_but_a_user_is_taken_from_the_command_line() {
        let parse = |text: &str| Arguments::parse(text.split_whitespace().map(str::to_owned));
        assert_eq!(parse("").unwrap().uid, None);
        assert_eq!(parse("--uid 910000").unwrap().uid, Some(910_000));
        for (text, named) in [
            ("--uid 4294967295", "--uid: needs"),
            ("--uid -1", "--uid: needs"),
            ("--uid", "--uid: needs"),
            ("--uid 1 --uid 1", "arguments: only"),
            ("--key 1", "arguments: only"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }
}
