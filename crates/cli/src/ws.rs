//! `casemate ws …`: workspaces, for users.

use crate::client::{Client, json};
use anyhow::{Context as _, bail};
use base64::Engine as _;
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Largest file that `cp` moves, bytes.
const COPY_MAX_BYTES: u64 = 32 << 20;
/// Longest line of an event stream, bytes.
const EVENT_MAX_BYTES: usize = 4 << 20;

/// What to do with workspaces.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a workspace and wait until it runs.
    Create {
        /// Its image; `casemate ws images` lists them.
        #[arg(long, default_value = "python-3")]
        image: String,
        /// A name for people.
        #[arg(long)]
        name: Option<String>,
        /// Gone with its disk after this time (`30m`, `2h`); permanent without it.
        #[arg(long)]
        ttl: Option<String>,
        /// Virtual CPUs.
        #[arg(long)]
        cpus: Option<u32>,
        /// Memory, MiB.
        #[arg(long)]
        memory_mb: Option<u32>,
        /// Disk, MiB.
        #[arg(long)]
        disk_mb: Option<u32>,
        /// Open the gateway's way to it at once (closed by default).
        #[arg(long)]
        public_access: bool,
    },
    /// List workspaces.
    Ls,
    /// Show one workspace.
    Show {
        /// Id or slug.
        workspace: String,
    },
    /// List images.
    Images,
    /// Open or close the gateway's way to a workspace.
    Access {
        /// Id or slug.
        workspace: String,
        /// `on` or `off`.
        #[arg(value_parser = ["on", "off"])]
        state: String,
    },
    /// Run a command inside; exits with its exit code.
    Exec {
        /// Id or slug.
        workspace: String,
        /// The command and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copy a file in or out: one side is `WORKSPACE:/path`.
    Cp {
        /// From.
        from: String,
        /// To.
        to: String,
    },
    /// Stop: its memory is gone, its disk is ciphertext.
    Stop {
        /// Id or slug.
        workspace: String,
    },
    /// Start; wake, if it sleeps.
    Start {
        /// Id or slug.
        workspace: String,
        /// Start what sleeps from its disk: its memory is given up.
        #[arg(long)]
        force: bool,
    },
    /// Sleep: its memory is encrypted to disk under its own key, and its VM ends.
    Sleep {
        /// Id or slug.
        workspace: String,
    },
    /// Wake what sleeps, with its memory.
    Wake {
        /// Id or slug.
        workspace: String,
    },
    /// Keep memory and disk as they are, encrypted, in the place of the snapshot before.
    Snapshot {
        /// Id or slug.
        workspace: String,
        /// What follows: `resume` (default), `pause` or `stop`.
        #[arg(long, default_value = "resume", value_parser = ["resume", "pause", "stop"])]
        after: String,
        /// The disk only, as if the power had been cut: what a fork needs.
        #[arg(long)]
        disk_only: bool,
    },
    /// Tars of its files, each encrypted under a key of its own.
    Archive {
        /// What to do.
        #[command(subcommand)]
        command: crate::ws_archive::Command,
    },
    /// Back to the snapshot: what runs ends, and the disk is as it was then.
    Restore {
        /// Id or slug.
        workspace: String,
    },
    /// Make a new workspace from a snapshot taken now, of the disk only, with a key and an identity of
    /// its own.
    Fork {
        /// Id or slug.
        workspace: String,
        /// A name for people.
        #[arg(long)]
        name: Option<String>,
        /// Fork the snapshot that there is, and take none.
        #[arg(long)]
        last: bool,
    },
    /// Pause: its memory is kept, it uses no CPU.
    Pause {
        /// Id or slug.
        workspace: String,
    },
    /// Continue a paused workspace.
    Resume {
        /// Id or slug.
        workspace: String,
    },
    /// Say that it is used: its time-to-live counts anew.
    Ping {
        /// Id or slug.
        workspace: String,
    },
    /// Change its size from its next start on; a disk only grows.
    Resize {
        /// Id or slug.
        workspace: String,
        /// Virtual CPUs.
        #[arg(long)]
        cpus: Option<u32>,
        /// Memory, MiB.
        #[arg(long)]
        memory_mb: Option<u32>,
        /// Disk, MiB; not less than it has.
        #[arg(long)]
        disk_mb: Option<u32>,
        /// Relaunch it now, if it runs: what is in its memory is lost.
        #[arg(long)]
        apply: bool,
    },
    /// Show or change what happens to it by itself.
    Lifecycle(LifecycleArgs),
    /// Delete: its key is destroyed. Prints the erasure receipt.
    Rm {
        /// Id or slug.
        workspace: String,
        /// Keep the receipt in this file.
        #[arg(long)]
        receipt: Option<PathBuf>,
    },
}

/// What happens to a workspace by itself; without an option it is shown.
#[derive(Debug, clap::Args)]
pub struct LifecycleArgs {
    /// Id or slug.
    workspace: String,
    /// Temporary: what follows after this time (`30m`, `2h`), counted from now.
    #[arg(long)]
    ttl: Option<String>,
    /// What follows: `stop` (default), `pause`, `suspend` or `remove`.
    #[arg(long, value_parser = ["stop", "pause", "suspend", "remove"])]
    ttl_action: Option<String>,
    /// Delete it, with its key, whenever it ends.
    #[arg(long, requires = "ttl")]
    remove_on_exit: bool,
    /// Permanent: no time-to-live.
    #[arg(long, conflicts_with_all = ["ttl", "ttl_action"])]
    permanent: bool,
    /// When a permanent workspace that ended by itself is started again: `no`, `always`,
    /// `on-failure` or `unless-stopped`.
    #[arg(long, conflicts_with = "ttl")]
    restart_policy: Option<String>,
    /// Put a permanent workspace to sleep that nobody used for this time (`10m`; at least 2 minutes;
    /// `0` is never). A request at its gateway wakes it.
    #[arg(long, conflicts_with = "ttl")]
    suspend_after: Option<String>,
    /// Stop a permanent workspace that nobody used, or that slept, for this time (`2h`; at least an
    /// hour; `0` is never).
    #[arg(long, conflicts_with = "ttl")]
    stop_after: Option<String>,
}

/// Runs a command; the process's exit code.
///
/// # Errors
/// [`crate::client::ApiError`] when it is refused.
pub async fn run(client: &Client, command: Command, as_json: bool) -> anyhow::Result<u8> {
    match command {
        Command::Create {
            image,
            name,
            ttl,
            cpus,
            memory_mb,
            disk_mb,
            public_access,
        } => {
            let mut config = serde_json::Map::new();
            for (key, value) in [
                ("cpus", cpus),
                ("memory_mb", memory_mb),
                ("disk_size_mb", disk_mb),
            ] {
                if let Some(v) = value {
                    config.insert(key.into(), v.into());
                }
            }
            let mut body = json!({ "image": image, "mode": "permanent" });
            if let Some(ttl) = ttl {
                body["mode"] = "temporary".into();
                config.insert("ttl".into(), ttl.into());
                config.insert("ttl_action".into(), "remove".into());
            }
            if public_access {
                config.insert("network_config".into(), json!({ "public_ingress": true }));
            }
            if let Some(name) = name {
                body["name"] = name.into();
            }
            body["config"] = config.into();
            let w = create(client, &body).await?;
            print(as_json, &w, |w| {
                format!("{} runs {}", text(w, "id"), text(w, "image"))
            });
        }
        Command::Ls => {
            let list = client.get("/workspace?limit=100").await?;
            print(as_json, &list["workspaces"], |list| {
                let mut out = format!("{:<20} {:<10} {:<12} {}", "ID", "STATUS", "IMAGE", "NAME");
                for w in list.as_array().into_iter().flatten() {
                    out += &format!(
                        "\n{:<20} {:<10} {:<12} {}",
                        text(w, "id"),
                        text(w, "status"),
                        text(w, "image"),
                        text(w, "name")
                    );
                }
                out
            });
        }
        Command::Show { workspace } => {
            let w = client.get(&format!("/workspace/{workspace}")).await?;
            println!("{}", serde_json::to_string_pretty(&w["workspace"])?);
        }
        Command::Images => {
            let images = client.get("/workspace/images").await?;
            print(as_json, &images["images"], |list| {
                let line = |i: &Value| format!("{:<14} {}", text(i, "image"), text(i, "desc"));
                list.as_array()
                    .into_iter()
                    .flatten()
                    .map(line)
                    .collect::<Vec<_>>()
                    .join("\n")
            });
        }
        Command::Access { workspace, state } => {
            let body = json!({ "public_access": state == "on" });
            let n = client
                .control(
                    Method::PATCH,
                    &format!("/workspace/{workspace}/network"),
                    Some(&body),
                )
                .await?;
            print(as_json, &n, |n| {
                format!("public_access is {}", n["public_access"])
            });
        }
        Command::Exec { workspace, command } => {
            let token = client.runtime_token(&workspace).await?;
            return exec(client, &token, &command).await;
        }
        Command::Cp { from, to } => copy(client, &from, &to).await?,
        Command::Stop { workspace } => power(client, &workspace, "stop", as_json).await?,
        Command::Start { workspace, force } => {
            let path = format!("/workspace/{workspace}/start");
            let answer = client.post(&path, &json!({ "force": force })).await?;
            print(as_json, &answer, |_| format!("{workspace} runs"));
        }
        Command::Sleep { workspace } => power(client, &workspace, "sleep", as_json).await?,
        Command::Wake { workspace } => power(client, &workspace, "start", as_json).await?,
        Command::Archive { command } => crate::ws_archive::run(client, command, as_json).await?,
        Command::Snapshot {
            workspace,
            after,
            disk_only,
        } => {
            let answer = snapshot(client, &workspace, &after, !disk_only).await?;
            print(as_json, &answer, |a| {
                let of = &a["snapshot"];
                format!(
                    "{workspace} is kept as of {}; it {}",
                    text(of, "created_at"),
                    match after.as_str() {
                        "pause" => "is paused",
                        "stop" => "is stopped",
                        _ => "runs on",
                    }
                )
            });
        }
        Command::Restore { workspace } => {
            let path = format!("/workspace/{workspace}/restore");
            let answer = slow("restoring", client.post(&path, &json!({}))).await?;
            print(as_json, &answer, |a| {
                let of = &a["snapshot"];
                format!("{workspace} runs as of {}", text(of, "created_at"))
            });
        }
        Command::Fork {
            workspace,
            name,
            last,
        } => {
            if !last {
                snapshot(client, &workspace, "resume", false).await?;
            }
            let body = match name {
                Some(name) => json!({ "name": name }),
                None => json!({}),
            };
            let path = format!("/workspace/{workspace}/fork");
            let made = slow("forking", client.post(&path, &body)).await?["workspace"].take();
            let w = ready(client, made).await?;
            print(as_json, &w, |w| {
                format!("{} runs, forked from {workspace}", text(w, "id"))
            });
        }
        Command::Pause { workspace } => power(client, &workspace, "pause", as_json).await?,
        Command::Resume { workspace } => power(client, &workspace, "resume", as_json).await?,
        Command::Ping { workspace } => power(client, &workspace, "ping", as_json).await?,
        Command::Resize {
            workspace,
            cpus,
            memory_mb,
            disk_mb,
            apply,
        } => {
            let mut body = json!({ "apply": apply });
            for (key, value) in [
                ("cpus", cpus),
                ("memory_mb", memory_mb),
                ("disk_size_mb", disk_mb),
            ] {
                if let Some(v) = value {
                    body[key] = v.into();
                }
            }
            let path = format!("/workspace/{workspace}/resources");
            let answer = client.control(Method::PATCH, &path, Some(&body)).await?;
            print(as_json, &answer, |a| {
                let r = &a["resources"];
                let when = match (&a["relaunched"], &r["running"]) {
                    (Value::Bool(true), _) => "; it was relaunched",
                    (_, Value::Null) => "",
                    _ => " from its next start on",
                };
                format!(
                    "{} CPUs, {} MiB of memory, {} MiB of disk{when}",
                    r["cpus"], r["memory_mb"], r["disk_size_mb"]
                )
            });
        }
        Command::Lifecycle(args) => lifecycle(client, &args, as_json).await?,
        Command::Rm { workspace, receipt } => {
            let answer = client
                .control(Method::DELETE, &format!("/workspace/{workspace}"), None)
                .await?;
            let signed = answer["erasure_receipt"].as_str();
            if let (Some(path), Some(signed)) = (receipt, signed) {
                std::fs::write(&path, signed)
                    .with_context(|| format!("write {}", path.display()))?;
            }
            print(as_json, &answer, |_| match signed {
                Some(r) => format!("deleted; its key is destroyed. Erasure receipt:\n{r}"),
                None => "being deleted; ask again for the erasure receipt".into(),
            });
        }
    }
    Ok(0)
}

/// Makes a workspace and waits until it is ready.
///
/// # Errors
/// [`crate::client::ApiError`], or what kept it from coming up.
pub async fn create(client: &Client, body: &Value) -> anyhow::Result<Value> {
    let made = client.post("/workspace", body).await?["workspace"].take();
    ready(client, made).await
}

async fn snapshot(client: &Client, ws: &str, after: &str, memory: bool) -> anyhow::Result<Value> {
    let path = format!("/workspace/{ws}/snapshot");
    let body = json!({ "after": after, "memory": memory });
    let what = if memory {
        "copying disk and memory"
    } else {
        "copying the disk"
    };
    slow(what, client.post(&path, &body)).await
}

/// Shows that something long goes on.
pub(crate) async fn slow<T>(what: &'static str, work: impl Future<Output = T>) -> T {
    let bar = crate::progress::spinner();
    bar.set_message(what);
    let done = work.await;
    bar.finish_and_clear();
    done
}

/// Waits until a workspace that was made is ready.
async fn ready(client: &Client, mut w: Value) -> anyhow::Result<Value> {
    let id = w["id"]
        .as_str()
        .context("the answer holds no id")?
        .to_owned();
    for _ in 0..240 {
        if w["ready"] == Value::Bool(true) {
            return Ok(w);
        }
        if w["provisioning"]["state"] == "failed" {
            let why = &w["provisioning"]["error"]["message"];
            bail!(
                "{id} did not come up: {}",
                why.as_str().unwrap_or("no reason was given")
            );
        }
        tokio::time::sleep(std::time::Duration::from_millis(250)).await;
        w = client.get(&format!("/workspace/{id}")).await?["workspace"].take();
    }
    bail!("{id} is not up after a minute; `casemate ws show {id}` tells how far it is")
}

async fn power(client: &Client, ws: &str, act: &str, as_json: bool) -> anyhow::Result<()> {
    let path = format!("/workspace/{ws}/{act}");
    let body = json!({});
    let asked = client.post(&path, &body);
    let answer = match act {
        "sleep" => slow("saving its memory", asked).await?,
        _ => asked.await?,
    };
    print(as_json, &answer, |_| match act {
        "stop" => format!("{ws} is stopped; its disk is ciphertext"),
        "sleep" => format!("{ws} sleeps; its disk and its memory are ciphertext"),
        "pause" => format!("{ws} is paused; its memory is kept"),
        "ping" => format!("{ws} is used"),
        _ => format!("{ws} runs"),
    });
    Ok(())
}

/// Changes what is asked for, and shows what is so.
async fn lifecycle(client: &Client, args: &LifecycleArgs, as_json: bool) -> anyhow::Result<()> {
    let path = format!("/workspace/{}/lifecycle", args.workspace);
    if let Some(ttl) = &args.ttl {
        let action = args.ttl_action.as_deref().unwrap_or("stop");
        let body =
            json!({ "ttl": ttl, "ttl_action": action, "remove_on_exit": args.remove_on_exit });
        client.post(&format!("{path}/temporary"), &body).await?;
    } else if let Some(action) = &args.ttl_action {
        let body = json!({ "ttl_action": action });
        let ttl = format!("{path}/ttl");
        client.control(Method::PUT, &ttl, Some(&body)).await?;
    }
    if args.permanent || args.restart_policy.is_some() {
        let body = match &args.restart_policy {
            Some(policy) => json!({ "restart_policy": policy }),
            None => json!({}),
        };
        client.post(&format!("{path}/permanent"), &body).await?;
    }
    if args.stop_after.is_some() || args.suspend_after.is_some() {
        let before = client.get(&path).await?;
        let or = |given: &Option<String>, name: &str| match given {
            Some(given) => Value::from(given.as_str()),
            None => before["idle"][name].as_u64().unwrap_or(0).into(),
        };
        let body = json!({
            "suspend_after": or(&args.suspend_after, "suspend_after"),
            "stop_after": or(&args.stop_after, "stop_after"),
        });
        let idle = format!("{path}/idle");
        client.control(Method::PUT, &idle, Some(&body)).await?;
    }
    let shown = client.get(&path).await?;
    print(as_json, &shown, |l| {
        let or = |v: &Value, none: &str| match v {
            Value::Null => none.to_owned(),
            Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        let restarts = &l["restart_info"];
        format!(
            "{}, {}\nends: {}\nrestarts: {} ({} in a row, {})\nidle: {}",
            text(l, "mode"),
            text(l, "status"),
            match &l["expires_at"] {
                Value::Null => "never".to_owned(),
                at => format!("{} at {}", text(l, "ttl_action"), or(at, "-")),
            },
            text(l, "restart_policy"),
            restarts["restarts"],
            text(restarts, "state"),
            or(&l["idle"], "stays up"),
        )
    });
    Ok(())
}

/// Runs a command inside, its output on ours as it comes; its exit code.
///
/// # Errors
/// [`crate::client::ApiError`] when it is refused, or a broken stream.
pub async fn exec(client: &Client, token: &str, command: &[String]) -> anyhow::Result<u8> {
    let body = json!({ "cmd": command, "exec_mode": "direct" });
    let response = client
        .runtime(token, Method::POST, "/exec/stream", Some(&body))
        .await?;
    if !response.status().is_success() {
        json(response).await?;
        bail!("the runtime refused the command without saying why");
    }
    let mut stream = response.bytes_stream();
    let mut buffer = Vec::new();
    let mut event = String::new();
    while let Some(chunk) = stream.next().await {
        buffer.extend_from_slice(&chunk.context("the stream broke")?);
        while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(name) = line.strip_prefix("event: ") {
                name.trim_end().clone_into(&mut event);
            } else if let Some(data) = line.strip_prefix("data: ") {
                let data: Value = serde_json::from_str(data.trim_end()).unwrap_or(Value::Null);
                match event.as_str() {
                    "stdout" => std::io::stdout().write_all(&decode(&data)?)?,
                    "stderr" => std::io::stderr().write_all(&decode(&data)?)?,
                    "exit" => {
                        std::io::stdout().flush()?;
                        let code = data["exit_code"].as_i64().unwrap_or(1);
                        return Ok(u8::try_from(code).unwrap_or(1));
                    }
                    _ => {}
                }
            }
        }
        if buffer.len() > EVENT_MAX_BYTES {
            bail!("the runtime sent a line longer than 4 MiB");
        }
    }
    bail!("the stream ended before the command did")
}

fn decode(data: &Value) -> anyhow::Result<Vec<u8>> {
    let text = data["data"]
        .as_str()
        .context("an output event without data")?;
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .context("an output event is no base64")
}

async fn copy(client: &Client, from: &str, to: &str) -> anyhow::Result<()> {
    match (inside(from), inside(to)) {
        (None, Some((ws, path))) => {
            let size = std::fs::metadata(from)
                .with_context(|| format!("read {from}"))?
                .len();
            if size > COPY_MAX_BYTES {
                bail!("{from} is larger than 32 MiB; use exec with a stream for larger files");
            }
            let content = std::fs::read_to_string(from).with_context(|| {
                format!("{from}: only UTF-8 text can be copied by this version")
            })?;
            let token = client.runtime_token(ws).await?;
            let body = json!({ "path": path, "content": content, "create_dirs": true });
            json(
                client
                    .runtime(&token, Method::POST, "/files/write", Some(&body))
                    .await?,
            )
            .await?;
        }
        (Some((ws, path)), None) => {
            let token = client.runtime_token(ws).await?;
            let query: String = path
                .bytes()
                .map(|b| match b {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                        char::from(b).to_string()
                    }
                    _ => format!("%{b:02X}"),
                })
                .collect();
            let file = json(
                client
                    .runtime(
                        &token,
                        Method::GET,
                        &format!("/files/read?path={query}"),
                        None,
                    )
                    .await?,
            )
            .await?;
            let content = file["content"]
                .as_str()
                .context("the answer holds no content")?;
            let target = if Path::new(to).is_dir() {
                Path::new(to).join(Path::new(path).file_name().context("no file name")?)
            } else {
                PathBuf::from(to)
            };
            std::fs::write(&target, content)
                .with_context(|| format!("write {}", target.display()))?;
        }
        _ => bail!("exactly one side must be WORKSPACE:/path"),
    }
    Ok(())
}

/// `(workspace, path)` of `WORKSPACE:/path`.
fn inside(side: &str) -> Option<(&str, &str)> {
    side.split_once(':')
        .filter(|(ws, path)| !ws.contains('/') && path.starts_with('/'))
}

pub(crate) fn print(as_json: bool, value: &Value, human: impl Fn(&Value) -> String) {
    if as_json {
        println!("{value}");
    } else {
        println!("{}", human(value));
    }
}

pub(crate) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::inside;

    #[test]
    fn sides_of_a_copy() {
        assert_eq!(inside("ws_1:/a:b"), Some(("ws_1", "/a:b")));
        assert_eq!(inside("./ws_1:/a"), None);
        assert_eq!(inside("/tmp/file"), None);
        assert_eq!(inside("ws_1:relative"), None);
    }
}
