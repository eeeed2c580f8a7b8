//! Project tasks.

mod image;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask", about = "Project tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make what a VM is made of: kernel, agent, base image, the VMM's closure. Run as root.
    Image(image::Args),
    /// Check what no compiler checks.
    Tidy,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Image(args) => image::run(&args),
        Task::Tidy => tidy::run(&image::workspace()?),
    }
}
