//! Tiles of keys and the logits of a block of queries on them: what attend, attention mass and window scores
//! share.
//!
//! A tile is up to [`TILE`] consecutive entries of one page. Its keys are widened and transposed once, into
//! scratch that stays in the first cache levels, and then serve every query row of a block: the `G` heads of
//! a group and, in a prefill, many queries. Positions ascend within a head, so what a query sees of a tile is
//! one range of it, found by comparing the tile's ends and, only where they disagree, by bisection.
//!
//! *Helps* because the stored type, the page size and the mask are dealt with here and nowhere else. *Hurts*
//! pages of a few entries: a tile never spans two pages.

use super::dots;
use super::gemm::{self, Matrix, PAD};
use super::math::soft_cap;
use super::prefetch::Ahead;
use super::widen::{Source, widen};
use crate::device::HeadRows;
use crate::device::page::{PageRef, Rows, Side};
use crate::kernel::AttentionParams;
use fearless_simd::{Simd, SimdBase};
use half::{bf16, f16};
use std::ops::Range;

/// Entries of a tile: four of the widest vectors, and a multiple of all.
pub(crate) const TILE: usize = 64;

/// Query rows of a block.
pub(crate) const BLOCK: usize = 64;

/// Up to this many query rows, halves are widened while they are multiplied, once per four rows; beyond,
/// storing them widened is cheaper.
const IN_PLACE_ROWS: usize = 8;

/// Number of pages of a head.
pub(crate) fn page_count(head: &HeadRows) -> usize {
    head.segments.iter().map(|s| s.pages.len()).sum()
}

/// The pages of a head from one index to another, without walking over those before.
pub(crate) fn pages_in(head: &HeadRows, range: Range<usize>) -> impl Iterator<Item = PageRef<'_>> {
    let (mut pages_before, mut rows_before) = (0, 0);
    head.segments.iter().flat_map(move |segment| {
        let (count, capacity) = (segment.pages.len(), segment.layout.capacity);
        let within = |page: usize| page.saturating_sub(pages_before).min(count);
        let (local, first) = (within(range.start)..within(range.end), rows_before);
        pages_before += count;
        rows_before += segment.rows;
        local.map(move |i| PageRef {
            layout: &segment.layout,
            page: &segment.pages[i],
            rows: (segment.rows - i * capacity).min(capacity),
            first: first + i * capacity,
        })
    })
}

/// Slot of the first entry of page `index`; the number of entries if there is no such page.
pub(crate) fn first_slot(head: &HeadRows, index: usize) -> usize {
    pages_in(head, index..index + 1).next().map_or_else(|| head.rows(), |p| p.first)
}

/// Up to [`TILE`] entries of one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a> {
    page: PageRef<'a>,
    /// Index of the first within the page.
    from: usize,
    /// How many, at least one.
    pub len: usize,
}

/// The tiles of some pages of a head.
pub(crate) fn tiles(head: &HeadRows, pages: Range<usize>) -> impl Iterator<Item = Tile<'_>> {
    pages_in(head, pages).flat_map(|page| {
        (0..page.rows).step_by(TILE).map(move |from| Tile { page, from, len: (page.rows - from).min(TILE) })
    })
}

impl<'a> Tile<'a> {
    /// Slot of the first entry within the head.
    pub(crate) fn slot(&self) -> usize {
        self.page.first + self.from
    }

    /// The stored rows of a side, to be requested ahead of their use.
    pub(crate) fn ahead(&self, side: Side) -> Ahead<'a> {
        let layout = self.page.layout;
        let bytes = &self.page.page.block.host()[layout.range(side)];
        let row = layout.row_bytes(side);
        Ahead::new(&bytes[self.from * row..(self.from + self.len) * row])
    }

    fn positions(&self) -> &'a [i32] {
        let positions = &self.page.positions()[self.from..self.from + self.len];
        debug_assert!(positions.is_sorted(), "positions of a head must ascend");
        positions
    }

    fn bias(&self) -> Option<&'a [f32]> {
        self.page.bias().map(|b| &b[self.from..self.from + self.len])
    }

    /// What a query at `position` sees of the tile.
    #[inline]
    fn seen(&self, params: &AttentionParams<'_>, position: i32) -> Range<usize> {
        let entries = self.positions();
        let end = if entries[self.len - 1] <= position {
            self.len
        } else {
            entries.partition_point(|&j| j <= position)
        };
        let start = match params.window {
            None => 0,
            Some(w) => {
                let beyond = i64::from(position) - i64::from(w);
                if i64::from(entries[0]) > beyond {
                    0
                } else {
                    entries.partition_point(|&j| i64::from(j) <= beyond)
                }
            }
        };
        start.min(end)..end
    }

    /// Whether any query between two positions sees anything of it.
    pub(crate) fn meets(&self, params: &AttentionParams<'_>, block: &QueryBlock<'_>) -> bool {
        let entries = self.positions();
        let (least, most) = block.span;
        entries[0] <= most
            && params
                .window
                .is_none_or(|w| i64::from(entries[self.len - 1]) > i64::from(least) - i64::from(w))
    }

    /// Writes the keys transposed: dimension `i` of entry `j` to `keys[i * TILE + j]`. Columns up to the next
    /// whole vector repeat the last entry, so that a block product may run over them.
    #[inline(always)]
    fn transpose_keys<S: Simd>(&self, simd: S, keys: &mut [f32]) {
        match self.page.layout.rows(self.page.page, Side::Key) {
            Rows::F32(stored) => self.transpose_any(simd, stored, keys, |x| x),
            Rows::F16(stored) => self.transpose_any(simd, stored, keys, f16::to_f32),
            Rows::Bf16(stored) => self.transpose_any(simd, stored, keys, bf16::to_f32),
        }
    }

    #[inline(always)]
    fn transpose_any<'s, S: Simd, T: Copy>(
        &self,
        simd: S,
        stored: &'s [T],
        keys: &mut [f32],
        one: impl Fn(T) -> f32,
    ) where
        &'s [T]: Source,
    {
        match S::f32s::LEN {
            16 => self.transpose::<S, T, 16>(simd, stored, keys, one),
            8 => self.transpose::<S, T, 8>(simd, stored, keys, one),
            _ => self.transpose::<S, T, 4>(simd, stored, keys, one),
        }
    }

    /// `one` widens a single element: what is left of a row after its last whole vector.
    #[inline(always)]
    fn transpose<'s, S: Simd, T: Copy, const N: usize>(
        &self,
        simd: S,
        stored: &'s [T],
        keys: &mut [f32],
        one: impl Fn(T) -> f32,
    ) where
        &'s [T]: Source,
    {
        let layout = self.page.layout;
        let (d, stride) = (layout.d_k, layout.row_stride(Side::Key));
        for j in (0..self.len).step_by(N) {
            let mut rows: [&[T]; N] = [&[]; N];
            for (r, row) in rows.iter_mut().enumerate() {
                let index = (j + r).min(self.len - 1);
                *row = &stored[(self.from + index) * stride..][..d];
            }
            let whole = d - d % N;
            for i in (0..whole).step_by(N) {
                let mut block = [S::f32s::splat(simd, 0.0); N];
                for (vector, row) in block.iter_mut().zip(&rows) {
                    *vector = row.slice(i..i + N).vector(simd);
                }
                for (c, column) in turn(block).iter().enumerate() {
                    column.store_slice(&mut keys[(i + c) * TILE + j..][..N]);
                }
            }
            for i in whole..d {
                let column = &mut keys[i * TILE + j..][..N];
                for (c, row) in column.iter_mut().zip(&rows) {
                    *c = one(row[i]);
                }
            }
        }
    }

    /// `sums += weights · values` for the first `rows` rows. Values are read in place where their rows are
    /// whole vectors and few query rows share them; otherwise they are first widened into `scratch`.
    #[inline(always)]
    pub(crate) fn add_values<S: Simd>(
        &self,
        simd: S,
        weights: &[f32],
        rows: usize,
        scratch: &mut [f32],
        sums: &mut [f32],
        ahead: Ahead<'_>,
    ) {
        let layout = self.page.layout;
        let (d, stride) = (layout.d_v, layout.row_stride(Side::Value));
        let padded = d.next_multiple_of(PAD);
        let weights = Matrix { data: weights, stride: TILE };
        let span = self.from * stride..(self.from + self.len) * stride;
        let extent = (rows, self.len, d);
        let whole = d % S::f32s::LEN == 0;
        let stored = layout.rows(self.page.page, Side::Value);
        match stored {
            Rows::F32(s) if whole => {
                let values = Matrix { data: &s[span], stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            Rows::F16(s) if whole && rows <= IN_PLACE_ROWS => {
                let values = Matrix { data: &s[span], stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            Rows::Bf16(s) if whole && rows <= IN_PLACE_ROWS => {
                let values = Matrix { data: &s[span], stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            _ => {}
        }
        for (i, row) in scratch.chunks_exact_mut(padded).take(self.len).enumerate() {
            widen(simd, stored, (self.from + i) * stride, &mut row[..d]);
        }
        let values = Matrix { data: &*scratch, stride: padded };
        gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
    }
}

/// Transposes `N` vectors of `N` elements. Interleaving the first half of the vectors with the second
/// rotates the bits of an element's index by one; after `log2 N` rounds row and column are exchanged.
#[inline(always)]
fn turn<V: SimdBase<S>, S: Simd, const N: usize>(mut rows: [V; N]) -> [V; N] {
    let mut round = 1;
    while round < N {
        let mut next = rows;
        for i in 0..N / 2 {
            (next[2 * i], next[2 * i + 1]) = rows[i].interleave(rows[i + N / 2]);
        }
        rows = next;
        round *= 2;
    }
    rows
}

/// Consecutive rows of the `[G, T]` queries of one KV head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryBlock<'a> {
    /// `[rows, d_k]`.
    queries: &'a [f32],
    /// Positions of the `T` queries.
    positions: &'a [i32],
    /// Index of the first row among the `G·T`.
    first: usize,
    /// How many rows.
    pub rows: usize,
    /// Least and greatest position.
    span: (i32, i32),
}

impl<'a> QueryBlock<'a> {
    /// Rows `range` of the `[G, T, d_k]` queries of a KV head.
    pub(crate) fn new(queries: &'a [f32], d_k: usize, positions: &'a [i32], range: Range<usize>) -> Self {
        let rows = range.len();
        let mut block = Self {
            queries: &queries[range.start * d_k..range.end * d_k],
            positions,
            first: range.start,
            rows,
            span: (i32::MAX, i32::MIN),
        };
        // At most T rows differ.
        for row in 0..rows.min(positions.len()) {
            let p = block.position(row);
            block.span = (block.span.0.min(p), block.span.1.max(p));
        }
        block
    }

    fn position(&self, row: usize) -> i32 {
        self.positions[(self.first + row) % self.positions.len()]
    }

    /// Writes the dot products with every key of a tile to `scores[row * TILE + entry]`: straight from the
    /// stored rows for few query rows, else by way of the tile transposed into `keys`, which is done unless it
    /// is `turned` already.
    #[inline(always)]
    pub(crate) fn dots<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        keys: &mut [f32],
        turned: &mut bool,
        scores: &mut [f32],
        ahead: Ahead<'_>,
    ) {
        let layout = tile.page.layout;
        let (d, stride) = (layout.d_k, layout.row_stride(Side::Key));
        let q = Matrix { data: self.queries, stride: d };
        if self.rows > dots::ROWS_MAX {
            if !std::mem::replace(turned, true) {
                tile.transpose_keys(simd, keys);
            }
            let k = Matrix { data: &*keys, stride: TILE };
            return gemm::multiply(simd, q, k, scores, TILE, (self.rows, d, tile.len), false, ahead);
        }
        let span = tile.from * stride..(tile.from + tile.len) * stride;
        let extent = (self.rows, d, tile.len);
        match layout.rows(tile.page.page, Side::Key) {
            Rows::F32(s) => {
                dots::dots(simd, q, Matrix { data: &s[span], stride }, extent, scores, TILE, ahead);
            }
            Rows::F16(s) => {
                dots::dots(simd, q, Matrix { data: &s[span], stride }, extent, scores, TILE, ahead);
            }
            Rows::Bf16(s) => {
                dots::dots(simd, q, Matrix { data: &s[span], stride }, extent, scores, TILE, ahead);
            }
        }
    }

    /// Turns the dot products of a row into logits, `−∞` for entries it does not see and up to the next whole
    /// vector; gives their maximum. Only the first vectors, up to the tile's length, are touched.
    #[inline(always)]
    pub(crate) fn logits<S: Simd>(
        &self,
        simd: S,
        params: &AttentionParams<'_>,
        tile: &Tile<'_>,
        row: usize,
        bias: Option<&[f32; TILE]>,
        scores: &mut [f32],
    ) -> f32 {
        let seen = tile.seen(params, self.position(row));
        let scores = &mut scores[..tile.len.next_multiple_of(S::f32s::LEN)];
        if seen.is_empty() {
            scores.fill(f32::NEG_INFINITY);
            return f32::NEG_INFINITY;
        }
        let scale = S::f32s::splat(simd, params.scale);
        let mut most = S::f32s::splat(simd, f32::NEG_INFINITY);
        let whole = seen == (0..scores.len());
        for (i, chunk) in scores.chunks_exact_mut(S::f32s::LEN).enumerate() {
            let mut x = S::f32s::from_slice(simd, chunk) * scale;
            if let Some(cap) = params.softcap {
                x = soft_cap(simd, x, cap);
            }
            if let Some(bias) = bias {
                x += S::f32s::from_slice(simd, &bias[i * S::f32s::LEN..][..S::f32s::LEN]);
            }
            x.store_slice(chunk);
            most = most.max(x);
        }
        if whole {
            return most.reduce_max();
        }
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let mut most = S::f32s::splat(simd, f32::NEG_INFINITY);
        for chunk in scores.chunks_exact(S::f32s::LEN) {
            most = most.max(S::f32s::from_slice(simd, chunk));
        }
        most.reduce_max()
    }
}

/// β of a tile padded to its full length, for [`QueryBlock::logits`].
pub(crate) fn padded_bias(tile: &Tile<'_>) -> Option<[f32; TILE]> {
    tile.bias().map(|bias| {
        let mut padded = [0.0; TILE];
        padded[..bias.len()].copy_from_slice(bias);
        padded
    })
}

/// Scratch of one task that scores tiles.
#[derive(Debug)]
pub(crate) struct ScoreScratch<'a> {
    /// A transposed tile of keys.
    pub keys: &'a mut [f32],
    /// `[BLOCK, TILE]`.
    pub scores: &'a mut [f32],
}

impl<'a> ScoreScratch<'a> {
    /// Floats it takes.
    pub(crate) fn len(d_k: usize) -> usize {
        d_k * TILE + BLOCK * TILE
    }

    /// Cuts it out of the front of `memory`.
    pub(crate) fn cut(memory: &mut &'a mut [f32], d_k: usize) -> Self {
        Self { keys: super::take(memory, d_k * TILE), scores: super::take(memory, BLOCK * TILE) }
    }
}
