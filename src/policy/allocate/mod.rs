//! Allocators: how many entries each layer and each KV head may keep.
//!
//! *Helps* where heads or layers differ in how far they spread their attention. *Hurts* when scores of
//! different heads are not comparable (key norms, counts), and where all heads must stay equally long
//! (renumbered positions): then only `uniform` serves.

use super::registry::Entry;
use super::{LayerScores, TargetRequest};
use crate::backend::Backend;
use crate::error::PolicyError;
use std::fmt::Debug;

/// The entries of one layer that an allocator divides among its KV heads.
#[derive(Clone, Copy, Debug)]
pub struct HeadRequest<'a> {
    /// Entries each KV head is to keep, on average over the layer's heads.
    pub target: usize,
    /// A score per entry, never NaN; higher is kept.
    pub scores: &'a LayerScores,
    /// One byte per entry: 1 = kept whatever its score. At most `target` in each KV head.
    pub protect: &'a [u8],
    /// Where kernels run.
    pub backend: &'a dyn Backend,
}

impl HeadRequest<'_> {
    /// Entries the layer keeps in all: `H · target`, or everything if it stores no more.
    pub fn total(&self) -> usize {
        self.target.saturating_mul(self.scores.lengths.len()).min(self.scores.values.len())
    }
}

/// Divides a budget among layers, and a layer's part among its KV heads.
pub trait Allocator: Debug + Send + Sync {
    /// Its registry name.
    fn name(&self) -> &str;

    /// Whether all KV heads of all layers always keep equally many entries.
    fn equal_counts(&self) -> bool;

    /// A number that layer budgets go by, made of a layer's scores without its protected entries. None by default.
    fn measure(&self) -> Option<fn(&LayerScores) -> f32> {
        None
    }

    /// Entries per KV head for each of `request.layers`; their sum is `target · layers`.
    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        vec![request.target; request.layers.len()]
    }

    /// Entries each KV head keeps: at least its protected ones, at most its stored ones, and
    /// `H · target` in all at most.
    ///
    /// # Errors
    /// [`PolicyError::Kernel`].
    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError>;
}

macro_rules! allocators {
    ($($module:ident,)*) => {
        $(pub mod $module;)*

        /// The built-in allocators.
        pub const ENTRIES: &[Entry] = &[$($module::ENTRY,)*];
    };
}

// One line per allocator: the file of that name, with its `ENTRY`.
allocators! {
    uniform,
    pyramid,
    adakv,
    variance,
}
