//! Counters of mint. Labels are words of the code, never of a request.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

type Reasons = Family<[(&'static str, &'static str); 1], Counter>;

/// Counters of mint.
#[derive(Default)]
pub struct Metrics {
    assertions: Counter,
    tokens: Counter,
    refused: Reasons,
    unlogged: Counter,
}

impl Metrics {
    /// Registers them under `mint_…`.
    pub fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("mint");
        r.register(
            "assertions",
            "Credentials that were good",
            self.assertions.clone(),
        );
        r.register(
            "gateway_tokens",
            "Gateway tokens issued",
            self.tokens.clone(),
        );
        r.register(
            "refused",
            "Requests refused, by reason",
            self.refused.clone(),
        );
        r.register(
            "refusals_unlogged",
            "Refusals the log could not take",
            self.unlogged.clone(),
        );
    }

    pub(crate) fn asserted(&self) {
        self.assertions.inc();
    }

    pub(crate) fn issued(&self) {
        self.tokens.inc();
    }

    pub(crate) fn refused(&self, why: &'static str) {
        self.refused.get_or_create(&[("reason", why)]).inc();
    }

    pub(crate) fn refusal_unlogged(&self) {
        self.unlogged.inc();
    }
}
