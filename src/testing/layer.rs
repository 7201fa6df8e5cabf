//! One layer of one sequence with given keys and queries, as a policy sees it, without a cache around it.
//!
//! *Helps* authors of policies: a worked example becomes a test in a few lines, also from the attention
//! weights alone. *Hurts* nothing; what a cache adds (schedules, forks) is tested with a cache.

use crate::backend::Backend;
use crate::columns::{ColumnLayout, ColumnSpec, ColumnsMut};
use crate::device::page::{HeadRows, PageLayout};
use crate::error::Error;
use crate::geometry::{LayerShape, Position};
use crate::kernel::window_scores::{WindowArgs, WindowReduce};
use crate::kernel::{AttentionParams, total_rows};
use crate::policy::{Feed, FeedKind, LayerView, QueryWindow, seen_by};
use crate::store::{self, NewRows};
use crate::view::DType;
use std::sync::Arc;

/// A layer under construction.
#[derive(Debug)]
pub struct LayerCase<'a> {
    /// Where its pages live.
    pub backend: &'a dyn Backend,
    /// Its geometry.
    pub shape: LayerShape,
    /// Its KV heads.
    pub heads: Vec<HeadRows>,
    columns: ColumnLayout,
    layout: Arc<PageLayout>,
    queries: Vec<f32>,
    query_positions: Vec<i32>,
}

impl<'a> LayerCase<'a> {
    /// An empty layer in `f32` pages of five entries, so that a handful of entries spans several pages.
    pub fn new(backend: &'a dyn Backend, shape: LayerShape, columns: Vec<ColumnSpec>) -> Self {
        let columns = ColumnLayout::new(columns);
        let mirrored = backend.mirrored();
        let layout = PageLayout::new(&shape, 5, DType::F32, DType::F32, mirrored, columns.words());
        Self {
            backend,
            heads: vec![HeadRows::default(); shape.kv_heads],
            shape,
            columns,
            layout: Arc::new(layout),
            queries: Vec::new(),
            query_positions: Vec::new(),
        }
    }

    /// A layer whose queries pay exactly these attention weights: `weights[query head][row]` has a positive
    /// weight for each of the `n` entries, summing to 1. Row `i` belongs to the query at position
    /// `n − rows + i`; weights of entries it cannot see are ignored and may be anything positive.
    ///
    /// Keys are unit vectors and queries the logarithms of the weights, so each logit is one logarithm.
    ///
    /// # Errors
    /// What the backend says.
    ///
    /// # Panics
    /// If the rows have different lengths.
    pub fn attention(
        backend: &'a dyn Backend,
        kv_heads: usize,
        columns: Vec<ColumnSpec>,
        weights: &[Vec<Vec<f32>>],
    ) -> Result<Self, Error> {
        let (rows, n) = (weights[0].len(), weights[0][0].len());
        let shape = LayerShape { scale: 1.0, ..LayerShape::new(weights.len(), kv_heads, n) };
        let mut case = Self::new(backend, shape, columns);
        let positions: Vec<i32> = (0..n as i32).collect();
        let keys: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
        for head in 0..kv_heads {
            case.append(head, &positions, &keys, &vec![0.0; n * n])?;
        }
        let queries: Vec<f32> = weights.iter().flatten().flatten().map(|w| w.ln()).collect();
        assert_eq!(queries.len(), weights.len() * rows * n, "rows of different lengths");
        case.record(queries, positions[n - rows..].to_vec());
        Ok(case)
    }

    /// Appends entries to a KV head: `keys [n, d_k]`, `values [n, d_v]`.
    ///
    /// # Errors
    /// What the backend says.
    pub fn append(
        &mut self,
        head: usize,
        positions: &[i32],
        keys: &[f32],
        values: &[f32],
    ) -> Result<(), Error> {
        let new = NewRows { positions, keys, values };
        Ok(store::append(self.backend, &self.layout, &mut self.heads[head], new)?)
    }

    /// Sets the recorded queries: `[Hq, W, d_k]`, rotated as the keys are.
    pub fn record(&mut self, queries: Vec<f32>, positions: Vec<i32>) {
        self.queries = queries;
        self.query_positions = positions;
    }

    /// Hands the attention of the recorded queries to a policy's or scorer's `observe`, as one committed step
    /// would.
    ///
    /// # Errors
    /// What the backend says.
    pub fn feed(
        &mut self,
        feed: FeedKind,
        observe: impl Fn(&Feed<'_>, &mut ColumnsMut<'_>),
    ) -> Result<(), Error> {
        let all = self.query_positions.len();
        let calls: Vec<(usize, usize)> = match feed {
            FeedKind::None => Vec::new(),
            FeedKind::Mass => vec![(0, all)],
            FeedKind::Rows { last } => (all.saturating_sub(last)..all).map(|i| (i, i + 1)).collect(),
        };
        for (from, to) in calls {
            let positions = &self.query_positions[from..to];
            let d_k = self.shape.d_k;
            let heads = self.queries.chunks_exact(all * d_k);
            let queries: Vec<f32> = heads.flat_map(|h| h[from * d_k..to * d_k].to_vec()).collect();
            let group = self.shape.group();
            let mut weights = vec![0.0; group * total_rows(&self.heads)];
            self.backend.window_scores(
                &AttentionParams::of(&self.shape),
                &mut WindowArgs {
                    heads: &self.heads,
                    queries: &queries,
                    positions,
                    reduce: WindowReduce::Sum,
                    out: &mut weights,
                },
            )?;
            let (window, mut rest) = (self.shape.window, weights.as_slice());
            for head in &mut self.heads {
                let head_rows = head.rows();
                let (weights, tail) = rest.split_at(group * head_rows);
                rest = tail;
                let seen = positions.last().map_or(0, |&q| seen_by(head, q, window));
                store::update_columns(self.backend, head, |entries, first, columns| {
                    let feed = Feed {
                        positions: entries,
                        queries: positions,
                        head_rows,
                        weights,
                        first,
                        window,
                        seen,
                    };
                    observe(&feed, columns);
                })?;
            }
        }
        Ok(())
    }

    /// What a policy is shown when each KV head is to keep `target` entries.
    pub fn view(&self, target: usize) -> LayerView<'_> {
        let last =
            self.heads.iter().flat_map(HeadRows::pages).flat_map(|p| p.positions().last().copied()).max();
        LayerView {
            layer: 0,
            shape: &self.shape,
            heads: &self.heads,
            next: Position(last.map_or(0, |p| p + 1)),
            target,
            queries: QueryWindow { rows: &self.queries, positions: &self.query_positions },
            columns: &self.columns,
            remembered: &[],
            backend: self.backend,
        }
    }
}
