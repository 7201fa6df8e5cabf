//! The narrow waist: the few numeric kernels that policies, store and cache are written against.
//!
//! Every kernel is a folder: `mod.rs` holds the contract (arguments, formula, tolerance, test cases),
//! `reference.rs` a scalar implementation that is obviously right and part of the product, `cpu.rs` the fast
//! one (SIMD chosen at run time, rayon), `gpu.rs` the dispatch of the WGSL shader of the same name in
//! `shaders/`. One conformance suite runs every case on every implementation.
//!
//! *Helps* because a policy written once runs on every backend. *Hurts* when a method needs something that
//! is not here: then a kernel is added, with all three implementations, rather than a loop in the policy.

pub mod attend;
pub mod attend_factored;
pub mod attention_mass;
pub mod code_scores;
pub mod dot_scores;
pub mod gather;
pub mod linear;
pub mod merge_partials;
pub mod merge_rows;
pub mod nearest;
pub mod pack;
pub mod pool;
pub mod rebuild;
pub mod rope;
pub mod row_norms;
pub mod simd;
mod spans;
pub mod top_k;
pub mod weigh_values;
pub mod window_scores;

pub use spans::{Span, Spans};

use crate::device::HeadRows;
use crate::error::KernelError;
use crate::geometry::LayerShape;

/// What turns a dot product into a logit, and which entries a query sees.
///
/// The logit of query `q` at position `p` on an entry with key `k`, position `j` and bias `β` is
/// `cap(scale · q·k) + β`, where `cap(x) = c·tanh(x/c)` with a soft cap `c` and the identity without.
/// The entry is seen iff `j <= p` and, with a window `w`, `j > p - w`. A sink logit joins the denominator
/// of every row of its query head.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams<'a> {
    /// Query heads per KV head, `G`.
    pub group: usize,
    /// Key dimension.
    pub d_k: usize,
    /// Value dimension.
    pub d_v: usize,
    /// Factor on the dot product.
    pub scale: f32,
    /// Soft cap.
    pub softcap: Option<f32>,
    /// Sliding window, in positions.
    pub window: Option<u32>,
    /// One logit per query head.
    pub sink_logits: Option<&'a [f32]>,
}

impl<'a> AttentionParams<'a> {
    /// The parameters of a layer.
    pub fn of(shape: &'a LayerShape) -> Self {
        Self {
            group: shape.group(),
            d_k: shape.d_k,
            d_v: shape.d_v,
            scale: shape.scale,
            softcap: shape.softcap,
            window: shape.window,
            sink_logits: shape.sink_logits.as_deref(),
        }
    }

    /// Whether a query at `query` sees an entry at `entry`.
    #[inline]
    pub fn sees(&self, query: i32, entry: i32) -> bool {
        entry <= query && self.window.is_none_or(|w| i64::from(query) - i64::from(entry) < i64::from(w))
    }

    /// The logit before β.
    #[inline]
    pub fn logit(&self, dot: f32) -> f32 {
        let x = dot * self.scale;
        match self.softcap {
            Some(c) => c * (x / c).tanh(),
            None => x,
        }
    }
}

/// Checks a buffer's length against the contract.
///
/// # Errors
/// [`KernelError::Length`] if they differ.
pub fn expect_len(
    kernel: &'static str,
    buffer: &'static str,
    got: usize,
    want: usize,
) -> Result<(), KernelError> {
    if got == want { Ok(()) } else { Err(KernelError::Length { kernel, buffer, got, want }) }
}

/// Entries over all heads: the length of one value per entry.
pub fn total_rows(heads: &[HeadRows]) -> usize {
    heads.iter().map(HeadRows::rows).sum()
}
