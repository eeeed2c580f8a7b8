//! Room that many share: bounded as a whole, and per source so that one can't take it all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The room.
pub struct Crowd {
    room: Arc<Semaphore>,
    per_source: u32,
    sources: Mutex<HashMap<IpAddr, u32>>,
}

/// A part of it, until dropped.
pub struct Place {
    crowd: Arc<Crowd>,
    source: IpAddr,
    units: u32,
    _room: OwnedSemaphorePermit,
}

impl Crowd {
    /// Room of so many units, of which one source gets at most `per_source`.
    #[must_use]
    pub fn new(units: usize, per_source: u32) -> Arc<Self> {
        Arc::new(Self {
            room: Arc::new(Semaphore::new(units)),
            per_source,
            sources: Mutex::default(),
        })
    }

    /// Takes `units` for a source; `None` if they are not there.
    #[must_use]
    pub fn enter(self: &Arc<Self>, source: IpAddr, units: u32) -> Option<Place> {
        let source = source_of(source);
        let room = Arc::clone(&self.room).try_acquire_many_owned(units).ok()?;
        let mut sources = self.lock();
        let held = sources.get(&source).copied().unwrap_or(0);
        let sum = held
            .checked_add(units)
            .filter(|sum| *sum <= self.per_source)?;
        sources.insert(source, sum);
        drop(sources);
        Some(Place {
            crowd: Arc::clone(self),
            source,
            units,
            _room: room,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u32>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut sources = self.crowd.lock();
        if let Some(held) = sources.get_mut(&self.source) {
            *held -= self.units;
            if *held == 0 {
                sources.remove(&self.source);
            }
        }
    }
}

/// One source: whoever has an IPv6 address has its /64.
fn source_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn room_is_bounded_per_source_and_as_a_whole() {
        let crowd = Crowd::new(11, 10);
        let enter = |s: &str, n| crowd.enter(s.parse().unwrap(), n);
        let mut held: Vec<_> = (0..5).map(|_| enter("2001:db8::1", 2).unwrap()).collect();
        assert!(enter("2001:db8::2", 1).is_none(), "the same /64");
        let other = enter("2001:db8:1::1", 1).unwrap();
        assert!(enter("10.0.0.1", 1).is_none(), "no room at all");
        held.pop();
        drop(other);
        assert!(enter("10.0.0.1", 3).is_some());
        assert!(enter("10.0.0.1", u32::MAX).is_none());
        drop(held);
        assert!(crowd.lock().is_empty());
        assert_eq!(crowd.room.available_permits(), 11);
    }
}
