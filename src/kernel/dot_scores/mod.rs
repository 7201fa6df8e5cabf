//! Logits of a few queries on every entry, without softmax and without values: how an index scores its summaries.
//!
//! *Helps* retrieval: summaries lie in pages like entries do, in any encoding, and one pass over their keys tells which
//! entries are worth reading. *Hurts* nothing next to the entries it saves; it reads one key row per summary.
//!
//! `x[h,i,j] = cap(scale · q[h,i]·k[j]) + β[j]`. There is no mask: every query sees every row, whatever its position,
//! because what is summarised lies before the query. Sink logits play no part.
//!
//! With [`DotArgs::spans`] only the rows named there are scored, and the result holds no others: the lower levels of a
//! hierarchy ask for few of many, and what follows must not grow with the many.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::{AttentionParams, Spans, expect_len};
use crate::device::HeadRows;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "dot_scores";

/// The queries of one sequence on the summaries of one layer.
#[derive(Debug)]
pub struct DotArgs<'a> {
    /// The KV heads, `H`.
    pub heads: &'a [HeadRows],
    /// `[Hq, T, d_k]`, dense.
    pub queries: &'a [f32],
    /// `T`.
    pub tokens: usize,
    /// Of each KV head, the only rows to score; `None` scores all.
    pub spans: Option<&'a [Spans]>,
    /// Overwritten: for each KV head in turn `[G, T, rows]`, those of spans in their order.
    pub out: &'a mut [f32],
}

impl DotArgs<'_> {
    /// Rows of a KV head to score.
    pub fn rows(&self, head: usize) -> usize {
        self.spans.map_or_else(|| self.heads[head].rows(), |spans| spans[head].rows())
    }

    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self, params: &AttentionParams<'_>) -> Result<(), KernelError> {
        let queries = self.heads.len() * params.group * self.tokens;
        expect_len(NAME, "queries", self.queries.len(), queries * params.d_k)?;
        if let Some(spans) = self.spans {
            Spans::validate(NAME, spans, self.heads)?;
        }
        let rows: usize = (0..self.heads.len()).map(|h| self.rows(h)).sum();
        expect_len(NAME, "out", self.out.len(), params.group * self.tokens * rows)
    }
}
