//! Allocators: how many entries each layer and each KV head may keep.
//!
//! *Helps* where heads or layers differ in how far they spread their attention. *Hurts* when scores of
//! different heads are not comparable (key norms, counts), and where all heads must stay equally long
//! (renumbered positions): then only `uniform` serves.

mod shares;

use super::registry::Entry;
use super::{LayerScores, TargetRequest};
use crate::backend::Backend;
use crate::error::{PolicyError, ProfileError};
use crate::geometry::ModelShape;
use crate::profile::Profile;
use std::fmt::Debug;
use std::sync::Arc;

/// The entries of one layer that an allocator divides among its KV heads.
#[derive(Clone, Copy, Debug)]
pub struct HeadRequest<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Entries each KV head is to keep, on average over the layer's heads; `usize::MAX` where there is no budget.
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

/// What a KV head keeps that only ever looks at the two ends of its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// First entries.
    pub sinks: usize,
    /// Last entries.
    pub recent: usize,
}

/// Divides a budget among layers, and a layer's part among its KV heads.
pub trait Allocator: Debug + Send + Sync {
    /// Its registry name.
    fn name(&self) -> &str;

    /// Whether all KV heads of all layers always keep equally many entries.
    fn equal_counts(&self) -> bool;

    /// The part of a profile that it goes by and does not have yet; see [`Allocator::bind`].
    fn lacks(&self) -> Option<&'static str> {
        None
    }

    /// The same allocator with its numbers out of a profile, which fits the model; `None` if it needs none.
    ///
    /// # Errors
    /// [`ProfileError`] for what is missing, or of other extents than the model's.
    fn bind(
        &self,
        _profile: &Profile,
        _shape: &ModelShape,
    ) -> Result<Option<Arc<dyn Allocator>>, ProfileError> {
        Ok(None)
    }

    /// What a KV head keeps whatever the scores, if its class says so: these entries and no others.
    fn ends(&self, _layer: usize, _head: usize) -> Option<Ends> {
        None
    }

    /// Whether there is nothing to divide without a budget. An allocator whose [`Allocator::ends`] free memory alone needs none.
    fn needs_budget(&self) -> bool {
        true
    }

    /// Numbers that layer budgets go by, made of a layer's scores without its protected entries. None by default.
    fn measure(&self) -> Option<fn(&LayerScores) -> Vec<f32>> {
        None
    }

    /// Entries per KV head for each of `request.layers`; their sum is `target · layers`.
    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        vec![request.target; request.layers.len()]
    }

    /// Entries each KV head keeps: at least its protected ones, at most its stored ones, and
    /// `H · target` in all at most. A head with [`Allocator::ends`] keeps its protected ones.
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
    duo,
    compress_error,
    headkv,
    global,
}
