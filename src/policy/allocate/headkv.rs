//! HeadKV: KV heads that retrieve keep more, over all layers at once, by importances learned once per model.
//!
//! *Helps* at small budgets, where few heads carry what has to be found. *Hurts* where the importances are of another task than
//! retrieval, and rules out renumbered positions.
//!
//! The importance `s` of a KV head is the mean over its query heads; `ŝ = s^power / Σ s^power` over the `L · H` heads of all layers
//! that take part. With a mean target of `T` entries
//! ```text
//! keep_{l,h} = ŝ_{l,h} · (T/β) · L · H + T − T/β
//! ```
//! so `β = 1` divides everything by importance, a large one almost nothing. A layer's target is the mean over its heads, and its heads
//! divide what it keeps in the same proportions; both sums are exact. What a bound takes from one goes to the others in proportion.

use super::{Allocator, HeadRequest, shares};
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::policy::TargetRequest;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::select::protected_counts;
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "headkv",
    summary: "KV heads that retrieve keep more, over all layers at once",
    source: "Fu et al. 2024, arXiv:2410.19258",
    needs: "a profile with the part heads",
    args: &[
        Arg::real(
            "beta",
            1.2,
            1.0,
            1000.0,
            "1/beta of the budget is divided by importance, the rest equally",
        ),
        Arg::real("power", 1.0, 0.0, 100.0, "exponent on the importance; 0 is uniform"),
    ],
    build: Build::Allocate { over: "snapkv", schedule: None, build },
};

/// The part of a profile, and its array.
const PART: &str = "heads";
const SCORES: &str = "scores";

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(HeadKv { beta: args.real("beta")?, power: args.real("power")?, weights: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct HeadKv {
    /// 1/β of the budget is divided by importance, the rest equally; ≥ 1.
    pub beta: f64,
    /// Exponent on the importance.
    pub power: f64,
    /// What each KV head keeps of a mean target of one entry, `[L][H]`; `None` before [`Allocator::bind`].
    pub weights: Option<Vec<Vec<f64>>>,
}

impl Default for HeadKv {
    fn default() -> Self {
        Self { beta: 1.2, power: 1.0, weights: None }
    }
}

impl HeadKv {
    /// What the KV heads of a layer keep of a mean target of one entry; equally much in a layer it knows nothing of.
    fn heads(&self, layer: usize, count: usize) -> Vec<f64> {
        let known = self.weights.as_ref().and_then(|layers| layers.get(layer));
        known.filter(|heads| heads.len() == count || count == 0).cloned().unwrap_or(vec![1.0; count.max(1)])
    }
}

impl Allocator for HeadKv {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn lacks(&self) -> Option<&'static str> {
        self.weights.is_none().then_some(PART)
    }

    fn bind(
        &self,
        profile: &Profile,
        shape: &ModelShape,
    ) -> Result<Option<Arc<dyn Allocator>>, ProfileError> {
        let (hq, group) = (shape.layer(0).query_heads, shape.layer(0).group());
        let scores = profile.weights(PART, SCORES, &[Some(shape.layers()), Some(hq)])?.numbers();
        let highest = f64::from(scores.iter().fold(0.0f32, |a, &b| a.max(b)));
        let importance = |heads: &[f32]| {
            let mean = heads.iter().map(|&score| f64::from(score)).sum::<f64>() / heads.len() as f64;
            // Of the highest score, so that no power leaves the range of numbers.
            if highest > 0.0 { (mean / highest).powf(self.power) } else { 1.0 }
        };
        let layers: Vec<Vec<f64>> = scores
            .chunks_exact(hq)
            .map(|heads| heads.chunks_exact(group).map(importance).collect())
            .collect();
        let taking_part = shape.owners().filter(|&layer| shape.layer(layer).window.is_none());
        let heads: Vec<f64> = taking_part.flat_map(|layer| layers[layer].clone()).collect();
        let mean = heads.iter().sum::<f64>() / heads.len().max(1) as f64;
        // ŝ · L · H is the importance over the mean importance; none where a power left nothing of any.
        let weight = |s: f64| if mean > 0.0 { (s / mean - 1.0) / self.beta + 1.0 } else { 1.0 };
        let weights = layers.iter().map(|heads| heads.iter().map(|&s| weight(s)).collect()).collect();
        Ok(Some(Arc::new(Self { weights: Some(weights), ..self.clone() })))
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let (layers, target) = (request.layers.len(), request.target);
        if request.rows.iter().all(|&rows| rows <= target) {
            return vec![target; layers];
        }
        let mean = |&layer: &usize| {
            let heads = self.heads(layer, 0);
            heads.iter().sum::<f64>() / heads.len() as f64
        };
        let weights: Vec<f64> = request.layers.iter().map(mean).collect();
        let total = (target * layers).min(request.rows.iter().sum());
        let least = request.recent.min(target);
        divide(&weights, request.rows.iter().map(|&rows| (least.min(rows), rows)), total)
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        let lengths = &request.scores.lengths;
        let protected = protected_counts(lengths, request.protect);
        let weights = self.heads(request.layer, lengths.len());
        Ok(divide(&weights, protected.into_iter().zip(lengths.iter().copied()), request.total()))
    }
}

fn divide(weights: &[f64], bounds: impl Iterator<Item = (usize, usize)>, total: usize) -> Vec<usize> {
    let bounds: Vec<(usize, usize)> = bounds.collect();
    let real: Vec<(f64, f64)> = bounds.iter().map(|&(least, most)| (least as f64, most as f64)).collect();
    shares::whole(&shares::fill(weights, &real, total as f64), &bounds, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::geometry::LayerShape;
    use crate::policy::LayerScores;
    use crate::profile::{Array, Part};
    use proptest::prelude::*;

    /// Two KV heads of two query heads each in every layer.
    fn headkv(beta: f64, power: f64, scores: &[[f32; 4]]) -> Arc<dyn Allocator> {
        let shape = ModelShape::uniform(scores.len(), LayerShape::new(4, 2, 8)).unwrap();
        let array = Array::new(vec![scores.len(), 4], scores.concat()).unwrap();
        let profile = Profile::new(&shape).unwrap().with(PART, Part::new("by hand").with(SCORES, array));
        let headkv = HeadKv { beta, power, weights: None };
        assert_eq!(headkv.lacks(), Some("heads"));
        headkv.bind(&profile, &shape).unwrap().unwrap()
    }

    fn targets(headkv: &dyn Allocator, rows: &[usize], target: usize, recent: usize) -> Vec<usize> {
        let layers: Vec<usize> = (0..rows.len()).collect();
        headkv.layer_targets(&TargetRequest { layers: &layers, rows, target, recent, measures: &[] })
    }

    fn counts(
        headkv: &dyn Allocator,
        layer: usize,
        target: usize,
        lengths: [usize; 2],
        own: usize,
    ) -> Vec<usize> {
        let scores = LayerScores { lengths: lengths.to_vec(), values: vec![0.0; lengths[0] + lengths[1]] };
        let mut protect = vec![0; scores.values.len()];
        protect[..own].fill(1);
        let backend = &Reference::default();
        let request = HeadRequest { layer, target, scores: &scores, protect: &protect, backend };
        headkv.head_counts(&request).unwrap()
    }

    #[test]
    fn worked_example() {
        // Importances of KV heads .1, .3 | .4, .2 sum to one. With β = 2 and a mean of 100 entries the four heads keep
        // ŝ · 50 · 4 + 50 = 70, 110 | 130, 90.
        let headkv = headkv(2.0, 1.0, &[[0.2, 0.0, 0.3, 0.3], [0.5, 0.3, 0.1, 0.3]]);
        assert_eq!(targets(&*headkv, &[1000; 2], 100, 0), [90, 110]);
        assert_eq!(counts(&*headkv, 0, 90, [1000; 2], 0), [70, 110]);
        assert_eq!(counts(&*headkv, 1, 110, [1000; 2], 0), [130, 90]);
        // Bounds: 80 protected here, 60 stored there.
        assert_eq!(counts(&*headkv, 0, 90, [1000; 2], 80), [80, 100]);
        assert_eq!(counts(&*headkv, 0, 90, [1000, 60], 0), [120, 60]);
        assert_eq!(targets(&*headkv, &[1000, 104], 100, 0), [96, 104]);
        assert_eq!(targets(&*headkv, &[1000; 2], 100, 95), [95, 105]);
        assert_eq!(targets(&*headkv, &[100; 2], 100, 0), [100, 100], "nothing to drop");
    }

    #[test]
    fn beta_and_power_say_how_far_heads_differ() {
        let scores = [[0.2, 0.0, 0.3, 0.3], [0.5, 0.3, 0.1, 0.3]];
        let all = |beta, power| {
            let headkv = headkv(beta, power, &scores);
            let targets = targets(&*headkv, &[1000; 2], 100, 0);
            [0, 1].map(|layer| counts(&*headkv, layer, targets[layer], [1000; 2], 0)).concat()
        };
        assert_eq!(all(1.0, 1.0), [40, 120, 160, 80], "all by importance");
        assert_eq!(all(1000.0, 1.0), [100, 100, 100, 100]);
        assert_eq!(all(1.0, 0.0), [100, 100, 100, 100]);
        // Squares 1, 9, 16, 4 of 30, times 400.
        assert_eq!(all(1.0, 2.0), [13, 121, 213, 53]);
        let nothing = headkv(1.0, 2.0, &[[0.0; 4]; 2]);
        assert_eq!(targets(&*nothing, &[1000; 2], 100, 0), [100, 100]);
    }

    proptest! {
        #[test]
        fn sums_are_exact_and_bounded(
            rows in prop::collection::vec(1usize..3000, 1..16), target in 0usize..3000, recent in 0usize..100,
            lengths in (0usize..300, 0usize..300), beta in 1.0f64..9.0, power in 0.0f64..6.0, seed in 0u64..99,
        ) {
            let mut random = crate::testing::Random::new(seed);
            let scores: Vec<[f32; 4]> = rows.iter().map(|_| [0; 4].map(|_| random.normal().abs())).collect();
            let headkv = headkv(beta, power, &scores);
            let got = targets(&*headkv, &rows, target, recent);
            if rows.iter().any(|&rows| rows > target) {
                prop_assert_eq!(got.iter().sum::<usize>(), rows.iter().sum::<usize>().min(target * rows.len()));
                prop_assert!(got.iter().zip(&rows).all(|(got, rows)| got <= rows));
            }
            let got = counts(&*headkv, 0, target, [lengths.0, lengths.1], target.min(lengths.0));
            prop_assert_eq!(got.iter().sum::<usize>(), (lengths.0 + lengths.1).min(2 * target));
            prop_assert!(got[0] >= target.min(lengths.0) && got[0] <= lengths.0 && got[1] <= lengths.1, "{:?}", got);
        }
    }
}
