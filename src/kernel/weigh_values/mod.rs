//! Sums of values by given weights: what is said in the output of units that are not read.
//!
//! `out[h,i] = Σ_j weights[h,i,j] · v[h,j]`. Where the weights come from is the caller's business: an index has them from
//! means, from codes, or from both, and leaves out what it read. They are not normalised, and neither is the sum.
//!
//! *Helps* an index that knows the weights already: values are read once, and neither keys nor exponentials are needed.
//! *Hurts* where few of many rows weigh anything, because runs of rows are passed over only where none does.
//!
//! # Tolerance
//! A row of `out` may be off by [`tolerance`]` · Σ_j weights · max_j ‖v_j‖` in norm.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::attend::{LOGIT_TOLERANCE, PACKED_TOLERANCE};
use super::{expect_len, total_rows};
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "weigh_values";

/// The weights of the queries of one sequence on the rows of one layer.
#[derive(Debug)]
pub struct WeighArgs<'a> {
    /// The KV heads, `H`. Keys are not read.
    pub heads: &'a [HeadRows],
    /// Weight rows per KV head, `R`: query heads of a group times tokens.
    pub rows: usize,
    /// For each KV head in turn `[R, rows]`; finite, none negative.
    pub weights: &'a [f32],
    /// `[H, R, d_v]`, overwritten.
    pub out: &'a mut [f32],
    /// Value dimension.
    pub d_v: usize,
}

impl WeighArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer, [`KernelError::Layout`] pages of another dimension.
    pub fn validate(&self) -> Result<(), KernelError> {
        if self.heads.iter().flat_map(|h| &h.segments).any(|s| s.layout.d_v != self.d_v) {
            return Err(KernelError::Layout { kernel: NAME, problem: "values have another dimension" });
        }
        expect_len(NAME, "weights", self.weights.len(), self.rows * total_rows(self.heads))?;
        expect_len(NAME, "out", self.out.len(), self.heads.len() * self.rows * self.d_v)
    }
}

/// By how much a row of the output may be off, see the [module](self).
pub fn tolerance(heads: &[HeadRows]) -> f64 {
    let packed =
        heads.iter().flat_map(|h| &h.segments).any(|s| s.layout.encoding(Side::Value).packed().is_some());
    if packed { PACKED_TOLERANCE } else { LOGIT_TOLERANCE }
}
