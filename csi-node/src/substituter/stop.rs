//! Tells a thread that nobody waits for its work any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Looked at by those who work. Set when the [`Waiting`] that belongs to it is dropped.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

/// Held by whoever waits for the work.
#[derive(Debug)]
pub(super) struct Waiting(Stop);

impl Stop {
    /// A flag, and what sets it at its end.
    pub(super) fn new() -> (Self, Waiting) {
        let stop = Self::default();
        (stop.clone(), Waiting(stop))
    }

    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}
