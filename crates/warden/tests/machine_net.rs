//! The firewall, with packets: each guest is a network namespace behind a tap of its own. Needs
//! root.
#![allow(clippy::unwrap_used, unsafe_code, missing_docs)]

mod world;

use api::warden::{NetRates, Open, Source};
use jail::process::Launcher;
use net::Rules;
use net::network::{mac, mac_text};
use net::nft::Nft;
use net::tap::{create as tap_create, forward as tap_forward};
use rustix::fd::{AsRawFd, OwnedFd};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};
use world::*;

/// How long "no answer" is waited for: everything here is one machine's memory.
const SILENCE: Duration = Duration::from_millis(400);

#[test]
fn i13_nothing_passes_but_an_open_triple() {
    in_netns(|| {
        let mut nft = Nft::open(network(), EDGE_UID).unwrap();
        nft.rebuild(&BTreeMap::new()).unwrap();
        let guest = Guest::new(&mut nft, 3);
        let to = SocketAddr::new(guest.ip.into(), 9991);
        guest.serve(9991);
        guest.serve(22);
        assert!(!dial(EDGE_UID, to), "closed by default");
        let dropped = nft.dropped(3).unwrap().inward;
        assert!(dropped > 0);
        nft.set(3, &opens(&[]), &opens(&[edge(9991)])).unwrap();
        assert!(dial(EDGE_UID, to));
        for stranger in [0, HOST_UID, 900_003] {
            assert!(
                !dial(stranger, to),
                "uid {stranger} with the edge's address"
            );
        }
        assert!(
            !dial(EDGE_UID, SocketAddr::new(guest.ip.into(), 22)),
            "another port"
        );

        // Closing cuts what is under way, in both directions.
        let mut live = as_uid(EDGE_UID, move || {
            TcpStream::connect_timeout(&to, SOON).unwrap()
        });
        live.set_read_timeout(Some(SOON)).unwrap();
        let mut echo = [0u8; 4];
        live.write_all(b"ping").unwrap();
        live.read_exact(&mut echo).unwrap();
        nft.set(3, &opens(&[edge(9991)]), &opens(&[])).unwrap();
        live.set_read_timeout(Some(SILENCE)).unwrap();
        live.write_all(b"ping").unwrap();
        assert!(
            live.read_exact(&mut echo)
                .is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
        );
        // And opening again mends it.
        nft.set(3, &opens(&[]), &opens(&[edge(9991)])).unwrap();
        live.set_read_timeout(Some(SOON)).unwrap();
        live.read_exact(&mut echo).unwrap();

        // A rebuild, as after a restart, keeps what it is told and nothing else.
        nft.rebuild(&BTreeMap::from([(3, opens(&[]))])).unwrap();
        assert!(!dial(EDGE_UID, to));
        nft.rebuild(&BTreeMap::from([(3, opens(&[edge(9991)]))]))
            .unwrap();
        assert!(dial(EDGE_UID, to));
        nft.slot_remove(3, &opens(&[edge(9991)])).unwrap();
        nft.slot_remove(3, &opens(&[edge(9991)])).unwrap();
        assert!(!dial(EDGE_UID, to));
    });
}

#[test]
fn a_guest_reaches_nobody_by_itself_or_under_another_name() {
    in_netns(|| {
        let mut nft = Nft::open(network(), EDGE_UID).unwrap();
        nft.rebuild(&BTreeMap::new()).unwrap();
        let (one, two) = (Guest::new(&mut nft, 1), Guest::new(&mut nft, 2));
        nft.set(1, &opens(&[]), &opens(&[edge(9991)])).unwrap();
        two.serve(80);
        let gateway = network().gateway();
        let host = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = host.local_addr().unwrap().port();
        // The other guest is not even to be found: nobody answers ARP for it.
        for to in [(gateway, port), (two.ip, 80)] {
            assert!(
                !one.run(move || TcpStream::connect_timeout(&to.into(), SILENCE).is_ok()),
                "{to:?}"
            );
        }
        until("the drop is counted", || {
            nft.dropped(1).unwrap().outward > 0
        });
        // From the port that the edge may reach, to anybody: an answer to nothing.
        let from = (one.ip, 9991);
        let heard = UdpSocket::bind((gateway, 0)).unwrap();
        heard.set_read_timeout(Some(SILENCE)).unwrap();
        let to = heard.local_addr().unwrap();
        one.run(move || UdpSocket::bind(from).unwrap().send_to(b"x", to).map(drop))
            .unwrap();
        assert!(heard.recv(&mut [0; 8]).is_err());

        // Spoofed: another address, then another hardware address.
        for change in [
            "addr add 10.117.0.77/16 dev eth0",
            "link set eth0 address 02:00:0a:75:00:04",
        ] {
            let before = nft.dropped(1).unwrap().outward;
            let from: Ipv4Addr = if change.starts_with("addr") {
                [10, 117, 0, 77].into()
            } else {
                one.ip
            };
            one.run(move || {
                ip(change);
                // The address of the gateway is known, so that a packet does leave.
                ip(&format!(
                    "neigh replace {gateway} lladdr {} dev eth0",
                    mac_text(mac(gateway))
                ));
                UdpSocket::bind((from, 0))
                    .unwrap()
                    .send_to(b"x", to)
                    .unwrap();
            });
            until("the drop is counted", || {
                nft.dropped(1).unwrap().outward > before
            });
            assert!(heard.recv(&mut [0; 8]).is_err(), "{change}");
        }
    });
}

#[test]
fn guests_meet_by_a_triple_of_theirs_alone() {
    in_netns(|| {
        let mut nft = Nft::open(network(), EDGE_UID).unwrap();
        nft.rebuild(&BTreeMap::new()).unwrap();
        let (one, two) = (Guest::new(&mut nft, 1), Guest::new(&mut nft, 2));
        for guest in [&one, &two] {
            guest.serve(9990);
            guest.serve(80);
        }
        let link = [Open {
            source: Source::Slot(1),
            port: 9990,
        }];
        for slot in [1, 2] {
            tap_forward(slot, true).unwrap();
        }
        let reach = |from: &Guest, to: &Guest, port: u16| {
            let to = SocketAddr::new(to.ip.into(), port);
            from.run(move || TcpStream::connect_timeout(&to, SILENCE).is_ok())
        };
        assert!(!reach(&one, &two, 9990));
        nft.set(2, &opens(&[]), &opens(&link)).unwrap();
        assert!(reach(&one, &two, 9990));
        assert!(!reach(&one, &two, 80), "another port");
        assert!(!reach(&two, &one, 9990), "the other way");
        nft.set(2, &opens(&link), &opens(&[])).unwrap();
        assert!(!reach(&one, &two, 9990));
    });
}

/// One bound, upwards: what passed is no more than a full bucket and what ran into it since. The
/// clock is read before the bucket is made and after what passed is counted, and nothing has to be
/// fast: the rates are so low that any machine sends more. Each bound has a guest of its own: what
/// one sent may still be in its queue, and would be counted for another bound.
#[test]
fn a_guest_sends_and_gets_no_more_than_its_rates() {
    const BYTES_PER_S: u64 = 64 << 10;
    const PACKETS_PER_S: u64 = 100;
    /// What a full bucket holds; see `net::nft`.
    const BURST_BYTES: u64 = BYTES_PER_S + (128 << 10);
    const BURST_PACKETS: u64 = PACKETS_PER_S;
    /// Bytes of the headers of a datagram.
    const HEADERS: u64 = 28;
    /// What a link says by itself (ND, MLD), counted as the datagrams are.
    const CHATTER: u64 = 32;
    in_netns(|| {
        let mut nft = Nft::open(network(), EDGE_UID).unwrap();
        nft.rebuild(&BTreeMap::new()).unwrap();
        let free = opens(&[edge(9991)]);
        let bound = |bytes_per_s, packets_per_s| Rules {
            rates: NetRates {
                bytes_per_s,
                packets_per_s,
            },
            ..free.clone()
        };
        let most = |rate: u64, burst: u64, since: Instant| {
            (since.elapsed().as_secs_f64() * rate as f64).ceil() as u64 + burst
        };

        // From the guest. What passes its rates is not open, and counted where that falls.
        let sink = SocketAddr::new(network().gateway().into(), 9);
        for (slot, rules, size) in [
            (1, bound(0, PACKETS_PER_S), 1),
            (2, bound(BYTES_PER_S, 0), 1000),
        ] {
            let guest = Guest::new(&mut nft, slot);
            let (since, before) = (Instant::now(), nft.dropped(slot).unwrap());
            nft.set(slot, &Rules::default(), &rules).unwrap();
            until("more than its rates", || {
                guest.run(move || {
                    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
                    for _ in 0..500 {
                        let _ = socket.send_to(&vec![0; size], sink);
                    }
                });
                nft.dropped(slot).unwrap().outward_limited > before.outward_limited
            });
            let passed = nft.dropped(slot).unwrap().outward - before.outward;
            assert!(passed > 0);
            let (passed, most) = match rules.rates.bytes_per_s {
                0 => (passed, most(PACKETS_PER_S, BURST_PACKETS + CHATTER, since)),
                rate => {
                    let bytes = size as u64 + HEADERS;
                    let burst = BURST_BYTES + CHATTER * bytes;
                    (passed * bytes, most(rate, burst, since))
                }
            };
            assert!(passed <= most, "{passed} of {most}");
        }

        // Towards the guest, and after a restart of casemate-net.
        let guest = Guest::new(&mut nft, 3);
        let rules = bound(BYTES_PER_S, 0);
        let since = Instant::now();
        nft.rebuild(&BTreeMap::from([(3, rules.clone())])).unwrap();
        let (to, count) = guest.count(9991);
        let write = move || {
            let mut stream = TcpStream::connect_timeout(&to, SOON).unwrap();
            // Ends when the test does.
            while stream.write_all(&[0; 4096]).is_ok() {}
        };
        std::thread::spawn(move || as_uid(EDGE_UID, write));
        until("more than its rates", || {
            nft.dropped(3).unwrap().inward_limited > 0
        });
        until("what passed arrives", || count.load(Ordering::Relaxed) > 0);
        let got = count.load(Ordering::Relaxed);
        let most = most(BYTES_PER_S, BURST_BYTES, since);
        assert!(got <= most, "{got} of {most}");
        nft.slot_remove(3, &rules).unwrap();
        assert_eq!(nft_elements(), Vec::<String>::new());
    });
}

#[test]
fn a_casemate_net_that_dies_is_replaced_and_the_rules_stay() {
    in_netns(|| {
        let world = World::new();
        let programs = world.dir.join("programs");
        let launcher = Launcher {
            program: programs.join("casemate-jail"),
            root: world.dir.clone(),
        };
        let program = programs.join("casemate-net");
        let mut net = net::Client::new(launcher, program, network(), EDGE_UID);
        net.stands(BTreeMap::new()).unwrap();
        let tap = net.tap(3).unwrap();
        net.set(3, opens(&[edge(9991)])).unwrap();
        let pid = net.pid().unwrap();
        let facts = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for fact in [
            "Uid:\t929998\t929998\t929998\t929998",
            "Gid:\t929998\t929998\t929998\t929998",
            "Groups:\t \n",
            // CAP_NET_ADMIN, and no other.
            "CapPrm:\t0000000000001000",
            "CapEff:\t0000000000001000",
            "CapBnd:\t0000000000001000",
            "NoNewPrivs:\t1",
        ] {
            assert!(facts.contains(fact), "{fact:?} in {facts}");
        }
        let proc = jail::process::Proc::of(pid).unwrap();
        assert!(proc.handle().unwrap().kill(SOON));
        let stands = |port: &str| nft_elements().iter().any(|e| e.contains(port));
        assert!(stands("9991"), "the rules are the kernel's");
        // The next request starts another, which knows what stood.
        net.tap(3).unwrap_err();
        assert_ne!(net.pid().unwrap(), pid);
        assert!(stands("9991"));
        net.set(3, opens(&[edge(80)])).unwrap();
        assert!(stands(". 80 ") && !stands("9991"), "{:?}", nft_elements());
        assert_eq!(net.counters(3).unwrap().in_dropped_packets, 0);
        // With its warden it ends; the rules stay for the next one.
        let last = jail::process::Proc::of(net.pid().unwrap()).unwrap();
        drop(net);
        assert!(last.handle().is_none());
        assert!(stands(". 80 "));
        drop(tap);
        Nft::open(network(), EDGE_UID)
            .unwrap()
            .rebuild(&BTreeMap::new())
            .unwrap();
        assert_eq!(nft_elements(), Vec::<String>::new());
    });
}

/// Rules that open these, without bounds.
fn opens(open: &[Open]) -> Rules {
    Rules {
        open: open.to_vec(),
        ..Rules::default()
    }
}

/// Whether `uid` gets a connection from the fabric.
fn dial(uid: u32, to: SocketAddr) -> bool {
    as_uid(uid, move || {
        TcpStream::connect_timeout(&to, SILENCE).is_ok()
    })
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace whose `eth0` is wired to a slot's tap.
struct Guest {
    ip: Ipv4Addr,
    jobs: Sender<Job>,
}

impl Guest {
    fn new(nft: &mut Nft, slot: u16) -> Self {
        let tap = tap_create(network(), slot).unwrap();
        nft.slot_add(slot).unwrap();
        let (ip_address, gateway) = (network().guest(slot), network().gateway());
        let (jobs, todo) = channel::<Job>();
        let (made, eth) = channel();
        std::thread::spawn(move || {
            // SAFETY: unshares the network namespace of this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            let eth = tun("eth0");
            ip(&format!(
                "link set eth0 address {}",
                mac_text(mac(ip_address))
            ));
            ip(&format!("addr add {ip_address}/16 dev eth0"));
            ip("link set eth0 up");
            ip(&format!("route add default via {gateway}"));
            made.send(eth).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        wire(tap, eth.recv().unwrap());
        Self {
            ip: ip_address,
            jobs,
        }
    }

    fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (tx, rx) = channel();
        self.jobs
            .send(Box::new(move || drop(tx.send(f()))))
            .unwrap();
        rx.recv_timeout(SOON).unwrap()
    }

    /// Counts the bytes that come to a port.
    fn count(&self, port: u16) -> (SocketAddr, Arc<AtomicU64>) {
        let listener = self.run(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        let got = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&got);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut buffer = [0; 65_536];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    count.fetch_add(n as u64, Ordering::Relaxed);
                }
            }
        });
        (SocketAddr::new(self.ip.into(), port), got)
    }

    /// Echoes on a port.
    fn serve(&self, port: u16) {
        let listener = self.run(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut back = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut &stream, &mut back);
                });
            }
        });
    }
}

/// Carries frames both ways, as a VMM does.
fn wire(a: OwnedFd, b: OwnedFd) {
    let (a2, b2) = (a.try_clone().unwrap(), b.try_clone().unwrap());
    for (from, to) in [(a, b), (b2, a2)] {
        std::thread::spawn(move || {
            let mut frame = vec![0u8; 70_000];
            loop {
                while !jail::process::readable(rustix::fd::AsFd::as_fd(&from), SOON) {}
                match rustix::io::read(&from, &mut frame) {
                    Ok(n) => drop(rustix::io::write(&to, &frame[..n])),
                    Err(rustix::io::Errno::AGAIN) => {}
                    Err(_) => return,
                }
            }
        });
    }
}

fn tun(name: &str) -> OwnedFd {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).unwrap();
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(done, 0);
    tap
}

fn ip(args: &str) {
    let out = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(
        out.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}
