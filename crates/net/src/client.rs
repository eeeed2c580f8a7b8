//! Warden's side of the channel.

use crate::network::Network;
use crate::tap;
use crate::wire::{Ask, MESSAGE_MAX_BYTES, Rules, Said};
use api::Error;
use api::warden::Counters;
use jail::ask::Kind;
use jail::channel;
use jail::fault::{At, Result, log};
use jail::limits::KILL_WAIT;
use jail::process::{Handle, Launcher, readable};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// It answers within this.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// casemate-net, whichever process it is just now.
pub struct Client {
    launcher: Launcher,
    program: PathBuf,
    kind: Kind,
    live: Option<Live>,
    /// What stands: told to the next process when one died.
    slots: BTreeMap<u16, Rules>,
}

struct Live {
    handle: Handle,
    channel: OwnedFd,
}

impl Client {
    /// `program` is started by the first request.
    #[must_use]
    pub fn new(launcher: Launcher, program: PathBuf, network: Network, edge_uid: u32) -> Self {
        let base = network.gateway().to_bits();
        Self {
            launcher,
            program,
            kind: Kind::Net { base, edge_uid },
            live: None,
            slots: BTreeMap::new(),
        }
    }

    /// Makes the firewall hold these slots with their rules, and nothing else.
    ///
    /// # Errors
    /// The process's start's; the firewall's, and the old one stands then.
    pub fn stands(&mut self, slots: BTreeMap<u16, Rules>) -> Result {
        self.slots = slots;
        self.restart()
    }

    /// Makes the slot's tap and lets its own addresses in; opens and bounds nothing.
    ///
    /// # Errors
    /// The step that failed.
    pub fn tap(&mut self, slot: u16) -> Result<OwnedFd> {
        let (_, tap) = self.ask(&Ask::Tap { slot })?;
        self.slots.insert(slot, Rules::default());
        tap.ok_or_else(|| Error::internal("casemate-net sent no tap"))
    }

    /// The same for a tap that was moved here, under the slot's name.
    ///
    /// # Errors
    /// The step that failed.
    pub fn taken(&mut self, slot: u16) -> Result {
        self.ask(&Ask::Taken { slot })?;
        self.slots.insert(slot, Rules::default());
        Ok(())
    }

    /// Replaces the slot's rules.
    ///
    /// # Errors
    /// The firewall's; nothing has changed then.
    pub fn set(&mut self, slot: u16, rules: Rules) -> Result {
        // First, so that a process that starts anew knows no opening that was to close.
        self.slots.insert(slot, rules.clone());
        self.ask(&Ask::Set { slot, rules }).map(drop)
    }

    /// Takes the slot out. Idempotent.
    ///
    /// # Errors
    /// The firewall's.
    pub fn remove(&mut self, slot: u16) -> Result {
        self.slots.remove(&slot);
        self.ask(&Ask::Remove { slot }).map(drop)
    }

    /// The slot's counters of packets; the others are 0.
    ///
    /// # Errors
    /// The firewall's.
    pub fn counters(&mut self, slot: u16) -> Result<Counters> {
        let Said::Dropped(drops) = self.ask(&Ask::Dropped { slot })?.0 else {
            return Err(Error::internal("casemate-net counted nothing"));
        };
        let (out_packets, in_packets) = tap::packets(slot);
        Ok(Counters {
            in_dropped_packets: drops.inward,
            out_dropped_packets: drops.outward,
            in_limited_packets: drops.inward_limited,
            out_limited_packets: drops.outward_limited,
            in_packets,
            out_packets,
            ..Counters::default()
        })
    }

    /// Its process, for tests and for the operator.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.live.as_ref().map(|l| l.handle.proc.pid)
    }

    fn ask(&mut self, ask: &Ask) -> Result<(Said, Option<OwnedFd>)> {
        if let Some(answer) = self.try_ask(ask) {
            return answer;
        }
        self.restart()?;
        self.try_ask(ask)
            .unwrap_or_else(|| Err(Error::internal("casemate-net died twice")))
    }

    /// `None`: the process is gone, or may as well be.
    fn try_ask(&self, ask: &Ask) -> Option<Result<(Said, Option<OwnedFd>)>> {
        let live = self.live.as_ref()?;
        channel::send(&live.channel, ask, &[]).ok()?;
        if !readable(live.channel.as_fd(), ANSWER_WAIT) {
            return None;
        }
        let (bytes, mut fds) = channel::recv(live.channel.as_fd(), MESSAGE_MAX_BYTES).ok()?;
        match serde_json::from_slice(&bytes).ok()? {
            Said::Failed(why) => Some(Err(Error::internal(format!("casemate-net: {why}")))),
            said => Some(Ok((said, fds.pop()))),
        }
    }

    fn restart(&mut self) -> Result {
        if let Some(live) = self.live.take() {
            log("net.gone", serde_json::json!({"pid": live.handle.proc.pid}));
            let _ = live.handle.kill(KILL_WAIT);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let exe = rustix::fs::open(&self.program, flags, Mode::empty())
            .at("open", self.program.display())?;
        let (channel, theirs) = channel::pair().at("make a channel for", "casemate-net")?;
        let handle = self.launcher.spawn(self.kind, &[], &[exe, theirs])?.go()?;
        self.live = Some(Live { handle, channel });
        let stands = self.slots.iter().map(|(slot, rules)| Ask::Stands {
            slot: *slot,
            rules: rules.clone(),
        });
        for ask in stands.chain([Ask::Rebuild]) {
            self.try_ask(&ask)
                .unwrap_or_else(|| Err(Error::internal("casemate-net died at its start")))?;
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            // The rules stay: the next warden's process takes them over.
            drop(live.channel);
            if !live.handle.wait_gone(KILL_WAIT) {
                let _ = live.handle.kill(KILL_WAIT);
            }
        }
    }
}
