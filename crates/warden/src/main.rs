//! Root behind a closed enum of requests.
fn main() {}
