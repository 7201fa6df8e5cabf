//! The cache a host engine holds: sequences of stored keys and values, attended, compressed and measured
//! behind one interface.
//!
//! *Helps* an engine replace "append to my tensors, then my attention" by one call per layer, and get a
//! bounded memory, rollback, forks and every policy with it. *Hurts* where an engine insists on its own
//! storage: then only [`KvCache::select`] and [`KvCache::gather`] are of use.
//!
//! A cache has no locks and no global state: one thread calls it at a time, kernels spread over the
//! backend's threads.

mod builder;
mod compose;
mod compress;
mod constant;
mod factored;
mod guard;
#[cfg(feature = "learned")]
mod learned;
mod ops;
mod read;
mod replay;
mod scratch;
mod sequence;
mod side;
mod stats;
mod step;
#[cfg(test)]
mod tests;

pub use builder::{CacheBuilder, RecipeSource};
pub use guard::{Guard, GuardReport, HeadReport};
#[cfg(feature = "learned")]
pub use learned::{CartridgePositions, LoadOptions};
pub use ops::{RemoveMode, Selection};
pub use read::{READ_TOKENS, ReadReport};
pub use replay::Replay;
pub use sequence::SequenceId;
pub use side::SideInput;
pub use stats::{EffectiveConfig, LayerStats, SequenceStats};
pub use step::{PartialWorkspace, SPECULATIVE_TOKENS, Step};

use crate::backend::Backend;
use crate::columns::ColumnLayout;
use crate::device::page::{HeadRows, PageRef};
use crate::error::{CacheError, Error};
use crate::geometry::{ModelShape, Position, RowCount, Slot};
use crate::index::{Codebooks, LayerIndex, TableStorage};
use crate::policy::{FeedKind, SideKind};
use crate::recipe::{Budget, Recipe};
use crate::store::{self, Storage};
use scratch::{Pending, Scratch};
use sequence::{LayerCounters, LayerReads, QueryLog, Sequence, Watched};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use step::Lane;

/// Keys and values of any number of sequences of one model, kept as a recipe says.
///
/// ```
/// use kvsieve::{KvCache, Budget, geometry::{LayerShape, ModelShape}, view::{TensorView, TensorViewMut}};
///
/// let shape = ModelShape::uniform(2, LayerShape::new(4, 2, 8))?; // 2 layers, Hq 4, H 2, d 8
/// let mut cache = KvCache::builder(shape).recipe("streaming").budget(Budget::Tokens(64)).build()?;
/// let sequence = cache.create_sequence();
/// let (q, k, v) = (vec![0.1; 3 * 4 * 8], vec![0.2; 3 * 2 * 8], vec![0.3; 3 * 2 * 8]);
/// let mut out = vec![0.0; 3 * 4 * 8];
/// let mut step = cache.begin(sequence, 3)?; // three new tokens
/// for layer in 0..2 {
///     step.attend(
///         layer,
///         TensorView::token_major(&q[..], 3, 4, 8)?,
///         TensorView::token_major(&k[..], 3, 2, 8)?,
///         TensorView::token_major(&v[..], 3, 2, 8)?,
///         TensorViewMut::token_major(&mut out[..], 3, 4, 8)?,
///     )?;
/// }
/// step.commit(3)?;
/// assert!((out[0] - 0.3).abs() < 1e-6);
/// assert_eq!(cache.next_position(sequence)?.0, 3);
/// # Ok::<(), kvsieve::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    pub(crate) shape: Arc<ModelShape>,
    pub(crate) recipe: Recipe,
    pub(crate) budget: Option<Budget>,
    pub(crate) backend: Arc<dyn Backend>,
    /// Per layer, per KV head.
    pub(crate) storage: Vec<Vec<Storage>>,
    /// Per layer: of the index's tables.
    pub(crate) tables: Vec<Vec<TableStorage>>,
    /// Per layer, per KV head: learned entries that every query sees; no heads where a layer has none.
    pub(crate) constant: Vec<Vec<HeadRows>>,
    /// Entries per page of exact entries.
    pub(crate) page_entries: usize,
    pub(crate) columns: ColumnLayout,
    /// What sequences need not learn.
    pub(crate) codebooks: Codebooks,
    /// The policy's needs, asked once.
    needs: crate::policy::Needs,
    sequences: BTreeMap<u64, Sequence>,
    next_id: u64,
    scratch: Scratch,
}

impl KvCache {
    /// Starts building a cache for a model.
    pub fn builder(shape: ModelShape) -> CacheBuilder {
        CacheBuilder::new(shape)
    }

    /// The model's geometry.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The recipe in force.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The budget in force.
    pub fn budget(&self) -> Option<Budget> {
        self.budget
    }

    /// Where pages live and kernels run.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// A new, empty sequence. It takes no memory until tokens come.
    pub fn create_sequence(&mut self) -> SequenceId {
        let layers = self.shape.layers();
        let heads = |l: usize| if self.shape.owner(l) == l { self.shape.layer(l).kv_heads } else { 0 };
        self.insert(Sequence {
            layers: (0..layers).map(|l| vec![Default::default(); heads(l)]).collect(),
            thresholds: None,
            reads: (0..layers).map(|l| self.new_reads(l)).collect(),
            queries: self.shape.iter().map(QueryLog::new).collect(),
            counters: vec![LayerCounters::default(); layers],
            measures: Vec::new(),
            remembered: vec![Vec::new(); layers],
            next: 0,
            learned: 0,
            prompt_tokens: 0,
            prefill_open: true,
            since: 0,
            compacted: None,
            watched: Watched::default(),
            low_rank: Vec::new(),
            factor_at: Vec::new(),
        })
    }

    /// What reading of a layer needs: an index where the recipe has one and the layer takes part.
    fn new_reads(&self, layer: usize) -> LayerReads {
        let indexed = self.recipe.index.as_ref().filter(|_| self.participates(layer));
        let indexed = indexed.filter(|index| layer >= index.rule.dense);
        let index = indexed.map(|index| {
            let kv_heads = self.shape.layer(layer).kv_heads;
            LayerIndex::new(index, kv_heads).with_books(self.codebooks.layer(layer))
        });
        let rebuilt = self.new_rebuilt(layer);
        LayerReads { index, rebuilt, ..LayerReads::default() }
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = self.next_id;
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        SequenceId(id)
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence, CacheError> {
        self.sequences.get(&id.0).ok_or(CacheError::NoSequence(id.0))
    }

    fn sequence_mut(&mut self, id: SequenceId) -> Result<&mut Sequence, CacheError> {
        self.sequences.get_mut(&id.0).ok_or(CacheError::NoSequence(id.0))
    }

    /// The sequences there are.
    pub fn sequences(&self) -> impl Iterator<Item = SequenceId> + '_ {
        self.sequences.keys().map(|&id| SequenceId(id))
    }

    /// The position the next token of a sequence gets: what the host's rotary embedding must use. It is not
    /// a number of stored entries.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn next_position(&self, id: SequenceId) -> Result<Position, CacheError> {
        Ok(Position(self.sequence(id)?.next))
    }

    /// Entries stored for each KV head of a layer.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`].
    pub fn stored(&self, id: SequenceId, layer: usize) -> Result<Vec<RowCount>, CacheError> {
        Ok(self.heads(id, layer)?.iter().map(|h| h.row_count()).collect())
    }

    /// Positions stored for one KV head of a layer, ascending.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`]; [`CacheError::Length`] for a head that is not.
    pub fn positions(&self, id: SequenceId, layer: usize, head: usize) -> Result<Vec<Position>, CacheError> {
        let rows = self.head(id, layer, head)?;
        Ok(rows.pages().flat_map(|p| p.positions().iter().map(|&p| Position(p))).collect())
    }

    /// The log-mass bias β of every entry of one KV head, as [`KvCache::positions`] lists them: what a host with its own
    /// attention adds to the logit. 0 but for entries into which others were merged.
    ///
    /// # Errors
    /// As [`KvCache::positions`].
    pub fn biases(&self, id: SequenceId, layer: usize, head: usize) -> Result<Vec<f32>, CacheError> {
        let rows = self.head(id, layer, head)?;
        let of = |page: PageRef<'_>| page.bias().map_or_else(|| vec![0.0; page.rows], <[f32]>::to_vec);
        Ok(rows.pages().flat_map(of).collect())
    }

    /// The lowest and the highest position that every entry of one KV head speaks for, as [`KvCache::positions`] lists
    /// them: its own twice, but for entries into which others were merged.
    ///
    /// # Errors
    /// As [`KvCache::positions`].
    pub fn extents(
        &self,
        id: SequenceId,
        layer: usize,
        head: usize,
    ) -> Result<Vec<(Position, Position)>, CacheError> {
        let extents = store::extents(self.head(id, layer, head)?, &self.columns);
        Ok(extents.map(|(_, extent)| (Position(extent.first), Position(extent.last))).collect())
    }

    /// One KV head of a layer.
    fn head(&self, id: SequenceId, layer: usize, head: usize) -> Result<&HeadRows, CacheError> {
        let heads = self.heads(id, layer)?;
        heads.get(head).ok_or(CacheError::Length { buffer: "KV head", got: head, want: heads.len() })
    }

    /// What the last decode step read of a layer, by index or whole; `None` before the first, and for recipes without
    /// an index.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`].
    pub fn last_read(&self, id: SequenceId, layer: usize) -> Result<Option<ReadReport>, CacheError> {
        self.heads(id, layer)?;
        Ok(self.sequence(id)?.reads[layer].report)
    }

    /// The units of one KV head of a layer: the slots of each one's entries. Empty where there is no index.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`]; [`CacheError::Length`] for a head that is not.
    pub fn units(&self, id: SequenceId, layer: usize, head: usize) -> Result<Vec<Vec<Slot>>, CacheError> {
        let heads = self.heads(id, layer)?.len();
        if head >= heads {
            return Err(CacheError::Length { buffer: "KV head", got: head, want: heads });
        }
        let index = &self.sequence(id)?.reads[self.shape.owner(layer)].index;
        Ok(index.as_ref().map_or_else(Vec::new, |index| {
            let head = &index.heads()[head];
            (0..head.units()).map(|unit| head.members(unit).map(|slot| Slot(slot as u32)).collect()).collect()
        }))
    }

    /// The groups of one KV head's units, where an index has a level above them: runs of units.
    ///
    /// # Errors
    /// As [`KvCache::units`].
    pub fn unit_groups(
        &self,
        id: SequenceId,
        layer: usize,
        head: usize,
    ) -> Result<Vec<Range<usize>>, CacheError> {
        self.units(id, layer, head)?;
        let index = &self.sequence(id)?.reads[self.shape.owner(layer)].index;
        Ok(index.as_ref().map_or_else(Vec::new, |index| {
            let head = &index.heads()[head];
            (0..head.groups()).map(|group| head.group(group)).collect()
        }))
    }

    /// The codebooks that a sequence learnt or was given, where the recipe has an index of codes: for
    /// [`CacheBuilder::codebooks`].
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn codebooks(&self, id: SequenceId) -> Result<Codebooks, CacheError> {
        let reads = self.sequence(id)?.reads.iter();
        let books =
            reads.map(|reads| reads.index.as_ref().map_or_else(Vec::new, |index| index.books().to_vec()));
        Ok(Codebooks { layers: books.collect() })
    }

    /// The rows a layer reads.
    fn heads(&self, id: SequenceId, layer: usize) -> Result<&[HeadRows], CacheError> {
        let layers = self.shape.layers();
        if layer >= layers {
            return Err(CacheError::NoLayer { layer, layers });
        }
        Ok(&self.sequence(id)?.layers[self.shape.owner(layer)])
    }

    /// Begins a step of `tokens` new tokens. Their positions are assigned here, once, for all layers.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`]; [`CacheError::PositionOverflow`]; 0 tokens. A compaction that is due
    /// because the prompt turned out to be complete can fail as [`Step::commit`] does.
    pub fn begin(&mut self, id: SequenceId, tokens: usize) -> Result<Step<'_>, Error> {
        self.begin_batch(&[(id, tokens)])
    }

    /// Begins a step of several sequences at once (continuous batching): lane `i` brings `batch[i].1` tokens
    /// of sequence `batch[i].0`, following lane `i − 1` in the host's tensors.
    ///
    /// # Errors
    /// As [`KvCache::begin`]; [`CacheError::DuplicateSequence`].
    pub fn begin_batch(&mut self, batch: &[(SequenceId, usize)]) -> Result<Step<'_>, Error> {
        self.check_batch(batch)?;
        // The first single token after a prompt says that the prompt is complete.
        for &(id, tokens) in batch {
            let sequence = self.sequence(id)?;
            if tokens == 1 && sequence.prefill_open && sequence.next > 1 {
                self.end_prefill(id)?;
            }
        }
        self.begin_open(batch)
    }

    fn check_batch(&self, batch: &[(SequenceId, usize)]) -> Result<(), Error> {
        if batch.is_empty() || batch.iter().any(|&(_, tokens)| tokens == 0) {
            return Err(CacheError::Unsupported {
                what: "begin",
                why: "a step without tokens".to_owned(),
                change: "give every lane at least one token",
            }
            .into());
        }
        for (i, &(id, tokens)) in batch.iter().enumerate() {
            if batch[..i].iter().any(|&(other, _)| other == id) {
                return Err(CacheError::DuplicateSequence(id.0).into());
            }
            let next = self.sequence(id)?.next;
            if i32::try_from(tokens).ok().and_then(|t| next.checked_add(t)).is_none() {
                return Err(CacheError::PositionOverflow { next, new: tokens }.into());
            }
        }
        Ok(())
    }

    /// Begins a step of lanes that were checked, which ends no prompt.
    fn begin_open(&mut self, batch: &[(SequenceId, usize)]) -> Result<Step<'_>, Error> {
        let log_rows = self.log_rows();
        self.scratch.lanes.clear();
        self.scratch.positions.clear();
        let scratch = &mut self.scratch;
        scratch.pending.resize_with(self.shape.layers(), Pending::default);
        for pending in &mut scratch.pending {
            pending.appended = false;
            pending.attended = false;
            pending.rated.clear();
        }
        scratch.side.begin();
        let mut offset = 0;
        for &(id, tokens) in batch {
            let sequence = self.sequence(id)?;
            let (start, records) = (sequence.next, self.records(sequence));
            let logged = match (records, tokens <= SPECULATIVE_TOKENS) {
                (false, _) => 0,
                (true, true) => tokens,
                (true, false) => tokens.min(log_rows),
            };
            self.scratch.positions.extend((0..tokens as i32).map(|i| start + i));
            self.scratch.lanes.push(Lane { id: id.0, tokens, offset, start, logged, records });
            offset += tokens;
        }
        self.scratch.recording = self.scratch.lanes.iter().any(|l| l.records);
        Ok(Step { cache: self, tokens: offset, done: false })
    }

    /// Query rows of a long step that commit needs.
    fn log_rows(&self) -> usize {
        match self.needs.feed {
            FeedKind::Rows { last } => self.needs.queries.max(last),
            FeedKind::None | FeedKind::Mass => self.needs.queries,
        }
    }

    /// Whether the recipe looks at queries or weights at all.
    fn scores_tokens(&self) -> bool {
        self.needs.queries > 0 || self.needs.feed != FeedKind::None
    }

    /// Whether a layer takes part in the policy: it owns its storage and has no sliding window (entries
    /// that leave a window can never be seen again, so there is nothing to choose).
    fn participates(&self, layer: usize) -> bool {
        let shape = self.shape.layer(layer);
        shape.shared_with.is_none() && shape.window.is_none()
    }

    /// What a layer feeds to the policy.
    fn fed(&self, layer: usize) -> FeedKind {
        if self.scratch.recording && self.participates(layer) { self.needs.feed } else { FeedKind::None }
    }

    /// Whether the policy judges a layer's tokens when they arrive.
    fn rates(&self, layer: usize) -> bool {
        self.needs.side != SideKind::None && self.participates(layer)
    }

    fn logs_queries(&self, layer: usize) -> bool {
        self.scratch.recording && self.participates(layer) && self.scores_tokens()
    }

    /// Whether the schedule can still look at what a sequence's tokens do, or its index has yet to learn from it: a recipe
    /// that compresses only at the end of the prompt records nothing afterwards.
    fn records(&self, sequence: &Sequence) -> bool {
        let schedule = self.recipe.schedule;
        let learns = || {
            self.recipe.index.as_ref().is_some_and(|index| index.summary.queries() > 0)
                && sequence.reads.iter().filter_map(|reads| reads.index.as_ref()).any(LayerIndex::unlearnt)
        };
        self.scores_tokens()
            && (sequence.prefill_open
                || schedule.chunk
                || schedule.every.is_some()
                || schedule.over.is_some()
                || learns())
    }

    /// Frees the buffers that steps reuse; the next step allocates them again.
    pub fn shrink_scratch(&mut self) {
        self.scratch = Scratch::default();
    }
}
