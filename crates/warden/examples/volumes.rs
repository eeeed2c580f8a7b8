//! casemate-volumes, where tests find it: Cargo builds no program of another package for them.

fn main() {
    std::process::exit(volumes::serve::main());
}
