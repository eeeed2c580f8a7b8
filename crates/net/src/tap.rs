//! Taps in the fabric's network namespace: made, addressed and routed over netlink.
//!
//! A tap here is never persistent: the VMM holds its only descriptor, so it goes when the VMM goes.

use crate::network::{Network, mac, tap_name};
use jail::fault::{At, Result};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::net::Ipv4Addr;

/// Makes the slot's tap, which is up and has its addresses then.
///
/// # Errors
/// The step that failed; nothing is left then.
pub fn create(network: Network, slot: u16) -> Result<OwnedFd> {
    let name = tap_name(slot);
    let tap = rustix::fs::open(
        "/dev/net/tun",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .at("open", "/dev/net/tun")?;
    jail::tap::make(&tap, &name).at("make tap", &name)?;
    address(network, slot)?;
    Ok(tap)
}

/// Puts the gateway's address on the slot's tap, which is there, with a route to the guest alone and
/// its neighbour entry fixed: no ARP answer of a guest is ever believed.
///
/// # Errors
/// The step that failed.
pub fn address(network: Network, slot: u16) -> Result {
    let name = tap_name(slot);
    let netlink = Netlink::open()?;
    let index =
        rustix::net::netdevice::name_to_index(&netlink.sock, &name).at("find tap", &name)?;
    let sysctl = |key: &str, value: &str| {
        let path = format!("/proc/sys/net/{key}");
        std::fs::write(&path, value).at("set", path)
    };
    // A kernel without IPv6 has nothing to turn off.
    let _ = sysctl(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
    for (key, value) in [
        ("accept_redirects", "0"),
        ("send_redirects", "0"),
        ("accept_source_route", "0"),
        ("rp_filter", "1"),
    ] {
        sysctl(&format!("ipv4/conf/{name}/{key}"), value)?;
    }
    let (gateway, guest) = (network.gateway(), network.guest(slot));
    netlink
        .link_up(index, mac(gateway))
        .at("set up tap", &name)?;
    netlink.address(index, gateway).at("address tap", &name)?;
    netlink
        .route(index, guest, gateway)
        .at("route tap", &name)?;
    netlink
        .neighbour(index, guest, mac(guest))
        .at("pin neighbour of tap", &name)
}

/// Whether a slot's tap passes on what comes from its guest to other slots (and answers ARP for
/// their addresses). The firewall still says to whom.
///
/// # Errors
/// The setting that could not be written.
pub fn forward(slot: u16, on: bool) -> Result {
    let (name, on) = (tap_name(slot), if on { "1" } else { "0" });
    for (key, value) in [
        (format!("conf/{name}/forwarding"), on),
        (format!("conf/{name}/proxy_arp"), on),
        // Answers at once, not after up to 0.8 s.
        (format!("neigh/{name}/proxy_delay"), "0"),
    ] {
        let path = format!("/proc/sys/net/ipv4/{key}");
        std::fs::write(&path, value).at("set", path)?;
    }
    Ok(())
}

/// Packets (from the guest, to the guest) that passed a slot's tap.
#[must_use]
pub fn packets(slot: u16) -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    let name = tap_name(slot);
    let of = |line: &str| -> Option<(u64, u64)> {
        let (tap, numbers) = line.split_once(':')?;
        let mut numbers = numbers.split_whitespace().map(|n| n.parse().unwrap_or(0));
        (tap.trim() == name).then(|| Some((numbers.nth(1)?, numbers.nth(7)?)))?
    };
    text.lines().find_map(of).unwrap_or((0, 0))
}

/// A route netlink socket that speaks five kinds of messages.
struct Netlink {
    sock: OwnedFd,
}

const NLM_NEW: u16 =
    (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;

impl Netlink {
    fn open() -> Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        let kind = SocketType::RAW;
        rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, None)
            .map(|sock| Self { sock })
            .at("open", "netlink")
    }

    fn link_up(&self, index: u32, mac: [u8; 6]) -> std::io::Result<()> {
        let up = (libc::IFF_UP as u32).to_ne_bytes();
        // ifinfomsg: family, type, index, flags, mask of flags.
        let head = [&[0u8; 4][..], &index.to_ne_bytes(), &up, &up].concat();
        self.call(
            libc::RTM_NEWLINK,
            (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
            head,
            &[(libc::IFLA_ADDRESS, &mac)],
        )
    }

    fn address(&self, index: u32, ip: Ipv4Addr) -> std::io::Result<()> {
        // ifaddrmsg: family, prefix length, flags, scope, index.
        let head = [&[libc::AF_INET as u8, 32, 0, 0][..], &index.to_ne_bytes()].concat();
        let ip = ip.octets();
        self.call(
            libc::RTM_NEWADDR,
            NLM_NEW,
            head,
            &[(libc::IFA_LOCAL, &ip), (libc::IFA_ADDRESS, &ip)],
        )
    }

    fn route(&self, index: u32, to: Ipv4Addr, from: Ipv4Addr) -> std::io::Result<()> {
        // rtmsg: family, destination and source lengths, tos, table, protocol, scope, type, flags.
        let head = vec![
            libc::AF_INET as u8,
            32,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            libc::RT_SCOPE_LINK,
            libc::RTN_UNICAST,
            0,
            0,
            0,
            0,
        ];
        self.call(
            libc::RTM_NEWROUTE,
            NLM_NEW,
            head,
            &[
                (libc::RTA_DST, &to.octets()),
                (libc::RTA_OIF, &index.to_ne_bytes()),
                (libc::RTA_PREFSRC, &from.octets()),
            ],
        )
    }

    fn neighbour(&self, index: u32, ip: Ipv4Addr, mac: [u8; 6]) -> std::io::Result<()> {
        let permanent = libc::NUD_PERMANENT.to_ne_bytes();
        // ndmsg: family, padding, index, state, flags, type.
        let head = [
            &[libc::AF_INET as u8, 0, 0, 0][..],
            &index.to_ne_bytes(),
            &permanent,
            &[0, 0],
        ]
        .concat();
        self.call(
            libc::RTM_NEWNEIGH,
            NLM_NEW,
            head,
            &[(libc::NDA_DST, &ip.octets()), (libc::NDA_LLADDR, &mac)],
        )
    }

    /// One request and its acknowledgement.
    fn call(
        &self,
        kind: u16,
        flags: u16,
        mut body: Vec<u8>,
        attrs: &[(u16, &[u8])],
    ) -> std::io::Result<()> {
        for (attr, value) in attrs {
            let len = u16::try_from(4 + value.len()).map_err(std::io::Error::other)?;
            body.extend(len.to_ne_bytes());
            body.extend(attr.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let len = u32::try_from(16 + body.len()).map_err(std::io::Error::other)?;
        let mut message = Vec::new();
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0u8; 8]); // sequence and port: one request at a time needs neither
        message.extend(body);
        rustix::net::send(&self.sock, &message, SendFlags::empty())?;
        let mut answer = [0u8; 1024];
        let (n, _) = rustix::net::recv(&self.sock, answer.as_mut_slice(), RecvFlags::empty())?;
        let field = |at: usize| -> Option<[u8; 4]> { answer[..n].get(at..at + 4)?.try_into().ok() };
        let kind = field(4).map(|b| u16::from_ne_bytes([b[0], b[1]]));
        match (kind, field(16).map(i32::from_ne_bytes)) {
            (Some(k), Some(0)) if i32::from(k) == libc::NLMSG_ERROR => Ok(()),
            (Some(k), Some(e)) if i32::from(k) == libc::NLMSG_ERROR => {
                Err(std::io::Error::from_raw_os_error(-e))
            }
            _ => Err(std::io::Error::other("an unexpected netlink answer")),
        }
    }
}
