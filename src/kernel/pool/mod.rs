//! One-dimensional pooling of scores along the slots of a head, stride 1, odd width.
//!
//! *Helps* keep the neighbours of a peak, so that a phrase survives and not one token of it. *Hurts* at the
//! border with averages: the zero padding counts, so the first entries (the sinks!) are biased down, as in
//! the implementation SnapKV was published with. Protect sinks by mask, never by score.
//!
//! Average: `out[j] = (1/k) Σ in[j−k/2 ..= j+k/2]`, outside counts as 0. Max: outside counts as −∞.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "pool";

/// Allowed error of an average per unit of `1 + |expected|`: sums of different order. Maxima are exact.
pub const TOLERANCE: f64 = 1e-6;

/// How neighbours are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// Mean, zero-padded, always divided by the width.
    Average,
    /// Maximum.
    Max,
}

/// Several rows of scores of different lengths, one after another.
#[derive(Debug)]
pub struct PoolArgs<'a> {
    /// How.
    pub kind: PoolKind,
    /// Odd, >= 1.
    pub width: usize,
    /// Length of each row.
    pub lengths: &'a [usize],
    /// The rows.
    pub input: &'a [f32],
    /// As long as `input`.
    pub out: &'a mut [f32],
}

impl PoolArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        expect_len(NAME, "input", self.input.len(), self.lengths.iter().sum())?;
        expect_len(NAME, "out", self.out.len(), self.input.len())?;
        expect_len(NAME, "width (odd)", self.width, self.width | 1)
    }
}
