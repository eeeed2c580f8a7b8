//! `casemate-jail --root DIR`: becomes one process in its jail. Of no use to anybody but warden: it
//! takes its orders from descriptor 0.

fn main() {
    std::process::exit(jail::main(std::env::args().skip(1)));
}
