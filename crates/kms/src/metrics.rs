//! Counters of the KMS. Labels are words of the code, never of a request.

use crate::check::Refusal;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Reasons = Family<[(&'static str, &'static str); 1], Counter>;

/// Counters of the KMS.
#[derive(Default)]
pub struct Metrics {
    releases: Counter,
    refused: Reasons,
    refusals: Counter,
    unlogged: Counter,
    destroyed: Counter,
    epoch: Gauge,
}

impl Metrics {
    /// Registers them under `kms_…`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("kms");
        r.register("releases", "Keys released", self.releases.clone());
        r.register(
            "refused",
            "Requests refused, by reason",
            self.refused.clone(),
        );
        r.register("refusals", "Requests refused", self.refusals.clone());
        r.register(
            "refusals_unlogged",
            "Refusals the log could not take",
            self.unlogged.clone(),
        );
        r.register("destroyed", "Keys destroyed", self.destroyed.clone());
        r.register(
            "epoch",
            "The epoch in force; 0 while sealed",
            self.epoch.clone(),
        );
    }

    /// Releases since the start.
    #[must_use]
    pub fn releases(&self) -> u64 {
        self.releases.get()
    }

    /// Refusals since the start.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.refusals.get()
    }

    pub(crate) fn released(&self) {
        self.releases.inc();
    }

    pub(crate) fn refused(&self, why: Refusal) {
        self.refusals.inc();
        self.refused.get_or_create(&[("reason", why.code())]).inc();
    }

    pub(crate) fn refusal_unlogged(&self) {
        self.unlogged.inc();
    }

    pub(crate) fn destroyed(&self) {
        self.destroyed.inc();
    }

    pub(crate) fn epoch_is(&self, epoch: u64) {
        self.epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
    }
}
