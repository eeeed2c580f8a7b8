//! `casemate-net BASE EDGE_UID`: owns taps and firewall, for the warden at descriptor 3.

fn main() {
    std::process::exit(net::serve::main(std::env::args().skip(1)));
}
