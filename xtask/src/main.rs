//! Project tasks.

mod bench;
mod image;
mod kernel;
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
    /// Compile the small guest kernel from Debian's linux-source.
    Kernel(kernel::Args),
    /// Measure the release executables against baselines. Run as root.
    Bench(bench::Args),
    #[command(hide = true)]
    BenchDirect(bench::Direct),
    /// Check what no compiler checks.
    Tidy,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Image(args) => image::run(&args),
        Task::Kernel(args) => kernel::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::BenchDirect(direct) => direct.run(),
        Task::Tidy => tidy::run(&image::workspace()?),
    }
}
