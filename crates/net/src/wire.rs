//! The channel between warden and casemate-net: one JSON message a packet, each with one answer.
//! Numbers only.

use api::warden::{NetRates, Open};
use serde::{Deserialize, Serialize};

/// Longest message, bytes.
pub const MESSAGE_MAX_BYTES: usize = 16 << 10;

/// What the firewall holds for a slot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// What is open; nothing else is.
    pub open: Vec<Open>,
    /// How fast, each way.
    pub rates: NetRates,
}

/// Packets that the firewall dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drops {
    /// Towards the guest: not open.
    pub inward: u64,
    /// From the guest: not its own, or not open.
    pub outward: u64,
    /// Towards the guest: above its rates.
    pub inward_limited: u64,
    /// From the guest: above its rates.
    pub outward_limited: u64,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// This slot stands, with these rules; for the next `Rebuild`.
    Stands {
        /// The slot.
        slot: u16,
        /// Its rules.
        rules: Rules,
    },
    /// Replaces the whole firewall by what stands.
    Rebuild,
    /// Makes the slot's tap, and lets its own addresses in; opens and bounds nothing. The tap comes
    /// with the answer.
    Tap {
        /// The slot.
        slot: u16,
    },
    /// The same for a tap that is there, under the slot's name: nothing is made.
    Taken {
        /// The slot.
        slot: u16,
    },
    /// Replaces the slot's rules.
    Set {
        /// The slot.
        slot: u16,
        /// Its rules.
        rules: Rules,
    },
    /// Takes the slot out. Idempotent.
    Remove {
        /// The slot.
        slot: u16,
    },
    /// Counts the slot's dropped packets.
    Dropped {
        /// The slot.
        slot: u16,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Said {
    /// It is so.
    Done,
    /// Packets dropped.
    Dropped(Drops),
    /// It could not; for the operator.
    Failed(String),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use api::warden::Source;
    use proptest::prelude::*;

    #[test]
    fn the_longest_request_fits() {
        let open = Open {
            source: Source::Slot(u16::MAX),
            port: u16::MAX,
        };
        let longest = Ask::Stands {
            slot: u16::MAX,
            rules: Rules {
                open: vec![open; 64],
                rates: NetRates {
                    bytes_per_s: u64::MAX,
                    packets_per_s: u64::MAX,
                },
            },
        };
        assert!(serde_json::to_vec(&longest).unwrap().len() < MESSAGE_MAX_BYTES);
    }

    proptest! {
        #[test]
        fn survives_any_message(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<Ask>(&bytes);
            let _ = serde_json::from_slice::<Said>(&bytes);
        }
    }
}
