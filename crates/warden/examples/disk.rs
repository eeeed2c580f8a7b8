//! casemate-disk, where tests find it: Cargo builds no program of another package for them.

fn main() {
    if let Err(error) = disk::process::run(std::env::args().skip(1)) {
        eprintln!("casemate-disk: {error}");
        std::process::exit(1);
    }
}
