//! What the processes do together, and what is left when they are stopped anywhere.
#![allow(clippy::unwrap_used)]

mod crash;
mod damage;
mod world;
