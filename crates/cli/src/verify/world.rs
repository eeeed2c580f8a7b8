//! What checks share: two accounts, workspaces made for the checks, and ways to act as a client,
//! as a stranger, and as the edge itself. All of it is gone after [`World::clean`].

use crate::client::{Client, json};
use crate::probe::Probe;
use crate::{operate, supervise, urls, ws};
use anyhow::{Context as _, bail};
use api::warden::Slot;
use reqwest::Method;
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::{Command, Stdio};

/// The world of the checks.
pub struct World<'a> {
    /// The host's view.
    pub probe: Probe<'a>,
    /// The account that owns the workspaces.
    pub owner: Client,
    /// Another account.
    pub stranger: Client,
    made: Vec<String>,
    shared: Option<String>,
}

impl<'a> World<'a> {
    /// Makes two accounts.
    ///
    /// # Errors
    /// When the platform is not up.
    pub fn new(probe: Probe<'a>) -> anyhow::Result<Self> {
        if let Some(down) = supervise::status_of(probe.paths)
            .into_iter()
            .find(|s| !s.ready)
        {
            bail!("{} is down; `casemate up` first", down.name);
        }
        Ok(Self {
            owner: account(&probe, "verify")?,
            stranger: account(&probe, "verify-stranger")?,
            probe,
            made: Vec::new(),
            shared: None,
        })
    }

    /// Makes a workspace of its own for one check.
    ///
    /// # Errors
    /// What kept it from coming up.
    pub async fn make(&mut self, body: Value) -> anyhow::Result<String> {
        let mut body = body;
        for (key, value) in [
            ("image", "python-3"),
            ("mode", "permanent"),
            ("name", "verify"),
        ] {
            if body[key].is_null() {
                body[key] = value.into();
            }
        }
        let w = ws::create(&self.owner, &body).await?;
        let id = w["id"]
            .as_str()
            .context("the answer holds no id")?
            .to_owned();
        self.made.push(id.clone());
        Ok(id)
    }

    /// A running workspace that checks share, dark when they get it.
    ///
    /// # Errors
    /// What kept it from coming up.
    pub async fn shared(&mut self) -> anyhow::Result<String> {
        let id = match &self.shared {
            Some(id) => id.clone(),
            None => {
                let id = self.make(json!({})).await?;
                self.shared = Some(id.clone());
                id
            }
        };
        self.network(
            &id,
            &json!({ "public_access": false, "ingress_ports": [9990] }),
        )
        .await?;
        Ok(id)
    }

    /// Changes a workspace's network.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn network(&self, id: &str, patch: &Value) -> anyhow::Result<Value> {
        self.owner
            .control(
                Method::PATCH,
                &format!("/workspace/{id}/network"),
                Some(patch),
            )
            .await
    }

    /// Opens or closes the gateway's way to a workspace.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn public(&self, id: &str, open: bool) -> anyhow::Result<()> {
        self.network(id, &json!({ "public_access": open }))
            .await
            .map(drop)
    }

    /// Deletes a workspace; the answer.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn delete(&mut self, id: &str) -> anyhow::Result<Value> {
        let path = format!("/workspace/{id}");
        let answer = self.owner.control(Method::DELETE, &path, None).await?;
        self.made.retain(|m| m != id);
        if self.shared.as_deref() == Some(id) {
            self.shared = None;
        }
        Ok(answer)
    }

    /// `start` or `stop`.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn power(&self, id: &str, act: &str) -> anyhow::Result<()> {
        self.owner
            .post(&format!("/workspace/{id}/{act}"), &json!({}))
            .await
            .map(drop)
    }

    /// The slot of a running workspace.
    ///
    /// # Errors
    /// When it runs on none.
    pub fn slot(&self, id: &str) -> anyhow::Result<Slot> {
        self.probe.slot(id)
    }

    /// HTTP status and body of a runtime call through the gateway.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn gateway(&self, token: &str, path: &str) -> anyhow::Result<(u16, Value)> {
        let answer = self.owner.runtime(token, Method::GET, path, None).await?;
        let status = answer.status().as_u16();
        Ok((status, answer.json().await.unwrap_or_default()))
    }

    /// Standard output of a command inside an open workspace; a non-zero exit is an error.
    ///
    /// # Errors
    /// When it can't run or fails.
    pub async fn inside(&self, id: &str, command: &[&str]) -> anyhow::Result<String> {
        let token = self.owner.runtime_token(id).await?;
        let body = json!({ "cmd": command, "exec_mode": "direct", "timeout_seconds": 60 });
        let task = json(
            self.owner
                .runtime(&token, Method::POST, "/exec", Some(&body))
                .await?,
        )
        .await?;
        if task["exit_code"] != 0 {
            bail!("{command:?} inside {id}: {task}");
        }
        Ok(task["stdout"].as_str().unwrap_or_default().to_owned())
    }

    /// Runs this executable's hidden `agent` command inside the network of the taps, as the edge's
    /// user: what a call of the guest meets that has passed the edge's own checks, or none.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn as_edge(&self, args: &[&str], token: &str) -> anyhow::Result<String> {
        self.as_user("casemate-edge", args, token)
    }

    /// The same as the user of any process of the platform.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn as_user(&self, user: &str, args: &[&str], input: &str) -> anyhow::Result<String> {
        let fabric = supervise::processes::fabric_name(self.probe.paths, self.probe.config);
        let mut child = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{fabric}"))
            .args(["--", "setpriv", "--reuid", user, "--regid", user])
            .args(["--clear-groups", "--"])
            .arg(std::env::current_exe()?)
            .arg("--root")
            .arg(self.probe.paths.root())
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run nsenter and setpriv (util-linux)")?;
        if let Some(mut stdin) = child.stdin.take() {
            // A command that needs none does not read it.
            let _ = stdin.write_all(input.as_bytes());
        }
        let out = child.wait_with_output()?;
        if !out.status.success() {
            bail!(
                "{args:?} as {user}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }

    /// Standard output of a command in the network of the taps, as root.
    ///
    /// # Errors
    /// When it can't be run, or fails.
    pub fn in_fabric(&self, command: &[&str]) -> anyhow::Result<String> {
        let out = self
            .fabric()
            .args(command)
            .output()
            .context("run nsenter (util-linux)")?;
        if !out.status.success() {
            bail!(
                "{command:?}: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Counts the datagrams that arrive at a port in the network of the taps.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn listen(&self, port: &str) -> anyhow::Result<Listener> {
        let mut child = self
            .fabric()
            .arg(std::env::current_exe()?)
            .args(["listen", port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run nsenter (util-linux)")?;
        let out = child.stdout.take().context("no output")?;
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(out));
        let ready = lines.next().transpose()?;
        if ready.as_deref() != Some("ready") {
            let _ = child.wait();
            bail!("no listener on port {port}: {ready:?}");
        }
        Ok(Listener { child, lines })
    }

    fn fabric(&self) -> Command {
        let fabric = supervise::processes::fabric_name(self.probe.paths, self.probe.config);
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{fabric}")).arg("--");
        command
    }

    /// Deletes every workspace that is left.
    pub async fn clean(&mut self) {
        for id in std::mem::take(&mut self.made) {
            if let Err(e) = self
                .owner
                .control(Method::DELETE, &format!("/workspace/{id}"), None)
                .await
            {
                eprintln!("casemate: {id} could not be deleted: {e:#}");
            }
        }
    }
}

/// A child that counts datagrams.
pub struct Listener {
    child: std::process::Child,
    lines: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
}

impl Listener {
    /// Ends it; how many came.
    ///
    /// # Errors
    /// When it died.
    pub fn count(mut self) -> anyhow::Result<u64> {
        drop(self.child.stdin.take());
        let line = self.lines.next().context("the listener died")??;
        self.child.wait()?;
        Ok(line.trim().parse()?)
    }
}

fn account(probe: &Probe<'_>, name: &str) -> anyhow::Result<Client> {
    let account = operate::account_create(probe.paths, name)?;
    let key = operate::key_create(probe.paths, &account, name)?;
    let [control, gateway] = urls(probe.config);
    let ca = Some(probe.paths.ca());
    Client::new(
        control,
        gateway,
        ca,
        key.client_id.to_string(),
        key.client_secret,
    )
}

/// A string that stands nowhere else.
pub(super) fn canary() -> String {
    format!("canary-{}", hex::encode(seal::random::bytes::<16>()))
}
