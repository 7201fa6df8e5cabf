//! Attention of new queries over stored entries, in place: softmax(logits) · V per query head, with the
//! log-sum-exp of every row and, on request, the attention mass that every entry received.
//!
//! *Helps* because nothing is copied, concatenated or expanded to query heads: the `G` query heads of a
//! group share each key and value row. *Hurts* nothing; it is the one call a host cannot avoid.
//!
//! For query head `h` (KV head `⌊h/G⌋`), query `i`, entries `j` that it sees:
//! ```text
//! x[h,i,j] = cap(scale · q[h,i]·k[j]) + β[j]
//! lse[h,i] = ln( Σ_j exp x[h,i,j]  (+ exp sink[h]) )
//! out[h,i] = Σ_j exp(x[h,i,j] − lse[h,i]) · v[j]
//! mass[h,j] = Σ_i exp(x[h,i,j] − lse[h,i])
//! ```
//! A row that sees nothing has `out = 0` and `lse = −∞` (or the sink logit).
//!
//! With [`AttendLane::spans`] the sums run over the entries named there only: what an index chose to read.

#[cfg(any(test, feature = "testing"))]
pub mod cases;
pub mod cpu;
mod cut;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::{AttentionParams, Spans, expect_len, total_rows};
use crate::device::HeadRows;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "attend";

/// Allowed error of a logit, per unit of `1 + scale·‖q‖·max‖k‖`; an output row may be off by the same share of
/// its norm, because a weight changes by the factor `exp(error)`.
///
/// A sum of `d` products in `f32` is off by about `√d · 2⁻²⁴` of `Σ|q·k|` in whatever order it is taken
/// (1e-6 for `d = 256`), and an exponential by a few units of 2⁻²⁴; 4e-6 leaves room for a GPU's `exp`.
pub const LOGIT_TOLERANCE: f64 = 4e-6;

/// The same where a head holds packed rows, whose products may be taken in integers: of queries and weights rounded to
/// 16 bits, half a unit or 2⁻¹⁶ of the largest element.
///
/// A logit is then off by `m ‖k‖ / (32639 √12)` as a standard deviation, 8.8e-6 times `m ‖k‖`, where `m <= ‖q‖` is the
/// query's largest element; 3e-5 is more than three of them. Half a percent of the error of 8-bit codes.
pub const PACKED_TOLERANCE: f64 = 3e-5;

/// Share of the typical norm of a value row that is added to a row's own norm: averaging many values cancels
/// most of them, but not their rounding errors.
pub const CANCELLATION: f64 = 0.05;

/// Weights below this are compared absolutely: `exp` of a large negative number keeps few correct digits and
/// no sum depends on it.
pub const WEIGHT_FLOOR: f64 = 1e-3;

/// Which part of the entries a call covers: part `index` of `of`, split by pages within each KV head, so
/// that several threads of a host can each take one and merge afterwards. The sink logit belongs to part 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// This part.
    pub index: usize,
    /// Number of parts.
    pub of: usize,
}

impl Share {
    /// All entries.
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// The part of `count` items this share covers.
    pub fn range(&self, count: usize) -> std::ops::Range<usize> {
        count * self.index / self.of..count * (self.index + 1) / self.of
    }
}

impl Default for Share {
    fn default() -> Self {
        Self::ALL
    }
}

/// The attention of one sequence's new queries in one layer.
#[derive(Debug, Default)]
pub struct AttendLane<'a> {
    /// The KV heads, `H`.
    pub heads: &'a [HeadRows],
    /// `[Hq, T, d_k]`, dense.
    pub queries: &'a [f32],
    /// Positions of the `T` queries.
    pub positions: &'a [i32],
    /// Which entries to read.
    pub share: Share,
    /// Of each KV head, the only entries to read; `None` reads all. Only with [`Share::ALL`] and without `mass`.
    pub spans: Option<&'a [Spans]>,
    /// `[Hq, T, d_v]`, written.
    pub out: &'a mut [f32],
    /// `[Hq, T]`, written.
    pub lse: &'a mut [f32],
    /// For each KV head in turn `[G, rows]`, **overwritten** with the mass of each entry per query head.
    /// Only with [`Share::ALL`].
    pub mass: Option<&'a mut [f32]>,
}

impl AttendLane<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self, params: &AttentionParams<'_>) -> Result<(), KernelError> {
        let rows = self.heads.len() * params.group * self.positions.len();
        expect_len(NAME, "queries", self.queries.len(), rows * params.d_k)?;
        expect_len(NAME, "out", self.out.len(), rows * params.d_v)?;
        expect_len(NAME, "lse", self.lse.len(), rows)?;
        if self.share.index >= self.share.of {
            let (got, want) = (self.share.index, self.share.of);
            return Err(KernelError::Length {
                kernel: NAME,
                buffer: "share.index (below share.of)",
                got,
                want,
            });
        }
        if let Some(mass) = &self.mass {
            expect_len(NAME, "mass", mass.len(), params.group * total_rows(self.heads))?;
            expect_len(NAME, "share.of (mass needs the whole)", self.share.of, 1)?;
        }
        if let Some(spans) = self.spans {
            Spans::validate(NAME, spans, self.heads)?;
            expect_len(NAME, "share.of (spans need the whole)", self.share.of, 1)?;
            expect_len(NAME, "mass (not to be had of spans)", usize::from(self.mass.is_some()), 0)?;
        }
        if let Some(sinks) = params.sink_logits {
            expect_len(NAME, "sink_logits", sinks.len(), self.heads.len() * params.group)?;
        }
        Ok(())
    }
}

/// Memory a caller lends to a call on the decode path, so that the call itself allocates nothing once the workspace
/// has grown to the largest step. One per calling thread.
#[derive(Debug, Default)]
pub struct Workspace {
    words: Vec<f32>,
}

impl Workspace {
    /// Alignment of what [`Workspace::take`] gives, in floats: a cache line, and the widest vector. Vectors
    /// that straddle two lines cost twice.
    const ALIGN: usize = 16;

    /// A slice of `len` floats with unspecified contents, starting at a cache line.
    pub fn take(&mut self, len: usize) -> &mut [f32] {
        if self.words.len() < len + Self::ALIGN {
            self.words.resize(len + Self::ALIGN, 0.0);
        }
        let start = self.words.as_ptr().align_offset(Self::ALIGN * size_of::<f32>()).min(Self::ALIGN);
        &mut self.words[start..start + len]
    }
}
