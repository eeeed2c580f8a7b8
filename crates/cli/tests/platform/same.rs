//! However a workspace comes up, it is the same: a cold boot, a restored template and a VM of the pool
//! show the same files, devices, mounts and sysctls, but for a list of what is each one's own.

use crate::world::{Account, Platform};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Everything that is looked at, one `name value` a line: of each file its kind, mode, owner, size and
/// content, or where it points; of each sysctl and each fact of a process its text.
const LISTING: &str = r#"
import hashlib, os, stat
out = open('/dev/shm/listing', 'w')
def say(name, *value): out.write(name + '\t' + ' '.join(str(v) for v in value).replace('\n', '|') + '\n')
def text(path):
    try: return open(path, errors='replace').read().strip()
    except OSError as e: return 'errno %d' % e.errno
mounts = [line.split(' ') for line in open('/proc/self/mountinfo').read().splitlines()]
points = {m[4] for m in mounts}
def walk(top):
    for at, dirs, files in os.walk(top):
        dirs[:] = [d for d in dirs if os.path.join(at, d) not in points]
        for name in ['.'] + files + [d for d in dirs if os.path.islink(os.path.join(at, d))]:
            path = os.path.normpath(os.path.join(at, name))
            if path != out.name: file(path)
def file(path):
    s = os.lstat(path)
    about = [oct(s.st_mode), s.st_uid, s.st_gid]
    if stat.S_ISLNK(s.st_mode): about += [os.readlink(path)]
    elif stat.S_ISREG(s.st_mode):
        about += [s.st_size, hashlib.sha256(open(path, 'rb').read()).hexdigest()]
    elif stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode):
        about += [os.major(s.st_rdev), os.minor(s.st_rdev)]
    say(path, *about)
for top in ('/', '/dev', '/dev/shm', '/dev/pts', '/run'): walk(top)
for at, dirs, files in os.walk('/proc/sys'):
    for name in files:
        path = os.path.join(at, name)
        say(path, oct(os.lstat(path).st_mode), text(path))
# Without the numbers that the kernel gives: what, where, how.
for m in mounts: say('mount ' + m[4], m[3], m[5], *m[m.index('-') + 1:])
# Without what the host measured of its clock when it started the VMM.
say('/proc/cmdline', *(w for w in text('/proc/cmdline').split() if not w.startswith('tsc_early_khz=')))
for name in ('version', 'filesystems', 'devices', 'swaps', 'partitions', 'consoles'):
    say('/proc/' + name, text('/proc/' + name))
# A kernel with everything built in has none.
if os.path.exists('/proc/modules'): say('modules', *sorted(l.split(' ')[0] for l in open('/proc/modules')))
for name in ('limits', 'cgroup', 'oom_score_adj', 'attr/current'): say('self ' + name, text('/proc/self/' + name))
for line in open('/proc/self/status'):
    key, value = line.strip().split(':', 1)
    if key[:3] in ('Uid', 'Gid', 'Gro', 'Cap', 'NoN', 'Sec', 'Sig', 'Shd'): say('self ' + key, value.strip())
for key, value in os.environ.items(): say('env ' + key, value)
say('self cwd', os.getcwd()); say('self umask', oct(os.umask(0)))
for name in sorted(os.listdir('/sys/class/net')):
    for fact in ('mtu', 'flags', 'operstate', 'type'): say('net ' + name + ' ' + fact, text('/sys/class/net/%s/%s' % (name, fact)))
"#;

/// What is each one's own, by the beginning of its name, and why. Nothing else may differ.
const OWN: &[(&str, &str)] = &[
    ("/etc/machine-id", "an identity"),
    ("/etc/hostname", "the workspace's id"),
    ("/etc/hosts", "the workspace's id and address"),
    ("/proc/sys/kernel/hostname", "the workspace's id"),
    ("/proc/sys/kernel/random/boot_id", "an identity"),
    ("/proc/sys/kernel/random/uuid", "another at each read"),
    ("/proc/sys/kernel/ns_last_pid", "counts processes"),
    ("/proc/sys/fs/dentry-state", "counts what is cached"),
    ("/proc/sys/fs/inode-nr", "counts what is cached"),
    ("/proc/sys/fs/inode-state", "counts what is cached"),
    ("/proc/sys/fs/file-nr", "counts what is open"),
    ("/proc/sys/fs/quota/syncs", "counts"),
];

/// At least so many lines, so that a listing that broke off shows.
const LINES_MIN: usize = 3_000;

#[test]
fn a_cold_boot_a_restored_template_and_a_pooled_vm_are_the_same_workspace() {
    let (cold, template) = {
        let p = Platform::start("[host]\npool_size = 0\n", None);
        let account = p.account("same");
        // The first of its kind: what it was booted from is made a template after it.
        let cold = look(&p, &account, "cold");
        until(|| p.warden().is_some_and(|s| !s.templates.is_empty()));
        (cold, look(&p, &account, "template"))
    };
    let pooled = {
        let p = Platform::start("[host]\npool_size = 1\n", None);
        let account = p.account("same");
        until(|| {
            let socket = p.root().join("run/casemate/host/host.sock");
            let (op, wait) = (api::host::Op::Info, Duration::from_secs(5));
            let info = api::rpc::blocking::call(&socket, "test", &op, wait);
            info.is_ok_and(|info: api::host::Info| info.pool_ready > 0)
        });
        look(&p, &account, "pool")
    };
    for (how, other) in [("template", &template), ("pool", &pooled)] {
        let mut differ = Vec::new();
        for name in cold
            .keys()
            .chain(other.keys().filter(|n| !cold.contains_key(*n)))
        {
            let (one, two) = (cold.get(name), other.get(name));
            let own = OWN.iter().any(|(own, _)| name.starts_with(own));
            if one != two && !own {
                differ.push(format!("{name}\n  cold: {one:?}\n  {how}: {two:?}"));
            }
        }
        assert!(differ.is_empty(), "{}", differ.join("\n"));
        // Another kernel, as the small one, has not all of them.
        if std::env::var_os("CASEMATE_ARTIFACTS").is_some() {
            continue;
        }
        for (own, why) in OWN {
            let there = cold.keys().any(|name| name.starts_with(own));
            assert!(
                there,
                "{own} ({why}) is nowhere: is it excepted for nothing?"
            );
        }
    }
    for identity in ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
        let all = [&cold, &template, &pooled].map(|of| &of[identity]);
        assert!(
            all[0] != all[1] && all[1] != all[2] && all[0] != all[2],
            "{identity}"
        );
    }
}

/// What a new workspace shows that came up in this way.
fn look(p: &Platform, account: &Account, how: &str) -> BTreeMap<String, String> {
    let ok = |args: &[&str]| {
        let out = p.as_user(account, args);
        p.expect_ok(&args[..args.len().min(4)].join(" "), &out);
        out.stdout
    };
    let made = ok(&["--json", "ws", "create", "--public-access"]);
    let made: Value = serde_json::from_slice(&made).unwrap();
    assert_eq!(made["started_from"], how, "{made}");
    let id = made["id"].as_str().unwrap();
    ok(&["ws", "exec", id, "--", "python3", "-c", LISTING]);
    let to = p.root().join("listing");
    let from = format!("{id}:/dev/shm/listing");
    ok(&["ws", "cp", &from, to.to_str().unwrap()]);
    let text = std::fs::read_to_string(&to).unwrap();
    std::fs::remove_file(&to).unwrap();
    ok(&["ws", "rm", id]);
    let lines = text.lines().filter_map(|line| line.split_once('\t'));
    let listing: BTreeMap<_, _> = lines
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    println!("{how}: {} names", listing.len());
    assert!(listing.len() > LINES_MIN, "a part of it: {}", listing.len());
    listing
}

/// Waits for a template, or for a pooled VM.
fn until(is_there: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(180);
    while !is_there() {
        assert!(Instant::now() < end, "no template, or no pooled VM");
        std::thread::sleep(Duration::from_millis(50));
    }
}
