//! Control groups. cgroup v2 where its controllers are free, else v1.
//!
//! ```text
//! casemate-<instance>     all of an installation: a sweep finds every process, journal or not
//!   slot-3                CPU time: what a guest makes its disk compute is the guest's
//!     vm                  the VMM and vmctl: memory, threads
//!     disk                the disk process: memory, threads
//! ```
//!
//! Slots of one machine share its CPUs by their number of virtual ones, however many threads each
//! has; so a slot that has not used up its own time gets it beside any other's flood.

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
    /// Memory, bytes; no bound but those of the groups in it.
    pub memory_bytes: Option<u64>,
    /// Memory that is not reclaimed, bytes (v2 only).
    pub memory_min_bytes: u64,
    /// Threads; no bound but those of the groups in it.
    pub pids: Option<u64>,
    /// CPU time per 100 ms, µs: the bound, and the weight beside other groups.
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

    /// Makes the group, or sets its bounds anew. One that is in another is made after that.
    ///
    /// # Errors
    /// The file that could not be written.
    pub fn create(&self, name: &str, b: Bounds) -> Result {
        for dir in self.dirs(name) {
            mkdir(&dir)?;
        }
        let text = |n: Option<u64>, none: &str| n.map_or(none.to_owned(), |n| n.to_string());
        let weight = (b.cpu_us / 1000).clamp(1, 10_000);
        if self.v2 {
            let dir = self.tops[0].join(name);
            write(&dir.join("memory.max"), &text(b.memory_bytes, "max"))?;
            write(&dir.join("memory.min"), &b.memory_min_bytes.to_string())?;
            write(&dir.join("pids.max"), &text(b.pids, "max"))?;
            write(&dir.join("cpu.weight"), &weight.to_string())?;
            write(&dir.join("cpu.max"), &format!("{} 100000", b.cpu_us))?;
            return match name.split_once('/') {
                None => write(&dir.join("cgroup.subtree_control"), "+memory +cpu +pids"),
                Some(_) => Ok(()),
            };
        }
        let [memory, cpu, _, pids] = [0, 1, 2, 3].map(|i| self.tops[i].join(name));
        let limit = text(b.memory_bytes, "-1");
        write(&memory.join("memory.limit_in_bytes"), &limit)?;
        // 1024 is v1's 100.
        let shares = (weight * 1024 / 100).to_string();
        write(&cpu.join("cpu.shares"), &shares)?;
        write(&cpu.join("cpu.cfs_period_us"), "100000")?;
        write(&cpu.join("cpu.cfs_quota_us"), &b.cpu_us.to_string())?;
        write(&pids.join("pids.max"), &text(b.pids, "max"))
    }

    /// CPU time of the group and those in it, ns; 0 if it is gone.
    #[must_use]
    pub fn cpu_ns(&self, name: &str) -> u64 {
        if !self.v2 {
            return number(&self.tops[2].join(name).join("cpuacct.usage"));
        }
        let stat = self.tops[0].join(name).join("cpu.stat");
        let stat = std::fs::read_to_string(stat).unwrap_or_default();
        let mut lines = stat.lines();
        let us = lines.find_map(|l| l.strip_prefix("usage_usec ")?.parse::<u64>().ok());
        us.unwrap_or(0) * 1000
    }

    /// Memory of the group, bytes; 0 if it is gone.
    #[must_use]
    pub fn memory_bytes(&self, name: &str) -> u64 {
        let file = if self.v2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        number(&self.tops[0].join(name).join(file))
    }

    /// Names of the slots' groups there are.
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

    /// Kills what is in the group and those in it, and removes them; whether they are gone.
    #[must_use]
    pub fn remove(&self, name: &str) -> bool {
        let end = Instant::now() + KILL_WAIT;
        loop {
            let mut left = false;
            let tops = self.dirs(name).into_iter();
            for dir in tops.flat_map(|top| inner(&top).into_iter().chain([top])) {
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

/// The groups in a group.
fn inner(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

fn number(file: &Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
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
