//! The `k` best-scored slots of each head, protected slots first, in ascending slot order.
//!
//! *Helps* because every backend chooses the same set: higher score first, then the lower slot (which is the
//! lower position). −0 equals +0, infinities order as usual; NaN is refused before this kernel is called.
//! *Hurts* nothing worth naming: selection, not sorting, O(n) on average.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "top_k";

/// Several rows of scores of different lengths, one after another.
#[derive(Debug)]
pub struct TopKArgs<'a> {
    /// Length of each row.
    pub lengths: &'a [usize],
    /// How many to choose per row: at least its protected slots, at most its length.
    pub counts: &'a [usize],
    /// The scores.
    pub scores: &'a [f32],
    /// One byte per score: 1 = always chosen.
    pub protect: &'a [u8],
    /// Chosen slots (relative to their row), ascending within each row; `Σ counts` long.
    pub out: &'a mut [u32],
}

impl TopKArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        let total = self.lengths.iter().sum();
        expect_len(NAME, "counts", self.counts.len(), self.lengths.len())?;
        expect_len(NAME, "scores", self.scores.len(), total)?;
        expect_len(NAME, "protect", self.protect.len(), total)?;
        expect_len(NAME, "out", self.out.len(), self.counts.iter().sum())?;
        let mut start = 0;
        for (&len, &count) in self.lengths.iter().zip(self.counts) {
            let protected = self.protect[start..start + len].iter().filter(|&&p| p != 0).count();
            if count > len || count < protected {
                return Err(KernelError::Length {
                    kernel: NAME,
                    buffer: "count (protected ..= length)",
                    got: count,
                    want: if count > len { len } else { protected },
                });
            }
            start += len;
        }
        Ok(())
    }
}
