//! Numbers for the operator: no label is a tenant's choice.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Labels of an API call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// The operation's id, of the operation table.
    pub operation: &'static str,
    /// HTTP status.
    pub status: u16,
}

/// The numbers.
pub struct Metrics {
    /// API calls.
    pub calls: Family<CallLabels, Counter>,
    /// Their duration, seconds.
    pub seconds: Histogram,
    /// Workspaces in the store.
    pub workspaces: Gauge,
    /// Restarts by standing policy.
    pub restarts: Counter,
    /// Wakes that requests at gateways brought about.
    pub wakes: Counter,
    /// Workspaces whose disk or memory was changed at rest, each counted once until it runs again.
    pub tampered: Counter,
    /// Deletions that wait for a step.
    pub deletions_waiting: Gauge,
    /// Audit entries that wait for the log.
    pub spooled: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let buckets = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];
        Self {
            calls: Family::default(),
            seconds: Histogram::new(buckets),
            workspaces: Gauge::default(),
            restarts: Counter::default(),
            wakes: Counter::default(),
            tampered: Counter::default(),
            deletions_waiting: Gauge::default(),
            spooled: Gauge::default(),
        }
    }
}

impl Metrics {
    /// A registry of the numbers.
    #[must_use]
    pub fn registry(&self) -> Registry {
        let mut r = Registry::default();
        r.register("control_calls", "API calls", self.calls.clone());
        r.register(
            "control_call_seconds",
            "Duration of API calls",
            self.seconds.clone(),
        );
        r.register("control_workspaces", "Workspaces", self.workspaces.clone());
        r.register(
            "control_wakes",
            "Wakes by requests at gateways",
            self.wakes.clone(),
        );
        r.register(
            "control_tampered",
            "Workspaces whose disk or memory was changed at rest",
            self.tampered.clone(),
        );
        r.register(
            "control_restarts",
            "Restarts by standing policy",
            self.restarts.clone(),
        );
        r.register(
            "control_deletions_waiting",
            "Deletions that wait for a step",
            self.deletions_waiting.clone(),
        );
        r.register(
            "control_audit_spooled",
            "Audit entries that wait for the log",
            self.spooled.clone(),
        );
        r
    }
}
