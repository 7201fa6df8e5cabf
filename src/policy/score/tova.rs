//! TOVA: the attention weight of the latest query, averaged over all query heads.
//!
//! *Helps* generation of any length at constant memory, and engines with one page table per sequence: every
//! KV head of a layer keeps the same positions. *Hurts* when one query says little about the next, and it
//! has no memory: what a single token does not look at can be lost.

use crate::error::{PolicyError, RecipeError};
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
        let (weights, _) = score::window_sums(ENTRY.name, view, 1)?;
        let group = view.shape.group();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::testing::layer::LayerCase;

    fn close(a: &[f32], b: &[f32]) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[test]
    fn mean_over_all_query_heads_of_the_last_row() {
        let backend = Reference::default();
        let early = vec![0.7, 0.1, 0.1, 0.1];
        let weights = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]].map(|w| vec![early.clone(), w.to_vec()]);
        let case = LayerCase::attention(&backend, 2, Vec::new(), &weights).unwrap();
        let scores = Tova::default().score(&case.view(2)).unwrap();
        close(scores.head(0), &[0.25, 0.45, 0.2, 0.1]);
        close(scores.head(1), scores.head(0));

        let keep = |recent| {
            let policy = Staged::new("tova", Arc::new(Tova { recent }), Arc::new(Uniform));
            policy.plan(&case.view(2)).unwrap().heads[1].keep.clone()
        };
        assert_eq!(keep(1), [1, 3], "the last token is protected, as in kvpress");
        assert_eq!(keep(0), [0, 1], "the paper may drop even the last token");
    }

    #[test]
    fn heads_that_hold_different_positions_average_over_those_that_do() {
        let backend = Reference::default();
        let weights = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]].map(|w| vec![w.to_vec()]);
        let mut case = LayerCase::attention(&backend, 2, Vec::new(), &weights).unwrap();
        let plan = crate::plan::HeadPlan::new(4, vec![0, 2, 3]);
        let columns = &Default::default();
        crate::store::compact(&backend, &mut case.heads[0], &plan, columns, &mut Default::default()).unwrap();
        let scores = Tova::default().score(&case.view(2)).unwrap();
        // Head 0 now spreads over what it still holds: .4/.7, .2/.7, .1/.7.
        close(
            scores.head(1),
            &[(0.4 / 0.7 + 0.1) / 2.0, 0.6, (0.2 / 0.7 + 0.2) / 2.0, (0.1 / 0.7 + 0.1) / 2.0],
        );
        close(scores.head(0), &[scores.head(1)[0], scores.head(1)[2], scores.head(1)[3]]);
    }
}
