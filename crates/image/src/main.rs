//! The workers of `casemate image import`; started by it, with a socket as standard input.

use clap::Parser;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "casemate-image", version)]
enum Args {
    /// Unpack an image that the command hands over.
    Unpack,
    /// Read an archive of a layout.
    Collect,
    /// Fetch an image from a registry.
    Fetch,
}

fn main() -> ExitCode {
    let socket = std::io::stdin();
    let result = match Args::parse() {
        Args::Unpack => image::worker::unpack(&socket),
        Args::Collect => image::worker::collect(&socket),
        Args::Fetch => image::worker::fetch(&socket),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("casemate-image: {e}");
            ExitCode::FAILURE
        }
    }
}
