//! casemate-net: the guests' taps and the firewall of the fabric.
//!
//! ```text
//! warden ── Ask{slot, triples} ──▶ casemate-net ─▶ /dev/net/tun, netlink, libnftables
//!   ▲                                  │           with CAP_NET_ADMIN alone, as its own user
//!   └──────── done, the tap ◀──────────┘
//! ```
//!
//! [`Client`] is warden's side: it starts the process, tells it again what stands when it died, and
//! asks again. The rules stay in the kernel meanwhile.
//!
//! Must never: be given text that becomes part of a rule; open anything for a slot that warden did
//! not name; outlive its warden.
#![allow(unsafe_code)]

pub mod client;
pub mod network;
pub mod nft;
pub mod serve;
pub mod tap;
pub mod wire;

pub use client::Client;
pub use network::Network;
pub use wire::Rules;
