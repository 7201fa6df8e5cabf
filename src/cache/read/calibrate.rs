//! Thresholds from the end of a prompt: from which weight per entry on units are read, so that all KV heads of all layers
//! together read their budget, on average over the last queries.
//!
//! Every query counts for itself, as in a decode step. A threshold among weights that are averaged over the queries first
//! would suit a question of as many tokens: those of one query differ more, so that more of them lie above it, or fewer.
//!
//! *Helps* because attention is spread in some heads and pointed in others, which no budget per head knows. *Hurts* if
//! what is asked later is not like what the prompt ended with; the recipe's `cap` bounds what that can cost.

use super::super::KvCache;
use super::super::sequence::{Sequence, SequenceId};
use super::PartScratch;
use super::reader::Reader;
use crate::error::{CacheError, Error};
use crate::index::{IndexPart, LayerIndex, Retrieval, Role, Thresholds};
use crate::kernel::attend::Workspace;

impl KvCache {
    /// The thresholds that the end of the prompt made, where the recipe has an index that calibrates.
    ///
    /// # Errors
    /// [`CacheError::NoSequence`].
    pub fn thresholds(&self, id: SequenceId) -> Result<Option<Thresholds>, CacheError> {
        Ok(self.sequence(id)?.thresholds)
    }

    /// Makes thresholds from the queries that were recorded, where the recipe's index wants some.
    ///
    /// # Errors
    /// A kernel's error; what there was before then stays.
    pub(in super::super) fn calibrate(&mut self, id: SequenceId) -> Result<(), Error> {
        let Some(retrieval) = self.recipe.index.clone() else { return Ok(()) };
        let Some(calibration) = retrieval.rule.calibration else { return Ok(()) };
        let sequence = self.sequence(id)?;
        let (mut wanted, mut covered) = (0, 0);
        for (layer, index) in self.calibrated(sequence) {
            let budget = self.read_budget(sequence, layer, index);
            let queries = sequence.queries[layer].len();
            for (head, rows) in index.heads().iter().zip(&sequence.layers[layer]) {
                let there = queries * head.covered().len();
                wanted += queries * budget.saturating_sub(head.zone(rows.rows())).min(there);
                covered += there;
            }
        }
        let mut thresholds = None;
        if let Some(table) = retrieval.table(Role::Group) {
            let widened = (wanted as f64 * calibration.widen) as usize;
            let groups = self.weigh_queries(&retrieval, sequence, Some(table), None)?;
            let group = groups.threshold(widened.min(covered));
            thresholds = Some(Thresholds { group, ..Thresholds::default() });
        }
        // As a step will weigh them: those in groups that it looks into, against the others' groups.
        let units = self.weigh_queries(&retrieval, sequence, None, thresholds)?;
        if units.entries.is_empty() {
            return Ok(());
        }
        let thresholds = Thresholds { unit: units.threshold(wanted), ..thresholds.unwrap_or_default() };
        self.sequence_mut(id)?.thresholds = Some(thresholds);
        Ok(())
    }

    /// The layers that have units.
    fn calibrated<'a>(
        &self,
        sequence: &'a Sequence,
    ) -> impl Iterator<Item = (usize, &'a LayerIndex)> + use<'a> {
        let layers = sequence.reads.iter().enumerate();
        let indexes = layers.filter_map(|(layer, reads)| reads.index.as_ref().map(|index| (layer, index)));
        indexes.filter(|(_, index)| index.heads().iter().any(|head| head.units() > 0))
    }

    /// The weight per entry of every group, or unit where no table of groups is named, in every recorded query of its
    /// layer, with its entries.
    fn weigh_queries(
        &self,
        retrieval: &Retrieval,
        sequence: &Sequence,
        table: Option<usize>,
        thresholds: Option<Thresholds>,
    ) -> Result<Weights, Error> {
        let mut weights = Weights::default();
        let (mut scratch, mut workspace) = (PartScratch::default(), Workspace::default());
        for (layer, index) in self.calibrated(sequence) {
            let shape = self.shape.layer(layer);
            let (queries, positions) = sequence.queries[layer].token_major();
            let queries = queries.chunks_exact(shape.query_heads * shape.d_k);
            for (queries, positions) in queries.zip(positions.chunks_exact(1)) {
                let reader = Reader {
                    backend: &*self.backend,
                    shape,
                    retrieval,
                    heads: &sequence.layers[layer],
                    index: IndexPart::all(index),
                    queries,
                    positions,
                    budget: usize::MAX,
                    thresholds,
                    sinks: None,
                };
                reader.weigh(table, &mut scratch, &mut workspace)?;
                for (h, (ranking, units)) in scratch.rankings.iter().zip(index.heads()).enumerate() {
                    for (row, score) in ranking.scores().iter().enumerate() {
                        let entries = match (table, thresholds) {
                            (Some(_), _) => units.count_of(Role::Group, row),
                            (None, Some(_)) => units.count(scratch.looked[h][row] as usize),
                            (None, None) => units.count(row),
                        };
                        weights.add(score / reader.unison(), entries);
                    }
                }
            }
        }
        Ok(weights)
    }
}

/// How many entries have which weight: their numbers in steps of a two-thousandth of a weight, so that a prompt of any length,
/// with as many queries as there may be, is counted in the same few megabytes.
#[derive(Debug, Default)]
struct Weights {
    /// By the upper bits of the weight, which is not negative; empty if nothing was ever counted.
    entries: Vec<usize>,
}

impl Weights {
    /// Lowest bits of a weight that do not count: what is left of its fraction are 11.
    const DROPPED: u32 = 12;

    fn add(&mut self, weight: f32, entries: usize) {
        self.entries.resize(1 << (31 - Self::DROPPED), 0);
        self.entries[(weight.max(0.0).to_bits() >> Self::DROPPED) as usize] += entries;
    }

    /// The least weight from which on there are at most `wanted` entries.
    fn threshold(&self, wanted: usize) -> f32 {
        let mut entries = 0;
        let steps = self.entries.iter().enumerate().rev().filter(|(_, there)| **there > 0);
        let within = steps.take_while(|(_, there)| {
            entries += *there;
            entries <= wanted
        });
        within.last().map_or(f32::INFINITY, |(step, _)| f32::from_bits((step as u32) << Self::DROPPED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_lets_through_what_is_wanted() {
        let mut weights = Weights::default();
        assert_eq!(weights.threshold(9), f32::INFINITY);
        for (weight, entries) in [(0.5, 3), (0.25, 4), (1e-9, 2), (0.0, 100), (-0.0, 7)] {
            weights.add(weight, entries);
        }
        assert_eq!(weights.threshold(2), f32::INFINITY);
        assert_eq!(weights.threshold(3), 0.5);
        assert_eq!(weights.threshold(8), 0.25);
        assert!((weights.threshold(9) / 1e-9 - 1.0).abs() < 1e-3);
        assert!(weights.threshold(115) < 1e-9);
        assert_eq!(weights.threshold(116), 0.0);
        // No weight is below the threshold that counts it.
        for bits in (0x2000_0000..0x3f80_0000).step_by(99_991) {
            let (mut weights, weight) = (Weights::default(), f32::from_bits(bits));
            weights.add(weight, 1);
            assert!(weights.threshold(1) <= weight && weight <= 1.0006 * weights.threshold(1), "{weight}");
        }
    }
}
