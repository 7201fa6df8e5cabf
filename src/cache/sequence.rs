//! One sequence: its rows in every layer, the position of its next token, and the last queries of each
//! layer for policies that look at them.
//!
//! *Helps* because a fork is a clone: pages are shared, counters copied. *Hurts* by one copy of the recorded
//! queries per fork (window × query heads × d_k floats a layer).

use super::guard::{GuardReport, Shadow};
use super::read::{Held, ReadReport};
use crate::device::HeadRows;
use crate::geometry::LayerShape;
use crate::index::{LayerIndex, Thresholds};
use crate::kernel::attend_factored::Remembered;
use crate::low_rank::LowRankRun;
use std::collections::VecDeque;

/// The handle of a sequence within its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// The last committed queries of one layer, `[Hq · d_k]` per token.
#[derive(Clone, Debug, Default)]
pub(super) struct QueryLog {
    rows: VecDeque<f32>,
    positions: VecDeque<i32>,
    row_len: usize,
}

impl QueryLog {
    pub(super) fn new(shape: &LayerShape) -> Self {
        Self { row_len: shape.query_heads * shape.d_k, ..Self::default() }
    }

    /// Appends token-major rows and forgets all but the last `keep`.
    pub(super) fn push(&mut self, rows: &[f32], positions: &[i32], keep: usize) {
        self.rows.extend(rows);
        self.positions.extend(positions);
        let excess = self.positions.len().saturating_sub(keep);
        self.rows.drain(..excess * self.row_len);
        self.positions.drain(..excess);
    }

    /// Forgets everything and gives the memory back.
    pub(super) fn clear(&mut self) {
        self.rows = VecDeque::new();
        self.positions = VecDeque::new();
    }

    /// Keeps the queries whose position satisfies the condition.
    pub(super) fn retain(&mut self, keep: impl Fn(i32) -> bool) {
        let mut rows = VecDeque::with_capacity(self.rows.len());
        for (i, &p) in self.positions.iter().enumerate() {
            if keep(p) {
                rows.extend(self.rows.range(i * self.row_len..(i + 1) * self.row_len));
            }
        }
        self.rows = rows;
        self.positions.retain(|&p| keep(p));
    }

    /// Tokens.
    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// The rows, token-major, with their positions.
    pub(super) fn token_major(&self) -> (Vec<f32>, Vec<i32>) {
        (self.rows.iter().copied().collect(), self.positions.iter().copied().collect())
    }

    /// Positions and token-major rows, writable, for a re-rotation.
    pub(super) fn parts_mut(&mut self) -> (&mut [i32], &mut [f32]) {
        (self.positions.make_contiguous(), self.rows.make_contiguous())
    }

    /// The log as `[heads, W, d_k]` with its positions.
    pub(super) fn head_major(&self, heads: usize) -> (Vec<f32>, Vec<i32>) {
        let window = self.positions.len();
        let dim = self.row_len.checked_div(heads).unwrap_or(0);
        let mut out = vec![0.0; self.rows.len()];
        for (i, x) in self.rows.iter().enumerate() {
            let (token, head, d) = (i / self.row_len, i % self.row_len / dim, i % dim);
            out[(head * window + token) * dim + d] = *x;
        }
        (out, self.positions.iter().copied().collect())
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<f32>() + self.positions.capacity() * size_of::<i32>()
    }
}

/// Counters of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LayerCounters {
    pub(super) dropped: u64,
    pub(super) compactions: u64,
}

/// What decode steps of one layer read.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerReads {
    pub(super) index: Option<LayerIndex>,
    /// The last choice.
    pub(super) held: Held,
    pub(super) report: Option<ReadReport>,
    /// Keys of low rank that were made, by KV head. A fork begins without.
    pub(super) rebuilt: Rebuilt,
}

/// Of each KV head of a layer, made keys.
#[derive(Debug, Default)]
pub(super) struct Rebuilt(pub(super) Vec<Remembered>);

impl Rebuilt {
    /// Entries were removed, or moved to other positions.
    pub(super) fn forget(&mut self) {
        self.0.iter_mut().for_each(Remembered::forget);
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(Remembered::bytes).sum()
    }
}

impl Clone for Rebuilt {
    fn clone(&self) -> Self {
        let mut copy = Self(Vec::with_capacity(self.0.len()));
        copy.0.extend(self.0.iter().map(Remembered::like));
        copy
    }
}

/// A guard and what it found.
#[derive(Debug, Default)]
pub(super) struct Watched {
    pub(super) shadow: Option<Box<Shadow>>,
    pub(super) report: Option<GuardReport>,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Per layer, per KV head; empty for layers that share another's rows.
    pub(super) layers: Vec<Vec<HeadRows>>,
    /// Per layer. A layer that shares another's rows reads by that layer's index and keeps a choice of its own.
    pub(super) reads: Vec<LayerReads>,
    /// Recorded queries per layer.
    pub(super) queries: Vec<QueryLog>,
    pub(super) counters: Vec<LayerCounters>,
    /// What the policy measured of each layer that takes part, before the first compression.
    pub(super) measures: Vec<Vec<f32>>,
    /// What the last plan of each layer wanted remembered.
    pub(super) remembered: Vec<Vec<f32>>,
    /// What the end of the prompt made of an index that calibrates.
    pub(super) thresholds: Option<Thresholds>,
    /// Position of the next token.
    pub(super) next: i32,
    /// Positions below this one hold learned entries, not tokens.
    pub(super) learned: i32,
    /// Tokens committed while the prompt was open: what a fractional budget is a fraction of.
    pub(super) prompt_tokens: usize,
    pub(super) prefill_open: bool,
    /// Tokens committed since the last compaction.
    pub(super) since: usize,
    /// `next` at the last compaction: below it entries are missing.
    pub(super) compacted: Option<i32>,
    pub(super) watched: Watched,
    /// What became of runs of low rank.
    pub(super) low_rank: Vec<LowRankRun>,
    /// Per group of layers, entries at which factoring is tried again after it was refused.
    #[cfg_attr(not(feature = "lowrank"), expect(dead_code, reason = "nothing is factored then"))]
    pub(super) factor_at: Vec<usize>,
}

impl Sequence {
    /// Forgets all units: rows between were removed, or keys turned. They are made anew at the next commit.
    pub(super) fn clear_index(&mut self, layer: usize) {
        let LayerReads { index, held, rebuilt, .. } = &mut self.reads[layer];
        *held = Held::default();
        rebuilt.forget();
        if let Some(index) = index {
            index.clear();
        }
    }

    /// Forgets units that reach behind the rows there are.
    pub(super) fn truncate_index(&mut self) {
        for (reads, heads) in self.reads.iter_mut().zip(&self.layers) {
            reads.held = Held::default();
            reads.rebuilt.forget();
            if let Some(index) = &mut reads.index {
                index.truncate(heads);
            }
        }
    }

    /// The rows of every layer, and those of the shadow while the sequence is guarded: whatever happens to
    /// entries happens to both.
    pub(super) fn stores(&mut self) -> impl Iterator<Item = &mut Vec<Vec<HeadRows>>> {
        let shadow = self.watched.shadow.as_mut().map(|shadow| &mut shadow.layers);
        std::iter::once(&mut self.layers).chain(shadow)
    }
}
