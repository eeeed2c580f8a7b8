//! Doubles of what the drivers talk to. For tests alone: nothing here is in a shipped path.
#![allow(dead_code, clippy::unwrap_used, unreachable_pub)]

pub mod firecracker;
pub mod world;
