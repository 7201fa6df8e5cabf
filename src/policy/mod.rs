//! Policies: which entries stay. A method of the literature is a tuple of small parts (scorer, allocator,
//! selection, schedule); [`Staged`] joins them, and [`Policy`] is the larger door for what
//! does not fit.
//!
//! *Helps* because a policy is pure: it reads a [`LayerView`] and returns a [`LayerPlan`]; the cache applies
//! it. So every policy runs on every backend and can be tested without one. *Hurts* a policy that wants to
//! see all layers at once: it must plan from per-layer targets.
//!
//! Two doors: implement [`Scorer`] (one function; most methods) or [`Policy`] (anything that returns a plan).
//! `docs/adding-a-policy.md` walks through it.

pub mod allocate;
pub mod registry;
pub mod schedule;
pub mod score;
pub mod select;
mod staged;
pub mod whole;

pub use allocate::Allocator;
pub use staged::Staged;

use crate::backend::Backend;
use crate::columns::{ColumnLayout, ColumnSpec, ColumnsMut};
use crate::device::HeadRows;
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::{LayerShape, ModelShape, Position};
use crate::plan::LayerPlan;
use crate::profile::Profile;
use std::fmt::Debug;
use std::sync::Arc;

/// What a policy must be fed while tokens arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The last `queries` query rows of every layer are recorded (post-RoPE, all query heads).
    pub queries: usize,
    /// What [`Policy::observe`] receives after each step.
    pub feed: FeedKind,
    /// What [`Policy::rate`] is given of every new token, beside q, k and v.
    pub side: SideKind,
    /// The context must be replayed ([`crate::KvCache::replay`]) before it is compressed.
    pub replay: bool,
}

/// What a policy wants to know of a token when it arrives, beside its rotated query, key and value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SideKind {
    /// Nothing.
    #[default]
    None,
    /// Query and key before their rotary embedding. The host may hand them over ([`crate::Step::side_input`]); otherwise the
    /// cache turns back what it was given, which takes a description of the embedding
    /// ([`LayerShape::rotary`]).
    PreRope,
    /// The hidden state that the layer's projections are made of, after its norm. Only the host has it: it must call
    /// [`crate::Step::side_input`] for every layer that takes part.
    Hidden,
}

/// New tokens of one layer, as a scorer that judges on arrival sees them.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Its geometry.
    pub shape: &'a LayerShape,
    /// One row per token. [`SideKind::PreRope`]: the query of every query head, the key of every KV head, both before rotation,
    /// then the value of every KV head. [`SideKind::Hidden`]: the hidden state.
    pub rows: &'a [f32],
    /// Numbers in a row.
    pub width: usize,
    /// Where kernels run.
    pub backend: &'a dyn Backend,
}

impl NewTokens<'_> {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.rows.len().checked_div(self.width).unwrap_or(0)
    }
}

/// What the attend path hands to [`Policy::observe`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FeedKind {
    /// Nothing.
    #[default]
    None,
    /// Once per step: attention mass summed over the step's queries.
    Mass,
    /// Once per query row, oldest first, for the last `last` rows of each step.
    Rows {
        /// How many of a step's last rows are fed.
        last: usize,
    },
}

/// Attention that a run of consecutive entries (one page) of one KV head received.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    /// Positions of the entries.
    pub positions: &'a [i32],
    /// Positions of the queries that are summed, ascending (one for [`FeedKind::Rows`]).
    pub queries: &'a [i32],
    /// Entries of the whole KV head, this page among them.
    pub head_rows: usize,
    /// Weights of all entries of the KV head, `[G, head_rows]`.
    pub weights: &'a [f32],
    /// Slot of this page's first entry.
    pub first: usize,
    /// Sliding window of the layer, if any.
    pub window: Option<u32>,
    /// Entries of the whole KV head that the last of the queries sees; [`seen_by`] counts them.
    pub seen: usize,
}

/// How many entries of a KV head a query at `query` sees in a layer with this sliding window.
pub fn seen_by(head: &HeadRows, query: i32, window: Option<u32>) -> usize {
    let oldest = window.map_or(i64::MIN, |w| i64::from(query) - i64::from(w) + 1);
    head.pages()
        .map(|page| {
            let positions = page.positions();
            let start = positions.partition_point(|&p| i64::from(p) < oldest);
            positions.partition_point(|&p| p <= query).saturating_sub(start)
        })
        .sum()
}

impl Feed<'_> {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.weights.len().checked_div(self.head_rows).unwrap_or(0)
    }

    /// Weights of this run of entries from query head `g` of the group.
    pub fn weights(&self, g: usize) -> &[f32] {
        let start = g * self.head_rows + self.first;
        &self.weights[start..start + self.positions.len()]
    }

    /// How many of the queries see entry `i` of this run.
    pub fn visits(&self, i: usize) -> usize {
        let entry = i64::from(self.positions[i]);
        let end = self.window.map_or(i64::MAX, |w| entry + i64::from(w));
        let first = self.queries.partition_point(|&q| i64::from(q) < entry);
        self.queries.partition_point(|&q| i64::from(q) < end) - first
    }

    /// Whether query `query` sees entry `i` of this run.
    pub fn sees(&self, query: i32, i: usize) -> bool {
        let age = i64::from(query) - i64::from(self.positions[i]);
        age >= 0 && self.window.is_none_or(|w| age < i64::from(w))
    }
}

/// The last recorded queries of a layer.
#[derive(Clone, Copy, Debug)]
pub struct QueryWindow<'a> {
    /// `[Hq, W, d_k]`, oldest first, rotated as the keys are.
    pub rows: &'a [f32],
    /// Their `W` positions.
    pub positions: &'a [i32],
}

/// What a policy sees of one layer of one sequence. Reading keys, values and weights goes through kernels of
/// [`LayerView::backend`], so that the same policy runs wherever the pages live.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Its geometry.
    pub shape: &'a LayerShape,
    /// Its KV heads; positions ascend within each.
    pub heads: &'a [HeadRows],
    /// Position the next token will get.
    pub next: Position,
    /// Entries each KV head of this layer is to keep on average; `usize::MAX` where there is no budget.
    pub target: usize,
    /// Recorded queries: at most [`Needs::queries`], fewer if fewer tokens were seen.
    pub queries: QueryWindow<'a>,
    /// Layout of the declared columns.
    pub columns: &'a ColumnLayout,
    /// What the last plan of this layer that was applied wanted remembered; empty before.
    pub remembered: &'a [f32],
    /// Where the pages live and kernels run.
    pub backend: &'a dyn Backend,
}

impl LayerView<'_> {
    /// Entries of each KV head.
    pub fn lengths(&self) -> Vec<usize> {
        self.heads.iter().map(HeadRows::rows).collect()
    }

    /// Positions of one KV head's entries.
    pub fn positions(&self, head: usize) -> impl Iterator<Item = i32> + '_ {
        self.heads[head].pages().flat_map(|p| p.positions().iter().copied())
    }

    /// One word of a column as `f32` for all entries, head after head; `None` if there is no such column.
    pub fn column_f32(&self, name: &str) -> Option<Vec<f32>> {
        let (word, _) = self.columns.find(name)?;
        let width = self.columns.words();
        let mut out = Vec::with_capacity(self.heads.iter().map(HeadRows::rows).sum());
        for page in self.heads.iter().flat_map(HeadRows::pages) {
            out.extend((0..page.rows).map(|i| f32::from_bits(page.page.columns[i * width + word])));
        }
        Some(out)
    }

    /// All words of a column for all entries, `[entries, words]`, head after head.
    pub fn column_words(&self, name: &str) -> Option<Vec<u32>> {
        let (word, words) = self.columns.find(name)?;
        let width = self.columns.words();
        let mut out = Vec::new();
        for page in self.heads.iter().flat_map(HeadRows::pages) {
            for i in 0..page.rows {
                out.extend_from_slice(&page.page.columns[i * width + word..i * width + word + words]);
            }
        }
        Some(out)
    }
}

/// One score per entry, KV head after KV head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerScores {
    /// Entries of each KV head.
    pub lengths: Vec<usize>,
    /// `Σ lengths` scores; higher is kept.
    pub values: Vec<f32>,
}

impl LayerScores {
    /// The scores of one KV head.
    pub fn head(&self, head: usize) -> &[f32] {
        let start: usize = self.lengths[..head].iter().sum();
        &self.values[start..start + self.lengths[head]]
    }
}

/// The small door: one score per entry.
pub trait Scorer: Debug + Send + Sync {
    /// What must be recorded.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Columns it keeps per entry.
    fn columns(&self) -> Vec<ColumnSpec> {
        Vec::new()
    }

    /// Updates its columns after a committed step; called as [`Needs::feed`] says, page by page.
    fn observe(&self, _feed: &Feed<'_>, _columns: &mut ColumnsMut<'_>) {}

    /// The part of a profile that it goes by and does not have yet; it can neither rate nor score before
    /// [`Scorer::bind`].
    fn lacks(&self) -> Option<&'static str> {
        None
    }

    /// The same scorer with its numbers out of a profile, which fits the model; `None` if it needs none.
    ///
    /// # Errors
    /// [`ProfileError`] for what is missing, or of other extents than the model's.
    fn bind(&self, _profile: &Profile, _shape: &ModelShape) -> Result<Option<Arc<dyn Scorer>>, ProfileError> {
        Ok(None)
    }

    /// Judges new tokens by their side inputs, once; what it says lies in the column [`RATED`](crate::columns::RATED) from
    /// the step's commit on. `out` is `[tokens, H]`; `scratch` is memory that is lent and stays. Called where [`Needs::side`] asks for side inputs.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn rate(
        &self,
        _tokens: &NewTokens<'_>,
        _scratch: &mut Vec<f32>,
        _out: &mut [f32],
    ) -> Result<(), PolicyError> {
        Ok(())
    }

    /// A score below which an entry leaves as soon as nothing protects it, whatever the budget; the budget is then optional, and
    /// limits what is above. None by default.
    fn threshold(&self) -> Option<f32> {
        None
    }

    /// Entries it wants protected at each end when a KV head is to keep `target`: `(sinks, recent)`. A
    /// recipe can ask for more, never for less.
    fn protect(&self, _target: usize) -> (usize, usize) {
        (0, 0)
    }

    /// How much each entry matters; higher is kept.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError>;
}

/// What an allocator of layer budgets is asked.
#[derive(Clone, Debug)]
pub struct TargetRequest<'a> {
    /// Layers that take part (they own storage and have no sliding window), by index.
    pub layers: &'a [usize],
    /// Entries per KV head in each of them now (the mean over its heads).
    pub rows: &'a [usize],
    /// Entries each KV head is to keep, on average over all of them.
    pub target: usize,
    /// Of these, entries protected as recent.
    pub recent: usize,
    /// What [`Policy::measure`] gave for each of these layers; empty if nothing was measured.
    pub measures: &'a [Vec<f32>],
}

/// The large door: anything that returns a plan.
pub trait Policy: Debug + Send + Sync {
    /// The name used in reports and errors.
    fn name(&self) -> &str;

    /// What must be recorded.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// Columns it keeps per entry.
    fn columns(&self) -> Vec<ColumnSpec> {
        Vec::new()
    }

    /// Updates its columns after a committed step; called as [`Needs::feed`] says, page by page.
    fn observe(&self, _feed: &Feed<'_>, _columns: &mut ColumnsMut<'_>) {}

    /// The part of a profile that it goes by and does not have yet; it cannot plan before
    /// [`Policy::bind`].
    fn lacks(&self) -> Option<&'static str> {
        None
    }

    /// The same policy with its numbers out of a profile, which fits the model; `None` if it needs none.
    ///
    /// # Errors
    /// [`ProfileError`] for what is missing, or of other extents than the model's.
    fn bind(&self, _profile: &Profile, _shape: &ModelShape) -> Result<Option<Arc<dyn Policy>>, ProfileError> {
        Ok(None)
    }

    /// Judges new tokens by their side inputs, once; what it says lies in the column [`RATED`](crate::columns::RATED) from
    /// the step's commit on. `out` is `[tokens, H]`; `scratch` is memory that is lent and stays. Called where [`Needs::side`] asks for side inputs.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn rate(
        &self,
        _tokens: &NewTokens<'_>,
        _scratch: &mut Vec<f32>,
        _out: &mut [f32],
    ) -> Result<(), PolicyError> {
        Ok(())
    }

    /// Whether it ever drops anything.
    fn compresses(&self) -> bool {
        true
    }

    /// Whether a KV head's entries all stay where the cache has no budget: their pages then lie as storage that stays does.
    fn stays(&self, _layer: usize, _head: usize) -> bool {
        !self.compresses()
    }

    /// Whether it must be told how much to keep. A policy that need not be is given `usize::MAX` as the target where the
    /// cache has no budget.
    fn needs_budget(&self) -> bool {
        self.compresses()
    }

    /// Whether it works for this model. Called before anything runs.
    ///
    /// # Errors
    /// [`RecipeError::Conflict`] names the option to change.
    fn check(&self, _shape: &ModelShape) -> Result<(), RecipeError> {
        Ok(())
    }

    /// Whether all KV heads of all layers always keep equally many entries, which renumbering needs.
    fn equal_counts(&self) -> bool;

    /// Entries protected at each end whatever the budget: `(sinks, recent)`.
    fn protected(&self) -> (usize, usize) {
        (0, 0)
    }

    /// Whether [`Policy::layer_targets`] goes by what [`Policy::measure`] says.
    fn measures(&self) -> bool {
        false
    }

    /// Numbers that [`Policy::layer_targets`] goes by, measured before the first compression; asked for where
    /// [`Policy::measures`] says so. None by default.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn measure(&self, _view: &LayerView<'_>) -> Result<Option<Vec<f32>>, PolicyError> {
        Ok(None)
    }

    /// Entries per KV head (mean over heads) each layer is to keep; sums to about
    /// `target * layers`. One per `request.layers`.
    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        vec![request.target; request.layers.len()]
    }

    /// The plan of one layer, keeping `view.target` entries per KV head on average.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn plan(&self, view: &LayerView<'_>) -> Result<LayerPlan, PolicyError>;

    /// The scores behind the plan, where the policy has any.
    ///
    /// # Errors
    /// [`PolicyError`].
    fn scores(&self, _view: &LayerView<'_>) -> Result<Option<LayerScores>, PolicyError> {
        Ok(None)
    }
}
