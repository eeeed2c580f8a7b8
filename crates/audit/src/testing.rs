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
use std::path::Path;
use tlog::class::Class;
use tlog::verify::{Expected, Report, verify};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) const DAY_MS: u64 = tlog::leaf::DAY_MS;
/// The time at which tests begin.
pub(crate) const TIME_MS: u64 = 20_000 * DAY_MS + 1_000;

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) paths: Paths,
    pub(crate) config: Config,
    pub(crate) clock: Clock,
    pub(crate) day_key: SecretKey,
    pub(crate) log_key: VerifyingKey,
    /// As whom this process's uid is known.
    pub(crate) me: &'static str,
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
        let day_key = SecretKey::generate();
        days_publish(&paths.state(append::PROCESS), &day_key, 20_000..20_010);
        World {
            dir,
            paths,
            config,
            clock: Clock::manual(TIME_MS),
            day_key,
            log_key,
            me: "control",
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
        let uids = Uids::from_map([("root".to_owned(), uid())].into());
        self.run(read::PROCESS, "read", |stop| async move {
            read::run(&paths, &config, uids, stop).await
        })
        .await;
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
    let expected = Expected {
        origin: &class.origin("local").unwrap(),
        class,
        log_key: key,
        witnesses: &[],
        witnesses_min: 0,
        known: &[],
    };
    verify(&integrate::tiles::Directory::new(dir), &expected)
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
