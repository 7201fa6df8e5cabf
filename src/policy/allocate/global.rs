//! One threshold over all layers and KV heads: an entry stays if its score is among the best of the whole model. The budget of
//! KVzip and its kin.
//!
//! A layer's free scores are summed up by their quantiles `x_0 ≥ x_1 ≥ …`, each of which stands for as many entries. Taken
//! together and from the top, as many of them are kept as the budget holds beside what is protected; a layer keeps those of
//! them that are its own. Within a layer the heads compete by score, exactly.
//!
//! *Helps* scores that mean the same everywhere (replay scores, attention masses). *Hurts* with any others, where a head or a
//! layer can lose all but its protected entries for being measured on another scale. Measured before anything is compressed,
//! and kept for what follows.

use super::adakv::{AdaKv, Rule};
use super::{Allocator, HeadRequest, shares};
use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Args, Build, Entry};
use crate::policy::{LayerScores, TargetRequest};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "global",
    summary: "one threshold of score over all layers and KV heads",
    source: "the budget of KVzip: Kim et al. 2025, arXiv:2505.23416",
    needs: "scores that are comparable between layers (replay scores are, norms are not)",
    args: &[],
    build: Build::Allocate { over: "kvzip", schedule: None, build },
};

/// Quantiles that a layer's scores are summed up by.
const QUANTILES: usize = 1024;

fn build(_: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(Global))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub struct Global;

impl Allocator for Global {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn measure(&self) -> Option<fn(&LayerScores) -> Vec<f32>> {
        Some(quantiles)
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let layers = request.layers.len();
        if request.measures.len() != layers || request.rows.iter().all(|&rows| rows <= request.target) {
            return vec![request.target; layers];
        }
        // Of each layer: free entries per head when they were measured, and what one of its quantiles stands for.
        let free = |layer: usize| f64::from(request.measures[layer].first().copied().unwrap_or(0.0));
        let ranked = |layer: usize| request.measures[layer].get(1..).unwrap_or_default();
        let share = |layer: usize| free(layer) / ranked(layer).len().max(1) as f64;
        let kept = |layer: usize| request.rows[layer] as f64 - free(layer).min(request.rows[layer] as f64);
        let mut all: Vec<(f32, usize)> =
            (0..layers).flat_map(|layer| ranked(layer).iter().map(move |&score| (score, layer))).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let total = request.rows.iter().sum::<usize>().min(request.target * layers);
        let mut targets: Vec<f64> = (0..layers).map(|layer| kept(layer).min(request.target as f64)).collect();
        let mut left = total as f64 - targets.iter().sum::<f64>();
        for (_, layer) in all {
            let taken = share(layer).min(left.max(0.0));
            targets[layer] += taken;
            left -= taken;
        }
        let bounds: Vec<(usize, usize)> =
            request.rows.iter().map(|&rows| (request.recent.min(request.target).min(rows), rows)).collect();
        shares::whole(&targets, &bounds, total)
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        AdaKv { rule: Rule::Floor { safeguard: 0.0 } }.head_counts(request)
    }
}

/// Entries per head, then the scores at equal distances of rank, the best first: all of them if they are no more.
fn quantiles(scores: &LayerScores) -> Vec<f32> {
    let mut sorted = scores.values.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let mut out = vec![sorted.len() as f32 / scores.lengths.len().max(1) as f32];
    let count = sorted.len().min(QUANTILES);
    // Each stands for the run of ranks around it.
    out.extend((0..count).map(|i| sorted[(2 * i + 1) * sorted.len() / (2 * count)]));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scores(heads: &[&[f32]]) -> LayerScores {
        LayerScores { lengths: heads.iter().map(|head| head.len()).collect(), values: heads.concat() }
    }

    fn targets(layers: &[LayerScores], target: usize, recent: usize) -> Vec<usize> {
        let indices: Vec<usize> = (0..layers.len()).collect();
        let rows: Vec<usize> = layers.iter().map(|l| l.values.len() / l.lengths.len() + recent).collect();
        let measures: Vec<Vec<f32>> = layers.iter().map(quantiles).collect();
        let request = TargetRequest { layers: &indices, rows: &rows, target, recent, measures: &measures };
        Global.layer_targets(&request)
    }

    #[test]
    fn the_best_of_all_layers_stay() {
        // Eight of sixteen entries in all: .9 .8 .7 .6 .5 of the first layer, .85 .75 .65 of the second.
        let first = scores(&[&[0.9, 0.8, 0.1, 0.1], &[0.7, 0.6, 0.5, 0.1]]);
        let second = scores(&[&[0.85, 0.2, 0.1, 0.1], &[0.75, 0.65, 0.1, 0.1]]);
        let got = targets(&[first.clone(), second.clone()], 2, 0);
        assert_eq!(got.iter().sum::<usize>(), 4, "2.5 and 1.5 per head, as whole numbers");
        assert!(got[0] >= 2 && got[1] >= 1, "{got:?}");
        // A layer whose scores are all below keeps what is protected.
        let low = scores(&[&[0.01; 4], &[0.02; 4]]);
        assert_eq!(targets(&[first, low], 2, 0), [4, 0]);
        assert_eq!(targets(&[second, scores(&[&[0.01; 4], &[0.02; 4]])], 2, 1), [3, 1]);
    }

    proptest! {
        #[test]
        fn the_sum_is_exact(lengths in prop::collection::vec(0usize..3000, 1..6), target in 1usize..1500, recent in 0usize..50, seed in 0u64..99) {
            let mut random = crate::testing::Random::new(seed);
            let layers: Vec<LayerScores> = lengths.iter().map(|&n| {
                let heads: Vec<Vec<f32>> = (0..2).map(|_| (0..n).map(|_| random.normal()).collect()).collect();
                scores(&[&heads[0], &heads[1]])
            }).collect();
            let got = targets(&layers, target, recent);
            let rows: Vec<usize> = lengths.iter().map(|n| n + recent).collect();
            if rows.iter().any(|&rows| rows > target) {
                prop_assert_eq!(got.iter().sum::<usize>(), rows.iter().sum::<usize>().min(target * rows.len()));
                prop_assert!(got.iter().zip(&rows).all(|(got, rows)| got <= rows), "{:?} {:?}", got, rows);
            }
        }
    }
}
