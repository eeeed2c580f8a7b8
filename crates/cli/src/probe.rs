//! What the demonstration and the checks look at on the host itself, as root: the firewall's
//! counters, a workspace's processes, the bytes of its disk file.
//!
//! Must never change anything of the platform's.

use anyhow::{Context as _, bail};
use api::rpc::blocking::call;
use api::warden;
use service::config::Config;
use service::paths::Paths;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const WAIT: Duration = Duration::from_secs(10);
/// Bytes read at a time when a file is searched.
const CHUNK_BYTES: usize = 4 << 20;

/// An installation on this machine.
#[derive(Debug, Clone)]
pub struct Probe<'a> {
    /// Where things are.
    pub paths: &'a Paths,
    /// Its configuration.
    pub config: &'a Config,
}

impl Probe<'_> {
    /// Warden's state.
    ///
    /// # Errors
    /// Warden's.
    pub fn warden(&self) -> anyhow::Result<warden::Status> {
        Ok(call(
            &self.paths.socket("warden", "warden"),
            "cli",
            &warden::Op::Status,
            WAIT,
        )?)
    }

    /// The slot that a workspace runs on.
    ///
    /// # Errors
    /// When it runs on none.
    pub fn slot(&self, workspace: &str) -> anyhow::Result<warden::Slot> {
        self.warden()?
            .slots
            .into_iter()
            .find(|s| {
                s.workspace
                    .as_ref()
                    .is_some_and(|w| w.as_str() == workspace)
            })
            .with_context(|| format!("{workspace} is on no slot of this host"))
    }

    /// The firewall's and the cgroup's counters of a slot.
    ///
    /// # Errors
    /// Warden's.
    pub fn counters(&self, slot: u16) -> anyhow::Result<warden::Counters> {
        let op = warden::Op::Counters { slot };
        Ok(call(
            &self.paths.socket("warden", "warden"),
            "cli",
            &op,
            WAIT,
        )?)
    }

    /// What a TCP dial from inside the network of the taps meets, as root and not the edge.
    ///
    /// # Errors
    /// When the namespace can't be entered.
    pub fn dial(&self, address: SocketAddr, from: Option<IpAddr>) -> anyhow::Result<String> {
        let fabric = crate::supervise::processes::fabric_name(self.paths, self.config);
        let mut c = Command::new("nsenter");
        c.arg(format!("--net=/run/netns/{fabric}")).arg("--");
        c.arg(std::env::current_exe()?)
            .args(["dial", &address.to_string()]);
        if let Some(from) = from {
            c.args(["--from", &from.to_string()]);
        }
        let out = c.output().context("run nsenter (util-linux)")?;
        if !out.status.success() {
            bail!(
                "dial failed: {}",
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }

    /// A workspace's disk file.
    #[must_use]
    pub fn disk_file(&self, workspace: &str) -> PathBuf {
        self.paths
            .state("volumes")
            .join(format!("{workspace}.disk/volume"))
    }
}

/// How often `needle` stands in a file; its holes are skipped.
///
/// # Errors
/// The file system's.
pub fn occurrences(path: &Path, needle: &[u8]) -> anyhow::Result<u64> {
    use rustix::fs::{SeekFrom, seek};
    assert!(
        !needle.is_empty() && needle.len() < CHUNK_BYTES,
        "a needle fits a chunk"
    );
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let finder = memchr::memmem::Finder::new(needle);
    let mut buffer = vec![0u8; CHUNK_BYTES];
    let (mut found, mut from) = (0u64, 0u64);
    // ENXIO: no data behind `from`.
    while let Ok(start) = seek(&file, SeekFrom::Data(from)) {
        let end = seek(&file, SeekFrom::Hole(start)).unwrap_or(u64::MAX);
        let (mut at, mut kept) = (start, 0usize);
        while at < end {
            let want = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(CHUNK_BYTES - kept);
            let n = file.read_at(&mut buffer[kept..kept + want], at)?;
            if n == 0 {
                return Ok(found);
            }
            at += n as u64;
            let filled = kept + n;
            found += finder.find_iter(&buffer[..filled]).count() as u64;
            // What could be the beginning of one more is looked at again with what follows.
            kept = (needle.len() - 1).min(filled);
            buffer.copy_within(filled - kept..filled, 0);
        }
        from = end;
    }
    Ok(found)
}

/// How often `needle` stands in the regular files below a directory, without following links.
///
/// # Errors
/// The file system's, but not for files that went away meanwhile.
pub fn occurrences_below(dir: &Path, needle: &[u8]) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let mut hits = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file()
                && let Ok(n) = occurrences(&entry.path(), needle)
                && n > 0
            {
                hits.push((entry.path(), n));
            }
        }
    }
    Ok(hits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn finds_a_needle_across_chunks_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut bytes = vec![b'c'; CHUNK_BYTES * 2 + 10];
        bytes[CHUNK_BYTES - 3..CHUNK_BYTES + 3].copy_from_slice(b"canary");
        bytes[CHUNK_BYTES * 2..CHUNK_BYTES * 2 + 6].copy_from_slice(b"canary");
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(occurrences(&path, b"canary").unwrap(), 2);
        assert_eq!(occurrences(&path, b"canaries").unwrap(), 0);
        assert_eq!(
            occurrences_below(dir.path(), b"canary").unwrap(),
            vec![(path, 2)]
        );
    }
}
