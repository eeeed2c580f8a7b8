//! The table of processes: their order, identity and readiness.

use service::config::Config;
use service::paths::Paths;
use std::path::PathBuf;

/// A process of the platform.
#[derive(Debug)]
pub struct Process {
    /// Its name, and that of its socket directory, state directory and log.
    pub name: &'static str,
    /// Its executable.
    pub exe: &'static str,
    /// Arguments before `--root`.
    pub args: &'static [&'static str],
    /// Runs as root.
    pub root: bool,
    /// Runs in the network namespace that holds the taps.
    pub fabric: bool,
    /// Member of the group that may read the log's own files.
    pub log_group: bool,
    /// The socket that answers once it is ready.
    pub ready: Option<&'static str>,
}

const fn plain(name: &'static str, exe: &'static str, ready: &'static str) -> Process {
    Process {
        name,
        exe,
        args: &[],
        root: false,
        fabric: false,
        log_group: false,
        ready: Some(ready),
    }
}

/// All processes, in the order in which they start; they stop in the opposite order.
pub const ALL: &[Process] = &[
    Process {
        args: &["integrate"],
        log_group: true,
        ..plain("audit-integrate", "casemate-audit", "integrate")
    },
    Process {
        args: &["append"],
        log_group: true,
        ..plain("audit-append", "casemate-audit", "append")
    },
    Process {
        args: &["read"],
        log_group: true,
        ..plain("audit-read", "casemate-audit", "read")
    },
    plain("kms", "casemate-kms", "kms"),
    plain("mint", "casemate-mint", "mint"),
    Process {
        root: true,
        fabric: true,
        ..plain("warden", "casemate-warden", "warden")
    },
    plain("host", "casemate-host", "host"),
    plain("control", "casemate-control", "http"),
    Process {
        fabric: true,
        ready: None,
        ..plain("edge", "casemate-edge", "")
    },
];

/// The group whose members may read the log's files.
pub const LOG_GROUP: &str = "casemate-log";

impl Process {
    /// The user it runs as.
    #[must_use]
    pub fn user(&self) -> String {
        if self.root {
            "root".into()
        } else {
            format!("casemate-{}", self.name)
        }
    }

    /// The socket that answers once it is ready.
    #[must_use]
    pub fn ready_socket(&self, paths: &Paths) -> Option<PathBuf> {
        self.ready.map(|s| paths.socket(self.name, s))
    }
}

/// The network namespace that holds the taps of this installation.
#[must_use]
pub fn fabric_name(paths: &Paths, config: &Config) -> String {
    if !config.network.namespace.is_empty() {
        return config.network.namespace.clone();
    }
    if paths.root() == std::path::Path::new("/") {
        return "casemate".into();
    }
    let digest = seal::hash::sha256(paths.root().as_os_str().as_encoded_bytes());
    format!("casemate-{}", hex::encode(&digest[..4]))
}
