//! The process: answers warden until it is gone.

use crate::network::Network;
use crate::nft::Nft;
use crate::tap;
use crate::wire::{Ask, MESSAGE_MAX_BYTES, Rules, Said};
use api::warden::Source;
use jail::channel;
use jail::fault::{At, Result};
use rustix::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::collections::BTreeMap;

/// The channel to warden.
const CHANNEL_FD: i32 = 3;

/// What stands, and the firewall that says so.
struct Net {
    network: Network,
    nft: Nft,
    slots: BTreeMap<u16, Rules>,
}

/// Serves; `BASE EDGE_UID` are the guests' network as a number and the user whose connections may
/// reach guests. The exit status.
#[must_use]
pub fn main(args: impl Iterator<Item = String>) -> i32 {
    let numbers: Option<Vec<u32>> = args.map(|a| a.parse().ok()).collect();
    let Some([base, edge_uid]) = numbers.as_deref() else {
        eprintln!("usage: casemate-net BASE EDGE_UID, by casemate-warden");
        return 2;
    };
    match serve(Network::new((*base).into()), *edge_uid) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("casemate-net: {e}: {}", e.detail.as_deref().unwrap_or(""));
            1
        }
    }
}

fn serve(network: Network, edge_uid: u32) -> Result {
    // SAFETY: inherited from warden, open for the whole life of the process.
    let channel = unsafe { BorrowedFd::borrow_raw(CHANNEL_FD) };
    let mut net = Net {
        network,
        nft: Nft::open(network, edge_uid)?,
        slots: BTreeMap::new(),
    };
    loop {
        let (bytes, _) = channel::recv(channel, MESSAGE_MAX_BYTES).at("hear", "warden")?;
        if bytes.is_empty() {
            return Ok(());
        }
        let asked = serde_json::from_slice(&bytes).at("understand", "warden");
        let (said, tap) = match asked.and_then(|ask| net.answer(ask)) {
            Ok(answer) => answer,
            Err(e) => (Said::Failed(e.detail.unwrap_or(e.message)), None),
        };
        let with: Vec<BorrowedFd<'_>> = tap.iter().map(|t| t.as_fd()).collect();
        channel::send(channel, &said, &with).at("answer", "warden")?;
    }
}

impl Net {
    fn answer(&mut self, ask: Ask) -> Result<(Said, Option<OwnedFd>)> {
        match ask {
            Ask::Stands { slot, rules } => {
                self.slots.insert(slot, rules);
            }
            Ask::Rebuild => self.nft.rebuild(&self.slots)?,
            Ask::Tap { slot } => {
                let tap = tap::create(self.network, slot)?;
                self.nft.slot_add(slot)?;
                self.slots.insert(slot, Rules::default());
                return Ok((Said::Done, Some(tap)));
            }
            Ask::Taken { slot } => {
                tap::address(self.network, slot)?;
                self.nft.slot_add(slot)?;
                self.slots.insert(slot, Rules::default());
            }
            Ask::Set { slot, rules } => self.set(slot, rules)?,
            Ask::Remove { slot } => {
                let rules = self.slots.remove(&slot).unwrap_or_default();
                self.nft.slot_remove(slot, &rules)?;
            }
            Ask::Dropped { slot } => return Ok((Said::Dropped(self.nft.dropped(slot)?), None)),
        }
        Ok((Said::Done, None))
    }

    fn set(&mut self, slot: u16, rules: Rules) -> Result {
        let sources = rules.open.iter().filter_map(|o| match o.source {
            Source::Slot(from) => Some(from),
            Source::Edge => None,
        });
        for from in sources {
            for tap in [from, slot] {
                tap::forward(tap, true)?;
            }
        }
        let old = self.slots.entry(slot).or_default();
        self.nft.set(slot, old, &rules)?;
        *old = rules;
        Ok(())
    }
}
