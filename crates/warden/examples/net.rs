//! casemate-net, where tests find it: Cargo builds no program of another package for them.

fn main() {
    std::process::exit(net::serve::main(std::env::args().skip(1)));
}
