//! Merging attentions over disjoint sets of entries into the attention over their union.
//!
//! *Helps* hosts that split a long context over threads, devices or their own window attention.
//! *Hurts* if a set is counted twice: the result is then a softmax with doubled weights, silently.
//!
//! ```text
//! lse = ln Σ_p exp lse_p          out = Σ_p exp(lse_p − lse) · out_p
//! ```

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "merge_partials";

/// Allowed error per unit of `1 + |expected|`: a few roundings and two exponentials.
pub const TOLERANCE: f64 = 4e-6;

/// `parts` partial attentions of `rows` rows.
#[derive(Debug)]
pub struct MergeArgs<'a> {
    /// Number of parts `P`.
    pub parts: usize,
    /// Value dimension.
    pub d_v: usize,
    /// `[P, rows, d_v]`.
    pub outs: &'a [f32],
    /// `[P, rows]`; −∞ marks a part that saw nothing.
    pub lses: &'a [f32],
    /// `[rows, d_v]`, written.
    pub out: &'a mut [f32],
    /// `[rows]`, written.
    pub lse: &'a mut [f32],
}

impl MergeArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        let rows = self.lse.len();
        expect_len(NAME, "lses", self.lses.len(), self.parts * rows)?;
        expect_len(NAME, "outs", self.outs.len(), self.parts * rows * self.d_v)?;
        expect_len(NAME, "out", self.out.len(), rows * self.d_v)
    }
}
