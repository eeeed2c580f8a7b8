//! `true` through the edge, against the same call of the agent itself: mTLS with the edge's
//! identity, from the network of the taps, as the edge's user. Both on kept connections, with the
//! same token.

use super::platform::{Platform, create, delete, exec};
use super::{Args, median, ms, runtime, say};
use anyhow::{Context as _, Result, ensure};
use cli::client::Client;
use model::WorkspaceId;
use service::paths::Paths;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

const CALLS: usize = 100;
const BODY: &str = r#"{"cmd":["true"],"exec_mode":"direct","timeout_seconds":300}"#;

/// Calls a guest's agent again and again and prints each call's ms; the token comes from standard
/// input. `bench exec` starts it as the edge's user.
#[derive(clap::Args)]
pub(crate) struct Direct {
    root: PathBuf,
    workspace: WorkspaceId,
    ip: Ipv4Addr,
}

impl Direct {
    pub(crate) fn run(&self) -> Result<()> {
        let mut token = String::new();
        std::io::stdin().take(8 << 10).read_to_string(&mut token)?;
        let paths = Paths::new(&self.root);
        let calls = cli::agent::exec_many(&paths, &self.workspace, self.ip, &token, BODY, CALLS);
        for took in runtime()?.block_on(calls)? {
            println!("{}", ms(took));
        }
        Ok(())
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let runtime = runtime()?;
    let platform = Platform::up(&args.artifacts, 1, false)?;
    platform.pool_wait()?;
    let client = platform.client()?;
    let memory_mb = platform.config.host.pool_memory_mb;
    let id = runtime.block_on(create(&client, memory_mb))?;
    platform.pool_wait()?;
    let token = runtime.block_on(client.runtime_token(&id))?;
    let ip = platform.probe().slot(&id)?.net.ip;
    let (mut edge, mut direct) = (Vec::new(), Vec::new());
    runtime.block_on(by_edge(&client, &token))?;
    for _ in 0..args.runs.div_ceil(3) {
        edge.extend(runtime.block_on(by_edge(&client, &token))?);
        direct.extend(by_hand(&platform, &id, &ip, &token)?);
    }
    let (edge, direct) = (median(edge), median(direct));
    say("exec", "edge_p50_ms", edge, "ms");
    say("exec", "direct_p50_ms", direct, "ms");
    say("exec", "ratio_vs_direct", edge / direct, "x");
    runtime.block_on(delete(&client, &id))
}

async fn by_edge(client: &Client, token: &str) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    for _ in 0..CALLS {
        let began = Instant::now();
        exec(client, token, &["true"]).await?;
        took.push(ms(began.elapsed()));
    }
    Ok(took)
}

fn by_hand(platform: &Platform, id: &str, ip: &str, token: &str) -> Result<Vec<f64>> {
    let fabric = cli::supervise::processes::fabric_name(&platform.paths, &platform.config);
    let mut child = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{fabric}"))
        .args(["--", "setpriv", "--reuid", "casemate-edge"])
        .args(["--regid", "casemate-edge", "--clear-groups", "--"])
        .arg(std::env::current_exe()?)
        .arg("bench-direct")
        .arg(platform.paths.root())
        .args([id, ip])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("run nsenter and setpriv (util-linux)")?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    stdin.write_all(token.as_bytes())?;
    drop(stdin);
    let out = child.wait_with_output()?;
    ensure!(out.status.success(), "the direct calls failed; see above");
    let text = String::from_utf8(out.stdout)?;
    let all: Result<Vec<f64>, _> = text.lines().map(str::parse).collect();
    Ok(all?)
}
