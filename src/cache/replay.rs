//! Replaying a context: tokens that repeat what a sequence holds pass through the model without staying, and each entry
//! remembers the highest attention weight it received.
//!
//! *Helps* policies that judge a context before any question is known ([`kvzip`](crate::policy::score::kvzip)). *Hurts* by a second
//! pass over the context.

use super::KvCache;
use super::sequence::SequenceId;
use super::step::Step;
use crate::columns::REPLAYED;
use crate::device::{HeadRows, Segment};
use crate::error::{CacheError, Error};
use crate::geometry::Position;
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
use crate::store;
use crate::view::{TensorView, TensorViewMut};
use std::ops::Range;
use std::sync::Arc;

/// Query rows whose weights are held at once.
const ROWS: usize = 16;

/// First entries that always belong to the context of a part: the softmax rests on them.
const SINKS: i32 = 4;

/// Tokens on their way through the layers that repeat a part of a context. Whether finished or dropped, none of them stays.
#[derive(Debug)]
pub struct Replay<'c> {
    step: Step<'c>,
    id: SequenceId,
    part: Range<i32>,
    /// Per layer, KV head after KV head: the highest weight on each of the part's entries.
    best: Vec<Vec<f32>>,
}

impl KvCache {
    /// Begins `tokens` tokens that repeat the entries at the positions `part` of a sequence, perhaps behind a request to do so.
    /// They follow what the sequence holds; when the [`Replay`] ends they are gone, and entries of the part remember the highest
    /// attention weight that any of them paid, among the first four entries, the part, and themselves.
    ///
    /// Call it for the parts of a prompt in turn (the paper: 2,000 tokens each, repeated behind the last 8 of the part before)
    /// between its last token and [`KvCache::end_prefill`]. Weights of several replays of an entry join by the higher.
    ///
    /// # Errors
    /// [`CacheError::PositionRange`] for a part that the sequence does not reach; [`CacheError::Unsupported`] under a recipe that
    /// does not judge by replays; as [`KvCache::begin`].
    pub fn replay(
        &mut self,
        id: SequenceId,
        part: Range<Position>,
        tokens: usize,
    ) -> Result<Replay<'_>, Error> {
        let part = part.start.0..part.end.0;
        let next = self.sequence(id)?.next;
        if part.start < 0 || part.start >= part.end || part.end > next {
            return Err(CacheError::PositionRange { start: part.start, end: part.end, next }.into());
        }
        if self.columns.find(REPLAYED.name).is_none() {
            return Err(CacheError::Unsupported {
                what: "replay",
                why: format!("the recipe {} does not judge entries by replays", self.recipe),
                change: "use a recipe whose needs() say replay (kvzip), or leave the replay out",
            }
            .into());
        }
        let best = vec![Vec::new(); self.shape.layers()];
        self.check_batch(&[(id, tokens)])?;
        // A replay of one token is not the first token after the prompt.
        let step = self.begin_open(&[(id, tokens)])?;
        Ok(Replay { step, id, part, best })
    }
}

impl Replay<'_> {
    /// Tokens in the replay.
    pub fn tokens(&self) -> usize {
        self.step.tokens()
    }

    /// The position of its first token: what the host's rotary embedding must use.
    pub fn start(&self) -> Position {
        self.step.lanes().next().map_or(Position(0), |(_, start, _)| start)
    }

    /// As [`Step::attend`].
    ///
    /// # Errors
    /// As there.
    pub fn attend(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        k: TensorView<'_>,
        v: TensorView<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), Error> {
        self.step.attend(layer, q, k, v, out)?;
        self.join(layer)
    }

    /// As [`Step::attend_stored`], for layers that share another's cache: entries remember the higher weight of both.
    ///
    /// # Errors
    /// As there.
    pub fn attend_stored(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<(), Error> {
        self.step.attend_stored(layer, q, out)?;
        self.join(layer)
    }

    /// What the queries of a layer pay joins what others paid the same entries.
    fn join(&mut self, layer: usize) -> Result<(), Error> {
        let owner = self.step.cache.shape.owner(layer);
        if !self.step.cache.participates(owner) {
            return Ok(());
        }
        let paid = self.weigh(layer)?;
        let best = &mut self.best[owner];
        best.resize(paid.len(), 0.0);
        best.iter_mut().zip(paid).for_each(|(best, paid)| *best = best.max(paid));
        Ok(())
    }

    /// The highest weight that the replay's queries pay each of the part's entries.
    fn weigh(&self, layer: usize) -> Result<Vec<f32>, Error> {
        let cache = &*self.step.cache;
        let shape = cache.shape.layer(layer);
        let (tokens, start, d_k) = (self.tokens(), self.start().0, shape.d_k);
        let counted = |position: i32| position < SINKS || self.part.contains(&position) || position >= start;
        let whole = &cache.sequence(self.id)?.layers[cache.shape.owner(layer)];
        let heads: Vec<HeadRows> = whole.iter().map(|head| meeting(head, counted)).collect();
        let mut judged: Vec<Judged> = heads.iter().map(|head| Judged::of(head, counted)).collect();
        let params = AttentionParams::of(shape);
        let queries = &cache.scratch.queries[..shape.query_heads * tokens * d_k];
        let mut weights = Vec::new();
        for first in (0..tokens).step_by(ROWS) {
            let window = ROWS.min(tokens - first);
            let rows = queries
                .chunks_exact(tokens * d_k)
                .flat_map(|head| &head[first * d_k..(first + window) * d_k]);
            let rows: Vec<f32> = rows.copied().collect();
            let of_rows: Vec<i32> = (0..window as i32).map(|i| start + first as i32 + i).collect();
            weights.resize(shape.group() * window * total_rows(&heads), 0.0);
            let mut args = WindowArgs {
                heads: &heads,
                queries: &rows,
                positions: &of_rows,
                reduce: WindowReduce::Rows,
                out: &mut weights,
            };
            cache.backend.window_scores(&params, &mut args)?;
            let mut rest = weights.as_slice();
            for head in &mut judged {
                let (own, behind) = rest.split_at(shape.group() * window * head.positions.len());
                rest = behind;
                own.chunks_exact(head.positions.len().max(1)).for_each(|row| head.raise(row));
            }
        }
        let best = judged.iter().flat_map(|head| head.positions.iter().zip(&head.best));
        Ok(best.filter(|(position, _)| self.part.contains(position)).map(|(_, best)| *best).collect())
    }

    /// Ends the replay: its tokens leave, what they paid stays with the entries.
    ///
    /// # Errors
    /// [`CacheError::Incomplete`] if a layer was not attended; nothing changed then.
    pub fn finish(self) -> Result<(), Error> {
        let Self { step, id, part, best } = self;
        let cache = &mut *step.cache;
        let shape = Arc::clone(&cache.shape);
        let missing = |layer: &usize| !cache.scratch.pending[*layer].attended;
        if let Some(layer) = shape.owners().find(missing) {
            let (done, layers) = (shape.owners().filter(|l| !missing(l)).count(), shape.owners().count());
            return Err(CacheError::Incomplete { done, layers, missing: layer }.into());
        }
        let Some((word, _)) = cache.columns.find(REPLAYED.name) else { return Ok(()) };
        let backend = Arc::clone(&cache.backend);
        let sequence = cache.sequence_mut(id)?;
        for layers in sequence.stores() {
            for (heads, best) in layers.iter_mut().zip(&best).filter(|(_, best)| !best.is_empty()) {
                let mut best = best.iter();
                for head in heads.iter_mut() {
                    store::update_columns(&*backend, head, |positions, _, columns| {
                        let from = positions.partition_point(|&p| p < part.start);
                        let to = positions.partition_point(|&p| p < part.end);
                        for (entry, best) in (from..to).zip(&mut best) {
                            let held = &mut columns.entry(entry)[word];
                            *held = f32::from_bits(*held).max(*best).to_bits();
                        }
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// The pages of a KV head that hold an entry that counts, shared with it.
fn meeting(head: &HeadRows, counted: impl Fn(i32) -> bool) -> HeadRows {
    let mut segments = Vec::new();
    for segment in &head.segments {
        for (page, rows) in segment.pages() {
            if page.positions[..rows].iter().any(|&position| counted(position)) {
                let mut part = Segment::new(Arc::clone(&segment.layout));
                part.pages.push(Arc::clone(page));
                part.rows = rows;
                segments.push(part);
            }
        }
    }
    HeadRows::new(segments)
}

/// The entries of a KV head's pages that a replay weighs.
struct Judged {
    positions: Vec<i32>,
    /// 1 for entries that the softmax is over, 0 for others in their pages.
    counted: Vec<f32>,
    /// The highest weight so far.
    best: Vec<f32>,
}

impl Judged {
    fn of(head: &HeadRows, counted: impl Fn(i32) -> bool) -> Self {
        let positions: Vec<i32> = head.pages().flat_map(|page| page.positions().to_vec()).collect();
        let counted = positions.iter().map(|&position| f32::from(u8::from(counted(position)))).collect();
        Self { best: vec![0.0; positions.len()], counted, positions }
    }

    /// Raises the best of every entry to its share of one query's weights on those that count.
    fn raise(&mut self, weights: &[f32]) {
        let sum: f32 = weights.iter().zip(&self.counted).map(|(weight, counted)| weight * counted).sum();
        if sum > 0.0 {
            let share = 1.0 / sum;
            self.best.iter_mut().zip(weights).for_each(|(best, weight)| *best = best.max(weight * share));
        }
    }
}
