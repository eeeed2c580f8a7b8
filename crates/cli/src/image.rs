//! `casemate image`: images from elsewhere, and those that are here.

use anyhow::Context as _;
use image::import::{self, Import};
use image::policy::Policy;
use image::reference::Source;
use image::registry::Fetch;
use image::store::{self, Image, Store};
use image::{Error, oci::Digest};
use serde::Deserialize;
use service::paths::Paths;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The workers' user.
const USER: &str = "casemate-image";
/// Progress is said of what takes longer than this.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest file of a desired state, bytes.
const DESIRED_MAX_BYTES: u64 = 4 << 20;

/// What to do with images.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Import an OCI image as a base for workspaces (root).
    ///
    /// SOURCE is oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY@sha256:…
    Import {
        /// Where the image is.
        source: String,
        /// Its name on this machine; an image of that name is replaced for new workspaces.
        #[arg(long, required_unless_present = "resolve")]
        name: Option<String>,
        /// The image that must be found there.
        #[arg(long)]
        digest: Option<Digest>,
        /// What is taken: a policy file; /etc/casemate/images.toml if it is there.
        #[arg(long, value_name = "FILE")]
        policy: Option<PathBuf>,
        /// Print the digest that a tag of a registry has now, and import nothing.
        #[arg(long)]
        resolve: bool,
        /// Trust this CA (PEM) only.
        #[arg(long, value_name = "FILE")]
        ca: Option<PathBuf>,
        /// Plain HTTP, to 127.0.0.1 only.
        #[arg(long)]
        insecure_http: bool,
    },
    /// Show the images of this machine.
    Ls,
    /// Remove an image (root).
    Rm {
        /// Its name.
        name: String,
        /// Even if workspaces are of it; they can't be started again.
        #[arg(long)]
        force: bool,
    },
}

/// Runs the command; its exit code.
///
/// # Errors
/// Why it failed, and what to do.
pub fn run(paths: &Paths, command: Command, as_json: bool) -> anyhow::Result<u8> {
    let store = Store::new(&paths.artifacts());
    let result = match command {
        Command::Import {
            source,
            name,
            digest,
            policy,
            resolve,
            ca,
            insecure_http,
        } => {
            let user = Some(crate::supervise::install::user_ensure(USER)?);
            let ca = ca.map(std::path::absolute).transpose().context("--ca")?;
            let worker = crate::supervise::install::exe_dir()?.join("casemate-image");
            if resolve {
                let Source::Registry(reference) = source.parse()? else {
                    anyhow::bail!("--resolve asks a registry: docker://HOST/REPOSITORY[:TAG]");
                };
                let mut fetch = Fetch::new(&reference, None, Path::new("/nonexistent"));
                fetch.insecure_http = insecure_http;
                fetch.ca = ca;
                import::resolve(&worker, user, &fetch).map(|digest| {
                    println!("docker://{}@{digest}", reference.name());
                })
            } else {
                let mut progress = Progress::new();
                let import = Import {
                    store: &store,
                    worker,
                    user,
                    source: source.parse()?,
                    source_text: source,
                    name: name.unwrap_or_default(),
                    digest,
                    policy: policy_of(paths, policy)?,
                    insecure_http,
                    ca,
                    progress: &mut |what| progress.say(what),
                };
                let done = import.run();
                progress.end();
                done.map(|done| say_imported(&done, as_json))
            }
        }
        Command::Ls => list(&store, as_json),
        Command::Rm { name, force } => in_use(paths)
            .and_then(|used| store::remove(&store, &name, &used, force))
            .map(|image| {
                if as_json {
                    println!(
                        "{}",
                        serde_json::json!({"removed": image.name, "id": image.id})
                    );
                } else {
                    println!("removed {}", image.name);
                }
            }),
    };
    match result {
        Ok(()) => Ok(0),
        Err(e) => {
            let code = match &e {
                Error::Policy(_) => 4,
                Error::Busy(_) => 6,
                _ => 1,
            };
            if as_json {
                let refusal = match &e {
                    Error::Refused(refusal) => serde_json::to_value(refusal)?,
                    _ => serde_json::Value::Null,
                };
                println!(
                    "{}",
                    serde_json::json!({"error": e.to_string(), "refusal": refusal})
                );
            } else {
                eprintln!("casemate: {e}");
            }
            Ok(code)
        }
    }
}

fn policy_of(paths: &Paths, named: Option<PathBuf>) -> Result<Policy, Error> {
    let usual = paths.etc().join("images.toml");
    match named {
        Some(path) => Policy::load(&path),
        None if usual.exists() => Policy::load(&usual),
        None => Ok(Policy::default()),
    }
}

fn say_imported(done: &import::Imported, as_json: bool) {
    let image = &done.image;
    if as_json {
        println!("{}", shown(image, done.bytes));
        return;
    }
    println!(
        "imported {} ({} MiB, {} entries)",
        image.name,
        done.bytes >> 20,
        done.entries
    );
    println!("  id      {}", image.id);
    if let Some(source) = &image.source {
        println!("  digest  {}", source.digest);
        if let Some(key) = &source.signed_by {
            println!("  signed  by key {key}");
        }
    }
}

fn list(store: &Store, as_json: bool) -> Result<(), Error> {
    let bytes = |i: &Image| store.file(&i.id).metadata().map_or(0, |m| m.len());
    let images = store.list()?;
    if as_json {
        let all: Vec<_> = images.iter().map(|i| shown(i, bytes(i))).collect();
        println!("{}", serde_json::Value::from(all));
        return Ok(());
    }
    println!(
        "{:<24} {:<12} {:>8}  {:<20}  SOURCE",
        "NAME", "ID", "SIZE", "IMPORTED"
    );
    for image in &images {
        let (at, source) = image
            .source
            .as_ref()
            .map_or(("-", "made here".to_owned()), |s| {
                (s.imported_at.as_str(), s.digest.to_string())
            });
        let id = image.id.get(..12).unwrap_or(&image.id);
        let mib = bytes(image) >> 20;
        println!(
            "{:<24} {id:<12} {mib:>4} MiB  {at:<20}  {source}",
            image.name
        );
    }
    Ok(())
}

fn shown(image: &Image, bytes: u64) -> serde_json::Value {
    let source = image.source.as_ref();
    serde_json::json!({
        "name": image.name,
        "id": image.id,
        "size_bytes": bytes,
        "description": image.description,
        "source": source.map(|s| &s.reference),
        "digest": source.map(|s| s.digest),
        "imported_at": source.map(|s| &s.imported_at),
        "signed_by": source.and_then(|s| s.signed_by.as_ref()),
        "config": source.map(|s| &s.config),
    })
}

/// Workspaces of this machine and the images they are of: host's desired states, as they stand on
/// disk, whether host runs or not.
fn in_use(paths: &Paths) -> Result<Vec<(String, String)>, Error> {
    #[derive(Deserialize)]
    struct File {
        desired: Desired,
    }
    #[derive(Deserialize)]
    struct Desired {
        workspace: String,
        image: String,
    }
    let dir = paths.state("host").join("desired");
    let failed = |e: std::io::Error, what: String| Error::Os { what, source: e };
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e, format!("read {}", dir.display()))),
    };
    let mut used = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|e| failed(e, format!("read {}", dir.display())))?
            .path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let bytes = match service::files::read_bounded(&path, DESIRED_MAX_BYTES) {
            Ok(bytes) => bytes,
            // Deleted since.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(e, format!("read {}", path.display()))),
        };
        let file: File = serde_json::from_slice(&bytes)
            .map_err(|e| failed(e.into(), format!("read {}", path.display())))?;
        used.push((file.desired.workspace, file.desired.image));
    }
    Ok(used)
}

/// A spinner on a terminal, lines elsewhere; silent for what is quick.
struct Progress {
    bar: Option<indicatif::ProgressBar>,
    start: Instant,
}

impl Progress {
    fn new() -> Self {
        Self {
            bar: None,
            start: Instant::now(),
        }
    }

    fn say(&mut self, what: &str) {
        use std::io::IsTerminal as _;
        if std::io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(crate::progress::spinner);
            bar.set_message(what.to_owned());
        } else if self.start.elapsed() > PATIENCE {
            eprintln!("{what}");
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
