//! A recipe on recorded layers: the prompt's keys and values go in at once, then decode steps one by one, each compared
//! with exact attention over everything.
//!
//! *Helps* because what is compared is the cache itself, as a host would drive it. *Hurts* nothing but time: exact
//! attention is shared by all recipes, but each stores the prompt and builds its index anew.

use super::record::{Layer, Recording};
use super::tally::Tally;
use crate::args::Variant;
use crate::attention::{self, Exact, tokens_of};
use crate::error::Result;
use crate::eval::Job;
use kvsieve::geometry::{LayerShape, ModelShape};
use kvsieve::index::Tail;
use kvsieve::policy::FeedKind;
use kvsieve::recipe::Recipe;
use kvsieve::view::{Dims, Strides, TensorView, TensorViewMut};
use kvsieve::{Budget, KvCache, SequenceId};

/// First entries of a tiled prompt that are there once.
const SINKS: usize = 4;
/// And last ones.
const RECENT: usize = 64;
/// Prompts of more tokens than this can be tiled.
pub(super) const LEAST: usize = SINKS + RECENT;

/// Recorded layers, laid out as a prompt and decode steps, with exact attention of the steps.
#[derive(Debug)]
pub(super) struct Scene<'a> {
    recording: &'a Recording,
    /// The shape caches are built for: [`super::record::partial`].
    shape: ModelShape,
    /// The recorded token at each position of the prompt.
    sources: Vec<u32>,
    /// Scored layers: their place among the recorded ones, and exact attention.
    scored: Vec<(usize, Exact)>,
}

/// What a step of a layer did.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    /// Bytes read: by index, or all that was stored.
    pub(super) bytes: usize,
    /// As the index estimates it.
    pub(super) missing: Option<f64>,
    /// As the index vouches for it.
    pub(super) at_most: Option<f64>,
    /// Whether nothing was left out, so that what the index says of it is no achievement.
    pub(super) whole: bool,
}

impl<'a> Scene<'a> {
    /// `tile`: the prompt's length, where it is not as recorded. `scored` are layers of the model.
    pub(super) fn new(
        recording: &'a Recording,
        model: &ModelShape,
        scored: &[usize],
        tile: Option<usize>,
    ) -> Result<Self> {
        let recorded: Vec<usize> = recording.layers.iter().map(|layer| layer.layer).collect();
        let (n, prompt) = (recording.tokens, recording.prompt);
        let sources = tile.map_or_else(|| (0..prompt as u32).collect(), |length| tiled(prompt, length));
        let mut copies = vec![0; prompt];
        sources.iter().for_each(|&token| copies[token as usize] += 1);
        let exact = |layer: &Layer| {
            let Layer { shape, q, k, v, .. } = layer;
            let q = tokens_of(q, (n, shape.d_k), prompt..n);
            Exact::of(&attention::Recording { shape, q: &q, k, v, copies: &copies })
        };
        let layers = recording.layers.iter().enumerate().filter(|(_, layer)| scored.contains(&layer.layer));
        let scored = layers.map(|(place, layer)| (place, exact(layer))).collect();
        Ok(Self { recording, shape: super::record::partial(model, &recorded)?, sources, scored })
    }

    /// The recorded token at a position.
    fn token(&self, position: i32) -> usize {
        let position = position as usize;
        let beyond = || self.recording.prompt + position - self.sources.len();
        self.sources.get(position).map_or_else(beyond, |&token| token as usize)
    }

    /// Feeds everything to a recipe and adds what came of it.
    pub(super) fn run(&self, job: &Job<'_>, variant: &Variant, tally: &mut Tally) -> Result<()> {
        let mut cache = job.place.cache(
            self.shape.clone(),
            &variant.recipe[..],
            variant.budget.map(|budget| self.share(budget)),
        )?;
        let sequence = cache.create_sequence();
        self.prefill(&mut cache, sequence)?;
        cache.end_prefill(sequence)?;
        for step in 0..self.recording.steps() {
            self.decode(&mut cache, sequence, step, tally)?;
        }
        let stats = cache.stats(sequence)?;
        for (place, _) in &self.scored {
            let layer = &self.recording.layers[*place];
            let held = stats.layers[layer.layer].bytes_index as f64;
            let rows = self.sources.len() + self.recording.steps();
            tally.index.add(held / full_bytes(&layer.shape, rows) as f64);
        }
        Ok(())
    }

    /// A budget of bytes is for all layers of the model, of which only some are here.
    fn share(&self, budget: Budget) -> Budget {
        match budget {
            Budget::Bytes(bytes) => {
                Budget::Bytes((bytes * self.recording.layers.len() / self.shape.layers()).max(1))
            }
            other => other,
        }
    }

    /// Stores the prompt. Its outputs were the model's business: they are only computed where the recipe weighs entries
    /// by them.
    fn prefill(&self, cache: &mut KvCache, sequence: SequenceId) -> Result<()> {
        let (needs, n) = (cache.needs(), self.sources.len());
        let tokens = self.sources.iter().map(|&token| token as usize);
        let mut step = cache.begin(sequence, n)?;
        for Layer { layer, shape, q, k, v } in &self.recording.layers {
            let laid = |rows, dim| tokens_of(rows, (self.recording.tokens, dim), tokens.clone());
            let (k, v) = (laid(k, shape.d_k), laid(v, shape.d_v));
            let (heads, groups) = (shape.query_heads, shape.kv_heads);
            if needs.feed == FeedKind::Mass {
                let (q, mut out) = (laid(q, shape.d_k), vec![0.0; heads * n * shape.d_v]);
                attention::attend(&mut step, (*layer, shape), [&q, &k, &v], &mut out)?;
                continue;
            }
            step.append(
                *layer,
                TensorView::head_major(&k[..], n, groups, shape.d_k)?,
                TensorView::head_major(&v[..], n, groups, shape.d_v)?,
            )?;
            if needs.queries > 0 || needs.feed != FeedKind::None {
                // As of a host that computed the attention elsewhere: the queries are noted, the outputs nobody's.
                let (q, mut out) = (laid(q, shape.d_k), vec![0.0; heads * n * shape.d_v]);
                let (part, lse) = (vec![0.0; out.len()], vec![0.0; heads * n]);
                let q = TensorView::head_major(&q[..], n, heads, shape.d_k)?;
                let out = TensorViewMut::head_major(&mut out[..], n, heads, shape.d_v)?;
                step.merge_partials(*layer, q, 1, &part, &lse, out)?;
            }
        }
        Ok(step.commit(n)?)
    }

    fn decode(
        &self,
        cache: &mut KvCache,
        sequence: SequenceId,
        index: usize,
        tally: &mut Tally,
    ) -> Result<()> {
        let layers = &self.recording.layers;
        let position = cache.next_position(sequence)?.0;
        // Taken before the step, whose commit may evict.
        let before = self.scored.iter().map(|(place, _)| {
            let mut stored = attention::stored(cache, sequence, layers[*place].layer)?;
            stored.iter_mut().for_each(|head| head.push(position));
            Ok(stored)
        });
        let before = before.collect::<Result<Vec<_>>>()?;
        let mut outs: Vec<Vec<f32>> = Vec::with_capacity(layers.len());
        let mut step = cache.begin(sequence, 1)?;
        for layer in layers {
            let shape = &layer.shape;
            let mut out = vec![0.0; shape.query_heads * shape.d_v];
            step.attend(
                layer.layer,
                self.step_of(&layer.q, index, (shape.query_heads, shape.d_k))?,
                self.step_of(&layer.k, index, (shape.kv_heads, shape.d_k))?,
                self.step_of(&layer.v, index, (shape.kv_heads, shape.d_v))?,
                TensorViewMut::head_major(&mut out[..], 1, shape.query_heads, shape.d_v)?,
            )?;
            outs.push(out);
        }
        step.commit(1)?;
        for (scored, stored) in before.into_iter().enumerate() {
            let place = self.scored[scored].0;
            let layer = layers[place].layer;
            let read = attention::chosen(cache, sequence, layer)?.unwrap_or(stored);
            let outcome = match cache.last_read(sequence, layer)? {
                Some(report) => Outcome {
                    bytes: report.bytes,
                    missing: report.missing.map(f64::from),
                    at_most: report.missing_at_most.map(f64::from),
                    whole: report.entries == report.stored,
                },
                None => {
                    let bytes = cache.stats(sequence)?.layers[layer].bytes_read_per_step;
                    Outcome { bytes, missing: None, at_most: None, whole: false }
                }
            };
            self.score((scored, index), &read, (&outs[place], outcome), tally, estimates(cache.recipe()));
        }
        Ok(())
    }

    /// One token of a recorded `[heads, n, dim]` tensor, where it lies.
    fn step_of<'r>(
        &self,
        rows: &'r [f32],
        index: usize,
        (heads, dim): (usize, usize),
    ) -> Result<TensorView<'r>> {
        let strides = Strides { token: dim, head: self.recording.tokens * dim, dim: 1 };
        let first = (self.recording.prompt + index) * dim;
        Ok(TensorView::new(&rows[first..], Dims { tokens: 1, heads, dim }, strides)?)
    }

    /// Compares a step of a scored layer with exact attention. `read` are the positions read, per KV head.
    fn score(
        &self,
        (scored, step): (usize, usize),
        read: &[Vec<i32>],
        (out, outcome): (&[f32], Outcome),
        tally: &mut Tally,
        estimates: bool,
    ) {
        let (place, exact) = &self.scored[scored];
        let Layer { shape, v, .. } = &self.recording.layers[*place];
        let seen = self.sources.len() + step + 1;
        let (mut missing, mut most) = (0.0, 0.0f64);
        for (kv, read) in read.iter().enumerate() {
            let mut unread = vec![true; seen];
            read.iter().for_each(|&position| unread[position as usize] = false);
            let unread: Vec<usize> = (0..seen).filter(|&p| unread[p]).map(|p| self.token(p as i32)).collect();
            let entries = || read.iter().map(|&position| self.token(position));
            for head in kv * exact.group()..(kv + 1) * exact.group() {
                let sums = tally.head(scored, head);
                let out = &out[head * shape.d_v..(head + 1) * shape.d_v];
                sums.recall.add(exact.mass(head, step, entries()));
                sums.error.add(exact.error(head, step, out));
                if estimates {
                    let alone = exact.over(head, step, entries(), v);
                    sums.without_tail.add(exact.error(head, step, &alone));
                }
                // Summed, not taken from 1: a certificate may vouch for less than the rounding of 1.
                let share = exact.mass(head, step, unread.iter().copied());
                missing += share / shape.query_heads as f64;
                most = most.max(share);
            }
        }
        let entries: usize = read.iter().map(Vec::len).sum();
        tally.entries.add(entries as f64 / (seen * shape.kv_heads) as f64);
        tally.bytes.add(outcome.bytes as f64 / full_bytes(shape, seen) as f64);
        tally.missing(missing, most, outcome);
    }
}

/// Whether what is not read is estimated.
fn estimates(recipe: &Recipe) -> bool {
    recipe.index.as_ref().is_some_and(|index| index.rule.tail == Tail::Estimate)
}

/// Bytes of a layer's keys and values in f16.
fn full_bytes(shape: &LayerShape, rows: usize) -> usize {
    2 * rows * shape.kv_heads * (shape.d_k + shape.d_v)
}

/// The tokens of a prompt laid out over `length` positions: sinks once, those between in turn, recent ones last.
fn tiled(prompt: usize, length: usize) -> Vec<u32> {
    let body = SINKS..prompt - RECENT;
    let middle = body.cycle().take(length - LEAST);
    (0..SINKS).chain(middle).chain(prompt - RECENT..prompt).map(|token| token as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_keep_both_ends() {
        assert_eq!(tiled(100, 100), (0..100).collect::<Vec<u32>>());
        let long = tiled(100, 150);
        assert_eq!(long.len(), 150);
        assert_eq!(long[..4], [0, 1, 2, 3]);
        assert_eq!((long[4], long[35], long[36], long[67], long[68], long[85]), (4, 35, 4, 35, 4, 21));
        assert_eq!(long[86..], (36..100).collect::<Vec<u32>>());
    }
}
