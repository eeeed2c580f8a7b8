//! Takes single parts out of a jail without touching the launcher: it is the shipped program, and
//! the tracer answers one of its system calls in the kernel's place, or clears a flag of it.
//!
//! A part that is a plain number of the launcher (a limit, a namespace) goes like this too, so
//! that the list of parts here is the list of the launcher's calls.

use rustix::fd::BorrowedFd;
use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// One part of a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    User,
    Pid,
    Net,
    Ipc,
    Uts,
    Root,
    ReadOnly,
    Uid,
    Capabilities,
    NoNewPrivs,
    Landlock,
    Seccomp,
    Nproc,
    Nofile,
    Fsize,
    Memlock,
    Core,
    /// Not a call of the launcher: the harness gives it no group to join.
    Cgroup,
}

/// What becomes of a call.
enum Verdict {
    Let,
    /// Not made; the caller reads this.
    Answer(i64),
    /// Made with this word of its memory changed.
    Word(u64, u64),
}

pub struct Tracer {
    parts: Vec<Part>,
    group: i32,
    launcher: i32,
    cloned: bool,
    answers: HashMap<i32, i64>,
}

impl Tracer {
    /// Makes the command traced; `None` when nothing is to be taken away by tracing.
    pub fn prepare(command: &mut Command, parts: &[Part]) -> Option<Self> {
        if parts.iter().all(|p| *p == Part::Cgroup) {
            return None;
        }
        command.process_group(0);
        // SAFETY: one async-signal-safe call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                Ok(())
            });
        }
        Some(Self {
            parts: parts.into(),
            group: 0,
            launcher: 0,
            cloned: false,
            answers: HashMap::new(),
        })
    }

    /// Until the launcher has ended.
    pub fn until_ready(mut self, launcher: u32, _channel: BorrowedFd<'_>) -> Self {
        self.launcher = launcher.cast_signed();
        self.group = self.launcher;
        let mut status = 0;
        // SAFETY: `status` is there to be written.
        let pid = unsafe { libc::waitpid(self.launcher, &raw mut status, 0) };
        assert_eq!(pid, self.launcher);
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEEXEC
            | libc::PTRACE_O_EXITKILL;
        ptrace(libc::PTRACE_SETOPTIONS, self.launcher, 0, options as u64);
        ptrace(libc::PTRACE_SYSCALL, self.launcher, 0, 0);
        while self.step() != Some(self.launcher) {}
        self
    }

    /// Until `pid` has become the program; then it is let go.
    pub fn until_exec(mut self, pid: u32) {
        while self.step() != Some(pid.cast_signed()) {}
    }

    /// One stop of one process; that process, if it ended or became another program.
    fn step(&mut self) -> Option<i32> {
        let mut status = 0;
        // SAFETY: `status` is there to be written.
        let pid = unsafe { libc::waitpid(-self.group, &raw mut status, libc::__WALL) };
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        if !libc::WIFSTOPPED(status) {
            return Some(pid);
        }
        if status >> 8 == libc::SIGTRAP | (libc::PTRACE_EVENT_EXEC << 8) {
            ptrace(libc::PTRACE_DETACH, pid, 0, 0);
            return Some(pid);
        }
        let signal = libc::WSTOPSIG(status);
        let mut deliver = 0;
        if signal == libc::SIGTRAP | 0x80 {
            self.call(pid);
        } else if signal != libc::SIGTRAP && signal != libc::SIGSTOP {
            deliver = signal;
        }
        ptrace(libc::PTRACE_SYSCALL, pid, 0, deliver as u64);
        None
    }

    fn call(&mut self, pid: i32) {
        // `struct ptrace_syscall_info`: the kind, three words, then number and arguments.
        let mut info = [0u64; 11];
        ptrace(
            0x420e,
            pid,
            size_of_val(&info) as u64,
            info.as_mut_ptr() as u64,
        );
        let leaving = info[0] & 0xff == 2;
        if leaving {
            if let Some(answer) = self.answers.remove(&pid) {
                let mut regs = registers(pid);
                regs.rax = answer.cast_unsigned();
                ptrace(libc::PTRACE_SETREGS, pid, 0, &raw const regs as u64);
            }
            return;
        }
        let args = [info[4], info[5], info[6], info[7], info[8], info[9]];
        match self.verdict(pid, info[3].cast_signed(), args) {
            Verdict::Let => {}
            Verdict::Answer(answer) => {
                let mut regs = registers(pid);
                regs.orig_rax = u64::MAX;
                ptrace(libc::PTRACE_SETREGS, pid, 0, &raw const regs as u64);
                self.answers.insert(pid, answer);
            }
            Verdict::Word(address, value) => ptrace(libc::PTRACE_POKEDATA, pid, address, value),
        }
    }

    fn verdict(&mut self, pid: i32, nr: i64, args: [u64; 6]) -> Verdict {
        let without = |part| self.parts.contains(&part);
        match nr {
            libc::SYS_clone3 => {
                self.cloned = true;
                let mut flags = word(pid, args[0]);
                for (part, flag) in [
                    (Part::User, libc::CLONE_NEWUSER),
                    (Part::Pid, libc::CLONE_NEWPID),
                    (Part::Net, libc::CLONE_NEWNET),
                    (Part::Ipc, libc::CLONE_NEWIPC),
                    (Part::Uts, libc::CLONE_NEWUTS),
                ] {
                    if self.parts.contains(&part) {
                        flags &= !(flag as u64);
                    }
                }
                Verdict::Word(args[0], flags)
            }
            // The id map of a namespace that is not there.
            libc::SYS_write
                if without(Part::User) && self.cloned && pid == self.launcher && args[2] > 1 =>
            {
                Verdict::Answer(args[2].cast_signed())
            }
            libc::SYS_sethostname if without(Part::Uts) => Verdict::Answer(0),
            libc::SYS_pivot_root | libc::SYS_umount2 if without(Part::Root) => Verdict::Answer(0),
            libc::SYS_chdir if without(Part::Root) && text(pid, args[0]) == "/" => {
                Verdict::Answer(0)
            }
            libc::SYS_mount_setattr if without(Part::ReadOnly) => {
                let set = word(pid, args[3]);
                Verdict::Word(args[3], set & !libc::MOUNT_ATTR_RDONLY)
            }
            libc::SYS_setresuid | libc::SYS_setresgid if without(Part::Uid) => Verdict::Answer(0),
            libc::SYS_capset if without(Part::Capabilities) => Verdict::Answer(0),
            libc::SYS_prctl
                if without(Part::Capabilities) && args[0] == libc::PR_CAPBSET_DROP as u64 =>
            {
                Verdict::Answer(0)
            }
            libc::SYS_prctl
                if without(Part::NoNewPrivs) && args[0] == libc::PR_SET_NO_NEW_PRIVS as u64 =>
            {
                Verdict::Answer(0)
            }
            libc::SYS_landlock_restrict_self if without(Part::Landlock) => Verdict::Answer(0),
            libc::SYS_seccomp if without(Part::Seccomp) => Verdict::Answer(0),
            libc::SYS_prctl if without(Part::Seccomp) && args[0] == libc::PR_SET_SECCOMP as u64 => {
                Verdict::Answer(0)
            }
            libc::SYS_prlimit64 | libc::SYS_setrlimit if pid != self.launcher => {
                let resource = if nr == libc::SYS_setrlimit {
                    args[0]
                } else {
                    args[1]
                };
                let set = nr == libc::SYS_setrlimit || args[2] != 0;
                let part = match resource as u32 {
                    libc::RLIMIT_NPROC => Part::Nproc,
                    libc::RLIMIT_NOFILE => Part::Nofile,
                    libc::RLIMIT_FSIZE => Part::Fsize,
                    libc::RLIMIT_MEMLOCK => Part::Memlock,
                    libc::RLIMIT_CORE => Part::Core,
                    _ => return Verdict::Let,
                };
                if set && without(part) {
                    Verdict::Answer(0)
                } else {
                    Verdict::Let
                }
            }
            _ => Verdict::Let,
        }
    }
}

fn ptrace(request: libc::c_uint, pid: i32, address: u64, data: u64) {
    // SAFETY: the tracee is stopped, and every pointer that is passed lives in the caller.
    let r = unsafe { libc::ptrace(request, pid, address, data) };
    assert!(
        r >= 0,
        "ptrace {request:#x}: {}",
        std::io::Error::last_os_error()
    );
}

fn registers(pid: i32) -> libc::user_regs_struct {
    // SAFETY: plain numbers; all-zero is valid.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, pid, 0, &raw mut regs as u64);
    regs
}

fn word(pid: i32, address: u64) -> u64 {
    // SAFETY: reads the stopped tracee; no pointer of ours.
    unsafe { libc::ptrace(libc::PTRACE_PEEKDATA, pid, address, 0u64) }.cast_unsigned()
}

fn text(pid: i32, mut address: u64) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < 256 {
        for byte in word(pid, address).to_le_bytes() {
            if byte == 0 {
                return String::from_utf8_lossy(&bytes).into_owned();
            }
            bytes.push(byte);
        }
        address += 8;
    }
    String::new()
}
