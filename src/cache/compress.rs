//! What happens at commit: scores are fed, queries recorded, and where the schedule says so every layer is
//! planned and compacted, one layer after another.
//!
//! *Helps* keep the peak at budget plus one step, because a layer's pages are freed before the next layer is
//! planned. *Hurts* the step that triggers it by one scoring pass and one copy of what is kept.

use super::KvCache;
use super::factored::Watch;
use super::sequence::{QueryLog, Sequence, SequenceId};
use super::step::Lane;
use crate::columns::{MERGED, RATED};
use crate::device::HeadRows;
use crate::error::{Error, PolicyError};
use crate::geometry::{LayerShape, Position};
use crate::kernel::attention_mass::MassArgs;
use crate::kernel::rope::{RopeArgs, RopeTarget};
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
use crate::plan::{HeadPlan, LayerPlan};
use crate::policy::{Feed, FeedKind, LayerScores, LayerView, QueryWindow, TargetRequest, seen_by};
use crate::recipe::{Budget, PositionMode};
use crate::reduce::Reduced;
use crate::store::{self, SharedPositions};
use std::ops::ControlFlow;

/// Query rows scored at once for [`FeedKind::Rows`]: bounds the buffer of weights to this many rows.
const FEED_ROWS: usize = 16;

impl KvCache {
    /// Second half of a commit, after all checks.
    pub(super) fn finish_step(&mut self, accepted: &[usize]) -> Result<(), Error> {
        for (index, &accepted) in accepted.iter().enumerate() {
            let lane = self.scratch.lanes[index];
            self.reject_rest(lane, accepted);
            if accepted == 0 {
                continue;
            }
            for layer in 0..self.shape.layers() {
                self.feed_layer(layer, index, accepted)?;
                self.record_queries(layer, index, accepted);
                self.record_ratings(layer, index, accepted)?;
            }
            let sequence = self.sequence_mut(SequenceId(lane.id))?;
            sequence.next += accepted as i32;
            sequence.since += accepted;
            if sequence.prefill_open {
                sequence.prompt_tokens += accepted;
            }
        }
        for (index, &accepted) in accepted.iter().enumerate() {
            let lane = self.scratch.lanes[index];
            if accepted > 0 {
                let id = SequenceId(lane.id);
                let watched = self.watches(id);
                self.compress_if_due(id, accepted)?;
                self.extend_index(id)?;
                self.forget_queries(id)?;
                self.seal(id)?;
                self.factor_due(id, false, &mut |_| ControlFlow::Continue(()))?;
                self.advance_guard(id, watched, accepted)?;
            }
        }
        Ok(())
    }

    /// Removes the rows of tokens that were not accepted.
    fn reject_rest(&mut self, lane: Lane, accepted: usize) {
        if accepted == lane.tokens {
            return;
        }
        let end = lane.start + accepted as i32;
        if let Some(sequence) = self.sequences.get_mut(&lane.id) {
            for head in sequence.stores().flatten().flatten() {
                let rows = store::rows_below(head, end);
                store::truncate_rows(head, rows);
            }
        }
    }

    /// The logged query rows of a lane's layer that were accepted: token-major rows, first token's index.
    fn accepted_log(&self, lane_index: usize, accepted: usize) -> (std::ops::Range<usize>, usize) {
        let lanes = &self.scratch.lanes;
        let before: usize = lanes[..lane_index].iter().map(|l| l.logged).sum();
        let lane = lanes[lane_index];
        let first = lane.tokens - lane.logged;
        let count = accepted.saturating_sub(first);
        (before..before + count, first)
    }

    fn feed_layer(&mut self, layer: usize, lane_index: usize, accepted: usize) -> Result<(), Error> {
        let feed = self.fed(layer);
        let lane = self.scratch.lanes[lane_index];
        if feed == FeedKind::None || !lane.records {
            return Ok(());
        }
        let (log, first) = self.accepted_log(lane_index, accepted);
        let shape = self.shape.layer(layer);
        let params = AttentionParams::of(shape);
        let (hq, d_k) = (shape.query_heads, shape.d_k);
        let backend = &*self.backend;
        let policy = &*self.recipe.policy;
        let pending = &self.scratch.pending[layer];
        let Some(sequence) = self.sequences.get_mut(&lane.id) else { return Ok(()) };
        let heads = &mut sequence.layers[layer];
        let total = shape.group() * total_rows(heads);
        let positions: Vec<i32> = (0..accepted as i32).map(|i| lane.start + i).collect();
        match feed {
            FeedKind::None => {}
            FeedKind::Mass if accepted == lane.tokens => {
                let start = pending.mass_starts[lane_index];
                let mass = &pending.mass[start..start + total];
                observe(backend, policy, shape, heads, mass, &positions)?;
            }
            FeedKind::Mass => {
                let queries = head_major(&pending.queries[log.start * hq * d_k..log.end * hq * d_k], hq, d_k);
                let lse = head_major(&pending.lse[log.start * hq..log.end * hq], hq, 1);
                let mut mass = vec![0.0; total];
                let mut args =
                    MassArgs { heads, queries: &queries, positions: &positions, lse: &lse, mass: &mut mass };
                backend.attention_mass(&params, &mut args)?;
                observe(backend, policy, shape, heads, &mass, &positions)?;
            }
            FeedKind::Rows { last } => {
                let skip = log.len().saturating_sub(last);
                let positions = &positions[first + skip..];
                for (block, block_positions) in positions.chunks(FEED_ROWS).enumerate() {
                    let start = log.start + skip + block * FEED_ROWS;
                    let rows = &pending.queries[start * hq * d_k..(start + block_positions.len()) * hq * d_k];
                    let queries = head_major(rows, hq, d_k);
                    let mut weights = vec![0.0; total * block_positions.len()];
                    let mut args = WindowArgs {
                        heads,
                        queries: &queries,
                        positions: block_positions,
                        reduce: WindowReduce::Rows,
                        out: &mut weights,
                    };
                    backend.window_scores(&params, &mut args)?;
                    for (i, position) in block_positions.iter().enumerate() {
                        let row = one_row(&weights, heads, shape.group(), block_positions.len(), i);
                        observe(backend, policy, shape, heads, &row, std::slice::from_ref(position))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn record_queries(&mut self, layer: usize, lane_index: usize, accepted: usize) {
        if self.needs.queries == 0 || !self.logs_queries(layer) || !self.scratch.pending[layer].attended {
            return;
        }
        let lane = self.scratch.lanes[lane_index];
        let (log, first) = self.accepted_log(lane_index, accepted);
        let shape = self.shape.layer(layer);
        let row = shape.query_heads * shape.d_k;
        let positions: Vec<i32> =
            (first as i32..(first + log.len()) as i32).map(|i| lane.start + i).collect();
        let rows = &self.scratch.pending[layer].queries[log.start * row..log.end * row];
        let keep = self.needs.queries;
        if let Some(sequence) = self.sequences.get_mut(&lane.id) {
            sequence.queries[layer].push(rows, &positions, keep);
        }
    }

    /// Writes what the policy made of the accepted tokens' side inputs beside their entries.
    fn record_ratings(&mut self, layer: usize, lane_index: usize, accepted: usize) -> Result<(), Error> {
        let Some((word, _)) = self.columns.find(RATED.name).filter(|_| self.rates(layer)) else {
            return Ok(());
        };
        let lane = self.scratch.lanes[lane_index];
        let kv_heads = self.shape.layer(layer).kv_heads;
        let rated = &self.scratch.pending[layer].rated[lane.offset * kv_heads..][..accepted * kv_heads];
        let Some(sequence) = self.sequences.get_mut(&lane.id) else { return Ok(()) };
        for layers in sequence.stores() {
            for (h, head) in layers[layer].iter_mut().enumerate() {
                let of_head = rated.iter().skip(h).step_by(kv_heads);
                store::fill_column(&*self.backend, head, word, accepted, of_head.map(|x| x.to_bits()))?;
            }
        }
        Ok(())
    }

    /// Says that the prompt of a sequence is complete and compresses it where the schedule says `prefill`.
    /// Called by the first single-token step too; calling it twice is harmless.
    ///
    /// # Errors
    /// [`Error`] from scoring or compacting; the prompt then stays open and may be ended again.
    pub fn end_prefill(&mut self, id: SequenceId) -> Result<(), Error> {
        self.finish_prefill(id, &mut |_| ControlFlow::Continue(()))
    }

    pub(super) fn finish_prefill(&mut self, id: SequenceId, watch: Watch<'_>) -> Result<(), Error> {
        if !self.sequence(id)?.prefill_open {
            return Ok(());
        }
        if self.recipe.schedule.prefill {
            self.compress(id)?;
        }
        self.sequence_mut(id)?.prefill_open = false;
        self.extend_index(id)?;
        self.calibrate(id)?;
        self.seal(id)?;
        if let Err(error) = self.factor_due(id, true, watch) {
            self.sequence_mut(id)?.prefill_open = true;
            return Err(error);
        }
        self.forget_queries(id)
    }

    /// Gives recorded queries back that nothing will look at.
    fn forget_queries(&mut self, id: SequenceId) -> Result<(), Error> {
        let sequence = self.sequence(id)?;
        if self.needs.queries > 0 && !sequence.prefill_open && !self.records(sequence) {
            self.sequence_mut(id)?.queries.iter_mut().for_each(QueryLog::clear);
        }
        Ok(())
    }

    /// Says that another prompt follows (a further turn of a conversation): tokens count as prompt again
    /// until [`KvCache::end_prefill`].
    ///
    /// # Errors
    /// [`crate::error::CacheError::NoSequence`].
    pub fn reopen_prefill(&mut self, id: SequenceId) -> Result<(), Error> {
        self.sequence_mut(id)?.prefill_open = true;
        Ok(())
    }

    fn compress_if_due(&mut self, id: SequenceId, accepted: usize) -> Result<(), Error> {
        let schedule = self.recipe.schedule;
        let sequence = self.sequence(id)?;
        let mut due = (schedule.chunk && accepted > 1) || schedule.every.is_some_and(|n| sequence.since >= n);
        if let Some(slack) = schedule.over
            && !due
            && self.recipe.policy.compresses()
        {
            let targets = self.targets(sequence, &sequence.measures);
            due = targets
                .iter()
                .any(|&(layer, target)| mean_rows(&sequence.layers[layer]) > target.saturating_add(slack));
        }
        if due { self.compress(id) } else { Ok(()) }
    }

    /// Compresses a sequence to its budget now, whatever the schedule says.
    ///
    /// # Errors
    /// [`Error`] from scoring or compacting; each layer is then either compressed or as it was.
    pub fn compress(&mut self, id: SequenceId) -> Result<(), Error> {
        let next = self.sequence(id)?.next;
        let mut shared = SharedPositions::default();
        let mut changed = self.drop_unseen(id, &mut shared)?;
        let measures = self.measures(id)?;
        self.sequence_mut(id)?.measures = measures;
        if self.recipe.policy.compresses() {
            let sequence = self.sequence(id)?;
            for (layer, target) in self.targets(sequence, &sequence.measures) {
                let plan = self.plan_layer(id, layer, target)?;
                changed |= self.apply(id, layer, &plan, &mut shared)?;
            }
        }
        if changed && self.recipe.positions == PositionMode::Renumber {
            self.renumber(id, &mut shared)?;
        }
        let sequence = self.sequence_mut(id)?;
        sequence.since = 0;
        if changed {
            let marker = if sequence.next < next { sequence.next } else { next };
            sequence.compacted = Some(marker);
        }
        Ok(())
    }

    /// Packs what the recipe stores packed, behind the exact sinks and before the exact tail.
    ///
    /// A prompt that is to be compressed at its end stays exact until then: what is dropped need not be packed, and
    /// what is moved is packed once.
    ///
    /// Of a guarded sequence only the shadow is packed.
    pub(super) fn seal(&mut self, id: SequenceId) -> Result<(), Error> {
        let waits = self.recipe.schedule.prefill && self.recipe.policy.compresses();
        let (backend, storage) = (&*self.backend, &self.storage);
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(()) };
        if sequence.prefill_open && waits {
            return Ok(());
        }
        let Some(layers) = sequence.stores().last() else { return Ok(()) };
        let mut shared = SharedPositions::default();
        for (heads, storage) in layers.iter_mut().zip(storage) {
            for (head, storage) in heads.iter_mut().zip(storage) {
                store::seal(backend, storage, head, &mut shared)?;
            }
        }
        Ok(())
    }

    /// In layers with a sliding window, drops what no future query can see. Loses nothing.
    fn drop_unseen(&mut self, id: SequenceId, shared: &mut SharedPositions) -> Result<bool, Error> {
        let mut changed = false;
        for layer in self.shape.owners().collect::<Vec<_>>() {
            let Some(window) = self.shape.layer(layer).window else { continue };
            let sequence = self.sequence(id)?;
            // The next query sees positions above next − window.
            let oldest = i64::from(sequence.next) - i64::from(window) + 1;
            let oldest = i32::try_from(oldest.max(0)).unwrap_or(i32::MAX);
            let heads = sequence.layers[layer].iter().map(|head| {
                let (rows, gone) = (head.rows(), store::rows_below(head, oldest));
                HeadPlan::new(rows, (gone as u32..rows as u32).collect())
            });
            let plan = LayerPlan::from(heads.collect::<Vec<_>>());
            changed |= self.apply(id, layer, &plan, shared)?;
        }
        Ok(changed)
    }

    /// What the policy measures of each participating layer, once: of layers that were given budgets it would see what these
    /// left.
    fn measures(&self, id: SequenceId) -> Result<Vec<Vec<f32>>, Error> {
        let sequence = self.sequence(id)?;
        if !self.recipe.policy.measures() || !sequence.measures.is_empty() {
            return Ok(sequence.measures.clone());
        }
        let layers: Vec<usize> = (0..self.shape.layers()).filter(|&l| self.participates(l)).collect();
        let Some(target) = self.target_per_head(sequence, &layers) else { return Ok(Vec::new()) };
        let mut measures = Vec::with_capacity(layers.len());
        for layer in layers {
            let (rows, positions) = sequence.queries[layer].head_major(self.shape.layer(layer).query_heads);
            let view = self.view(sequence, layer, target, QueryWindow { rows: &rows, positions: &positions });
            match self.recipe.policy.measure(&view)? {
                Some(measure) => measures.push(measure),
                None => return Ok(Vec::new()),
            }
        }
        Ok(measures)
    }

    /// Entries per KV head that each participating layer is to keep now.
    fn targets(&self, sequence: &Sequence, measures: &[Vec<f32>]) -> Vec<(usize, usize)> {
        let layers: Vec<usize> = (0..self.shape.layers()).filter(|&l| self.participates(l)).collect();
        let rows: Vec<usize> = layers.iter().map(|&l| mean_rows(&sequence.layers[l])).collect();
        let Some(target) = self.target_per_head(sequence, &layers) else {
            return layers.into_iter().map(|layer| (layer, usize::MAX)).collect();
        };
        let (_, recent) = self.recipe.policy.protected();
        let request = TargetRequest { layers: &layers, rows: &rows, target, recent, measures };
        let targets = self.recipe.policy.layer_targets(&request);
        layers.into_iter().zip(targets).collect()
    }

    /// The budget as entries per KV head, on average.
    fn target_per_head(&self, sequence: &Sequence, layers: &[usize]) -> Option<usize> {
        Some(match self.budget? {
            Budget::Tokens(tokens) => tokens,
            budget @ Budget::Fraction(_) => budget.tokens(sequence.prompt_tokens)?,
            Budget::Bytes(bytes) => {
                // Whole pages: what is resident, not what is used, must stay below the budget.
                let storage = || layers.iter().flat_map(|&l| &self.storage[l]);
                storage().next()?;
                let fits = |rows: usize| storage().map(|s| s.bytes(rows)).sum::<usize>() <= bytes;
                // An entry takes a byte at least.
                let (mut most, mut beyond) = (0, bytes + 1);
                while beyond - most > 1 {
                    let middle = most + (beyond - most) / 2;
                    *(if fits(middle) { &mut most } else { &mut beyond }) = middle;
                }
                most
            }
        })
    }

    fn view<'a>(
        &'a self,
        sequence: &'a Sequence,
        layer: usize,
        target: usize,
        queries: QueryWindow<'a>,
    ) -> LayerView<'a> {
        LayerView {
            layer,
            shape: self.shape.layer(layer),
            heads: &sequence.layers[layer],
            next: Position(sequence.next),
            target,
            queries,
            columns: &self.columns,
            remembered: &sequence.remembered[layer],
            backend: &*self.backend,
        }
    }

    fn plan_layer(&self, id: SequenceId, layer: usize, target: usize) -> Result<LayerPlan, Error> {
        let sequence = self.sequence(id)?;
        let heads = &sequence.layers[layer];
        let (rows, positions) = sequence.queries[layer].head_major(self.shape.layer(layer).query_heads);
        let view = self.view(sequence, layer, target, QueryWindow { rows: &rows, positions: &positions });
        let mut plan = self.recipe.policy.plan(&view)?;
        let name = self.recipe.policy.name();
        let validate =
            |plan: &LayerPlan, name: &str| plan.validate(name, layer, heads.iter().map(HeadRows::rows));
        validate(&plan, name)?;
        if let Some(reduce) =
            self.recipe.reduce.as_ref().filter(|_| !plan.heads.iter().all(HeadPlan::is_identity))
        {
            let Reduced { merges, remember } = reduce.reduce(&view, &plan)?;
            if merges.len() != plan.heads.len() {
                return Err(PolicyError::Custom {
                    policy: reduce.name().to_owned(),
                    message: format!(
                        "merges of {} KV heads, layer {layer} has {}",
                        merges.len(),
                        plan.heads.len()
                    ),
                }
                .into());
            }
            plan.heads.iter_mut().zip(merges).for_each(|(head, merges)| head.merges = merges);
            plan.remember = remember;
            validate(&plan, reduce.name())?;
        }
        if self.columns.find(MERGED.name).is_none() && plan.heads.iter().any(|head| !head.merges.is_empty()) {
            return Err(PolicyError::Custom {
                policy: name.to_owned(),
                message: format!(
                    "its plan mixes entries, but its columns lack columns::MERGED ({:?})",
                    MERGED.name
                ),
            }
            .into());
        }
        let total: usize = heads.iter().map(HeadRows::rows).sum();
        let allowed = target.saturating_mul(heads.len()).min(total);
        if plan.kept() > allowed {
            return Err(PolicyError::InvalidPlan {
                policy: name.to_owned(),
                layer,
                head: 0,
                problem: format!("keeps {} entries over all heads, the budget allows {allowed}", plan.kept()),
            }
            .into());
        }
        Ok(plan)
    }

    /// The plan of every participating layer as the recipe would make it now, without applying it.
    ///
    /// # Errors
    /// [`Error`] from scoring.
    pub fn plan(&self, id: SequenceId) -> Result<Vec<(usize, LayerPlan)>, Error> {
        if !self.recipe.policy.compresses() {
            return Ok(Vec::new());
        }
        let targets = self.targets(self.sequence(id)?, &self.measures(id)?);
        targets.into_iter().map(|(layer, target)| Ok((layer, self.plan_layer(id, layer, target)?))).collect()
    }

    /// The scores the recipe gives a layer's entries now, if it scores at all.
    ///
    /// # Errors
    /// [`Error`] from scoring.
    pub fn scores(&self, id: SequenceId, layer: usize) -> Result<Option<LayerScores>, Error> {
        self.heads(id, layer)?;
        let sequence = self.sequence(id)?;
        let Some(&(_, target)) =
            self.targets(sequence, &self.measures(id)?).iter().find(|(l, _)| *l == layer)
        else {
            return Ok(None);
        };
        let (rows, positions) = sequence.queries[layer].head_major(self.shape.layer(layer).query_heads);
        let view = self.view(sequence, layer, target, QueryWindow { rows: &rows, positions: &positions });
        Ok(self.recipe.policy.scores(&view)?)
    }

    /// The one place where entries are removed by plan.
    fn apply(
        &mut self,
        id: SequenceId,
        layer: usize,
        plan: &LayerPlan,
        shared: &mut SharedPositions,
    ) -> Result<bool, Error> {
        let backend = &*self.backend;
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(false) };
        for layers in sequence.stores() {
            for (head, plan) in layers[layer].iter_mut().zip(&plan.heads) {
                store::compact(backend, head, plan, &self.columns, shared)?;
            }
        }
        if !plan.remember.is_empty() {
            sequence.remembered[layer].clone_from(&plan.remember);
        }
        let dropped = plan.heads.iter().map(|plan| plan.rows - plan.keep.len()).sum::<usize>();
        if dropped > 0 {
            sequence.clear_index(layer);
        }
        let counters = &mut sequence.counters[layer];
        counters.dropped += dropped as u64;
        counters.compactions += u64::from(dropped > 0);
        Ok(dropped > 0)
    }

    /// Gives the entries of every head the positions 0, 1, 2, … and the next token the one after.
    fn renumber(&mut self, id: SequenceId, shared: &mut SharedPositions) -> Result<(), Error> {
        let (backend, shape, columns) = (&*self.backend, &self.shape, &self.columns);
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(()) };
        let mut next = 0;
        (0..shape.layers()).for_each(|layer| sequence.clear_index(layer));
        for layers in sequence.stores() {
            for (layer, heads) in layers.iter_mut().enumerate() {
                for head in heads {
                    next = next.max(head.rows() as i32);
                    // A position that no entry has any more becomes that of the entry before it.
                    let old: Vec<i32> = head.pages().flat_map(|page| page.positions().to_vec()).collect();
                    let extent = |p| old.partition_point(|&old| old <= p).saturating_sub(1) as i32;
                    let slot = |slot, _| slot as i32;
                    store::renumber(backend, shape.layer(layer), head, shared, columns, slot, extent)?;
                }
            }
        }
        let shift = next - sequence.next;
        sequence.next = next;
        for (layer, log) in sequence.queries.iter_mut().enumerate() {
            rotate_log(backend, shape.layer(layer), log, |_| shift)?;
        }
        Ok(())
    }
}

/// Moves recorded queries by a distance that depends on their position.
pub(super) fn rotate_log(
    backend: &dyn crate::backend::Backend,
    shape: &LayerShape,
    log: &mut QueryLog,
    shift: impl Fn(i32) -> i32,
) -> Result<(), Error> {
    let (positions, rows) = log.parts_mut();
    if let Some(rotary) =
        shape.rotary.as_ref().filter(|_| shape.key_phase == crate::geometry::KeyPhase::PostRope)
        && !rows.is_empty()
    {
        let deltas = positions.iter().flat_map(|&p| std::iter::repeat_n(shift(p), shape.query_heads));
        let table = rotary.table(deltas);
        backend.rope(&mut RopeArgs {
            layout: rotary.layout,
            dims: rotary.dims,
            table: &table,
            target: RopeTarget::Dense { rows, dim: shape.d_k },
        })?;
    }
    positions.iter_mut().for_each(|p| *p += shift(*p));
    Ok(())
}

/// Mean entries per head, rounded up.
fn mean_rows(heads: &[HeadRows]) -> usize {
    total_rows(heads).div_ceil(heads.len().max(1))
}

/// `[rows, heads, dim]` to `[heads, rows, dim]`.
fn head_major(rows: &[f32], heads: usize, dim: usize) -> Vec<f32> {
    let count = rows.len() / (heads * dim);
    let mut out = vec![0.0; rows.len()];
    for (i, row) in rows.chunks_exact(dim).enumerate() {
        let (token, head) = (i / heads, i % heads);
        out[(head * count + token) * dim..(head * count + token + 1) * dim].copy_from_slice(row);
    }
    out
}

/// Row `i` of `window` rows: for each head in turn `[G, rows]`.
fn one_row(weights: &[f32], heads: &[HeadRows], group: usize, window: usize, i: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(weights.len() / window);
    let mut start = 0;
    for head in heads {
        let rows = head.rows();
        for g in 0..group {
            let from = start + (g * window + i) * rows;
            out.extend_from_slice(&weights[from..from + rows]);
        }
        start += group * window * rows;
    }
    out
}

/// Hands every page of every head to the policy.
fn observe(
    backend: &dyn crate::backend::Backend,
    policy: &dyn crate::policy::Policy,
    shape: &LayerShape,
    heads: &mut [HeadRows],
    weights: &[f32],
    queries: &[i32],
) -> Result<(), Error> {
    let mut start = 0;
    for head in heads {
        let head_rows = head.rows();
        let weights = &weights[start..start + shape.group() * head_rows];
        start += weights.len();
        let seen = queries.last().map_or(0, |&query| seen_by(head, query, shape.window));
        store::update_columns(backend, head, |positions, first, columns| {
            let feed = Feed { positions, queries, head_rows, weights, first, window: shape.window, seen };
            policy.observe(&feed, columns);
        })?;
    }
    Ok(())
}
