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

impl Scorer for Random {
    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let place = |words: [u64; 3]| words.iter().fold(self.seed, |h, &w| mix(h.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ w));
        Ok(score::by_position(view, |head, position| {
            let bits = place([view.layer as u64, head as u64, u64::from(position as u32)]);
            // 24 bits: what an f32 in 0..1 holds exactly.
            (bits >> 40) as f32 / (1u32 << 24) as f32
        }))
    }
}
