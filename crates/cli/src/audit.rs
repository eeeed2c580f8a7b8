//! `casemate audit`: offline verification of the logs.

use service::config::Config;
use service::paths::Paths;
use std::path::PathBuf;

/// What to do with the logs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Verify all logs offline, on this machine's or a copy of the directory.
    Verify {
        /// Directory that holds the five logs.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// The log's public key; the installation's own unless given.
        #[arg(long)]
        key: Option<PathBuf>,
    },
}

/// Runs a command; the process's exit code.
///
/// # Errors
/// When the directory or the key can't be read.
pub fn run(_: &Paths, _: &Config, _: &Command, _: bool) -> anyhow::Result<u8> {
    anyhow::bail!("being built")
}
