//! Where a test may stop the KMS as a `kill -9` would: right before the named step.

use crate::error::KmsError;
use std::sync::Arc;

/// A step of a multi-step operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Before the new epoch's slot is written.
    SlotCreate,
    /// Slot written, nothing re-wrapped.
    Rewrap,
    /// All re-wrapped, not committed: the last point of return.
    RewrapCommit,
    /// Committed; the old slot still there.
    SlotDestroy,
    /// Old slot gone; memory not switched yet.
    EpochSwitch,
    /// Before a key's record is erased.
    Erase,
    /// Erased; the epoch that could open it still there.
    Puncture,
    /// Punctured; the receipt not stored.
    ReceiptStore,
    /// Receipt stored; not answered.
    ReceiptAnswer,
    /// Before a new key is stored.
    KeyStore,
    /// Stored; not answered.
    KeyAnswer,
}

impl Step {
    /// The steps of a rotation, in order.
    pub const ROTATE: [Step; 5] = [
        Self::SlotCreate,
        Self::Rewrap,
        Self::RewrapCommit,
        Self::SlotDestroy,
        Self::EpochSwitch,
    ];
    /// The steps of a destruction around its rotation.
    pub const DESTROY: [Step; 4] = [
        Self::Erase,
        Self::Puncture,
        Self::ReceiptStore,
        Self::ReceiptAnswer,
    ];
    /// The steps of making a key.
    pub const CREATE: [Step; 2] = [Self::KeyStore, Self::KeyAnswer];
}

/// Decides whether to stop at a step. The shipped program never stops.
#[derive(Clone, Default)]
pub struct Faults(Option<Arc<dyn Fn(Step) -> bool + Send + Sync>>);

impl Faults {
    /// Stops where `stop` says so.
    pub fn new(stop: impl Fn(Step) -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(stop)))
    }

    pub(crate) fn at(&self, step: Step) -> Result<(), KmsError> {
        match &self.0 {
            Some(stop) if stop(step) => Err(KmsError::Stopped(step)),
            _ => Ok(()),
        }
    }
}
