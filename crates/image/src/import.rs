//! An import, from the command's side: it opens files, starts workers, and puts the result in
//! place. It parses nothing of the image but a signed payload.
//!
//! ```text
//! lock ─▶ sweep ─▶ fetch or collect (own process) ─▶ signature ─▶ unpack (own process)
//!      ─▶ SHA-256 ─▶ journal ─▶ rename into images/ ─▶ manifest.json ─▶ scratch removed
//! ```
//!
//! Killed at any step, the next import's sweep leaves nothing of it: the scratch directory holds
//! all but the renamed file, and names that one before it is renamed.

use crate::error::{Error, os};
use crate::limits::Limits;
use crate::oci::Digest;
use crate::policy::{LOCAL, Policy, Require};
use crate::reference::Source as From;
use crate::registry::{Fetch, FromFetcher, Published};
use crate::signature;
use crate::store::{Image, Source, Store};
use crate::unpack::{Done, Job};
use crate::wire::{self, FromWorker, ToWorker};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

type Result<T> = std::result::Result<T, Error>;

/// What to import, and how.
pub struct Import<'a> {
    /// Where images are.
    pub store: &'a Store,
    /// The `casemate-image` executable.
    pub worker: PathBuf,
    /// User and group of the workers; none: the caller's own (tests without root).
    pub user: Option<(u32, u32)>,
    /// Where the image is.
    pub source: From,
    /// The source as it was written.
    pub source_text: String,
    /// Its name here.
    pub name: String,
    /// The image that must be found there.
    pub digest: Option<Digest>,
    /// What is taken.
    pub policy: Policy,
    /// Plain HTTP to 127.0.0.1.
    pub insecure_http: bool,
    /// PEM of the registry's CA.
    pub ca: Option<PathBuf>,
    /// Hears what is being done.
    pub progress: &'a mut dyn FnMut(&str),
}

/// An image that was imported.
#[derive(Debug)]
pub struct Imported {
    /// As the manifest has it.
    pub image: Image,
    /// Its file's length, bytes.
    pub bytes: u64,
    /// Entries of all of its layers.
    pub entries: u64,
}

/// The import's own directory; removed when it ends.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is swept by the next import.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const SCRATCH: &str = ".import-";
const JOURNAL: &str = "journal";

impl Import<'_> {
    /// Imports.
    ///
    /// # Errors
    /// See [`Error`]; nothing of the import stays.
    pub fn run(mut self) -> Result<Imported> {
        check_name(&self.name)?;
        let digest = self.admitted()?;
        let _lock = self.store.lock()?;
        sweep(self.store)?;
        let scratch = Scratch(
            self.store
                .images()
                .join(format!("{SCRATCH}{}", std::process::id())),
        );
        make_dir(&scratch.0, 0o711)?;
        let (layout, tag, signed_by) = self.layout(&scratch.0, digest)?;
        let job = Job {
            digest,
            tag,
            limits: self.policy.limits,
            allow_setuid: self.policy.allow_setuid.clone(),
            allow_capabilities: self.policy.allow_capabilities.clone(),
        };
        let new = scratch.0.join("image");
        let done = self.unpack(&job, &layout, &scratch.0, &new)?;
        (self.progress)("checking in");
        let id = self.place(&scratch.0, &new)?;
        let image = Image {
            description: format!("imported from {}", shorten(&self.source_text)),
            source: Some(Source {
                reference: self.source_text.clone(),
                digest: digest.unwrap_or(done.manifest),
                imported_at: jiff::Timestamp::now()
                    .strftime("%Y-%m-%dT%H:%M:%SZ")
                    .to_string(),
                signed_by,
                config: done.config,
            }),
            name: self.name,
            id,
        };
        self.store.put(&image)?;
        Ok(Imported {
            image,
            bytes: done.bytes,
            entries: done.entries,
        })
    }

    /// The digest that the source is pinned to by now, if the policy takes the source at all.
    fn admitted(&self) -> Result<Option<Digest>> {
        let name = match &self.source {
            From::Registry(r) => r.name(),
            From::Layout { .. } | From::Archive { .. } => LOCAL.into(),
        };
        let rule = self.policy.rule(&name);
        if rule.require == Require::Refuse {
            let what = format!("{name} is not taken: add a [[rule]] for it, or another default");
            return Err(Error::Policy(what));
        }
        let pinned = match &self.source {
            From::Registry(r) => r.digest,
            _ => None,
        };
        let digest = match (pinned, self.digest) {
            (Some(a), Some(b)) if a != b => {
                let what = "--digest is not the digest of the source";
                return Err(Error::Usage(what.into()));
            }
            (a, b) => a.or(b),
        };
        // A file of the operator's own needs no pin, unless a rule for `local` says so.
        let must = matches!(self.source, From::Registry(_)) || rule.names(LOCAL);
        if digest.is_none() && must {
            return Err(Error::Usage(format!(
                "{name}: a tag can be moved, so the image is named by its digest \
                 (…@sha256:…, or --digest); --resolve prints the digest that a tag has now"
            )));
        }
        Ok(digest)
    }

    /// A layout's directory with the image in it, and whose signature it has.
    fn layout(
        &mut self,
        scratch: &Path,
        digest: Option<Digest>,
    ) -> Result<(File, Option<String>, Option<String>)> {
        let fetched = scratch.join("layout");
        let directory = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty());
            fd.map(File::from)
                .map_err(os(format!("open the layout {}", path.display())))
        };
        match self.source.clone() {
            From::Layout { dir, tag } => Ok((directory(&dir)?, tag, None)),
            From::Archive { file, tag } => {
                self.worker_dir(&fetched)?;
                let archive = File::open(&file)
                    .map_err(os(format!("open the archive {}", file.display())))?;
                (self.progress)("reading the archive");
                self.collect(&archive, &fetched)?;
                Ok((directory(&fetched)?, tag, None))
            }
            From::Registry(reference) => {
                self.worker_dir(&fetched)?;
                let name = reference.name();
                let rule = self.policy.rule(&name).clone();
                let mut fetch = Fetch::new(&reference, digest, &fetched);
                fetch.signatures = rule.require == Require::Signature;
                fetch.insecure_http = self.insecure_http;
                fetch.limits = self.policy.limits;
                fetch.ca.clone_from(&self.ca);
                let (_, signatures) = run_fetch(&self.worker, self.user, &fetch, self.progress)?;
                let by = match (&digest, rule.require) {
                    (Some(digest), Require::Signature) => {
                        Some(signature::check(&rule, &name, digest, &signatures)?)
                    }
                    _ => None,
                };
                Ok((directory(&fetched)?, None, by))
            }
        }
    }

    /// A directory that the worker may fill.
    fn worker_dir(&self, path: &Path) -> Result<()> {
        make_dir(path, 0o700)?;
        if let Some((uid, gid)) = self.user {
            chown(path, Some(uid), Some(gid)).map_err(os("give the worker its directory"))?;
        }
        Ok(())
    }

    fn collect(&self, archive: &File, to: &Path) -> Result<()> {
        let mut worker = Worker::start(&self.worker, self.user, "collect")?;
        let job = (to, self.policy.limits);
        wire::send(&worker.socket, &job, &[archive])?;
        worker.answer(|message: FromFetcher, _| match message {
            FromFetcher::Done(_) => Ok(Some(())),
            FromFetcher::Refused(r) => Err(r.into()),
            FromFetcher::Failed(why) => Err(Error::Worker(why)),
            FromFetcher::Progress(_) | FromFetcher::Signature(_) => Ok(None),
        })
    }

    fn unpack(&mut self, job: &Job, layout: &File, scratch: &Path, new: &Path) -> Result<Done> {
        let open = |path: &Path| {
            let mut options = File::options();
            let file = options.read(true).write(true).create_new(true).open(path);
            file.map_err(os(format!("make {}", path.display())))
        };
        let (out, spool_path) = (open(new)?, scratch.join("spool"));
        let spool = open(&spool_path)?;
        // Only descriptors of it are left.
        std::fs::remove_file(&spool_path).map_err(os("unlink the spool"))?;
        let mut worker = Worker::start(&self.worker, self.user, "unpack")?;
        wire::send(&worker.socket, &ToWorker::Job(job.clone()), &[&spool, &out])?;
        let progress = &mut *self.progress;
        worker.answer(|message: FromWorker, socket| {
            let path = match message {
                FromWorker::Index => "index.json".to_owned(),
                FromWorker::Blob(digest) => format!("blobs/sha256/{}", digest.hex()),
                FromWorker::Progress(what) => {
                    progress(&printable(&what));
                    return Ok(None);
                }
                FromWorker::Done(done) => return Ok(Some(done)),
                FromWorker::Refused(r) => return Err(r.into()),
                FromWorker::Failed(why) => return Err(Error::Worker(printable(&why))),
            };
            match open_regular(layout, &path)? {
                Some(file) => wire::send(socket, &ToWorker::Here, &[&file])?,
                None => wire::send(socket, &ToWorker::Missing, &[])?,
            }
            Ok(None)
        })
    }

    /// Names the file by its contents and moves it to its place.
    fn place(&self, scratch: &Path, new: &Path) -> Result<String> {
        let mut file = File::open(new).map_err(os("open the new image"))?;
        file.set_permissions(PermissionsExt::from_mode(0o644))
            .and_then(|()| file.sync_all())
            .map_err(os("sync the new image"))?;
        let mut hash = seal::hash::Sha256::new();
        let mut buf = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buf).map_err(os("read the new image"))?;
            if n == 0 {
                break;
            }
            hash.update(&buf[..n]);
        }
        let id = hex::encode(hash.finish());
        let to = self.store.file(&id);
        if !to.exists() {
            service::files::write_atomic(&scratch.join(JOURNAL), id.as_bytes(), 0o600)
                .and_then(|()| service::files::sync_dir(&self.store.images()))
                .map_err(os("journal the new image"))?;
        }
        std::fs::rename(new, &to)
            .and_then(|()| service::files::sync_dir(&self.store.images()))
            .map_err(os(format!("rename to {}", to.display())))?;
        Ok(id)
    }
}

/// Asks a registry which digest a tag has now; fetches nothing else.
///
/// # Errors
/// The registry's.
pub fn resolve(worker: &Path, user: Option<(u32, u32)>, fetch: &Fetch) -> Result<Digest> {
    let mut fetch = fetch.clone();
    fetch.digest = None;
    run_fetch(worker, user, &fetch, &mut |_| {}).map(|(digest, _)| digest)
}

fn run_fetch(
    worker: &Path,
    user: Option<(u32, u32)>,
    fetch: &Fetch,
    progress: &mut dyn FnMut(&str),
) -> Result<(Digest, Vec<Published>)> {
    let mut worker = Worker::start(worker, user, "fetch")?;
    wire::send(&worker.socket, fetch, &[])?;
    let mut signatures = Vec::new();
    let digest = worker.answer(|message: FromFetcher, _| {
        match message {
            FromFetcher::Progress(what) => progress(&printable(&what)),
            FromFetcher::Signature(s) if signatures.len() < crate::limits::SIGNATURES_MAX => {
                signatures.push(s);
            }
            FromFetcher::Signature(_) => {}
            FromFetcher::Done(digest) => return Ok(Some(digest)),
            FromFetcher::Refused(r) => return Err(r.into()),
            FromFetcher::Failed(why) => return Err(Error::Worker(printable(&why))),
        }
        Ok(None)
    })?;
    Ok((digest, signatures))
}

/// Removes what a killed import left.
///
/// # Errors
/// The file system's.
pub fn sweep(store: &Store) -> Result<()> {
    let dir = store.images();
    let known: Vec<String> = store.list()?.into_iter().map(|i| i.id).collect();
    for entry in std::fs::read_dir(&dir).map_err(os(format!("read {}", dir.display())))? {
        let entry = entry.map_err(os("read the images"))?;
        if !entry.file_name().to_string_lossy().starts_with(SCRATCH) {
            continue;
        }
        let path = entry.path();
        // Renamed, but not in the manifest yet.
        if let Ok(id) = service::files::read_bounded(&path.join(JOURNAL), 64)
            && let Ok(id) = String::from_utf8(id)
            && id.len() == 64
            && id.bytes().all(|b| b.is_ascii_hexdigit())
            && !known.contains(&id)
        {
            let _ = std::fs::remove_file(store.file(&id));
        }
        std::fs::remove_dir_all(&path).map_err(os(format!("remove {}", path.display())))?;
    }
    Ok(())
}

/// A worker process and the socket to it; killed when this goes.
struct Worker {
    child: Child,
    socket: OwnedFd,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Worker {
    fn start(exe: &Path, user: Option<(u32, u32)>, what: &str) -> Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(os("make a socket pair"))?;
        let mut command = Command::new("setpriv");
        // The command's death is the worker's.
        command.args(["--pdeathsig", "KILL", "--no-new-privs"]);
        if let Some((uid, gid)) = user {
            command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
            command.args(["--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
        }
        command
            .arg("--")
            .arg(exe)
            .arg(what)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command
            .spawn()
            .map_err(os(format!("start {} with setpriv", exe.display())))?;
        Ok(Self {
            child,
            socket: ours,
        })
    }

    /// Hears messages until one is the last.
    fn answer<M: serde::de::DeserializeOwned, A>(
        &mut self,
        mut hear: impl FnMut(M, &OwnedFd) -> Result<Option<A>>,
    ) -> Result<A> {
        while let Some((message, _)) = wire::receive::<M>(&self.socket)? {
            if let Some(answer) = hear(message, &self.socket)? {
                return Ok(answer);
            }
        }
        let status = self.child.wait().map_err(os("wait for a worker"))?;
        Err(Error::Worker(format!(
            "the worker ended ({status}) before it was done: the image is beyond the worker's memory \
             or CPU time, or {} can't be run",
            "casemate-image"
        )))
    }
}

/// Opens a regular file of the layout, through no link; none if it is not there.
fn open_regular(layout: &File, path: &str) -> Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(layout, path, flags, Mode::empty(), beneath) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::LOOP) => return Ok(None),
        Err(e) => return Err(os(format!("open {path} of the layout"))(e)),
    };
    let meta = file.metadata().map_err(os("look at a blob"))?;
    Ok(meta.is_file().then_some(file))
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    std::fs::create_dir(path)
        .and_then(|()| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)))
        .map_err(os(format!("make {}", path.display())))
}

/// As host reads names.
fn check_name(name: &str) -> Result<()> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"-_./:".contains(&b);
    if (1..=128).contains(&name.len()) && name.bytes().all(ok) {
        return Ok(());
    }
    Err(Error::Usage(
        "--name: 1 to 128 letters, digits, - _ . / and :".into(),
    ))
}

/// A worker's text, for a terminal.
fn printable(text: &str) -> String {
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(600).collect()
}

fn shorten(text: &str) -> String {
    printable(text).chars().take(160).collect()
}

/// The work of `collect`, as it is sent.
pub(crate) type CollectJob = (PathBuf, Limits);
