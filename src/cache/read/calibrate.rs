//! Thresholds from the end of a prompt: from which weight per entry on units are read, so that all KV heads of all layers
//! together read their budget.
//!
//! *Helps* because attention is spread in some heads and pointed in others, which no budget per head knows. *Hurts* if
//! what is asked later is not like what the prompt ended with; the recipe's `cap` bounds what that can cost.

use super::super::KvCache;
use super::super::sequence::{Sequence, SequenceId};
use crate::error::{CacheError, Error};
use crate::index::choose::Ranking;
use crate::index::{Group, LayerIndex, Retrieval, Role, Thresholds};
use crate::kernel::attend::Workspace;
use crate::kernel::dot_scores::DotArgs;
use crate::kernel::{AttentionParams, total_rows};

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
        let (mut units, mut groups) = (Vec::new(), Vec::new());
        let (mut wanted, mut covered) = (0, 0);
        for (layer, reads) in sequence.reads.iter().enumerate() {
            let Some(index) =
                reads.index.as_ref().filter(|index| index.heads().iter().any(|h| h.units() > 0))
            else {
                continue;
            };
            let budget = self.read_budget(sequence, layer, index);
            for (head, rows) in index.heads().iter().zip(&sequence.layers[layer]) {
                let there = head.covered().len();
                wanted += budget.saturating_sub(head.zone(rows.rows())).min(there);
                covered += there;
            }
            self.weigh_queries(&retrieval, sequence, (layer, index), Role::Mean, &mut units)?;
            self.weigh_queries(&retrieval, sequence, (layer, index), Role::Group, &mut groups)?;
        }
        if units.is_empty() {
            return Ok(());
        }
        let widened = (wanted as f64 * calibration.widen) as usize;
        let thresholds = Thresholds {
            unit: threshold(&mut units, wanted),
            group: threshold(&mut groups, widened.min(covered)),
        };
        self.sequence_mut(id)?.thresholds = Some(thresholds);
        Ok(())
    }

    /// Appends the weight per entry of every row of a table, on average over the recorded queries of its layer, and the
    /// row's entries.
    fn weigh_queries(
        &self,
        retrieval: &Retrieval,
        sequence: &Sequence,
        (layer, index): (usize, &LayerIndex),
        role: Role,
        out: &mut Vec<(f32, usize)>,
    ) -> Result<(), Error> {
        let Some(table) = retrieval.table(role) else { return Ok(()) };
        let (shape, tables) = (self.shape.layer(layer), index.table(table));
        let queries = sequence.queries[layer].token_major();
        let queries = queries.chunks_exact(shape.query_heads * shape.d_k);
        let group = shape.group();
        let (rows, zone) = ((queries.len() * group) as f32, vec![f32::NEG_INFINITY; group]);
        let mut logits = vec![0.0; group * total_rows(tables)];
        let mut sums: Vec<Vec<f32>> = tables.iter().map(|t| vec![0.0; t.rows()]).collect();
        let mut ranking = Ranking::default();
        let (d_k, d_v) = role.dims(shape);
        let params =
            AttentionParams { d_k, d_v, window: None, sink_logits: None, ..AttentionParams::of(shape) };
        let mut workspace = Workspace::default();
        for query in queries {
            let args =
                &mut DotArgs { heads: tables, queries: query, tokens: 1, spans: None, out: &mut logits };
            self.backend.dot_scores(&params, args, &mut workspace)?;
            let mut left = &*logits;
            for ((sums, head), table) in sums.iter_mut().zip(index.heads()).zip(tables) {
                let (logits, behind) = left.split_at(group * table.rows());
                left = behind;
                let size = |row| head.count_of(role, row);
                ranking.set(logits, &zone, (Group::Sum, 1, usize::MAX), Some(&size));
                sums.iter_mut().zip(ranking.scores()).for_each(|(sum, score)| *sum += score);
            }
        }
        for (sums, head) in sums.iter().zip(index.heads()) {
            let size = |row| head.count_of(role, row);
            out.extend(
                sums.iter().enumerate().filter(|_| rows > 0.0).map(|(row, sum)| (sum / rows, size(row))),
            );
        }
        Ok(())
    }
}

/// The least weight among the heaviest rows that have at most `wanted` entries together.
fn threshold(rows: &mut [(f32, usize)], wanted: usize) -> f32 {
    rows.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    let mut entries = 0;
    let within = rows.iter().take_while(|(_, count)| {
        entries += count;
        entries <= wanted
    });
    within.last().map_or(f32::INFINITY, |&(weight, _)| weight)
}
