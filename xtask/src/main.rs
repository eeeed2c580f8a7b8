//! Project tasks: bench, image, tidy.
fn main() {}
