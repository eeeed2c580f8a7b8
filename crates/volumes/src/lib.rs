//! casemate-volumes: the files of workspaces' encrypted objects at rest.
//!
//! ```text
//! warden ── Ask{workspace, object} ──▶ casemate-volumes ─▶ its one directory
//!   ▲                                        │
//!   └──── done, volume and sidecar ◀─────────┘   descriptors go on to the disk process
//! ```
//!
//! An object is a volume and its sidecar, two files in a directory of their own that is renamed as
//! one, so that neither is ever kept or replaced without the other. What is being made is `.new`
//! beside what is there. A descriptor of the volume holds a lock: of who writes it, alone; of who
//! reads it, with other readers.
//!
//! [`Client`] is warden's side: it starts the process, and asks again when it died. Nothing but
//! what is on the platter is remembered, so a new process knows all that the old one did.
//!
//! [`image`] says how memory and snapshots are made and kept, [`serving`] is warden's side of the processes that have them open: `casemate-disk`, one a file.
//!
//! Must never: see a key or plaintext; be given text that becomes a path (ids are checked where
//! they are parsed); touch a file outside its directory; outlive its warden.
#![forbid(unsafe_code)]

pub mod client;
pub mod digests;
pub mod image;
pub mod limits;
pub mod serve;
pub mod serving;
pub mod store;
pub mod wire;

pub use client::Client;
pub use wire::{How, Name};
