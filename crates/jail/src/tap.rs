//! Taps: their names, and what the launcher does to one that a VMM opens by name.

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;

/// The name of a slot's tap in the fabric, at most 7 bytes.
#[must_use]
pub fn name(slot: u16) -> String {
    format!("cm{slot}")
}

/// Makes `file`, an open `/dev/net/tun`, the tap of that name, which is not there yet.
///
/// # Errors
/// The kernel's; a name that is taken.
pub fn make(file: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL)
            as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// Lets `uid` open the tap by name, after `file` was closed.
pub(crate) fn give(file: &OwnedFd, uid: u32) -> io::Result<()> {
    // SAFETY: both take a number.
    done(unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETOWNER,
            libc::c_ulong::from(uid),
        )
    })?;
    // SAFETY: the same.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) })
}

/// The tap goes when the last descriptor of it is closed.
pub(crate) fn transient(file: &OwnedFd) -> io::Result<()> {
    // SAFETY: it takes a number.
    done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 0 as libc::c_ulong) })
}

/// Whether `file` is a tap of that name.
pub(crate) fn is(file: &OwnedFd, name: &str) -> bool {
    let mut got = request("");
    // SAFETY: TUNGETIFF writes one ifreq, which outlives the call; what is no tap refuses it.
    let asked = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut got) };
    asked == 0 && got.ifr_name == request(name).ifr_name
}

/// Moves the device `from` of this network namespace to `there`, as `to`.
pub(crate) fn move_to(from: &str, there: &impl AsFd, to: &str) -> io::Result<()> {
    // NETLINK_ROUTE is protocol 0.
    let kind = SocketType::RAW;
    let netlink =
        rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, None)?;
    let index = rustix::net::netdevice::name_to_index(&netlink, from)?;
    // ifinfomsg: family, type, index, flags, mask of flags.
    let mut body = [&[0u8; 4][..], &index.to_ne_bytes(), &[0u8; 8]].concat();
    let there = there.as_fd().as_raw_fd().to_ne_bytes();
    let name = [to.as_bytes(), &[0]].concat();
    for (attr, value) in [
        (libc::IFLA_NET_NS_FD, &there[..]),
        (libc::IFLA_IFNAME, &name),
    ] {
        body.extend((4 + value.len() as u16).to_ne_bytes());
        body.extend(attr.to_ne_bytes());
        body.extend(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(libc::RTM_NEWLINK.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0u8; 8]); // sequence and port: one request needs neither
    message.extend(body);
    rustix::net::send(&netlink, &message, SendFlags::empty())?;
    let mut answer = [0u8; 1024];
    let (n, _) = rustix::net::recv(&netlink, answer.as_mut_slice(), RecvFlags::empty())?;
    // nlmsghdr, then an errno.
    match answer[..n].get(16..20).map(|b| [b[0], b[1], b[2], b[3]]) {
        Some(errno) if i32::from_ne_bytes(errno) == 0 => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(errno))),
        None => Err(io::Error::other("a short netlink answer")),
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
