//! The audit logs: five append-only logs, three processes with an identity each.
//!
//! ```text
//!  edge mint control kms host root            root
//!         │ append.sock                         │ read.sock
//!         ▼            integrate.sock           ▼
//!      append ─────────────────────▶ integrate  read ──▶ kms (opens batch keys)
//!         │ segments (its own)  ─read─▶ │         ▲
//!         ▼                             ▼ tiles, ─┘
//!      one fdatasync per batch          signed checkpoint
//! ```
//!
//! | module | process | |
//! |---|---|---|
//! | [`append`] | `casemate-audit append` | stamps, numbers, seals, makes durable; answers no question |
//! | [`integrate`] | `casemate-audit integrate` | builds the trees, holds the log's key |
//! | [`read`] | `casemate-audit read` | reads, and logs that it does |
//! | [`segment`] | append, integrate | where entries are durable first |
//!
//! The formats of what is published are crate `tlog`'s; `docs/formats/audit-log.md` describes them.
//!
//! Isolation rests on users: append's and integrate's directories are 2750, group `casemate-log`,
//! of which only the three are members; each writes its own only. The append-only attribute of ext4
//! is not used: setting it takes `CAP_LINUX_IMMUTABLE`, and whoever has that can clear it as well;
//! no process of the platform has it. What holds against root is the checkpoint, seen elsewhere.
#![forbid(unsafe_code)]

pub mod append;
pub mod disk;
pub mod integrate;
pub mod limits;
mod metrics;
pub mod read;
pub mod segment;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use anyhow::Context as _;
use std::fs::File;
use std::path::Path;
use tlog::class::Class;

/// The class as the internal protocols name it.
#[must_use]
pub fn api_class(class: Class) -> api::audit::Class {
    match class {
        Class::Api => api::audit::Class::Api,
        Class::Host => api::audit::Class::Host,
        Class::Flow => api::audit::Class::Flow,
        Class::Metering => api::audit::Class::Metering,
        Class::Security => api::audit::Class::Security,
    }
}

/// The class as the logs name it.
#[must_use]
pub fn log_class(class: api::audit::Class) -> Class {
    match class {
        api::audit::Class::Api => Class::Api,
        api::audit::Class::Host => Class::Host,
        api::audit::Class::Flow => Class::Flow,
        api::audit::Class::Metering => Class::Metering,
        api::audit::Class::Security => Class::Security,
    }
}

/// Makes sure that no second process works in `dir`; holds as long as the file is open.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    file.try_lock()
        .with_context(|| format!("{} is held by another process", path.display()))?;
    Ok(file)
}
