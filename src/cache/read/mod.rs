//! A decode step that reads what an index chose: score the units, choose, attend over the chosen entries and those that
//! are always read, estimate the rest, and say what share of the softmax was not read.
//!
//! *Helps* because every index goes this one way, on every backend: through `dot_scores` or `code_scores`, `attend` with
//! spans, `weigh_values` and `merge_partials`. *Hurts* by several kernel calls where reading everything is one; so a short context
//! is read whole.

mod calibrate;
mod parts;
mod reader;
mod refine;
mod tail;

use super::KvCache;
use super::factored::{self, FactoredScratch};
use super::ops::Selection;
use super::sequence::{Rebuilt, Sequence, SequenceId};
use super::step::Lane;
use crate::device::HeadRows;
use crate::error::{CacheError, Error, KernelError};
use crate::index::choose::Ranking;
use crate::index::{Growth, IndexPart, LayerIndex, Retrieval};
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::attend_factored::Remembered;
use crate::kernel::{AttentionParams, Spans, total_rows};
use crate::recipe::Budget;
use crate::store;
use crate::view::{Dims, TensorView};
use parts::Part;
use reader::Reader;
use refine::Refined;

/// Steps of at most this many tokens read by index; longer ones are prompts and read everything.
pub const READ_TOKENS: usize = 8;

/// What a decode step read of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReadReport {
    /// Entries read, over all KV heads.
    pub entries: usize,
    /// Entries there were.
    pub stored: usize,
    /// Units chosen, or entries where these are chosen out of units, over all KV heads; 0 where everything was read.
    pub units: usize,
    /// Bytes read: entries, and rows of the index.
    pub bytes: usize,
    /// Share of the softmax mass on entries that were not read, as the index estimates it, on average over query heads
    /// and tokens. `None` if its summaries say nothing of it.
    pub missing: Option<f32>,
    /// A share that the same never exceeds, in any query head: from bounds, where the index has them and the choice is
    /// this step's own.
    pub missing_at_most: Option<f32>,
}

/// What an earlier step, or another layer, chose: see [`crate::index::HeadUnits::picks`].
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Per KV head, ascending.
    pub(super) units: Vec<Vec<u32>>,
    /// How many there were.
    pub(super) of: Vec<usize>,
    /// Steps since.
    pub(super) age: usize,
}

impl Clone for Held {
    fn clone(&self) -> Self {
        Self { units: self.units.clone(), of: self.of.clone(), age: self.age }
    }

    /// Into the memory that is there: every step does it.
    fn clone_from(&mut self, from: &Self) {
        self.units.clone_from(&from.units);
        self.of.clone_from(&from.of);
        self.age = from.age;
    }
}

impl Held {
    /// Whether the choice is good for this index: no KV head's has grown or shrunk since.
    pub(super) fn fits(&self, index: &LayerIndex) -> bool {
        let picks = index.heads().iter().map(|head| head.picks());
        self.of.len() == picks.len() && self.of.iter().copied().eq(picks)
    }
}

/// Buffers that steps reuse.
#[derive(Debug, Default)]
pub(super) struct ReadScratch {
    parts: Vec<Part>,
    /// What is chosen, by KV head.
    pub(super) chosen: Held,
    reports: Vec<Result<ReadReport, KernelError>>,
    /// Lent by the sequence while a layer of it is read.
    rebuilt: Vec<Remembered>,
    factored: FactoredScratch,
}

impl ReadScratch {
    /// Takes made keys of the KV heads of the layer that is read next.
    pub(super) fn lend(&mut self, rebuilt: Rebuilt, heads: usize) {
        self.rebuilt = rebuilt.0;
        self.rebuilt.resize_with(heads, Remembered::default);
    }
}

/// Those of some KV heads that go through a step together.
#[derive(Debug, Default)]
struct PartScratch {
    rankings: Vec<Ranking>,
    bounds: Vec<Ranking>,
    queries: Vec<f32>,
    logits: Vec<f32>,
    spans: Vec<Spans>,
    /// By KV head.
    slots: Vec<Vec<u64>>,
    /// Units taken now, by KV head.
    fresh: Vec<Vec<u32>>,
    /// What is chosen, by KV head.
    chosen: Vec<Vec<u32>>,
    outs: Vec<f32>,
    lses: Vec<f32>,
    zone: Vec<f32>,
    /// Per row: variances of its logits within units, and what logits on means are to be raised by for it.
    variances: Vec<f32>,
    corrections: Vec<f32>,
    /// Units in groups that were looked into, by KV head, and which of those are chosen, both ascending: where only they
    /// are ranked, the latter as the ranking counts them.
    looked: Vec<Vec<u32>>,
    taken: Vec<Vec<u32>>,
    /// Entries of the heaviest units, by KV head, where these have codes within.
    refined: Vec<Refined>,
    /// Logits from codes.
    scores: Vec<f32>,
    /// Per row: a share of the mass.
    shares: Vec<f64>,
    /// Weights of units that the tail covers, by KV head and row, and what they are relative to.
    weights: Vec<f32>,
    references: Vec<f32>,
    /// Whether the rankings are this step's.
    ranked: bool,
    /// Made keys of low rank, by KV head.
    rebuilt: Vec<Remembered>,
    factored: FactoredScratch,
}

/// How a lane's attention of a layer goes.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Over everything stored.
    Whole,
    /// Over what the index chooses, so many entries of each KV head; or over what this layer chose before.
    Chosen { budget: usize, held: Option<usize> },
}

impl KvCache {
    /// The attention of every lane on a layer, from scratch to scratch, where the recipe has an index.
    ///
    /// # Errors
    /// A kernel's error.
    pub(super) fn read_layer(&mut self, layer: usize) -> Result<(), Error> {
        let Some(retrieval) = self.recipe.index.clone() else { return Ok(()) };
        let (shape, owner) = (self.shape.layer(layer), self.shape.owner(layer));
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        for lane in 0..self.scratch.lanes.len() {
            let lane = self.scratch.lanes[lane];
            // Lent for as long as the layer is read: they are written while everything else is read.
            let Some(sequence) = self.sequences.get_mut(&lane.id) else { continue };
            self.scratch.read.lend(std::mem::take(&mut sequence.reads[layer].rebuilt), shape.kv_heads);
            let Some(sequence) = self.sequences.get(&lane.id) else { continue };
            let way = self.way(&retrieval, sequence, layer, &lane);
            let super::scratch::Scratch { queries, positions, out, lse, read, workspace, .. } =
                &mut self.scratch;
            let rows = |dim: usize| lane.offset * hq * dim..(lane.offset + lane.tokens) * hq * dim;
            let (queries, out, lse) = (&queries[rows(d_k)], &mut out[rows(d_v)], &mut lse[rows(1)]);
            let positions = &positions[lane.offset..lane.offset + lane.tokens];
            let (backend, heads) = (&*self.backend, sequence.layers[owner].as_slice());
            let report: Result<ReadReport, KernelError> = match (way, &sequence.reads[owner].index) {
                (Way::Chosen { budget, held }, Some(index)) => {
                    let retrieval = &*retrieval;
                    let held = held.map(|layer| &sequence.reads[layer].held);
                    let thresholds = sequence.thresholds;
                    let reader = Reader {
                        backend,
                        shape,
                        retrieval,
                        heads,
                        index: IndexPart::all(index),
                        queries,
                        positions,
                        budget,
                        thresholds,
                        sinks: shape.sink_logits.as_deref(),
                    };
                    reader.run(held, (read, workspace), (out, lse))
                }
                _ => {
                    let share = Share::ALL;
                    let lane =
                        AttendLane { heads, queries, positions, share, spans: None, out, lse, mass: None };
                    let with = (&mut read.rebuilt[..], &mut read.factored, workspace);
                    let attended = factored::attend(backend, &AttentionParams::of(shape), lane, with);
                    let (entries, bytes) = (total_rows(heads), heads.iter().map(store::bytes_read).sum());
                    let (stored, nothing) = (entries, Some(0.0));
                    attended.map(|()| ReadReport {
                        entries,
                        stored,
                        units: 0,
                        bytes,
                        missing: nothing,
                        missing_at_most: nothing,
                    })
                }
            };
            let Some(sequence) = self.sequences.get_mut(&lane.id) else { continue };
            let reads = &mut sequence.reads[layer];
            reads.rebuilt = Rebuilt(std::mem::take(&mut self.scratch.read.rebuilt));
            reads.report = Some(report?);
            reads.held.of.clear();
            if let Way::Chosen { held, .. } = way {
                let age = if held == Some(layer) { reads.held.age + 1 } else { 0 };
                reads.held.clone_from(&self.scratch.read.chosen);
                reads.held.age = age;
            }
        }
        Ok(())
    }

    /// The entries that the last decode step read of a layer; `None` before the first, and for recipes without an index.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`], [`CacheError::NoLayer`].
    pub fn last_choice(&self, id: SequenceId, layer: usize) -> Result<Option<Selection>, Error> {
        let heads = self.heads(id, layer)?;
        let reads = &self.sequence(id)?.reads[layer];
        let index = &self.sequence(id)?.reads[self.shape.owner(layer)].index;
        if reads.report.is_none() {
            return Ok(None);
        }
        let mut spans = vec![Spans::default(); heads.len()];
        for (h, (spans, head)) in spans.iter_mut().zip(heads).enumerate() {
            match (index, reads.held.of.get(h), reads.held.units.get(h)) {
                (Some(index), Some(&of), Some(units)) => {
                    // Units that were made since were entries of no unit then.
                    let units: Vec<u32> =
                        units.iter().copied().chain(of as u32..index.heads()[h].picks() as u32).collect();
                    index.heads()[h].spans(&units, true, head.rows(), spans, &mut Vec::new());
                }
                _ => spans.push(0..head.rows()),
            }
        }
        Ok(Some(Selection::of(heads, spans.iter().map(Spans::slots))))
    }

    /// The entries a decode step with these queries would read of a layer, without reading them or changing anything:
    /// for hosts with an attention of their own. `q` is `(T, Hq, d_k)`, the queries of the last `T` tokens, at most
    /// [`READ_TOKENS`].
    ///
    /// # Errors
    /// [`CacheError::Unsupported`] if the recipe has no index; [`CacheError::Extents`]; device errors.
    pub fn choose(&mut self, id: SequenceId, layer: usize, q: TensorView<'_>) -> Result<Selection, Error> {
        self.heads(id, layer)?;
        let dims = q.dims();
        let (shape, owner) = (self.shape.layer(layer), self.shape.owner(layer));
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        let refuse =
            |why: String, change| Err(CacheError::Unsupported { what: "choose", why, change }.into());
        let Some(retrieval) = self.recipe.index.clone() else {
            return refuse(
                format!("the recipe {} has no index", self.recipe),
                "name one, for example quest or pages",
            );
        };
        if dims.tokens == 0 || dims.tokens > READ_TOKENS {
            return refuse(format!("{} queries", dims.tokens), "choose for 1 to 8 queries at a time");
        }
        let want = Dims { tokens: dims.tokens, heads: hq, dim: d_k };
        if dims != want {
            return Err(CacheError::Extents { layer, tensor: "q", got: dims, want }.into());
        }
        let mut queries = vec![0.0; hq * dims.tokens * d_k];
        for (row, query) in queries.chunks_exact_mut(d_k).enumerate() {
            q.read_row(row % dims.tokens, row / dims.tokens, query);
        }
        let sequence = self.sequence(id)?;
        let positions: Vec<i32> =
            (0..dims.tokens as i32).rev().map(|back| sequence.next - 1 - back).collect();
        let lane = Lane { id: id.0, tokens: dims.tokens, ..Lane::default() };
        let heads = sequence.layers[owner].as_slice();
        let mut spans: Vec<Spans> =
            heads.iter().map(|head| std::iter::once(0..head.rows()).collect()).collect();
        if let (Way::Chosen { budget, .. }, Some(index)) =
            (self.way(&retrieval, sequence, layer, &lane), &sequence.reads[owner].index)
        {
            let (backend, retrieval) = (&*self.backend, &*retrieval);
            let reader = Reader {
                backend,
                shape,
                retrieval,
                heads,
                index: IndexPart::all(index),
                queries: &queries,
                positions: &positions,
                budget,
                thresholds: sequence.thresholds,
                sinks: shape.sink_logits.as_deref(),
            };
            let (mut out, mut lse) = (vec![0.0; hq * dims.tokens * d_v], vec![0.0; hq * dims.tokens]);
            let mut scratch = ReadScratch::default();
            scratch.lend(Rebuilt::default(), shape.kv_heads);
            reader.run(None, (&mut scratch, &mut Workspace::default()), (&mut out, &mut lse))?;
            for (h, (spans, units)) in spans.iter_mut().zip(&scratch.chosen.units).enumerate() {
                index.heads()[h].spans(units, true, heads[h].rows(), spans, &mut Vec::new());
            }
        }
        Ok(Selection::of(heads, spans.iter().map(|spans| spans.slots())))
    }

    fn way(&self, retrieval: &Retrieval, sequence: &Sequence, layer: usize, lane: &Lane) -> Way {
        let (rule, owner) = (&retrieval.rule, self.shape.owner(layer));
        let Some(index) = &sequence.reads[owner].index else { return Way::Whole };
        let heads = &sequence.layers[owner];
        let rows = heads.iter().map(HeadRows::rows).max().unwrap_or(0);
        let units: usize = index.heads().iter().map(|head| head.units()).sum();
        // A prompt is read whole; so is a sequence whose storage is judged by what it makes of the whole.
        let prompt = lane.tokens > READ_TOKENS || sequence.prefill_open;
        if prompt || sequence.watched.shadow.is_some() || units == 0 || rows < rule.min_context {
            return Way::Whole;
        }
        let budget = self.read_budget(sequence, owner, index);
        let at_most = if rule.goal.is_some() { rule.most } else { 1.0 };
        let limit = (rule.most * rows as f64) as usize;
        if rule.goal.is_none() && budget > limit {
            return Way::Whole;
        }
        let budget = budget.min((at_most * rows as f64) as usize);
        let own = (sequence.reads[layer].held.fits(index) && sequence.reads[layer].held.age + 1 < rule.every)
            .then_some(layer);
        let base = layer / rule.share * rule.share;
        let shared = (base < layer && sequence.reads[base].held.fits(index)).then_some(base);
        Way::Chosen { budget, held: shared.or(own) }
    }

    /// Entries of each KV head of a layer that a step may read, always read ones included.
    fn read_budget(&self, sequence: &Sequence, layer: usize, index: &LayerIndex) -> usize {
        match self.budget {
            None => usize::MAX,
            Some(Budget::Bytes(bytes)) => {
                let heads: usize =
                    self.shape.owners().map(|layer| self.shape.layer(layer).kv_heads).sum::<usize>().max(1);
                let tables: usize = index.rows().map(store::bytes_read).sum::<usize>() / index.heads().len();
                let entry = self.storage[layer].iter().map(|s| s.bulk().entry_bytes()).max().unwrap_or(1);
                (bytes / heads).saturating_sub(tables) / entry
            }
            Some(budget) => budget.tokens(sequence.prompt_tokens).unwrap_or(usize::MAX),
        }
    }

    /// Brings the indexes of a sequence up to date with what is committed.
    ///
    /// # Errors
    /// A kernel's error; what is in no unit yet is read always.
    pub(super) fn extend_index(&mut self, id: SequenceId) -> Result<(), Error> {
        let Some(retrieval) = &self.recipe.index else { return Ok(()) };
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(()) };
        let (open, queries) = (sequence.prefill_open, &sequence.queries);
        for (layer, (reads, heads)) in sequence.reads.iter_mut().zip(&sequence.layers).enumerate() {
            if let Some(index) = &mut reads.index {
                let shape = self.shape.layer(layer);
                index.extend(&Growth {
                    backend: &*self.backend,
                    retrieval,
                    shape,
                    storage: &self.tables[layer],
                    heads,
                    open,
                    queries: &|| queries[layer].head_major(shape.query_heads),
                })?;
            }
        }
        Ok(())
    }
}
