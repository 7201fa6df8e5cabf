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
//! | int4 | of several, see below, the fit that loses least | | round((z − m)/s) |
//! | kivi4, kivi2 | (max − min) / (2^b − 1) | min | round((z − m)/s) |
//! | lm4, lm3, lm2 | of several, see below, the fit that loses least | | level nearest to z / (a·rms(z)) |
//! | q8_0 | max abs / 127, rounded after use | | round half away from zero |
//! | q4_0, q5_0 | element of largest magnitude / −2^(b−1), rounded after use | | ⌊z/s + 2^(b−1) + ½⌋, at most 2^b − 1 |
//! | q4_1, q5_1 | (max − min) / (2^b − 1), rounded after use | min | ⌊(z − m)/s + ½⌋ |
//!
//! A fit tries seven ranges: for int4 the whole one about its middle and down to 0.7 of it, for Lloyd–Max levels
//! multiples `a` of the root mean square from 0.8 to 1.21. For the levels `c` that each gives, scale and minimum follow
//! by least squares (`s = Σ z·c / Σ c²` without minimum), and the one with the least `Σ (z − s·c − m)²` stays. A few
//! elements clipped let all others round finer; it also finds the range of groups that are not normally distributed.
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
use crate::device::encoding::PackedLayout;
use crate::device::page::{Page, PageLayout};
use crate::error::KernelError;
use half::f16;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "pack";

/// By how much an unpacked element may differ between implementations: codes are the same, the few operations that
/// widen them and turn them back are not.
pub fn allowed(want: f32) -> f64 {
    1e-5 * (1.0 + f64::from(want.abs()))
}

/// Checks that a group's parameters can be stored.
fn in_range(layout: &PackedLayout, row: usize, (scale, min): (f16, f16)) -> Result<(), KernelError> {
    if scale.is_finite() && min.is_finite() {
        return Ok(());
    }
    Err(KernelError::Range { kernel: NAME, row, format: layout.packing.format.name() })
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
