//! The guest's network: one address on `eth0`, one gateway, nothing else. No DHCP, no IPv6, no
//! name of the outside is known here.

use std::io;
use std::net::Ipv4Addr;

use crate::sys::Interfaces;

const INTERFACE: &str = "eth0";

/// Where the workspace is on its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
    /// Its only neighbour.
    pub gateway: Ipv4Addr,
}

impl Address {
    /// Parses what the host says.
    ///
    /// # Errors
    /// Which field is wrong.
    pub fn parse(ip: &str, prefix: u8, gateway: &str) -> Result<Self, &'static str> {
        let address = |text: &str, why| match text.parse::<Ipv4Addr>() {
            Ok(ip) if !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() => Ok(ip),
            _ => Err(why),
        };
        if !(1..=32).contains(&prefix) {
            return Err("prefix must be 1 to 32");
        }
        Ok(Self {
            ip: address(ip, "ip must be an IPv4 address of a host")?,
            prefix,
            gateway: address(gateway, "gateway must be an IPv4 address of a host")?,
        })
    }

    /// The hardware address that the host's rules pin for this address: `02:00` and the four
    /// bytes of the address. A restored template has another slot's, so it is always set.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = self.ip.octets();
        [0x02, 0x00, a, b, c, d]
    }

    fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix)))
    }
}

/// Brings `lo` up.
///
/// # Errors
/// The kernel's answer.
pub fn loopback_up() -> io::Result<()> {
    Interfaces::new()?.up("lo", true)
}

/// Brings `eth0` up, without an address: it is deaf and mute, and an attach need not wait for its
/// rings to be made.
///
/// # Errors
/// The kernel's answer.
pub fn link_up() -> io::Result<()> {
    Interfaces::new()?.up(INTERFACE, true)
}

/// Gives `eth0` its hardware address, its address and the default route.
///
/// # Errors
/// The kernel's answer.
pub fn configure(address: &Address) -> io::Result<()> {
    let interfaces = Interfaces::new()?;
    interfaces.hardware_address(INTERFACE, address.mac())?;
    interfaces.address(INTERFACE, address.ip, address.mask())?;
    interfaces.up(INTERFACE, true)?;
    // On-link whatever the prefix says: the gateway is the tap's other end.
    interfaces.route_add(INTERFACE, address.gateway, Ipv4Addr::BROADCAST, None)?;
    let any = Ipv4Addr::UNSPECIFIED;
    interfaces.route_add(INTERFACE, any, any, Some(address.gateway))
}

/// As [`configure`], for a link that may have been another one before: then what it knew of its
/// routes goes. If the address stays, all stays: its neighbour's is the same on every link.
///
/// # Errors
/// The kernel's answer.
pub fn renew(address: &Address) -> io::Result<()> {
    let interfaces = Interfaces::new()?;
    if interfaces.is(INTERFACE, address.mac(), address.ip)? {
        return Ok(());
    }
    interfaces.up(INTERFACE, false)?;
    configure(address)
}

/// Takes `eth0`'s address away, and the routes with it.
///
/// # Errors
/// The kernel's answer.
pub fn release() -> io::Result<()> {
    Interfaces::new()?.address_remove(INTERFACE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses() {
        let address = Address::parse("10.117.0.5", 16, "10.117.0.1").unwrap();
        assert_eq!(address.mac(), [2, 0, 10, 117, 0, 5]);
        assert_eq!(address.mask(), Ipv4Addr::new(255, 255, 0, 0));
        assert_eq!(
            Address {
                prefix: 32,
                ..address
            }
            .mask(),
            Ipv4Addr::BROADCAST
        );
        for (ip, prefix, gateway) in [
            ("", 16, "10.0.0.1"),
            ("10.0.0.2", 0, "10.0.0.1"),
            ("10.0.0.2", 33, "10.0.0.1"),
            ("127.0.0.1", 16, "10.0.0.1"),
            ("10.0.0.2", 16, "fe80::1"),
            ("10.0.0.2/16", 16, "10.0.0.1"),
        ] {
            assert!(
                Address::parse(ip, prefix, gateway).is_err(),
                "{ip} {prefix} {gateway}"
            );
        }
    }
}
