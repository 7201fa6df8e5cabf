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

use super::apart::Apart;
use super::digits::Digits;
use super::dots;
use super::gemm::{self, Lines, Matrix, PAD};
use super::integer;
use super::math::{soft_cap, sum};
use super::prefetch::{Ahead, request};
use super::turn::transpose_keys;
use super::unpack::{self, UnpackScratch, Weighed};
use super::widen::{Element, widen};
use crate::device::encoding::{PackedRows, rotate};
use crate::device::page::{Page, PageLayout, PageRef, Rows, Side};
use crate::device::{HeadRows, Segment};
use crate::kernel::AttentionParams;
use bytemuck::cast_slice;
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
pub(crate) fn pages_in(head: &HeadRows, range: Range<usize>) -> impl Iterator<Item = PageRef<'_>> + Clone {
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

/// Index of the page that holds a slot; the number of pages if there is no such slot.
pub(crate) fn page_of(head: &HeadRows, slot: usize) -> usize {
    let (mut pages, mut rows) = (0, 0);
    for segment in &head.segments {
        if slot < rows + segment.rows {
            return pages + (slot - rows) / segment.layout.capacity;
        }
        pages += segment.pages.len();
        rows += segment.rows;
    }
    pages
}

/// Requests the description of a page, without which nothing in it can be.
#[inline(always)]
pub(super) fn request_page(page: &Page) {
    // It is longer than a line.
    request(page);
    request(&page.columns);
}

/// The same of the page that holds a slot.
pub(crate) fn request_page_of(head: &HeadRows, slot: usize) {
    let page = page_of(head, slot);
    if let Some(found) = pages_in(head, page..page + 1).next() {
        request_page(found.page);
    }
}

/// Up to [`TILE`] entries of one page, or copies of as many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a> {
    pub(super) layout: &'a PageLayout,
    /// Slot of the first entry within the head; of copies it means nothing.
    pub(super) slot: usize,
    /// Of the entries; none if every query sees all of them.
    pub(super) positions: &'a [i32],
    pub(super) bias: Option<&'a [f32]>,
    /// All rows of the page, or the copies.
    pub(super) keys: Rows<'a>,
    pub(super) values: Rows<'a>,
    /// Exact rows that lie apart, keys and values, where there are no others.
    pub(super) apart: Option<[&'a [&'a [u8]]; 2]>,
    /// Index of the first within these.
    pub(super) from: usize,
    /// How many, at least one.
    pub len: usize,
    /// Which of them are read, the first in the lowest bit. The others lie between and have no weight.
    pub(super) chosen: u64,
}

/// The tiles of some pages of a head.
pub(crate) fn tiles(head: &HeadRows, pages: Range<usize>) -> impl Iterator<Item = Tile<'_>> {
    pages_in(head, pages).flat_map(|page| {
        // Once per page: where what lies in a packed one takes divisions to find.
        let stored = |side| page.layout.rows(page.page, side);
        let (keys, values) = (stored(Side::Key), stored(Side::Value));
        let (layout, chosen) = (&**page.layout, u64::MAX);
        let len = move |from: usize| (page.rows - from).min(TILE);
        (0..page.rows).step_by(TILE).map(move |from| {
            let (len, slot) = (len(from), page.first + from);
            let positions = &page.page.positions[from..from + len];
            let bias = page.bias().map(|b| &b[from..from + len]);
            Tile { layout, slot, positions, bias, keys, values, apart: None, from, len, chosen }
        })
    })
}

impl<'a> Tile<'a> {
    /// Slot of the first entry within the head.
    pub(crate) fn slot(&self) -> usize {
        self.slot
    }

    /// Requests the entries' β.
    #[inline(always)]
    pub(crate) fn request_bias(&self) {
        let lines = self.bias.unwrap_or_default().chunks(64 / size_of::<f32>());
        lines.for_each(|line| request(&line[0]));
    }

    /// How many of the first entries have no value to be read: whole fours, as packed values lie.
    pub(crate) fn unread(&self) -> usize {
        self.chosen.trailing_zeros() as usize & !3
    }

    /// The stored rows of a side, to be requested ahead of their use. Of a packed side, which lies in planes, an
    /// equal share.
    pub(crate) fn ahead(&self, side: Side) -> Ahead<'a> {
        let bytes: &[u8] = match self.stored(side) {
            Rows::F32(s) => cast_slice(s),
            Rows::F16(s) => cast_slice(s),
            Rows::Bf16(s) => cast_slice(s),
            Rows::Packed(p) => p.bytes,
        };
        let at = |row: usize| bytes.len() * row / self.layout.capacity;
        Ahead::new(&bytes[at(self.from)..at(self.from + self.len)])
    }

    /// All rows of a side of the page.
    pub(super) fn stored(&self, side: Side) -> Rows<'a> {
        match side {
            Side::Key => self.keys,
            Side::Value => self.values,
        }
    }

    /// Without what lies before and behind `rows`, for a call that reads keys only. Packed rows are decoded from the
    /// first of their band, so theirs keep it.
    pub(crate) fn narrowed(self, rows: Range<usize>) -> Self {
        match self.keys {
            Rows::Packed(_) => Self {
                positions: &self.positions[..rows.end],
                bias: self.bias.map(|bias| &bias[..rows.end]),
                len: rows.end,
                ..self
            },
            _ => Self {
                slot: self.slot + rows.start,
                positions: &self.positions[rows.clone()],
                bias: self.bias.map(|bias| &bias[rows.clone()]),
                from: self.from + rows.start,
                len: rows.len(),
                ..self
            },
        }
    }

    fn positions(&self) -> &'a [i32] {
        debug_assert!(self.positions.is_sorted(), "positions of a head must ascend");
        self.positions
    }

    /// What a query at `position` sees of the tile.
    #[inline]
    fn seen(&self, params: &AttentionParams<'_>, position: i32) -> Range<usize> {
        let entries = self.positions();
        if entries.is_empty() {
            return 0..self.len;
        }
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
        entries.is_empty()
            || entries[0] <= most
                && params
                    .window
                    .is_none_or(|w| i64::from(entries[self.len - 1]) > i64::from(least) - i64::from(w))
    }

    /// Rows `from .. from + len` of a side, with their stride in elements: where they are stored, or
    /// decoded into `scratch` if they are packed values (and then still rotated). Packed keys are not rows any more.
    #[inline(always)]
    fn rows<'s, S: Simd>(
        &self,
        simd: S,
        side: Side,
        (from, len): (usize, usize),
        scratch: &'s mut UnpackScratch<'_>,
    ) -> (Rows<'s>, usize)
    where
        'a: 's,
    {
        let stride = self.layout.row_stride(side);
        let span = from * stride..(from + len - 1) * stride + self.layout.dim(side);
        match self.stored(side) {
            Rows::F32(s) => (Rows::F32(&s[span]), stride),
            Rows::F16(s) => (Rows::F16(&s[span]), stride),
            Rows::Bf16(s) => (Rows::Bf16(&s[span]), stride),
            Rows::Packed(p) => {
                let stride = scratch.decode_values(simd, &p, (from, len));
                (Rows::F32(scratch.rows()), stride)
            }
        }
    }

    /// A packed side whose rows have one scale each.
    fn by_row(&self, side: Side) -> Option<PackedRows<'a>> {
        match self.stored(side) {
            Rows::Packed(p) if unpack::by_row(p.layout.packing.format) => Some(p),
            _ => None,
        }
    }

    /// Whether rows of a side are stored rotated.
    pub(crate) fn rotated(&self, side: Side) -> bool {
        self.layout.rotated(side)
    }

    /// `sums += weights · values` for the first `rows` rows, whose weights start behind the entries that are
    /// [`Tile::unread`]. Values are read in place where their rows are whole vectors and few query rows share them;
    /// otherwise they are first widened into `scratch`.
    #[allow(clippy::too_many_arguments, reason = "three kinds of scratch that the caller owns")]
    #[inline(always)]
    pub(crate) fn add_values<S: Simd>(
        &self,
        simd: S,
        weights: &[f32],
        rows: usize,
        scratch: &mut [f32],
        unpack: &mut UnpackScratch<'_>,
        sums: &mut [f32],
        ahead: Ahead<'_>,
    ) {
        let d = self.layout.d_v;
        let padded = d.next_multiple_of(PAD);
        let (from, len) = (self.from + self.unread(), self.len - self.unread());
        if let Some(packed) = self.by_row(Side::Value) {
            // Columns to whole vectors: levels are there up to their stride, sums up to `padded`.
            if rows <= dots::ROWS_MAX && integer::pays(simd) {
                let (values, scales, scaled) = unpack.levels(simd, &packed, (from, len));
                let mut weighed = [Weighed::NONE; dots::ROWS_MAX];
                for row in 0..rows {
                    let (w, out) = (&weights[row * TILE..], &mut scaled[row * TILE..(row + 1) * TILE]);
                    weighed[row] = scales.weigh(simd, w, len, out);
                }
                let sizes = weighed[..rows].iter().map(|w| w.scaled);
                let scaled = Digits::of_weights(simd, Matrix { data: scaled, stride: TILE }, sizes);
                let (finish, sums) = (scales.for_sums(weighed), Matrix { data: sums, stride: padded });
                let extent = (rows, len.div_ceil(4), d);
                integer::multiply(simd, &scaled, values, sums, extent, &finish, ahead);
            } else {
                let (values, scales, scaled) = unpack.quads(simd, &packed, (from, len));
                for row in 0..rows {
                    let (w, out) = (&weights[row * TILE..], &mut scaled[row * TILE..(row + 1) * TILE]);
                    let weighed = scales.weigh(simd, w, len, out);
                    scales.finish_sums(simd, weighed, &mut sums[row * padded..(row + 1) * padded]);
                }
                let scaled = Matrix { data: &*scaled, stride: TILE };
                gemm::multiply(simd, scaled, values, sums, padded, (rows, len, d), true, ahead);
            }
            return;
        }
        let weights = Matrix { data: weights, stride: TILE };
        let extent = (rows, len, d);
        let whole = d.is_multiple_of(S::f32s::LEN);
        if let Some([_, lines]) = self.apart {
            let lines = &lines[from..];
            if whole && rows <= IN_PLACE_ROWS {
                return match self.values {
                    Rows::F16(_) => add_apart::<S, f16>(simd, weights, lines, sums, extent, ahead),
                    Rows::Bf16(_) => add_apart::<S, bf16>(simd, weights, lines, sums, extent, ahead),
                    _ => add_apart::<S, f32>(simd, weights, lines, sums, extent, ahead),
                };
            }
            for (bytes, row) in lines.iter().zip(scratch.chunks_exact_mut(padded)) {
                let stored = match self.values {
                    Rows::F16(_) => Rows::F16(cast_slice(bytes)),
                    Rows::Bf16(_) => Rows::Bf16(cast_slice(bytes)),
                    _ => Rows::F32(cast_slice(bytes)),
                };
                widen(simd, stored, 0, &mut row[..d]);
            }
            let values = Matrix { data: &*scratch, stride: padded };
            return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
        }
        let (stored, stride) = self.rows(simd, Side::Value, (from, len), unpack);
        match stored {
            Rows::F32(data) if whole => {
                let values = Matrix { data, stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            Rows::F16(data) if whole && rows <= IN_PLACE_ROWS => {
                let values = Matrix { data, stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            Rows::Bf16(data) if whole && rows <= IN_PLACE_ROWS => {
                let values = Matrix { data, stride };
                return gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
            }
            _ => {}
        }
        for (i, row) in scratch.chunks_exact_mut(padded).take(len).enumerate() {
            widen(simd, stored, i * stride, &mut row[..d]);
        }
        let values = Matrix { data: &*scratch, stride: padded };
        gemm::multiply(simd, weights, values, sums, padded, extent, true, ahead);
    }
}

/// [`Tile::add_values`] of rows that lie apart and are whole vectors.
#[inline(always)]
fn add_apart<S: Simd, T: Element>(
    simd: S,
    weights: Matrix<&[f32]>,
    lines: &[&[u8]],
    sums: &mut [f32],
    (rows, len, d): (usize, usize, usize),
    ahead: Ahead<'_>,
) {
    let values = Apart::<T>::new(lines, d);
    gemm::multiply(simd, weights, values, sums, d.next_multiple_of(PAD), (rows, len, d), true, ahead);
}

/// Consecutive rows of the `[G, T]` queries of one KV head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryBlock<'a> {
    /// `[rows, d_k]`.
    queries: &'a [f32],
    /// The same rotated, for keys that were packed so; empty if there are none.
    rotated: &'a [f32],
    /// These, or the queries if there are none, for products in integers; with the sum of each.
    digits: Option<(Digits<'a, true>, [f32; dots::ROWS_MAX])>,
    /// Positions of the `T` queries; none if no mask is asked for.
    positions: &'a [i32],
    /// Index of the first row among the `G·T`.
    first: usize,
    /// How many rows.
    pub rows: usize,
    /// Least and greatest position.
    span: (i32, i32),
}

impl<'a> QueryBlock<'a> {
    /// Rows `range` of the `[G, T, d_k]` queries of a KV head. `rotation`, [`BLOCK`] rows long, is written if
    /// `head` holds rotated keys.
    pub(crate) fn new(
        queries: &'a [f32],
        d_k: usize,
        positions: &'a [i32],
        range: Range<usize>,
        head: &HeadRows,
        rotation: &'a mut [f32],
    ) -> Self {
        let rows = range.len();
        let queries = &queries[range.start * d_k..range.end * d_k];
        let rotated = if head.rotated(Side::Key) {
            let rotated = &mut rotation[..queries.len()];
            rotated.copy_from_slice(queries);
            rotated.chunks_exact_mut(d_k).for_each(rotate);
            rotated
        } else {
            &mut []
        };
        let mut block = Self {
            queries,
            rotated,
            digits: None,
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

    /// With the queries ready for products in integers, if that pays: many tiles must share it. `memory` is
    /// [`digits_len`] long.
    #[inline(always)]
    pub(crate) fn with_digits<S: Simd>(
        self,
        simd: S,
        d_k: usize,
        head: &HeadRows,
        memory: &'a mut [f32],
    ) -> Self {
        let pays = integer::pays(simd) && self.rows <= dots::ROWS_MAX && d_k <= integer::LENGTH_MAX;
        let packed = |segment: &Segment| segment.layout.encoding(Side::Key).packed();
        if !pays || !head.segments.iter().filter_map(packed).any(|p| unpack::by_row(p.format)) {
            return self;
        }
        let stride = d_k.next_multiple_of(PAD);
        let queries = if self.rotated.is_empty() { self.queries } else { self.rotated };
        let mut totals = [0.0; dots::ROWS_MAX];
        for ((query, row), total) in
            queries.chunks_exact(d_k).zip(memory.chunks_exact_mut(stride)).zip(&mut totals)
        {
            row[..d_k].copy_from_slice(query);
            row[d_k..].fill(0.0);
            *total = sum(simd, query);
        }
        let digits = Digits::of_queries(simd, Matrix { data: memory, stride }, self.rows);
        Self { digits: Some((digits, totals)), ..self }
    }

    /// Whether every query sees all entries of `head`.
    pub(crate) fn sees_all(&self, params: &AttentionParams<'_>, head: &HeadRows) -> bool {
        let last = page_count(head).checked_sub(1).and_then(|last| pages_in(head, last..last + 1).next());
        let last = last.and_then(|page| page.positions().last().copied());
        params.window.is_none() && last.is_none_or(|last| last <= self.span.0)
    }

    fn position(&self, row: usize) -> i32 {
        self.positions[(self.first + row) % self.positions.len()]
    }

    /// Writes the dot products with every key of a tile to `scores[row * TILE + entry]`: straight from the
    /// stored rows for few query rows, else by way of the tile transposed into scratch, which is done unless it
    /// is `turned` already.
    #[inline(always)]
    pub(crate) fn dots<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        scratch: &mut ScoreScratch<'_>,
        turned: &mut bool,
        ahead: Ahead<'_>,
    ) {
        let d = tile.layout.d_k;
        let data = if tile.rotated(Side::Key) { self.rotated } else { self.queries };
        let q = Matrix { data, stride: d };
        // (rows, inner dimension, columns) of a product of matrices.
        let extent = (self.rows, d, tile.len);
        let ScoreScratch { keys, scores, unpack } = scratch;
        if let Some(packed) = tile.by_row(Side::Key) {
            let rows = (tile.from, tile.len);
            if let Some((digits, totals)) = &self.digits
                && tile.rotated(Side::Key) != self.rotated.is_empty()
            {
                let (k, scales, _) = unpack.levels(simd, &packed, rows);
                let finish = scales.for_dots(simd, q, (self.rows, d), totals);
                let out = Matrix { data: &mut **scores, stride: TILE };
                let extent = (self.rows, d.div_ceil(4), tile.len);
                return integer::multiply(simd, digits, k, out, extent, &finish, ahead);
            }
            let (k, scales, _) = unpack.quads(simd, &packed, rows);
            if self.rows > dots::ROWS_MAX {
                if !std::mem::replace(turned, true) {
                    k.widen(simd, (d, tile.len), keys, TILE);
                }
                let k = Matrix { data: &**keys, stride: TILE };
                gemm::multiply(simd, q, k, scores, TILE, extent, false, ahead);
            } else {
                gemm::multiply(simd, q, k, scores, TILE, extent, false, ahead);
            }
            return scales.finish_dots(simd, q, extent, scores);
        }
        if let Rows::Packed(packed) = tile.stored(Side::Key) {
            if !std::mem::replace(turned, true) {
                unpack.decode_keys(simd, &packed, (tile.from, tile.len), keys);
            }
            let k = Matrix { data: &**keys, stride: TILE };
            return gemm::multiply(simd, q, k, scores, TILE, extent, false, ahead);
        }
        if let Some([lines, _]) = tile.apart {
            return match tile.keys {
                Rows::F16(_) => self.dots_apart::<S, f16>(simd, lines, d, (keys, scores), turned, ahead),
                Rows::Bf16(_) => self.dots_apart::<S, bf16>(simd, lines, d, (keys, scores), turned, ahead),
                _ => self.dots_apart::<S, f32>(simd, lines, d, (keys, scores), turned, ahead),
            };
        }
        let (stored, stride) = tile.rows(simd, Side::Key, (tile.from, tile.len), unpack);
        let to = (&mut **keys, &mut **scores);
        match stored {
            Rows::F32(data) => self.dots_of(simd, Matrix { data, stride }, extent, to, turned, ahead),
            Rows::F16(data) => self.dots_of(simd, Matrix { data, stride }, extent, to, turned, ahead),
            Rows::Bf16(data) => self.dots_of(simd, Matrix { data, stride }, extent, to, turned, ahead),
            Rows::Packed(_) => unreachable!("packed keys are multiplied as they lie"),
        }
    }

    /// [`QueryBlock::dots`] of exact rows, and `keys` and `scores` of its scratch.
    #[inline(always)]
    fn dots_of<S: Simd, L: Lines>(
        &self,
        simd: S,
        stored: L,
        extent: (usize, usize, usize),
        (keys, scores): (&mut [f32], &mut [f32]),
        turned: &mut bool,
        ahead: Ahead<'_>,
    ) {
        let (rows, d, len) = extent;
        let q = Matrix { data: self.queries, stride: d };
        if rows <= dots::ROWS_MAX {
            return dots::dots(simd, q, stored, extent, scores, TILE, ahead);
        }
        if !std::mem::replace(turned, true) {
            transpose_keys(simd, stored, (d, len), keys);
        }
        let k = Matrix { data: &*keys, stride: TILE };
        gemm::multiply(simd, q, k, scores, TILE, extent, false, ahead);
    }

    /// The same of rows that lie apart.
    #[inline(always)]
    fn dots_apart<S: Simd, T: Element>(
        &self,
        simd: S,
        lines: &[&[u8]],
        d: usize,
        to: (&mut [f32], &mut [f32]),
        turned: &mut bool,
        ahead: Ahead<'_>,
    ) {
        let stored = Apart::<T>::new(lines, d);
        self.dots_of(simd, stored, (self.rows, d, lines.len()), to, turned, ahead);
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
        let most = unmasked(simd, params, bias, scores);
        if seen == (0..scores.len()) {
            return most;
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

/// Turns dot products, whole vectors of them, into the logits of a query that sees every entry; gives their maximum.
#[inline(always)]
pub(crate) fn unmasked<S: Simd>(
    simd: S,
    params: &AttentionParams<'_>,
    bias: Option<&[f32; TILE]>,
    scores: &mut [f32],
) -> f32 {
    let scale = S::f32s::splat(simd, params.scale);
    let mut most = S::f32s::splat(simd, f32::NEG_INFINITY);
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
    most.reduce_max()
}

/// β of a tile padded to its full length, for [`QueryBlock::logits`] and [`unmasked`]; `−∞` for entries that are not chosen.
pub(crate) fn padded_bias(tile: &Tile<'_>) -> Option<[f32; TILE]> {
    let all = tile.chosen == u64::MAX;
    if all && tile.bias.is_none() {
        return None;
    }
    let mut padded = [0.0; TILE];
    if let Some(bias) = tile.bias {
        padded[..bias.len()].copy_from_slice(bias);
    }
    if !all {
        for (j, x) in padded.iter_mut().enumerate() {
            *x = if tile.chosen >> j & 1 == 1 { *x } else { f32::NEG_INFINITY };
        }
    }
    Some(padded)
}

/// Scratch of one task that scores tiles.
#[derive(Debug)]
pub(crate) struct ScoreScratch<'a> {
    /// A transposed tile of keys.
    keys: &'a mut [f32],
    /// `[BLOCK, TILE]`.
    pub scores: &'a mut [f32],
    /// A decoded tile.
    pub unpack: UnpackScratch<'a>,
}

/// Floats for the digits of a block's queries.
pub(crate) fn digits_len(d_k: usize) -> usize {
    dots::ROWS_MAX * d_k.next_multiple_of(PAD)
}

/// Rotated queries of a block.
pub(crate) fn rotation_len(d_k: usize) -> usize {
    BLOCK * d_k
}

impl<'a> ScoreScratch<'a> {
    /// Floats it takes; `d` is the larger of the dimensions of keys and of values that it will decode.
    pub(crate) fn len(d_k: usize, d: usize) -> usize {
        d_k * TILE + BLOCK * TILE + UnpackScratch::len(d)
    }

    /// Cuts it out of the front of `memory`.
    pub(crate) fn cut(memory: &mut &'a mut [f32], d_k: usize, d: usize) -> Self {
        Self {
            keys: super::take(memory, d_k * TILE),
            scores: super::take(memory, BLOCK * TILE),
            unpack: UnpackScratch::cut(memory, d),
        }
    }
}
