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
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
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
    Ok(Arc::new(SnapKv { window: args.count("window")?, kernel, pool, agg: GroupAggregate::from_args(args)? }))
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
        let (queries, positions) = score::last_queries(ENTRY.name, view, self.window)?;
        let (group, lengths) = (view.shape.group(), view.lengths());
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
    fn pooled(&self, view: &LayerView<'_>, candidates: &[usize], rows: Vec<f32>) -> Result<Vec<f32>, PolicyError> {
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
