//! `casemate-audit append|integrate|read [--root DIR] [init|run]`: one of the audit logs' three
//! processes, each under a user of its own.

use anyhow::{Context as _, bail};
use audit::{append, integrate, read};
use serde_json::json;
use service::config::Config;
use service::paths::Paths;
use service::rpc::Uids;
use std::collections::BTreeMap;
use tokio::sync::watch;

const USAGE: &str = "casemate-audit append|integrate|read [--root DIR] [init|run]\n\n\
                     Part of Casemate; started by `casemate up`.";

#[derive(Clone, Copy)]
enum Process {
    Append,
    Integrate,
    Read,
}

struct Args {
    process: Process,
    paths: Paths,
    init: bool,
}

fn main() -> anyhow::Result<()> {
    let args = match args(std::env::args().skip(1)) {
        Ok(Some(args)) => args,
        Ok(None) => {
            println!("{USAGE}");
            return Ok(());
        }
        Err(e) => bail!("{e}; usage: {USAGE}"),
    };
    seal::secret::harden_process()?;
    log_start();
    let config = Config::load(&args.paths.config())?;
    if args.init {
        return init(&args, &config);
    }
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(&args, &config))
}

fn args(mut args: impl Iterator<Item = String>) -> anyhow::Result<Option<Args>> {
    let process = match args.next().as_deref() {
        Some("append") => Process::Append,
        Some("integrate") => Process::Integrate,
        Some("read") => Process::Read,
        Some("--help" | "-h") => return Ok(None),
        _ => bail!("say which of the three processes"),
    };
    let (mut root, mut command) = (String::new(), None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--root" => root = args.next().context("--root needs a directory")?,
            "init" | "run" if command.is_none() => command = Some(arg),
            "--help" | "-h" => return Ok(None),
            _ => bail!("unknown argument {arg:?}"),
        }
    }
    Ok(Some(Args {
        process,
        paths: Paths::new(root),
        init: command.as_deref() == Some("init"),
    }))
}

fn init(args: &Args, config: &Config) -> anyhow::Result<()> {
    let mut trust = BTreeMap::new();
    match args.process {
        Process::Append => append::init(&args.paths)?,
        Process::Integrate => {
            let key = integrate::init(&args.paths, config)?;
            trust.insert(service::trust::AUDIT, json!(key.to_hex()));
        }
        Process::Read => {}
    }
    service::print_trust(&trust);
    Ok(())
}

async fn run(args: &Args, config: &Config) -> anyhow::Result<()> {
    let uids = Uids::load(&args.paths)?;
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        service::stop_requested().await;
        stop.send_replace(true);
    });
    match args.process {
        Process::Append => {
            let clock = service::clock::Clock::system();
            append::run(&args.paths, uids, clock, stopped).await
        }
        Process::Integrate => integrate::run(&args.paths, config, uids, stopped).await,
        Process::Read => read::run(&args.paths, config, uids, stopped).await,
    }
}

/// Log lines as JSON on standard error; level by `CASEMATE_LOG` (`info` unless set).
fn log_start() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CASEMATE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
