//! Entries chosen out of units: the heaviest units are looked into, by codes of what their entries' keys have beside the
//! units' means.
//!
//! *Helps* twice: single entries are found where a unit would bring its other members along, and what is left of a unit is
//! weighed entry by entry. *Hurts* by a code per entry, of which a step reads those of the heaviest units.

use super::super::scratch::resize;
use super::reader::Reader;
use super::{PartScratch, ReadReport};
use crate::error::KernelError;
use crate::index::HeadUnits;
use crate::index::choose::Ranking;
use crate::kernel::Spans;
use crate::kernel::attend::Workspace;
use crate::kernel::code_scores::CodeLayout;
use crate::kernel::simd::weights::{add_less, raise_runs};

/// The entries of the heaviest units of a KV head.
#[derive(Debug, Default)]
pub(super) struct Refined {
    /// The units, ascending.
    pub(super) units: Vec<u32>,
    /// Where the entries of each end among those of all of them.
    pub(super) ends: Vec<u32>,
    /// Their entries; the other units weigh beside them.
    pub(super) ranking: Ranking,
    /// Entries that are chosen, ascending, as the ranking counts them.
    pub(super) taken: Vec<u32>,
    /// The units as they are looked for, and their logits.
    heaviest: Ranking,
    promised: Vec<f32>,
    /// What the logit of each unit's mean is without the number of its members.
    means: Vec<f32>,
    /// Of each unit in one row, what its entries weigh together.
    pub(super) sums: Vec<f32>,
    /// Logarithm of what every row has on the other units, and of that and what it sees anyway.
    beside: Vec<f32>,
    seen: Vec<f32>,
}

/// Those of a KV head, with logits of entries from codes and of units.
type RefinedLogits<'a> = (&'a mut Refined, (&'a mut [f32], &'a [f32]));

impl Refined {
    /// Looks into a `share` of the units, the heaviest, or into as many as have `least` entries; `spans` become the rows of
    /// their codes.
    fn look_into(&mut self, units: &HeadUnits, (share, least): (f64, usize), spans: &mut Spans) {
        let heaviest = &mut self.heaviest;
        heaviest.take_best((share * units.units() as f64) as usize, &mut self.units);
        let entries: usize = self.units.iter().map(|&unit| units.count(unit as usize)).sum();
        if entries < least {
            let (mut entries, expected) = (0, least * units.units() / units.picks().max(1));
            let more = |n, _: &Ranking| {
                let more = entries < least;
                entries += n;
                more
            };
            heaviest.restart();
            heaviest.take(expected, |unit| units.count(unit), more, &mut self.units);
        }
        self.taken.clear();
        self.ends.clear();
        spans.clear();
        for &unit in &self.units {
            spans.push(units.picks_of(unit as usize));
            self.ends.push(spans.rows() as u32);
        }
    }

    /// Turns entries as the ranking counts them (ascending) into entries as the index does.
    fn name(&self, units: &HeadUnits, entries: &mut [u32]) {
        let (mut own, mut start, mut first) =
            (0, 0, self.units.first().map_or(0, |&unit| units.picks_of(unit as usize).start));
        for entry in entries {
            while self.ends[own] <= *entry {
                start = self.ends[own];
                own += 1;
                first = units.picks_of(self.units[own] as usize).start;
            }
            *entry = first as u32 + *entry - start;
        }
    }
}

impl Reader<'_> {
    /// Logits of the entries of the heaviest units from their codes, into `scratch.refined`.
    pub(super) fn refine(
        &self,
        (table, layout): (usize, CodeLayout),
        scratch: &mut PartScratch,
        workspace: &mut Workspace,
        report: &mut ReadReport,
    ) -> Result<(), KernelError> {
        let (rows, heads) = (self.rows(), self.index.heads());
        let PartScratch { rankings, refined, spans, scores, queries, logits, zone, variances, .. } = scratch;
        let (zone, variances) = (&**zone, &**variances);
        refined.resize_with(heads.len(), Refined::default);
        let mut of_units = &**logits;
        let looking = refined.iter_mut().zip(&mut *spans).zip(heads).zip(0..).map(|(refined, h)| {
            let (own, behind) = of_units.split_at(rows * refined.1.units());
            of_units = behind;
            (refined, own, h)
        });
        self.each(
            looking,
            |(((refined, spans), units), logits, h): (((&mut Refined, _), &HeadUnits), &[f32], usize)| {
                let own = h * rows..(h + 1) * rows;
                self.promise(h, logits, (&zone[own.clone()], &variances[own]), refined);
                let least = self.budget.min(units.picks());
                let share = self.retrieval.rule.widen * least as f64 / units.picks().max(1) as f64;
                refined.look_into(units, (share, least), spans);
            },
        );
        let entries: usize = spans.iter().map(Spans::rows).sum();
        let scores = resize(scores, rows * entries);
        queries.clear();
        queries.extend_from_slice(self.queries);
        self.score_codes(layout, self.index.table(table), Some(spans), queries, scores, workspace)?;
        report.bytes += entries * layout.words() * size_of::<u32>() + self.codeword_bytes();
        let (mut scores, mut logits) = (scores, &**logits);
        let parts = spans.iter().zip(heads).map(|(spans, units)| {
            let (part, behind) = std::mem::take(&mut scores).split_at_mut(rows * spans.rows());
            let (of_units, rest) = logits.split_at(rows * units.units());
            (scores, logits) = (behind, rest);
            (part, of_units)
        });
        let (corrections, of_codes) = scratch.corrections.split_at(scratch.corrections.len() / 2);
        let rankings = &*rankings;
        self.each(
            refined.iter_mut().zip(parts).zip(0..),
            |((refined, (scores, logits)), h): (RefinedLogits<'_>, usize)| {
                let of = |all: &[f32], row| all.get(h * rows + row).copied().unwrap_or(0.0);
                let (units, ranking) = (&heads[h], &rankings[h]);
                let Refined { units: looked, ends, means, beside, seen, .. } = refined;
                let entries = scores.len() / rows;
                for (row, scores) in scores.chunks_exact_mut(entries.max(1)).enumerate() {
                    let logits = &logits[row * units.units()..(row + 1) * units.units()];
                    let (around, within) = (of(corrections, row), of(of_codes, row));
                    // A mean's logit is of all members together.
                    let mean =
                        |&unit: &u32| logits[unit as usize] - around - units.logarithms()[unit as usize];
                    means.clear();
                    match self.shape.softcap {
                        None => {
                            means.extend(looked.iter().map(|unit| mean(unit) + within));
                            raise_runs(scores, ends, means);
                        }
                        Some(cap) => {
                            let uncapped = |x: f32| cap * (x / cap).clamp(-0.999_999, 0.999_999).atanh();
                            means.extend(looked.iter().map(|unit| uncapped(mean(unit))));
                            raise_runs(scores, ends, means);
                            scores.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh() + within);
                        }
                    }
                }
                beside.clear();
                beside.extend(
                    (0..rows)
                        .map(|row| ranking.left_exactly(row, looked).ln() as f32 + ranking.reference(row)),
                );
                seen.clear();
                let zone = &zone[h * rows..(h + 1) * rows];
                seen.extend(zone.iter().zip(&*beside).map(|(&zone, &beside)| log_sum(zone, beside)));
                refined.ranking.set(scores, seen, (self.retrieval.rule.group, 1, self.budget), None);
                refined.ranking.leave(beside);
            },
        );
        Ok(())
    }

    /// Ranks units by what the farthest of their keys may weigh: one that lies apart from the others of its unit is not in
    /// their mean.
    fn promise(&self, h: usize, logits: &[f32], (zone, variances): (&[f32], &[f32]), refined: &mut Refined) {
        let (units, rule) = (&self.index.heads()[h], &self.retrieval.rule);
        let energy = self.index.spread(h).energy();
        let promised = resize(&mut refined.promised, logits.len());
        if units.units() > 0 {
            let lines = logits.chunks_exact(units.units()).zip(promised.chunks_exact_mut(units.units()));
            for ((logits, promised), variance) in lines.zip(variances) {
                let along = self.shape.scale.abs() * variance.sqrt();
                let reach = if energy > 0.0 { rule.reach as f32 * along / energy.sqrt() } else { 0.0 };
                add_less(logits, (units.radii(), reach), units.logarithms(), promised);
            }
        }
        refined.heaviest.set(promised, zone, (rule.group, 1, usize::MAX), None);
    }

    /// [`Reader::take`] of entries of a KV head, as the index counts them.
    pub(super) fn take_refined(
        &self,
        h: usize,
        first: bool,
        known: Option<&[f32]>,
        refined: &mut Refined,
        fresh: &mut Vec<u32>,
        chosen: &mut Vec<u32>,
    ) {
        let (units, mut taken) = (&self.index.heads()[h], std::mem::take(&mut refined.taken));
        self.take(h, first, known, (&mut refined.ranking, None), |_| 1, (fresh, &mut taken));
        refined.taken = taken;
        refined.name(units, fresh);
        chosen.clone_from(fresh);
        if !first {
            chosen.clone_from(&refined.taken);
            refined.name(units, chosen);
        }
    }
}

/// `ln(e^a + e^b)`.
fn log_sum(a: f32, b: f32) -> f32 {
    let most = a.max(b);
    if most == f32::NEG_INFINITY { most } else { most + ((a - most).exp() + (b - most).exp()).ln() }
}
