//! What was not read: its estimate from means, and what is said of how much it would have weighed.

use super::super::scratch::resize;
use super::reader::Reader;
use super::{ReadReport, ReadScratch};
use crate::device::HeadRows;
use crate::device::page::Side;
use crate::error::KernelError;
use crate::index::choose::Ranking;
use crate::index::{Role, Tail};
use crate::kernel::attend::{AttendLane, LOGIT_TOLERANCE, PACKED_TOLERANCE, Share, Workspace};
use crate::store;

/// Added to every bound: weights too small for a normal number count as none.
const LEAST: f64 = 1e-30;

/// Attention over the means of all units.
#[derive(Debug, Default)]
pub(super) struct Means {
    pub(super) out: Vec<f32>,
    pub(super) lse: Vec<f32>,
    pub(super) shares: Vec<f32>,
    /// Whether it is this step's.
    pub(super) there: bool,
}
impl Reader<'_> {
    /// What every row's logits on means are to be raised by.
    pub(super) fn correct(&self, corrections: &mut Vec<f32>) {
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

    /// Joins the estimate of what was not read to what was.
    pub(super) fn estimate(
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
            report.bytes += spans.rows() * (size_of::<i32>() + size_of::<f32>());
            for side in [Side::Key, Side::Value] {
                report.bytes += store::side_bytes_read(rows, side, Some(spans));
            }
        }
        let part = (&mut outs[out.len()..2 * out.len()], &mut lses[lse.len()..2 * lse.len()]);
        part.1.iter_mut().zip(&*corrections).for_each(|(lse, correction)| *lse += correction);
        if means.there {
            subtract(means, self.shape.d_v, part);
        }
        if report.missing.is_none() {
            let parts = lses[lse.len()..2 * lse.len()].iter().zip(&*lse);
            let total: f64 = parts.map(|(&estimated, &read)| share(estimated, read)).sum();
            report.missing = Some((total / lse.len() as f64) as f32);
        }
        self.join((outs, lses), (out, lse))
    }

    /// The rows of means to attend over, as spans: of the units that the tail covers; or of those that were read, where
    /// attention over all of them is there to take these from.
    fn estimated(&self, scratch: &mut ReadScratch, rows: &[HeadRows]) {
        let ReadScratch { spans, chosen, rankings, fresh, means, ranked, .. } = scratch;
        let estimate = self.retrieval.rule.estimate;
        for (h, spans) in spans.iter_mut().enumerate() {
            let (chosen, units) = (&chosen.units[h], rows[h].rows());
            spans.clear();
            if means.there {
                chosen.iter().for_each(|&unit| spans.push(unit as usize..unit as usize + 1));
            } else if estimate < 1.0 && self.index.heads()[h].units() > 0 && chosen.len() < units && *ranked {
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
    pub(super) fn account(&self, scratch: &ReadScratch, lse: &[f32], report: &mut ReadReport) {
        let (rule, rows) = (&self.retrieval.rule, self.rows());
        let roles = self.retrieval.summary.tables();
        // Groups that were not looked into weigh what they weigh.
        let groups = self.thresholds.is_some() && self.retrieval.table(Role::Group).is_some();
        let each = |rankings: &[Ranking], slack: &dyn Fn(usize, usize) -> f64, add: &mut dyn FnMut(f64)| {
            for (h, ranking) in rankings.iter().enumerate() {
                for row in 0..rows {
                    let chosen = &scratch.chosen.units[h];
                    let beside = if groups { scratch.zone[h * rows + row] } else { f32::NEG_INFINITY };
                    add(left_share(ranking, row, chosen, (lse[h * rows + row], beside), slack(h, row)));
                }
            }
        };
        // A tail that covers a part of the units knows of that part only.
        let estimates = matches!(roles[0].role, Role::Mean | Role::Code(_));
        if estimates && (rule.tail == Tail::Ignore || rule.estimate < 1.0) {
            let mut total = 0.0;
            each(&scratch.rankings, &|_, _| 0.0, &mut |share| total += share);
            report.missing = Some((total / lse.len() as f64) as f32);
        }
        let bounds = match roles[0].role {
            Role::Bound => &scratch.rankings,
            _ if self.bounds_beside().is_some() => &scratch.bounds,
            Role::Mean | Role::Group | Role::Code(_) => return,
        };
        let mut most = 0.0f64;
        each(bounds, &|h, row| self.slack(h, row), &mut |share| most = most.max(share));
        // Rounded up to the next number that the report can hold.
        report.missing_at_most = Some(((most + LEAST) as f32).next_up().min(1.0));
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
