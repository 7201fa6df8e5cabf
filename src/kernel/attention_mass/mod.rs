//! Column sums of attention: how much softmax mass each entry received from given queries whose row
//! log-sum-exp is already known.
//!
//! *Helps* H2O-like scores after a fused attention that never wrote its weights: a second pass over the
//! keys with the stored log-sum-exp. *Hurts* by that second pass, so it runs only when a policy asks.
//!
//! `mass[h,j] = Σ_i exp(x[h,i,j] − lse[h,i])`, logits as in [`super::attend`]; a row with `lse = −∞` adds 0.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::{AttentionParams, expect_len, total_rows};
use crate::device::HeadRows;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "attention_mass";

/// The queries of one sequence and layer.
#[derive(Debug)]
pub struct MassArgs<'a> {
    /// The KV heads, `H`.
    pub heads: &'a [HeadRows],
    /// `[Hq, T, d_k]`.
    pub queries: &'a [f32],
    /// Positions of the `T` queries.
    pub positions: &'a [i32],
    /// `[Hq, T]`.
    pub lse: &'a [f32],
    /// For each KV head in turn `[G, rows]`, overwritten.
    pub mass: &'a mut [f32],
}

impl MassArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self, params: &AttentionParams<'_>) -> Result<(), KernelError> {
        let rows = self.heads.len() * params.group * self.positions.len();
        expect_len(NAME, "queries", self.queries.len(), rows * params.d_k)?;
        expect_len(NAME, "lse", self.lse.len(), rows)?;
        expect_len(NAME, "mass", self.mass.len(), params.group * total_rows(self.heads))
    }
}
