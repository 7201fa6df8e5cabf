//! TOVA: the attention weight of the latest query, averaged over all query heads.
//!
//! *Helps* generation of any length at constant memory, and engines with one page table per sequence: every
//! KV head of a layer keeps the same positions. *Hurts* when one query says little about the next, and it
//! has no memory: what a single token does not look at can be lost.

use crate::error::{PolicyError, RecipeError};
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Needs, Scorer, score};
use std::collections::HashMap;
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "tova",
    summary: "attention of the latest query, mean over all query heads; all KV heads keep the same positions",
    source: "Oren et al. 2024, arXiv:2401.06104",
    needs: "the last query",
    args: &[Arg::count("recent", 1, 0, usize::MAX, "last entries protected; the paper protects none")],
    build: Build::Score { schedule: score::BOUNDED, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(Tova { recent: args.count("recent")? }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct Tova {
    /// Last entries protected.
    pub recent: usize,
}

impl Default for Tova {
    fn default() -> Self {
        Self { recent: 1 }
    }
}

impl Scorer for Tova {
    fn needs(&self) -> Needs {
        Needs { queries: 1, ..Needs::default() }
    }

    fn protect(&self, _: usize) -> (usize, usize) {
        (0, self.recent)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let (queries, positions) = score::last_queries(ENTRY.name, view, 1)?;
        let group = view.shape.group();
        let mut weights = vec![0.0; group * total_rows(view.heads)];
        view.backend.window_scores(
            &AttentionParams::of(view.shape),
            &mut WindowArgs {
                heads: view.heads,
                queries: &queries,
                positions,
                reduce: WindowReduce::Sum,
                out: &mut weights,
            },
        )?;
        // Heads may hold different positions (after an allocator that makes them compete), so the mean goes
        // by position, over the query heads that still hold it.
        let mut sums: HashMap<i32, (f32, f32)> = HashMap::new();
        let mut rest = weights.as_slice();
        for (head, &rows) in view.lengths().iter().enumerate() {
            let (block, tail) = rest.split_at(group * rows);
            rest = tail;
            for (slot, position) in view.positions(head).enumerate() {
                let sum = sums.entry(position).or_default();
                sum.0 += (0..group).map(|g| block[g * rows + slot]).sum::<f32>();
                sum.1 += group as f32;
            }
        }
        Ok(score::by_position(view, |_, position| sums.get(&position).map_or(0.0, |(sum, n)| sum / n)))
    }
}
