//! The agent in the guest.
fn main() {}
