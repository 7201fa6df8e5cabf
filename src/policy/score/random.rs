//! A fixed random number per layer, KV head and position: the floor any scorer must clear.
//!
//! *Helps* to tell what a score is worth, and in tests. *Hurts* whoever uses it for anything else.

use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "random",
    summary: "keeps entries at random, reproducibly: the control",
    source: "a control, not a method",
    needs: "nothing",
    args: &[Arg::count("seed", 0, 0, usize::MAX, "another seed, another choice")],
    build: Build::Score { schedule: score::PREFILL, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(Random { seed: args.count("seed")? as u64 }))
}

/// See the [module](self). Independent of slots, of chunking and of the backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random {
    /// Another seed, another choice.
    pub seed: u64,
}

/// A bijection of 64-bit words in which every input bit flips about half of the output bits: two rounds of
/// multiply and xor-shift with the odd constants of the splitmix64 generator.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number in `[0, 1)` for the entry at a position of a KV head, whatever slot it stands in.
pub(crate) fn chance(seed: u64, layer: usize, head: usize, position: i32) -> f32 {
    let words = [layer as u64, head as u64, u64::from(position as u32)];
    let bits = words.iter().fold(seed, |h, &w| mix(h.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ w));
    // 24 bits: what an f32 in 0..1 holds exactly.
    (bits >> 40) as f32 / (1u32 << 24) as f32
}

impl Scorer for Random {
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        Ok(score::by_position(view, |head, position| chance(self.seed, view.layer, head, position)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::geometry::LayerShape;
    use crate::testing::layer::LayerCase;
    use std::collections::HashSet;

    #[test]
    fn depends_on_seed_head_and_position_but_not_on_the_slot() {
        let backend = Reference::default();
        let score = |positions: &[i32], seed| {
            let mut case = LayerCase::new(&backend, LayerShape::new(2, 2, 1), Vec::new());
            let zeros = vec![0.0; positions.len()];
            case.append(0, positions, &zeros, &zeros).unwrap();
            case.append(1, positions, &zeros, &zeros).unwrap();
            Random { seed }.score(&case.view(1)).unwrap().values
        };
        let dense: Vec<i32> = (0..100).collect();
        let all = score(&dense, 0);
        assert_eq!(score(&[3, 50, 99], 0), [all[3], all[50], all[99], all[103], all[150], all[199]]);
        assert!(all.iter().all(|s| (0.0..1.0).contains(s)));
        let distinct: HashSet<u32> = all.iter().chain(&score(&dense, 1)).map(|s| s.to_bits()).collect();
        assert!(distinct.len() > 395, "{} of 400 numbers differ", distinct.len());
        let mean = all.iter().sum::<f32>() / all.len() as f32;
        assert!((mean - 0.5).abs() < 0.1, "{mean}");
    }
}
