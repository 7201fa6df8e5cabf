//! A decode step that reads what an index chose: score the units, choose, attend over the chosen entries and those that
//! are always read, estimate the rest, and say what share of the softmax was not read.
//!
//! *Helps* because every index goes this one way, on every backend: through `dot_scores`, `attend` with spans, and
//! `merge_partials`. *Hurts* by three or four kernel calls a layer where reading everything is one; so a short context
//! is read whole.

use super::KvCache;
use super::ops::Selection;
use super::scratch::resize;
use super::sequence::{Sequence, SequenceId};
use super::step::Lane;
use crate::backend::Backend;
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::{CacheError, Error, KernelError};
use crate::geometry::LayerShape;
use crate::index::choose::Ranking;
use crate::index::{Group, LayerIndex, Retrieval, Role, Tail};
use crate::kernel::attend::{AttendLane, LOGIT_TOLERANCE, PACKED_TOLERANCE, Share, Workspace};
use crate::kernel::dot_scores::DotArgs;
use crate::kernel::merge_partials::MergeArgs;
use crate::kernel::{AttentionParams, Spans, total_rows};
use crate::recipe::Budget;
use crate::store;
use crate::view::{Dims, TensorView};

/// Steps of at most this many tokens read by index; longer ones are prompts and read everything.
pub const READ_TOKENS: usize = 8;

/// Added to every bound: weights too small for a normal number count as none.
const LEAST: f64 = 1e-30;

/// What a decode step read of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ReadReport {
    /// Entries read, over all KV heads.
    pub entries: usize,
    /// Entries there were.
    pub stored: usize,
    /// Units chosen, over all KV heads; 0 where everything was read.
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

/// Units that an earlier step, or another layer, chose.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    /// Per KV head, ascending.
    pub(super) units: Vec<Vec<u32>>,
    /// Units there were.
    pub(super) of: Vec<usize>,
    /// Steps since.
    pub(super) age: usize,
}

impl Held {
    /// Whether the choice is good for this index: no KV head's has grown or shrunk since.
    pub(super) fn fits(&self, index: &LayerIndex) -> bool {
        let units = index.heads().iter().map(|head| head.units());
        self.of.len() == units.len() && self.of.iter().copied().eq(units)
    }
}

/// Buffers that steps reuse.
#[derive(Debug, Default)]
pub(super) struct ReadScratch {
    rankings: Vec<Ranking>,
    bounds: Vec<Ranking>,
    queries: Vec<f32>,
    logits: Vec<f32>,
    spans: Vec<Spans>,
    slots: Vec<u32>,
    /// Units taken now, by KV head.
    fresh: Vec<Vec<u32>>,
    /// What is chosen, by KV head.
    pub(super) chosen: Held,
    outs: Vec<f32>,
    lses: Vec<f32>,
    zone: Vec<f32>,
    /// Per row: what its logits on means are to be raised by.
    corrections: Vec<f32>,
    /// Attention over the means of all units, where the rows are ranked by it: outputs, log-sum-exp and shares.
    means: Means,
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
    /// [`KernelError`].
    pub(super) fn read_layer(&mut self, layer: usize) -> Result<(), Error> {
        let Some(retrieval) = self.recipe.index.clone() else { return Ok(()) };
        let (shape, owner) = (self.shape.layer(layer), self.shape.owner(layer));
        let (hq, d_k, d_v) = (shape.query_heads, shape.d_k, shape.d_v);
        for lane in 0..self.scratch.lanes.len() {
            let lane = self.scratch.lanes[lane];
            let Some(sequence) = self.sequences.get(&lane.id) else { continue };
            let way = self.way(&retrieval, sequence, layer, &lane);
            let super::scratch::Scratch { queries, positions, out, lse, read, workspace, .. } =
                &mut self.scratch;
            let rows = |dim: usize| lane.offset * hq * dim..(lane.offset + lane.tokens) * hq * dim;
            let (queries, out, lse) = (&queries[rows(d_k)], &mut out[rows(d_v)], &mut lse[rows(1)]);
            let positions = &positions[lane.offset..lane.offset + lane.tokens];
            let (backend, heads) = (&*self.backend, sequence.layers[owner].as_slice());
            let report = match (way, &sequence.reads[owner].index) {
                (Way::Chosen { budget, held }, Some(index)) => {
                    let retrieval = &*retrieval;
                    let held = held.map(|layer| &sequence.reads[layer].held);
                    let reader =
                        Reader { backend, shape, retrieval, heads, index, queries, positions, budget };
                    reader.run(held, (read, workspace), (out, lse))?
                }
                _ => {
                    let share = Share::ALL;
                    let lane =
                        AttendLane { heads, queries, positions, share, spans: None, out, lse, mass: None };
                    backend.attend(&AttentionParams::of(shape), &mut [lane], workspace)?;
                    let (entries, bytes) = (total_rows(heads), heads.iter().map(store::bytes_read).sum());
                    let (stored, nothing) = (entries, Some(0.0));
                    ReadReport {
                        entries,
                        stored,
                        units: 0,
                        bytes,
                        missing: nothing,
                        missing_at_most: nothing,
                    }
                }
            };
            let keeps = retrieval.rule.every > 1 || retrieval.rule.share > 1;
            let Some(sequence) = self.sequences.get_mut(&lane.id) else { continue };
            let reads = &mut sequence.reads[layer];
            reads.report = Some(report);
            if keeps && let Way::Chosen { held, .. } = way {
                let age = if held == Some(layer) { reads.held.age + 1 } else { 0 };
                reads.held.clone_from(&self.scratch.read.chosen);
                reads.held.age = age;
            }
        }
        Ok(())
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
                index,
                queries: &queries,
                positions: &positions,
                budget,
            };
            let (mut out, mut lse) = (vec![0.0; hq * dims.tokens * d_v], vec![0.0; hq * dims.tokens]);
            let mut scratch = ReadScratch::default();
            reader.run(None, (&mut scratch, &mut Workspace::default()), (&mut out, &mut lse))?;
            for (h, (spans, units)) in spans.iter_mut().zip(&scratch.chosen.units).enumerate() {
                index.heads()[h].spans(units, true, heads[h].rows(), spans, &mut scratch.slots);
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
    /// [`KernelError`]; what is in no unit yet is read always.
    pub(super) fn extend_index(&mut self, id: SequenceId) -> Result<(), Error> {
        let Some(retrieval) = &self.recipe.index else { return Ok(()) };
        let Some(sequence) = self.sequences.get_mut(&id.0) else { return Ok(()) };
        let open = sequence.prefill_open;
        for (layer, (reads, heads)) in sequence.reads.iter_mut().zip(&sequence.layers).enumerate() {
            if let Some(index) = &mut reads.index {
                index.extend(
                    &*self.backend,
                    retrieval,
                    self.shape.layer(layer),
                    &self.tables[layer],
                    heads,
                    open,
                )?;
            }
        }
        Ok(())
    }
}

/// Attention over the means of all units.
#[derive(Debug, Default)]
struct Means {
    out: Vec<f32>,
    lse: Vec<f32>,
    shares: Vec<f32>,
    /// Whether it is this step's.
    there: bool,
}

/// One layer of one sequence and its queries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) shape: &'a LayerShape,
    pub(super) retrieval: &'a Retrieval,
    pub(super) heads: &'a [HeadRows],
    pub(super) index: &'a LayerIndex,
    /// `[Hq, T, d_k]`.
    pub(super) queries: &'a [f32],
    pub(super) positions: &'a [i32],
    /// Entries of each KV head to read.
    pub(super) budget: usize,
}

impl Reader<'_> {
    /// Attention over what the index chooses into `out [Hq, T, d_v]` and `lse [Hq, T]`; the choice stays in
    /// `scratch.chosen`. With `held`, over what was chosen before.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn run(
        &self,
        held: Option<&Held>,
        (scratch, workspace): (&mut ReadScratch, &mut Workspace),
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<ReadReport, KernelError> {
        let mut report = ReadReport { stored: total_rows(self.heads), ..ReadReport::default() };
        scratch.spans.resize_with(self.heads.len(), Spans::default);
        scratch.means.there = false;
        self.correct(&mut scratch.corrections);
        if let Some(held) = held {
            scratch.chosen.clone_from(held);
            self.attend(scratch, true, workspace, (out, lse), &mut report)?;
        } else {
            self.choose(scratch, workspace, (&mut *out, &mut *lse), &mut report)?;
        }
        report.units = scratch.chosen.units.iter().map(Vec::len).sum();
        if held.is_none() {
            self.account(scratch, lse, &mut report);
        }
        if self.retrieval.rule.tail == Tail::Estimate {
            self.estimate(scratch, workspace, (out, lse), &mut report)?;
        }
        Ok(report)
    }

    fn rows(&self) -> usize {
        self.shape.group() * self.positions.len()
    }

    /// Scores, chooses and reads.
    fn choose(
        &self,
        scratch: &mut ReadScratch,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rule, rows) = (&self.retrieval.rule, self.rows());
        scratch.chosen.age = 0;
        scratch.chosen.units.resize_with(self.heads.len(), Vec::new);
        scratch.chosen.units.iter_mut().for_each(Vec::clear);
        scratch.chosen.of.clear();
        scratch.chosen.of.extend(self.index.heads().iter().map(|head| head.units()));
        // A weight is a share of what a row sees, so what it sees anyway comes first; logits need no such measure.
        let zone_first = rule.goal.is_some() || matches!(rule.group, Group::Max | Group::Sum);
        scratch.zone.clear();
        if zone_first {
            self.attend(scratch, true, workspace, (&mut *out, &mut *lse), report)?;
            scratch.zone.extend_from_slice(lse);
        } else {
            scratch.zone.resize(lse.len(), f32::NEG_INFINITY);
        }
        let mut rankings = std::mem::take(&mut scratch.rankings);
        let scored = match self.at_once() {
            true => self.weigh_all(scratch, &mut rankings, workspace, report),
            false => self.score(0, scratch, &mut rankings, workspace, report),
        };
        scratch.rankings = rankings;
        scored?;
        if let Some(table) = self.bounds_beside() {
            let mut bounds = std::mem::take(&mut scratch.bounds);
            let scored = self.score(table, scratch, &mut bounds, workspace, report);
            scratch.bounds = bounds;
            scored?;
        }
        let mut first = true;
        loop {
            let mut any = false;
            for h in 0..self.heads.len() {
                let known = zone_first.then(|| &lse[h * rows..(h + 1) * rows]);
                any |= self.take(h, first, known, scratch);
            }
            if !zone_first {
                return self.attend(scratch, true, workspace, (out, lse), report);
            }
            if any {
                self.attend_more(scratch, workspace, (&mut *out, &mut *lse), report)?;
            }
            first = false;
            if rule.goal.is_none() || !any {
                return Ok(());
            }
        }
    }

    /// The table of bounds, if it is not the one that is scored.
    fn bounds_beside(&self) -> Option<usize> {
        self.retrieval.table(Role::Bound).filter(|&table| table != 0)
    }

    /// Logits of a table's rows, into rankings.
    fn score(
        &self,
        table: usize,
        scratch: &mut ReadScratch,
        rankings: &mut Vec<Ranking>,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rule, rows, tables) = (&self.retrieval.rule, self.rows(), self.index.table(table));
        let role = self.retrieval.summary.tables()[table].role;
        scratch.queries.clear();
        role.queries(self.shape.d_k, self.queries, &mut scratch.queries);
        rankings.resize_with(self.heads.len(), Ranking::default);
        let logits = resize(&mut scratch.logits, rows * total_rows(tables));
        self.backend.dot_scores(
            &self.table_params(role),
            &mut DotArgs {
                heads: tables,
                queries: &scratch.queries,
                tokens: self.positions.len(),
                spans: None,
                out: &mut *logits,
            },
            workspace,
        )?;
        report.bytes += tables.iter().map(|t| store::side_bytes_read(t, Side::Key, None)).sum::<usize>();
        let mut start = 0;
        for (h, (ranking, table)) in rankings.iter_mut().zip(tables).enumerate() {
            let logits = &mut logits[start..start + rows * table.rows()];
            start += logits.len();
            if role == Role::Mean && table.rows() > 0 {
                let corrections = scratch.corrections.get(h * rows..(h + 1) * rows).unwrap_or(&[]);
                for (logits, correction) in logits.chunks_exact_mut(table.rows()).zip(corrections) {
                    logits.iter_mut().for_each(|x| *x += correction);
                }
            }
            let size = |unit| self.index.heads()[h].count(unit);
            let sizes: Option<&dyn Fn(usize) -> usize> = if rule.by_entry { Some(&size) } else { None };
            ranking.set(logits, &scratch.zone[h * rows..(h + 1) * rows], (rule.group, rule.fold), sizes);
        }
        Ok(())
    }

    /// Whether one attention over the means of all units gives both what ranks them and what the tail needs.
    fn at_once(&self) -> bool {
        let rule = &self.retrieval.rule;
        self.retrieval.summary.tables()[0].role == Role::Mean
            && rule.tail == Tail::Estimate
            && rule.estimate >= 1.0
            && matches!(rule.group, Group::Max | Group::Sum)
            && self.positions.len() == 1
    }

    /// Attention over the means of all units, into rankings and `scratch.means`.
    fn weigh_all(
        &self,
        scratch: &mut ReadScratch,
        rankings: &mut Vec<Ranking>,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rule, rows, tables) = (&self.retrieval.rule, self.rows(), self.index.table(0));
        let Means { out, lse, shares, there } = &mut scratch.means;
        let shares = resize(shares, rows * total_rows(tables));
        let lse = resize(lse, rows * self.heads.len());
        let lane = AttendLane {
            heads: tables,
            queries: self.queries,
            positions: self.positions,
            share: Share::ALL,
            spans: None,
            out: resize(out, lse.len() * self.shape.d_v),
            lse: &mut *lse,
            mass: Some(&mut *shares),
        };
        self.backend.attend(&self.table_params(Role::Mean), &mut [lane], workspace)?;
        *there = true;
        report.bytes += tables.iter().map(store::bytes_read).sum::<usize>();
        lse.iter_mut().zip(&scratch.corrections).for_each(|(lse, correction)| *lse += correction);
        rankings.resize_with(self.heads.len(), Ranking::default);
        let mut start = 0;
        for (h, (ranking, table)) in rankings.iter_mut().zip(tables).enumerate() {
            let shares = &shares[start..start + rows * table.rows()];
            start += shares.len();
            let size = |unit| self.index.heads()[h].count(unit);
            let sizes: Option<&dyn Fn(usize) -> usize> = if rule.by_entry { Some(&size) } else { None };
            let span = h * rows..(h + 1) * rows;
            let of = (&lse[span.clone()], &scratch.zone[span]);
            ranking.set_shares(shares, of, (rule.group, rule.fold), sizes);
        }
        Ok(())
    }

    /// What every row's logits on means are to be raised by.
    fn correct(&self, corrections: &mut Vec<f32>) {
        corrections.clear();
        if !self.retrieval.rule.correct {
            return;
        }
        let square = self.shape.scale * self.shape.scale;
        let queries = self.queries.chunks_exact(self.shape.d_k).enumerate();
        corrections.extend(queries.map(|(row, query)| {
            // Logarithmic: an exponential of the variance would be exact for normal logits, and ruinous for others.
            (0.5 * square * self.index.spread(row / self.rows()).variance(query)).ln_1p()
        }));
    }

    /// How rows of a table are read: as the layer's, all of them seen.
    fn table_params(&self, role: Role) -> AttentionParams<'_> {
        let (d_k, d_v) = role.dims(self.shape);
        AttentionParams { d_k, d_v, window: None, sink_logits: None, ..AttentionParams::of(self.shape) }
    }

    /// Takes units of a KV head into `scratch.fresh[h]` and `scratch.chosen`; gives whether there were any. `known` is
    /// the log-sum-exp of what its rows have read so far.
    fn take(&self, h: usize, first: bool, known: Option<&[f32]>, scratch: &mut ReadScratch) -> bool {
        let (rule, units) = (&self.retrieval.rule, &self.index.heads()[h]);
        scratch.fresh.resize_with(self.heads.len(), Vec::new);
        let (fresh, chosen) = (&mut scratch.fresh[h], &mut scratch.chosen.units[h]);
        fresh.clear();
        let ranking = &mut scratch.rankings[h];
        let already: usize = chosen.iter().map(|&unit| units.count(unit as usize)).sum();
        let budget = self.budget.saturating_sub(units.zone(self.heads[h].rows()) + already);
        let count = |unit| units.count(unit);
        let mut taken = 0;
        match (rule.goal, known) {
            (Some(goal), Some(known)) if first => {
                // As far as the estimates want it.
                let enough = |ranking: &Ranking| {
                    (0..known.len()).all(|row| {
                        let zone = f64::from(known[row] - ranking.reference(row)).exp();
                        ranking.left(row) <= (1.0 - goal.mass) * (ranking.all(row) + zone)
                    })
                };
                let wanted = |n, ranking: &Ranking| {
                    let wanted = taken + n <= budget && (taken < goal.floor || !enough(ranking));
                    taken += if wanted { n } else { 0 };
                    wanted
                };
                ranking.take(count, wanted, fresh);
            }
            (Some(goal), Some(known)) => {
                // What is left, against what was really read; if it is too much, as much again.
                let judge = scratch.bounds.get(h).filter(|_| goal.certified).unwrap_or(ranking);
                let met = |row: usize| {
                    let slack = if goal.certified { self.slack(h, row) } else { 0.0 };
                    left_share(judge, row, chosen, known[row], slack) <= 1.0 - goal.mass
                };
                if (0..known.len()).all(met) {
                    return false;
                }
                let step = already.max(1).min(budget);
                let wanted = |n, _: &Ranking| {
                    let wanted = taken < step && taken + n <= budget;
                    taken += n;
                    wanted
                };
                ranking.take(count, wanted, fresh);
            }
            _ => {
                let wanted = |n, _: &Ranking| {
                    taken += n;
                    taken <= budget
                };
                ranking.take(count, wanted, fresh);
            }
        }
        chosen.extend_from_slice(fresh);
        chosen.sort_unstable();
        !fresh.is_empty()
    }

    /// Reads the chosen units and, with `zone`, what is always read.
    fn attend(
        &self,
        scratch: &mut ReadScratch,
        zone: bool,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let ReadScratch { spans, slots, chosen, fresh, .. } = scratch;
        let units = if zone { &chosen.units } else { &*fresh };
        for (h, (spans, index)) in spans.iter_mut().zip(self.index.heads()).enumerate() {
            index.spans(&units[h], zone, self.heads[h].rows(), spans, slots);
        }
        self.over_spans(spans, workspace, zone, (out, lse), report)
    }

    fn over_spans(
        &self,
        spans: &[Spans],
        workspace: &mut Workspace,
        sinks: bool,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let mut params = AttentionParams::of(self.shape);
        if !sinks {
            params.sink_logits = None;
        }
        let (heads, queries, positions) = (self.heads, self.queries, self.positions);
        let lane = AttendLane {
            heads,
            queries,
            positions,
            share: Share::ALL,
            spans: Some(spans),
            out,
            lse,
            mass: None,
        };
        self.backend.attend(&params, &mut [lane], workspace)?;
        for (head, spans) in heads.iter().zip(spans) {
            report.entries += spans.rows();
            for side in [Side::Key, Side::Value] {
                report.bytes += store::side_bytes_read(head, side, Some(spans));
            }
        }
        Ok(())
    }

    /// Reads the units taken now and joins them to what was read before.
    fn attend_more(
        &self,
        scratch: &mut ReadScratch,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (mut outs, mut lses) = (std::mem::take(&mut scratch.outs), std::mem::take(&mut scratch.lses));
        resize(&mut outs, 2 * out.len());
        resize(&mut lses, 2 * lse.len());
        let part = (&mut outs[out.len()..2 * out.len()], &mut lses[lse.len()..2 * lse.len()]);
        let mut read = self.attend(scratch, false, workspace, part, report);
        if read.is_ok() {
            read = self.join((&mut outs, &mut lses), (out, lse));
        }
        (scratch.outs, scratch.lses) = (outs, lses);
        read
    }

    /// Merges the second halves of `outs` and `lses` into `out` and `lse`.
    fn join(
        &self,
        (outs, lses): (&mut [f32], &mut [f32]),
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<(), KernelError> {
        outs[..out.len()].copy_from_slice(out);
        lses[..lse.len()].copy_from_slice(lse);
        let (outs, lses) = (&outs[..2 * out.len()], &lses[..2 * lse.len()]);
        self.backend.merge_partials(&mut MergeArgs { parts: 2, d_v: self.shape.d_v, outs, lses, out, lse })
    }

    /// Joins the estimate of what was not read to what was.
    fn estimate(
        &self,
        scratch: &mut ReadScratch,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let Some(table) = self.retrieval.table(Role::Mean) else { return Ok(()) };
        let rows = self.index.table(table);
        self.estimated(scratch, rows);
        let ReadScratch { spans, outs, lses, corrections, means, .. } = scratch;
        resize(outs, 2 * out.len());
        resize(lses, 2 * lse.len());
        let lane = AttendLane {
            heads: rows,
            queries: self.queries,
            positions: self.positions,
            share: Share::ALL,
            spans: Some(spans),
            out: &mut outs[out.len()..2 * out.len()],
            lse: &mut lses[lse.len()..2 * lse.len()],
            mass: None,
        };
        self.backend.attend(&self.table_params(Role::Mean), &mut [lane], workspace)?;
        for (rows, spans) in rows.iter().zip(&*spans) {
            for side in [Side::Key, Side::Value] {
                report.bytes += store::side_bytes_read(rows, side, Some(spans));
            }
        }
        let part = (&mut outs[out.len()..2 * out.len()], &mut lses[lse.len()..2 * lse.len()]);
        part.1.iter_mut().zip(&*corrections).for_each(|(lse, correction)| *lse += correction);
        if means.there {
            subtract(means, self.shape.d_v, part);
        }
        let total: f64 = lses[lse.len()..2 * lse.len()].iter().zip(&*lse).map(|(&e, &x)| share(e, x)).sum();
        report.missing = Some((total / lse.len() as f64) as f32);
        self.join((outs, lses), (out, lse))
    }

    /// The rows of means to attend over, as spans: of the units that the tail covers; or of those that were read, where
    /// attention over all of them is there to take these from.
    fn estimated(&self, scratch: &mut ReadScratch, rows: &[HeadRows]) {
        let ReadScratch { spans, chosen, rankings, fresh, means, .. } = scratch;
        let estimate = self.retrieval.rule.estimate;
        for (h, spans) in spans.iter_mut().enumerate() {
            let (chosen, units) = (&chosen.units[h], rows[h].rows());
            spans.clear();
            if means.there {
                chosen.iter().for_each(|&unit| spans.push(unit as usize..unit as usize + 1));
            } else if estimate < 1.0
                && self.index.heads()[h].units() > 0
                && chosen.len() < units
                && rankings.len() > h
            {
                let mut left = (estimate * units as f64) as usize;
                let next = |_, _: &Ranking| {
                    let more = left > 0;
                    left = left.saturating_sub(1);
                    more
                };
                fresh.resize_with(rows.len(), Vec::new);
                rankings[h].take(|_| 1, next, &mut fresh[h]);
                fresh[h].iter().for_each(|&unit| spans.push(unit as usize..unit as usize + 1));
            } else {
                let mut from = 0;
                for &unit in chosen {
                    spans.push(from..unit as usize);
                    from = unit as usize + 1;
                }
                spans.push(from..units);
            }
        }
    }

    /// What the rankings say of the units that were not read.
    fn account(&self, scratch: &ReadScratch, lse: &[f32], report: &mut ReadReport) {
        let (rule, rows) = (&self.retrieval.rule, self.rows());
        let roles = self.retrieval.summary.tables();
        let each = |rankings: &[Ranking], slack: &dyn Fn(usize, usize) -> f64, add: &mut dyn FnMut(f64)| {
            for (h, ranking) in rankings.iter().enumerate() {
                for row in 0..rows {
                    let chosen = &scratch.chosen.units[h];
                    add(left_share(ranking, row, chosen, lse[h * rows + row], slack(h, row)));
                }
            }
        };
        if roles[0].role == Role::Mean && rule.tail == Tail::Ignore {
            let mut total = 0.0;
            each(&scratch.rankings, &|_, _| 0.0, &mut |share| total += share);
            report.missing = Some((total / lse.len() as f64) as f32);
        }
        let bounds = match roles[0].role {
            Role::Bound => &scratch.rankings,
            Role::Mean if self.bounds_beside().is_some() => &scratch.bounds,
            Role::Mean => return,
        };
        let mut most = 0.0f64;
        each(bounds, &|h, row| self.slack(h, row), &mut |share| most = most.max(share));
        // Rounded up to the next number that the report can hold.
        report.missing_at_most = Some(((most + LEAST) as f32).next_up().min(1.0));
    }

    /// How much a logit on a row of bounds, and the log-sum-exp it is compared with, may be off in row `row` of a KV
    /// head: the tolerance of the kernels, in the worst direction.
    fn slack(&self, h: usize, row: usize) -> f64 {
        let Some(table) = self.retrieval.table(Role::Bound) else { return 0.0 };
        let d_k = self.shape.d_k;
        let query = &self.queries[(h * self.rows() + row) * d_k..][..d_k];
        let norm = query.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let rows = self.index.table(table).iter().chain(self.heads);
        let packed = rows.flat_map(|head| &head.segments).any(|s| !s.layout.is_exact());
        let tolerance = if packed { PACKED_TOLERANCE } else { LOGIT_TOLERANCE };
        // A logit is at most this: `[q, |q|]` is longer than `q` by √2.
        let logit = std::f64::consts::SQRT_2 * norm * f64::from(self.index.norm(table, h));
        2.0 * tolerance * (1.0 + logit * f64::from(self.shape.scale.abs()))
    }
}

/// Turns attention over some rows (`part`: outputs and log-sum-exp) into attention over all others, given attention
/// over all.
fn subtract(all: &Means, d_v: usize, (out, lse): (&mut [f32], &mut [f32])) {
    for (row, (out, lse)) in out.chunks_exact_mut(d_v).zip(lse).enumerate() {
        let (all_out, all_lse) = (&all.out[row * d_v..(row + 1) * d_v], all.lse[row]);
        let taken = (f64::from(*lse) - f64::from(all_lse)).exp();
        let left = 1.0 - taken;
        // Below, what is left is as small as the rounding of what it is the difference of.
        if left.is_nan() || left < 1e-5 {
            *lse = f32::NEG_INFINITY;
            continue;
        }
        let (taken, share) = (taken as f32, (1.0 / left) as f32);
        out.iter_mut().zip(all_out).for_each(|(o, a)| *o = (a - taken * *o) * share);
        *lse = all_lse + left.ln() as f32;
    }
}

/// `e^a / (e^a + e^b)`.
fn share(a: f32, b: f32) -> f64 {
    if a == f32::NEG_INFINITY {
        return 0.0;
    }
    1.0 / (1.0 + (f64::from(b) - f64::from(a)).exp())
}

/// The share of a row's mass on the units that are not `chosen` (ascending), given the log-sum-exp of what was read and
/// by how much their logits may be too low.
fn left_share(ranking: &Ranking, row: usize, chosen: &[u32], lse: f32, slack: f64) -> f64 {
    let left = ranking.left_exactly(row, chosen);
    if left <= 0.0 {
        return 0.0;
    }
    let logit = left.ln() + f64::from(ranking.reference(row)) + slack;
    1.0 / (1.0 + (f64::from(lse) - logit).exp())
}
