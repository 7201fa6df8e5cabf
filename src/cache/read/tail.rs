//! What was not read: its estimate from means, and what is said of how much it would have weighed.

use super::super::scratch::resize;
use super::reader::Reader;
use super::refine::Refined;
use super::{PartScratch, ReadReport};
use crate::device::page::Side;
use crate::error::KernelError;
use crate::index::choose::Ranking;
use crate::index::{Role, Tail};
use crate::kernel::attend::{LOGIT_TOLERANCE, PACKED_TOLERANCE, Workspace};
use crate::kernel::simd::weights::{scale, sum, sum_runs};
use crate::kernel::total_rows;
use crate::kernel::weigh_values::WeighArgs;
use crate::store;

/// Added to every bound: weights too small for a normal number count as none.
const LEAST: f64 = 1e-30;

/// Weights and references of a KV head to be made, what is lent, which head, and its refined units.
type Left<'a> = ((((&'a mut [f32], &'a mut [f32]), &'a mut Vec<u32>), usize), Option<&'a mut Refined>);

impl Reader<'_> {
    /// How far every row's logits vary within units, and what logits on means are to be raised by; behind, the same of
    /// codes within units, if there are any.
    pub(super) fn correct(&self, scratch: &mut PartScratch) {
        let (rows, kinds) = (self.rows(), 1 + usize::from(self.retrieval.residuals().is_some()));
        let correct = self.retrieval.rule.correct;
        let lines = if correct || kinds > 1 { kinds * self.heads.len() * rows } else { 0 };
        let variances = resize(&mut scratch.variances, lines);
        let corrections = resize(&mut scratch.corrections, if correct { lines } else { 0 });
        let queries = self.queries.chunks_exact(rows * self.shape.d_k).cycle();
        let heads = (0..2).flat_map(|kind| (0..self.heads.len()).map(move |h| (kind, h)));
        self.each(variances.chunks_exact_mut(rows).zip(queries).zip(heads), |((out, queries), (kind, h))| {
            let spread = if kind == 0 { self.index.spread(h) } else { self.index.code_spread(h) };
            spread.variances(queries, out);
        });
        // Logarithmic: an exponential of the variance would be exact for normal logits, and ruinous for others.
        let half = 0.5 * self.shape.scale * self.shape.scale;
        corrections.iter_mut().zip(variances).for_each(|(x, variance)| *x = (half * *variance).ln_1p());
    }

    /// Joins the estimate of what was not read to what was: the mean values of units, each with the weight that its
    /// members that were not read are taken to have.
    pub(super) fn estimate(
        &self,
        scratch: &mut PartScratch,
        workspace: &mut Workspace,
        (out, lse): (&mut [f32], &mut [f32]),
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let Some(table) = self.retrieval.table(Role::Mean) else { return Ok(()) };
        let (rows, d_v, tables) = (self.rows(), self.shape.d_v, self.index.table(table));
        // What ranked this step's choice tells of all units, unless it looked into some groups of them only.
        let own = scratch.ranked && table == 0 && self.groups().is_none();
        if !own {
            scratch.zone.clear();
            scratch.zone.resize(lse.len(), f32::NEG_INFINITY);
            let mut rankings = std::mem::take(&mut scratch.rankings);
            let scored = self.score(table, false, scratch, &mut rankings, workspace, report);
            scratch.rankings = rankings;
            scored?;
        }
        let PartScratch { rankings, refined, chosen, fresh, weights, references, outs, lses, .. } = scratch;
        let weights = resize(weights, rows * total_rows(tables));
        let references = resize(references, lse.len());
        let mut left = &mut *weights;
        let parts = tables.iter().map(|table| {
            let (part, behind) = std::mem::take(&mut left).split_at_mut(rows * table.rows());
            left = behind;
            part
        });
        let parts = parts.zip(references.chunks_exact_mut(rows)).zip(fresh).zip(0..);
        let (rankings, chosen) = (&*rankings, &*chosen);
        let refines = own && self.retrieval.residuals().is_some();
        let mut refined = refined.iter_mut();
        let parts = parts.map(|part| (part, refined.next().filter(|_| refines)));
        self.each(parts, |((((weights, references), rest), h), refined): Left<'_>| {
            self.left_weights(h, &rankings[h], refined, &chosen[h], (&mut *weights, references));
            if self.retrieval.rule.estimate < 1.0 {
                self.keep_best(&rankings[h], &chosen[h], weights, rest);
            }
        });
        resize(outs, 2 * out.len());
        resize(lses, 2 * lse.len());
        let part = (&mut outs[out.len()..2 * out.len()], &mut lses[lse.len()..2 * lse.len()]);
        let args = &mut WeighArgs { heads: tables, rows, weights, out: &mut *part.0, d_v };
        self.backend.weigh_values(args, workspace)?;
        report.bytes +=
            tables.iter().map(|table| store::side_bytes_read(table, Side::Value, None)).sum::<usize>();
        let lines = tables.iter().flat_map(|table| std::iter::repeat_n(table.rows(), rows));
        let outs_and_lses = part.0.chunks_exact_mut(d_v).zip(part.1).zip(&*references);
        let mut rest = &*weights;
        for (units, ((out, lse), reference)) in lines.zip(outs_and_lses) {
            let (line, behind) = rest.split_at(units);
            rest = behind;
            let total = sum(line);
            let share = if total > 0.0 { (1.0 / total) as f32 } else { 0.0 };
            out.iter_mut().for_each(|x| *x *= share);
            *lse = if total > 0.0 { reference + total.ln() as f32 } else { f32::NEG_INFINITY };
        }
        if report.missing.is_none() {
            let parts = lses[lse.len()..2 * lse.len()].iter().zip(&*lse);
            let total: f64 = parts.map(|(&estimated, &read)| share(estimated, read)).sum();
            report.missing = Some((total / lse.len() as f64) as f32);
        }
        self.join((outs, lses), (out, lse))
    }

    /// Weights of the units of a KV head without what was read of them: `[rows, units]`, relative to `references [rows]`.
    fn left_weights(
        &self,
        h: usize,
        ranking: &Ranking,
        mut refined: Option<&mut Refined>,
        chosen: &[u32],
        (weights, references): (&mut [f32], &mut [f32]),
    ) {
        let units = &self.index.heads()[h];
        if units.units() == 0 {
            return;
        }
        if let Some(Refined { ranking, taken, .. }) = &mut refined {
            ranking.spend(taken);
        }
        for (row, (line, reference)) in weights.chunks_exact_mut(units.units()).zip(references).enumerate() {
            line.copy_from_slice(ranking.weights(row));
            *reference = ranking.reference(row);
            if let Some(refined) = &mut refined {
                let (of_units, of_entries) = (*reference, refined.ranking.reference(row));
                *reference = of_units.max(of_entries);
                if of_units < *reference {
                    scale(line, (of_units - *reference).exp());
                }
                let factor = (of_entries - *reference).exp();
                sum_runs(refined.ranking.weights(row), &refined.ends, &mut refined.sums);
                for (&unit, left) in refined.units.iter().zip(&refined.sums) {
                    line[unit as usize] = factor * left;
                }
            } else if self.retrieval.residuals().is_some() {
                // A choice of another step: which of a unit's entries weigh more is not known now.
                for taken in chosen.chunk_by(|&a, &b| units.unit_of(a as usize) == units.unit_of(b as usize))
                {
                    let unit = units.unit_of(taken[0] as usize);
                    let count = units.count(unit);
                    line[unit] *= (count - taken.len()) as f32 / count as f32;
                }
            } else {
                chosen.iter().for_each(|&unit| line[unit as usize] = 0.0);
            }
        }
    }

    /// Leaves only the share of the units that the tail covers: the best of those that are not `chosen`.
    /// `rest` is lent.
    fn keep_best(&self, ranking: &Ranking, chosen: &[u32], weights: &mut [f32], rest: &mut Vec<u32>) {
        let scores = ranking.scores();
        let fold = ranking.units().div_ceil(scores.len().max(1)).max(1);
        rest.clear();
        rest.extend(0..ranking.units() as u32);
        if self.retrieval.residuals().is_none() {
            let mut chosen = chosen.iter().peekable();
            rest.retain(|unit| chosen.next_if_eq(&unit).is_none());
        }
        let keep = (self.retrieval.rule.estimate * ranking.units() as f64) as usize;
        if keep >= rest.len() {
            return;
        }
        let score = |unit: u32| scores[unit as usize / fold];
        rest.select_nth_unstable_by(keep, |&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        for line in weights.chunks_exact_mut(ranking.units().max(1)) {
            rest[keep..].iter().for_each(|&unit| line[unit as usize] = 0.0);
        }
    }

    /// What the rankings say of the units that were not read.
    pub(super) fn account(&self, scratch: &mut PartScratch, lse: &[f32], report: &mut ReadReport) {
        let rule = &self.retrieval.rule;
        let roles = self.retrieval.summary.tables();
        let PartScratch { rankings, bounds, refined, chosen, taken, zone, shares, .. } = scratch;
        // Groups that were not looked into weigh what they weigh.
        let groups = self.groups().is_some();
        let beside = |row: usize| if groups { zone[row] } else { f32::NEG_INFINITY };
        // A tail that covers a part of the units knows of that part only.
        let estimates = matches!(roles[0].role, Role::Mean | Role::Code(_));
        if estimates && (rule.tail == Tail::Ignore || rule.estimate < 1.0) {
            let choice = |h: usize| match self.retrieval.residuals() {
                Some(_) => (&refined[h].ranking, &*refined[h].taken),
                None if groups => (&rankings[h], &*taken[h]),
                None => (&rankings[h], &*chosen[h]),
            };
            self.shares(choice, |row| (lse[row], beside(row)), |_, _| 0.0, shares);
            report.missing = Some((shares.iter().sum::<f64>() / lse.len() as f64) as f32);
        }
        let bounds = match roles[0].role {
            Role::Bound => &*rankings,
            _ if self.bounds_beside().is_some() => &*bounds,
            Role::Mean | Role::Group | Role::Code(_) | Role::Residual(_) => return,
        };
        let choice = |h: usize| (&bounds[h], &*chosen[h]);
        self.shares(choice, |row| (lse[row], beside(row)), |h, row| self.slack(h, row), shares);
        let most = shares.iter().copied().fold(0.0, f64::max);
        // Rounded up to the next number that the report can hold.
        report.missing_at_most = Some(((most + LEAST) as f32).next_up().min(1.0));
    }

    /// [`left_share`] of every row.
    fn shares<'r>(
        &self,
        choice: impl Fn(usize) -> (&'r Ranking, &'r [u32]) + Sync,
        seen: impl Fn(usize) -> (f32, f32) + Sync,
        slack: impl Fn(usize, usize) -> f64 + Sync,
        out: &mut Vec<f64>,
    ) {
        let rows = self.rows();
        out.resize(self.heads.len() * rows, 0.0);
        self.each(out.chunks_exact_mut(rows).zip(0..), |(out, h): (&mut [f64], usize)| {
            let (ranking, chosen) = choice(h);
            for (row, out) in out.iter_mut().enumerate() {
                *out = left_share(ranking, row, chosen, seen(h * rows + row), slack(h, row));
            }
        });
    }

    /// How much a logit on a row of bounds, and the log-sum-exp it is compared with, may be off in row `row` of a KV
    /// head: the tolerance of the kernels, in the worst direction.
    pub(super) fn slack(&self, h: usize, row: usize) -> f64 {
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

/// `e^a / (e^a + e^b)`.
fn share(a: f32, b: f32) -> f64 {
    if a == f32::NEG_INFINITY {
        return 0.0;
    }
    1.0 / (1.0 + (f64::from(b) - f64::from(a)).exp())
}

/// The share of a row's mass on the units that are not `chosen` (ascending), given the log-sum-exp of what was read, that
/// of what else was not, and by how much their logits may be too low.
pub(super) fn left_share(
    ranking: &Ranking,
    row: usize,
    chosen: &[u32],
    (lse, beside): (f32, f32),
    slack: f64,
) -> f64 {
    let beside = (f64::from(beside) - f64::from(ranking.reference(row))).exp();
    let left = ranking.left_exactly(row, chosen) + beside;
    if left <= 0.0 {
        return 0.0;
    }
    let logit = left.ln() + f64::from(ranking.reference(row)) + slack;
    1.0 / (1.0 + (f64::from(lse) - logit).exp())
}
