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
    args: &[Arg::count("beta", 20, 1, 1_000_000, "the last layer keeps 1/beta of the mean, the first 2 − 1/beta")],
    build: Build::Allocate { build },
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
