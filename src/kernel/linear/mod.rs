//! A dense layer with its activation: what small perceptrons are made of that score entries by hidden states, or by the
//! queries, keys and values of new tokens.
//!
//! ```text
//! out[i, j] = act(Σ_k x[i, k] · w[j, k] + b[j])
//! ```
//!
//! *Helps* learned eviction scores from one token (decode) to a chunk of a prompt. *Hurts* decode by one read of all
//! weights per call; on a GPU they cross the bus with every call.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "linear";

/// Allowed error of an element per unit of `Σ_k |x[i, k] · w[j, k]| + |b[j]|`: a sum of products in f32, in any order,
/// and an activation, whose slope is at most 1.13 and whose own error is [`ACTIVATION_ERROR`].
pub const TOLERANCE: f64 = 2e-6;

/// How far an activation of `x` may be off, per unit of `|x|`: the error function by Abramowitz and Stegun 7.1.26, which is
/// within 1.5e-7 and halved in Φ, and rounding.
pub const ACTIVATION_ERROR: f64 = 3e-7;

/// What is done to every element of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `x / (1 + e⁻ˣ)`.
    Silu,
    /// `x · Φ(x)`, with the distribution function of the normal distribution, not its approximation by a hyperbolic tangent.
    Gelu,
}

/// A layer, and the rows it is applied to.
#[derive(Debug)]
pub struct LinearArgs<'a> {
    /// `[n, inputs]`, row-major.
    pub x: &'a [f32],
    /// `[outputs, inputs]`, row-major, as PyTorch stores it.
    pub weight: &'a [f32],
    /// `[outputs]`, or none.
    pub bias: Option<&'a [f32]>,
    /// Elements of a row of `x`, at least one.
    pub inputs: usize,
    /// Elements of a row of the result, at least one.
    pub outputs: usize,
    /// What is done to every element of the result.
    pub activation: Activation,
    /// Overwritten: `[n, outputs]`; `n` is `out.len() / outputs`.
    pub out: &'a mut [f32],
}

impl LinearArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer, or `inputs` or `outputs` if that is 0.
    pub fn validate(&self) -> Result<(), KernelError> {
        expect_len(NAME, "inputs (at least 1)", self.inputs, self.inputs.max(1))?;
        expect_len(NAME, "outputs (at least 1)", self.outputs, self.outputs.max(1))?;
        let rows = self.out.len() / self.outputs;
        expect_len(NAME, "out (whole rows)", self.out.len(), rows * self.outputs)?;
        expect_len(NAME, "x", self.x.len(), rows.saturating_mul(self.inputs))?;
        expect_len(NAME, "weight", self.weight.len(), self.outputs.saturating_mul(self.inputs))?;
        self.bias.map_or(Ok(()), |bias| expect_len(NAME, "bias", bias.len(), self.outputs))
    }
}
