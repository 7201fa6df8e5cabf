//! PyramidKV: early layers keep more entries than late ones, on a straight line.
//!
//! *Helps* where early layers spread their attention and late ones gather it. *Hurts* more often than the
//! name suggests: its authors' own later runs put it slightly below the uniform rule at equal memory.
//!
//! With `r` recent entries protected, `b = target − r`, `N` entries in the longest layer, `L` layers:
//! ```text
//! min = ⌊b / β⌋      max = 2b − min      if max ≥ N − r: max = N − r, min = 2b − max
//! keep_l = r + max − l · (max − min) / (L − 1)
//! ```
//! The released code floors the step `(max − min) / (L − 1)` first, so its sum exceeds `L · b` (by 4.6 % at
//! 128 entries and 32 layers). Here the fraction is rounded down in the first half of the layers and up in
//! the second: the line is symmetric about `b`, so the roundings cancel and the sum is exact.

use super::{Allocator, HeadRequest};
use crate::error::{PolicyError, RecipeError};
use crate::policy::TargetRequest;
use crate::policy::allocate::uniform::Uniform;
use crate::policy::registry::{Arg, Args, Build, Entry};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "pyramid",
    summary: "layer budgets fall on a straight line from the first layer to the last",
    source: "Cai et al. 2024, arXiv:2406.02069",
    needs: "nothing of its own",
    args: &[Arg::count(
        "beta",
        20,
        1,
        1_000_000,
        "the last layer keeps 1/beta of the mean, the first 2 − 1/beta",
    )],
    build: Build::Allocate { over: "snapkv", schedule: None, build },
};

fn build(args: &Args) -> Result<Arc<dyn Allocator>, RecipeError> {
    Ok(Arc::new(Pyramid { beta: args.count("beta")? }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Pyramid {
    /// Steepness, ≥ 1; 1 is uniform.
    pub beta: usize,
}

impl Default for Pyramid {
    fn default() -> Self {
        Self { beta: 20 }
    }
}

impl Allocator for Pyramid {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn equal_counts(&self) -> bool {
        false
    }

    fn layer_targets(&self, request: &TargetRequest<'_>) -> Vec<usize> {
        let layers = request.layers.len();
        let recent = request.recent.min(request.target);
        let mean = request.target - recent;
        let room = request.rows.iter().copied().max().unwrap_or(0).saturating_sub(recent);
        // Nothing to drop, or nothing to divide.
        if layers < 2 || mean == 0 || room <= mean {
            return vec![request.target; layers];
        }
        let max = (2 * mean - mean / self.beta.max(1)).min(room);
        let fall = max - (2 * mean - max);
        (0..layers)
            .map(|l| {
                let exact = l * fall;
                let last = layers - 1;
                let drop = if 2 * l < last { exact / last } else { exact.div_ceil(last) };
                recent + max - drop
            })
            .collect()
    }

    fn head_counts(&self, request: &HeadRequest<'_>) -> Result<Vec<usize>, PolicyError> {
        Uniform.head_counts(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn targets(cap: usize, window: usize, beta: usize, layers: usize, rows: usize) -> Vec<usize> {
        let indices: Vec<usize> = (0..layers).collect();
        let request = TargetRequest {
            layers: &indices,
            rows: &vec![rows; layers],
            target: cap,
            recent: window,
            measures: &[],
        };
        Pyramid { beta }.layer_targets(&request).iter().map(|t| t - window).collect()
    }

    /// The integers of the released code, whose step is floored.
    fn original(cap: usize, window: usize, beta: usize, layers: usize, rows: usize) -> Vec<usize> {
        let b = cap - window;
        let mut min = b / beta;
        let mut max = 2 * b - min;
        if max >= rows - window {
            max = rows - window;
            min = 2 * b - max;
        }
        let step = (max - min) / (layers - 1);
        (0..layers).map(|l| max - l * step).collect()
    }

    #[test]
    fn worked_examples() {
        let long = original(2048, 8, 20, 32, 10_000);
        assert_eq!((long[0], long[1], long[30], long[31]), (3978, 3853, 228, 103));
        assert_eq!(long.iter().sum::<usize>(), 65_296);
        let ours = targets(2048, 8, 20, 32, 10_000);
        assert_eq!((ours[0], ours[31]), (3978, 102), "from 2b − ⌊b/β⌋ to ⌊b/β⌋ exactly");
        assert_eq!(ours.iter().sum::<usize>(), 65_280);

        let small = original(128, 8, 20, 32, 10_000);
        assert_eq!((small[0], small[31], small.iter().sum::<usize>()), (234, 17, 4016));
        let ours = targets(128, 8, 20, 32, 10_000);
        assert_eq!((ours[0], ours[31], ours.iter().sum::<usize>()), (234, 6, 3840));

        assert_eq!(original(104, 4, 20, 5, 10_000), [195, 148, 101, 54, 7]);
        assert_eq!(targets(104, 4, 20, 5, 10_000), [195, 148, 100, 52, 5]);
    }

    #[test]
    fn short_prompts_narrow_the_pyramid_until_nothing_is_dropped() {
        assert_eq!(targets(104, 4, 20, 3, 154), [150, 100, 50]);
        assert_eq!(targets(104, 4, 20, 3, 105), [101, 100, 99]);
        assert_eq!(targets(104, 4, 20, 3, 104), [100, 100, 100]);
        assert_eq!(targets(104, 104, 20, 3, 1000), [0, 0, 0]);
        assert_eq!(targets(104, 4, 20, 1, 1000), [100]);
    }

    proptest! {
        #[test]
        fn the_sum_is_the_budget_and_layers_fall(
            cap in 0usize..5000, window in 0usize..100, beta in 1usize..60, layers in 1usize..100, rows in 0usize..20_000,
        ) {
            let window = window.min(cap);
            let got = targets(cap, window, beta, layers, rows);
            prop_assert_eq!(got.iter().sum::<usize>(), layers * (cap - window));
            prop_assert!(got.is_sorted_by(|a, b| a >= b), "{:?}", got);
            if rows > cap {
                prop_assert!(got.iter().all(|&t| t + window <= rows));
            }
        }
    }
}
