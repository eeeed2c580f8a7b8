//! An installation for measurements: its own root, ports and addresses, release executables.

use anyhow::{Context as _, Result, bail, ensure};
use cli::client::{Client, json};
use cli::probe::Probe;
use cli::{operate, urls, ws};
use reqwest::Method;
use serde_json::{Value, json};
use service::config::Config;
use service::paths::Paths;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long the pool may take to fill.
const POOL_WAIT_MAX: Duration = Duration::from_secs(180);

/// A running platform; stopped when it is dropped.
pub(super) struct Platform {
    pub(super) paths: Paths,
    pub(super) config: Config,
    casemate: PathBuf,
    /// Of its daemons' logs.
    level: &'static str,
}

impl Platform {
    /// Starts one under `target/bench-root`; `fresh`: from nothing.
    pub(super) fn up(artifacts: &Path, pool_size: u32, fresh: bool) -> Result<Self> {
        Self::up_with(artifacts, pool_size, fresh, unlimited(), "info")
    }

    /// The same from nothing, with each step of host in its log: see [`Platform::step_ms`].
    pub(super) fn up_told(artifacts: &Path, pool_size: u32) -> Result<Self> {
        let limits = unlimited();
        Self::up_with(
            artifacts,
            pool_size,
            true,
            limits,
            "info,host=debug,control=debug",
        )
    }

    /// The same with the limits that an installation has by default.
    pub(super) fn up_limited(artifacts: &Path, pool_size: u32) -> Result<Self> {
        Self::up_with(artifacts, pool_size, false, Default::default(), "info")
    }

    fn up_with(
        artifacts: &Path,
        pool_size: u32,
        fresh: bool,
        limits: service::config::Limits,
        level: &'static str,
    ) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the platform needs root: run it with sudo"
        );
        let target = crate::image::workspace()?.join("target");
        let paths = Paths::new(target.join("bench-root"));
        let mut config = Config::default();
        config.installation.name = "bench".into();
        // Free a moment ago.
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        config.edge.listen = vec![free];
        config.network.base = Ipv4Addr::new(10, 118, 0, 0);
        config.host.pool_size = pool_size;
        config.limits = limits;
        let me = Self {
            paths,
            config,
            casemate: target.join("release/casemate"),
            level,
        };
        me.casemate(&["down"]).ok();
        if fresh && me.paths.root().exists() {
            std::fs::remove_dir_all(me.paths.root()).context("remove the last bench's root")?;
        }
        me.artifacts_link(artifacts)?;
        std::fs::create_dir_all(me.paths.etc())?;
        std::fs::write(me.paths.config(), service::config::to_toml(&me.config)?)?;
        me.casemate(&["up"])?;
        Ok(me)
    }

    /// The host's view.
    pub(super) fn probe(&self) -> Probe<'_> {
        Probe {
            paths: &self.paths,
            config: &self.config,
        }
    }

    /// A client of a new account.
    pub(super) fn client(&self) -> Result<Client> {
        let account = operate::account_create(&self.paths, "bench")?;
        let key = operate::key_create(&self.paths, &account, "bench")?;
        let [control, gateway] = urls(&self.config);
        let (id, ca) = (key.client_id.to_string(), Some(self.paths.ca()));
        Client::new(control, gateway, ca, id, key.client_secret)
    }

    /// Waits until the pool is full.
    pub(super) fn pool_wait(&self) -> Result<()> {
        let deadline = Instant::now() + POOL_WAIT_MAX;
        loop {
            let info = self.host_info()?;
            if info.pool_ready >= info.pool_wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the pool holds {} VMs only", info.pool_ready);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The pids of all its processes, but those of workspaces.
    pub(super) fn daemons(&self) -> Vec<u32> {
        let status = cli::supervise::status_of(&self.paths);
        status.into_iter().filter_map(|s| s.pid).collect()
    }

    /// What the last such step of a workspace took, by host's log, ms.
    pub(super) fn step_ms(&self, workspace: &str, step: &str) -> Result<f64> {
        let path = self.paths.state("log").join("host.log");
        let text = std::fs::read_to_string(&path).context("read host's log")?;
        let of = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let fields = &line["fields"];
            let fits = fields["workspace"] == workspace && fields["step"] == step;
            fields["ms"].as_f64().filter(|_| fits)
        };
        let took = text.lines().rev().find_map(of);
        took.with_context(|| format!("host's log has no step {step} of {workspace}"))
    }

    /// A workspace's object at rest: `disk`, `snapshot-memory`, …; of several the last.
    pub(super) fn object_file(&self, workspace: &str, object: &str) -> Result<PathBuf> {
        let (name, by_id) = (
            format!("{workspace}.{object}"),
            format!("{workspace}.{object}-obj_"),
        );
        let mut last = None;
        for entry in std::fs::read_dir(self.paths.state("volumes"))? {
            let entry = entry?;
            let is = entry.file_name();
            let is = is.to_str().unwrap_or_default();
            if is == name || is.starts_with(&by_id) && !is.ends_with(".new") {
                last = last.max(Some((entry.metadata()?.modified()?, entry.path())));
            }
        }
        let (_, dir) = last.with_context(|| format!("{name} is not at rest"))?;
        Ok(dir.join("volume"))
    }

    /// What host says of itself.
    pub(super) fn host_info(&self) -> Result<api::host::Info> {
        let socket = self.paths.socket("host", "host");
        let wait = Duration::from_secs(10);
        let op = api::host::Op::Info;
        Ok(api::rpc::blocking::call(&socket, "bench", &op, wait)?)
    }

    fn casemate(&self, args: &[&str]) -> Result<()> {
        let out = Command::new(&self.casemate)
            .arg("--root")
            .arg(self.paths.root())
            .args(args)
            .env("CASEMATE_LOG", self.level)
            .output()
            .with_context(|| format!("run {}", self.casemate.display()))?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.success(),
            "casemate {}: {}",
            args.join(" "),
            said.trim()
        );
        Ok(())
    }

    fn artifacts_link(&self, from: &Path) -> Result<()> {
        let to = self.paths.artifacts();
        if to.exists() {
            std::fs::remove_dir_all(&to)?;
        }
        std::fs::create_dir_all(self.paths.state_dir())?;
        let linked = Command::new("cp").arg("-al").arg(from).arg(&to).status();
        if !linked.is_ok_and(|s| s.success()) {
            // Another file system.
            let _ = std::fs::remove_dir_all(&to);
            let copied = Command::new("cp").arg("-a").arg(from).arg(&to).status()?;
            ensure!(copied.success(), "can't copy {}", from.display());
        }
        Ok(())
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        if let Err(e) = self.casemate(&["down"]) {
            eprintln!("bench: {e:#}");
        }
    }
}

/// Limits that no measurement meets.
fn unlimited() -> service::config::Limits {
    service::config::Limits {
        disk_bytes_per_s: 1 << 40,
        disk_ops_per_s: 1_000_000,
        ..Default::default()
    }
}

/// What a file takes on its disk, MiB.
pub(super) fn allocated_mib(file: &Path) -> Result<f64> {
    let data = std::fs::metadata(file).with_context(|| format!("look at {}", file.display()))?;
    Ok(std::os::unix::fs::MetadataExt::blocks(&data) as f64 / 2048.0)
}

/// Makes a workspace that the gateway may reach; its id.
pub(super) async fn create(client: &Client, memory_mb: u32) -> Result<String> {
    let body = json!({
        "name": "bench", "image": "python-3", "mode": "permanent",
        "config": { "memory_mb": memory_mb, "network_config": { "public_ingress": true } },
    });
    let w = ws::create(client, &body).await?;
    Ok(w["id"].as_str().context("no id")?.to_owned())
}

/// Deletes it.
pub(super) async fn delete(client: &Client, id: &str) -> Result<()> {
    let path = format!("/workspace/{id}");
    client.control(Method::DELETE, &path, None).await.map(drop)
}

/// Runs a command in it; its task.
pub(super) async fn exec(client: &Client, token: &str, cmd: &[&str]) -> Result<Value> {
    let body = json!({ "cmd": cmd, "exec_mode": "direct", "timeout_seconds": 300 });
    let answer = client
        .runtime(token, Method::POST, "/exec", Some(&body))
        .await?;
    let task = json(answer).await?;
    ensure!(task["exit_code"] == 0, "{cmd:?} inside: {task}");
    Ok(task)
}
