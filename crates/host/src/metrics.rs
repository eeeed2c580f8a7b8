//! Gauges of what runs on this machine, refreshed every few seconds, for `metrics.sock`.
//!
//! Warden, vmctl and disk have no metrics socket of their own: each is kept as small as can be, and
//! what they count comes through warden's `Counters`. Sums over all workspaces only: never a label
//! that a tenant chooses (SEE-2).

use crate::{NAME, Shared};
use api::host::ActualState as S;
use api::warden::{Counters, SlotState};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use service::paths::Paths;
use std::sync::Arc;
use std::time::Duration;

/// How old a value may be.
const REFRESH: Duration = Duration::from_secs(5);

struct Gauges {
    running: Gauge,
    failed: Gauge,
    pool: Gauge,
    slots: Gauge,
    dead: Gauge,
    dropped_in: Gauge,
    dropped_out: Gauge,
    limited_in: Gauge,
    limited_out: Gauge,
    cpu_ns: Gauge,
    memory_bytes: Gauge,
    disk_bytes: Gauge,
}

/// Serves the gauges until the task is aborted.
///
/// # Errors
/// The socket's.
pub(crate) fn serve(
    shared: Arc<Shared>,
    paths: &Paths,
) -> anyhow::Result<tokio::task::JoinHandle<()>> {
    let mut registry = Registry::default();
    let gauges = Gauges::new(&mut registry);
    let served = service::metrics::serve(&paths.socket(NAME, "metrics"), registry)?;
    Ok(tokio::spawn(async move {
        let _served = AbortOnDrop(served);
        loop {
            gauges.refresh(&shared).await;
            tokio::time::sleep(REFRESH).await;
        }
    }))
}

impl Gauges {
    fn new(registry: &mut Registry) -> Self {
        let mut gauge = |name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        Self {
            running: gauge("host_workspaces_running", "Workspaces that run"),
            failed: gauge(
                "host_workspaces_failed",
                "Workspaces that failed to start or crashed",
            ),
            pool: gauge("host_pool_ready", "Pooled VMs ready"),
            slots: gauge("warden_slots", "Slots that hold a VM"),
            dead: gauge("warden_slots_dead", "Slots of which something died"),
            dropped_in: gauge(
                "warden_dropped_in_packets",
                "Packets towards guests on their slots that the firewall dropped",
            ),
            dropped_out: gauge(
                "warden_dropped_out_packets",
                "Packets from guests on their slots that the firewall dropped",
            ),
            limited_in: gauge(
                "warden_limited_in_packets",
                "Packets towards guests on their slots that were above their rates",
            ),
            limited_out: gauge(
                "warden_limited_out_packets",
                "Packets from guests on their slots that were above their rates",
            ),
            cpu_ns: gauge("vmm_cpu_ns", "CPU time of the slots that run"),
            memory_bytes: gauge("vmm_memory_bytes", "Memory of the VMMs that run"),
            disk_bytes: gauge("disk_allocated_bytes", "Bytes allocated to their disks"),
        }
    }

    async fn refresh(&self, shared: &Shared) {
        let states = shared.feed.list();
        let count = |of: &[S]| states.iter().filter(|a| of.contains(&a.state)).count();
        self.running.set(as_i64(count(&[S::Running])));
        self.failed.set(as_i64(count(&[S::Failed, S::Crashed])));
        self.pool.set(i64::from(shared.fleet.pool_size().0));
        // While warden is away the last values stand.
        let Ok(warden) = shared.peers.status().await else {
            return;
        };
        let dead = warden.slots.iter().filter(|s| s.state == SlotState::Dead);
        self.slots.set(as_i64(warden.slots.len()));
        self.dead.set(as_i64(dead.count()));
        let mut sum = Counters::default();
        for slot in &warden.slots {
            // A slot that was closed meanwhile counts for nothing.
            let c = shared.peers.counters(slot.slot).await.unwrap_or_default();
            sum.in_dropped_packets += c.in_dropped_packets;
            sum.out_dropped_packets += c.out_dropped_packets;
            sum.in_limited_packets += c.in_limited_packets;
            sum.out_limited_packets += c.out_limited_packets;
            sum.cpu_ns += c.cpu_ns;
            sum.memory_bytes += c.memory_bytes;
            sum.disk_bytes += c.disk_bytes;
        }
        self.dropped_in.set(as_i64(sum.in_dropped_packets));
        self.dropped_out.set(as_i64(sum.out_dropped_packets));
        self.limited_in.set(as_i64(sum.in_limited_packets));
        self.limited_out.set(as_i64(sum.out_limited_packets));
        self.cpu_ns.set(as_i64(sum.cpu_ns));
        self.memory_bytes.set(as_i64(sum.memory_bytes));
        self.disk_bytes.set(as_i64(sum.disk_bytes));
    }
}

fn as_i64<T: TryInto<i64>>(n: T) -> i64 {
    n.try_into().unwrap_or(i64::MAX)
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
