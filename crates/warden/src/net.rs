//! Taps in the fabric's network namespace: made, addressed and routed over netlink.
//!
//! A tap is never persistent: the VMM holds its only descriptor, so it goes when the VMM goes.

use crate::fault::{At, Result};
use crate::layout::{Layout, read_small};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::net::Ipv4Addr;

/// The guests' /16, and what follows from it.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    base: Ipv4Addr,
}

impl Network {
    /// The /16 that `base` is in.
    #[must_use]
    pub fn new(base: Ipv4Addr) -> Self {
        let [a, b, _, _] = base.octets();
        Self {
            base: Ipv4Addr::new(a, b, 0, 0),
        }
    }

    /// Length of the network's prefix.
    pub const PREFIX: u8 = 16;

    /// The host's side of every tap.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.plus(1)
    }

    /// The guest on `slot`.
    #[must_use]
    pub fn guest(&self, slot: u16) -> Ipv4Addr {
        self.plus(u32::from(slot) + 2)
    }

    fn plus(&self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits() + n)
    }
}

/// The hardware address that goes with an address: locally administered, one per slot.
#[must_use]
pub fn mac(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x02, 0x00, a, b, c, d]
}

/// A hardware address as text.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The name of a slot's tap, at most 7 bytes.
#[must_use]
pub fn tap_name(slot: u16) -> String {
    format!("cm{slot}")
}

/// Makes the slot's tap, with the gateway's address on it, a route to the guest alone and its
/// neighbour entry fixed: no ARP answer of a guest is ever believed.
///
/// # Errors
/// The step that failed; nothing is left then.
pub fn tap_create(network: Network, slot: u16) -> Result<OwnedFd> {
    let name = tap_name(slot);
    let tap = rustix::fs::open(
        "/dev/net/tun",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .at("open", "/dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL)
            as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(std::io::Error::last_os_error()).at("make tap", name);
    }
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
        .at("pin neighbour of tap", &name)?;
    Ok(tap)
}

/// Whether a slot's tap passes on what comes from its guest to other slots (and answers ARP for
/// their addresses). The firewall still says to whom.
///
/// # Errors
/// The setting that could not be written.
pub fn tap_forward(slot: u16, on: bool) -> Result {
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
pub fn tap_packets(slot: u16) -> (u64, u64) {
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

/// The network that the installation's configuration names, or the default one.
///
/// # Errors
/// A file that can't be read, or whose `network.base` is no address.
pub fn network_of(layout: &Layout) -> Result<Network> {
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct File {
        network: Section,
    }
    #[derive(serde::Deserialize)]
    #[serde(default)]
    struct Section {
        base: Ipv4Addr,
    }
    impl Default for Section {
        fn default() -> Self {
            Self {
                base: Ipv4Addr::new(10, 117, 0, 0),
            }
        }
    }
    let path = layout.config();
    // The other fields are the other processes'; `casemate doctor` checks the file as a whole.
    let file: File =
        toml::from_str(&read_small(&path)?.unwrap_or_default()).at("read", path.display())?;
    Ok(Network::new(file.network.base))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses_are_a_function_of_the_slot() {
        let n = Network::new(Ipv4Addr::new(10, 117, 9, 9));
        assert_eq!(n.gateway().to_string(), "10.117.0.1");
        assert_eq!(n.guest(0).to_string(), "10.117.0.2");
        assert_eq!(n.guest(4095).to_string(), "10.117.16.1");
        assert_eq!(mac_text(mac(n.guest(254))), "02:00:0a:75:01:00");
        assert!(tap_name(u16::MAX).len() < 16);
    }
}
