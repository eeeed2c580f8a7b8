//! One installation in a temporary root: up when made, down when dropped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A running installation.
pub(crate) struct Platform {
    /// Its root; removed with it.
    dir: tempfile::TempDir,
    /// Where the edge listens.
    pub(crate) port: u16,
    /// `casemate`; the other executables are beside it.
    exe: PathBuf,
}

/// An API key of an account of its own, as the variables that clients read.
pub(crate) struct Account {
    pub(crate) id: String,
    pub(crate) secret: String,
}

impl Platform {
    /// Starts an installation; `extra` is TOML that comes after `[edge]`.
    pub(crate) fn start(extra: &str, passphrase: Option<&str>) -> Self {
        Self::prepare(extra).up(passphrase)
    }

    /// The same with other executables and artifacts.
    pub(crate) fn start_of(
        exe: PathBuf,
        artifacts: &Path,
        extra: &str,
        passphrase: Option<&str>,
    ) -> Self {
        Self::prepare_of(exe, artifacts, extra).up(passphrase)
    }

    fn up(self, passphrase: Option<&str>) -> Self {
        let platform = self;
        let up = platform.casemate_with(&["up"], passphrase.unwrap_or(""));
        platform.expect_ok("up", &up);
        platform
    }

    /// Lays out an installation without starting it.
    pub(crate) fn prepare(extra: &str) -> Self {
        Self::prepare_of(env!("CARGO_BIN_EXE_casemate").into(), &artifacts(), extra)
    }

    fn prepare_of(exe: PathBuf, artifacts: &Path, extra: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cmt-")
            .tempdir_in(scratch())
            .unwrap();
        // Root of the installation must be passable for the platform's users.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let etc = dir.path().join("etc/casemate");
        std::fs::create_dir_all(&etc).unwrap();
        let config = format!("[edge]\nlisten = [\"127.0.0.1:{port}\"]\n{extra}");
        std::fs::write(etc.join("casemate.toml"), config).unwrap();
        let state = dir.path().join("var/lib/casemate");
        std::fs::create_dir_all(&state).unwrap();
        // Hard links: the same bytes, no copy.
        let copied = Command::new("cp")
            .arg("-al")
            .arg(artifacts)
            .arg(state.join("artifacts"))
            .status()
            .unwrap();
        assert!(
            copied.success(),
            "link the artifacts; are they built? `cargo xtask image`"
        );
        Self { dir, port, exe }
    }

    pub(crate) fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The network namespace of its taps.
    pub(crate) fn fabric(&self) -> String {
        let paths = service::paths::Paths::new(self.root());
        cli::supervise::processes::fabric_name(&paths, &service::config::Config::default())
    }

    pub(crate) fn state(&self, process: &str) -> PathBuf {
        self.root().join("var/lib/casemate").join(process)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.root().join("etc/casemate/ca.pem")
    }

    pub(crate) fn control_url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    pub(crate) fn gateway_url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Runs `casemate` against this installation.
    pub(crate) fn casemate(&self, args: &[&str]) -> Output {
        self.casemate_with(args, "")
    }

    /// The same, with something on standard input.
    pub(crate) fn casemate_with(&self, args: &[&str], stdin: &str) -> Output {
        use std::io::Write as _;
        let mut child = Command::new(&self.exe)
            .arg("--root")
            .arg(self.root())
            .args(args)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Standard output of a successful `casemate`.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let out = self.casemate(args);
        self.expect_ok(&args.join(" "), &out);
        String::from_utf8(out.stdout).unwrap()
    }

    /// Panics with both outputs and the ends of all logs.
    pub(crate) fn expect_ok(&self, what: &str, out: &Output) {
        if out.status.success() {
            return;
        }
        let mut logs = String::new();
        for entry in std::fs::read_dir(self.state("log"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(12).collect();
            logs += &format!("--- {}\n", entry.file_name().to_string_lossy());
            for line in tail.iter().rev() {
                logs += &format!("{line}\n");
            }
        }
        panic!(
            "{what}: {}\n{}\n{}\n{logs}",
            out.status,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }

    /// Makes an account with an API key.
    pub(crate) fn account(&self, name: &str) -> Account {
        let made = self.ok(&["--json", "account", name]);
        let made: serde_json::Value = serde_json::from_str(&made).unwrap();
        let key = self.ok(&["--json", "key", made["account"].as_str().unwrap()]);
        let key: serde_json::Value = serde_json::from_str(&key).unwrap();
        Account {
            id: key["client_id"].as_str().unwrap().into(),
            secret: key["client_secret"].as_str().unwrap().into(),
        }
    }

    /// A `casemate` of a user with an API key.
    pub(crate) fn user_command(&self, account: &Account, args: &[&str]) -> Command {
        let mut c = Command::new(&self.exe);
        c.arg("--root")
            .arg(self.root())
            .args(args)
            .env("CASEMATE_CONTROL_URL", self.control_url())
            .env("CASEMATE_GATEWAY_URL", self.gateway_url())
            .env("CASEMATE_CA", self.ca())
            .env("CASEMATE_CLIENT_ID", &account.id)
            .env("CASEMATE_CLIENT_SECRET", &account.secret)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        c
    }

    /// Runs `casemate` as a user with an API key.
    pub(crate) fn as_user(&self, account: &Account, args: &[&str]) -> Output {
        self.user_command(account, args).output().unwrap()
    }

    /// The pid of a process of the platform.
    pub(crate) fn daemon_pid(&self, name: &str) -> Option<u64> {
        let file = self.root().join("run/casemate/supervisor/children.json");
        let children: serde_json::Value =
            serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        children[name]["pid"].as_u64()
    }

    /// What warden has; none while it does not answer.
    pub(crate) fn warden(&self) -> Option<api::warden::Status> {
        let socket = self.root().join("run/casemate/warden/warden.sock");
        let wait = std::time::Duration::from_secs(5);
        api::rpc::blocking::call(&socket, "test", &api::warden::Op::Status, wait).ok()
    }

    /// Warden's slots.
    pub(crate) fn slots(&self) -> Vec<serde_json::Value> {
        let slots = self.warden().map(|s| s.slots).unwrap_or_default();
        let values = slots.iter().map(|s| serde_json::to_value(s).unwrap());
        values.collect()
    }

    /// Workspaces that are on a slot.
    pub(crate) fn workspaces_on_host(&self) -> Vec<String> {
        self.slots()
            .iter()
            .filter_map(|s| s["workspace"].as_str().map(str::to_owned))
            .collect()
    }

    /// Disk files.
    pub(crate) fn disk_files(&self) -> Vec<String> {
        std::fs::read_dir(self.state("volumes"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// What of this installation is still on the machine.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let paths = service::paths::Paths::new(self.root());
        cli::supervise::leftovers(&paths, &service::config::Config::default())
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        let down = self.casemate(&["down"]);
        if !std::thread::panicking() {
            self.expect_ok("down", &down);
        }
    }
}

/// Where roots are made: beside the build, on a real file system.
fn scratch() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned();
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The artifacts of `cargo xtask image`.
pub(crate) fn artifacts() -> PathBuf {
    match std::env::var_os("CASEMATE_ARTIFACTS") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/artifacts"),
    }
}
