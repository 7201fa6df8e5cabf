//! Rotating rows by given angles: rotate, un-rotate and re-rotate are one operation, because rotations
//! compose: a key stored at position `a` and moved to `b` turns by the angles of `b − a`.
//!
//! *Helps* renumbering after an eviction without the original keys. *Hurts* in half precision, where every
//! re-rotation rounds once more (about 1e-3 relative); repeated renumbering belongs on `f32` keys.
//!
//! For pair `(a, b)` of a row and its `(cos, sin)`: `(a cos − b sin, a sin + b cos)`, in `f32`.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::device::page::{Page, PageLayout};
use crate::error::KernelError;
use crate::geometry::RotaryLayout;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "rope";

/// Allowed error per unit of `1 + |expected|`: two products and a sum, fused or not.
pub const TOLERANCE: f64 = 1e-6;

/// What is rotated, in place.
#[derive(Debug)]
pub enum RopeTarget<'a> {
    /// The first `rows` keys of a page.
    Keys {
        /// Its layout.
        layout: &'a PageLayout,
        /// The page.
        page: &'a mut Page,
        /// How many.
        rows: usize,
    },
    /// Dense `[n, dim]` rows in host memory (recorded queries).
    Dense {
        /// The rows.
        rows: &'a mut [f32],
        /// Their dimension.
        dim: usize,
    },
}

/// A rotation of consecutive rows.
#[derive(Debug)]
pub struct RopeArgs<'a> {
    /// Which dimensions pair up.
    pub layout: RotaryLayout,
    /// How many leading dimensions rotate.
    pub dims: usize,
    /// `[rows, dims / 2, 2]` cosine and sine, from [`crate::geometry::Rotary::table`].
    pub table: &'a [f32],
    /// What to rotate.
    pub target: RopeTarget<'a>,
}

impl RopeArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        let (rows, dim) = match &self.target {
            RopeTarget::Keys { layout, rows, .. } => {
                if layout.k.exact().is_none() {
                    return Err(KernelError::Layout {
                        kernel: NAME,
                        problem: "packed keys cannot be rotated in place",
                    });
                }
                (*rows, layout.d_k)
            }
            RopeTarget::Dense { rows, dim } => {
                expect_len(NAME, "rows (multiple of dim)", rows.len() % (*dim).max(1), 0)?;
                (rows.len() / (*dim).max(1), *dim)
            }
        };
        expect_len(NAME, "table", self.table.len(), rows * self.dims)?;
        if self.dims > dim {
            return Err(KernelError::Length { kernel: NAME, buffer: "dims", got: self.dims, want: dim });
        }
        Ok(())
    }
}
