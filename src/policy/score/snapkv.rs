//! SnapKV: the attention that the last queries of the prompt (the observation window) pay to each entry,
//! pooled over neighbours.
//!
//! *Helps* when the window asks the question whose answer lies in the prompt: the best cheap method then.
//! *Hurts* when the question comes later, and at the start of the text: average pooling counts the zero
//! padding, so it can drop the sinks. Protect those with `sinks=4`.
//!
//! `N` entries, `W` queries, candidates `j` older than the window, query head `h` of KV head `c`:
//! ```text
//! a[h,i,j] = softmax over all N entries of (q[h,i] · k[j])
//! s[c,j]   = agg over the group of pool_k( (1/W) Σ_i a[h,i,j] )
//! ```
//! Entries of the window itself are kept by protection. Their raw score is one above every candidate's, so
//! that whoever ranks raw scores keeps them too.

use crate::error::{PolicyError, RecipeError};
use crate::kernel::pool::{PoolArgs, PoolKind};
use crate::policy::registry::{Arg, Args, Build, Entry};
use crate::policy::score::GroupAggregate;
use crate::policy::{LayerScores, LayerView, Needs, Scorer, score};
use std::sync::Arc;

/// Registry entry.
pub const ENTRY: Entry = Entry {
    name: "snapkv",
    summary: "attention of the last queries, pooled over neighbours",
    source: "Li et al. 2024, arXiv:2404.14469",
    needs: "the last `window` queries",
    args: &[
        Arg::count("window", 64, 1, 65_536, "queries that vote; their entries are protected"),
        Arg::count("kernel", 5, 1, 65_535, "width of the pooling, odd; 1 is none"),
        Arg::word("pool", &["avg", "max"], "how neighbours are combined; avg counts padding as 0"),
        Arg::word("agg", GroupAggregate::WORDS, "how the query heads of a KV head are joined, after pooling"),
    ],
    build: Build::Score { schedule: score::PREFILL, build },
};

fn build(args: &Args) -> Result<Arc<dyn Scorer>, RecipeError> {
    let kernel = args.count("kernel")?;
    if kernel.is_multiple_of(2) {
        return Err(args.error("kernel", kernel, "odd, so that it has a middle"));
    }
    let pool = if args.word("pool")? == "max" { PoolKind::Max } else { PoolKind::Average };
    Ok(Arc::new(SnapKv {
        window: args.count("window")?,
        kernel,
        pool,
        agg: GroupAggregate::from_args(args)?,
    }))
}

/// See the [module](self).
#[derive(Clone, Copy, Debug)]
pub struct SnapKv {
    /// Queries that vote.
    pub window: usize,
    /// Width of the pooling, odd.
    pub kernel: usize,
    /// How neighbours are combined.
    pub pool: PoolKind,
    /// How the query heads of a KV head are joined.
    pub agg: GroupAggregate,
}

impl Default for SnapKv {
    fn default() -> Self {
        Self { window: 64, kernel: 5, pool: PoolKind::Average, agg: GroupAggregate::Mean }
    }
}

impl Scorer for SnapKv {
    fn needs(&self) -> Needs {
        Needs { queries: self.window, ..Needs::default() }
    }

    fn protect(&self, _: usize) -> (usize, usize) {
        (0, self.window)
    }

    fn score(&self, view: &LayerView<'_>) -> Result<LayerScores, PolicyError> {
        let (weights, positions) = score::window_sums(ENTRY.name, view, self.window)?;
        let (group, lengths) = (view.shape.group(), view.lengths());

        // Candidate columns only, each query head a row: the window must not leak into its neighbours.
        let candidates: Vec<usize> =
            (0..lengths.len()).map(|h| view.positions(h).take_while(|&p| p < positions[0]).count()).collect();
        let mut rows = Vec::with_capacity(weights.len());
        let mut rest = weights.as_slice();
        for (&len, &keep) in lengths.iter().zip(&candidates) {
            let (head, tail) = rest.split_at(group * len);
            rest = tail;
            for g in 0..group {
                rows.extend_from_slice(&head[g * len..g * len + keep]);
            }
        }
        let share = 1.0 / positions.len() as f32;
        rows.iter_mut().for_each(|w| *w *= share);
        let rows = self.pooled(view, &candidates, rows)?;

        let mut joined = Vec::with_capacity(candidates.iter().sum());
        let mut rest = rows.as_slice();
        for &n in &candidates {
            let (head, tail) = rest.split_at(group * n);
            rest = tail;
            joined.extend((0..n).map(|j| self.agg.join((0..group).map(|g| head[g * n + j]))));
        }
        let window = joined.iter().copied().fold(0.0, f32::max) + 1.0;
        let mut values = Vec::with_capacity(lengths.iter().sum());
        let mut rest = joined.as_slice();
        for (&len, &n) in lengths.iter().zip(&candidates) {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            values.extend_from_slice(head);
            values.extend(std::iter::repeat_n(window, len - n));
        }
        Ok(LayerScores { lengths, values })
    }
}

impl SnapKv {
    fn pooled(
        &self,
        view: &LayerView<'_>,
        candidates: &[usize],
        rows: Vec<f32>,
    ) -> Result<Vec<f32>, PolicyError> {
        if self.kernel == 1 {
            return Ok(rows);
        }
        let lengths: Vec<usize> =
            candidates.iter().flat_map(|&n| std::iter::repeat_n(n, view.shape.group())).collect();
        let mut out = vec![0.0; rows.len()];
        view.backend.pool(&mut PoolArgs {
            kind: self.pool,
            width: self.kernel,
            lengths: &lengths,
            input: &rows,
            out: &mut out,
        })?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Reference;
    use crate::policy::allocate::uniform::Uniform;
    use crate::policy::{Policy, Staged};
    use crate::testing::layer::LayerCase;

    /// Eight entries, the last two of which are the window.
    const ROWS: [[f32; 8]; 2] =
        [[0.30, 0.02, 0.20, 0.03, 0.05, 0.10, 0.30, 1.0], [0.20, 0.02, 0.30, 0.03, 0.05, 0.15, 0.05, 0.20]];

    fn case(backend: &Reference) -> LayerCase<'_> {
        LayerCase::attention(backend, 1, Vec::new(), &[ROWS.map(|r| r.to_vec()).to_vec()]).unwrap()
    }

    fn snapkv(kernel: usize, pool: PoolKind) -> SnapKv {
        SnapKv { window: 2, kernel, pool, agg: GroupAggregate::Mean }
    }

    /// What `pooling` keeps of four entries, and the sums over the window.
    #[track_caller]
    fn check(pooling: SnapKv, sums: [f32; 6], kept: [u32; 4]) {
        let backend = Reference::default();
        let case = case(&backend);
        let scores = pooling.score(&case.view(4)).unwrap().values;
        for (score, sum) in scores.iter().zip(sums) {
            assert!((score * 2.0 - sum).abs() < 1e-3, "{scores:?}");
        }
        let policy = Staged::new("snapkv", Arc::new(pooling), Arc::new(Uniform));
        assert_eq!(policy.plan(&case.view(4)).unwrap().heads[0].keep, kept);
    }

    #[test]
    fn without_pooling_the_peaks_stay() {
        check(snapkv(1, PoolKind::Average), [0.50, 0.04, 0.50, 0.06, 0.10, 0.25], [0, 2, 6, 7]);
    }

    #[test]
    fn average_pooling_evicts_both_peaks_and_the_sink() {
        check(snapkv(3, PoolKind::Average), [0.180, 0.347, 0.200, 0.220, 0.137, 0.117], [1, 3, 6, 7]);
    }

    #[test]
    fn ties_of_max_pooling_go_to_the_older() {
        check(snapkv(3, PoolKind::Max), [0.50, 0.50, 0.50, 0.50, 0.25, 0.25], [0, 1, 6, 7]);
    }

    #[test]
    fn protected_sinks_survive_average_pooling() {
        let backend = Reference::default();
        let case = case(&backend);
        let policy =
            Staged::new("snapkv", Arc::new(snapkv(3, PoolKind::Average)), Arc::new(Uniform)).sinks(1);
        assert_eq!(policy.plan(&case.view(4)).unwrap().heads[0].keep, [0, 1, 6, 7]);
    }

    #[test]
    fn the_window_outranks_every_candidate_and_a_short_one_is_used_as_it_is() {
        let backend = Reference::default();
        let case = case(&backend);
        let scores = SnapKv::default().score(&case.view(4)).unwrap().values;
        assert!(scores[..6].iter().all(|s| *s < scores[6]) && scores[6] == scores[7], "{scores:?}");
    }

    #[test]
    fn groups_are_joined_after_pooling() {
        let backend = Reference::default();
        let quiet = vec![0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2];
        let weights = [ROWS.map(|r| r.to_vec()).to_vec(), vec![quiet.clone(), quiet]];
        let case = LayerCase::attention(&backend, 1, Vec::new(), &weights).unwrap();
        let score = |agg| SnapKv { agg, ..snapkv(3, PoolKind::Max) }.score(&case.view(4)).unwrap().values[4];
        // Head 0 pools to .125; head 1 sees .1/.8 in the first row (the last entry is hidden) and .1 in the
        // second: a mean of .1125.
        assert!((score(GroupAggregate::Mean) - 0.11875).abs() < 1e-6);
        assert!((score(GroupAggregate::Max) - 0.125).abs() < 1e-6);
        assert!((score(GroupAggregate::Sum) - 0.2375).abs() < 1e-6);
    }

    #[test]
    fn no_queries_is_an_error_with_a_hint() {
        let backend = Reference::default();
        let mut case = case(&backend);
        case.record(Vec::new(), Vec::new());
        let error = SnapKv::default().score(&case.view(4)).unwrap_err().to_string();
        assert!(error.contains("the last 64 queries") && error.contains("knorm"), "{error}");
    }
}
