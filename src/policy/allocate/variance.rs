//! D2O's layer budgets: a layer whose attention is spread evenly keeps more than one whose attention is gathered in few
//! entries.
//!
//! Of the scores `s` of layer `l`, which should be attention (`h2o`), without protected entries:
//! ```text
//! σ²_l = mean over KV heads of the variance of (s − min s) / (max s − min s)
//! keep_l = L · target · softmax(−σ²)_l,   at least 1 % of what is stored, at most all of it
//! ```
//! Measured before anything is compressed, and kept for what follows. The sum is exact: what a bound takes from one layer goes
//! to the others in proportion.
//!
//! *Helps* little: variances of normalised scores differ by hundredths, so budgets do by percents (`sharpness` raises that).
//! *Hurts* little for the same reason, and rules out renumbered positions.

use super::{Allocator, HeadRequest, shares};
use crate::error::{PolicyError, RecipeError};
use crate::policy::allocate::uniform::Uniform;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, TargetRequest};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "variance",
    summary: "layers whose attention is spread evenly keep more",
    source: "D2O: Wan et al. 2024, arXiv:2406.13035",
    needs: "nothing of its own",
    args: &[Arg::real(
        "sharpness",
        1.0,
        0.0,
        1000.0,
        "factor on the variance; the paper's is 1, 0 is uniform",
    )],
    build: Build::Allocate { over: "snapkv", schedule: None, build },
};

/// Of what a layer stores, the part that it keeps at least.
const LEAST: f64 = 0.01;

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(Variance { sharpness: args.real("sharpness")? }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Variance {
    /// Factor on the variance.
    pub sharpness: f64,
}

impl Allocator for Variance {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn measure(&self) -> Option<fn(&LayerScores) -> Vec<f32>> {
        Some(|scores| vec![spread(scores)])
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let layers = request.layers.len();
        if request.measures.len() != layers || request.rows.iter().all(|&rows| rows <= request.target) {
            return vec![request.target; layers];
        }
        let spreads: Vec<f32> = request.measures.iter().flatten().copied().collect();
        let least = spreads.iter().fold(f32::INFINITY, |a, &b| a.min(b));
        let weight = |&x: &f32| (-self.sharpness * f64::from(x - least)).exp();
        let weights: Vec<f64> = spreads.iter().map(weight).collect();
        divide(request, &weights)
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        Uniform.head_counts(request)
    }
}

/// The mean over KV heads of the variance of scores between their smallest (0) and their largest (1).
fn spread(scores: &LayerScores) -> f32 {
    let variance = |head: usize| {
        let scores = scores.head(head);
        let (low, high) =
            scores.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
        let range = f64::from(high) - f64::from(low);
        if !(range > 0.0 && range.is_finite()) {
            return 0.0;
        }
        let n = scores.len() as f64;
        let at = |x: &f32| (f64::from(*x) - f64::from(low)) / range;
        let mean = scores.iter().map(at).sum::<f64>() / n;
        scores.iter().map(|x| (at(x) - mean).powi(2)).sum::<f64>() / n
    };
    let heads = scores.lengths.len();
    ((0..heads).map(variance).sum::<f64>() / heads.max(1) as f64) as f32
}

/// `target · layers` entries by weight, within what every layer must and can keep.
fn divide(request: &TargetRequest<'_>, weights: &[f64]) -> Vec<usize> {
    let total = request.rows.iter().sum::<usize>().min(request.target * request.layers.len());
    let bounds = |&rows: &usize| {
        let least = (rows as f64 * LEAST).max(request.recent.min(request.target).min(rows) as f64);
        (least.min(request.target as f64), rows as f64)
    };
    let bounds: Vec<(f64, f64)> = request.rows.iter().map(bounds).collect();
    let ends: Vec<(usize, usize)> = request.rows.iter().map(|&rows| (0, rows)).collect();
    shares::whole(&shares::fill(weights, &bounds, total as f64), &ends, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn targets(rows: &[usize], target: usize, recent: usize, measures: &[f32], sharpness: f64) -> Vec<usize> {
        let layers: Vec<usize> = (0..rows.len()).collect();
        let measures: Vec<Vec<f32>> = measures.iter().map(|spread| vec![*spread]).collect();
        let request = TargetRequest { layers: &layers, rows, target, recent, measures: &measures };
        Variance { sharpness }.layer_targets(&request)
    }

    #[test]
    fn the_variance_is_of_scores_between_nought_and_one() {
        let scores = |values: &[f32], lengths: &[usize]| {
            spread(&LayerScores { lengths: lengths.to_vec(), values: values.to_vec() })
        };
        // 0, 0, 1, 1: variance ¼; a head of equals has none.
        assert!((scores(&[3.0, 3.0, 7.0, 7.0], &[4]) - 0.25).abs() < 1e-6);
        assert!((scores(&[3.0, 3.0, 7.0, 7.0, 1.0, 1.0], &[4, 2]) - 0.125).abs() < 1e-6);
        assert_eq!(scores(&[], &[0]), 0.0);
    }

    #[test]
    fn spread_layers_keep_more() {
        // exp(−0.2) and 1, of 200.
        assert_eq!(targets(&[1000, 1000], 100, 0, &[0.2, 0.0], 1.0), [90, 110]);
        assert_eq!(targets(&[1000, 1000], 100, 0, &[0.2, 0.0], 0.0), [100, 100]);
        // Bounds: 1 % of 1000 here, the recent ones there, all there is in the last.
        assert_eq!(targets(&[1000, 1000], 100, 0, &[0.2, 0.0], 1000.0), [10, 190]);
        assert_eq!(targets(&[1000, 1000], 100, 64, &[0.2, 0.0], 1000.0), [64, 136]);
        assert_eq!(targets(&[1000, 120], 100, 0, &[0.2, 0.0], 1000.0), [80, 120]);
        // Nothing measured yet, nothing to drop.
        assert_eq!(targets(&[1000, 1000], 100, 0, &[], 1.0), [100, 100]);
        assert_eq!(targets(&[10, 20], 100, 0, &[0.1, 0.0], 1.0), [100, 100]);
    }

    proptest! {
        #[test]
        fn the_sum_is_exact(
            rows in prop::collection::vec(1usize..3000, 1..20), target in 1usize..3000, recent in 0usize..100, seed in 0u64..99,
        ) {
            let mut random = crate::testing::Random::new(seed);
            let measures: Vec<f32> = rows.iter().map(|_| random.normal().abs()).collect();
            let got = targets(&rows, target, recent, &measures, 1.0);
            if rows.iter().any(|&r| r > target) {
                let sum = got.iter().sum::<usize>();
                let total = rows.iter().sum::<usize>().min(target * rows.len());
                prop_assert_eq!(sum, total, "{:?}", got);
                prop_assert!(got.iter().zip(&rows).all(|(got, rows)| got <= rows));
            }
        }
    }
}
