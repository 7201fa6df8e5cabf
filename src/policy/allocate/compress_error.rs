//! CompressKV's layer budgets: a layer whose output suffers more from compression keeps more, by errors measured once per model.
//!
//! *Helps* at small budgets, where an equal share ruins few layers and is idle in others. *Hurts* where the errors were measured on
//! other texts than those it meets, and rules out renumbered positions.
//!
//! With errors `e` of `L` layers, `ẽ_l = e_l / Σe` and a mean target of `T` entries
//! ```text
//! keep_l = base + round(ẽ_l · (T·L − base·L)),   base ≤ keep_l ≤ most · T
//! ```
//! and then one entry at a time, to layers of large error first or from layers of small error first, until the sum is `T · L`.

use super::{Allocator, HeadRequest, shares};
use crate::error::{PolicyError, ProfileError, RecipeError};
use crate::geometry::ModelShape;
use crate::policy::TargetRequest;
use crate::policy::allocate::uniform::Uniform;
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::profile::Profile;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "compress_error",
    summary: "layers whose output suffers more from compression keep more",
    source: "CompressKV: Lin et al. 2025, arXiv:2508.02401",
    needs: "a profile with the part errors",
    args: &[
        Arg::count("base", 32, 0, 1 << 24, "entries that every layer is sure of"),
        Arg::real("most", 3.0, 1.0, 1000.0, "a layer keeps this many times the mean at most"),
    ],
    build: Build::Allocate { over: "compresskv", schedule: None, build },
};

/// The part of a profile, and its array.
const PART: &str = "errors";
const LAYERS: &str = "layers";

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(CompressError { base: args.count("base")?, most: args.real("most")?, errors: None }))
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct CompressError {
    /// Entries per KV head that every layer is sure of: as many as are protected if that is more, the target if that is less.
    pub base: usize,
    /// A layer keeps this many times the mean at most, ≥ 1, unless the others store too little to take the rest.
    pub most: f64,
    /// Error of each layer, `[L]`, ≥ 0; `None` before [`Allocator::bind`].
    pub errors: Option<Vec<f32>>,
}

impl Default for CompressError {
    fn default() -> Self {
        Self { base: 32, most: 3.0, errors: None }
    }
}

impl Allocator for CompressError {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn lacks(&self) -> Option<&'static str> {
        self.errors.is_none().then_some(PART)
    }

    fn bind(
        &self,
        profile: &Profile,
        shape: &ModelShape,
    ) -> Result<Option<Arc<dyn Allocator>>, ProfileError> {
        let errors = profile.weights(PART, LAYERS, &[Some(shape.layers())])?.numbers().to_vec();
        Ok(Some(Arc::new(Self { errors: Some(errors), ..self.clone() })))
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let (layers, target) = (request.layers.len(), request.target);
        if request.rows.iter().all(|&rows| rows <= target) {
            return vec![target; layers];
        }
        let error = |&layer: &usize| {
            self.errors.as_ref().and_then(|errors| errors.get(layer)).map_or(0.0, |&error| f64::from(error))
        };
        let mut errors: Vec<f64> = request.layers.iter().map(error).collect();
        if errors.iter().all(|&error| error == 0.0) {
            errors.fill(1.0);
        }
        let sum: f64 = errors.iter().sum();
        let base = self.base.max(request.recent).min(target);
        let room = ((target - base) * layers) as f64;
        let most = ((self.most * target as f64) as usize).max(target);
        let bounds: Vec<(usize, usize)> =
            request.rows.iter().map(|&rows| (base.min(rows), most.min(rows))).collect();
        let share = |error: &f64| base + (error / sum * room).round() as usize;
        let counts =
            errors.iter().zip(&bounds).map(|(error, &(least, most))| share(error).clamp(least, most));
        let mut counts: Vec<usize> = counts.collect();
        let total = (target * layers).min(request.rows.iter().sum());
        shares::settle(&mut counts, &bounds, total, &errors);
        // Where the others store too little, more than `most` is better than less than the budget.
        let stored: Vec<(usize, usize)> = request.rows.iter().map(|&rows| (0, rows)).collect();
        shares::settle(&mut counts, &stored, total, &errors);
        counts
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        Uniform.head_counts(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn targets(errors: &[f32], rows: &[usize], target: usize, recent: usize) -> Vec<usize> {
        let layers: Vec<usize> = (0..rows.len()).collect();
        let allocator = CompressError { errors: Some(errors.to_vec()), ..CompressError::default() };
        allocator.layer_targets(&TargetRequest { layers: &layers, rows, target, recent, measures: &[] })
    }

    #[test]
    fn worked_example() {
        // 32 + round(.6 · 896), … are 570, 211, 122, 122: one too many, taken from the earlier of the least important.
        assert_eq!(targets(&[0.6, 0.2, 0.1, 0.1], &[10_000; 4], 256, 8), [570, 211, 121, 122]);
    }

    #[test]
    fn bounds_hold_and_the_rest_is_divided_in_rounds() {
        // 32 + 4 · 68 = 304 is more than three times the mean; four entries go to the others, in order.
        assert_eq!(targets(&[1.0, 0.0, 0.0, 0.0], &[10_000; 4], 100, 8), [300, 34, 33, 33]);
        // A layer that stores 200 leaves 104.
        assert_eq!(targets(&[1.0, 0.0, 0.0, 0.0], &[200, 9999, 9999, 9999], 100, 8), [200, 67, 67, 66]);
        // Nobody else stores anything: then more than three times the mean.
        assert_eq!(targets(&[0.0, 1.0], &[1000, 3], 4, 0), [5, 3]);
        assert_eq!(targets(&[0.0, 1.0, 0.0, 0.0, 0.0], &[1000, 3, 3, 3, 3], 50, 0), [238, 3, 3, 3, 3]);
    }

    #[test]
    fn small_targets_and_protected_entries_narrow_the_differences() {
        assert_eq!(targets(&[0.6, 0.4], &[1000; 2], 20, 8), [20, 20], "less than the base");
        assert_eq!(targets(&[0.6, 0.4], &[1000; 2], 100, 90), [102, 98]);
        assert_eq!(targets(&[0.0, 0.0], &[1000; 2], 100, 8), [100, 100]);
        assert_eq!(targets(&[0.9, 0.1], &[90, 100], 100, 8), [100, 100], "nothing to drop");
    }

    proptest! {
        #[test]
        fn the_sum_is_exact(
            layers in prop::collection::vec((0.0f32..1.0, 1usize..3000), 1..40), target in 0usize..2000, recent in 0usize..100,
        ) {
            let (errors, rows): (Vec<f32>, Vec<usize>) = layers.into_iter().unzip();
            let got = targets(&errors, &rows, target, recent);
            if rows.iter().any(|&rows| rows > target) {
                prop_assert_eq!(got.iter().sum::<usize>(), rows.iter().sum::<usize>().min(target * rows.len()));
                prop_assert!(got.iter().zip(&rows).all(|(got, rows)| got <= rows));
                prop_assert!(got.iter().zip(&rows).all(|(&got, &rows)| got >= 32.min(target).min(rows)), "{:?}", got);
            }
        }
    }
}
