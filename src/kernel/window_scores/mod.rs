//! Attention weights of a few queries (an observation window) on every entry, normalised, without values.
//!
//! *Helps* SnapKV, TOVA and their kin: O(W·N) instead of O(N²). *Hurts* when `W` is large and rows are asked
//! for one by one: that buffer is `G·W·N` per head, so callers ask in blocks of rows.
//!
//! `a[h,i,j] = exp(x[h,i,j] − lse[h,i])`, softmax in `f32` over all entries the query sees, logits as in
//! [`super::attend`], sink logits in the denominator; 0 for entries it does not see.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::{AttentionParams, expect_len, total_rows};
use crate::device::HeadRows;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "window_scores";

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowReduce {
    /// Sums over the `W` queries: for each KV head in turn `[G, rows]`.
    Sum,
    /// Every query's weights: for each KV head in turn `[G, W, rows]`.
    Rows,
}

/// The window of one sequence and layer.
#[derive(Debug)]
pub struct WindowArgs<'a> {
    /// The KV heads, `H`.
    pub heads: &'a [HeadRows],
    /// `[Hq, W, d_k]`.
    pub queries: &'a [f32],
    /// Positions of the `W` queries.
    pub positions: &'a [i32],
    /// What to write.
    pub reduce: WindowReduce,
    /// Overwritten; see [`WindowReduce`].
    pub out: &'a mut [f32],
}

impl WindowArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self, params: &AttentionParams<'_>) -> Result<(), KernelError> {
        let (w, rows) = (self.positions.len(), total_rows(self.heads));
        expect_len(NAME, "queries", self.queries.len(), self.heads.len() * params.group * w * params.d_k)?;
        let per_row = match self.reduce {
            WindowReduce::Sum => 1,
            WindowReduce::Rows => w,
        };
        if let Some(sinks) = params.sink_logits {
            expect_len(NAME, "sink_logits", sinks.len(), self.heads.len() * params.group)?;
        }
        expect_len(NAME, "out", self.out.len(), params.group * per_row * rows)
    }
}
