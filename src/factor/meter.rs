//! How far the work is, told to whoever asked, who may end it.

use crate::error::FactorError;
use std::ops::ControlFlow;

/// How much of a decomposition is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Units done. They are estimated multiplications, so that their share is about that of the time.
    pub done: u64,
    /// Units of the whole: the same in every report of a call, and reached by the last one.
    pub total: u64,
}

impl Progress {
    /// The share that is done, 0 to 1.
    pub fn share(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.done as f64 / self.total as f64 }
    }
}

/// For who does not want to know, and goes on to the end.
pub fn unwatched(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Counts units and asks after each.
pub(super) struct Meter<'a> {
    done: u64,
    total: u64,
    watch: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
}

impl<'a> Meter<'a> {
    /// Asks once before anything is done.
    pub(super) fn new(
        total: u64,
        watch: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Self, FactorError> {
        let mut meter = Self { done: 0, total, watch };
        meter.add(0)?;
        Ok(meter)
    }

    /// So much more is done.
    pub(super) fn add(&mut self, units: u64) -> Result<(), FactorError> {
        let total = self.total;
        self.done = self.done.saturating_add(units).min(total);
        match (self.watch)(Progress { done: self.done, total }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(FactorError::Cancelled { done: self.done, total }),
        }
    }

    /// All is done.
    pub(super) fn finish(mut self) -> Result<(), FactorError> {
        let rest = self.total - self.done;
        self.add(rest)
    }
}
