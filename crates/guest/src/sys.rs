//! The kernel calls that no library wraps, as safe functions.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_PARTSCAN: u32 = 8;
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;

/// `struct blkpg_partition`.
#[repr(C)]
struct BlkpgPartition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    pno: libc::c_int,
    devname: [u8; 64],
    volname: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct BlkpgArg {
    op: libc::c_int,
    flags: libc::c_int,
    datalen: libc::c_int,
    data: *mut BlkpgPartition,
}

/// `struct rand_pool_info` with room for a seed.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; 64],
}

/// `struct loop_config`: everything but the fields used here is zero.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    /// `loop_info64` up to `lo_flags`: five u64 and three u32.
    before_flags: [u32; 13],
    flags: u32,
    /// Its names, key and `lo_init`, and eight reserved u64.
    after_flags: [u32; 60],
}
const _: () = assert!(std::mem::size_of::<LoopConfig>() == 8 + 232 + 64);

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Adds partition 1 over `[start, start + length)` bytes of `disk`.
pub(crate) fn partition_add(disk: &File, start: u64, length: u64) -> io::Result<()> {
    let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut partition = BlkpgPartition {
        start: i64::try_from(start).map_err(too_large)?,
        length: i64::try_from(length).map_err(too_large)?,
        pno: 1,
        devname: [0; 64],
        volname: [0; 64],
    };
    let mut arg = BlkpgArg {
        op: BLKPG_ADD_PARTITION,
        flags: 0,
        datalen: std::mem::size_of::<BlkpgPartition>() as libc::c_int,
        data: &raw mut partition,
    };
    // SAFETY: both structures are laid out as linux/blkpg.h says and outlive the call, which only
    // reads them.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw mut arg) })
}

/// Size of a block device, bytes.
pub(crate) fn device_size(disk: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: the kernel writes one u64 to `size`.
    check(unsafe { libc::ioctl(disk.as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) })?;
    Ok(size)
}

/// Mixes `seed` into the kernel's generator, credits it, and makes the generator draw from it at
/// once: two clones of one memory image differ from here on.
pub(crate) fn random_reseed(seed: &[u8; 64]) -> io::Result<()> {
    let urandom = File::options().write(true).open("/dev/urandom")?;
    let mut info = seal::Zeroizing::new([0u8; std::mem::size_of::<RandPoolInfo>()]);
    info[0..4].copy_from_slice(&512i32.to_ne_bytes());
    info[4..8].copy_from_slice(&64i32.to_ne_bytes());
    info[8..72].copy_from_slice(seed);
    const { assert!(std::mem::size_of::<RandPoolInfo>() == 72) };
    // SAFETY: `info` has the layout of `struct rand_pool_info` with 64 bytes behind it, is only
    // read, and the ioctl uses get_user, so that alignment is of no matter.
    check(unsafe { libc::ioctl(urandom.as_raw_fd(), RNDADDENTROPY as _, info.as_ptr()) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG as _) })
}

/// Grows the mounted ext4 that `on` lies on to `blocks` blocks.
pub(crate) fn ext4_resize(on: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one u64.
    check(unsafe { libc::ioctl(on.as_raw_fd(), EXT4_IOC_RESIZE_FS as _, &raw const blocks) })
}

/// The number of a loop device that nothing is behind.
pub(crate) fn loop_free(control: &File) -> io::Result<i32> {
    // SAFETY: takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
    check(number).map(|()| number)
}

/// Puts `file` behind the loop device, until its last user is gone.
pub(crate) fn loop_configure(device: &File, file: &File) -> io::Result<()> {
    let mut config = LoopConfig {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: 4096,
        before_flags: [0; 13],
        // Without the second it can have no partitions.
        flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN,
        after_flags: [0; 60],
    };
    // SAFETY: the structure has the size and fields of linux/loop.h's `struct loop_config` (the
    // assertion beside it), and is only read.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw mut config) })
}

/// A stream to `port` of the machine that this one runs on. Whoever is silent there has two
/// seconds, the kernel's own bound.
pub(crate) fn vsock_connect(port: u32) -> io::Result<File> {
    let (family, kind) = (AddressFamily::VSOCK, SocketType::STREAM);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all-zero is a valid sockaddr_vm: integers.
    let mut to: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    to.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    to.svm_cid = libc::VMADDR_CID_HOST;
    to.svm_port = port;
    let size = std::mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_vm of that size, outlives the call, and is only read.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const to).cast(), size) })?;
    Ok(socket.into())
}

/// A socket for interface ioctls.
pub(crate) struct Interfaces(std::net::UdpSocket);

impl Interfaces {
    pub(crate) fn new() -> io::Result<Self> {
        // Any IPv4 socket will do; it is bound to nothing that matters and sends nothing.
        std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map(Self)
    }

    pub(crate) fn up(&self, name: &str, up: bool) -> io::Result<()> {
        let mut request = ifreq(name)?;
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        let bit = libc::IFF_UP as libc::c_short;
        // SAFETY: the kernel just filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    pub(crate) fn hardware_address(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = ifreq(name)?;
        let mut address = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: [0; 14],
        };
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.ioctl(libc::SIOCSIFHWADDR, &mut request)
    }

    pub(crate) fn address(&self, name: &str, ip: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_addr = sockaddr(ip);
        self.ioctl(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = sockaddr(mask);
        self.ioctl(libc::SIOCSIFNETMASK, &mut request)
    }

    /// Whether it is up, with just this hardware address and address.
    pub(crate) fn is(&self, name: &str, mac: [u8; 6], ip: Ipv4Addr) -> io::Result<bool> {
        let mut request = ifreq(name)?;
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel just filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        self.ioctl(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: the kernel just filled in the hardware address.
        let hardware = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        match self.ioctl(libc::SIOCGIFADDR, &mut request) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return Ok(false),
            other => other?,
        }
        // SAFETY: the kernel just filled in the address.
        let address = unsafe { request.ifr_ifru.ifru_addr };
        let up = flags & libc::IFF_UP as libc::c_short != 0;
        let chars = |byte| byte as libc::c_char;
        Ok(
            up && hardware[..6] == mac.map(chars)
                && address.sa_data[2..6] == ip.octets().map(chars),
        )
    }

    pub(crate) fn address_remove(&self, name: &str) -> io::Result<()> {
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_addr = sockaddr(Ipv4Addr::UNSPECIFIED);
        self.ioctl(libc::SIOCSIFADDR, &mut request)
    }

    /// A route to `to`/`mask` by `name`, through `gateway` if there is one.
    pub(crate) fn route_add(
        &self,
        name: &str,
        to: Ipv4Addr,
        mask: Ipv4Addr,
        gateway: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        let request = ifreq(name)?;
        // SAFETY: all-zero is a valid rtentry: integers, a null device and AF_UNSPEC addresses.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = sockaddr(to);
        route.rt_genmask = sockaddr(mask);
        route.rt_flags = libc::RTF_UP;
        if let Some(gateway) = gateway {
            route.rt_gateway = sockaddr(gateway);
            route.rt_flags |= libc::RTF_GATEWAY;
        }
        if mask == Ipv4Addr::BROADCAST {
            route.rt_flags |= libc::RTF_HOST;
        }
        route.rt_dev = request.ifr_name.as_ptr().cast_mut();
        // SAFETY: the route and the name it points to outlive the call, which only reads them.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCADDRT as _, &raw mut route) };
        match check(result) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    fn ioctl(&self, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every SIOC[GS]IF* call used here takes one ifreq and stays inside it.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what as _, &raw mut *request) })
    }
}

fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all-zero is a valid ifreq: an empty name and a zeroed union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn sockaddr(ip: Ipv4Addr) -> libc::sockaddr {
    let mut address = libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: [0; 14],
    };
    // struct sockaddr_in: the port's two bytes, then the address.
    for (to, from) in address.sa_data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    address
}
