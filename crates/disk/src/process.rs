//! The process: from its start to its end.
//!
//! ```text
//! secret heap ─▶ hello ─▶ sandbox ─▶ grant ─▶ open or format ─▶ ready ─▶ serve ─▶ close: sync, exit
//! ```

use std::fs::File;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, mpsc};
use std::thread;

use api::disk::{FromDisk, ToDisk};
use seal::Zeroizing;
use seal::hpke::SecretKey;
use seal::secret::{harden_process, install_secret_heap};

use crate::DiskError;
use crate::bucket::Limiter;
use crate::control::Control;
use crate::format::open_or_format;
use crate::fuse::{End, Serving, Worker};
use crate::grant::{self, Grant};
use crate::identity::Identity;
use crate::limits::{
    BACKING_FD, BYTES_PER_S, CONTROL_FD, FUSE_CLONE_FD, FUSE_FD, OPS_PER_S, SECRET_HEAP_BYTES,
    TEMPLATE_FD, VOLUME_MAX_MB, WORKERS,
};
use crate::object::Object;
use crate::sandbox;

/// Public numbers, from the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// Size of the volume, MiB.
    pub size_mb: u32,
    /// Bandwidth, bytes/s.
    pub bytes_per_s: u64,
    /// Operations/s.
    pub ops_per_s: u64,
    /// Who may open the file; without it, whom the mount lets in (one uid, as warden made it).
    pub uid: Option<u32>,
}

impl Arguments {
    /// Reads `--size-mb N --bytes-per-s N --ops-per-s N`, and perhaps `--uid N`, each once.
    ///
    /// # Errors
    /// [`DiskError::Protocol`], naming the argument.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, DiskError> {
        const NAMES: [&str; 4] = ["--size-mb", "--bytes-per-s", "--ops-per-s", "--uid"];
        let wrong = |subject, why| DiskError::Protocol { subject, why };
        let mut values = [None; NAMES.len()];
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            let at = NAMES.iter().position(|known| *known == name).ok_or(wrong(
                "arguments",
                "only --size-mb, --bytes-per-s, --ops-per-s, --uid",
            ))?;
            let value = args.next().and_then(|value| value.parse::<u64>().ok());
            let value = value.ok_or(wrong(NAMES[at], "needs a number"))?;
            if values[at].replace(value).is_some() {
                return Err(wrong(NAMES[at], "given twice"));
            }
        }
        let optional = |at: usize, allowed: RangeInclusive<u64>| match values[at] {
            Some(value) if !allowed.contains(&value) => Err(wrong(NAMES[at], "out of bounds")),
            value => Ok(value),
        };
        let value = |at: usize, allowed: RangeInclusive<u64>| {
            optional(at, allowed)?.ok_or(wrong(NAMES[at], "missing"))
        };
        let narrow = |value: u64| u32::try_from(value).expect("its bound fits");
        Ok(Self {
            size_mb: narrow(value(0, 1..=u64::from(VOLUME_MAX_MB))?),
            bytes_per_s: value(1, BYTES_PER_S)?,
            ops_per_s: value(2, OPS_PER_S)?,
            uid: optional(3, 0..=u64::from(u32::MAX - 1))?.map(narrow),
        })
    }
}

/// Runs the process: returns when warden says so, is gone, or the mount is.
///
/// # Errors
/// Whatever kept it from serving or from making all durable; warden was told, if it was there.
pub fn run(args: impl IntoIterator<Item = String>) -> Result<(), DiskError> {
    install_secret_heap(SECRET_HEAP_BYTES)?;
    harden_process()?;
    abort_on_panic();
    let arguments = Arguments::parse(args)?;
    let inherited = Inherited::take()?;
    let control = Control::new(inherited.control);
    let key = SecretKey::generate();
    control.send(&FromDisk::Hello {
        hpke_pub: key.public().to_hex(),
    })?;
    let result = confined(&arguments, &control, inherited.files, &key);
    if let Err(error) = &result {
        control.send(&FromDisk::Failed {
            code: error.code(),
            message: error.to_string(),
        })?;
    }
    result
}

/// The life inside the sandbox: all that comes from outside is read here.
fn confined(
    arguments: &Arguments,
    control: &Control,
    files: Files,
    key: &SecretKey,
) -> Result<(), DiskError> {
    let mut threads = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        threads.push(start_worker()?);
    }
    sandbox::enter()?;

    let Some(opened) = receive_grant(control, key)? else {
        return Ok(());
    };
    let object = open(arguments, files.backing, files.template, &opened)?;
    drop(opened);

    let limiter = Limiter::new(arguments.bytes_per_s, arguments.ops_per_s);
    let serving = Arc::new(Serving::new(arguments.uid, limiter));
    control.send(&FromDisk::Ready {
        size_bytes: object.size_bytes(),
    })?;
    for (thread, device) in threads.iter().zip(files.fuse) {
        let work = Work {
            worker: Worker::new(device, object.clone(), Arc::clone(&serving)),
            object: object.clone(),
            serving: Arc::clone(&serving),
        };
        thread
            .send(work)
            .expect("a worker waits for its work or has ended the process");
    }
    let asked = control.receive();
    serving
        .close(&object)
        .map_err(DiskError::io("syncing the volume"))?;
    match asked? {
        None | Some(ToDisk::Close) => Ok(()),
        Some(ToDisk::Grant { .. }) => Err(DiskError::Protocol {
            subject: "message from warden",
            why: "a second grant",
        }),
    }
}

/// The file that the opened grant is for.
fn open(
    arguments: &Arguments,
    backing: File,
    template: Option<File>,
    opened: &Opened,
) -> Result<Object<File>, DiskError> {
    let grant = Grant::parse(&opened.grant)?;
    let size_bytes = u64::from(arguments.size_mb) << 20;
    let volume = open_or_format(
        backing,
        template.as_ref(),
        &grant,
        opened.format,
        size_bytes,
    )?;
    Ok(Object::new(Identity::new(&grant)?, volume))
}

/// A grant that was sealed to this process.
struct Opened {
    grant: Zeroizing<Vec<u8>>,
    format: bool,
}

/// Waits for the grant; `None` if the process is to end instead.
fn receive_grant(control: &Control, key: &SecretKey) -> Result<Option<Opened>, DiskError> {
    match control.receive()? {
        None | Some(ToDisk::Close) => Ok(None),
        Some(ToDisk::Grant {
            sealed,
            aad,
            format,
        }) => Ok(Some(Opened {
            grant: grant::open(key, &sealed, &aad)?,
            format,
        })),
    }
}

/// What a worker's thread gets once the volume is open.
struct Work {
    worker: Worker<File>,
    object: Object<File>,
    serving: Arc<Serving>,
}

/// A thread in its sandbox, waiting for its work.
fn start_worker() -> Result<mpsc::Sender<Work>, DiskError> {
    let ended = |why: String| DiskError::Sandbox {
        operation: "thread",
        why,
    };
    let (work_in, work) = mpsc::channel::<Work>();
    let (confined_in, confined) = mpsc::channel();
    thread::Builder::new()
        .name("fuse".to_owned())
        .spawn(move || {
            let entered = sandbox::enter();
            let failed = entered.is_err();
            if confined_in.send(entered).is_err() || failed {
                return;
            }
            if let Ok(work) = work.recv() {
                serve(work);
            }
        })
        .map_err(|why| ended(why.to_string()))?;
    confined.recv().map_err(|why| ended(why.to_string()))??;
    Ok(work_in)
}

/// Serves until the mount is gone; then there is nothing left to do for the whole process.
fn serve(mut work: Work) {
    let result = match work.worker.serve() {
        Ok(End::Closed) => return, // Whoever closed it ends the process.
        Ok(End::MountGone) => Ok(()),
        Err(error) => Err(error),
    };
    let code = match result.and(work.serving.close(&work.object)) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("casemate-disk: serving: {error}");
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
    files: Files,
}

struct Files {
    backing: File,
    /// The worker's queues: the same one twice if there is but one.
    fuse: [Arc<File>; WORKERS],
    template: Option<File>,
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
        let backing = take_fd(BACKING_FD).ok_or(missing("descriptor 4 (backing file)"))?;
        let fuse = take_fd(FUSE_FD).ok_or(missing("descriptor 5 (/dev/fuse)"))?;
        let second = take_fd(FUSE_CLONE_FD)
            .map(|fd| join_queue(fd, &fuse))
            .transpose()?;
        let fuse = Arc::new(File::from(fuse));
        let second = second.unwrap_or_else(|| Arc::clone(&fuse));
        let template = take_fd(TEMPLATE_FD).map(File::from);
        let files = Files {
            backing: File::from(backing),
            fuse: [fuse, second],
            template,
        };
        Ok(Self { control, files })
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

    fn parse(text: &str) -> Result<Arguments, DiskError> {
        Arguments::parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments_come_once_each_and_within_bounds() {
        let text = "--size-mb 64 --bytes-per-s 65536 --ops-per-s 1 --uid 910000";
        let want = Arguments {
            size_mb: 64,
            bytes_per_s: 65536,
            ops_per_s: 1,
            uid: Some(910_000),
        };
        assert_eq!(parse(text).unwrap(), want);
        let anybody = parse(text.split(" --uid").next().unwrap()).unwrap();
        assert_eq!(anybody, Arguments { uid: None, ..want });
        for (from, to, named) in [
            ("--size-mb 64", "", "--size-mb: missing"),
            ("--size-mb 64", "--size-mb 0", "--size-mb: out of bounds"),
            (
                "--size-mb 64",
                "--size-mb 999999999",
                "--size-mb: out of bounds",
            ),
            ("--size-mb 64", "--size-mb -1", "--size-mb: needs a number"),
            (
                "--ops-per-s 1",
                "--ops-per-s 1 --ops-per-s 1",
                "--ops-per-s: given twice",
            ),
            (
                "--bytes-per-s 65536",
                "--bytes-per-s 1",
                "--bytes-per-s: out of bounds",
            ),
            ("--uid 910000", "--uid 4294967295", "--uid: out of bounds"),
            ("--uid 910000", "--uid", "--uid: needs a number"),
            ("--uid 910000", "--key 1", "arguments: only"),
        ] {
            let error = parse(&text.replace(from, to)).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }
}
