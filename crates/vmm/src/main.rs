//! VMM drivers and vmctl.
fn main() {}
