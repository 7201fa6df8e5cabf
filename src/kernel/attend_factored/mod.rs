//! Attention over the entries that are made of factors, and over no others: keys are made of theirs, values are not made.
//!
//! ```text
//! x[h,i,j] = cap(scale · q[h,i]·k̂[j])        k̂[j] as in [`super::rebuild`], rounded to the type of its latent row
//! lse[h,i] = ln Σ_j exp x[h,i,j]
//! out[h,i] = ( Σ_j exp(x[h,i,j] − lse[h,i]) · latent_v[j] ) · basis_v
//! ```
//! Values are summed as latent rows and multiplied by the basis once (xKV, arXiv 2503.18893). A row for which there are no
//! such entries has `out = 0` and `lse = −∞`; what other entries give comes from [`super::attend`] and is put together by
//! [`super::merge_partials`].
//!
//! *Helps* decode over chosen entries: a key costs `2 r d` operations the first time and none while it is remembered
//! ([`Remembered`]), a value `2 r` per query instead of `2 r d`. *Hurts* where everything is read in every step: all keys
//! are made each time, unless as many are remembered.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;
mod remembered;

pub use remembered::Remembered;

use super::attend::LOGIT_TOLERANCE;
use super::{AttentionParams, Spans, expect_len};
use crate::device::HeadRows;
use crate::error::KernelError;
use crate::view::DType;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "attend_factored";

/// Allowed error of a logit, per unit of `1 + scale·‖q‖·max‖k̂‖`: that of [`super::attend`], and of a key that is rounded to
/// the type of its latent row, half a unit of which any two implementations may differ by.
pub fn tolerance(dtype: DType) -> f64 {
    LOGIT_TOLERANCE
        + match dtype {
            DType::F32 => 0.0,
            DType::F16 => f64::from(2.0f32.powi(-11)),
            DType::Bf16 => f64::from(2.0f32.powi(-8)),
        }
}

/// The attention of one sequence's new queries in one layer, all of them after every entry that is made of factors.
#[derive(Debug)]
pub struct FactoredArgs<'a> {
    /// The KV heads, `H`.
    pub heads: &'a [HeadRows],
    /// `[Hq, T, d_k]`, dense.
    pub queries: &'a [f32],
    /// `T`.
    pub tokens: usize,
    /// Of each KV head, the only entries to read; `None` reads all that are made of factors.
    pub spans: Option<&'a [Spans]>,
    /// `[Hq, T, d_v]`, written.
    pub out: &'a mut [f32],
    /// `[Hq, T]`, written.
    pub lse: &'a mut [f32],
    /// Of each KV head, keys that were made before. A backend may do without.
    pub remembered: &'a mut [Remembered],
}

impl FactoredArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer, [`KernelError::Layout`] what cannot be made of factors.
    pub fn validate(&self, params: &AttentionParams<'_>) -> Result<(), KernelError> {
        let rows = self.heads.len() * params.group * self.tokens;
        expect_len(NAME, "queries", self.queries.len(), rows * params.d_k)?;
        expect_len(NAME, "out", self.out.len(), rows * params.d_v)?;
        expect_len(NAME, "lse", self.lse.len(), rows)?;
        expect_len(NAME, "remembered", self.remembered.len(), self.heads.len())?;
        if let Some(spans) = self.spans {
            Spans::validate(NAME, spans, self.heads)?;
        }
        if params.window.is_some() && self.heads.iter().any(HeadRows::is_factored) {
            let problem = "entries of a sliding window are not made of factors";
            return Err(KernelError::Layout { kernel: NAME, problem });
        }
        Ok(())
    }
}
