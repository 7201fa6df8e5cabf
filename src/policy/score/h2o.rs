//! H2O: attention mass summed over every query so far (heavy hitters), beside the most recent entries.
//!
//! *Helps* long generations: a sum over many queries forgets slowly. *Hurts* the young: entry `j` has been
//! seen by fewer queries than entry 0, and the raw sum does not forgive that. `norm=visibility` divides by
//! the number of queries that saw it, and then favours the very young. Costs a pass over the keys to get
//! every query's weights, so prefill is about one attention slower.
//!
//! ```text
//! mass[j] += agg over the group of Σ_{queries i of the step} a[h,i,j]
//! s[j]     = mass[j]   or   mass[j] / visits[j]
//! ```
//! The mean and the sum of a group do not depend on how tokens were split into steps; the maximum does, as
//! it is taken of each step's sums.

use crate::columns::{ColumnSpec, ColumnsMut};
use crate::error::{PolicyError, RecipeError};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::score::GroupAggregate;
use crate::policy::{Feed, FeedKind, LayerScores, LayerView, Needs, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "h2o",
    summary: "attention mass summed over all queries so far, beside the most recent entries",
    source: "Zhang et al. 2023, arXiv:2306.14048",
    needs: "the attention mass of every query",
    args: &[
        Arg::word("agg", GroupAggregate::WORDS, "how the query heads of a KV head are joined, step by step"),
        Arg::word("norm", &["none", "visibility"], "the raw sum, or per query that saw the entry"),
        Arg::real("recent_share", 0.5, 0.0, 1.0, "share of the target protected as recent; the paper's half"),
    ],
    build: Build::Score { schedule: score::BOUNDED, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    Ok(Arc::new(H2o {
        agg: GroupAggregate::from_args(args)?,
        visibility: args.word("norm")? == "visibility",
        recent_share: args.real("recent_share")?,
    }))
}

/// Word of the sum within the columns.
const MASS: usize = 0;
/// Word of the count.
const VISITS: usize = 1;

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct H2o {
    /// How the query heads of a KV head are joined.
    pub agg: GroupAggregate,
    /// Whether the sum is divided by the number of queries that saw the entry.
    pub visibility: bool,
    /// Share of the target that is protected as recent, `0 ..= 1`.
    pub recent_share: f64,
}

impl Default for H2o {
    fn default() -> Self {
        Self { agg: GroupAggregate::Mean, visibility: false, recent_share: 0.5 }
    }
}

impl Scorer for H2o {
    fn needs(&self) -> Needs {
        Needs { feed: FeedKind::Mass, ..Needs::default() }
    }

    fn columns(&self) -> Vec<ColumnSpec> {
        let mut columns = vec![ColumnSpec { name: "mass", words: 1 }];
        if self.visibility {
            columns.push(ColumnSpec { name: "visits", words: 1 });
        }
        columns
    }

    fn observe(&self, feed: &Feed<'_>, columns: &mut ColumnsMut<'_>) {
        let group = feed.group();
        for entry in 0..feed.positions.len() {
            let mass = self.agg.join((0..group).map(|g| feed.weights(g)[entry]));
            columns.add_f32(entry, MASS, mass);
            if self.visibility {
                // A count, not an f32: exact beyond 2^24 queries.
                let word = &mut columns.entry(entry)[VISITS];
                *word = word.saturating_add(feed.visits(entry) as u32);
            }
        }
    }

    fn protect(&self, target: usize) -> (usize, usize) {
        (0, (self.recent_share * target as f64) as usize)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let mut values = score::column(ENTRY.name, view, "mass")?;
        if self.visibility {
            let visits = view
                .column_words("visits")
                .ok_or_else(|| score::missing_column(ENTRY.name, view, "visits"))?;
            for (value, visits) in values.iter_mut().zip(visits) {
                *value /= visits.max(1) as f32;
            }
        }
        Ok(LayerScores { lengths: view.lengths(), values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::testing::layer::LayerCase;

    /// Attention of five queries over five entries; what a row cannot see is filler.
    const ROWS: [[f32; 5]; 5] = [
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [0.6, 0.4, 1.0, 1.0, 1.0],
        [0.5, 0.1, 0.4, 1.0, 1.0],
        [0.4, 0.1, 0.3, 0.2, 1.0],
        [0.3, 0.1, 0.3, 0.1, 0.2],
    ];

    fn fed(scorer: H2o, backend: &Reference) -> LayerCase<'_> {
        let weights = vec![ROWS.map(|r| r.to_vec()).to_vec(); 2];
        let mut case = LayerCase::attention(backend, 1, scorer.columns(), &weights).unwrap();
        case.feed(scorer.needs().feed, |feed, columns| scorer.observe(feed, columns)).unwrap();
        case
    }

    #[test]
    fn sums_and_their_visibility_norm() {
        let backend = Reference::default();
        for (scorer, want) in [
            (H2o::default(), [2.8, 0.7, 1.0, 0.3, 0.2]),
            (H2o { agg: GroupAggregate::Sum, ..H2o::default() }, [5.6, 1.4, 2.0, 0.6, 0.4]),
            (H2o { agg: GroupAggregate::Max, ..H2o::default() }, [2.8, 0.7, 1.0, 0.3, 0.2]),
            (H2o { visibility: true, ..H2o::default() }, [0.56, 0.175, 1.0 / 3.0, 0.15, 0.2]),
        ] {
            let got = scorer.score(&fed(scorer, &backend).view(3)).unwrap().values;
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{scorer:?}: {got:?}");
        }
    }

    #[test]
    fn heavy_hitters_beside_the_recent_ones() {
        let backend = Reference::default();
        let scorer = H2o::default();
        let case = fed(scorer, &backend);
        let policy = Staged::new("h2o", Arc::new(scorer), Arc::new(Uniform));
        let keep = |policy: &Staged, target| policy.plan(&case.view(target)).unwrap().heads[0].keep.clone();
        assert_eq!(keep(&policy.clone().recent(2), 3), [0, 3, 4], "one heavy, two recent");
        assert_eq!(keep(&policy, 4), [0, 2, 3, 4], "half of four are recent");
    }
}
