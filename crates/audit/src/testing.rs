//! A small installation in a temporary directory: the processes' own code, one uid.
#![allow(clippy::unwrap_used)]

use crate::append::keys::Keys;
use crate::disk::Disk;
use crate::{append, integrate, read};
use api::audit::{Appended, Class as ApiClass, Entry, Op, Phase};
use api::rpc::Client;
use model::AccountId;
use seal::hpke::SecretKey;
use seal::sign::VerifyingKey;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use service::rpc::Uids;
use std::path::{Path, PathBuf};
use tlog::checkpoint::Checkpoint;
use tlog::class::Class;
use tlog::limits::BUNDLE_BYTES_MAX;
use tlog::tile::{Kind, Tile};
use tlog::verify::{Expected, LogReader, Report, verify};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) const DAY_MS: u64 = tlog::leaf::DAY_MS;
/// The time at which tests begin.
pub(crate) const TIME_MS: u64 = 20_000 * DAY_MS + 1_000;

pub(crate) struct World {
    /// Held so that it lives as long as the world.
    _dir: tempfile::TempDir,
    pub(crate) paths: Paths,
    pub(crate) config: Config,
    pub(crate) clock: Clock,
    /// Seed of the day keys' private half.
    pub(crate) day_key: [u8; 32],
    pub(crate) log_key: VerifyingKey,
    /// As whom append and read know this process's uid.
    pub(crate) me: &'static str,
    pub(crate) reader: &'static str,
    processes: Vec<(watch::Sender<bool>, JoinHandle<anyhow::Result<()>>)>,
}

impl World {
    /// An installation that was prepared, with day keys, and does not run.
    pub(crate) fn new() -> World {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        for process in [append::PROCESS, integrate::PROCESS, read::PROCESS, "kms"] {
            std::fs::create_dir_all(paths.state(process)).unwrap();
            std::fs::create_dir_all(paths.run().join(process)).unwrap();
        }
        std::fs::create_dir_all(paths.trust()).unwrap();
        let config = Config::default();
        let log_key = integrate::init(&paths, &config).unwrap();
        append::init(&paths).unwrap();
        std::fs::write(paths.trust().join(service::trust::AUDIT), log_key.to_hex()).unwrap();
        let day_key = seal::random::bytes();
        let days = SecretKey::from_seed(&day_key);
        days_publish(&paths.state(append::PROCESS), &days, 20_000..20_010);
        World {
            _dir: dir,
            paths,
            config,
            clock: Clock::manual(TIME_MS),
            day_key,
            log_key,
            me: "control",
            reader: "root",
            processes: Vec::new(),
        }
    }

    /// Starts integrate and append.
    pub(crate) async fn start(&mut self) {
        self.start_integrate().await;
        self.start_append().await;
    }

    pub(crate) async fn start_integrate(&mut self) {
        let (paths, config) = (self.paths.clone(), self.config.clone());
        let uids = Uids::from_map([(append::PROCESS.to_owned(), uid())].into());
        self.run(integrate::PROCESS, "integrate", |stop| async move {
            integrate::run(&paths, &config, uids, stop).await
        })
        .await;
    }

    pub(crate) async fn start_append(&mut self) {
        let (paths, clock) = (self.paths.clone(), self.clock.clone());
        let uids = Uids::from_map([(self.me.to_owned(), uid())].into());
        self.run(append::PROCESS, "append", |stop| async move {
            append::run(&paths, uids, clock, stop).await
        })
        .await;
    }

    pub(crate) async fn start_read(&mut self) {
        let (paths, config) = (self.paths.clone(), self.config.clone());
        let uids = Uids::from_map([(self.reader.to_owned(), uid())].into());
        self.run(read::PROCESS, "read", |stop| async move {
            read::run(&paths, &config, uids, stop).await
        })
        .await;
    }

    /// Stands in for the KMS: opens batch keys with the world's day key.
    pub(crate) fn start_kms(&mut self) {
        let listener = service::rpc::bind(&self.paths.socket("kms", "kms")).unwrap();
        let (stop, stopped) = watch::channel(false);
        let key = std::sync::Arc::new(self.day_key);
        let handler = move |_: service::rpc::Peer, _: String, op: api::kms::Op| {
            let key = std::sync::Arc::clone(&key);
            async move {
                let api::kms::Op::LogOpen { wraps, .. } = op else {
                    return Err(api::Error::internal("not asked here"));
                };
                let key = SecretKey::from_seed(&key);
                let info = api::context::LOG_CLASS.as_bytes();
                let open = |wrap: &String| {
                    use base64::Engine as _;
                    let wrap = base64::engine::general_purpose::STANDARD
                        .decode(wrap)
                        .unwrap();
                    let key = seal::hpke::open(&key, info, &[], &wrap).unwrap();
                    hex::encode(&*key)
                };
                service::rpc::ok(&wraps.iter().map(open).collect::<Vec<_>>())
            }
        };
        let uids = Uids::from_map([(read::PROCESS.to_owned(), uid())].into());
        let task = tokio::spawn(async move {
            service::rpc::serve(
                listener,
                std::sync::Arc::new(uids),
                &[read::PROCESS],
                stopped,
                handler,
            )
            .await;
            Ok(())
        });
        self.processes.push((stop, task));
    }

    async fn run<F>(
        &mut self,
        process: &str,
        socket: &str,
        main: impl FnOnce(watch::Receiver<bool>) -> F,
    ) where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(main(stopped));
        let path = self.paths.socket(process, socket);
        wait_for(|| std::os::unix::net::UnixStream::connect(&path).is_ok() || task.is_finished())
            .await;
        self.processes.push((stop, task));
    }

    /// Stops all processes, the last one first, and returns what they ended with, in that order.
    pub(crate) async fn stop(&mut self) -> Vec<anyhow::Result<()>> {
        let mut out = Vec::new();
        while let Some((stop, task)) = self.processes.pop() {
            stop.send_replace(true);
            out.push(task.await.unwrap());
        }
        out
    }

    /// Stops the process that was started first.
    pub(crate) async fn stop_first(&mut self) {
        let (stop, task) = self.processes.remove(0);
        stop.send_replace(true);
        task.await.unwrap().unwrap();
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.paths.socket(append::PROCESS, "append"))
    }

    /// Verifies a log offline.
    pub(crate) fn verify(&self, class: Class) -> Report {
        verify_dir(
            &integrate::log_dir(&self.paths, class),
            class,
            &self.log_key,
        )
    }
}

pub(crate) fn verify_dir(dir: &Path, class: Class, key: &VerifyingKey) -> Report {
    verify_known(dir, class, key, &[])
}

pub(crate) fn verify_known(
    dir: &Path,
    class: Class,
    key: &VerifyingKey,
    known: &[Checkpoint],
) -> Report {
    let expected = Expected {
        origin: &class.origin("local").unwrap(),
        class,
        log_key: key,
        witnesses: &[],
        witnesses_min: 0,
        known,
    };
    verify(&Directory::new(dir), &expected)
}

/// Publishes day keys as the KMS would, before the process starts.
pub(crate) fn days_publish(dir: &Path, key: &SecretKey, days: std::ops::Range<u32>) {
    let mut keys = Keys::open(dir).unwrap();
    let today = days.start;
    let all = Class::ALL
        .into_iter()
        .flat_map(|class| days.clone().map(move |day| (class, day, key.public())));
    keys.days_set(all, today).unwrap();
}

pub(crate) fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

/// Polls until `what` is so; fails after ten seconds.
pub(crate) async fn wait_for(mut what: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if what() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("it did not happen");
}

pub(crate) fn entry(event: &str, account: Option<u8>) -> Entry {
    Entry {
        event: event.into(),
        phase: Phase::Intent,
        request_id: "req_0000000000000001".into(),
        account: account.map(|n| AccountId::from_bytes([n; 8])),
        actor: "key_0000000000000001".into(),
        subject: None,
        authority: None,
        lease: None,
        result: None,
        data: serde_json::Map::new(),
    }
}

pub(crate) async fn append(
    client: &Client,
    class: ApiClass,
    entry: Entry,
    want_receipt: bool,
) -> api::Result<Appended> {
    let entry = Box::new(entry);
    client
        .call(
            "r",
            &Op::Append {
                class,
                entry,
                want_receipt,
            },
        )
        .await
}

/// A disk that does not fail.
pub(crate) fn disk() -> Disk {
    Disk::default()
}

/// A temporary directory in memory where there is one: these tests bring their own disk.
pub(crate) fn temp_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

pub(crate) fn hash(text: &str) -> tlog::merkle::Hash {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    bytes.try_into().unwrap()
}

/// All entries of the log in `dir`.
pub(crate) fn bundle_entries(dir: &Path, size: u64) -> Vec<Vec<u8>> {
    let bundles = tlog::tile::tiles_of(size, 0).filter(|t| t.kind() == Kind::Entries);
    let directory = Directory::new(dir);
    bundles
        .flat_map(|tile| {
            let bytes = directory.read(&tile.path()).unwrap();
            let entries = tile.bundle_decode(&bytes).unwrap();
            entries.iter().map(|e| e.to_vec()).collect::<Vec<_>>()
        })
        .collect()
}

/// A log's directory for the verifier. A partial tile that has made way for the full one is read
/// from that: the log may be growing.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Directory {
        Directory(dir.into())
    }

    fn walk(&self, at: &Path, out: &mut Vec<String>) {
        for entry in std::fs::read_dir(self.0.join(at))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = at.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                self.walk(&path, out);
            } else {
                out.push(path.to_str().unwrap().to_owned());
            }
        }
    }
}

impl LogReader for Directory {
    fn read(&self, path: &str) -> Option<Vec<u8>> {
        let file = |path: &str| {
            service::files::read_bounded(&self.0.join(path), BUNDLE_BYTES_MAX as u64).ok()
        };
        if let Some(bytes) = file(path) {
            return Some(bytes);
        }
        let tile = Tile::parse(path).ok().filter(Tile::is_partial)?;
        let mut full = file(&tile.full().path())?;
        let width = usize::from(tile.width());
        let len = match tile.kind() {
            Kind::Hashes(_) => width * 32,
            Kind::Entries => {
                let entries = tile.full().bundle_decode(&full).ok()?;
                entries
                    .iter()
                    .take(width)
                    .map(|entry| 2 + entry.len())
                    .sum()
            }
        };
        full.truncate(len);
        Some(full)
    }

    fn list(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.walk(Path::new("tile"), &mut out);
        out.sort();
        out
    }
}
