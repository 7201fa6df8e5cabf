//! Tiles of chosen entries: [`Spans`] cut into what the code for whole pages computes on.
//!
//! Exact rows lie one after another. A run of at least [`RUN_MIN`] within a page is a tile where it lies; shorter runs
//! and lone rows are copied, as stored, to one tile of up to [`TILE`] entries. Packed rows lie in words with their
//! neighbours: a tile is the range of a band around chosen rows, and the others in it get the logit `−∞`. Values are read
//! from the first four rows on of which one is chosen.
//!
//! The next tile is known while one is computed, so that its rows are on their way then: lone rows are cache misses that
//! no hardware foresees.
//!
//! *Helps* by leaving unread what an index has ruled out. *Hurts* lone entries of packed pages: sixteen keys share every
//! cache line of theirs.

use super::gemm::PAD;
use super::prefetch::{Ahead, request};
use super::take;
use super::tile::{TILE, Tile};
use crate::device::encoding::{BAND, PackedLayout, PackedRows};
use crate::device::page::{Page, PageLayout, Rows, Segment, Side};
use crate::device::{Encoding, HeadRows};
use crate::kernel::{AttentionParams, Span, Spans};
use crate::view::DType;
use bytemuck::{cast_slice, cast_slice_mut};
use fearless_simd::Simd;
use std::ops::Range;

/// Fewest consecutive exact rows that are read where they lie: below, a tile costs more than copies.
const RUN_MIN: usize = 16;

/// Rows of packed keys that a vector takes: tiles start at multiples.
const LANES: usize = 16;

/// How many spans ahead the description of a page is requested, which must be there before its rows can be.
const PAGES_AHEAD: usize = 8;

/// Where a part of the chosen entries starts or ends: a span and a slot in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mark {
    span: usize,
    slot: u32,
}

/// Marks of `parts` parts of equally many entries; `marks` holds one more.
pub(crate) fn cut(spans: &Spans, parts: usize, marks: &mut [Mark]) {
    let list = spans.spans();
    let (mut span, mut before) = (0, 0);
    for (part, mark) in marks.iter_mut().enumerate().take(parts + 1) {
        let at = spans.rows() * part / parts;
        while span < list.len() && before + list[span].len() <= at {
            before += list[span].len();
            span += 1;
        }
        *mark = Mark { span, slot: list.get(span).map_or(0, |s| s.start + (at - before) as u32) };
    }
}

/// Chosen entries of a head between two marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen<'a> {
    spans: &'a [Span],
    /// Slots before are not meant, nor those from `end` on.
    start: u32,
    end: u32,
}

impl<'a> Chosen<'a> {
    /// Those of `spans`.
    pub(crate) fn between(spans: &'a Spans, from: Mark, to: Mark) -> Self {
        let list = spans.spans();
        // The last span is only begun.
        let begun = list.get(to.span).is_some_and(|s| s.start < to.slot);
        let end = if begun { to.slot } else { u32::MAX };
        Self { spans: &list[from.span..to.span + usize::from(begun)], start: from.slot, end }
    }
}

/// One side of the pages of a segment, found once: it takes divisions.
#[derive(Clone, Debug)]
struct Stored {
    range: Range<usize>,
    encoding: Encoding,
    packed: Option<PackedLayout>,
    /// Bytes of an exact row.
    row: usize,
}

impl Stored {
    fn new(layout: &PageLayout, side: Side) -> Self {
        let (encoding, packed) = (layout.encoding(side), layout.packed(side));
        Self { range: layout.range(side), encoding, packed, row: layout.row_bytes(side) }
    }

    fn bytes<'a>(&self, page: &'a Page) -> &'a [u8] {
        &page.block.host()[self.range.clone()]
    }

    fn rows<'a>(&self, bytes: &'a [u8]) -> Rows<'a> {
        match (self.encoding, self.packed) {
            (_, Some(layout)) => Rows::Packed(PackedRows { layout, bytes }),
            (Encoding::Exact(DType::F16), _) => Rows::F16(cast_slice(bytes)),
            (Encoding::Exact(DType::Bf16), _) => Rows::Bf16(cast_slice(bytes)),
            _ => Rows::F32(cast_slice(bytes)),
        }
    }
}

/// A segment with what is known about its pages.
#[derive(Debug)]
struct Place<'a> {
    segment: &'a Segment,
    /// Slot of its first entry.
    first: usize,
    keys: Stored,
    values: Stored,
    /// What rows of a tile start at multiples of; 1 if they can be copied.
    align: usize,
}

impl<'a> Place<'a> {
    fn new(segment: &'a Segment, first: usize) -> Self {
        let layout = &*segment.layout;
        let (keys, values) = (Stored::new(layout, Side::Key), Stored::new(layout, Side::Value));
        let align = match (keys.packed, values.packed) {
            (Some(packed), _) => packed.group_rows.max(LANES),
            (None, Some(_)) => 4,
            (None, None) => 1,
        };
        Self { segment, first, keys, values, align }
    }

    /// One past the slot of its last entry.
    fn end(&self) -> usize {
        self.first + self.segment.rows
    }

    /// The page of a slot, and the row.
    fn find(&self, slot: usize) -> (&'a Page, usize) {
        // Slots fit 32 bits, whose division is twice as fast.
        let (local, capacity) = ((slot - self.first) as u32, self.segment.layout.capacity as u32);
        (&self.segment.pages[(local / capacity) as usize], (local % capacity) as usize)
    }
}

/// What is served next.
#[derive(Clone, Copy, Debug)]
enum Next<'a> {
    /// Rows where they lie.
    Tile(Tile<'a>),
    /// The rows that wait to be copied.
    Copies,
    Nothing,
}

/// The tiles of chosen entries of a head.
#[derive(Debug)]
pub(crate) struct ChosenTiles<'a> {
    segments: &'a [Segment],
    place: Option<Place<'a>>,
    /// Spans not begun, and what is left of the last that was.
    spans: &'a [Span],
    run: Range<usize>,
    end: usize,
    next: Next<'a>,
    /// Rows to be copied.
    keys: [&'a [u8]; TILE],
    values: [&'a [u8]; TILE],
    from: [Option<(&'a Page, u32)>; TILE],
    waiting: usize,
}

impl<'a> ChosenTiles<'a> {
    /// Of a part of the entries of `head`, which has them all.
    pub(crate) fn new(head: &'a HeadRows, chosen: Chosen<'a>) -> Self {
        let first = chosen.spans.first().map_or(0..0, |s| s.start.max(chosen.start) as usize..s.end as usize);
        let end = chosen.end as usize;
        let mut tiles = Self {
            segments: &head.segments,
            place: None,
            spans: chosen.spans.get(1..).unwrap_or_default(),
            run: first.start..first.end.min(end),
            end,
            next: Next::Nothing,
            keys: [&[]; TILE],
            values: [&[]; TILE],
            from: [None; TILE],
            waiting: 0,
        };
        tiles.next = tiles.plan();
        tiles
    }

    /// The next tile; copies are made in `memory`.
    #[inline(always)]
    pub(crate) fn next<'t, S: Simd>(&mut self, simd: S, memory: &'t mut Copies<'_>) -> Option<Tile<'t>>
    where
        'a: 't,
    {
        let tile = match (self.next, &self.place) {
            (Next::Tile(tile), _) => tile,
            (Next::Copies, Some(place)) => {
                let count = std::mem::take(&mut self.waiting);
                simd.vectorize(
                    #[inline(always)]
                    || {
                        copy(&self.keys[..count], place.keys.row, memory.keys);
                        copy(&self.values[..count], place.values.row, memory.values);
                    },
                );
                place.copied(&self.from[..count], memory)
            }
            _ => return None,
        };
        self.next = self.plan();
        Some(tile)
    }

    /// A side of the tile after the one that was served last, to be requested ahead of its use.
    #[inline(always)]
    pub(crate) fn ahead(&self, side: Side) -> Ahead<'_> {
        match (&self.next, side) {
            (Next::Tile(tile), _) => tile.lines(side),
            (Next::Copies, Side::Key) => Ahead::rows(&self.keys[..self.waiting]),
            (Next::Copies, Side::Value) => Ahead::rows(&self.values[..self.waiting]),
            (Next::Nothing, _) => Ahead::NONE,
        }
    }

    /// Begins the next span if the last one is used up; whether there is one.
    #[inline(always)]
    fn begin(&mut self) -> bool {
        if self.run.is_empty() {
            let Some((span, rest)) = self.spans.split_first() else { return false };
            self.run = span.start as usize..(span.end as usize).min(self.end);
            self.spans = rest;
            if let (Some(place), Some(later)) = (&self.place, rest.get(PAGES_AHEAD))
                && (later.start as usize) < place.end()
            {
                request(place.find(later.start as usize).0);
            }
        }
        true
    }

    /// The segment of the next slot.
    fn enter(&mut self) {
        let mut first = self.place.as_ref().map_or(0, Place::end);
        while let Some((segment, rest)) = self.segments.split_first() {
            self.segments = rest;
            if self.run.start < first + segment.rows {
                self.place = Some(Place::new(segment, first));
                return;
            }
            first += segment.rows;
        }
    }

    fn plan(&mut self) -> Next<'a> {
        while self.begin() {
            if self.place.as_ref().is_none_or(|p| self.run.start >= p.end()) {
                // What waits to be copied is of the segment that ends here.
                if self.waiting > 0 {
                    return Next::Copies;
                }
                self.enter();
            }
            let Some(place) = &self.place else { break };
            if place.align > 1 {
                return Next::Tile(self.around());
            }
            let (page, row) = place.find(self.run.start);
            let within = place.segment.layout.capacity.min(place.end() - (self.run.start - row)) - row;
            let len = self.run.len().min(within);
            if len >= RUN_MIN {
                let len = len.min(TILE);
                let tile = place.tile(page, self.run.start, row, len, u64::MAX);
                self.run.start += len;
                return Next::Tile(tile);
            }
            let len = len.min(TILE - self.waiting);
            let (keys, values) = (place.keys.bytes(page), place.values.bytes(page));
            for row in row..row + len {
                let at = self.waiting;
                self.keys[at] = &keys[row * place.keys.row..][..place.keys.row];
                self.values[at] = &values[row * place.values.row..][..place.values.row];
                self.from[at] = Some((page, row as u32));
                request(&page.positions[row]);
                self.waiting += 1;
            }
            self.run.start += len;
            if self.waiting == TILE {
                return Next::Copies;
            }
        }
        if self.waiting > 0 { Next::Copies } else { Next::Nothing }
    }

    /// The rows of a band of a packed page from the next slot on, as long as chosen ones are near.
    fn around(&mut self) -> Tile<'a> {
        let Some(place) = &self.place else { unreachable!("a segment was entered") };
        let (align, start) = (place.align, self.run.start);
        let (page, row) = place.find(start);
        let capacity = place.segment.layout.capacity;
        let from = row - row % align;
        // Slots of row `from`, of the end of what a tile may hold, and of the first row that is too far away.
        let base = start - (row - from);
        let limit = (base - from + (from - from % BAND + BAND).min(capacity)).min(place.end());
        let (mut chosen, mut last) = (0u64, start);
        loop {
            let end = self.run.end.min(limit);
            let len = end - self.run.start;
            chosen |= u64::MAX >> (TILE - len) << (self.run.start - base);
            last = end.max(last);
            self.run.start = end;
            // A group without chosen rows costs as much to read as another tile; nothing lies between neighbours.
            let far = base + (last - base).next_multiple_of(align) + align;
            if end == limit || !self.begin() || self.run.start >= far.min(limit) {
                break;
            }
        }
        let len = last - base;
        let all = chosen == u64::MAX >> (TILE - len);
        let Some(place) = &self.place else { unreachable!("a segment was entered") };
        place.tile(page, base, from, len, if all { u64::MAX } else { chosen })
    }
}

impl<'a> Place<'a> {
    fn tile(&self, page: &'a Page, slot: usize, from: usize, len: usize, chosen: u64) -> Tile<'a> {
        let (keys, values) = (self.keys.bytes(page), self.values.bytes(page));
        for (stored, bytes) in [(&self.keys, keys), (&self.values, values)] {
            if let Some(packed) = stored.packed {
                let size = 2 * packed.group_halves() * packed.row_groups();
                let at = packed.parameters() + from / packed.group_rows * size;
                bytes.get(at).inspect(|byte| request(*byte));
            }
        }
        let positions = &page.positions[from..from + len];
        request(&positions[0]);
        Tile {
            layout: &self.segment.layout,
            slot,
            positions,
            bias: page.bias.as_deref().map(|b| &b[from..from + len]),
            keys: self.keys.rows(keys),
            values: self.values.rows(values),
            from,
            len,
            chosen,
        }
    }

    /// The tile of rows that were copied to `memory`.
    fn copied<'t>(&self, from: &[Option<(&Page, u32)>], memory: &'t mut Copies<'_>) -> Tile<'t>
    where
        'a: 't,
    {
        let positions = cast_slice_mut::<f32, i32>(memory.positions);
        let mut any = false;
        for ((position, bias), &(page, row)) in
            positions.iter_mut().zip(&mut *memory.bias).zip(from.iter().flatten())
        {
            let row = row as usize;
            *position = page.positions[row];
            *bias = page.bias.as_ref().map_or(0.0, |b| b[row]);
            any |= page.bias.is_some();
        }
        let len = from.len();
        Tile {
            layout: &self.segment.layout,
            slot: 0,
            positions: &positions[..len],
            bias: any.then_some(&memory.bias[..len]),
            keys: self.keys.rows(cast_slice(memory.keys)),
            values: self.values.rows(cast_slice(memory.values)),
            from: 0,
            len,
            chosen: u64::MAX,
        }
    }
}

impl<'a> Tile<'a> {
    /// The bytes of a side that are read of the tile, of packed rows those of their lowest plane.
    #[inline(always)]
    fn lines(&self, side: Side) -> Ahead<'a> {
        let (from, len) = match side {
            Side::Key => (self.from, self.len),
            Side::Value => (self.from + self.unread(), self.len - self.unread()),
        };
        let bytes: &[u8] = match self.stored(side) {
            Rows::F32(s) => cast_slice(s),
            Rows::F16(s) => cast_slice(s),
            Rows::Bf16(s) => cast_slice(s),
            Rows::Packed(packed) => {
                let (bytes, _) = packed.plane_rows(0, from, len);
                return match side {
                    Side::Key if len <= BAND - LANES => Ahead::pieces(bytes, 4 * len, 4 * BAND),
                    _ => Ahead::new(bytes),
                };
            }
        };
        let row = self.layout.row_bytes(side);
        Ahead::new(&bytes[from * row..(from + len) * row])
    }
}

/// Copies rows of `size` bytes one behind the other.
#[inline(always)]
fn copy(rows: &[&[u8]], size: usize, to: &mut [f32]) {
    for (row, to) in rows.iter().zip(cast_slice_mut::<f32, u8>(to).chunks_exact_mut(size)) {
        let (lines, rest) = row.as_chunks::<64>();
        let (to_lines, to_rest) = to.as_chunks_mut::<64>();
        for (line, to) in lines.iter().zip(to_lines) {
            *to = *line;
        }
        to_rest.copy_from_slice(rest);
    }
}

/// Memory for a tile of copies.
#[derive(Debug)]
pub(crate) struct Copies<'m> {
    keys: &'m mut [f32],
    values: &'m mut [f32],
    positions: &'m mut [f32],
    bias: &'m mut [f32],
}

impl<'m> Copies<'m> {
    /// Floats it takes.
    pub(crate) fn len(params: &AttentionParams<'_>) -> usize {
        (TILE * (params.d_k + params.d_v + 2)).next_multiple_of(PAD)
    }

    /// Cuts it out of the front of `memory`, or none if there is less.
    pub(crate) fn cut(memory: &mut &'m mut [f32], params: &AttentionParams<'_>) -> Self {
        let there = memory.len() >= Self::len(params);
        let mut part = |len| take(memory, if there { TILE * len } else { 0 });
        Self { keys: part(params.d_k), values: part(params.d_v), positions: part(1), bias: part(1) }
    }
}
