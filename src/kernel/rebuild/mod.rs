//! Entries of low rank as dense rows: latent rows times the basis of their KV head, keys turned to their positions.
//!
//! ```text
//! k̂[i] = turn(position[i], latent_k[i] · basis_k)        v̂[i] = latent_v[i] · basis_v
//! ```
//! A key that is kept beside the products ([`crate::device::Factors::kept`]) stands in the place of its product. A side that is
//! not factored is copied from its page.
//!
//! *Helps* whatever needs entries as they were: summaries of an index that is made anew, hosts with their own attention.
//! *Hurts* decode, which would make every key in every step: [`super::attend_factored`] makes the chosen ones, remembers
//! them, and values never.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::device::HeadRows;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "rebuild";

/// Allowed error of an element per unit of `‖latent row‖ · ‖basis‖`, Frobenius: a sum of products in f32, in any
/// order, and a rotation.
pub const TOLERANCE: f64 = 2e-6;

/// Which entries of one KV head.
#[derive(Debug)]
pub struct RebuildArgs<'a> {
    /// The source.
    pub head: &'a HeadRows,
    /// Ascending slots, all of them in runs that are made of factors ([`HeadRows::factored`]).
    pub slots: &'a [u32],
    /// `[slots, d_k]`, written.
    pub keys: &'a mut [f32],
    /// `[slots, d_v]`, written.
    pub values: &'a mut [f32],
}

impl RebuildArgs<'_> {
    /// Checks every buffer against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer, [`KernelError::Layout`] an entry that is not made of factors.
    pub fn validate(&self) -> Result<(), KernelError> {
        let mut slots = self.slots;
        for (.., run) in self.head.factored() {
            let before = slots.partition_point(|&slot| (slot as usize) < run.start);
            let within = slots.partition_point(|&slot| (slot as usize) < run.end);
            if before > 0 {
                break;
            }
            slots = &slots[within..];
        }
        if !slots.is_empty() {
            let problem = "a slot is not among the entries that are made of factors; gather reads the others";
            return Err(KernelError::Layout { kernel: NAME, problem });
        }
        let Some(segment) = self.head.segments.first() else { return Ok(()) };
        expect_len(NAME, "keys", self.keys.len(), self.slots.len() * segment.layout.d_k)?;
        expect_len(NAME, "values", self.values.len(), self.slots.len() * segment.layout.d_v)
    }
}
