//! VMs of one template are twins until they are attached: no secret, number or name of one is of
//! use to whoever sees the other.

use crate::world::{Account, Platform};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a guest can show of its secrets, one `name value` a line. Sequence numbers and timestamps
/// are a clock's value and an offset that comes of secrets and the connection: the connection is
/// the same in all guests, and the clock is taken away.
const SECRETS: &str = r"
import os, socket, struct, time, uuid
def file(name):
    try: return open(name).read().strip()
    except OSError: return ''
print('boot_id', file('/proc/sys/kernel/random/boot_id'))
print('machine_id', file('/etc/machine-id'))
print('hostname', socket.gethostname())
print('getrandom', os.getrandom(32).hex())
print('urandom', open('/dev/urandom', 'rb').read(32).hex())
print('uuid', file('/proc/sys/kernel/random/uuid'))
print('hash', hash('casemate'))
print('stack', [l.split()[0] for l in open('/proc/self/maps') if '[stack]' in l][0])
sniff = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
sniff.bind(('lo', 0))
sniff.settimeout(10)
for port in (40001, 40002, 40003):
    server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(('127.0.0.1', port)); server.listen()
    client = socket.socket(); client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(('127.0.0.1', port + 1000))
    wall, up = time.time_ns(), time.monotonic_ns()
    client.connect(('127.0.0.1', port))
    while True:
        frame = sniff.recv(2048)
        head = 14 + (frame[14] & 15) * 4
        sport, dport, seq = struct.unpack('!HHI', frame[head:head + 8])
        if (sport, dport) == (port + 1000, port) and frame[head + 13] == 2: break
    options = frame[head + 20:head + (frame[head + 12] >> 4) * 4]
    at = 0
    while options[at] != 8: at += 1 if options[at] == 1 else options[at + 1]
    stamp = struct.unpack('!I', options[at + 2:at + 6])[0]
    # secure_seq.c: a step is 64 ns of the wall clock; a timestamp is in ms of uptime.
    print('sequence%d' % port, (seq - (wall >> 6)) % 2**32)
    print('timestamp%d' % port, (stamp - up // 10**6) % 2**32)
";
/// Two numbers that are so near come of the same secret: 2^22 steps of 64 ns are 0.27 s, and by
/// chance three pairs are all so near once in 10^8.
const NEAR: u32 = 1 << 22;

#[test]
fn clones_of_a_template_share_no_secret() {
    let p = Platform::start("[host]\npool_size = 2\n", None);
    let account = p.account("twins");
    let twins = [(); 3].map(|()| {
        restored(&p);
        let id = create(&p, &account);
        let told = inside(&p, &account, &id, &["python3", "-c", SECRETS]);
        let secrets: BTreeMap<String, String> = told
            .lines()
            .filter_map(|l| l.split_once(' '))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        assert_eq!(secrets.len(), 14, "{told}");
        secrets
    });
    for (i, j) in [(0, 1), (0, 2), (1, 2)] {
        let (one, two) = (&twins[i], &twins[j]);
        let mut near = BTreeMap::<&str, usize>::new();
        for (name, value) in one {
            println!("{name:16} {value:>66} {:>66}", two[name]);
            assert_ne!(*value, two[name], "{name}");
            for kind in ["sequence", "timestamp"] {
                if name.starts_with(kind) {
                    let number = |text: &str| text.parse::<u32>().unwrap();
                    let apart = number(value).wrapping_sub(number(&two[name]));
                    let apart = apart.min(apart.wrapping_neg());
                    *near.entry(kind).or_default() += usize::from(apart < NEAR);
                }
            }
        }
        for (kind, near) in near {
            assert!(near < 3, "{kind}: both VMs have one secret");
        }
    }
}

/// Waits for a pooled VM that was restored from a template.
fn restored(p: &Platform) {
    let deadline = Instant::now() + Duration::from_secs(120);
    let waits = |s: &Value| s["how"] == "template" && s["workspace"].is_null();
    while !p.slots().iter().any(waits) {
        assert!(Instant::now() < deadline, "no pooled VM");
        std::thread::yield_now();
    }
}

fn create(p: &Platform, account: &Account) -> String {
    let out = p.as_user(account, &["--json", "ws", "create", "--public-access"]);
    p.expect_ok("create", &out);
    let made: Value = serde_json::from_slice(&out.stdout).unwrap();
    made["id"].as_str().unwrap().to_owned()
}

fn inside(p: &Platform, account: &Account, id: &str, command: &[&str]) -> String {
    let args = [&["ws", "exec", id, "--"], command].concat();
    let out = p.as_user(account, &args);
    p.expect_ok("exec", &out);
    String::from_utf8_lossy(&out.stdout).into_owned()
}
