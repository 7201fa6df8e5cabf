//! Scores, chooses and attends.

use super::super::factored::{self, FactoredScratch};
use super::super::scratch::resize;
use super::refine::Refined;
use super::tail::left_share;
use super::{PartScratch, ReadReport};
use crate::backend::Backend;
use crate::device::page::Side;
use crate::device::{HeadRows, Pool};
use crate::error::KernelError;
use crate::geometry::LayerShape;
use crate::index::choose::Ranking;
use crate::index::{
    Codebook, Group, HeadUnits, IndexPart, ReadRule, Retrieval, Role, Tail, Thresholds, windowed,
};
use crate::kernel::attend::{AttendLane, Share, Workspace};
use crate::kernel::attend_factored::Remembered;
use crate::kernel::code_scores::{CodeArgs, CodeLayout};
use crate::kernel::dot_scores::DotArgs;
use crate::kernel::merge_partials::MergeArgs;
use crate::kernel::simd::take;
use crate::kernel::simd::weights::{best, raise};
use crate::kernel::{AttentionParams, Spans, total_rows};
use crate::store;
use std::ops::Range;

/// Logits of units below which what is made of them is left to one thread: waking another takes as long.
const SPREAD_MIN: usize = 1 << 13;

/// One layer of one sequence and its queries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) shape: &'a LayerShape,
    pub(super) retrieval: &'a Retrieval,
    pub(super) heads: &'a [HeadRows],
    pub(super) index: IndexPart<'a>,
    /// `[Hq, T, d_k]`.
    pub(super) queries: &'a [f32],
    pub(super) positions: &'a [i32],
    /// Entries of each KV head to read.
    pub(super) budget: usize,
    /// Where a threshold decides, what it is.
    pub(super) thresholds: Option<Thresholds>,
    /// Sink logits of the query heads.
    pub(super) sinks: Option<&'a [f32]>,
}

/// The groups of a KV head, its spans, what is lent, what is left in each row, the units, and those that are looked into.
type LookedUp<'a> =
    (((((&'a Ranking, &'a mut Spans), &'a mut Vec<u32>), &'a mut [f32]), &'a HeadUnits), &'a mut Vec<u32>);

/// The ranking of a KV head, units taken now, all that are chosen, and these as the ranking counts them.
type Taking<'a> = (((&'a mut Ranking, &'a mut Vec<u32>), &'a mut Vec<u32>), &'a mut Vec<u32>);

impl<'a> Reader<'a> {
    /// Attention over what the index chooses into `out [Hq, T, d_v]` and `lse [Hq, T]`; the choice stays in
    /// `scratch.chosen`. With `held`, over what was chosen before.
    ///
    /// # Errors
    /// [`KernelError`].
    pub(super) fn stages(
        &self,
        held: Option<&[Vec<u32>]>,
        (scratch, workspace): (&mut PartScratch, &mut Workspace),
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<ReadReport, KernelError> {
        let mut report = ReadReport { stored: total_rows(self.heads), ..ReadReport::default() };
        self.prepare(scratch);
        scratch.ranked = held.is_none();
        if let Some(held) = held {
            scratch.chosen.iter_mut().zip(held).for_each(|(chosen, held)| chosen.clone_from(held));
            self.attend(scratch, true, workspace, (out, lse), &mut report)?;
        } else {
            self.choose(scratch, workspace, (&mut *out, &mut *lse), &mut report)?;
        }
        report.units = scratch.chosen.iter().map(Vec::len).sum();
        if held.is_none() {
            self.account(scratch, lse, &mut report);
        }
        if self.retrieval.rule.tail == Tail::Estimate {
            self.estimate(scratch, workspace, (out, lse), &mut report)?;
        }
        Ok(report)
    }

    /// Buffers for every KV head, and what does not depend on units.
    fn prepare(&self, scratch: &mut PartScratch) {
        let PartScratch { spans, slots, fresh, chosen, looked, taken, .. } = scratch;
        spans.resize_with(self.heads.len(), Spans::default);
        slots.resize_with(self.heads.len(), Vec::new);
        for lists in [fresh, chosen, looked, taken] {
            lists.resize_with(self.heads.len(), Vec::new);
        }
        self.correct(scratch);
    }

    /// What units weigh, or where there is a `table` of groups what these do, against one another and nothing else: into
    /// `scratch.rankings`. Units in groups that are not looked into are not ranked.
    pub(super) fn weigh(
        &self,
        table: Option<usize>,
        scratch: &mut PartScratch,
        workspace: &mut Workspace,
    ) -> Result<(), KernelError> {
        self.prepare(scratch);
        scratch.zone.clear();
        scratch.zone.resize(self.heads.len() * self.rows(), f32::NEG_INFINITY);
        self.rank(table, scratch, workspace, &mut ReadReport::default())
    }

    /// The same of a table, or of units in groups that are looked into; against what `scratch.zone` says too.
    fn rank(
        &self,
        table: Option<usize>,
        scratch: &mut PartScratch,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let mut rankings = std::mem::take(&mut scratch.rankings);
        let scored = match (table, self.groups()) {
            (None, Some(groups)) => self.look_up(groups, scratch, &mut rankings, workspace, report),
            (table, _) => self.score(table.unwrap_or(0), false, scratch, &mut rankings, workspace, report),
        };
        scratch.rankings = rankings;
        scored
    }

    /// The same of some of the KV heads.
    pub(super) fn of_heads(&self, heads: Range<usize>) -> Self {
        let (group, queries) = (self.shape.group(), self.rows() * self.shape.d_k);
        Self {
            heads: &self.heads[heads.clone()],
            index: self.index.part(heads.clone()),
            queries: &self.queries[heads.start * queries..heads.end * queries],
            sinks: self.sinks.map(|sinks| &sinks[heads.start * group..heads.end * group]),
            ..*self
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.shape.group() * self.positions.len()
    }

    /// The score of a unit whose weight is 1 in every row: what thresholds are multiples of.
    pub(super) fn unison(&self) -> f32 {
        if self.retrieval.rule.group == Group::Sum { self.rows() as f32 } else { 1.0 }
    }

    /// Scores, chooses and reads.
    fn choose(
        &self,
        scratch: &mut PartScratch,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rule, rows) = (&self.retrieval.rule, self.rows());
        scratch.chosen.iter_mut().for_each(Vec::clear);
        // A weight is a share of what a row sees, so what it sees anyway comes first; logits need no such measure.
        // Nor do weights that a threshold was made for: those among units.
        let shares = matches!(rule.group, Group::Max | Group::Sum) && rule.calibration.is_none();
        let zone_first = rule.goal.is_some() || shares;
        scratch.zone.clear();
        if zone_first {
            self.attend(scratch, true, workspace, (&mut *out, &mut *lse), report)?;
            scratch.zone.extend_from_slice(lse);
        } else {
            scratch.zone.resize(lse.len(), f32::NEG_INFINITY);
        }
        let groups = self.groups();
        self.rank(None, scratch, workspace, report)?;
        let refines = self.retrieval.residuals();
        if let Some(table) = refines {
            self.refine(table, scratch, workspace, report)?;
        }
        if let Some(table) = self.bounds_beside() {
            let mut bounds = std::mem::take(&mut scratch.bounds);
            let scored = self.score(table, false, scratch, &mut bounds, workspace, report);
            scratch.bounds = bounds;
            scored?;
        }
        let mut first = true;
        loop {
            let PartScratch { rankings, refined, bounds, fresh, chosen, looked, taken, .. } = &mut *scratch;
            let known = |h: usize| zone_first.then(|| &lse[h * rows..(h + 1) * rows]);
            if refines.is_some() {
                let taking = refined.iter_mut().zip(fresh).zip(&mut *chosen).zip(0..);
                self.each(taking, |(((refined, fresh), chosen), h): (((&mut Refined, _), _), usize)| {
                    self.take_refined(h, first, known(h), refined, fresh, chosen);
                });
            } else {
                let taking = rankings.iter_mut().zip(fresh).zip(&mut *chosen).zip(taken).zip(0..);
                self.each(taking, |((((ranking, fresh), chosen), taken), h): (Taking<'_>, usize)| {
                    let units = &self.index.heads()[h];
                    let names = groups.map(|_| &*looked[h]);
                    let count = |unit: usize| units.count(names.map_or(unit, |names| names[unit] as usize));
                    self.take(h, first, known(h), (ranking, bounds.get(h)), count, (fresh, chosen));
                    // Once, because a threshold is asked once.
                    if let Some(names) = names {
                        taken.clone_from(chosen);
                        chosen.iter_mut().for_each(|unit| *unit = names[*unit as usize]);
                    }
                });
            }
            let any = scratch.fresh.iter().any(|fresh| !fresh.is_empty());
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

    /// The table of groups of units and the weight from which on they are looked into, where they are.
    pub(super) fn groups(&self) -> Option<(usize, f32)> {
        self.retrieval.table(Role::Group).zip(self.thresholds.map(|thresholds| thresholds.group))
    }

    /// The table of bounds, if it is not the one that is scored.
    pub(super) fn bounds_beside(&self) -> Option<usize> {
        self.retrieval.table(Role::Bound).filter(|&table| table != 0)
    }

    /// Logits of units in groups whose own weight is enough, into rankings; what the others weigh, into `scratch.zone`.
    fn look_up(
        &self,
        (table, threshold): (usize, f32),
        scratch: &mut PartScratch,
        rankings: &mut Vec<Ranking>,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        self.score(table, false, scratch, rankings, workspace, report)?;
        let rows = self.rows();
        let heads = rankings.iter().zip(&mut scratch.spans).zip(&mut scratch.fresh);
        let heads = heads.zip(scratch.zone.chunks_exact_mut(rows)).zip(self.index.heads());
        let heads = heads.zip(&mut scratch.looked);
        self.each(heads, |(((((ranking, spans), passed), zone), units), looked): LookedUp<'_>| {
            best(ranking.scores(), (threshold * self.unison(), usize::MAX), passed);
            spans.clear();
            looked.clear();
            for &group in &*passed {
                let group = units.group(group as usize);
                looked.extend(group.clone().map(|unit| unit as u32));
                spans.push(group);
            }
            for (row, zone) in zone.iter_mut().enumerate() {
                *zone = ranking.left_exactly(row, passed).ln() as f32 + ranking.reference(row);
            }
        });
        self.score(0, true, scratch, rankings, workspace, report)
    }

    /// Logits of a table's rows, or of those of `scratch.spans` alone, which are the units `scratch.looked`, into rankings.
    pub(super) fn score(
        &self,
        table: usize,
        within: bool,
        scratch: &mut PartScratch,
        rankings: &mut Vec<Ranking>,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rule, rows, tables) = (&self.retrieval.rule, self.rows(), self.index.table(table));
        let role = self.retrieval.summary.tables()[table].role;
        scratch.queries.clear();
        role.queries(self.shape.d_k, self.queries, &mut scratch.queries);
        rankings.resize_with(self.heads.len(), Ranking::default);
        let (spans, looked) = (&scratch.spans, &scratch.looked);
        let scored = |h: usize| if within { spans[h].rows() } else { tables[h].rows() };
        let all = (0..tables.len()).map(scored).sum::<usize>();
        let logits = resize(&mut scratch.logits, rows * all);
        if let Role::Code(layout) = role {
            self.score_codes(layout, tables, None, &mut scratch.queries, logits, workspace)?;
            report.bytes += self.codeword_bytes();
            if let Some(cap) = self.shape.softcap {
                logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
        } else {
            self.backend.dot_scores(
                &self.table_params(role),
                &mut DotArgs {
                    heads: tables,
                    queries: &scratch.queries,
                    tokens: self.positions.len(),
                    spans: within.then_some(&spans[..]),
                    out: &mut *logits,
                },
                workspace,
            )?;
        }
        // A row's β is read with its key.
        report.bytes += all * size_of::<f32>();
        for (table, spans) in tables.iter().zip(spans) {
            report.bytes += store::side_bytes_read(table, Side::Key, within.then_some(spans));
        }
        let mut left = &mut *logits;
        let parts = (0..tables.len()).map(|h| take(&mut left, rows * scored(h)));
        let (corrections, zone) = (&scratch.corrections, &scratch.zone);
        // Units have an entry each, or more, so a budget bounds their number; a threshold bounds none, and a tail that covers
        // the best of the others ranks these too.
        let bounded = rule.calibration.is_none() && rule.estimate >= 1.0;
        let most = if bounded { self.budget.saturating_mul(rule.fold) } else { usize::MAX };
        self.each(
            rankings.iter_mut().zip(parts).zip(0..),
            |((ranking, logits), h): ((&mut Ranking, &mut [f32]), _)| {
                let units = scored(h);
                if role == Role::Mean && units > 0 {
                    let corrections = corrections.get(h * rows..(h + 1) * rows).unwrap_or(&[]);
                    for (logits, correction) in logits.chunks_exact_mut(units).zip(corrections) {
                        raise(logits, *correction);
                    }
                }
                let zone = &zone[h * rows..(h + 1) * rows];
                // Entries are ranked then, by codes, and all units estimated.
                if self.retrieval.residuals().is_some() && rule.estimate >= 1.0 {
                    return ranking.set_weights(logits, zone);
                }
                let head = &self.index.heads()[h];
                let size =
                    |row: usize| head.count_of(role, if within { looked[h][row] as usize } else { row });
                let sizes: Option<&dyn Fn(usize) -> usize> = if rule.by_entry { Some(&size) } else { None };
                ranking.set(logits, zone, (rule.group, rule.fold, most), sizes);
                let first = head.outliers();
                let room = (self.budget as f64 * ReadRule::OUTLIERS) as usize;
                let fit = first.iter().scan(0, |filled, &unit| {
                    *filled += head.count(unit as usize);
                    Some(*filled)
                });
                let fit = fit.take_while(|&filled| filled <= room).count();
                if fit > 0 {
                    ranking.put_first(&first[..fit]);
                }
            },
        );
        Ok(())
    }

    /// Logits of entries, or of those of `spans`, from their codes and before any cap; `memory` holds the queries, and the
    /// tables of codewords behind them.
    pub(super) fn score_codes(
        &self,
        layout: CodeLayout,
        codes: &[HeadRows],
        spans: Option<&[Spans]>,
        memory: &mut Vec<f32>,
        logits: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<(), KernelError> {
        let (rows, d_k) = (self.rows(), self.shape.d_k);
        // A head without entries has learnt nothing, and nothing of it is looked up.
        let books = (0..codes.len()).filter_map(|h| self.index.book(h));
        let levels = books.map(Codebook::levels).max().unwrap_or(1);
        let size = layout.codes * levels;
        if let Some(distance) = self.retrieval.summary.distance() {
            windowed::place(self.backend, self.shape, distance, self.positions, memory)?;
        }
        let asked = memory.len();
        memory.resize(asked + codes.len() * rows * size, 0.0);
        let (queries, memory) = memory.split_at_mut(asked);
        let parts = memory.chunks_exact_mut(rows * size).zip(queries.chunks_exact(rows * d_k)).zip(0..);
        self.each(parts, |((tables, queries), h): ((&mut [f32], &[f32]), usize)| {
            let Some(book) = self.index.book(h) else { return };
            for (query, table) in queries.chunks_exact(d_k).zip(tables.chunks_exact_mut(size)) {
                book.table(query, self.shape.scale, table);
            }
        });
        let (group, tokens) = (self.shape.group(), self.positions.len());
        let args = &mut CodeArgs {
            heads: codes,
            layout,
            levels,
            tables: memory,
            group,
            tokens,
            spans,
            out: &mut *logits,
        };
        self.backend.code_scores(args, workspace)
    }

    /// Bytes of the codewords, which every query is multiplied with.
    pub(super) fn codeword_bytes(&self) -> usize {
        let books = (0..self.index.heads().len()).filter_map(|h| self.index.book(h));
        books.map(|book| book.levels() * book.dims() * size_of::<f32>()).sum()
    }

    /// How rows of a table are read: as the layer's, all of them seen.
    pub(super) fn table_params(&self, role: Role) -> AttentionParams<'_> {
        let (d_k, d_v) = role.dims(self.shape);
        AttentionParams { d_k, d_v, window: None, sink_logits: None, ..AttentionParams::of(self.shape) }
    }

    /// Does something for every KV head, on as many threads as the backend lends.
    pub(super) fn each<T: Send>(
        &self,
        heads: impl Iterator<Item = T> + Send,
        work: impl Fn(T) + Sync + Send,
    ) {
        match self.pool().filter(|pool| pool.threads() > 1 && self.heads.len() > 1) {
            Some(pool) => pool.run(|| spread(heads, &work)),
            None => heads.for_each(work),
        }
    }

    /// The threads, where there is enough for several to do.
    pub(super) fn pool(&self) -> Option<&'a Pool> {
        let units: usize = self.index.heads().iter().map(|head| head.units()).sum();
        let enough = self.rows() * units >= SPREAD_MIN;
        self.backend.workers().filter(|_| enough)
    }

    /// Takes units of a KV head into `fresh`, and into `chosen` with those before. `known` is the log-sum-exp of what its
    /// rows have read so far.
    pub(super) fn take(
        &self,
        h: usize,
        first: bool,
        known: Option<&[f32]>,
        (ranking, bounds): (&mut Ranking, Option<&Ranking>),
        count: impl Fn(usize) -> usize,
        (fresh, chosen): (&mut Vec<u32>, &mut Vec<u32>),
    ) {
        let (rule, units) = (&self.retrieval.rule, &self.index.heads()[h]);
        fresh.clear();
        let already: usize = chosen.iter().map(|&unit| count(unit as usize)).sum();
        let budget = self.budget.saturating_sub(units.zone(self.heads[h].rows()) + already);
        // What a budget is for, in units of average size.
        let expected = budget.min(units.picks()) * ranking.units() / units.picks().max(1);
        // Of units of one size it is known how many fit.
        let alike = match self.retrieval.residuals() {
            Some(_) => Some(1),
            None => self.retrieval.summary.unit().filter(|_| rule.fold == 1),
        };
        let mut taken = 0;
        match (rule.goal, known, self.thresholds.zip(rule.calibration), alike) {
            (_, _, Some((thresholds, calibration)), _) => {
                let most = (self.budget as f64 * calibration.cap) as usize;
                let budget = most.saturating_sub(units.zone(self.heads[h].rows()));
                let threshold = thresholds.unit * self.unison();
                best(ranking.scores(), (threshold, usize::MAX), fresh);
                if fresh.iter().map(|&unit| count(unit as usize)).sum::<usize>() <= budget {
                    chosen.extend_from_slice(fresh);
                    return;
                }
                let wanted = |n, ranking: &Ranking| {
                    taken += n;
                    taken <= budget && ranking.next_score() >= threshold
                };
                let expected = budget.min(units.picks()) * ranking.units() / units.picks().max(1);
                ranking.take(expected, count, wanted, fresh);
            }
            (Some(goal), Some(known), None, _) if first => {
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
                ranking.take(1, count, wanted, fresh);
            }
            (Some(goal), Some(known), None, _) => {
                // What is left, against what was really read; if it is too much, as much again.
                let judge = bounds.filter(|_| goal.certified).unwrap_or(ranking);
                let met = |row: usize| {
                    let slack = if goal.certified { self.slack(h, row) } else { 0.0 };
                    left_share(judge, row, chosen, (known[row], f32::NEG_INFINITY), slack) <= 1.0 - goal.mass
                };
                if (0..known.len()).all(met) {
                    return;
                }
                let step = already.max(1).min(budget);
                let wanted = |n, _: &Ranking| {
                    let wanted = taken < step && taken + n <= budget;
                    taken += n;
                    wanted
                };
                ranking.take(1, count, wanted, fresh);
            }
            (.., Some(size)) => ranking.take_best(budget / size, fresh),
            _ => {
                let wanted = |n, _: &Ranking| {
                    taken += n;
                    taken <= budget
                };
                ranking.take(expected, count, wanted, fresh);
            }
        }
        chosen.extend_from_slice(fresh);
        chosen.sort_unstable();
    }

    /// Reads the chosen units and, with `zone`, what is always read.
    fn attend(
        &self,
        scratch: &mut PartScratch,
        zone: bool,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let PartScratch { spans, slots, chosen, fresh, rebuilt, factored, .. } = scratch;
        let units = if zone { chosen } else { fresh };
        self.each(spans.iter_mut().zip(slots).zip(0..), |((spans, slots), h): ((_, _), usize)| {
            self.index.heads()[h].spans(&units[h], zone, self.heads[h].rows(), spans, slots);
        });
        self.over_spans((spans, rebuilt, factored), workspace, zone, (out, lse), report)
    }

    fn over_spans(
        &self,
        (spans, rebuilt, factored): (&[Spans], &mut [Remembered], &mut FactoredScratch),
        workspace: &mut Workspace,
        sinks: bool,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let sink_logits = self.sinks.filter(|_| sinks);
        let params = AttentionParams { sink_logits, ..AttentionParams::of(self.shape) };
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
        let with = (&mut rebuilt[..], factored, workspace);
        factored::attend(self.backend, &params, lane, with)?;
        for (head, spans) in heads.iter().zip(spans) {
            report.entries += spans.rows();
            report.bytes += spans.rows() * size_of::<i32>() + store::factored_bytes_read(head, Some(spans));
            for side in [Side::Key, Side::Value] {
                report.bytes += store::side_bytes_read(head, side, Some(spans));
            }
        }
        Ok(())
    }

    /// Reads the units taken now and joins them to what was read before.
    fn attend_more(
        &self,
        scratch: &mut PartScratch,
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
    pub(super) fn join(
        &self,
        (outs, lses): (&mut [f32], &mut [f32]),
        (out, lse): (&mut [f32], &mut [f32]),
    ) -> Result<(), KernelError> {
        outs[..out.len()].copy_from_slice(out);
        lses[..lse.len()].copy_from_slice(lse);
        let (outs, lses) = (&outs[..2 * out.len()], &lses[..2 * lse.len()]);
        self.backend.merge_partials(&mut MergeArgs { parts: 2, d_v: self.shape.d_v, outs, lses, out, lse })
    }
}

/// Does something with every item: this thread with the first, whichever is free with the others.
fn spread<T: Send>(mut items: impl Iterator<Item = T> + Send, work: &(impl Fn(T) + Sync)) {
    if let Some(item) = items.next() {
        rayon::join(|| work(item), || spread(items, work));
    }
}
