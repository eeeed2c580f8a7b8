//! Counters of the edge. No label names a tenant (SEE-2).

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::state::Table;

/// The counters.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests answered below 400, with 4xx, with 5xx, and given up by the client.
    pub answers: [Counter; 4],
    /// Requests being answered.
    pub in_flight: Gauge,
    /// Bytes of bodies, both ways.
    pub bytes: Counter,
    /// Client connections open.
    pub connections: Gauge,
    /// Connections refused for their number.
    pub connections_refused: Counter,
    /// TLS handshakes completed.
    pub handshakes: Counter,
    /// TLS handshakes that failed.
    pub handshakes_failed: Counter,
    /// Connections made to guests.
    pub guest_dials: Counter,
    /// Connections to guests that failed.
    pub guest_dials_failed: Counter,
    /// Token states that a guest did not take.
    pub pushes_failed: Counter,
}

impl Metrics {
    /// Counts an answer.
    pub fn answered(&self, status: u16) {
        let class = match status {
            0 => 3,
            1..400 => 0,
            400..500 => 1,
            _ => 2,
        };
        self.answers[class].inc();
    }

    /// A registry of all of them and of what the table knows.
    #[must_use]
    pub fn registry(self: &Arc<Self>, table: &Arc<Table>) -> Registry {
        let mut r = Registry::with_prefix("casemate_edge");
        let names = [
            "answers_ok",
            "answers_refused",
            "answers_failed",
            "answers_given_up",
        ];
        for (name, counter) in names.into_iter().zip(&self.answers) {
            r.register(name, "Requests by how they ended", counter.clone());
        }
        r.register(
            "in_flight",
            "Requests being answered",
            self.in_flight.clone(),
        );
        r.register(
            "body_bytes",
            "Bytes of bodies, both ways",
            self.bytes.clone(),
        );
        r.register(
            "connections",
            "Client connections open",
            self.connections.clone(),
        );
        for (name, help, counter) in [
            (
                "connections_refused",
                "Connections refused for their number",
                &self.connections_refused,
            ),
            ("handshakes", "TLS handshakes completed", &self.handshakes),
            (
                "handshakes_failed",
                "TLS handshakes that failed",
                &self.handshakes_failed,
            ),
            (
                "guest_dials",
                "Connections made to guests",
                &self.guest_dials,
            ),
            (
                "guest_dials_failed",
                "Connections to guests that failed",
                &self.guest_dials_failed,
            ),
            (
                "pushes_failed",
                "Token states that a guest did not take",
                &self.pushes_failed,
            ),
        ] {
            r.register(name, help, counter.clone());
        }
        r.register_collector(Box::new(TableCollector(Arc::clone(table))));
        r
    }
}

struct TableCollector(Arc<Table>);

impl std::fmt::Debug for TableCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TableCollector")
    }
}

impl prometheus_client::collector::Collector for TableCollector {
    fn encode(
        &self,
        mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        use prometheus_client::encoding::EncodeMetric;
        use prometheus_client::metrics::MetricType;
        use prometheus_client::metrics::gauge::ConstGauge;
        let (live, cut) = self.0.counts();
        let fresh = i64::from(self.0.is_fresh());
        for (name, help, value) in [
            ("live", "Requests to workspaces that pass now", live as i64),
            (
                "cut",
                "Requests to workspaces that were cut so far",
                cut as i64,
            ),
            ("feeds_fresh", "1 while both feeds are there", fresh),
        ] {
            let gauge = ConstGauge::new(value);
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode(encoder)?;
        }
        Ok(())
    }
}
