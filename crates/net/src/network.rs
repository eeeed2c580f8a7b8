//! Addresses: a function of the slot.

use api::warden::VmOpened;
use serde::Deserialize;
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

    /// What the guest on `slot` is told of its network.
    #[must_use]
    pub fn of(&self, slot: u16) -> VmOpened {
        VmOpened {
            ip: self.guest(slot).to_string(),
            prefix: Self::PREFIX,
            gateway: self.gateway().to_string(),
            mac: mac_text(mac(self.guest(slot))),
        }
    }

    /// The network that an installation's configuration names, or the default one.
    ///
    /// # Errors
    /// What is no TOML, or a `network.base` that is no address.
    pub fn from_config(text: &str) -> Result<Self, toml::de::Error> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct File {
            network: Section,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Section {
            base: Option<Ipv4Addr>,
        }
        // The other fields are the other processes'; `casemate doctor` checks the file as a whole.
        let file: File = toml::from_str(text)?;
        let default = Ipv4Addr::new(10, 117, 0, 0);
        Ok(Self::new(file.network.base.unwrap_or(default)))
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

pub use jail::tap::name as tap_name;

#[cfg(test)]
mod tests {
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

    #[test]
    fn the_configuration_names_the_network_or_nothing_does() {
        let of = |text| Network::from_config(text).map(|n| n.gateway().to_string());
        assert_eq!(of("").as_deref(), Ok("10.117.0.1"));
        let named = "[network]\nbase = \"10.9.0.0\"\nnamespace = \"x\"\n[other]\nfield = 1\n";
        assert_eq!(of(named).as_deref(), Ok("10.9.0.1"));
        assert!(of("[network]\nbase = \"x\"\n").is_err());
        assert!(of("network").is_err());
    }
}
