//! Five append-only logs.
fn main() {}
