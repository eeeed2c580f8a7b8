//! `casemate-disk`: serves one encrypted object as one FUSE file, for warden.

use std::process::ExitCode;

fn main() -> ExitCode {
    match disk::process::run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-disk: {error}");
            ExitCode::FAILURE
        }
    }
}
