//! The whole platform, for real: processes, VMs, disks, firewall, TLS, in a root of its own.
//!
//! Needs root and the artifacts of `cargo xtask image`; `scripts/test` makes both.
#![allow(clippy::unwrap_used)]

mod world;

mod checks;
mod hostile;
mod hostile_agent;
mod hostile_bombs;
mod hostile_guest;
mod hostile_host;
mod kill;
mod kill_saved;
mod lifecycle;
mod rules;
mod sabotage;
mod same;
mod sdk;
mod twins;
