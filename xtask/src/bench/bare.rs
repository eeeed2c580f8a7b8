//! The baselines: QEMU alone, without jail, disk, keys, network or log around it.
//!
//! The same executable, firmware, machine, template, kernel, initramfs and image as the platform's;
//! the command line is [`vmm::qemu::argv`]'s with other descriptor numbers and a tap that QEMU
//! makes.

use super::platform::Platform;
use anyhow::{Context as _, Result, bail, ensure};
use api::agent::{FromGuest, ToGuest, Up};
use jail::cgroup::{Bounds, Cgroups};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::{FdFlags, fcntl_setfd};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmm::qemu::{Accel, How, Net, Paths, Qemu, Spec, argv};
use vmm::{DiskFile, Vmm as _};

/// How long a guest may take.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What a bare VM is made of.
pub(super) struct Bare {
    artifacts: PathBuf,
    image: PathBuf,
    template: Option<PathBuf>,
    accel: Accel,
    /// The control group that its QEMU runs in, if it runs in one.
    pub(super) quota: Option<Quota>,
    /// The last command line, for people who want to run it.
    pub(super) line: String,
}

/// The guest's second disk.
pub(super) struct Disk<'a> {
    /// `-object` and `-blockdev` words that make a node `disk`.
    pub(super) words: &'a [String],
    /// The initramfs instead of the platform's.
    pub(super) initramfs: &'a Path,
    /// `/init`'s replacement.
    pub(super) init: &'a str,
}

impl Bare {
    /// What `platform` runs.
    pub(super) fn of(platform: &Platform) -> Result<Self> {
        let artifacts = platform.paths.artifacts();
        let status = platform.probe().warden()?;
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(artifacts.join("manifest.json"))?)?;
        let images = manifest["images"].as_array().context("no images")?;
        let wanted = platform.config.host.pool_image.as_str();
        let id = images
            .iter()
            .find(|i| i["name"] == wanted)
            .and_then(|i| i["id"].as_str())
            .context("the pool's image is not in the manifest")?;
        let bytes = u64::from(platform.config.host.pool_memory_mb) << 20;
        let template = std::fs::read_dir(platform.paths.state("warden").join("templates"))?
            .flatten()
            .map(|e| e.path())
            .find(|d| {
                let memory = d.join("memory").metadata();
                memory.is_ok_and(|m| m.len() == bytes)
            });
        Ok(Self {
            image: artifacts.join(format!("images/{id}.erofs")),
            artifacts,
            template,
            accel: if status.accel.contains("TCG: ") {
                Accel::Tcg
            } else {
                Accel::Kvm
            },
            quota: None,
            line: String::new(),
        })
    }

    /// From nothing to the first answer of the restored agent.
    pub(super) fn restore(&mut self, memory_mib: u32) -> Result<Duration> {
        let began = Instant::now();
        let mut vm = self.restored(memory_mib)?;
        vm.first_answer()?;
        Ok(began.elapsed())
    }

    /// Saves the memory of a restored VM to a new plain file, as the platform has it saved, until
    /// the file is durable.
    pub(super) fn save(&mut self, memory_mib: u32, to: &Path) -> Result<Duration> {
        let mut vm = self.restored(memory_mib)?;
        vm.first_answer()?;
        vm.save(to)
    }

    /// A VM from the template, before its virtual CPUs run.
    pub(super) fn restored(&mut self, memory_mib: u32) -> Result<Vm> {
        let template = self.template.as_ref().context("there is no template")?;
        let state = inherited(&template.join("state"))?;
        let spec = self.spec(How::Template, memory_mib);
        let mut vm = self.start(argv(&spec), Some(&state))?;
        vm.qemu.restore()?;
        Ok(vm)
    }

    /// A VM on the memory that [`Vm::save`] kept in `saved`, before its virtual CPUs run.
    pub(super) fn woken(&mut self, memory_mib: u32, saved: &Path) -> Result<Vm> {
        let state = inherited(saved)?;
        let mut spec = self.spec(How::Wake, memory_mib);
        spec.paths.saved = saved.to_owned();
        let mut vm = self.start(argv(&spec), Some(&state))?;
        vm.qemu.wake()?;
        Ok(vm)
    }

    /// From nothing to the agent's `booted`.
    pub(super) fn cold(&mut self, memory_mib: u32) -> Result<Duration> {
        let began = Instant::now();
        let spec = self.spec(How::Cold, memory_mib);
        let mut vm = self.start(argv(&spec), None)?;
        vm.qemu.cont()?;
        let said = vm.line()?;
        let took = began.elapsed();
        ensure!(said.contains("booted"), "it said {said}");
        Ok(took)
    }

    /// Boots with another second disk and another `/init`, and collects what that says until it
    /// powers off.
    pub(super) fn with_disk(&mut self, memory_mib: u32, disk: &Disk<'_>) -> Result<String> {
        let mut spec = self.spec(How::Cold, memory_mib);
        spec.paths.initramfs = disk.initramfs.to_owned();
        let mut words: Vec<OsString> = Vec::new();
        let mut old = argv(&spec).into_iter().peekable();
        while let Some(word) = old.next() {
            let value = old.peek().and_then(|v| v.to_str()).unwrap_or_default();
            if word == "-blockdev" && value.contains("node-name=disk") {
                // The placeholder's two nodes; ours come in their place.
                if value.contains("null-co") {
                    words.extend(disk.words.iter().map(OsString::from));
                }
                old.next();
            } else if word == "-append" {
                let line = value.replace("rdinit=/init", &format!("rdinit={}", disk.init));
                words.extend([word, line.into()]);
                old.next();
            } else {
                words.push(word);
            }
        }
        let mut vm = self.start(words, None)?;
        vm.qemu.cont()?;
        let mut all = String::new();
        while !all.contains("end\n") {
            all += &vm.line()?;
        }
        Ok(all)
    }

    fn spec(&self, how: How, memory_mib: u32) -> Spec {
        let kernel = self.artifacts.join("kernel");
        Spec {
            how,
            memory_mib,
            cpus: 1,
            accel: self.accel,
            net: Net::Tap,
            paths: Paths {
                image: self.image.clone(),
                kernel: kernel.join("vmlinux"),
                initramfs: kernel.join("initramfs.cpio"),
                memory: self.template.clone().unwrap_or_default().join("memory"),
                saved: PathBuf::new(),
                firmware: self.artifacts.join("closure/usr/share/qemu"),
            },
        }
    }

    fn start(&mut self, words: Vec<OsString>, state: Option<&File>) -> Result<Vm> {
        let (qmp, qmp_theirs) = UnixStream::pair()?;
        let (agent, agent_theirs) = UnixStream::pair()?;
        let mut here = vec![(3, qmp_theirs.as_raw_fd()), (4, agent_theirs.as_raw_fd())];
        for socket in [&qmp_theirs, &agent_theirs] {
            fcntl_setfd(socket, FdFlags::empty())?;
        }
        if let Some(state) = state {
            here.push((6, state.as_raw_fd()));
        }
        let closure = self.artifacts.join("closure");
        let mut command = Command::new(closure.join("lib64/ld-linux-x86-64.so.2"));
        let libs = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
        let libs = libs.map(|l| closure.join(l).display().to_string());
        command.arg("--library-path").arg(libs.join(":"));
        command.arg(closure.join("usr/bin/qemu-system-x86_64"));
        command.args(words.into_iter().map(|w| renumbered(w, &here)));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.line = format!("{command:?}").replace('"', "");
        let child = command.spawn().context("start the closure's QEMU")?;
        let child = Owned(child);
        if let Some(quota) = &self.quota {
            quota.put(child.0.id())?;
        }
        drop((qmp_theirs, agent_theirs));
        Ok(Vm {
            qemu: Qemu::new(qmp)?,
            agent,
            buffer: Vec::new(),
            _child: child,
        })
    }
}

/// A file for reading, whose descriptor a child gets.
fn inherited(path: &Path) -> Result<File> {
    let file = File::open(path)?;
    fcntl_setfd(&file, FdFlags::empty())?;
    Ok(file)
}

/// `argv` speaks of fixed descriptors; an unjailed child gets those of this process.
fn renumbered(word: OsString, here: &[(i32, i32)]) -> OsString {
    let Some(text) = word.to_str() else {
        return word;
    };
    if text.starts_with("tap,") {
        // The template wants the same offloads, which only a tap has.
        let name = tap_name();
        let own = format!("tap,id=net,ifname={name},script=no,downscript=no,vhost=off");
        return own.into();
    }
    if !text.starts_with("socket,id=") && !text.starts_with("fd=") {
        return word;
    }
    for (there, here) in here {
        let old = format!("fd={there}");
        if text.ends_with(&old) || text.contains(&format!("{old},")) {
            return text.replacen(&old, &format!("fd={here}"), 1).into();
        }
    }
    word
}

/// The bare VM's tap: QEMU makes one unless it is there.
pub(super) fn tap_name() -> String {
    format!("cmb{}", std::process::id())
}

/// One QEMU; ended when it is dropped.
pub(super) struct Vm {
    qemu: Qemu,
    agent: UnixStream,
    buffer: Vec<u8>,
    _child: Owned,
}

impl Vm {
    /// Runs, until the agent answers.
    pub(super) fn first_answer(&mut self) -> Result<()> {
        self.qemu.cont()?;
        // Anything it answers is an answer: this line is no message, and it says so.
        self.agent.write_all(b"{}\n")?;
        let said = self.line()?;
        ensure!(said.contains("message_malformed"), "it said {said}");
        Ok(())
    }

    /// Stops its virtual CPUs.
    pub(super) fn stop(&mut self) -> Result<()> {
        Ok(self.qemu.stop()?)
    }

    /// Runs on `disk`, as vmctl has it, until the agent that is told `told` is up.
    pub(super) fn up(&mut self, disk: &Path, told: &ToGuest) -> Result<Up> {
        let mut options = File::options();
        options.read(true).write(true);
        // QEMU wants a descriptor's very flags.
        let direct = OFlags::DIRECT.bits().cast_signed();
        let file = options.custom_flags(direct).open(disk)?;
        let size_bytes = file.metadata()?.len();
        let disk = DiskFile::Descriptor(file.into());
        self.qemu.disk_attach(&disk, size_bytes)?;
        self.qemu.cont()?;
        let line = serde_json::to_string(told)? + "\n";
        self.agent.write_all(line.as_bytes())?;
        match serde_json::from_str(&self.line()?)? {
            FromGuest::Up(up) => Ok(up),
            other => bail!("the guest is not up: {other:?}"),
        }
    }

    /// Stops it and saves its memory to a new plain file; how long that took until it was durable.
    pub(super) fn save(&mut self, to: &Path) -> Result<Duration> {
        self.qemu.stop()?;
        // For writing only: QEMU wants a descriptor's very access mode.
        let file = File::options().write(true).create_new(true).open(to)?;
        let began = Instant::now();
        self.qemu.memory_save(file.as_fd())?;
        file.sync_data()?;
        Ok(began.elapsed())
    }

    /// The next line on the agent's channel, with its end.
    fn line(&mut self) -> Result<String> {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = rustix::time::Timespec {
                tv_sec: i64::try_from(left.as_secs())?,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::from_borrowed_fd(self.agent.as_fd(), PollFlags::IN)];
            if poll(&mut fds, Some(&left))? == 0 {
                bail!("the guest said nothing in {} s", WAIT_MAX.as_secs());
            }
            let mut chunk = [0; 4096];
            match self.agent.read(&mut chunk)? {
                0 => bail!("the VM ended before the guest answered"),
                n => self.buffer.extend_from_slice(&chunk[..n]),
            }
        }
    }
}

/// As much CPU time as a workspace of one CPU has, for what is measured beside it.
pub(super) struct Quota(Cgroups);

impl Quota {
    /// Another name than an installation's, which forgets the groups that it did not make.
    const INSTANCE: &str = "bench-bare";
    const GROUP: &str = "one";

    pub(super) fn one_cpu() -> Result<Self> {
        let groups = Cgroups::open(Self::INSTANCE)?;
        let bounds = Bounds {
            memory_bytes: None,
            memory_min_bytes: 0,
            pids: None,
            cpu_us: jail::plan::slot_bounds(1).cpu_us,
        };
        groups.create(Self::GROUP, bounds)?;
        Ok(Self(groups))
    }

    /// A process and what it will start.
    pub(super) fn put(&self, pid: u32) -> Result<()> {
        for door in self.0.doors(Self::GROUP)? {
            File::from(door).write_all(pid.to_string().as_bytes())?;
        }
        Ok(())
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _gone = self.0.remove(Self::GROUP);
        self.0.forget();
    }
}

/// A child that does not outlive its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
