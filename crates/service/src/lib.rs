//! What each daemon does alike: command line, configuration, peer authentication, logs, metrics,
//! clock, audit client, atomic files and clean shutdown.
//!
//! Must never hold a decision of a daemon's own, nor a secret.
#![forbid(unsafe_code)]

pub mod audit;
pub mod binding;
pub mod clock;
pub mod config;
pub mod files;
pub mod limits;
pub mod metrics;
pub mod paths;
pub mod rpc;
pub mod trust;

use anyhow::Context as _;
use std::collections::BTreeMap;

/// What a daemon has read before it does anything.
pub struct Boot {
    /// The process's name: `kms`, `audit-append`, …
    pub name: &'static str,
    /// What it was asked to do.
    pub command: Command,
    /// Where things are.
    pub paths: paths::Paths,
    /// The installation's configuration.
    pub config: config::Config,
    /// The clock.
    pub clock: clock::Clock,
    /// Arguments after the command.
    pub rest: Vec<String>,
}

/// What a daemon is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Make keys and state that are missing, print the public halves, exit. Idempotent.
    Init,
    /// Serve until SIGTERM.
    Run,
}

/// Reads the command line (`--root DIR`, then `init` or `run`) and the configuration, and starts
/// the log.
///
/// # Errors
/// What is wrong with the command line or the configuration, naming the field.
pub fn boot(name: &'static str) -> anyhow::Result<Boot> {
    let mut args = std::env::args().skip(1).peekable();
    let mut root = String::new();
    let mut command = Command::Run;
    let mut rest = Vec::new();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--root" => root = args.next().context("--root needs a directory")?,
            "init" if rest.is_empty() => {
                command = Command::Init;
                rest.extend(args.by_ref());
            }
            "run" if rest.is_empty() => rest.extend(args.by_ref()),
            "--help" | "-h" => {
                println!(
                    "casemate-{name} [--root DIR] [init|run]\n\nPart of Casemate; started by `casemate up`."
                );
                std::process::exit(0);
            }
            other => anyhow::bail!("unknown argument {other:?}; see casemate-{name} --help"),
        }
    }
    start_log();
    let paths = paths::Paths::new(root);
    let config = config::Config::load(&paths.config())?;
    Ok(Boot {
        name,
        command,
        paths,
        config,
        clock: clock::Clock::system(),
        rest,
    })
}

/// Prints what `init` made public, for the supervisor to write into the trust directory: file
/// name → content.
pub fn print_trust(trust: &BTreeMap<&str, serde_json::Value>) {
    println!("{}", serde_json::json!({ "trust": trust }));
}

/// Ends when the process is asked to stop (SIGTERM or SIGINT).
pub async fn stop_requested() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        // Without handlers the default action ends the process, which is a stop as well.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Log lines as JSON on standard error; level by `CASEMATE_LOG` (`info` unless set).
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CASEMATE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A second call (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
}
