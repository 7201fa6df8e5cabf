//! Euclidean norm of every stored key or value row, accumulated in `f32`.
//!
//! *Helps* scores that look at keys alone (low-norm keys tend to draw attention). *Hurts* nothing: one
//! streaming read of the side.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use crate::device::HeadRows;
use crate::device::page::Side;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "row_norms";

/// Allowed relative error: squares are all positive, so a sum in any order is off by about `√d · 2⁻²⁴`.
pub const TOLERANCE: f64 = 2e-6;

/// Which rows.
#[derive(Debug)]
pub struct NormArgs<'a> {
    /// The KV heads.
    pub heads: &'a [HeadRows],
    /// Keys or values.
    pub side: Side,
    /// One norm per entry, head after head.
    pub out: &'a mut [f32],
}
