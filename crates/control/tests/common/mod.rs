//! A world around control: the real daemon, and doubles of the processes it asks, each on its
//! real socket.
#![allow(dead_code, clippy::unwrap_used)]

pub mod doubles;
pub mod pg;

use doubles::Doubles;
use model::{AccountId, KeyId};
use seal::sign::{Signed, SigningKey};
use serde_json::Value;
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// One installation.
pub struct World {
    pub paths: Paths,
    pub config: Config,
    pub doubles: Arc<Doubles>,
    pub clock: Clock,
    pub postgres: Option<pg::Postgres>,
    control: Option<(Runtime, watch::Sender<bool>)>,
    next_jti: AtomicU64,
    _dir: tempfile::TempDir,
}

/// An answer.
#[derive(Debug)]
pub struct Got {
    pub status: u16,
    pub body: Value,
    pub request_id: String,
}

impl World {
    /// A world on SQLite, control running.
    pub async fn sqlite() -> Self {
        Self::with(None, |_| {}).await
    }

    /// Worlds on each store there is.
    pub async fn each() -> Vec<Self> {
        let mut all = vec![Self::sqlite().await];
        match pg::Postgres::start() {
            Some(pg) => all.push(Self::with(Some(pg), |_| {}).await),
            None => eprintln!("no PostgreSQL here: SQLite only"),
        }
        all
    }

    pub async fn with(postgres: Option<pg::Postgres>, f: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        for process in ["control", "kms", "mint", "host", "audit-append"] {
            std::fs::create_dir_all(paths.run().join(process)).unwrap();
        }
        std::fs::create_dir_all(paths.state("control")).unwrap();
        std::fs::create_dir_all(paths.trust()).unwrap();
        let doubles = Doubles::new();
        let me = rustix::process::getuid().as_raw();
        let names = ["control", "edge", "root", "host", "kms", "mint"];
        let uids: serde_json::Map<_, _> = names
            .into_iter()
            .map(|n| (n.to_owned(), me.into()))
            .collect();
        std::fs::write(paths.uids(), Value::Object(uids).to_string()).unwrap();
        for (name, key) in [
            ("mint.pub", &doubles.mint_key),
            ("kms.pub", &doubles.kms_key),
        ] {
            std::fs::write(paths.trust().join(name), key.public().to_hex()).unwrap();
        }
        let clock = Clock::manual(1_800_000_000_000);
        doubles.state().now_ms = clock.now_ms();
        doubles.serve(&paths);
        let mut config = Config::default();
        if let Some(pg) = &postgres {
            config.control.database = pg.url();
        }
        f(&mut config);
        let mut world = Self {
            paths,
            config,
            doubles,
            clock,
            postgres,
            control: None,
            next_jti: AtomicU64::new(1),
            _dir: dir,
        };
        world.start().await;
        world
    }

    /// Starts control in a runtime of its own, and waits until it answers.
    pub async fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = watch::channel(false);
        let (paths, config, clock) = (self.paths.clone(), self.config.clone(), self.clock.clone());
        runtime.spawn(async move {
            if let Err(e) = control::run(&paths, &config, clock, stopped).await {
                eprintln!("control: {e:#}");
            }
        });
        self.control = Some((runtime, stop));
        self.until("control answers", async || {
            let socket = self.paths.socket("control", "http");
            let stream = UnixStream::connect(&socket).await.ok()?;
            let got = exchange(stream, "GET", "/health", "", b"").await?;
            (got.status == 200).then_some(())
        })
        .await;
    }

    /// `kill -9`: nothing of it goes on, nothing is tidied up.
    pub fn kill(&mut self) {
        if let Some((runtime, _)) = self.control.take() {
            runtime.shutdown_background();
        }
    }

    /// Polls until something is there.
    pub async fn until<T>(&self, what: &str, mut f: impl AsyncFnMut() -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(v) = f().await {
                return v;
            }
            assert!(Instant::now() < end, "never: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// An assertion of an account for one request.
    pub fn assertion(&self, account: u8, method: &str, path: &str, body: &[u8]) -> String {
        let iat_ms = self.clock.now_ms();
        let n = self.next_jti.fetch_add(1, Ordering::Relaxed);
        let a = api::mint::Assertion {
            account: account_id(account),
            key: KeyId::from_bytes([account; 8]),
            binding: hex::encode(service::binding::request_hash(method, path, body)),
            iat_ms,
            exp_ms: iat_ms + 30_000,
            jti: format!("{n:032x}"),
        };
        Signed::new(&self.doubles.mint_key, api::context::ASSERTION, &a).to_string()
    }

    /// A request of an account.
    pub async fn ask(&self, account: u8, method: &str, path: &str, body: Value) -> Got {
        let body = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let assertion = self.assertion(account, method, path, &body);
        self.raw(
            method,
            path,
            &format!("casemate-assertion: {assertion}\r\n"),
            &body,
        )
        .await
    }

    /// A request that must succeed.
    pub async fn ok(&self, account: u8, method: &str, path: &str, body: Value) -> Value {
        let got = self.ask(account, method, path, body).await;
        assert!(got.status < 300, "{method} {path}: {got:?}");
        assert_eq!(got.body["success"], true, "{method} {path}");
        got.body
    }

    /// A request with headers of one's own.
    pub async fn raw(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Got {
        let socket = self.paths.socket("control", "http");
        let stream = UnixStream::connect(socket).await.unwrap();
        exchange(stream, method, path, headers, body).await.unwrap()
    }

    /// The clock goes on.
    pub fn pass_ms(&self, ms: u64) {
        self.clock.set_ms(self.clock.now_ms() + ms);
        self.doubles.state().now_ms = self.clock.now_ms();
    }

    /// Waits until a workspace of account 1 has this status; `gone` once there is none.
    pub async fn becomes(&self, id: &str, wanted: &str) {
        self.until(wanted, async || {
            let path = format!("/workspace/{id}");
            let got = self.ask(1, "GET", &path, Value::Null).await;
            let status = got.body["workspace"]["status"].as_str().unwrap_or("gone");
            (status == wanted).then_some(())
        })
        .await;
    }

    /// The `restart_info` of a workspace of account 1.
    pub async fn restart_info(&self, id: &str) -> Value {
        let path = format!("/workspace/{id}/lifecycle");
        self.ok(1, "GET", &path, Value::Null).await["restart_info"].take()
    }

    /// Waits until a restart is owed to a workspace, and lets its time come.
    pub async fn restart_comes_due(&self, id: &str) {
        self.until("an owed restart", async || {
            let info = self.restart_info(id).await;
            (info["state"] == "waiting").then_some(())
        })
        .await;
        self.pass_ms(model::lifecycle::RESTART_PAUSE_MAX_MS);
    }

    /// Makes a workspace of account 1; its id.
    pub async fn workspace(&self, body: Value) -> String {
        let made = self.ok(1, "POST", "/workspace", body).await;
        made["workspace"]["id"].as_str().unwrap().to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An account by number.
pub fn account_id(n: u8) -> AccountId {
    AccountId::from_bytes([n; 8])
}

/// A fresh key.
pub fn key() -> SigningKey {
    SigningKey::generate()
}

async fn exchange(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> Option<Got> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: control\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    // A server that refuses a large body need not read all of it.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let text = String::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let request_id = head
        .lines()
        .find_map(|l| l.strip_prefix("casemate-request-id: "))
        .unwrap_or_default();
    Some(Got {
        status,
        body: serde_json::from_str(body).ok()?,
        request_id: request_id.to_owned(),
    })
}
