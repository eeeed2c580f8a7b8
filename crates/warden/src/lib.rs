//! Warden: root behind a closed enum of requests.
//!
//! It keeps the slots: what each has, in which order it comes and goes, what is in the journal. It
//! makes control groups and mounts itself; jails are `casemate-jail`'s, taps and firewall
//! `casemate-net`'s, the files at rest `casemate-volumes`', each asked by a closed enum of its own. Requests carry ids and numbers
//! (`api::warden`); what they name is looked up beneath directories that only root writes. It is
//! synchronous, has no runtime, runs in the fabric's network namespace and opens no network socket.
//!
//! Must never: hold a workspace key (grants pass sealed), take a string that becomes a path, a
//! command or a firewall rule, leave a half-made jail that runs, or keep a descriptor of a guest's
//! disk, memory or control channel once it is handed over.
#![forbid(unsafe_code)]

pub mod attest;
mod fault;
pub mod journal;
pub mod layout;
pub mod limits;
pub mod server;
pub mod slots;
pub mod templates;
pub mod watch;

pub use attest::Machine;
pub use fault::Result;
pub use jail::vmm::Vmm;
pub use layout::Layout;
pub use slots::{Config, Warden};
