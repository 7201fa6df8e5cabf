//! Scorers: how much each stored entry matters.
//!
//! *Helps* because a method is then one function from a [`LayerView`] to one number per entry. *Hurts*
//! nothing; numbers that need kernels are asked of [`LayerView::backend`], never computed from pages.

use super::registry::{Args, Entry};
use super::schedule::Schedule;
use super::{LayerScores, LayerView};
use crate::device::HeadRows;
use crate::error::{PolicyError, RecipeError};
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
use std::borrow::Cow;

macro_rules! scorers {
    ($($module:ident,)*) => {
        $(pub mod $module;)*

        /// The built-in scorers.
        pub const ENTRIES: &[Entry] = &[$($module::ENTRY,)*];
    };
}

// One line per scorer: the file of that name, with its `ENTRY`.
scorers! {
    snapkv,
    h2o,
    scissorhands,
    tova,
    streaming,
    knorm,
    random,
    compresskv,
    locret,
    kvzap,
    kvzip,
}

mod network;

/// For scorers that judge a prompt once.
const PREFILL: Schedule = Schedule { prefill: true, chunk: false, every: None, over: None };

/// For scorers that go on judging while tokens are generated, so that memory stays bounded. 32 entries of
/// slack: one compaction copies the whole budget, so it should not run for every token.
const BOUNDED: Schedule = Schedule { prefill: true, chunk: false, every: None, over: Some(32) };

/// How the query heads that share a KV head are joined into one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupAggregate {
    /// Their mean.
    #[default]
    Mean,
    /// Their maximum.
    Max,
    /// Their sum: the mean times `G`, the same ranking.
    Sum,
}

impl GroupAggregate {
    const WORDS: &[&str] = &["mean", "max", "sum"];

    fn from_args(args: &Args) -> Result<Self, RecipeError> {
        Ok(match args.word("agg")? {
            "max" => Self::Max,
            "sum" => Self::Sum,
            _ => Self::Mean,
        })
    }

    /// Joins the group's values for one entry.
    fn join(self, values: impl ExactSizeIterator<Item = f32>) -> f32 {
        let group = values.len().max(1) as f32;
        match self {
            Self::Mean => values.sum::<f32>() / group,
            Self::Max => values.fold(f32::NEG_INFINITY, f32::max),
            Self::Sum => values.sum(),
        }
    }
}

/// Attention that the last `count` recorded queries, or fewer if fewer were recorded, paid to every entry: summed over the
/// queries, `[G, rows]` per KV head, with the positions of the queries.
pub(crate) fn window_sums<'a>(
    policy: &str,
    view: &LayerView<'a>,
    count: usize,
) -> Result<(Vec<f32>, &'a [i32]), PolicyError> {
    let (queries, positions) = last_queries(policy, view, count)?;
    let mut out = vec![0.0; view.shape.group() * total_rows(view.heads)];
    let reduce = WindowReduce::Sum;
    let mut args = WindowArgs { heads: view.heads, queries: &queries, positions, reduce, out: &mut out };
    view.backend.window_scores(&AttentionParams::of(view.shape), &mut args)?;
    Ok((out, positions))
}

/// As [`window_sums`], of some query heads only: a row over the entries of its KV head for each.
fn window_sums_of<'a>(
    policy: &str,
    view: &LayerView<'a>,
    count: usize,
    query_heads: &[usize],
) -> Result<(Vec<f32>, &'a [i32]), PolicyError> {
    let (queries, positions) = last_queries(policy, view, count)?;
    let params = AttentionParams::of(view.shape);
    // Each of them as a KV head of its own: no other query head of its group is computed.
    let of = |&head: &usize| view.heads[head / params.group].clone();
    let heads: Vec<HeadRows> = query_heads.iter().map(of).collect();
    let row = positions.len() * view.shape.d_k;
    let queries: Vec<f32> =
        query_heads.iter().flat_map(|&head| queries[head * row..(head + 1) * row].iter().copied()).collect();
    let sinks: Option<Vec<f32>> =
        params.sink_logits.map(|logits| query_heads.iter().map(|&head| logits[head]).collect());
    let params = AttentionParams { group: 1, sink_logits: sinks.as_deref(), ..params };
    let mut out = vec![0.0; total_rows(&heads)];
    let reduce = WindowReduce::Sum;
    let mut args = WindowArgs { heads: &heads, queries: &queries, positions, reduce, out: &mut out };
    view.backend.window_scores(&params, &mut args)?;
    Ok((out, positions))
}

/// The last `count` recorded queries, `[Hq, count, d_k]`, with their positions; fewer if fewer were recorded.
fn last_queries<'a>(
    policy: &str,
    view: &LayerView<'a>,
    count: usize,
) -> Result<(Cow<'a, [f32]>, &'a [i32]), PolicyError> {
    let (recorded, d_k) = (view.queries.positions.len(), view.shape.d_k);
    if recorded == 0 {
        return Err(PolicyError::Missing {
            policy: policy.to_owned(),
            need: format!("the last {count} queries"),
            layer: view.layer,
            hint: "; attend a token before compressing, or choose a policy that reads no queries (knorm, streaming)",
        });
    }
    let skip = recorded.saturating_sub(count);
    if skip == 0 {
        return Ok((Cow::Borrowed(view.queries.rows), view.queries.positions));
    }
    let heads = view.queries.rows.chunks_exact(recorded * d_k);
    let rows = heads.flat_map(|head| head[skip * d_k..].iter().copied()).collect();
    Ok((Cow::Owned(rows), &view.queries.positions[skip..]))
}

/// A declared column as `f32`, or the error that says it is not there.
fn column(policy: &str, view: &LayerView<'_>, name: &'static str) -> Result<Vec<f32>, PolicyError> {
    view.column_f32(name).ok_or_else(|| missing_column(policy, view, name))
}

fn missing_column(policy: &str, view: &LayerView<'_>, name: &'static str) -> PolicyError {
    PolicyError::Missing {
        policy: policy.to_owned(),
        need: format!("the column {name:?}"),
        layer: view.layer,
        hint: "; build the cache with this policy, so that it keeps the columns the policy declares",
    }
}

/// One number per entry from its KV head and position.
fn by_position(view: &LayerView<'_>, score: impl Fn(usize, i32) -> f32) -> LayerScores {
    let score = &score;
    let values = (0..view.heads.len()).flat_map(|h| view.positions(h).map(move |p| score(h, p))).collect();
    LayerScores { lengths: view.lengths(), values }
}
