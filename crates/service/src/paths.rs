//! Where everything is. `--root DIR` relocates all of it, for tests and second instances.

use std::path::{Path, PathBuf};

/// The places of one installation.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The installation under `root`; an empty string is the machine's own.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root: PathBuf = root.into();
        Self {
            root: if root.as_os_str().is_empty() {
                "/".into()
            } else {
                root
            },
        }
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `/run/casemate`.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.root.join("run/casemate")
    }

    /// `/var/lib/casemate`.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.root.join("var/lib/casemate")
    }

    /// `/etc/casemate`.
    #[must_use]
    pub fn etc(&self) -> PathBuf {
        self.root.join("etc/casemate")
    }

    /// A process's state, 0700 and its own.
    #[must_use]
    pub fn state(&self, process: &str) -> PathBuf {
        self.state_dir().join(process)
    }

    /// `/run/casemate/<process>/<name>.sock`.
    #[must_use]
    pub fn socket(&self, process: &str, name: &str) -> PathBuf {
        self.run().join(process).join(format!("{name}.sock"))
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.etc().join("casemate.toml")
    }

    /// Public keys that processes trust each other by.
    #[must_use]
    pub fn trust(&self) -> PathBuf {
        self.etc().join("trust")
    }

    /// The local CA's certificate, PEM.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.etc().join("ca.pem")
    }

    /// Process names → uids, written by the supervisor.
    #[must_use]
    pub fn uids(&self) -> PathBuf {
        self.run().join("uids.json")
    }

    /// Kernel, initramfs, images, VMM.
    #[must_use]
    pub fn artifacts(&self) -> PathBuf {
        self.state_dir().join("artifacts")
    }
}
