//! Control groups: one for a slot's VMM and vmctl, one for its disk. cgroup v2 where its
//! controllers are free, else v1.
//!
//! All groups of an installation are below one directory of its own, so that a sweep finds every
//! process of a slot, journal or not.

use crate::fault::{At, Result, log};
use crate::limits::KILL_WAIT;
use crate::process::Proc;
use rustix::fd::OwnedFd;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
const V1: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];

/// Where this installation's groups are.
#[derive(Debug, Clone)]
pub struct Cgroups {
    tops: Vec<PathBuf>,
    v2: bool,
}

/// Bounds of one group.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Memory that is not reclaimed, bytes (v2 only).
    pub memory_min_bytes: u64,
    /// Threads.
    pub pids: u64,
    /// CPU time per 100 ms, µs.
    pub cpu_us: u64,
}

impl Cgroups {
    /// Finds the controllers; `instance` tells installations of one machine apart.
    ///
    /// # Errors
    /// When neither version is usable.
    pub fn open(instance: &str) -> Result<Self> {
        let name = format!("casemate-{instance}");
        let v2 = std::fs::read_to_string(format!("{ROOT}/cgroup.controllers")).is_ok_and(|c| {
            ["memory", "cpu", "pids"]
                .iter()
                .all(|w| c.split_whitespace().any(|x| x == *w))
        });
        let tops: Vec<PathBuf> = if v2 {
            vec![Path::new(ROOT).join(&name)]
        } else {
            V1.iter()
                .map(|c| Path::new(ROOT).join(c).join(&name))
                .collect()
        };
        for top in &tops {
            mkdir(top)?;
        }
        if v2 {
            for dir in [Path::new(ROOT), &tops[0]] {
                write(&dir.join("cgroup.subtree_control"), "+memory +cpu +pids")?;
            }
        }
        Ok(Self { tops, v2 })
    }

    /// `v1` or `v2`.
    #[must_use]
    pub fn version(&self) -> &'static str {
        if self.v2 { "v2" } else { "v1" }
    }

    /// The files by which a process joins group `name`: all of them.
    ///
    /// # Errors
    /// The file that could not be opened.
    pub fn doors(&self, name: &str) -> Result<Vec<OwnedFd>> {
        let open = |dir: PathBuf| {
            let path = dir.join("cgroup.procs");
            let file = std::fs::OpenOptions::new().write(true).open(&path);
            file.map(OwnedFd::from).at("open", path.display())
        };
        self.dirs(name).into_iter().map(open).collect()
    }

    fn dirs(&self, name: &str) -> Vec<PathBuf> {
        self.tops.iter().map(|t| t.join(name)).collect()
    }

    /// Makes the group, or sets its bounds anew.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn create(&self, name: &str, b: Bounds) -> Result {
        for dir in self.dirs(name) {
            mkdir(&dir)?;
        }
        let cpu = format!("{} 100000", b.cpu_us);
        if self.v2 {
            let dir = self.tops[0].join(name);
            write(&dir.join("memory.max"), &b.memory_bytes.to_string())?;
            write(&dir.join("memory.min"), &b.memory_min_bytes.to_string())?;
            write(&dir.join("pids.max"), &b.pids.to_string())?;
            return write(&dir.join("cpu.max"), &cpu);
        }
        let [memory, cpu, _, pids] = [0, 1, 2, 3].map(|i| self.tops[i].join(name));
        write(
            &memory.join("memory.limit_in_bytes"),
            &b.memory_bytes.to_string(),
        )?;
        write(&cpu.join("cpu.cfs_period_us"), "100000")?;
        write(&cpu.join("cpu.cfs_quota_us"), &b.cpu_us.to_string())?;
        write(&pids.join("pids.max"), &b.pids.to_string())
    }

    /// (CPU time in ns, memory in bytes) of the group; zeros if it is gone.
    #[must_use]
    pub fn usage(&self, name: &str) -> (u64, u64) {
        let number = |p: PathBuf| -> u64 {
            std::fs::read_to_string(p)
                .ok()
                .and_then(|s| s.trim().parse().ok())
                .unwrap_or(0)
        };
        if !self.v2 {
            return (
                number(self.tops[2].join(name).join("cpuacct.usage")),
                number(self.tops[0].join(name).join("memory.usage_in_bytes")),
            );
        }
        let dir = self.tops[0].join(name);
        let stat = std::fs::read_to_string(dir.join("cpu.stat")).unwrap_or_default();
        let us = stat
            .lines()
            .find_map(|l| l.strip_prefix("usage_usec ")?.parse::<u64>().ok());
        (us.unwrap_or(0) * 1000, number(dir.join("memory.current")))
    }

    /// Names of the groups there are.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .tops
            .iter()
            .filter_map(|t| std::fs::read_dir(t).ok())
            .flatten()
            .filter_map(|e| {
                e.ok()
                    .filter(|e| e.path().is_dir())?
                    .file_name()
                    .into_string()
                    .ok()
            })
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Kills what is in the group and removes it; whether it is gone.
    #[must_use]
    pub fn remove(&self, name: &str) -> bool {
        let end = Instant::now() + KILL_WAIT;
        loop {
            let mut left = false;
            for dir in self.dirs(name) {
                for pid in pids(&dir) {
                    // By pidfd: between reading and killing, the pid may have changed hands.
                    if let Some(handle) = Proc::of(pid).and_then(Proc::handle)
                        && pids(&dir).contains(&pid)
                    {
                        let _ = handle.kill(Duration::from_millis(100));
                    }
                }
                match std::fs::remove_dir(&dir) {
                    Ok(()) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(_) => left = true,
                }
            }
            if !left {
                return true;
            }
            if Instant::now() > end {
                log("cgroup.stuck", serde_json::json!({"group": name}));
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes the installation's own directory, if it is empty.
    pub fn forget(&self) {
        for top in &self.tops {
            let _ = std::fs::remove_dir(top);
        }
    }
}

fn pids(dir: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|l| l.parse().ok()).collect()
}

fn mkdir(dir: &Path) -> Result {
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(e).at("make control group", dir.display())
        }
        _ => Ok(()),
    }
}

fn write(file: &Path, text: &str) -> Result {
    std::fs::OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut f| f.write_all(text.as_bytes()))
        .at("write", file.display())
}
