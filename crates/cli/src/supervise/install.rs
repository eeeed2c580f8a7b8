//! What a fresh machine gets before the first start: users, directories, keys, trust.
//! Everything here is idempotent.

use super::processes::{self, LOG_GROUP, Process};
use anyhow::{Context as _, bail};
use service::config::Config;
use service::files::write_atomic;
use service::paths::Paths;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// uids and gids of an installation.
#[derive(Debug, Clone)]
pub struct Accounts {
    /// Process name → (uid, gid).
    pub ids: BTreeMap<String, (u32, u32)>,
    /// Gid of the log group.
    pub log_gid: u32,
}

/// The directory that holds the executables: that of the running one.
///
/// # Errors
/// When the system does not say where the running executable is.
pub fn exe_dir() -> anyhow::Result<PathBuf> {
    let exe = std::env::current_exe().context("find this executable")?;
    Ok(exe
        .parent()
        .context("this executable has no directory")?
        .to_owned())
}

/// Makes users, directories, the default configuration and the trust directory, and runs each
/// process's `init`.
///
/// # Errors
/// The step that failed, with the command that mends it where there is one.
pub fn install(
    paths: &Paths,
    config: &Config,
    passphrase: Option<&str>,
) -> anyhow::Result<Accounts> {
    let accounts = users()?;
    directories(paths, &accounts)?;
    if !paths.config().exists() {
        let text = toml_header() + &toml_of(config)?;
        write_atomic(&paths.config(), text.as_bytes(), 0o644)
            .with_context(|| format!("write {}", paths.config().display()))?;
    }
    let uids: BTreeMap<&str, u32> = accounts
        .ids
        .iter()
        .map(|(name, (uid, _))| (name.as_str(), *uid))
        .collect();
    write_atomic(&paths.uids(), &serde_json::to_vec(&uids)?, 0o644).context("write uids.json")?;
    measure(paths)?;
    for process in processes::ALL {
        init(paths, config, &accounts, process, passphrase)
            .with_context(|| format!("prepare {}", process.name))?;
    }
    Ok(accounts)
}

fn toml_header() -> String {
    "# Casemate's configuration. Every field has a default; unknown fields are errors.\n".into()
}

fn toml_of(config: &Config) -> anyhow::Result<String> {
    service::config::to_toml(config)
}

/// Finds or makes the system users.
///
/// # Errors
/// Without root, or when a user can't be made.
pub fn users() -> anyhow::Result<Accounts> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root: it makes users, network namespaces and jails; run it with sudo");
    }
    if id_of("group", LOG_GROUP)?.is_none() {
        run(Command::new("groupadd").args(["--system", LOG_GROUP]))?;
    }
    let (log_gid, _) = id_of("group", LOG_GROUP)?.context("group casemate-log was not made")?;
    let mut ids = BTreeMap::new();
    for process in processes::ALL.iter().filter(|p| !p.root) {
        let id = user_ensure(&process.user())?;
        ids.insert(process.name.to_owned(), id);
    }
    Ok(Accounts { ids, log_gid })
}

/// Finds or makes a system user that can't log in and owns nothing; its uid and gid.
///
/// # Errors
/// Without root, or when it can't be made.
pub fn user_ensure(user: &str) -> anyhow::Result<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root: it works as the system user {user}; run it with sudo");
    }
    if id_of("passwd", user)?.is_none() {
        run(Command::new("useradd").args([
            "--system",
            "--user-group",
            "--no-create-home",
            "--home-dir",
            "/nonexistent",
            "--shell",
            "/usr/sbin/nologin",
            user,
        ]))?;
    }
    id_of("passwd", user)?.with_context(|| format!("user {user} was not made"))
}

/// (uid, gid) of a user, or (gid, gid) of a group, from the system's database.
fn id_of(database: &str, name: &str) -> anyhow::Result<Option<(u32, u32)>> {
    let out = Command::new("getent")
        .args([database, name])
        .output()
        .context("run getent")?;
    if !out.status.success() {
        return Ok(None);
    }
    let line = String::from_utf8_lossy(&out.stdout);
    let field = |n: usize| {
        line.trim()
            .split(':')
            .nth(n)
            .and_then(|v| v.parse::<u32>().ok())
    };
    let first = field(2).with_context(|| format!("getent {database} {name}: unexpected answer"))?;
    Ok(Some((
        first,
        if database == "passwd" {
            field(3).unwrap_or(first)
        } else {
            first
        },
    )))
}

fn directories(paths: &Paths, accounts: &Accounts) -> anyhow::Result<()> {
    let dir = |path: PathBuf, mode: u32, uid: u32, gid: u32| -> anyhow::Result<()> {
        fs::create_dir_all(&path)
            .and_then(|()| chown(&path, Some(uid), Some(gid)))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("make {}", path.display()))
    };
    for path in [
        paths.run(),
        paths.state_dir(),
        paths.etc(),
        paths.trust(),
        paths.artifacts(),
    ] {
        dir(path, 0o755, 0, 0)?;
    }
    dir(paths.state("log"), 0o700, 0, 0)?;
    dir(paths.run().join("supervisor"), 0o755, 0, 0)?;
    dir(paths.run().join("vmctl"), 0o755, 0, 0)?;
    for process in processes::ALL {
        let (uid, gid) = accounts.ids.get(process.name).copied().unwrap_or((0, 0));
        dir(paths.run().join(process.name), 0o755, uid, gid)?;
        let (mode, gid) = if process.log_group {
            (0o2750, accounts.log_gid)
        } else {
            (0o700, gid)
        };
        dir(paths.state(process.name), mode, uid, gid)?;
    }
    Ok(())
}

/// Writes which executables may be released a key.
fn measure(paths: &Paths) -> anyhow::Result<()> {
    let exe = exe_dir()?.join("casemate-disk");
    let bytes = fs::read(&exe).with_context(|| {
        format!(
            "read {}: build it with `cargo build --release`",
            exe.display()
        )
    })?;
    let digest = hex::encode(seal::hash::sha256(&bytes));
    let json = serde_json::to_vec_pretty(&serde_json::json!({ "disk": [digest] }))?;
    write_atomic(
        &paths.trust().join(service::trust::MEASUREMENTS),
        &json,
        0o644,
    )
    .context("write measurements.json")
}

/// Runs a process's `init` as its own user and records the public keys it prints.
fn init(
    paths: &Paths,
    config: &Config,
    accounts: &Accounts,
    process: &Process,
    passphrase: Option<&str>,
) -> anyhow::Result<()> {
    let mut command = as_user(paths, accounts, process)?;
    command
        .arg("init")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .stdin(Stdio::null());
    if process.name == "kms" {
        let how = match config.kms.unseal {
            api::kms::Unseal::File => "file",
            api::kms::Unseal::Passphrase => "passphrase",
        };
        command.args(["--unseal", how]).stdin(Stdio::piped());
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("run {}", process.exe))?;
    if let Some(mut stdin) = child.stdin.take() {
        // The process may not read it, when it was initialised before.
        let _ = stdin.write_all(passphrase.unwrap_or("").as_bytes());
    }
    let out = child.wait_with_output()?;
    if !out.status.success() {
        bail!(
            "{} init failed: {}",
            process.exe,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    record_trust(paths, &out.stdout)
}

#[derive(serde::Deserialize)]
struct Printed {
    trust: BTreeMap<String, serde_json::Value>,
}

fn record_trust(paths: &Paths, stdout: &[u8]) -> anyhow::Result<()> {
    let Some(line) = stdout.split(|b| *b == b'\n').rfind(|l| l.starts_with(b"{")) else {
        return Ok(());
    };
    let printed: Printed = serde_json::from_slice(line).context("unexpected answer of init")?;
    for (name, value) in printed.trust {
        let (path, bytes) = match (name.as_str(), &value) {
            ("ca.pem", serde_json::Value::String(pem)) => (paths.ca(), pem.clone().into_bytes()),
            (
                service::trust::MINT
                | service::trust::GATEWAY
                | service::trust::AUDIT
                | service::trust::KMS
                | service::trust::EDGE,
                serde_json::Value::String(hex),
            ) => (paths.trust().join(&name), hex.clone().into_bytes()),
            (service::trust::HOSTS, map @ serde_json::Value::Object(_)) => {
                (paths.trust().join(&name), serde_json::to_vec_pretty(map)?)
            }
            _ => bail!("init printed a trust file that is not known: {name}"),
        };
        if fs::read(&path).is_ok_and(|old| old == bytes) {
            continue;
        }
        write_atomic(&path, &bytes, 0o644).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A command that runs a process's executable with its identity and nothing more.
///
/// # Errors
/// When the executable or the user is missing.
pub fn as_user(paths: &Paths, accounts: &Accounts, process: &Process) -> anyhow::Result<Command> {
    let exe = exe_dir()?.join(process.exe);
    if !exe.exists() {
        bail!(
            "{} is missing: build it with `cargo build --release`",
            exe.display()
        );
    }
    let mut c = Command::new("setpriv");
    // The supervisor's death ends them all; workspaces are warden's and survive.
    c.args(["--pdeathsig", "TERM"]);
    if let Some((uid, gid)) = accounts.ids.get(process.name) {
        c.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
        if process.log_group {
            c.args(["--groups", &accounts.log_gid.to_string()]);
        } else {
            c.arg("--clear-groups");
        }
        c.args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]);
    } else {
        c.arg("--clear-groups");
    }
    c.arg("--").arg(exe).args(process.args);
    if paths.root() != Path::new("/") {
        c.arg("--root").arg(paths.root());
    }
    // Nothing of the caller's environment reaches a daemon but the log level.
    c.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    if let Some(level) = std::env::var_os("CASEMATE_LOG") {
        c.env("CASEMATE_LOG", level);
    }
    Ok(c)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let out = command
        .output()
        .with_context(|| format!("run {:?}", command.get_program()))?;
    if !out.status.success() {
        bail!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}
