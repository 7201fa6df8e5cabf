//! Weighted sums of whole entries: what an entry becomes that takes up others.
//!
//! ```text
//! k'[t] = κ[t] k[t] + Σ κ[s] k[s]        v'[t] = ν[t] v[t] + Σ ν[s] v[s]        s: the sources of t, in order
//! ```
//! Sums are accumulated in `f32`. A source may go into several targets, and the weights need not add up to 1.
//!
//! *Helps* every reducer: which entries go where, and with what weight, is data ([`Merges`]). *Hurts* nothing: it reads
//! what is merged once.

pub mod cpu;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod reference;

use super::expect_len;
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;

/// Name in errors, benchmarks and shaders.
pub const NAME: &str = "merge_rows";

/// Allowed error of a sum of `n` terms, as a share of the sum of their weights' magnitudes, each times the largest element of
/// its row.
pub fn tolerance(n: usize) -> f64 {
    2.0 * (n as f64 + 1.0) * f64::from(f32::EPSILON)
}

/// Which entries of one KV head are mixed into which, and with what weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Merges {
    /// Whether keys are mixed too. If not, they stay what they are and key weights mean nothing.
    pub keys: bool,
    /// Entries that take up others, by ascending slot.
    pub targets: Vec<Target>,
    /// Those they take up, target after target, by ascending slot within each.
    pub sources: Vec<Source>,
}

/// An entry that takes up others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Where it is.
    pub slot: u32,
    /// How many of [`Merges::sources`] are its own, behind those of the targets before it.
    pub sources: u32,
    /// Weight of its own key, `κ`.
    pub key: f32,
    /// Weight of its own value, `ν`.
    pub value: f32,
    /// What is added to its log-mass bias β.
    pub bias: f32,
}

/// An entry that is taken up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Source {
    /// Where it is.
    pub slot: u32,
    /// Weight of its key.
    pub key: f32,
    /// Weight of its value.
    pub value: f32,
}

impl Merges {
    /// Whether nothing is merged.
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Every target with its sources.
    pub fn iter(&self) -> impl Iterator<Item = (&Target, &[Source])> {
        let mut rest = self.sources.as_slice();
        self.targets.iter().map(move |target| {
            let (own, behind) = rest.split_at((target.sources as usize).min(rest.len()));
            rest = behind;
            (target, own)
        })
    }

    /// Adds a target behind those there are.
    pub fn push(&mut self, target: Target, sources: impl IntoIterator<Item = Source>) {
        let before = self.sources.len();
        self.sources.extend(sources);
        self.targets.push(Target { sources: (self.sources.len() - before) as u32, ..target });
    }
}

/// The merges of one KV head.
#[derive(Debug)]
pub struct MergeRowsArgs<'a> {
    /// The KV head, before anything moves.
    pub head: &'a HeadRows,
    /// What is mixed.
    pub merges: &'a Merges,
    /// `[targets, d_k]` if keys are mixed, else empty.
    pub keys: &'a mut [f32],
    /// `[targets, d_v]`.
    pub values: &'a mut [f32],
}

impl MergeRowsArgs<'_> {
    /// Checks every buffer and slot against the contract.
    ///
    /// # Errors
    /// [`KernelError::Length`] names the buffer.
    pub fn validate(&self) -> Result<(), KernelError> {
        let Merges { keys, targets, sources } = self.merges;
        expect_len(NAME, "sources", sources.len(), targets.iter().map(|t| t.sources as usize).sum())?;
        let slots = targets.iter().map(|t| t.slot).chain(sources.iter().map(|s| s.slot));
        let rows = self.head.rows();
        if let Some(slot) = slots.max().filter(|&slot| slot as usize >= rows) {
            return Err(KernelError::Length { kernel: NAME, buffer: "slot", got: slot as usize, want: rows });
        }
        let (d_k, d_v) = dims(self.head);
        expect_len(NAME, "keys", self.keys.len(), if *keys { targets.len() * d_k } else { 0 })?;
        expect_len(NAME, "values", self.values.len(), targets.len() * d_v)
    }
}

/// Dimensions of a KV head's keys and values; 0 if it is empty.
fn dims(head: &HeadRows) -> (usize, usize) {
    head.segments.first().map_or((0, 0), |s| (s.layout.dim(Side::Key), s.layout.dim(Side::Value)))
}
