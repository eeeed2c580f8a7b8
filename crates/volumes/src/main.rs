//! `casemate-volumes`: owns the files of workspaces' objects, for the warden at descriptor 0.

fn main() {
    std::process::exit(volumes::serve::main());
}
