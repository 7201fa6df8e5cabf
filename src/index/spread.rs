//! How keys lie around what an index says of them, pooled over a KV head.
//!
//! *Helps* because one matrix for all units costs nothing per entry. *Hurts* where units differ in how their keys lie: all
//! are taken to be alike.

use super::{Entries, Units};
use crate::kernel::simd::weights;

/// Units of each batch that add to the covariance of keys, about: a few thousand entries say as much of it as all.
const SAMPLED: usize = 64;

/// How keys lie around the means of their units, or around what codes say beside these: the pooled covariance of a KV head.
/// It says how much more the members of a unit weigh together than their mean does.
#[derive(Clone, Debug, Default)]
pub struct Spread {
    /// `[d_k, d_k]`: sum of `(k − mean)(k − mean)ᵀ`.
    sums: Vec<f32>,
    entries: usize,
}

impl Spread {
    /// Adds what is left of the keys of units without their mean, and without what `approximate` says of the `i`-th member
    /// (of all units in turn) beside.
    pub(super) fn add(
        &mut self,
        entries: &Entries<'_>,
        units: &Units,
        d_k: usize,
        approximate: impl Fn(usize, &mut [f32]),
    ) {
        self.sums.resize(d_k * d_k, 0.0);
        let mut offset = vec![0.0; d_k];
        let mut center = vec![0.0; d_k];
        let mut start = 0;
        for (index, &count) in units.counts.iter().enumerate() {
            let member = |i: usize| units.members.get(i).map_or(i, |&m| m as usize);
            let key = |i: usize| &entries.keys[member(i) * d_k..(member(i) + 1) * d_k];
            let unit = start..start + count as usize;
            start = unit.end;
            if index % (units.counts.len() / SAMPLED).max(1) != 0 {
                continue;
            }
            self.entries += unit.len();
            center.fill(0.0);
            unit.clone()
                .for_each(|i| center.iter_mut().zip(key(i)).for_each(|(c, k)| *c += k / count as f32));
            for i in unit {
                approximate(i, &mut offset);
                offset.iter_mut().zip(key(i)).zip(&center).for_each(|((o, k), c)| *o = k - c - *o);
                for (row, &a) in self.sums.chunks_exact_mut(d_k).zip(&offset) {
                    row.iter_mut().zip(&offset).for_each(|(s, b)| *s += a * b);
                }
            }
        }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.sums.capacity() * size_of::<f32>()
    }

    /// The mean of `‖k − mean‖²`.
    pub fn energy(&self) -> f32 {
        let d_k = self.sums.len().isqrt();
        let trace: f32 = self.sums.iter().step_by(d_k + 1).sum();
        if self.entries == 0 { 0.0 } else { trace / self.entries as f32 }
    }

    /// `qᵀ Σ q`, the variance of `q·k` within a unit, for every query of `[n, d_k]`.
    pub fn variances(&self, queries: &[f32], out: &mut [f32]) {
        if self.entries == 0 {
            return out.fill(0.0);
        }
        weights::forms(&self.sums, queries, out);
        out.iter_mut().for_each(|x| *x = (*x / self.entries as f32).max(0.0));
    }
}
