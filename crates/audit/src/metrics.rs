//! What the processes count. Labels are the five classes, nothing else.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tlog::class::Class;

/// The class that a figure is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfClass {
    class: &'static str,
}

pub(crate) fn of(class: Class) -> OfClass {
    OfClass {
        class: class.name(),
    }
}

pub(crate) fn gauge(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub(crate) fn registry() -> Registry {
    Registry::with_prefix("casemate_audit")
}

/// Figures of append.
#[derive(Clone, Default)]
pub(crate) struct Append {
    pub(crate) entries: Family<OfClass, Counter>,
    pub(crate) batches: Family<OfClass, Counter>,
    pub(crate) refusals: Family<OfClass, Counter>,
    pub(crate) clock_steps: Family<OfClass, Counter>,
    pub(crate) size: Family<OfClass, Gauge>,
    pub(crate) integrated: Family<OfClass, Gauge>,
}

impl Append {
    pub(crate) fn register(r: &mut Registry) -> Append {
        let m = Append::default();
        r.register("entries", "Entries made durable", m.entries.clone());
        r.register("batches", "Batches made durable", m.batches.clone());
        r.register("refusals", "Entries refused", m.refusals.clone());
        r.register(
            "clock_steps",
            "Steps back of the clock",
            m.clock_steps.clone(),
        );
        r.register("size", "Entries that are durable", m.size.clone());
        r.register(
            "integrated",
            "Entries known to be in the tree",
            m.integrated.clone(),
        );
        m
    }
}

/// Figures of integrate.
#[derive(Clone, Default)]
pub(crate) struct Integrate {
    pub(crate) checkpoints: Family<OfClass, Counter>,
    pub(crate) receipts: Family<OfClass, Counter>,
    pub(crate) failures: Family<OfClass, Counter>,
    pub(crate) size: Family<OfClass, Gauge>,
}

impl Integrate {
    pub(crate) fn register(r: &mut Registry) -> Integrate {
        let m = Integrate::default();
        r.register(
            "checkpoints",
            "Requests that published a checkpoint",
            m.checkpoints.clone(),
        );
        r.register("receipts", "Inclusion proofs made", m.receipts.clone());
        r.register("failures", "Integrations that failed", m.failures.clone());
        r.register("size", "Entries in the tree", m.size.clone());
        m
    }
}

/// Figures of read.
#[derive(Clone, Default)]
pub(crate) struct Read {
    pub(crate) reads: Family<OfClass, Counter>,
    pub(crate) refusals: Family<OfClass, Counter>,
}

impl Read {
    pub(crate) fn register(r: &mut Registry) -> Read {
        let m = Read::default();
        r.register("reads", "Reads of entries", m.reads.clone());
        r.register("read_refusals", "Reads refused", m.refusals.clone());
        m
    }
}
