//! CaM, cache merging: the value of an entry that leaves is spread over the entries that follow it, as far as it was looked
//! at. Keys and mass stay.
//!
//! For an entry `e` and those of the next `B` entries behind it that are kept:
//! ```text
//! p = clamp(a[e] / mean a[j], 0, 1)        v[j] ← v[j] + p v[e] / B
//! ```
//! with `a` the observed attention. The authors' window moves by a token at a time, so that an entry meets the `B` after it;
//! of what a whole prompt drops at once, only what has a kept entry that near is merged. The paper draws whether to merge, with probability `p`; its expectation is the same
//! without chance, and the default. `draw=bernoulli` draws, by a hash of position and seed.
//!
//! *Helps* windows with sinks, for which it was made. *Hurts* where what leaves is followed by what has nothing to do with
//! it: its value then turns up where no query asked for it.

use super::{Reduced, Reducer};
use crate::error::{PolicyError, RecipeError};
use crate::plan::{LayerPlan, Merges, Source, Target};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::score::random::chance;
use crate::policy::{LayerView, Needs};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "cam",
    summary: "the value of a dropped entry is spread over the kept ones of those that follow it",
    source: "Zhang et al. 2024, ICML (CaM: Cache Merging for memory-efficient LLM inference)",
    needs: "the last `window` queries",
    args: &[
        Arg::count("window", 64, 1, 65_536, "last queries whose attention says how much is spread"),
        Arg::count("spread", 32, 1, 65_536, "entries behind one that its value is spread over"),
        Arg::word("draw", &["expected", "bernoulli"], "a share of every value, or all of some"),
        Arg::count("seed", 0, 0, usize::MAX, "of draw=bernoulli"),
    ],
    build: Build::Reduce { build },
};

fn build(args: &Args) -> Result<Arc<dyn Reducer>, RecipeError> {
    let seed = (args.word("draw")? == "bernoulli").then_some(args.count("seed")? as u64);
    Ok(Arc::new(Cam { window: args.count("window")?, spread: args.count("spread")?, seed }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Cam {
    /// Queries whose attention says how much is spread.
    pub window: usize,
    /// Entries behind one that its value is spread over.
    pub spread: usize,
    /// Of the draw, if chance decides.
    pub seed: Option<u64>,
}

impl Reducer for Cam {
    fn name(&self) -> &str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn reduce(&self, view: &LayerView<'_>, plan: &LayerPlan) -> Result<Reduced, PolicyError> {
        let weights = super::observed(ENTRY.name, view, self.window)?;
        let heads = plan.heads.iter().zip(super::by_head(view.heads, &weights)).enumerate();
        let heads = heads.map(|(head, (plan, weights))| {
            let positions: Vec<i32> = view.positions(head).collect();
            let mut taken: Vec<Vec<Source>> = vec![Vec::new(); plan.keep.len()];
            for slot in plan.leaving() {
                // Slots count tokens here: of those that follow within reach, the kept ones take their part.
                let reach = slot.saturating_add(u32::try_from(self.spread).unwrap_or(u32::MAX));
                let behind = plan.keep.partition_point(|&kept| kept < slot)
                    ..plan.keep.partition_point(|&kept| kept <= reach);
                let mean = behind.clone().map(|at| weights[plan.keep[at] as usize]).sum::<f32>();
                let share = weights[slot as usize] * behind.len() as f32 / mean;
                let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
                let share = match self.seed {
                    None => share,
                    Some(seed) => {
                        let drawn = chance(seed, view.layer, head, positions[slot as usize]);
                        f32::from(u8::from(drawn < share))
                    }
                };
                if share > 0.0 {
                    let value = share / self.spread as f32;
                    behind.for_each(|at| taken[at].push(Source { slot, key: 0.0, value }));
                }
            }
            let mut merges = Merges::default();
            for (&slot, sources) in plan.keep.iter().zip(taken).filter(|(_, sources)| !sources.is_empty()) {
                merges.push(Target { slot, sources: 0, key: 1.0, value: 1.0, bias: 0.0 }, sources);
            }
            merges
        });
        Ok(heads.collect::<Vec<_>>().into())
    }
}
