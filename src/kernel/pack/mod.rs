//! Packing rows into a page: rotated, centred and quantized as the page's layout says (see
//! [`crate::device::encoding`] for what is stored, and [`crate::kernel::gather`] into dense buffers for the way
//! back).
//!
//! Per packed side, for rows `x[j]`:
//! ```text
//! y[j] = H x[j]  (hadamard)      mean = f16( Σ_j y[j] / n )  (center)      z[j] = y[j] − mean
//! ```
//! and per group of `z`, parameters rounded to `f16` before codes are taken against them unless said otherwise:
//!
//! | format | scale `s` | min `m` | code |
//! |---|---|---|---|
//! | int8 | max abs / 127 | | round(z/s) within ±127 |
//! | int4, kivi4, kivi2 | (max − min) / (2^b − 1) | min | round((z − m)/s) |
//! | lm4, lm3, lm2 | Σ z·c / Σ c² over the levels `c` chosen | | level nearest to z / rms(z) |
//! | q8_0 | max abs / 127, rounded after use | | round half away from zero |
//! | q4_0, q5_0 | element of largest magnitude / −2^(b−1), rounded after use | | ⌊z/s + 2^(b−1) + ½⌋, at most 2^b − 1 |
//! | q4_1, q5_1 | (max − min) / (2^b − 1), rounded after use | min | ⌊(z − m)/s + ½⌋ |
//!
//! "round" is half to even. The last three rows are llama.cpp's, to the bit. A group of equal elements has scale 0
//! (and its value as minimum, where there is one).
//!
//! *Helps* once per 128 entries. *Hurts* nothing on the decode path, where it never runs.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod quantize;
pub mod reference;

use super::expect_len;
use crate::device::page::{Page, PageLayout};
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "pack";

/// By how much an unpacked element may differ between implementations: codes are the same, the few operations that
/// widen them and turn them back are not.
pub fn allowed(want: f32) -> f64 {
    1e-5 * (1.0 + f64::from(want.abs()))
}

/// Rows for the start of one page.
#[derive(Debug)]
pub struct PackArgs<'a> {
    /// The page's layout; a side of it may be exact, and is then only narrowed.
    pub layout: &'a PageLayout,
    /// The page. Positions, β and columns are the caller's.
    pub page: &'a mut Page,
    /// `[n, d_k]`, `n` at most the page's capacity.
    pub keys: &'a [f32],
    /// `[n, d_v]`.
    pub values: &'a [f32],
}

impl PackArgs<'_> {
    /// Rows given.
    pub fn rows(&self) -> usize {
        self.keys.len() / self.layout.d_k.max(1)
    }

    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer; [`KernelError::NotFinite`] the row.
    pub fn validate(&self) -> Result<(), KernelError> {
        let rows = self.rows();
        expect_len(NAME, "keys", self.keys.len(), rows * self.layout.d_k)?;
        expect_len(NAME, "values", self.values.len(), rows * self.layout.d_v)?;
        if rows > self.layout.capacity {
            let (got, want) = (rows, self.layout.capacity);
            return Err(KernelError::Length { kernel: NAME, buffer: "rows (at most the page's)", got, want });
        }
        for (buffer, data, d) in
            [("keys", self.keys, self.layout.d_k), ("values", self.values, self.layout.d_v)]
        {
            if let Some(at) = data.iter().position(|x| !x.is_finite()) {
                return Err(KernelError::NotFinite { kernel: NAME, buffer, row: at / d });
            }
        }
        Ok(())
    }
}
