//! Keys.
fn main() {}
