//! For each of some entries the most alike of some others, by the cosine of their keys: where a dropped entry goes when
//! entries are merged.
//!
//! ```text
//! nearest[i] = argmax over candidates j of  k[i] · k[j] / (‖k[i]‖ ‖k[j]‖)        ties: the older candidate
//! ```
//! A key of zeros is alike to nothing: its cosines are 0.
//!
//! *Helps* every reducer that asks which survivor may speak for an entry. *Hurts* by `entries × candidates × d_k`
//! products: with 128 thousand tokens, of which a quarter stays, as much as their prefill's attention takes.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "nearest";

/// Allowed absolute error of a cosine, and how far below the best one the cosine of the candidate that is named may be.
pub const TOLERANCE: f64 = 1e-5;

/// Which entries, and among which.
#[derive(Debug)]
pub struct NearestArgs<'a> {
    /// The KV heads.
    pub heads: &'a [HeadRows],
    /// Of each KV head, the slots that look for a neighbour.
    pub from: &'a [&'a [u32]],
    /// Of each KV head, the candidates' slots; at least one where anything looks for one.
    pub into: &'a [&'a [u32]],
    /// For each of `from`, head after head, an index into `into` of that head.
    pub nearest: &'a mut [u32],
    /// The cosine of the two keys.
    pub cosines: &'a mut [f32],
}

impl NearestArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        expect_len(NAME, "from (KV heads)", self.from.len(), self.heads.len())?;
        expect_len(NAME, "into (KV heads)", self.into.len(), self.heads.len())?;
        for ((head, from), into) in self.heads.iter().zip(self.from).zip(self.into) {
            let rows = head.rows();
            for (buffer, slots) in [("slot of from", from), ("slot of into", into)] {
                if let Some(&slot) = slots.iter().find(|&&slot| slot as usize >= rows) {
                    return Err(KernelError::Length { kernel: NAME, buffer, got: slot as usize, want: rows });
                }
            }
            if into.is_empty() && !from.is_empty() {
                return Err(KernelError::Length { kernel: NAME, buffer: "into", got: 0, want: 1 });
            }
        }
        let total = self.from.iter().map(|from| from.len()).sum();
        expect_len(NAME, "nearest", self.nearest.len(), total)?;
        expect_len(NAME, "cosines", self.cosines.len(), total)
    }
}

/// Key dimension of a KV head; 0 if it is empty.
fn dim(head: &HeadRows) -> usize {
    head.segments.first().map_or(0, |s| s.layout.dim(Side::Key))
}
