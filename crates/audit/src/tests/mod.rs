//! What the processes do together.
#![allow(clippy::unwrap_used)]

mod world;
