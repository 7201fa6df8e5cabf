//! StreamingLLM: the first entries (attention sinks) and the most recent ones.
//!
//! *Helps* endless generation at constant memory and no cost: nothing is read. *Hurts* everything that
//! stands in between: it is gone. With `positions=renumber` it is the paper's method, which counts
//! positions inside the cache; without, the usual baseline, which keeps them.

use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::{LayerScores, LayerView, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "streaming",
    summary: "keeps the first entries and the most recent ones",
    source: "Xiao et al. 2023, arXiv:2309.17453",
    needs: "nothing",
    args: &[Arg::count("sinks", 4, 0, usize::MAX, "first entries kept")],
    build: Build::Score { schedule: score::BOUNDED, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(Streaming { sinks: args.count("sinks")? }))
}

/// See the [module](self). Score 1 for the first `sinks` entries and the last `target − sinks`, 0 between.
#[derive(Clone, Copy, Debug)]
pub struct Streaming {
    /// First entries kept.
    pub sinks: usize,
}

impl Default for Streaming {
    fn default() -> Self {
        Self { sinks: 4 }
    }
}

impl Scorer for Streaming {
    fn protect(&self, _: usize) -> (usize, usize) {
        (self.sinks, 0)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let lengths = view.lengths();
        let sinks = self.sinks.min(view.target);
        let recent = view.target - sinks;
        let head = |&len: &usize| {
            (0..len).map(move |slot| if slot < sinks || slot + recent >= len { 1.0 } else { 0.0 })
        };
        let values = lengths.iter().flat_map(head).collect();
        Ok(LayerScores { lengths, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::testing::layer::LayerCase;

    #[test]
    fn keeps_the_ends() {
        let backend = Reference::default();
        let case = LayerCase::attention(&backend, 1, Vec::new(), &[vec![vec![0.1; 10]]]).unwrap();
        let policy = Staged::new("streaming", Arc::new(Streaming { sinks: 2 }), Arc::new(Uniform));
        for (target, want) in [(5, vec![0, 1, 7, 8, 9]), (2, vec![0, 1]), (1, vec![0]), (0, vec![])] {
            assert_eq!(policy.plan(&case.view(target)).unwrap().heads[0].keep, want, "target {target}");
        }
        assert_eq!(
            Streaming { sinks: 2 }.score(&case.view(3)).unwrap().values,
            [1., 1., 0., 0., 0., 0., 0., 0., 0., 1.]
        );
    }
}
